"""Perfusion (key-locked rank-one editing) for Hugging Face diffusers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_processor import PerfusionAttnProcessor
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

# Imported at first use, because torch and diffusers take seconds.
_MODULES = {
    "PerfusionAttnProcessor": "attention_processor",
    "PerfusionConcept": "concept",
    "PerfusionLoaderMixin": "loaders",
    "PerfusionPipeline": "pipelines",
    "PerfusionPixArtSigmaPipeline": "pipelines",
    "PerfusionSanaPipeline": "pipelines",
    "PerfusionXLPipeline": "pipelines",
    "add_perfusion": "loaders",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
