"""Training of concepts. The names below are imported when they are used: the settings alone need no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .concepts_table import read_concepts_table, train_concepts
    from .config import TrainingConfig
    from .trainer import PerfusionTrainer
    from .training_loop import make_accelerator, train

_MODULES = {
    "PerfusionTrainer": "trainer",
    "TrainingConfig": "config",
    "make_accelerator": "training_loop",
    "read_concepts_table": "concepts_table",
    "train": "training_loop",
    "train_concepts": "concepts_table",
}

__all__ = [
    "PerfusionTrainer",
    "TrainingConfig",
    "make_accelerator",
    "read_concepts_table",
    "train",
    "train_concepts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
