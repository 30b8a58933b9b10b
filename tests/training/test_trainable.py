"""What a pipeline lacks is told before anything is read or computed."""

import pytest
import torch
from accelerate import cpu_offload
from conftest import PIPELINES, make_flux, make_unet
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    FluxControlPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training import TrainingConfig, train, training_loop
from diffusers_perfusion.training.trainable import check_trainable


@pytest.fixture
def refused(training_settings, monkeypatch):
    """Match the error that ends a training before an image is read."""

    def run(pipe, message, **settings):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(training_loop, "read_images", None)
            train(pipe, TrainingConfig(**training_settings | {"resolution": 16} | settings))

    return run


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_can_be_trained_and_validated(request, name):
    pipe = request.getfixturevalue(name)
    check_trainable(pipe, family_of(pipe), generates=True)


def test_a_pipeline_without_a_vae(flux_pipeline, refused):
    flux_pipeline.vae = None
    refused(flux_pipeline, "FluxPipeline has no vae, by which training images are encoded; give it one")


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "vae"])
def test_weights_that_are_offloaded_one_by_one(flux_pipeline, refused, training_settings, part):
    cpu_offload(getattr(flux_pipeline, part), execution_device=torch.device("cpu"))
    refused(flux_pipeline, rf"the weights of {type(getattr(flux_pipeline, part)).__name__} are offloaded one by one")
    flux_pipeline.remove_all_hooks()
    train(flux_pipeline, TrainingConfig(**training_settings | {"resolution": 16, "max_train_steps": 1}))


def test_models_that_take_more_than_latents(flux_components, pipeline, refused):
    torch.manual_seed(0)
    wide = FluxTransformer2DModel.from_config(make_flux().config, in_channels=32, out_channels=16)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    control = FluxControlPipeline(**{name: flux_components[name] for name in names}, transformer=wide)
    refused(control, "FluxTransformer2DModel takes 8 channels, but AutoencoderKL gives latents of 4; expected a model")
    pipeline.unet = UNet2DConditionModel.from_config(make_unet().config, in_channels=9)
    refused(pipeline, "UNet2DConditionModel takes 9 channels, but AutoencoderTiny gives latents of 4")


@pytest.mark.parametrize("kind", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
@pytest.mark.parametrize("name", ["pipeline", "xl_pipeline", "flux_pipeline", "z_image_pipeline"])
def test_pipelines_that_validate_no_prompt_alone(request, name, kind, refused):
    pipe = kind.from_pipe(request.getfixturevalue(name))
    message = f"{type(pipe).__name__} generates from more than a prompt, so it makes no validation images"
    refused(pipe, message, validation_prompt=["a <my-cat>"])
    check_trainable(pipe, family_of(pipe), generates=False)
    pipe = AutoPipelineForText2Image.from_pipe(pipe)
    check_trainable(pipe, family_of(pipe), generates=True)


def test_a_pipeline_that_may_be_given_an_image_validates_prompts(flux_components):
    pipe = FluxKontextPipeline(**flux_components)
    check_trainable(pipe, family_of(pipe), generates=True)
