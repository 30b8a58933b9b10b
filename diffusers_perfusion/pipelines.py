"""Diffusers pipelines with concepts."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from diffusers import StableDiffusionPipeline

from .loaders import CONCEPTS, PerfusionLoaderMixin


class PerfusionPipeline(PerfusionLoaderMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that loads Perfusion concepts.

    For a pipeline that exists already, or of another class, see `add_perfusion`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As `StableDiffusionPipeline.from_pretrained`; of a folder also the concepts that were saved in it."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for path in sorted((Path(pretrained_model_name_or_path) / CONCEPTS).glob("*.safetensors")):
            pipeline.load_perfusion(path, unquote(path.stem))
        return pipeline
