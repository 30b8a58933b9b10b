"""Which family a pipeline is of, and what its model is called with."""

import pytest
import torch
from conftest import make_pixart, make_unet, random_concept
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from diffusers_perfusion.model_families import FAMILIES, edited_model, family_of


@pytest.fixture
def alpha_pipeline(pixart_components):
    """PixArt-α of 1024 pixels, as far as its model is concerned."""
    return PixArtAlphaPipeline(**pixart_components | {"transformer": make_pixart(128)})


ALL = {
    "pipeline": ("Stable Diffusion", {}),
    "xl_pipeline": ("Stable Diffusion XL", {}),
    "pixart_pipeline": ("PixArt", {}),
    "alpha_pipeline": ("PixArt", {"height": 16, "width": 16}),
    "cosmos_pipeline": ("Cosmos", {"height": 16, "width": 16, "max_sequence_length": 24}),
    "chroma_pipeline": ("Chroma", {"height": 16, "width": 16, "max_sequence_length": 24}),
    "qwen_image_pipeline": ("Qwen-Image", {"height": 16, "width": 16}),
    "z_image_pipeline": ("Z-Image", {"height": 16, "width": 16}),
    "klein_pipeline": ("FLUX.2 klein", {"height": 16, "width": 16, "max_sequence_length": 32}),
    "dev_pipeline": ("FLUX.2 dev", {"height": 16, "width": 16}),
    "flux_pipeline": ("Flux", {"height": 16, "width": 16, "max_sequence_length": 24}),
    "sd3_pipeline": ("Stable Diffusion 3", {"height": 16, "width": 16, "max_sequence_length": 24}),
    "sana_pipeline": ("Sana", {"height": 32, "width": 32, "max_sequence_length": 24}),
}


@pytest.mark.parametrize("name", ALL)
def test_the_family_of_a_pipeline(request, name):
    pipe, family = request.getfixturevalue(name), ALL[name][0]
    assert family_of(pipe).name == family
    bound = family_of(pipe)
    assert bound.text_encoders == tuple(getattr(pipe, model) for _, model in family_of(pipe).text_components)


def test_every_family_is_met():
    assert {family.name for family in FAMILIES} == {family for family, _ in ALL.values()}


@pytest.mark.parametrize("name", [name for name in ALL if name != "z_image_pipeline"])  # it takes other arguments
def test_the_model_is_called_as_the_pipeline_calls_it(request, name, generate):
    """With a prompt alone, and in the size that the model is made for."""
    pipe, (family, arguments), calls = request.getfixturevalue(name), ALL[name], []
    if family in ("PixArt", "Sana"):
        arguments = arguments | {"use_resolution_binning": False, "clean_caption": False}
    model = edited_model(pipe)
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    prompts = ["a cat on the beach", "a dog"]
    generate(prompts, pipe, guidance_scale=1.0, **arguments)
    bound = family_of(pipe)
    with torch.no_grad():
        encoding = bound.encode(bound.tokenize(prompts))
    # Without padding that is masked out, or is more than the pipeline was asked for.
    length = min(encoding.hidden_states.shape[1], calls[0]["encoder_hidden_states"].shape[1])
    torch.testing.assert_close(calls[0]["encoder_hidden_states"][:, :length], encoding.hidden_states[:, :length])
    expected = family_of(pipe).conditions(encoding, 16)
    assert expected or family in ("Stable Diffusion", "Cosmos")
    if "attention_mask" in expected:
        assert torch.equal(calls[0]["attention_mask"], expected["attention_mask"])
    if "encoder_attention_mask" in expected:
        assert torch.equal(calls[0]["encoder_attention_mask"][:, :length], expected["encoder_attention_mask"])
        assert not calls[0]["encoder_attention_mask"][:, length:].any()
    if "pooled_projections" in expected:
        assert torch.equal(calls[0]["pooled_projections"], expected["pooled_projections"])
    given = calls[0].get("added_cond_kwargs") or {}
    for key, value in expected.get("added_cond_kwargs", {}).items():
        assert (given[key] is None and value is None) or torch.equal(given[key], value)


@pytest.mark.parametrize("name", ALL)
def test_gradient_checkpointing_changes_nothing(request, name):
    """Neither what the model predicts nor its gradients, where prompts differ in length."""
    family = family_of(request.getfixturevalue(name))
    with torch.no_grad():
        encoding = family.encode(family.tokenize(["a cat on the beach", "a dog"]))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, family.latent_channels, 8, 8, generator=generator, requires_grad=True)

    def prediction_and_gradient():
        text = family.without_padding(encoding)
        prediction = family.predict(family.model, noisy, torch.tensor([500, 200]), text, 16)
        return prediction, *torch.autograd.grad(prediction.square().mean(), noisy)

    expected = prediction_and_gradient()
    family.enable_gradient_checkpointing()
    assert family.model.is_gradient_checkpointing
    assert all(torch.equal(*pair) for pair in zip(prediction_and_gradient(), expected, strict=True))


# Of those whose text is not in place of the super-class prompt's, a super-class of one token keeps all positions.
BEHIND = ["a {}, good", "a {}.", "a photo of a {} (good)", "{}'s photo", 'a good photo: "a {}"', "a {}-photo"]
BEFORE = ["({}), good", 'a "{}" on', "a '{}'", "a [{}]", "a good-{}"]


@pytest.mark.parametrize("token", ["<my-cat>", "sks"])
@pytest.mark.parametrize("name", sorted({*ALL} - {"alpha_pipeline", "xl_pipeline"}))  # XL's pooled vector stays
def test_a_closed_gate_gives_the_superclass_prompt_beside_any_sign(request, name, generate, token):
    pipe, (family, arguments) = request.getfixturevalue(name), ALL[name]
    if family in ("PixArt", "Sana"):
        arguments = arguments | {"use_resolution_binning": False, "clean_caption": False}
    joint = family_of(pipe).joint
    superclass, prompts = ("teddy bear", [*BEHIND, *BEFORE]) if joint else ("cat", BEHIND)
    plain = generate([prompt.replace("{}", superclass) for prompt in prompts], pipe, **arguments)
    pipe.load_perfusion(random_concept(pipe, token, superclass))
    prompts = [prompt.replace("{}", token) for prompt in prompts]
    assert (generate(prompts, pipe, **arguments) - plain).flatten(1).abs().amax(1).min() > 1e-3
    pipe.set_perfusion(bias=2.0, temperature=0.01)
    torch.testing.assert_close(generate(prompts, pipe, **arguments), plain, atol=1e-5, rtol=1e-4)


def test_pipelines_that_cannot_take_a_concept(components, xl_components):
    blind = components | {"unet": make_unet(cross_attention_dim=64)}
    with pytest.raises(
        ValueError, match=r"takes hidden states of width 64, but the text encoders of .* give width 32"
    ):
        family_of(StableDiffusionPipeline(**blind))
    pipe = StableDiffusionXLPipeline(**xl_components)
    pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline has no text_encoder_2, which Perfusion needs"):
        family_of(pipe)
    pipe.unet = None
    with pytest.raises(
        ValueError,
        match=r"cannot edit StableDiffusionXLPipeline, whose model is None",
    ):
        family_of(pipe)
