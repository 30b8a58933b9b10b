"""Prompts are recognised by rows of the hidden states computed from them, and encoded with their super-class."""

import gc
from threading import Thread

import pytest
import torch
from conftest import LENGTH, WIDTH, random_concept

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.model_families.pixart import PixArt
from diffusers_perfusion.model_families.stable_diffusion import StableDiffusion
from diffusers_perfusion.placeholder_tokens import PlaceholderTokens
from diffusers_perfusion.prompt_tracking import Prompt, PromptTracker, RowMemory

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def row(seed):
    return torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def prompt_of(*tokens):
    return Prompt(dict.fromkeys(tokens, (1,)))


# Rows


@pytest.mark.parametrize("seen", DTYPES)
@pytest.mark.parametrize("computed", DTYPES)
def test_a_row_is_recognised_in_any_precision(computed, seen):
    memory, prompt = RowMemory(), prompt_of("<my-cat>")
    memory.remember(row(0).to(computed), prompt)
    assert memory.find(row(0).to(computed).to(seen)) is prompt
    assert memory.find(row(1).to(computed).to(seen)) is None


@pytest.mark.parametrize("first", DTYPES)
def test_a_row_is_recognised_after_it_was_rounded_twice(first):
    """As of a text encoder in bfloat16 whose model is in float16, or with a user who keeps it in one of them."""
    memory, prompt = RowMemory(), prompt_of("<my-cat>")
    memory.remember(row(0), prompt)
    for second in DTYPES:
        assert memory.find(row(0).to(first).to(second)) is prompt


CHANGES = {
    "as it is": lambda e: e[None],
    "repeated for several images": lambda e: e[None].repeat(1, 3, 1).view(3, LENGTH, WIDTH),
    "after the negative prompt": lambda e: torch.cat([row(9)[None], e[None]])[1:],
    "as a view": lambda e: torch.stack([row(9), e])[1:],
    "not contiguous": lambda e: e.T.contiguous().T[None],
    "requiring a gradient": lambda e: e[None].clone().requires_grad_(),
    "in inference mode": torch.inference_mode()(lambda e: e[None].clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_is_recognised_after_what_a_pipeline_does_to_it(change):
    memory, prompt = RowMemory(), prompt_of("<my-cat>")
    memory.remember(row(0), prompt)
    assert all(memory.find(one) is prompt for one in CHANGES[change](row(0)))


def test_a_changed_row_is_not_recognised():
    memory = RowMemory()
    memory.remember(row(0), prompt_of("<my-cat>"))
    for other in (row(0) * 1.1, row(0) + row(1), row(0)[:-1], row(0).flip(0)):
        assert memory.find(other) is None


def test_the_last_prompt_of_a_row_counts():
    memory, last = RowMemory(), prompt_of("<my-dog>")
    memory.remember(row(0), prompt_of("<my-cat>"))
    memory.remember(row(0), last)
    assert memory.find(row(0)) is last


def test_only_the_last_prompts_are_remembered(monkeypatch):
    """A server generates for days; prompts that come again stay."""
    monkeypatch.setattr("diffusers_perfusion.prompt_tracking.MAX_PROMPTS", 3)
    memory = RowMemory()
    for seed in (0, 1, 2, 3, 0, 4, 5):
        memory.remember(row(seed), prompt_of("<my-cat>"))
    assert [memory.find(row(seed)) is not None for seed in range(6)] == [True, False, False, False, True, True]


# Prompts


class Owner:
    """Stands in for a registry of concepts."""


def vector(seed, width=WIDTH):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def tokens(components):
    return PlaceholderTokens.of(components["tokenizer"], components["text_encoder"], StableDiffusion)


@pytest.fixture
def tracker(tokens):
    return PromptTracker.of(tokens)


@pytest.fixture
def add(tokens, owner):
    """Give `owner` placeholder tokens with their super-classes, and attach them."""

    def run(**superclasses):
        for seed, (name, superclass) in enumerate(superclasses.items()):
            tokens.add(owner, f"<{name}>", vector(seed), superclass)
        tokens.attach(owner)

    return run


@torch.no_grad()
def encode(tokens, *prompts, **arguments):
    ids = tokens.tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    return tokens.text_encoder(ids, **arguments)[0]


def test_everybody_has_the_same_tracker_of_a_text_encoder(tokens, tracker):
    assert PromptTracker.of(tokens) is tracker
    assert len(tokens.listeners) == 1


def test_each_row_has_its_own_prompt(tokens, tracker, add):
    add(cat="cat", dog="dog")
    prompts = ["a <cat> on <dog>", "a cat", "<cat> on <cat>", ""]
    found = [tracker.memory.find(row).tokens for row in encode(tokens, *prompts)]
    assert found == [{"<cat>": (2,), "<dog>": (4,)}, {}, {"<cat>": (1, 3)}, {}]


def test_a_prompt_is_tracked_while_tokens_are_attached(tokens, tracker, add, owner):
    before = encode(tokens, "a cat on the beach")
    assert tracker.memory.find(before[0]) is None
    add(cat="cat")
    tokens.detach(owner)
    assert tracker.memory.find(encode(tokens, "a cat on the beach")[0]) is None
    tokens.attach(owner)
    assert tracker.memory.find(encode(tokens, "a cat on the beach")[0]).tokens == {}


def test_nothing_is_tracked_while_paused_in_this_thread(tokens, tracker, add):
    add(cat="cat")
    with tracker.paused():
        hidden_states = encode(tokens, "a <cat>")
        thread = Thread(target=encode, args=(tokens, "a <cat> on the beach"))
        thread.start()
        thread.join()
    assert tracker.memory.find(hidden_states[0]) is None
    with tracker.paused():
        elsewhere = encode(tokens, "a <cat> on the beach")[0]
    assert tracker.memory.find(elsewhere).tokens == {"<cat>": (2,)}
    assert tracker.memory.find(encode(tokens, "a <cat>")[0]) is not None


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_rows_of_all_hidden_states_that_a_pipeline_may_take_are_recognised(xl_pipeline, clip_skip):
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    rows, negative, *_ = xl_pipeline.encode_prompt(
        "a <my-cat>", negative_prompt="<my-cat> on a <my-cat>", clip_skip=clip_skip
    )
    family = family_of(xl_pipeline)
    for found, positions in ((rows[0], (2,)), (negative[0], (1, 4))):
        for text_encoder, part in zip(family.text_encoders, found.split(family.widths, -1), strict=True):
            memory = PromptTracker.of(PlaceholderTokens.existing(text_encoder)).memory
            assert memory.find(part).tokens == {"<my-cat>": positions}


def test_hidden_states_that_no_pipeline_takes_are_not_tracked(xl_components, xl_pipeline):
    xl_pipeline.load_perfusion(random_concept(xl_pipeline))
    tokens = PlaceholderTokens.existing(xl_components["text_encoder_2"])
    calls = []
    tokens.text_encoder.register_forward_hook(lambda module, args, output: calls.append(output))
    encode(tokens, "a <my-cat>")
    encode(tokens, "a <my-cat>", output_hidden_states=True)
    memory = PromptTracker.of(tokens).memory
    hidden_states = calls[-1].hidden_states  # after the super-class prompt's
    assert [memory.find(hidden_states[n][0]) is not None for n in (-3, -2, -1)] == [False, True, False]


@pytest.mark.parametrize("instruction", [["Given a prompt of a photo,", "the good image:"], None])
@pytest.mark.parametrize("length", [LENGTH, 6])
def test_positions_are_those_in_the_row_that_a_pipeline_keeps(sana_pipeline, instruction, length):
    """Sana leaves the positions of its instruction out."""
    sana_pipeline.load_perfusion(random_concept(sana_pipeline))
    calls = []
    sana_pipeline.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(args[0]), prepend=True)
    rows = sana_pipeline.encode_prompt(
        "a <my-cat> on the <my-cat> and the beach",
        complex_human_instruction=instruction,
        max_sequence_length=length,
        do_classifier_free_guidance=False,
    )[0]
    ids = calls[0][0].tolist()
    kept = ids if len(ids) == length else [ids[0], *ids[1 - length :]]
    tokens = PlaceholderTokens.existing(sana_pipeline.text_encoder)
    expected, tracker = tokens.positions(kept), PromptTracker.of(tokens)
    assert expected
    assert rows.shape[1] == length
    assert tracker.memory.find(rows[0]).tokens == expected


def test_a_token_that_is_cut_off_is_not_in_the_row(sana_pipeline):
    sana_pipeline.load_perfusion(random_concept(sana_pipeline))
    tracker = PromptTracker.of(PlaceholderTokens.existing(sana_pipeline.text_encoder))
    rows = sana_pipeline.encode_prompt(
        "a photo of a cat on the beach and a <my-cat>", complex_human_instruction=None, max_sequence_length=6
    )[0]
    assert tracker.memory.find(rows[0]).tokens == {}


# Super-class prompts


def superclass_row(tracker, row):
    return tracker.superclass_hidden_states(tracker.memory.find(row))


def test_the_superclass_prompt_of_one_token_is_the_plain_prompt(tokens, tracker, add):
    expected = encode(tokens, "a cat on the beach")[0]
    add(cat="cat")
    found = superclass_row(tracker, encode(tokens, "a <cat> on the beach")[0])
    assert torch.equal(found, expected) and not found.requires_grad


@pytest.mark.parametrize(
    "rest", ["", "on the beach", " ".join(["beach"] * 18), " ".join(["beach"] * 19), " ".join(["beach"] * 30)]
)
def test_the_superclass_prompt_is_aligned_with_the_prompt(tokens, tracker, add, rest):
    """Each position belongs to the same position of the prompt, also where a longer super-class overflows."""
    plain = encode(tokens, f"a teddy bear {rest}")[0]
    add(bear="teddy bear")
    found = superclass_row(tracker, encode(tokens, f"a <bear> {rest}")[0])
    assert len(found) == LENGTH
    assert torch.equal(found[:2], plain[:2])  # start, "a"
    assert torch.equal(found[2], plain[3])  # the token: "bear"
    assert torch.equal(found[3:23], plain[4:24])
    assert torch.equal(found[23], plain[23])


def test_the_superclass_prompt_of_several_tokens(tokens, tracker, add):
    plain = encode(tokens, "teddy bear on a cat, teddy bear in the beach")[0]
    add(bear="teddy bear", cat="cat")
    found = superclass_row(tracker, encode(tokens, "<bear> on a <cat>, <bear> in the beach")[0])
    positions = [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert torch.equal(found[: len(positions)], plain[positions])


def test_superclass_prompts_of_a_batch_belong_to_their_rows(tokens, tracker, add):
    plain = encode(tokens, "a cat", "on the teddy bear")
    add(bear="teddy bear", cat="cat")
    rows = encode(tokens, "a <cat>", "a dog", "on the <bear>")
    torch.testing.assert_close(superclass_row(tracker, rows[0]), plain[0])
    torch.testing.assert_close(superclass_row(tracker, rows[2])[:4], plain[1, [0, 1, 2, 4]])


@pytest.mark.parametrize("superclass", ["dog", "teddy bear"])
def test_the_superclass_prompt_beside_masked_padding(pixart_components, owner, superclass):
    tokens = PlaceholderTokens.of(pixart_components["tokenizer"], pixart_components["text_encoder"], PixArt)
    tracker = PromptTracker.of(tokens)

    def encode_masked(prompt):
        mask = tokens.tokenizer(prompt, padding="max_length", max_length=LENGTH, return_tensors="pt").attention_mask
        return encode(tokens, prompt, attention_mask=mask)[0]

    expected = encode_masked(f"a {superclass} on the beach")
    tokens.add(owner, "<dog>", vector(0, 20), superclass)
    tokens.attach(owner)
    found = superclass_row(tracker, encode_masked("a <dog> on the beach"))
    longer = len(superclass.split())
    torch.testing.assert_close(found[:6], expected[[0, *range(longer, longer + 5)]])


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("family", ["Stable Diffusion", "Stable Diffusion XL"])
def test_the_superclass_prompt_takes_the_hidden_states_that_the_prompt_does(request, family, clip_skip):
    name = "pipeline" if family == "Stable Diffusion" else "xl_pipeline"
    pipe = request.getfixturevalue(name)
    if not hasattr(pipe.text_encoder, "text_model"):  # which diffusers asks for, and transformers 5 has done away with
        vars(pipe.text_encoder)["text_model"] = pipe.text_encoder
    expected = pipe.encode_prompt(
        "a cat on the beach",
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )[0]
    pipe.load_perfusion(random_concept(pipe))
    rows = pipe.encode_prompt(
        "a <my-cat> on the beach",
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )[0]
    bound = family_of(pipe)
    parts = zip(bound.text_encoders, *(part[0].split(bound.widths, -1) for part in (rows, expected)), strict=True)
    for text_encoder, row, wanted in parts:
        tracker = PromptTracker.of(PlaceholderTokens.existing(text_encoder))
        torch.testing.assert_close(superclass_row(tracker, row), wanted)


def test_the_superclass_prompt_is_cut_as_the_prompt_is(sana_pipeline):
    def encode_prompt(prompt):
        return sana_pipeline.encode_prompt(
            prompt,
            complex_human_instruction=["Given a prompt of a photo,", "the good image:"],
            max_sequence_length=LENGTH,
            do_classifier_free_guidance=False,
        )[0][0]

    expected = encode_prompt("a cat on the beach")
    sana_pipeline.load_perfusion(random_concept(sana_pipeline))
    row = encode_prompt("a <my-cat> on the beach")
    tracker = PromptTracker.of(PlaceholderTokens.existing(sana_pipeline.text_encoder))
    found = superclass_row(tracker, row)
    assert found.shape == row.shape
    torch.testing.assert_close(found, expected)


def test_superclass_prompts_are_encoded_with_their_prompts_and_again_when_they_were_dropped(
    tokens, tracker, add, monkeypatch
):
    monkeypatch.setattr("diffusers_perfusion.prompt_tracking.MAX_SUPERCLASS_PROMPTS", 2)
    passes = []
    add(cat="cat")
    tokens.text_encoder.register_forward_hook(lambda module, args, output: passes.append(len(output[0])))
    rows = encode(tokens, "a <cat>", "a cat", "<cat> on the beach", "<cat> on the beach", "a dog")
    assert passes == [2, 5]  # the two that differ, before the forward pass of the prompts has returned
    assert all(superclass_row(tracker, rows[number]) is not None for number in (0, 2, 3))
    assert len(passes) == 2  # those of one call are all kept
    encode(tokens, "the <cat>")
    assert passes == [2, 5, 1, 1]
    first = superclass_row(tracker, rows[0])
    assert passes == [2, 5, 1, 1, 1]
    assert superclass_row(tracker, rows[0]) is first
    encode(tokens, "a dog", "a cat")
    assert passes == [2, 5, 1, 1, 1, 2]
    assert torch.equal(first, rows[1])


def test_the_bytes_of_superclass_prompts_are_bounded(tokens, tracker, add, monkeypatch):
    add(cat="cat")
    row = encode(tokens, "a cat")[0]
    monkeypatch.setattr("diffusers_perfusion.prompt_tracking.MAX_SUPERCLASS_BYTES", 3 * row.nbytes)
    for number in range(5):
        encode(tokens, f"a photo of {number} <cat>")
        assert len(tracker._superclass_prompts) == min(number + 1, 3)
    many = encode(tokens, *(f"a photo of {number} <cat>" for number in range(4)))
    kept = list(tracker._superclass_prompts.values())
    assert len(kept) == 4  # those of one call
    assert all(superclass_row(tracker, one) is other for one, other in zip(many, kept, strict=True))


def test_no_superclass_prompt_is_known_where_only_the_user_knows_the_tokens(tracker):
    assert tracker.superclass_hidden_states(Prompt({"<my-cat>": ()})) is None


def test_prompts_outlive_a_text_encoder_that_is_freed(components, owner):
    tokenizer, text_encoder = components.pop("tokenizer"), components.pop("text_encoder")
    tokens = PlaceholderTokens.of(tokenizer, text_encoder, StableDiffusion)
    tracker = PromptTracker.of(tokens)
    tokens.add(owner, "<my-cat>", vector(0), "cat")
    tokens.attach(owner)
    encoded, later = encode(tokens, "a <my-cat>")[0], encode(tokens, "the <my-cat>")[0]
    expected = superclass_row(tracker, encoded)
    del tokens, text_encoder
    gc.collect()
    assert torch.equal(superclass_row(tracker, encoded), expected)
    tracker._superclass_prompts.clear()
    assert superclass_row(tracker, later) is None
