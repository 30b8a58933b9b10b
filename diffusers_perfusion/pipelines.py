"""Diffusers pipelines with concepts.

For a pipeline that exists already, or of another class, see `add_perfusion`.
"""

from diffusers import PixArtSigmaPipeline, SanaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

from .loaders import PerfusionLoaderMixin


class PerfusionPipeline(PerfusionLoaderMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that loads Perfusion concepts."""


class PerfusionXLPipeline(PerfusionLoaderMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that loads Perfusion concepts."""


class PerfusionPixArtSigmaPipeline(PerfusionLoaderMixin, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` that loads Perfusion concepts."""


class PerfusionSanaPipeline(PerfusionLoaderMixin, SanaPipeline):
    """`SanaPipeline` that loads Perfusion concepts."""
