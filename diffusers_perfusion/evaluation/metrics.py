"""Scores of pictures: text alignment (CLIP-T), similarity to the subject (CLIP-I, identity), and drift."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from .encoders import ClipEncoder, IdentityEncoder


def superclass_prompt(prompt: str, superclasses: Mapping[str, str]) -> str:
    """The prompt as a CLIP can read it: with the super-category in place of each concept word.

    Args:
        prompt: such as "a <my-bear> next to a <my-mug>".
        superclasses: of each concept word, such as `{"<my-bear>": "teddy bear", "<my-mug>": "mug"}`.

    Raises:
        ValueError: if none of the words is in the prompt.
    """
    if not any(word in prompt for word in superclasses):
        raise ValueError(f"the prompt {prompt!r} has no concept word; expected one of {sorted(superclasses)}")
    # The longest first: one concept word may begin another.
    for word in sorted(superclasses, key=len, reverse=True):
        prompt = prompt.replace(word, superclasses[word])
    return prompt


def text_alignment(clip: ClipEncoder, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
    """CLIP-T: the cosine between each picture and its prompt (Hessel et al. 2021, CLIPScore, arXiv 2104.08718).

    Args:
        clip: the judge.
        pictures: of any sizes.
        prompts: one a picture, with super-categories for concept words (see `superclass_prompt`).

    Returns:
        In [-1, 1], `(len(pictures),)`.

    Raises:
        ValueError: if there are not as many prompts as pictures.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts; expected one prompt a picture")
    return (clip.encode_pictures(pictures) * clip.encode_texts(prompts)).sum(-1)


def picture_similarity(
    encoder: ClipEncoder | IdentityEncoder, pictures: Sequence[Image.Image], references: Sequence[Image.Image]
) -> Tensor:
    """The cosine between each picture and the subject's own pictures, averaged over these.

    With a CLIP this is CLIP-I (Gal et al. 2022, arXiv 2208.01618), with a DINO-style encoder the identity similarity
    (called DINO in DreamBooth, Ruiz et al. 2022, arXiv 2208.12242).

    Args:
        encoder: the judge.
        pictures: of any sizes.
        references: the pictures that the concept was fitted to.

    Returns:
        In [-1, 1], `(len(pictures),)`.
    """
    return encoder.encode_pictures(pictures) @ encoder.encode_pictures(references).mean(0)


def drift(pictures: Tensor, base: Tensor) -> float:
    """The largest change of any pixel: 0 for pictures of prompts without the concept word, or a concept leaks.

    Args:
        pictures: drawn with the concept loaded, such as `pipeline(..., output_type="pt").images`.
        base: drawn by the base model from the same noise.

    Raises:
        ValueError: if the shapes differ.
    """
    if pictures.shape != base.shape:
        raise ValueError(f"pictures of shape {tuple(pictures.shape)} and base of shape {tuple(base.shape)}")
    return (pictures - base).abs().max().item()


class Mean(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(scores: Sequence[float] | Tensor, level: float = 0.95, resamples: int = 10_000) -> Mean:
    """The mean of scores with its bootstrap percentile interval (Efron 1979); the same scores give the same interval.

    Args:
        scores: independent of each other.
        level: how often the interval holds the true mean.
        resamples: how many times the scores are drawn anew.

    Raises:
        ValueError: if there are no scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores of shape {values.shape}; expected a sequence of at least one number")
    draw = np.random.default_rng(0)
    means = [values[draw.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Mean(float(values.mean()), float(low), float(high))
