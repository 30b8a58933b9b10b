"""How well a concept does: its pictures against the prompt, against the subject, and against the base model's."""

from .encoders import ClipEncoder, IdentityEncoder
from .judge import Judge, Scores, mean_scores
from .metrics import Mean, bootstrap_mean, drift, picture_similarity, superclass_prompt, text_alignment
from .sweep import Sweep, SweepRow, sweep

__all__ = [
    "ClipEncoder",
    "IdentityEncoder",
    "Judge",
    "Mean",
    "Scores",
    "Sweep",
    "SweepRow",
    "bootstrap_mean",
    "drift",
    "mean_scores",
    "picture_similarity",
    "superclass_prompt",
    "sweep",
    "text_alignment",
]
