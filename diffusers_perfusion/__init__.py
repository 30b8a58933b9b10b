"""Perfusion (key-locked rank-one editing) for Hugging Face diffusers."""

from .attention import PerfusionAttnProcessor
from .concept import PerfusionConcept
from .loaders import PerfusionLoaderMixin, add_perfusion
from .pipelines import (
    PerfusionPipeline,
    PerfusionPixArtSigmaPipeline,
    PerfusionSanaPipeline,
    PerfusionXLPipeline,
)

__all__ = [
    "PerfusionAttnProcessor",
    "PerfusionConcept",
    "PerfusionLoaderMixin",
    "PerfusionPipeline",
    "PerfusionPixArtSigmaPipeline",
    "PerfusionSanaPipeline",
    "PerfusionXLPipeline",
    "add_perfusion",
]
