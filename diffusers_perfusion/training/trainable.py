"""What a pipeline needs to be trained, so that its lack is told before any work."""

from inspect import signature
from typing import Any

from ..model_families import ModelFamily

# Arguments of pipelines that do not generate from a prompt alone. One that is called `image` may be left out of some.
_FURTHER_INPUTS = {"strength", "mask_image", "control_image", "video"}


def check_trainable(pipeline: Any, family: ModelFamily, generates: bool) -> None:
    """Raise ValueError if a pipeline cannot be trained.

    Args:
        pipeline: of the base model.
        family: of the pipeline.
        generates: whether it has to generate images of prompts, as for validation.
    """
    name, vae = type(pipeline).__name__, pipeline.vae
    if vae is None:
        raise ValueError(f"{name} has no vae, by which training images are encoded; give it one")
    for model in (vae, *family.text_encoders, family.model):
        if any(weight.is_meta for weight in model.parameters()):
            raise ValueError(
                f"the weights of {type(model).__name__} are offloaded one by one, and training needs them together; "
                "call remove_all_hooks() of the pipeline before training, or load it without offloading"
            )
    channels = vae.config.get("latent_channels", vae.config.get("z_dim"))
    if channels != family.latent_channels:
        raise ValueError(
            f"{type(family.model).__name__} takes {family.latent_channels} channels, but {type(vae).__name__} gives "
            f"latents of {channels}; expected a model that takes no control image and no mask beside them"
        )
    further = _FURTHER_INPUTS & signature(pipeline.__call__).parameters.keys()
    if generates and (further or hasattr(pipeline, "controlnet")):
        raise ValueError(
            f"{name} generates from more than a prompt, so it makes no validation images; train with a pipeline of "
            "text to image, or without validation_prompt"
        )
