"""A registry on a model: attached, detached without a trace, and prepared before each forward pass."""

import pytest
import torch
from conftest import LENGTH, WIDTH
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor

from diffusers_perfusion.model_families import cross_attention_layers
from diffusers_perfusion.model_hooks import attach, detach, replaced_layers
from diffusers_perfusion.registry import registry_of


@pytest.fixture
def unet(pipeline):
    return pipeline.unet.requires_grad_(False)


@torch.no_grad()
def predict(unet, hidden_states):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return unet(latents, 500, hidden_states).sample


@pytest.fixture
def hidden_states(load, encode):
    """Of a prompt without and a prompt with a token, as guidance has them in one batch."""
    load("my-cat")
    return encode("", "a <my-cat>")


def test_detach_gives_back_the_very_processors(unet, registry, hidden_states):
    before = dict(unet.attn_processors)
    plain, hooks = predict(unet, hidden_states), dict(unet._forward_pre_hooks)
    for _ in range(2):
        attach(unet, registry)
        assert registry_of(unet) is registry
        assert not torch.equal(predict(unet, hidden_states), plain)
        detach(unet)
        detach(unet)
        assert registry_of(unet) is None
        assert unet.attn_processors.keys() == before.keys()
        assert all(unet.attn_processors[name] is processor for name, processor in before.items())
        assert dict(unet._forward_pre_hooks) == hooks
        assert torch.equal(predict(unet, hidden_states), plain)


def test_a_processor_that_somebody_holds_edits_nothing_after_detach(unet, registry, hidden_states):
    plain = predict(unet, hidden_states)
    attach(unet, registry)
    assert not torch.equal(predict(unet, hidden_states), plain)
    held = unet.attn_processors
    detach(unet)
    unet.set_attn_processor(held)
    assert torch.equal(predict(unet, hidden_states), plain)


def test_attach_twice_is_once(unet, registry, hidden_states):
    attach(unet, registry)
    processors, hooks = dict(unet.attn_processors), dict(unet._forward_pre_hooks)
    edited = predict(unet, hidden_states)
    attach(unet, registry)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert dict(unet._forward_pre_hooks) == hooks
    assert torch.equal(predict(unet, hidden_states), edited)


def test_only_cross_attention_is_wrapped(unet, registry):
    before = dict(unet.attn_processors)
    attach(unet, registry)
    wrapped = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
    assert wrapped == {name for name in before if "attn2" in name}
    assert {name.removesuffix(".processor") for name in wrapped} == set(cross_attention_layers(unet))


def test_saved_weights_of_the_model_have_no_trace(unet, registry, hidden_states, tmp_path):
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    attach(unet, registry)
    predict(unet, hidden_states)
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    for state_dict in (unet.state_dict(), loaded.state_dict()):
        assert state_dict.keys() == before.keys()
        assert all(torch.equal(state_dict[name], tensor) for name, tensor in before.items())
    assert registry_of(loaded) is None


def test_hidden_states_by_name_and_by_place_are_both_seen(unet, registry, hidden_states):
    attach(unet, registry)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    by_name = unet(sample=sample, timestep=500, encoder_hidden_states=hidden_states).sample
    assert torch.equal(by_name, predict(unet, hidden_states))
    forward = unet.forward
    unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as tools that cache blocks do
    assert torch.equal(by_name, predict(unet, hidden_states))


@pytest.mark.parametrize("all_of_them", [False, True])
def test_replaced_processors_are_an_error_and_repaired_by_attach(unet, registry, hidden_states, encode, all_of_them):
    attach(unet, registry)
    edited = predict(unet, hidden_states)
    assert replaced_layers(registry) == {}
    if all_of_them:
        unet.set_attn_processor(AttnProcessor())
    else:
        next(iter(cross_attention_layers(unet).values())).set_processor(AttnProcessor())
    assert set(replaced_layers(registry).values()) == {"AttnProcessor"}
    with pytest.raises(
        RuntimeError, match=rf"{len(replaced_layers(registry))} layers were replaced .*enable_perfusion"
    ):
        predict(unet, hidden_states)
    predict(unet, encode("", "a cat"))  # a prompt without a token works on
    attach(unet, registry)
    torch.testing.assert_close(predict(unet, hidden_states), edited, atol=1e-5, rtol=1e-4)


def test_a_processor_that_wraps_ours_is_not_a_replaced_one(unet, registry, hidden_states):
    class Wrapper:
        def __init__(self, processor):
            self.processor = processor

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask)

    attach(unet, registry)
    edited = predict(unet, hidden_states)
    for layer in cross_attention_layers(unet).values():
        layer.set_processor(Wrapper(layer.processor))
    assert torch.equal(predict(unet, hidden_states), edited)
    attach(unet, registry)  # wraps the wrapper, and edits once
    assert torch.equal(predict(unet, hidden_states), edited)


def test_a_processor_that_only_keeps_ours_is_a_replaced_one(unet, registry, hidden_states):
    attach(unet, registry)
    for layer in cross_attention_layers(unet).values():
        kept, layer.processor = layer.processor, AttnProcessor()
        layer.processor.previous = kept
    with pytest.raises(RuntimeError, match="4 layers were replaced"):
        predict(unet, hidden_states)


def test_processors_of_a_concept_alone_are_refused(unet, registry, make_concept, hidden_states):
    unet.set_attn_processor(make_concept("<my-dog>", "dog", 1).attn_processors(unet))
    before = dict(unet.attn_processors)
    with pytest.raises(ValueError, match=r"has a PerfusionAttnProcessor already, .*AttnProcessor2_0"):
        attach(unet, registry)
    assert registry_of(unet) is None and dict(unet.attn_processors) == before
    with pytest.raises(ValueError, match=r"4 layers .* have a PerfusionAttnProcessor already"):
        make_concept().attn_processors(unet)


def test_a_layer_that_is_called_by_somebody_else_is_not_edited(unet, registry, hidden_states):
    """By another model that was given the processors, say."""
    attach(unet, registry)
    predict(unet, hidden_states)
    layer = next(iter(cross_attention_layers(unet).values()))
    x, e = torch.randn(1, 4, layer.query_dim), hidden_states[:1]
    with torch.no_grad():
        found = layer(x, e)
        detach(unet)
        assert torch.equal(layer(x, e), found)


# Training


def gradients(unet, registry, outputs, hidden_states):
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    registry.prepare(hidden_states, rows=[{}, {"<my-cat>": (2,)}])
    unet(sample, 500, hidden_states).sample.square().mean().backward()
    found = [output.grad for output in outputs]
    for output in outputs:
        output.grad = None
    return found


def test_gradient_checkpointing_gives_the_same_gradients(unet, registry, load):
    """The layers are computed again in the backward pass."""
    concept = load("my-cat")
    outputs = [output.requires_grad_() for output in concept.target_outputs.values()]
    attach(unet.train(), registry)
    e = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    same = e.detach().clone().requires_grad_()
    plain = gradients(unet, registry, outputs, e)
    unet.enable_gradient_checkpointing()
    checkpointed = gradients(unet, registry, outputs, same)
    for one, other in zip(plain, checkpointed, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)
    assert e.grad[1].any()
    torch.testing.assert_close(e.grad, same.grad)


# Models that concepts cannot be edited into


def test_joint_attention_models_are_refused():
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=16,
    )
    with pytest.raises(ValueError, match=r"SD3Transformer2DModel has no cross-attention .*joint attention"):
        cross_attention_layers(model)


def test_models_without_text_are_refused():
    model = UNet2DModel(
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="UNet2DModel has no cross-attention layer from text"):
        cross_attention_layers(model)
