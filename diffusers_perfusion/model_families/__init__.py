"""Model families: one file each. What differs between families is here, and nothing else in the package names one.

A new family is a subclass of `ModelFamily` in a file of its own, imported below.
"""

from typing import Any

from .base import ModelFamily, PromptEncoding, TextPart, cross_attention_layers, edited_model
from .chroma import Chroma
from .cosmos import Cosmos
from .flux import Flux
from .flux2 import Flux2Dev, Flux2Klein
from .pixart import PixArt
from .qwen_image import QwenImage
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .z_image import ZImage

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "PromptEncoding",
    "TextPart",
    "cross_attention_layers",
    "edited_model",
    "family_class",
    "family_of",
]

# A pipeline belongs to the first family whose model class and text encoders it has.
FAMILIES: tuple[type[ModelFamily], ...] = (
    StableDiffusionXL,
    StableDiffusion,
    PixArt,
    Sana,
    Cosmos,
    StableDiffusion3,
    Flux,
    Chroma,
    Flux2Dev,
    Flux2Klein,
    ZImage,
    QwenImage,
)


def family_of(pipeline: Any) -> ModelFamily:
    """Return the family of a pipeline, bound to the pipeline's model, tokenizers and text encoders.

    Raises:
        ValueError: as `family_class`, or if a text encoder is missing, or the text encoders give hidden states of
            another width than the model takes.
    """
    return family_class(pipeline)(pipeline)


def family_class(pipeline: Any) -> type[ModelFamily]:
    """Return the family of a pipeline, whose text encoders may be missing.

    Raises:
        ValueError: if no family knows the pipeline's model.
    """
    for family in FAMILIES:
        if family.matches(pipeline):
            return family
    raise ValueError(
        f"Perfusion cannot edit {type(pipeline).__name__}, whose model is {type(edited_model(pipeline)).__name__}; "
        f"expected a pipeline of {', '.join(family.name for family in FAMILIES)}"
    )
