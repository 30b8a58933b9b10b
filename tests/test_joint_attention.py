"""Concepts in models whose text and image attend to each other, on a tiny Flux pipeline."""

import copy
import logging
import pickle
from functools import partial
from inspect import signature

import pytest
import torch
from conftest import LENGTH, effect, make_flux, random_concept
from diffusers import FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch._dynamo.testing import CompileCounter

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.joint_attention import ValueHook, value_sites
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.registry import registry_of

BEAR, PLAIN, OTHER = "a <my-bear> on the beach", "a teddy bear on the beach", "a cat"


@pytest.fixture
def pipe(flux_pipeline):
    flux_pipeline.transformer.requires_grad_(False)
    return flux_pipeline


@pytest.fixture
def draw(pipe, generate):
    return partial(generate, pipe=pipe, height=16, width=16, max_sequence_length=LENGTH)


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


# What the model gets


def test_a_closed_gate_gives_the_superclass_prompt(pipe, draw, concept):
    plain = draw(PLAIN)
    pipe.load_perfusion(concept())
    assert effect(draw(BEAR), plain) > 1e-3
    pipe.set_perfusion(bias=2.0)
    assert effect(draw(BEAR), plain) < 1e-4
    pipe.set_perfusion(bias=2.0, temperature=0.01)
    assert torch.equal(draw(BEAR), plain)


def test_the_text_is_that_of_the_superclass_prompt_where_values_alone_are_learned(pipe, draw, concept):
    """At any gate: two super-class tokens for the one of the concept, and the pooled vector too."""
    calls = []

    def record(module, args, kwargs):
        calls.append((kwargs["encoder_hidden_states"], kwargs["pooled_projections"]))

    made = concept()
    made.target_input = made.superclass_input
    pipe.load_perfusion(made)
    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    for prompt, bias in ((PLAIN, 0.7), (BEAR, 0.1), (BEAR, 2.0)):
        pipe.set_perfusion(bias=bias)
        draw(prompt)
    plain, *others = calls[::3]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_hidden_states_move_by_what_is_learned_at_the_last_token_of_the_superclass(pipe, draw, concept):
    seen = []

    def record(module, args, kwargs):
        seen.append((kwargs["encoder_hidden_states"][0], kwargs["pooled_projections"][0]))

    made = concept()
    pipe.load_perfusion(made)
    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    for prompt in (PLAIN, BEAR):
        draw(prompt, num_inference_steps=1)
    (plain, plain_pooled), (moved, pooled) = seen
    assert torch.equal(pooled, plain_pooled)
    ids = pipe.tokenizer_2(PLAIN).input_ids
    bear = ids.index(pipe.tokenizer_2(" bear", add_special_tokens=False).input_ids[0])
    expected = torch.zeros_like(plain)
    gate = torch.sigmoid(torch.tensor((1 - made.bias) / made.temperature))
    expected[bear] = gate * (made.target_input - made.superclass_input)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(moved - plain, expected, atol=1e-5, rtol=1e-4)


def test_values_are_edited_at_the_last_token_of_the_superclass_alone(pipe, draw, concept):
    made, outputs = concept(), {}
    names = family_of(pipe).layers

    def record(name):
        return lambda module, args, output: outputs.setdefault(name, []).append((module.forward(*args), output))

    pipe.load_perfusion(made)
    for name, layer in names.items():
        value_sites(layer)[0].module.register_forward_hook(record(name))
    draw([BEAR, OTHER], num_inference_steps=1)
    ids = pipe.tokenizer_2(PLAIN).input_ids
    bear = ids.index(pipe.tokenizer_2(" bear", add_special_tokens=False).input_ids[0])
    gate = torch.sigmoid(torch.tensor((1 - made.bias) / made.temperature))
    assert outputs.keys() == names.keys()
    for name, ((before, after),) in outputs.items():
        expected = torch.zeros_like(before)
        expected[0, bear] = gate * made.target_outputs[name]
        torch.testing.assert_close(after - before, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(after[1], before[1])


def test_prompts_without_the_token_and_unloading_leave_the_same_bits(pipe, draw, concept):
    plain = draw([BEAR, OTHER])
    before = len(hooks(pipe.transformer))
    pipe.load_perfusion(concept())
    edited = draw([BEAR, OTHER])
    assert torch.equal(edited[1], plain[1]) and effect(edited[0], plain[0]) > 1e-3
    pipe.disable_perfusion()
    assert torch.equal(draw([BEAR, OTHER]), plain)
    pipe.enable_perfusion()
    assert torch.equal(draw([BEAR, OTHER]), edited)
    pipe.unload_perfusion()
    assert torch.equal(draw([BEAR, OTHER]), plain)
    assert len(hooks(pipe.transformer)) == before
    assert registry_of(pipe.transformer) is None


def test_two_concepts_in_one_prompt(pipe, draw, concept):
    prompt, superclasses = "a <my-bear> and a <my-cat>", "a teddy bear and a cat"
    pipe.load_perfusion([concept(), concept("<my-cat>", "cat", 1)])
    both = draw(prompt)
    plain = draw(superclasses)
    for name in ("my-bear", "my-cat"):
        with pipe.set_perfusion({"my-bear": "my-cat", "my-cat": "my-bear"}[name]):  # the other one alone
            alone = draw(prompt)
        assert effect(alone, both) > 1e-3 and effect(alone, plain) > 1e-3
    with pipe.set_perfusion([]):
        assert torch.equal(draw(prompt), plain)


def test_concepts_of_one_superclass_are_told_apart(pipe, draw, concept):
    """None has an embedding by which their prompts would differ."""
    pipe.load_perfusion([concept("<one>"), concept("<two>", seed=1)])
    prompts = ["a <one>", "a <two>", "a teddy bear"]
    assert min(effect(one, two) for one, two in zip(draw(prompts), draw(prompts).roll(1, 0), strict=True)) > 1e-3
    pipe.unload_perfusion()
    pipe.load_perfusion(concept("<one>"), "first")
    pipe.load_perfusion(concept("<one>", seed=1), "second", placeholder_token="<other>")
    one, other = draw(["a <one>", "a <other>"])
    assert effect(one, other) > 1e-3


def test_an_inactive_concept_is_its_superclass(pipe, draw, concept, caplog):
    pipe.load_perfusion(concept())
    plain = draw(PLAIN)
    pipe.set_perfusion([])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw(BEAR), plain)
    assert "<my-bear> in a prompt is not active" in caplog.text


def test_a_token_embedding_is_refused(pipe, concept):
    made = concept()
    made.token_embeddings[1][3] = 1.0
    with pytest.raises(ValueError, match="'<my-bear>' has a token embedding, but in models with joint attention"):
        pipe.load_perfusion(made)


def test_global_locking_is_refused(pipe, concept):
    pipe.load_perfusion(concept())
    with pytest.raises(ValueError, match="locking='global' is not for FluxTransformer2DModel"):
        pipe.set_perfusion(locking="global")


def test_the_mask_of_text_is_that_of_the_superclass_prompt(chroma_pipeline, generate, concept):
    """Which is one token longer."""
    draw = partial(generate, pipe=chroma_pipeline, height=16, width=16, max_sequence_length=LENGTH)
    prompts = [BEAR, PLAIN, OTHER]
    plain = draw(prompts)
    chroma_pipeline.load_perfusion(random_concept(chroma_pipeline, "<my-bear>", "teddy bear"))
    edited = draw(prompts)
    assert torch.equal(edited[1:], plain[1:]) and effect(edited[0], plain[0]) > 1e-3
    chroma_pipeline.set_perfusion(bias=2.0, temperature=0.01)
    assert torch.equal(draw(prompts)[0], plain[1])


# How prompts come


def test_embeddings_of_encode_prompt(pipe, draw, concept):
    pipe.load_perfusion(concept())
    expected = draw([BEAR, OTHER])
    with torch.no_grad():  # as in the pipeline's own call, or the last bits differ
        embeds, pooled, _ = pipe.encode_prompt([BEAR, OTHER], max_sequence_length=LENGTH)
    pipe.text_encoder = pipe.text_encoder_2 = None
    found = draw([BEAR, OTHER], prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert torch.equal(found, expected)
    pipe.set_perfusion(bias=2.0)
    assert (
        effect(draw([BEAR], prompt=None, prompt_embeds=embeds[:1], pooled_prompt_embeds=pooled[:1]), found[:1]) > 1e-3
    )


def test_embeddings_of_others_are_marked(pipe, draw, concept, caplog):
    embeds, pooled, _ = pipe.encode_prompt(PLAIN, max_sequence_length=LENGTH)
    pipe.load_perfusion(concept())
    expected = draw(BEAR)
    arguments = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    with caplog.at_level(logging.WARNING):
        assert effect(draw(PLAIN, **arguments), expected) > 1e-3
    assert "does not recognise 1 of 1 prompt embeddings" in caplog.text
    bear = pipe.tokenizer_2(PLAIN).input_ids.index(pipe.tokenizer_2(" bear", add_special_tokens=False).input_ids[0])
    pipe.mark_perfusion(embeds, {"my-bear": bear})
    torch.testing.assert_close(draw(PLAIN, **arguments), expected)


def test_one_token_of_two_superclasses_on_models_that_share_text_encoders(pipe, draw, concept, caplog):
    """A prompt that another model's pipeline encoded is not recognised, and nobody encodes one for both."""
    parts = {name: getattr(pipe, name) for name in signature(FluxPipeline.__init__).parameters if name != "self"}
    parts |= {"transformer": make_flux(), "image_encoder": None, "feature_extractor": None}
    other, stock = add_perfusion(FluxPipeline(**parts)), FluxPipeline(**parts)
    pipe.load_perfusion(concept())
    other.load_perfusion(random_concept(other, "<my-bear>", "cat", 1))
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(BEAR, max_sequence_length=LENGTH)
    arguments = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    with caplog.at_level(logging.WARNING):
        draw(BEAR, pipe=other, **arguments)
    assert "does not recognise 1 of 1 prompt embeddings" in caplog.text
    with pytest.raises(ValueError, match="'<my-bear>' is loaded on several models that share this text encoder"):
        draw(BEAR, pipe=stock)
    other.set_perfusion(bias=2.0, temperature=0.01)
    assert torch.equal(draw(BEAR, pipe=other), draw("a cat on the beach", pipe=other))


def test_pooled_vectors_that_are_not_recognised_are_warned_of(pipe, draw, concept, caplog):
    pipe.load_perfusion(concept())
    embeds, pooled, _ = pipe.encode_prompt([BEAR, OTHER], max_sequence_length=LENGTH)
    with caplog.at_level(logging.WARNING):
        draw([BEAR, OTHER], prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
        assert not caplog.records
        draw([BEAR, OTHER], prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled * 1.001)
    (record,) = caplog.records
    assert record.message.startswith("Perfusion does not recognise 1 of 2 pooled prompt embeddings, so the model does")


def test_a_stock_pipeline_of_the_same_model_finds_a_token_in_any_case(pipe, draw, concept):
    pipe.load_perfusion(concept())
    expected, stock = draw([BEAR, OTHER]), FluxPipeline.from_pipe(pipe)
    stock.set_progress_bar_config(disable=True)
    assert not hasattr(stock, "load_perfusion")
    assert torch.equal(draw(["a <My-Bear> on the beach", OTHER], pipe=stock), expected)


def test_arguments_by_place_are_seen(pipe, concept, draw):
    pipe.load_perfusion(concept())
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    draw(BEAR, num_inference_steps=1)
    embeds, pooled, _ = pipe.encode_prompt(BEAR, max_sequence_length=LENGTH)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    given = [{**seen[0], "encoder_hidden_states": embeds, "pooled_projections": pooled}[name] for name in names]
    with torch.no_grad():
        by_place = pipe.transformer(*given).sample
        by_name = pipe.transformer(**dict(zip(names, given, strict=True))).sample
        pipe.unload_perfusion()
        assert torch.equal(by_place, by_name)
        assert effect(pipe.transformer(*given).sample, by_place) > 1e-3


def test_a_token_that_t5_does_not_read_is_named_though_clip_reads_it(pipe, concept, caplog):
    pipe.load_perfusion(concept())
    with caplog.at_level(logging.WARNING):
        pipe.encode_prompt([BEAR, f"a {BEAR}"], max_sequence_length=LENGTH)
        assert "falls off" not in caplog.text
        pipe.encode_prompt([BEAR, "a photo of a photo of a photo of a <my-bear>"], max_sequence_length=10)
    assert "<my-bear> falls off the end of a prompt, of which the text encoder reads only the beginning" in caplog.text


def test_a_token_in_the_prompt_of_the_pooled_vector_alone_is_warned_of(pipe, draw, concept, caplog):
    plain = draw(OTHER)
    pipe.load_perfusion(concept())
    with caplog.at_level(logging.WARNING):
        assert effect(draw([BEAR, OTHER], prompt_2=[OTHER, BEAR])[1], plain[0]) > 1e-3
        assert effect(draw([OTHER, OTHER], prompt_2=[OTHER, BEAR])[1], plain[0]) > 1e-3
    (record,) = caplog.records
    assert record.message == (
        "<my-bear> is in a prompt of which the model gets no hidden states, so the concept is not applied there; "
        "expected it in prompt_2."
    )


@pytest.mark.parametrize(("longest", "expected"), [(16, 16), (LENGTH, LENGTH), (10_000, 512)])
def test_text_is_as_long_as_the_tokenizer_and_the_pipeline_allow(pipe, longest, expected):
    pipe.tokenizer_2.model_max_length = longest
    clip, t5 = family_of(pipe).tokenize([PLAIN])
    assert (clip.shape[1], t5.shape[1]) == (LENGTH, expected)


# Beside what else changes the layers


@pytest.mark.parametrize("first", ["concept", "fused"])
def test_fused_projections(pipe, draw, concept, first):
    pipe.load_perfusion(concept())
    expected = draw(BEAR)
    if first == "fused":
        pipe.unload_perfusion()
        pipe.transformer.fuse_qkv_projections()
        pipe.load_perfusion(concept())
    else:
        pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(draw(BEAR), expected, atol=1e-5, rtol=1e-4)
    pipe.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(draw(BEAR), expected, atol=1e-5, rtol=1e-4)
    pipe.unload_perfusion()
    assert not any(isinstance(hook, ValueHook) for hook in hooks(pipe.transformer))


@pytest.mark.parametrize("first", ["concept", "LoRA"])
def test_a_lora_on_the_same_projections_comes_and_goes(pipe, draw, concept, first):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_v", "add_v_proj"], init_lora_weights=False)
    if first == "LoRA":
        pipe.transformer.add_adapter(config)
        pipe.load_perfusion(concept())
        both = draw(BEAR)
    else:
        pipe.load_perfusion(concept())
        alone = draw(BEAR)
        pipe.transformer.add_adapter(config)
        both = draw(BEAR)
        assert effect(both, alone) > 1e-3
    with pipe.set_perfusion(bias=2.0, temperature=0.01):
        assert torch.equal(draw(BEAR), draw(PLAIN))
    assert effect(draw(PLAIN), both) > 1e-3
    pipe.transformer.delete_adapters("default")
    alone = draw(BEAR)
    pipe.unload_perfusion()
    pipe.load_perfusion(concept())
    assert torch.equal(draw(BEAR), alone)


def test_a_processor_of_somebody_else_has_to_call_the_projections(pipe, draw, concept):
    class Calling:
        def __init__(self):
            self.processor = FluxAttnProcessor()

        def __call__(
            self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
        ):
            return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    class NotCalling(Calling):
        def __call__(
            self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
        ):
            return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    pipe.load_perfusion(concept())
    expected = draw(BEAR)
    pipe.transformer.set_attn_processor(Calling())
    assert torch.equal(draw(BEAR), expected)
    pipe.transformer.single_transformer_blocks[1].attn.set_processor(NotCalling())
    with pytest.raises(
        RuntimeError, match=r"NotCalling on single_transformer_blocks.1.attn computes attention without"
    ):
        draw(BEAR)
    draw(OTHER)


def test_a_distributed_model_is_refused(pipe, draw, concept, monkeypatch):
    pipe.load_perfusion(concept())
    expected = draw(BEAR)
    monkeypatch.setattr(pipe.transformer, "_parallel_config", object())
    with pytest.raises(RuntimeError, match="FluxTransformer2DModel is distributed over several devices"):
        draw(BEAR)
    draw(OTHER)
    monkeypatch.undo()
    assert torch.equal(draw(BEAR), expected)


def test_layers_without_a_known_projection_are_refused(pipe, concept):
    del pipe.transformer.single_transformer_blocks[0].attn.to_v
    with pytest.raises(ValueError, match="FluxAttention computes values by no module that Perfusion knows"):
        pipe.load_perfusion(concept())


def test_a_compiled_model_is_compiled_once(pipe, draw, concept):
    def changes():
        images = [draw([BEAR, OTHER])]
        with pipe.set_perfusion(bias=0.3):
            images.append(draw([BEAR, OTHER]))
        pipe.disable_perfusion()
        images.append(draw([BEAR, OTHER]))
        pipe.enable_perfusion()
        return images

    pipe.load_perfusion(concept())
    eager = changes()
    counter = CompileCounter()
    pipe.transformer.compile(backend=counter)
    pipe.load_perfusion(concept("<my-cat>", "cat", 1))
    compiled = changes()
    assert all(effect(*pair) < 1e-5 for pair in zip(eager, compiled, strict=True))
    assert counter.frame_count == 2  # with an edit and without


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_the_concepts(pipe, draw, concept, copied):
    pipe.load_perfusion(concept())
    expected = draw(BEAR)
    original, other = pipe.transformer, copied(pipe.transformer)
    vars(pipe)["transformer"] = other
    assert torch.equal(draw(BEAR), expected)
    pipe.unload_perfusion()
    assert not any(isinstance(hook, ValueHook) for hook in hooks(other))
    plain = draw(BEAR)
    vars(pipe)["transformer"] = original
    assert torch.equal(draw(BEAR), expected) and effect(plain, expected) > 1e-3


# Concepts of other models


def test_concepts_of_other_models_are_refused(pipe, concept, make_concept):
    with pytest.raises(ValueError, match=r"hidden states of width 32, but FluxTransformer2DModel .* takes width 20"):
        pipe.load_perfusion(make_concept())
    wide = concept()
    wide.target_outputs = {name: output.repeat(2) for name, output in wide.target_outputs.items()}
    with pytest.raises(ValueError, match=r"output of 32 numbers for transformer_blocks.0.attn, but .* has 16"):
        pipe.load_perfusion(wide)
    deep = concept()
    deep.target_outputs["single_transformer_blocks.2.attn"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"does not have the attention layers of .*: 0 missing .* 1 unknown"):
        pipe.load_perfusion(deep)
    single = concept()
    single.token_embeddings = single.token_embeddings[1:]
    with pytest.raises(ValueError, match="has 1 token embeddings, but this pipeline has 2 text encoders"):
        pipe.load_perfusion(single)
    assert registry_of(pipe.transformer) is None
    assert not any(isinstance(hook, ValueHook) for hook in hooks(pipe.transformer))


def test_a_file_keeps_that_there_are_no_embeddings(pipe, draw, concept, tmp_path):
    made = concept()
    pipe.load_perfusion(made)
    expected = draw(BEAR)
    pipe.unload_perfusion()
    pipe.load_perfusion(made.save(tmp_path / "bear.safetensors", dtype=torch.float32))
    assert torch.equal(draw(BEAR), expected)


def test_a_file_in_half_precision_under_autocast(pipe, draw, concept, tmp_path):
    plain = draw(BEAR)
    pipe.load_perfusion(concept().save(tmp_path / "bear.safetensors"))
    expected = draw(BEAR)
    with torch.autocast("cpu", torch.bfloat16):
        found = draw(BEAR)
    assert effect(found, expected) < 0.3 * effect(expected, plain)


# Gradients


def test_gradient_checkpointing_gives_the_same_gradients(pipe, concept):
    made = concept()
    pipe.load_perfusion(made)
    registry, family = registry_of(pipe.transformer), family_of(pipe)
    outputs = [output.requires_grad_() for output in registry.loaded["my-bear"].concept.target_outputs.values()]
    with torch.no_grad():
        encoding = family.encode(family.tokenize([PLAIN]))
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def gradients():
        registry.prepare(encoding.hidden_states, [{"<my-bear>": (3,)}], encoding.pooled)
        prediction = family.predict(pipe.transformer, noisy, torch.tensor([500]), encoding, 16)
        return torch.autograd.grad(prediction.square().mean(), outputs)

    plain = gradients()
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    for one, other in zip(plain, gradients(), strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


def test_the_model_is_called_as_by_the_pipeline(pipe, draw):
    """Latents packed, positions, timesteps, and the guidance of distilled models."""
    vars(pipe)["transformer"] = make_flux(True)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    packed = pipe._pack_latents(latents, 1, 4, 8, 8)
    draw(PLAIN, latents=packed, num_inference_steps=1, guidance_scale=1.0)
    family = family_of(pipe)
    with torch.no_grad():
        encoding = family.encode([ids[:, :LENGTH] for ids in family.tokenize([PLAIN])])
        prediction = family.predict(pipe.transformer, latents, torch.tensor([1000]), encoding, 16)
        expected = pipe.transformer(**calls[0])[0]
    theirs, ours = calls[:2]
    for name in ("hidden_states", "timestep", "img_ids", "txt_ids", "guidance", "pooled_projections"):
        assert torch.equal(theirs[name], ours[name]), name
    torch.testing.assert_close(pipe._pack_latents(prediction, 1, 4, 8, 8), expected, atol=1e-3, rtol=1e-2)
