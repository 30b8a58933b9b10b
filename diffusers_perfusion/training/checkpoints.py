"""Checkpoints of a training: folders of safetensors files that are written whole or not at all.

accelerate's `save_state` writes its files one after the other into the final folder, so that a killed training leaves
a checkpoint that looks complete and is not; hence our own.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ..concept import PerfusionConcept
from ..concept_file import WEIGHT_NAME, ConceptHeader
from ..files import error_of, temporary_beside, write_atomically

logger = logging.get_logger(__name__)

_PREFIX = "checkpoint-"
_STATE_NAME = "training_state.safetensors"
_HEADER_KEY = "training"


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    state: dict[str, Tensor],
    recipe: dict[str, Any],
    concept: PerfusionConcept,
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-<step>`, the state of the training and the concept at this step, and return its path.

    Args:
        output_dir: folder of the checkpoints; it is made if it does not exist.
        step: number of optimizer steps done.
        state: every tensor that the training is resumed from.
        recipe: what the training is made of, under which it may be resumed.
        concept: the concept at this step.
        total_limit: number of checkpoints to keep; None for all.

    Raises:
        OSError: if it cannot be written; the checkpoints before are kept.
    """
    path = Path(output_dir) / f"{_PREFIX}{step}"
    temporary = temporary_beside(path)
    try:
        temporary.mkdir(parents=True)
        header = json.dumps({"step": step, "recipe": recipe})
        write_atomically(temporary / _STATE_NAME, serialize(state, metadata={_HEADER_KEY: header}))
        concept.save(temporary / WEIGHT_NAME)
        if path.exists():
            _delete(path)
        temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise error_of(path, error) from error
        raise
    # Not this one, even if a clock that was set back makes it the oldest.
    others = [other for other in list_checkpoints(output_dir) if other != path]
    for old in others[: max(len(others) + 1 - total_limit, 0) if total_limit else 0]:
        _delete(old)
    return path


def _delete(path: Path) -> None:
    """Delete a checkpoint under another name, so that a kill leaves no part of one that looks whole."""
    hidden = temporary_beside(path)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def load_checkpoint(path: Path, recipe: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Return the step and the state in a checkpoint.

    Args:
        path: of the checkpoint.
        recipe: what the training is made of that is to be resumed.

    Raises:
        ValueError: if the checkpoint is not whole, or was written under another recipe.
    """
    step, saved_recipe, state = _read(path)
    for name in recipe | saved_recipe:
        if recipe.get(name) != saved_recipe.get(name):
            raise ValueError(
                f"{path} was written with {name} {saved_recipe.get(name)!r}, and this training has "
                f"{recipe.get(name)!r}; give what the training began with, or another output_dir to begin anew"
            )
    return step, state


def _read(path: Path) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Return the step, the recipe and the state in a checkpoint, or raise ValueError unless it is whole."""
    try:
        with safe_open(path / _STATE_NAME, "pt") as file:
            header = json.loads(file.metadata()[_HEADER_KEY])
            # Copied, or the tensors would be the file's own memory.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        ConceptHeader.read(path / WEIGHT_NAME)
        return int(header["step"]), dict(header["recipe"]), state
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete checkpoint of a training ({error})") from error


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; an earlier training may have left some of later steps."""
    checkpoints = [
        (path.stat().st_mtime_ns, int(number), path)
        for path in Path(output_dir).glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdigit()
    ]
    return [path for *_, path in sorted(checkpoints)]


def find_checkpoint(output_dir: str | os.PathLike, which: str) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` means.

    Args:
        output_dir: folder of the checkpoints.
        which: a path, a name in the output folder, or `latest` for the last one that is whole; others are logged.

    Returns:
        Its path; None for `latest` in a folder without a whole checkpoint.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    checkpoints = list_checkpoints(output_dir)
    if which == "latest":
        for path in reversed(checkpoints):
            try:
                _read(path)
                return path
            except ValueError as error:
                logger.warning(f"{error}; it is skipped.")
        logger.warning(f"{output_dir} has no checkpoint to resume from, so the training begins anew.")
        return None
    for path in (Path(which), Path(output_dir) / which):
        if path.is_dir():
            return path
    found = ", ".join(path.name for path in checkpoints) or "no checkpoint"
    raise FileNotFoundError(f"there is no checkpoint {which!r}; {output_dir} has {found}")
