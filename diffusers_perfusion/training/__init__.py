"""Fitting a concept: a library that `perfusion fit` and `examples/train_perfusion.py` drive."""

from .config import FitConfig
from .fit import fit, make_accelerator

__all__ = ["FitConfig", "fit", "make_accelerator"]
