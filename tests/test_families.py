"""Which family a pipeline is of, and what its model is called with."""

import pytest
import torch
from conftest import make_unet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusers_perfusion.families import FAMILIES, family_of, text_encoders


@pytest.mark.parametrize(("name", "encoders"), [("pipeline", 1), ("xl_pipeline", 2)])
def test_the_family_of_a_pipeline(request, name, encoders):
    pipe = request.getfixturevalue(name)
    assert len(family_of(pipe).text) == encoders
    texts = text_encoders(pipe)
    assert texts.models == tuple(getattr(pipe, model) for _, model in family_of(pipe).text)
    assert texts.width == pipe.unet.config.cross_attention_dim
    pipe.text_encoder = None
    assert len(family_of(pipe).text) == encoders


def test_every_family_is_met():
    assert {family.name for family in FAMILIES} == {"Stable Diffusion", "Stable Diffusion XL"}


@pytest.mark.parametrize("name", ["pipeline", "xl_pipeline"])
def test_the_model_is_called_as_the_pipeline_calls_it(request, name, generate):
    """With a prompt alone, and in the size that the model is made for."""
    pipe, calls = request.getfixturevalue(name), []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    prompts = ["a cat on the beach", "a dog"]
    generate(prompts, pipe, guidance_scale=1.0)
    texts = text_encoders(pipe)
    with torch.no_grad():
        encoding = texts.encode(texts.tokenize(prompts))
    assert torch.equal(calls[0]["encoder_hidden_states"], encoding.states)
    given = calls[0].get("added_cond_kwargs") or {}
    expected = family_of(pipe).conditions(encoding.pooled, 16).get("added_cond_kwargs", {})
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(given[key], value)


def test_pipelines_that_cannot_take_a_concept(components, xl_components):
    blind = components | {"unet": make_unet(cross_attention_dim=64)}
    with pytest.raises(ValueError, match=r"takes text of width 64, but its text encoders give width 32"):
        text_encoders(StableDiffusionPipeline(**blind))
    pipe = StableDiffusionXLPipeline(**xl_components)
    pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline has no text_encoder_2, which has to learn"):
        text_encoders(pipe)
    pipe.unet = None
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline has no UNet with cross-attention"):
        family_of(pipe)
