"""Diffusers pipelines with concepts."""

from diffusers import StableDiffusionPipeline

from .loaders import PerfusionLoaderMixin


class PerfusionPipeline(PerfusionLoaderMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that loads Perfusion concepts.

    For a pipeline that exists already, or of another class, see `add_perfusion`.
    """
