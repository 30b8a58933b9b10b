"""What differs between model families, and which one a pipeline is of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import cross_attention_layers
from .text import TextEncoders


def _no_conditions(pooled: Tensor | None, resolution: int) -> dict[str, Any]:
    return {}


def _text_and_sizes(pooled: Tensor | None, resolution: int) -> dict[str, Any]:
    """What SDXL is told besides: the pooled prompt, and that the picture is whole and of the size it is drawn in."""
    assert pooled is not None
    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution]).to(pooled)
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: as people know it.
        text: names of the components that make its text encoding: tokenizers, each with its text encoder.
        layer: the hidden state that it takes from them, as in `TextEncoders`.
        conditions: what its UNet is called with besides, from the pooled encoding of prompts and the side of a
            square picture in pixels.
    """

    name: str
    text: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"),)
    layer: int | None = None
    conditions: Callable[[Tensor | None, int], dict[str, Any]] = _no_conditions


# The first that a pipeline has all components of is its family, or else the last.
FAMILIES = (
    Family(
        "Stable Diffusion XL",
        text=(("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
        layer=-2,
        conditions=_text_and_sizes,
    ),
    Family("Stable Diffusion"),
)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: if concepts cannot be edited into its model.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        model = type(getattr(pipeline, "transformer", None) or pipeline).__name__
        raise ValueError(
            f"{type(pipeline).__name__} has no UNet with cross-attention from text, and Perfusion cannot edit "
            f"{model}; expected a pipeline such as StableDiffusionPipeline"
        )
    cross_attention_layers(unet)
    for family in FAMILIES[:-1]:
        if all(hasattr(pipeline, name) for pair in family.text for name in pair):
            return family
    return FAMILIES[-1]


def text_encoders(pipeline: Any) -> TextEncoders:
    """The text encoders of a pipeline.

    Raises:
        ValueError: as `family_of`, or if it lacks one, or they make other encodings than its UNet takes.
    """
    family = family_of(pipeline)
    for name in (name for pair in family.text for name in pair):
        if getattr(pipeline, name, None) is None:
            raise ValueError(f"{type(pipeline).__name__} has no {name}, which has to learn the words of concepts")
    tokenizers, models = zip(*((getattr(pipeline, a), getattr(pipeline, b)) for a, b in family.text), strict=True)
    texts = TextEncoders(tokenizers, models, family.layer)
    for layer in cross_attention_layers(pipeline.unet).values():
        if layer.cross_attention_dim != texts.width:
            raise ValueError(
                f"{type(pipeline).__name__} takes text of width {layer.cross_attention_dim}, but its text encoders "
                f"give width {texts.width}, so something stands between that Perfusion does not know"
            )
    return texts
