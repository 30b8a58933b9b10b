"""Checkpoints of a training: folders of safetensors files that are written whole or not at all.

accelerate's `save_state` writes its files one after the other into the final folder, so that a killed training leaves
a checkpoint that looks complete and is not; hence our own.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..concept import PerfusionConcept
from ..concept_file import WEIGHT_NAME

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
        output_dir: folder of the checkpoints.
        step: number of optimizer steps done.
        state: every tensor that the training is resumed from.
        recipe: settings under which it may be resumed.
        concept: the concept at this step.
        total_limit: number of checkpoints to keep; None for all.
    """
    path = Path(output_dir) / f"{_PREFIX}{step}"
    temporary = Path(output_dir) / f".{path.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    try:
        header = json.dumps({"step": step, "recipe": recipe})
        save_file(state, temporary / _STATE_NAME, metadata={_HEADER_KEY: header})
        concept.save(temporary / WEIGHT_NAME)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, recipe: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Return the step and the state in a checkpoint.

    Args:
        path: of the checkpoint.
        recipe: settings of the training that is to be resumed.

    Raises:
        ValueError: if the checkpoint cannot be read, or was written under another recipe.
    """
    try:
        with safe_open(path / _STATE_NAME, "pt") as file:
            header = json.loads(file.metadata()[_HEADER_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        step, saved_recipe = int(header["step"]), dict(header["recipe"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a complete checkpoint of a training ({error})") from error
    for name in sorted(recipe.keys() | saved_recipe.keys()):
        if recipe.get(name) != saved_recipe.get(name):
            raise ValueError(
                f"{path} was written with {name} {saved_recipe.get(name)!r}, and this training has "
                f"{recipe.get(name)!r}; resume with the settings that the training began with"
            )
    return step, state


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; an earlier training may have left some of later steps."""
    checkpoints = [
        (path.stat().st_mtime_ns, int(number), path)
        for path in Path(output_dir).glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdigit()
    ]
    return [path for *_, path in sorted(checkpoints)]


def find_checkpoint(output_dir: str | os.PathLike, which: str) -> Path:
    """Return the checkpoint that `--resume_from_checkpoint` means: `latest`, a path, or a name in the output folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    checkpoints = list_checkpoints(output_dir)
    if which == "latest" and checkpoints:
        return checkpoints[-1]
    for path in (Path(which), Path(output_dir) / which):
        if path.is_dir():
            return path
    found = ", ".join(path.name for path in checkpoints) or "no checkpoint"
    raise FileNotFoundError(f"there is no checkpoint {which!r}; {output_dir} has {found}")
