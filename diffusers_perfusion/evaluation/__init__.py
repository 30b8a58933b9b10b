"""Evaluation of concepts: metrics of their images, and sweeps over bias, temperature and checkpoint."""

from .encoders import ClipEncoder, IdentityEncoder
from .metrics import (
    ConceptMetrics,
    Mean,
    Scores,
    bootstrap_mean,
    drift,
    image_similarity,
    mean_scores,
    superclass_prompt,
    text_alignment,
)
from .sweep import Sweep, SweepRow, sweep

__all__ = [
    "ClipEncoder",
    "ConceptMetrics",
    "IdentityEncoder",
    "Mean",
    "Scores",
    "Sweep",
    "SweepRow",
    "bootstrap_mean",
    "drift",
    "image_similarity",
    "mean_scores",
    "superclass_prompt",
    "sweep",
    "text_alignment",
]
