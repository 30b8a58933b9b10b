"""What differs between model families, and which one a pipeline is of."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .attention import cross_attention_layers, text_projection
from .text import PromptEncoding, TextEncoders


def _unconditioned(model: Any, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
    return {}


def _text_and_sizes(model: Any, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
    """The pooled prompt, and that the picture is whole and of the size it is drawn in."""
    pooled: Any = encoding.pooled
    sizes = pooled.new_full((6,), resolution)
    sizes[2:4] = 0
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}}


def _mask_and_sizes(model: Any, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
    """What is padding; to models that take it, the size of the picture and its shape."""
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if model.use_additional_conditions:
        one = torch.ones(len(encoding.states), 1).to(encoding.states)
        sizes = {"resolution": resolution * one.expand(-1, 2), "aspect_ratio": one}
    return {"encoder_attention_mask": encoding.mask, "added_cond_kwargs": sizes}


def _mask(model: Any, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
    """What is padding."""
    return {"encoder_attention_mask": encoding.mask}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: as people know it.
        models: classes that the model that concepts are edited into may be of.
        text: names of the components that make its text encoding: tokenizers, each with its text encoder.
        layer: the hidden state that it takes from them, as in `TextEncoders`.
        masked: whether it masks padding out, as in `TextEncoders`.
        conditions: what its model is called with besides, from the model, the encoding of some prompts and the side
            of a square picture in pixels.
    """

    name: str
    models: tuple[str, ...] = ("UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel")
    text: tuple[tuple[str, str], ...] = (("tokenizer", "text_encoder"),)
    layer: int | None = None
    masked: bool = False
    conditions: Callable[[Any, PromptEncoding, int], dict[str, Any]] = _unconditioned


# The first whose model and components a pipeline has is its family.
FAMILIES = (
    Family(
        "Stable Diffusion XL",
        text=(("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")),
        layer=-2,
        conditions=_text_and_sizes,
    ),
    Family("Stable Diffusion"),
    Family("PixArt", models=("PixArtTransformer2DModel",), masked=True, conditions=_mask_and_sizes),
    Family("Sana", models=("SanaTransformer2DModel",), masked=True, conditions=_mask),
)


def edited_model(pipeline: Any) -> Any:
    """The model of a pipeline that concepts are edited into, if it is of a family."""
    unet = getattr(pipeline, "unet", None)
    model = getattr(pipeline, "transformer", None) if unet is None else unet
    return getattr(model, "_orig_mod", model)  # of torch.compile(model)


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline.

    Raises:
        ValueError: if concepts cannot be edited into its model.
    """
    model = edited_model(pipeline)
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for family in FAMILIES:
        components = (name for pair in family.text for name in pair)
        if kinds & set(family.models) and all(hasattr(pipeline, name) for name in components):
            return family
    raise ValueError(
        f"Perfusion cannot edit {type(pipeline).__name__}, whose model is {type(model).__name__}; expected a pipeline "
        f"of {', '.join(family.name for family in FAMILIES)}: models with cross-attention from text, which those that "
        "process text and picture in one joint attention have not"
    )


def _instruction(pipeline: Any) -> str:
    """What a pipeline puts before every prompt unless it is told otherwise."""
    parameter = signature(pipeline.__call__).parameters.get("complex_human_instruction")
    return "\n".join(parameter.default or ()) if parameter else ""


def text_encoders(pipeline: Any) -> TextEncoders:
    """The text encoders of a pipeline.

    Raises:
        ValueError: as `family_of`, or if it lacks one, or they make other encodings than its model takes.
    """
    family, model = family_of(pipeline), edited_model(pipeline)
    layers = cross_attention_layers(model)
    for name in (name for pair in family.text for name in pair):
        if getattr(pipeline, name) is None:
            raise ValueError(f"{type(pipeline).__name__} has no {name}, which has to learn the words of concepts")
    tokenizers, models = zip(*((getattr(pipeline, a), getattr(pipeline, b)) for a, b in family.text), strict=True)
    projection = text_projection(model)
    texts = TextEncoders(tokenizers, models, family.layer, family.masked, projection, _instruction(pipeline))
    widths = {layer.cross_attention_dim for layer in layers.values()}
    for width in {model.config.caption_channels} if projection else widths:
        if width != texts.width:
            raise ValueError(
                f"{type(model).__name__} takes text of width {width}, but the text encoders of "
                f"{type(pipeline).__name__} give width {texts.width}, so something stands between that Perfusion does "
                "not know"
            )
    return texts
