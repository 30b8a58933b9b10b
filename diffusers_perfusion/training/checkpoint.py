"""Checkpoints of a fit: folders that are written whole or not at all, and hold safetensors only."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..concept import WEIGHT_NAME, PerfusionConcept

_PREFIX = "checkpoint-"
_STATE_NAME = "fit.safetensors"
_HEADER_KEY = "fit"


def save_checkpoint(
    output_dir: str | os.PathLike,
    step: int,
    state: dict[str, Tensor],
    recipe: dict[str, Any],
    concept: PerfusionConcept,
    total_limit: int | None = None,
) -> Path:
    """Write `checkpoint-<step>`: the state of the fit, and the concept as it stands.

    Args:
        output_dir: where checkpoints are.
        step: optimizer steps done.
        state: every tensor that the fit goes on from.
        recipe: settings under which alone it may go on.
        concept: as it would be if the fit ended here.
        total_limit: how many checkpoints to keep.
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
    """The step and state in a checkpoint.

    Raises:
        ValueError: if it cannot be read, or was made with another recipe.
    """
    try:
        with safe_open(path / _STATE_NAME, "pt") as file:
            header = json.loads(file.metadata()[_HEADER_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        step, made_with = int(header["step"]), dict(header["recipe"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole checkpoint of a fit ({error})") from error
    for name in sorted(recipe.keys() | made_with.keys()):
        if recipe.get(name) != made_with.get(name):
            raise ValueError(
                f"{path} was made with {name} {made_with.get(name)!r}, and this fit has {recipe.get(name)!r}; "
                "a fit goes on only under the settings it began with"
            )
    return step, state


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, oldest first; an earlier fit may have left some of later steps."""
    written = [
        (path.stat().st_mtime_ns, int(number), path)
        for path in Path(output_dir).glob(f"{_PREFIX}*")
        if (number := path.name.removeprefix(_PREFIX)).isdigit()
    ]
    return [path for *_, path in sorted(written)]


def find_checkpoint(output_dir: str | os.PathLike, which: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means: `latest`, a path, or a name in the output folder.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    checkpoints = list_checkpoints(output_dir)
    if which == "latest" and checkpoints:
        return checkpoints[-1]
    for path in (Path(which), Path(output_dir) / which):
        if path.is_dir():
            return path
    held = ", ".join(path.name for path in checkpoints) or "no checkpoint"
    raise FileNotFoundError(f"there is no checkpoint {which!r}; {output_dir} holds {held}")
