"""What models with joint attention make of concepts, layers, prompts, caches and devices that do not fit."""

import copy
import logging
from functools import partial
from inspect import signature

import pytest
import torch
import torch.distributed
from conftest import LENGTH, effect, random_concept
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffusers_perfusion.joint_attention import ValueHook, value_sites
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.registry import registry_of

BEAR, PLAIN, OTHER = "a <my-bear> on the beach", "a teddy bear on the beach", "a cat"
TOO_LONG = "a photo of a photo of a photo of a photo of a photo of a photo of a photo of a photo of a <my-bear>"

# With the length of text at which `WORDS` words fit, which T5 ends with a token, and chats begin with some.
WORDS = LENGTH - 1
FAMILIES = {
    "sd3_pipeline": LENGTH,
    "flux_pipeline": LENGTH,
    "klein_pipeline": WORDS + 3,
    "dev_pipeline": WORDS + 48,
    "chroma_pipeline": LENGTH,
    "z_image_pipeline": WORDS + 3,
    "qwen_image_pipeline": WORDS,
}


@pytest.fixture(params=FAMILIES)
def pipe(request):
    pipeline = request.getfixturevalue(request.param)
    pipeline.transformer.requires_grad_(False)
    return pipeline


@pytest.fixture
def length(request, pipe):
    return FAMILIES[request.node.callspec.params["pipe"]]


@pytest.fixture
def draw(pipe, length, generate):
    return partial(generate, pipe=pipe, height=16, width=16, max_sequence_length=length)


@pytest.fixture
def concept(pipe):
    return random_concept(pipe, "<my-bear>", "teddy bear")


def value_hooks(model):
    return [hook for part in model.modules() for hook in part._forward_hooks.values() if isinstance(hook, ValueHook)]


# Concepts of other models


@pytest.mark.parametrize(
    ("pipe", "other"),
    [
        (one, other)
        for one in FAMILIES
        for other in ("pipeline", "xl_pipeline", "pixart_pipeline", *FAMILIES)
        if other != one
    ],
    indirect=["pipe"],
)
def test_concepts_of_other_families_are_refused(request, pipe, other):
    foreign = request.getfixturevalue(other)
    concept = random_concept(foreign, "<my-bear>", "teddy bear")
    with pytest.raises(ValueError, match=r"<my-bear>' (edits hidden states of width|has \d token embeddings, but)"):
        pipe.load_perfusion(concept)
    assert registry_of(pipe.transformer) is None and not value_hooks(pipe.transformer)
    concept = random_concept(pipe, "<my-bear>", "teddy bear")
    with pytest.raises(ValueError, match=r"'<my-bear>' (edits hidden states of width|has \d token embeddings, but)"):
        foreign.load_perfusion(concept)


def test_a_concept_of_a_unet_of_the_same_width_is_refused(pipe, pipeline):
    concept = random_concept(pipeline, "<my-bear>", "teddy bear")
    width = family_of(pipe).input_width
    for name in ("target_input", "inverse_target_input", "superclass_input", "inverse_superclass_input"):
        setattr(concept, name, torch.ones(width))
    missing = len(family_of(pipe).layers)
    with pytest.raises(
        ValueError, match=rf"does not have the attention layers of \w+2DModel .*: {missing} missing \("
    ):
        pipe.load_perfusion(concept)


# Layers that somebody has changed


class Wrapper(nn.Module):
    """As other packages put around a projection."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, hidden_states):
        return self.wrapped(hidden_states)


def fresh(projection):
    """A projection of the same numbers, without hooks."""
    other = nn.Linear(projection.in_features, projection.out_features, bias=projection.bias is not None)
    other.load_state_dict(projection.state_dict())
    return other


@pytest.mark.parametrize("replaced_by", [Wrapper, fresh, copy.deepcopy])
@pytest.mark.parametrize("first", ["concept", "replaced"])
def test_a_projection_that_was_replaced_is_edited_once(pipe, draw, concept, replaced_by, first):
    def replace():
        for layer in family_of(pipe).layers.values():
            projection = value_sites(layer)[0].module
            name = next(name for name, module in layer.named_children() if module is projection)
            setattr(layer, name, replaced_by(projection))

    plain = draw(BEAR)
    pipe.load_perfusion(concept)
    expected = draw(BEAR)
    if first == "replaced":
        pipe.unload_perfusion()
        replace()
        pipe.load_perfusion(concept)
    else:
        replace()
    assert torch.equal(draw(BEAR), expected)
    registry = registry_of(pipe.transformer)
    pipe.unload_perfusion()
    assert not [hook for hook in value_hooks(pipe.transformer) if hook.edits is registry]
    assert torch.equal(draw(BEAR), plain)


def last_layer(pipe):
    """The name of the last attention layer, and the layer."""
    return list(family_of(pipe).layers.items())[-1]


def test_a_layer_that_was_replaced_is_named(pipe, draw, concept):
    name, before = last_layer(pipe)
    pipe.load_perfusion(concept)
    expected = draw(BEAR)
    other = copy.deepcopy(before)
    for module in other.modules():
        module._forward_hooks.clear()
    pipe.transformer.set_submodule(name, other)
    with pytest.raises(RuntimeError, match=rf"1 attention layers were replaced .* \({name}\)"):
        draw(BEAR)
    draw(OTHER)
    pipe.unload_perfusion()
    pipe.load_perfusion(concept)
    assert torch.equal(draw(BEAR), expected)
    blocks, _, number = name.rpartition(".")[0].rpartition(".")
    del pipe.transformer.get_submodule(blocks)[int(number)]
    with pytest.raises(RuntimeError, match=rf"1 attention layers were replaced .* \({name}\)"):
        draw(BEAR)


def test_a_compiled_layer_is_none_that_was_replaced(pipe, draw, concept):
    pipe.load_perfusion(concept)
    expected = draw(BEAR)
    name, layer = last_layer(pipe)
    pipe.transformer.set_submodule(name, torch.compile(layer, backend="eager"))
    torch.testing.assert_close(draw(BEAR), expected)


# Caches


def attention_is_kept(**settings):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500,
    )


CACHES = {
    "FirstBlockCache": lambda: FirstBlockCacheConfig(threshold=10.0),
    "PyramidAttentionBroadcast": attention_is_kept,
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1),
    "TaylorSeer, lite": lambda: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, use_lite_mode=True
    ),
    "MagCache": lambda: MagCacheConfig(
        threshold=10.0, num_inference_steps=6, mag_ratios=FLUX_MAG_RATIOS, retention_ratio=0.1
    ),
    "SeaCache": lambda: SeaCacheConfig(threshold=10.0, raw_vision_callback=lambda model, args, kwargs: None),
    "TextKVCache": TextKVCacheConfig,
}


class Calling:
    """A processor of somebody else that calls diffusers' own."""

    def __init__(self, processor):
        self.processor = processor
        self.__call__ = processor.__call__  # layers give it the arguments that this one takes

    def __call__(self, *args, **kwargs):
        return self.processor(*args, **kwargs)


class NotCalling(Calling):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


@pytest.mark.parametrize("processor", ["diffusers", "Calling"])
@pytest.mark.parametrize("cache", CACHES)
def test_concepts_are_in_what_caches_keep(flux_pipeline, generate, cache, processor):
    pipe = flux_pipeline
    draw = partial(generate, pipe=pipe, height=16, width=16, max_sequence_length=LENGTH, num_inference_steps=6)
    uncached = draw(PLAIN)
    pipe.transformer.enable_cache(CACHES[cache]())
    plain = draw(PLAIN)
    assert effect(plain, uncached) > 1e-3 or cache in ("SeaCache", "TextKVCache")  # these keep nothing of Flux
    pipe.load_perfusion(random_concept(pipe, "<my-bear>", "teddy bear"))
    if processor == "Calling":
        for layer in family_of(pipe).layers.values():
            layer.set_processor(Calling(layer.processor))
    edited = draw(BEAR)
    assert effect(edited, plain) > 1e-3
    assert torch.equal(draw(PLAIN), plain)
    assert torch.equal(draw(BEAR), edited)
    with pipe.set_perfusion(bias=2.0, temperature=0.01):
        assert torch.equal(draw(BEAR), plain)
    name, layer = last_layer(pipe)
    layer.set_processor(NotCalling(layer.processor))
    with pytest.raises(RuntimeError, match=f"NotCalling on {name} computes attention without"):
        draw(BEAR)


def test_a_processor_that_comes_after_one_that_edits_is_none_that_edits(pipe, draw, concept):
    """Although the edit is that of an earlier call."""
    pipe.load_perfusion(concept)
    name, layer = last_layer(pipe)
    layer.set_processor(Calling(layer.processor))
    called = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: called.append((args, kwargs)), with_kwargs=True, prepend=True
    )
    draw(BEAR, num_inference_steps=1)
    handle.remove()
    args, kwargs = called[0]
    with torch.no_grad():
        for _ in range(2):
            pipe.transformer(*args, **kwargs)
        layer.set_processor(NotCalling(layer.processor))
        with pytest.raises(RuntimeError, match=f"NotCalling on {name} computes attention"):
            pipe.transformer(*args, **kwargs)


# Text encoders that are gone


@pytest.fixture
def unload_text_encoders(pipe, monkeypatch):
    """Leave the pipeline without text encoders, and its prompts as when these are freed."""

    def run():
        for name in [name for name in pipe.components if name.startswith("text_encoder")]:
            setattr(pipe, name, None)
        for connection in registry_of(pipe.transformer)._connections:
            for tracker in connection.trackers:
                monkeypatch.setattr(tracker, "_tokens", lambda: None)

    return run


# What `encode_prompt` of each pipeline returns first, by the names that the pipeline's call has for it.
RETURNED = {
    "StableDiffusion3Pipeline": {0: "prompt_embeds", 2: "pooled_prompt_embeds"},
    "FluxPipeline": {0: "prompt_embeds", 1: "pooled_prompt_embeds"},
    "ChromaPipeline": {0: "prompt_embeds", 2: "prompt_attention_mask"},
    "QwenImagePipeline": {0: "prompt_embeds", 1: "prompt_embeds_mask"},
}


def embeddings_of(pipe, prompts, length):
    """What the pipeline's call takes in place of prompts, without guidance."""
    parameters = signature(pipe.encode_prompt).parameters
    arguments = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
    arguments = {name: value for name, value in arguments.items() if name in parameters}
    with torch.no_grad():
        encoded = pipe.encode_prompt(prompts, max_sequence_length=length, **arguments)
    returned = RETURNED.get(type(pipe).__name__, {0: "prompt_embeds"})
    return {"prompt": None, "guidance_scale": 0.0} | {name: encoded[number] for number, name in returned.items()}


def test_a_superclass_prompt_that_is_gone_is_an_error(pipe, length, draw, concept, unload_text_encoders, monkeypatch):
    monkeypatch.setattr("diffusers_perfusion.prompt_tracking.MAX_SUPERCLASS_PROMPTS", 1)
    pipe.load_perfusion(concept)
    expected = draw(["the <my-bear>"], guidance_scale=0.0)
    first, second = embeddings_of(pipe, BEAR, length), embeddings_of(pipe, "the <my-bear>", length)
    unload_text_encoders()
    with pytest.raises(ValueError, match="super-class prompts of some prompt embeddings are not kept any more"):
        draw([BEAR], **first)
    assert torch.equal(draw(["the <my-bear>"], **second), expected)
    pipe.disable_perfusion()
    draw([BEAR], **first)


def test_a_pooled_superclass_prompt_that_is_gone_is_an_error(flux_pipeline, generate, monkeypatch):
    monkeypatch.setattr("diffusers_perfusion.prompt_tracking.MAX_SUPERCLASS_PROMPTS", 1)
    pipe = flux_pipeline
    draw = partial(generate, [BEAR], pipe=pipe, height=16, width=16, max_sequence_length=LENGTH)
    pipe.load_perfusion(random_concept(pipe, "<my-bear>", "teddy bear"))
    first = embeddings_of(pipe, BEAR, LENGTH)
    embeddings_of(pipe, "the <my-bear>", LENGTH)
    clip = registry_of(pipe.transformer)._connections[0].trackers[0]
    monkeypatch.setattr(clip, "_tokens", lambda: None)  # as where it was freed, and T5 was not
    with pytest.raises(ValueError, match="super-class prompts of some prompt embeddings are not kept any more"):
        draw(**first)


def test_a_prompt_for_a_text_encoder_that_is_gone_is_an_error(pipe, draw, concept, unload_text_encoders):
    pipe.load_perfusion(concept)
    unload_text_encoders()
    with pytest.raises(ValueError, match=r"Pipeline has no text_encoder, which Perfusion needs"):
        draw(BEAR)
    pipe.unload_perfusion()
    with pytest.raises(ValueError, match=r"Pipeline has no text_encoder, which Perfusion needs"):
        pipe.load_perfusion(concept)


# Prompts that are too long


@pytest.fixture
def warnings(caplog):
    """Return how often a token was said to fall off the end of a prompt."""
    caplog.set_level(logging.WARNING)
    return lambda token: caplog.text.count(f"{token} falls off the end of a prompt")


@pytest.mark.parametrize("prompts", [TOO_LONG, [BEAR, TOO_LONG]])
def test_a_token_that_falls_off_the_end_is_named(pipe, draw, concept, prompts, warnings):
    pipe.load_perfusion(concept)
    draw(prompts, num_inference_steps=1)
    assert warnings("<my-bear>") == 1


# CLIP reads as much as ever.
@pytest.mark.parametrize("pipe", [name for name in FAMILIES if name != "sd3_pipeline"], indirect=True)
def test_a_token_behind_the_length_of_a_call_is_named(pipe, draw, concept, warnings):
    pipe.load_perfusion(concept)
    draw("a good photo of a photo of a <my-bear>", num_inference_steps=1, max_sequence_length=8)
    assert warnings("<my-bear>") == 1


# By family, what says that negative prompts are read, and that they are not.
GUIDED = {
    "sd3_pipeline": ({}, {"guidance_scale": 0.0}),
    "flux_pipeline": ({"true_cfg_scale": 2.0}, {}),
    "chroma_pipeline": ({}, {"guidance_scale": 0.0}),
    "z_image_pipeline": ({}, {"guidance_scale": 0.0}),
    "qwen_image_pipeline": ({}, {"true_cfg_scale": 1.0}),
}


@pytest.fixture
def guided(request):
    return GUIDED[request.node.callspec.params["pipe"]]


@pytest.mark.parametrize("pipe", GUIDED, indirect=True)
@pytest.mark.parametrize(
    ("prompts", "negative"), [([TOO_LONG], [BEAR]), ([BEAR], [TOO_LONG]), ([BEAR, TOO_LONG], [BEAR, BEAR])]
)
def test_a_token_that_falls_off_beside_a_negative_prompt_is_named(
    pipe, draw, concept, guided, prompts, negative, warnings
):
    pipe.load_perfusion(concept)
    draw(prompts, negative_prompt=negative, num_inference_steps=1, **guided[0])
    assert warnings("<my-bear>") == 1


# Z-Image takes a negative prompt for each.
@pytest.mark.parametrize("pipe", [name for name in GUIDED if name != "z_image_pipeline"], indirect=True)
def test_a_negative_prompt_for_several(pipe, draw, concept, guided, warnings):
    pipe.load_perfusion(concept)
    draw([BEAR, BEAR], negative_prompt=BEAR, num_inference_steps=1, **guided[0])
    assert warnings("<my-bear>") == 0
    draw([BEAR, BEAR, TOO_LONG], negative_prompt=BEAR, num_inference_steps=1, **guided[0])
    assert warnings("<my-bear>") == 1


@pytest.mark.parametrize("pipe", GUIDED, indirect=True)
@pytest.mark.parametrize("negative", [BEAR, TOO_LONG])
def test_a_negative_prompt_that_is_not_read_loses_nothing(pipe, draw, concept, guided, negative, warnings):
    pipe.load_perfusion(concept)
    draw([BEAR, BEAR], negative_prompt=negative, num_inference_steps=1, **guided[1])
    assert warnings("<my-bear>") == 0


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_superclass_of_several_tokens_at_the_end(pipe, length, draw, concept, last):
    """As many of its tokens as there is room for behind the rest, and the last one at least.

    Where text has no length of its own, all of them.
    """
    whole = family_of(pipe).follows_length
    before = " ".join(["a"] * (WORDS - 1 - last))
    plain = draw(f"{before} {'teddy bear' if last or whole else 'bear'}", max_sequence_length=length + whole)
    pipe.load_perfusion(concept)
    assert effect(draw(f"{before} <my-bear>"), plain) > 1e-3
    # CLIP, which begins with a token of its own, has one place less.
    if "text_encoder_2" not in pipe.components:
        pipe.set_perfusion(bias=2.0, temperature=0.01)
        assert torch.equal(draw(f"{before} <my-bear>"), plain)


@pytest.fixture
def two_at_the_end(pipe, draw, concept):
    """Load a second concept, and draw both at the end of a prompt."""
    pipe.load_perfusion(concept)
    pipe.load_perfusion(random_concept(pipe, "<other>", "teddy bear", 1))
    return lambda: draw(" ".join([*["a"] * (WORDS - 2), "<my-bear> <other>"]))


@pytest.mark.parametrize("pipe", ["flux_pipeline", "klein_pipeline", "dev_pipeline", "chroma_pipeline"], indirect=True)
def test_of_two_concepts_at_the_end_the_first_is_named_where_it_falls_off(pipe, two_at_the_end, warnings):
    both = two_at_the_end()
    assert warnings("<my-bear>") == 1 and warnings("<other>") == 0
    with pipe.set_perfusion("other"):
        assert torch.equal(two_at_the_end(), both)


# CLIP has a place less, for the first of them; the others have one more for each.
@pytest.mark.parametrize("pipe", ["sd3_pipeline", "z_image_pipeline", "qwen_image_pipeline"], indirect=True)
def test_of_two_concepts_at_the_end_none_falls_off_where_there_is_room(pipe, two_at_the_end, warnings):
    both = two_at_the_end()
    assert warnings("<my-bear>") == warnings("<other>") == 0
    for name in pipe.list_perfusion():
        with pipe.set_perfusion(name):
            assert effect(two_at_the_end(), both) > 1e-3


# Several devices


@pytest.fixture
def two_processes():
    """The first of two processes, of which the other is pretended."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def flux(flux_pipeline):
    return flux_pipeline, random_concept(flux_pipeline, "<my-bear>", "teddy bear")


@pytest.mark.parametrize("first", ["concept", "parallel"])
def test_context_parallelism_is_refused(flux, generate, two_processes, monkeypatch, first):
    pipe, concept = flux
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    if first == "concept":
        pipe.load_perfusion(concept)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    if first == "concept":
        with pytest.raises(RuntimeError, match=r"FluxTransformer2DModel is distributed .* \(enable_parallelism\)"):
            generate(BEAR, pipe=pipe, height=16, width=16, max_sequence_length=LENGTH)
    else:
        with pytest.raises(ValueError, match=r"FluxTransformer2DModel is distributed .* \(enable_parallelism\)"):
            pipe.load_perfusion(concept)
        assert registry_of(pipe.transformer) is None and not pipe.list_perfusion()


@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"])
@pytest.mark.parametrize("local", [True, False])
def test_projections_that_are_sharded_are_refused(flux, generate, two_processes, layer, local):
    pipe, concept = flux
    pipe.load_perfusion(concept)
    (site, *_) = value_sites(pipe.transformer.get_submodule(layer))
    parallelize_module(site.module, two_processes, ColwiseParallel(use_local_output=local))
    with pytest.raises(RuntimeError, match=f"projection to values of {layer} is distributed over several devices"):
        generate(BEAR, pipe=pipe, height=16, width=16, max_sequence_length=LENGTH)
