"""What a training is made of: a checkpoint is resumed only by a training that is made of the same."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model_families import ModelFamily
from .config import TrainingConfig
from .images import TrainingImage


def training_recipe(
    config: TrainingConfig,
    family: ModelFamily,
    dtype: torch.dtype,
    images: Sequence[TrainingImage],
    prompts: Sequence[str | None],
    masks: Tensor | None,
    mask_source: str,
) -> dict[str, Any]:
    """Return what changes the trained numbers: settings, and digests of files whose place makes no difference.

    Args:
        config: all settings.
        family: of the base model, of which the weights that a concept edits count.
        dtype: that they are trained in, whatever they are now.
        images: of the subject.
        prompts: of their own captions; None for an image without one.
        masks: of the subject, as `masks_without_base_model` returns them.
        mask_source: the same. Masks that a model computes differ in their last digits from machine to machine.
    """
    if masks is not None and mask_source in ("alpha", "folder"):
        mask = _digest([_bytes_of(masks)])
    else:
        mask = mask_source if config.mask in ("auto", mask_source) else config.mask
    return config.recipe() | {
        "base_model": config.base_model,
        "weights": _digest(_bytes_of(_in_full(weight).to(dtype)) for weight in family.edited_weights),
        "images": _digest(image.image.tobytes() for image in images),
        "captions": _digest(repr(prompt).encode() for prompt in prompts),
        "mask": mask,
        "covariance": config.covariance_file and _digest([config.covariance_file.read_bytes()]),
        "initial_embedding": config.initial_embedding and _digest([Path(config.initial_embedding).read_bytes()]),
    }


def _in_full(weight: Tensor) -> Tensor:
    """Return a weight on the CPU in float32, also one that is quantised."""
    # Detached: of a weight that is not quantised the same tensor comes back, which would be no parameter any more.
    return weight.detach().to("cpu").dequantize()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _digest(parts: Iterable[bytes]) -> str:
    """Return a digest of a sequence of byte strings, and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return f"sha256:{digest.hexdigest()[:16]}"
