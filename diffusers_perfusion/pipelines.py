"""Diffusers pipelines with concepts.

For a pipeline that exists already, or of another class, see `add_perfusion`.
"""

import os
from typing import Any

import diffusers
from diffusers import (
    DiffusionPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from .loaders import PerfusionLoaderMixin
from .pipeline_compat import with_mixin


class PerfusionPipeline(PerfusionLoaderMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that loads Perfusion concepts."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline, and the concepts that were saved or pushed with it.

        A pipeline of another family, such as FLUX.1, has the class that it was saved as, and Perfusion's methods.

        Arguments are those of `DiffusionPipeline.from_pretrained`.
        """
        saved = cls.load_config(pretrained_model_name_or_path, **kwargs)
        has_one_clip_and_unet = "unet" in saved and "text_encoder_2" not in saved
        kind = getattr(diffusers, str(saved.get("_class_name")), None)  # a file may say anything
        if has_one_clip_and_unet or not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return with_mixin(PerfusionLoaderMixin, kind).from_pretrained(pretrained_model_name_or_path, **kwargs)


class PerfusionXLPipeline(PerfusionLoaderMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that loads Perfusion concepts."""


class PerfusionPixArtSigmaPipeline(PerfusionLoaderMixin, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` that loads Perfusion concepts."""


class PerfusionSanaPipeline(PerfusionLoaderMixin, SanaPipeline):
    """`SanaPipeline` that loads Perfusion concepts."""
