"""Fitting a concept: a library that `perfusion fit` and `examples/train_perfusion.py` drive."""

from .config import FitConfig
from .fit import fit, make_accelerator
from .queue import fit_many

__all__ = ["FitConfig", "fit", "fit_many", "make_accelerator"]
