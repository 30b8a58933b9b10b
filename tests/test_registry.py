"""Which rows of which batch are edited, that the edit is computed once, and that the model is left without a trace."""

import copy
import gc
import logging
from dataclasses import replace
from threading import Thread

import pytest
import torch
from conftest import LENGTH, WIDTH, expected_gates, make_text_encoder, places_of, random_concept

from diffusers_perfusion import PerfusionPipeline
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.placeholder_tokens import PlaceholderTokens
from diffusers_perfusion.registry import ConceptRegistry, registry_of


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Return the warnings since the last call."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)

    def run():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return run


def row(seed):
    return torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def edited_rows(edit):
    """Return the indices of the edited rows."""
    return edit.gate.flatten(1).any(1).nonzero()[:, 0].tolist()


# Recognising rows


def test_rows_that_hold_a_token_are_edited(registry, load, encode):
    load("my-cat")
    hidden_states = encode("a cat", "a <my-cat>", "", "a cat on the <my-cat>")
    registry.prepare(hidden_states)
    assert edited_rows(registry.edit) == [1, 3]
    registry.prepare(torch.cat([row(9)[None], hidden_states[1:2].repeat(2, 1, 1)]).bfloat16())
    assert edited_rows(registry.edit) == [1, 2]


def test_batches_without_a_token_are_not_edited(registry, load, encode):
    load("my-cat")
    for hidden_states in (encode("a cat", ""), row(0)[None], torch.zeros(1, LENGTH, WIDTH)):
        registry.prepare(hidden_states)
        assert registry.edit is None


def test_no_edit_while_disabled_or_inactive(registry, load, encode):
    load("my-cat")
    hidden_states = encode("a <my-cat>")
    registry.enable(False)
    registry.prepare(hidden_states)
    assert registry.edit is None
    registry.enable(True)
    registry.configure(active=[], locking="local")
    registry.prepare(hidden_states)
    assert registry.edit is None
    registry.configure(active=["my-cat"], locking="local")
    registry.prepare(hidden_states)
    assert registry.edit is not None


def test_a_caller_may_say_which_tokens_are_where(registry, load):
    """As a trainer does, whose hidden states change in each step."""
    concept = load("my-cat")
    registry.prepare(torch.stack([row(0), row(1)]), rows=[{}, {"<my-cat>": (2,)}])
    assert edited_rows(registry.edit) == [1]
    assert registry.edit.concepts == (concept,)


def test_registered_rows_are_edited(registry, load):
    cat, dog = load("my-cat"), load("my-dog", 1)
    registry.register(torch.stack([row(0), row(1)]), {"<my-cat>": ()})
    registry.register(row(2)[None], {"<my-dog>": (), "<my-cat>": ()})
    registry.prepare(torch.stack([row(0), row(3), row(1)]).half())
    assert edited_rows(registry.edit) == [0, 2]
    assert registry.edit.concepts == (cat,)
    registry.prepare(row(2)[None])
    assert registry.edit.concepts == (cat, dog)


def test_what_a_row_holds_may_be_registered_anew(registry, load, encode):
    """Also for the batch at hand, and for a row that was recognised."""
    load("my-cat")
    hidden_states = encode("a cat", "a <my-cat>")
    registry.prepare(hidden_states)
    assert edited_rows(registry.edit) == [1]
    registry.register(hidden_states[:1], {"<my-cat>": ()})
    registry.prepare(hidden_states)
    assert edited_rows(registry.edit) == [0, 1]
    registry.register(hidden_states, {})
    registry.prepare(hidden_states)
    assert registry.edit is None


def test_rows_of_several_text_encoders_are_recognised_by_all_their_parts(xl_pipeline, warnings):
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    registry = registry_of(xl_pipeline.unet)
    rows, plain, other = (
        xl_pipeline.encode_prompt(*prompts, do_classifier_free_guidance=False)[0]
        for prompts in (("a <my-cat>", "a dog"), ("a dog", "a <my-cat>"), ("a dog", "a cat"))
    )
    registry.prepare(torch.cat([rows, plain, other, torch.zeros_like(rows)]))
    assert edited_rows(registry.edit) == [0, 1]
    assert not warnings()
    mixed = torch.cat([rows[..., :WIDTH], row(0)[None, :, :24]], -1)
    registry.prepare(mixed)
    assert registry.edit is None and len(warnings()) == 1


# Warnings


def test_a_batch_that_is_not_recognised_is_warned_of_once(registry, load, encode, warnings):
    """Weighted prompts and other text encoders: the concept would be lost silently."""
    load("my-cat")
    weighted = torch.cat([encode("a <my-cat>") * 1.1, encode("a cat")])
    for _ in range(3):
        registry.prepare(weighted)
        registry.configure(["my-cat"], "local")  # the edit is recomputed
    (message,) = warnings()
    assert "does not recognise 1 of 2 prompt embeddings" in message and "mark_perfusion" in message
    registry.prepare(weighted.clone())
    assert len(warnings()) == 1


def test_no_warning_of_rows_that_are_recognised(registry, load, encode, warnings):
    load("my-cat")
    registry.register(row(0)[None], {"<my-cat>": (3,)})
    for hidden_states in (
        encode("a <my-cat>", "a cat", ""),
        row(0)[None],
        torch.zeros(2, LENGTH, WIDTH),
    ):
        registry.prepare(hidden_states)
    registry.enable(False)
    registry.prepare(row(1)[None])
    assert not warnings()


def test_both_warnings_of_one_batch_are_given(registry, load, encode, warnings):
    load("my-cat")
    load("my-dog", 1)
    registry.configure(["my-dog"], "local")
    hidden_states = torch.cat([encode("a <my-cat>"), row(0)[None]])
    registry.prepare(hidden_states)
    assert len(warnings()) == 2


def test_a_token_that_is_not_active_is_warned_of_once(registry, load, encode, warnings):
    load("my-cat")
    load("my-dog", 1)
    registry.configure(active=["my-dog"], locking="local")
    hidden_states = encode("a <my-cat> on a <my-dog>")
    for _ in range(2):
        registry.prepare(hidden_states)
        registry.configure(["my-dog"], "local")  # the edit is recomputed
    (message,) = warnings()
    assert message.startswith("<my-cat> in a prompt is not active")


# What the edit holds


def test_rows_without_a_token_have_a_gate_of_zero(registry, load):
    concept = load("my-cat")
    hidden_states = torch.stack([row(0), row(1), row(2)])
    registry.prepare(hidden_states, rows=[{}, {"<my-cat>": (3,)}, {}])
    assert edited_rows(registry.edit) == [1]
    coef, gate = expected_gates(row(1), concept, tokens=[(3,)])
    torch.testing.assert_close(registry.edit.coef[1], coef)
    torch.testing.assert_close(registry.edit.gate[1], gate)
    assert registry.edit.gate[1, 3] > 0
    assert registry.edit.superclass_prompt is None


def test_each_row_is_edited_by_its_own_concepts(registry, load):
    """Two concepts in one row share a projection, which they must not with one in another row."""
    cat, dog, bear = (load(name, seed, bias=0.5 + 0.1 * seed) for seed, name in enumerate(["cat", "dog", "bear"]))
    held = [(cat, dog), (dog,), (), (bear,), (dog, bear), (dog,)]
    hidden_states = torch.stack([row(n) for n in range(len(held))])
    places = {cat: (2,), dog: (3, 5), bear: (4,)}
    rows = [{concept.placeholder_token: places[concept] for concept in concepts} for concepts in held]
    registry.prepare(hidden_states, rows=rows)
    edit = registry.edit
    assert edit.concepts == (bear, cat, dog)
    for number, concepts in enumerate(held):
        columns = [edit.concepts.index(concept) for concept in concepts]
        others = [n for n in range(3) if n not in columns]
        assert not edit.gate[number][:, others].any()
        if concepts:
            tokens = [places[concept] for concept in concepts]
            coef, gate = expected_gates(hidden_states[number], *concepts, tokens=tokens)
            torch.testing.assert_close(edit.coef[number][:, columns], coef)
            torch.testing.assert_close(edit.gate[number][:, columns], gate)
    for n, concept in enumerate((bear, cat, dog)):
        assert torch.equal(edit.superclass_input[n], concept.superclass_input)


@pytest.mark.parametrize(
    "prompt",
    ["<my-cat>", "my <my-cat> and a <my-cat>", "two <my-cat>s on the beach", "a dog on a <my-cat>", "red <my-cat>"],
)
def test_the_gate_at_a_token_is_that_of_bias_and_temperature_wherever_it_stands(
    registry, load, encode, pipeline, prompt
):
    load("my-cat", bias=0.9, temperature=0.15)
    hidden_states = encode(prompt)
    places = places_of(pipeline.tokenizer, prompt, "<my-cat>")
    assert len(places) == prompt.count("<my-cat>")
    registry.prepare(hidden_states)
    expected = torch.sigmoid(torch.tensor(0.1 / 0.15))
    torch.testing.assert_close(registry.edit.gate[0, places, 0], expected.expand(len(places)))
    assert registry.edit.gate[0, :, 0].nonzero()[:, 0].tolist() == places


def test_the_gate_at_the_sixtieth_position_of_a_long_prompt_is_the_same(components):
    components["tokenizer"].model_max_length = 77
    components["text_encoder"] = make_text_encoder(components["tokenizer"], max_position_embeddings=77)
    pipeline = PerfusionPipeline(**components)
    pipeline.load_perfusion(random_concept(pipeline, bias=0.9, temperature=0.15))
    hidden_states, _ = pipeline.encode_prompt("a " * 59 + "<my-cat> on the beach", "cpu", 1, False)
    registry = registry_of(pipeline.unet)
    registry.prepare(hidden_states)
    (found,) = registry.edit.gate.nonzero().tolist()
    assert found == [0, 60, 0]
    torch.testing.assert_close(registry.edit.gate[0, 60, 0], torch.sigmoid(torch.tensor(0.1 / 0.15)))


def test_a_token_is_found_where_nobody_knows_its_position_with_a_warning(registry, load, warnings):
    unit = torch.eye(WIDTH)  # random ones may be hard to tell apart
    cat, dog = (
        load(f"my-{name}", target_input=e, inverse_target_input=e)
        for name, e in zip(("cat", "dog"), unit, strict=False)
    )
    hidden_states = torch.stack([row(0), row(1)]) / 10
    hidden_states[0, 4], hidden_states[0, 7] = cat.target_input, dog.target_input
    hidden_states[1, 2], hidden_states[1, 5] = cat.target_input, dog.target_input
    registry.register(hidden_states[:1], {"<my-cat>": (), "<my-dog>": ()})
    registry.register(hidden_states[1:], {"<my-cat>": ()})
    registry.prepare(hidden_states)
    assert registry.edit.gate.nonzero().tolist() == [[0, 4, 0], [0, 7, 1], [1, 2, 0]]
    assert "Nobody knows where the tokens of 'my-cat', 'my-dog' are" in " ".join(warnings())


def test_only_active_concepts_edit(registry, load):
    cat, dog = load("cat", 0), load("dog", 1)
    for active, concepts in ((["dog"], (dog,)), (["dog", "cat"], (cat, dog)), (["cat", "dog", "cat"], (cat, dog))):
        registry.configure(active=active, locking="local")
        registry.prepare(row(0)[None], rows=[{"<cat>": (), "<dog>": ()}])
        assert registry.edit.concepts == concepts
        torch.testing.assert_close(registry.edit.coef[0], expected_gates(row(0), *concepts)[0])


def test_two_concepts_of_one_super_class_are_in_one_prompt(registry, load, encode, pipeline):
    """Their target inputs may even be the same: the tokens say which is meant where."""
    one, other = load("cat", 0), load("other", 1)
    same = {"target_input": one.target_input, "inverse_target_input": one.inverse_target_input}
    registry.loaded["other"].concept = replace(other, **same)
    prompt = "a <cat> and a <other>"
    hidden_states = encode(prompt)
    registry.prepare(hidden_states)
    places = [places_of(pipeline.tokenizer, prompt, token)[0] for token in ("<cat>", "<other>")]
    assert registry.edit.gate[0].nonzero().tolist() == [[places[0], 0], [places[1], 1]]

    registry.register(hidden_states, {"<cat>": (), "<other>": ()})
    registry.prepare(hidden_states)
    assert registry.edit.gate[0].nonzero().tolist() == [[places[0], 0], [places[1], 1]]

    weighted = 1.5 * hidden_states
    for given in ({"<cat>": (), "<other>": ()}, {"<cat>": (), "<other>": (places[0],)}):
        registry.register(weighted, given)
        if given["<other>"]:  # where the other is most likely, too
            hidden = one.target_input / one.target_input.norm() * weighted.norm(dim=-1).max() * 2
            weighted[0, places[0]] = hidden
            registry.register(weighted, given)
        with pytest.raises(ValueError, match=r"the tokens of 'cat', 'other' cannot be told apart .* mark_perfusion"):
            registry.prepare(weighted)
        assert registry.edit is None
    registry.register(weighted, {"<cat>": (places[0],), "<other>": (places[1],)})
    registry.prepare(weighted)
    assert registry.edit.gate[0].nonzero().tolist() == [[places[0], 0], [places[1], 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_concepts_and_hidden_states_are_edited_in_float32(registry, make_concept, dtype):
    concept = make_concept("<my-cat>").to(dtype)
    registry.add("my-cat", concept)
    registry.prepare(row(0)[None].to(dtype), rows=[{"<my-cat>": ()}])
    edit = registry.edit
    assert edit.coef.dtype == edit.gate.dtype == edit.superclass_input.dtype == torch.float32
    coef, _ = expected_gates(row(0).to(dtype).float(), concept.to(torch.float32))
    torch.testing.assert_close(edit.coef[0], coef, rtol=1e-5, atol=1e-6)


def test_the_edit_is_in_what_the_layers_get(pixart_pipeline):
    """PixArt projects hidden states before its layers."""
    concept = random_concept(pixart_pipeline)
    pixart_pipeline.load_perfusion(concept)
    registry = registry_of(pixart_pipeline.transformer)
    hidden_states = torch.randn(1, LENGTH, 20)
    registry.prepare(hidden_states, rows=[{"<my-cat>": ()}])
    projected = pixart_pipeline.transformer.caption_projection(hidden_states)
    torch.testing.assert_close(registry.edit.coef[0], expected_gates(projected[0], concept)[0])


# Once for all layers and steps


def test_an_edit_is_computed_once_for_each_batch(registry, load, encode):
    load("my-cat")
    hidden_states = encode("a <my-cat>")
    registry.prepare(hidden_states)
    first = registry.edit
    for _ in range(3):
        registry.prepare(hidden_states)
    assert registry.edit is first
    assert registry.edit_for(torch.zeros(3), "a layer") is first
    registry.prepare(hidden_states.clone())
    assert registry.edit is not first


def test_an_edit_is_recomputed_when_a_setting_changes(registry, load, encode):
    load("my-cat")
    hidden_states = encode("a <my-cat>")
    registry.prepare(hidden_states)
    before = registry.edit.gate
    assert registry.edit.superclass_prompt is None
    registry.loaded["my-cat"].bias = torch.tensor(0.1)
    registry.configure(["my-cat"], "local")
    registry.prepare(hidden_states)
    assert registry.edit.gate.sum() > before.sum()
    before = registry.edit.gate
    registry.loaded["my-cat"].temperature = torch.tensor(1.0)
    registry.configure(["my-cat"], "local")
    registry.prepare(hidden_states)
    assert registry.edit.gate.sum() < before.sum()
    registry.configure(["my-cat"], "global")
    registry.prepare(hidden_states)
    assert registry.edit.superclass_prompt is not None
    registry.enable(False)
    registry.prepare(hidden_states)
    assert registry.edit is None


def test_an_edit_is_recomputed_when_the_hidden_states_change_in_place(registry, load, encode):
    """A callback may write into `prompt_embeds` between two steps."""
    load("my-cat")
    hidden_states = encode("a cat", "a <my-cat>")
    registry.prepare(hidden_states)
    assert edited_rows(registry.edit) == [1]
    hidden_states[0] = hidden_states[1]
    registry.prepare(hidden_states)
    assert edited_rows(registry.edit) == [0, 1]
    hidden_states.zero_()
    registry.prepare(hidden_states)
    assert registry.edit is None


def test_hidden_states_of_inference_mode_are_edited_once(registry, load, encode):
    load("my-cat")
    with torch.inference_mode():
        hidden_states = encode("a <my-cat>").clone()
        registry.prepare(hidden_states)
        first = registry.edit
        registry.prepare(hidden_states)
    assert edited_rows(first) == [0]
    assert registry.edit is first


def test_an_edit_of_hidden_states_that_are_gone_is_not_taken_for_others(registry, load, encode):
    """A new batch may lie at the address of an old one."""
    load("my-cat")
    encoded, plain = encode("a <my-cat>", "a cat").split(1)
    for _ in range(20):
        hidden_states = encoded.clone()
        registry.prepare(hidden_states)
        assert registry.edit is not None
        del hidden_states
        hidden_states = plain.clone()
        registry.prepare(hidden_states)
        assert registry.edit is None


def test_each_thread_has_the_edit_of_its_own_batch(registry, load, encode):
    load("my-cat")
    encoded, plain = encode("a <my-cat>", "a cat").split(1)
    registry.prepare(encoded)
    edit, elsewhere = registry.edit, []

    def run():
        elsewhere.append(registry.edit)  # as a backward pass, which computes layers again in a thread of its own
        registry.prepare(plain)
        elsewhere.append(registry.edit)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert elsewhere == [edit, None]
    assert registry.edit is edit


# The super-class prompt


def test_hidden_states_fade_to_the_superclass_prompt_as_the_gate_shuts(registry, load, encode):
    plain = encode("a cat", "a dog on the beach", "on the teddy bear")
    load("my-cat")
    load("my-bear", 1, "teddy bear")
    hidden_states = encode("a <my-cat>", "a dog on the beach", "on the <my-bear>")
    for bias in (-9.0, 1.0, 9.0):
        registry.loaded["my-cat"].bias = torch.tensor(bias)
        registry.configure(["my-cat", "my-bear"], "local")
        registry.prepare(hidden_states)
        gate = registry.edit.gate[0].amax()
        torch.testing.assert_close(registry.edit.inputs[0], torch.lerp(plain[0], hidden_states[0], gate))
        assert torch.equal(registry.edit.inputs[1], hidden_states[1])
    gate = registry.edit.gate[2].amax()
    expected = torch.lerp(plain[2, [0, 1, 2, 4]], hidden_states[2, :4], gate)
    torch.testing.assert_close(registry.edit.inputs[2, :4], expected)


@pytest.mark.parametrize("given", [False, True])
def test_hidden_states_do_not_fade_where_nobody_knows_the_prompt(registry, load, encode, given):
    load("my-cat")
    registry.register(row(0)[None], {"<my-cat>": (1,)})
    registry.prepare(row(0)[None], rows=[{"<my-cat>": (1,)}] if given else None)
    assert registry.edit.gate.any() and registry.edit.inputs is None
    if not given:
        known = encode("a <my-cat>")
        registry.prepare(torch.cat([row(0)[None], known]))
        assert torch.equal(registry.edit.inputs[0], row(0))
        assert not torch.equal(registry.edit.inputs[1], known[0])


def test_a_superclass_prompt_that_is_gone_is_warned_of(registry, load, encode, monkeypatch, warnings):
    monkeypatch.setattr("diffusers_perfusion.prompt_tracking.MAX_SUPERCLASS_PROMPTS", 1)
    load("my-cat")
    first, other = encode("a <my-cat>"), encode("on the <my-cat>")
    for tracker in registry._connections[0].trackers:
        monkeypatch.setattr(tracker, "_tokens", lambda: None)  # as where the text encoder was freed
    registry.prepare(other)
    assert registry.edit.inputs is not None and not warnings()
    registry.prepare(first)
    assert registry.edit.gate.any() and registry.edit.inputs is None
    assert "The super-class prompts of some prompt embeddings are not kept any more" in " ".join(warnings())


def test_global_key_locking_takes_the_superclass_prompt(registry, load, encode):
    """Also of prompts that were encoded before the locking was chosen."""
    plain = encode("a cat", "a dog on the beach", "on the teddy bear")
    load("my-cat")
    load("my-bear", 1, "teddy bear")
    hidden_states = encode("a <my-cat>", "a dog on the beach", "on the <my-bear>")
    registry.configure(["my-cat", "my-bear"], "global")
    registry.prepare(hidden_states)
    superclass_prompt = registry.edit.superclass_prompt
    torch.testing.assert_close(superclass_prompt[0], plain[0])
    assert torch.equal(superclass_prompt[1], hidden_states[1])
    torch.testing.assert_close(superclass_prompt[2, :4], plain[2, [0, 1, 2, 4]])
    registry.prepare(hidden_states.half())
    assert torch.equal(registry.edit.superclass_prompt, superclass_prompt.half())
    registry.configure(["my-cat"], "global")
    registry.prepare(hidden_states)
    assert torch.equal(registry.edit.superclass_prompt[2], hidden_states[2])


def test_global_key_locking_of_several_text_encoders(xl_pipeline):
    """A prompt may be for one of them alone."""

    def encode(*prompts):
        return xl_pipeline.encode_prompt(*prompts, do_classifier_free_guidance=False)[0]

    expected = torch.cat([encode("a cat on the beach"), encode("a cat", "a dog")])
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    xl_pipeline.set_perfusion(locking="global")
    registry = registry_of(xl_pipeline.unet)
    registry.prepare(torch.cat([encode("a <my-cat> on the beach"), encode("a <my-cat>", "a dog")]))
    torch.testing.assert_close(registry.edit.superclass_prompt, expected)


@pytest.mark.parametrize("given", [False, True])
def test_global_key_locking_needs_a_prompt(registry, load, given):
    load("my-cat")
    registry.configure(["my-cat"], "global")
    registry.register(row(0)[None], {"<my-cat>": ()})
    with pytest.raises(ValueError, match=r"global key-locking needs the super-class prompt.*locking='local'"):
        registry.prepare(row(0)[None], rows=[{"<my-cat>": ()}] if given else None)
    registry.configure(["my-cat"], "local")
    registry.prepare(row(0)[None])
    assert registry.edit is not None


# Text encoders


def test_a_concept_is_known_to_all_text_encoders_or_none(xl_pipeline):
    family, concept = family_of(xl_pipeline), random_concept(xl_pipeline)
    sizes = [len(tokenizer) for tokenizer in family.tokenizers]
    registry = ConceptRegistry(family)
    registry.connect(family)
    registry.add("my-cat", concept)
    assert all(len(tokenizer) > size for tokenizer, size in zip(family.tokenizers, sizes, strict=True))
    family.tokenizers[1].add_tokens(["<other>"])
    for change in (
        lambda: registry.remove("my-cat"),
        lambda: registry.add("my-dog", random_concept(xl_pipeline, "<my-dog>", "dog")),
        lambda: registry.enable(False),
    ):
        with pytest.raises(ValueError, match="the tokens <other> were added"):
            change()
        for tokenizer in family.tokenizers:
            assert len(tokenizer("<my-cat>", add_special_tokens=False).input_ids) == 1
            assert len(tokenizer.tokenize("<my-dog>")) > 1
        assert registry.enabled and list(registry.loaded) == registry.active == ["my-cat"]


def test_a_concept_of_another_number_of_text_encoders_is_refused(xl_pipeline, make_concept):
    family = family_of(xl_pipeline)
    registry = ConceptRegistry(family)
    registry.connect(family)
    with pytest.raises(ValueError, match="has 1 token embeddings, but this pipeline has 2 text encoders"):
        registry.add("my-cat", make_concept())
    assert registry.loaded == {} and registry.active == []
    assert [PlaceholderTokens.existing(text_encoder) for text_encoder in family.text_encoders] == [None, None]


def test_removing_the_last_concept_leaves_the_text_encoder_as_it_was(registry, load, family):
    size = len(family.tokenizers[0])
    load("my-cat")
    load("my-dog", 1)
    registry.remove("my-cat")
    assert list(registry.loaded) == registry.active == ["my-dog"]
    registry.remove("my-dog")
    assert len(family.tokenizers[0]) == size
    assert PlaceholderTokens.existing(family.text_encoders[0]) is None


def test_nothing_is_tracked_while_paused(registry, load, encode, warnings):
    load("my-cat")
    with registry.paused_tracking():
        hidden_states = encode("a <my-cat>")
    registry.prepare(hidden_states)
    assert registry.edit is None and warnings()


def test_a_freed_registry_leaves_the_tokenizer(family, make_concept):
    (tokenizer,) = family.tokenizers
    size, registry = len(tokenizer), ConceptRegistry(family)
    registry.connect(family)
    registry.add("my-cat", make_concept())
    assert len(tokenizer) > size
    del registry
    gc.collect()
    assert len(tokenizer) == size


def test_a_copy_shares_the_text_encoders_and_not_the_concepts(registry, load, family, encode):
    load("my-cat")
    hidden_states = encode("a <my-cat>")
    size = len(family.tokenizers[0])
    copied = copy.deepcopy(registry)
    assert len(family.tokenizers[0]) == size
    copied.prepare(hidden_states)
    assert edited_rows(copied.edit) == [0]
    assert copied.loaded["my-cat"].concept is not registry.loaded["my-cat"].concept
    registry.remove("my-cat")
    assert list(copied.loaded) == ["my-cat"]
    assert len(family.tokenizers[0]) == size
    copied.remove("my-cat")
    assert len(family.tokenizers[0]) < size
