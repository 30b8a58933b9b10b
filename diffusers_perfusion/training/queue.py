"""A queue of fits: `read_queue` from a table, `fit_many` by any number of processes."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from accelerate import PartialState
from diffusers.utils import logging
from filelock import FileLock, Timeout

from ..concept import WEIGHT_NAME
from ..pictures import slug
from .checkpoint import list_checkpoints
from .config import FitConfig, setting_kinds
from .fit import fit

logger = logging.get_logger(__name__)

LOCK = ".lock"

# What decides which model is in memory, and how.
_OF_ALL = ("pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "allow_tf32")

# What launchers tell a process of the others.
_LAUNCHED = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK PMI_RANK PMI_SIZE OMPI_COMM_WORLD_RANK "
    "OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK MV2_COMM_WORLD_RANK MV2_COMM_WORLD_SIZE"
).split()


def read_queue(path: str | os.PathLike, settings: Mapping[str, Any]) -> list[FitConfig]:
    """The fits in a table with a line for each and a column for each setting in which they differ.

    Args:
        path: a CSV file whose first line names the columns, which are settings of `FitConfig`; an empty cell leaves
            its setting as it is. Without a column `output_dir` each goes to a folder named after its word.
        settings: of all, and the `output_dir` that their folders are in.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is no setting or one of all, a cell or setting is out of range, two go to one folder or
            repository, there is no line, or a checkpoint is named, for each goes on from its own.
    """
    kinds = setting_kinds()
    required = [f.name for f in fields(FitConfig) if f.default is MISSING and f.default_factory is MISSING]
    parent = Path(settings.get("output_dir", FitConfig.output_dir))
    configs: list[FitConfig] = []
    taken: set[object] = set()
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        if "resume_from_checkpoint" in {*settings, *(rows.fieldnames or ())}:
            raise ValueError("resume_from_checkpoint is not for a queue, whose fits go on from their last checkpoints")
        for name in rows.fieldnames or ():
            if name not in kinds or name in _OF_ALL:
                raise ValueError(
                    f"{path} has a column {name!r}; expected settings of a fit, but for {', '.join(_OF_ALL)}"
                )
        for row in rows:
            try:
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(rows.fieldnames or ())} cells")
                own = {name: _parse(name, kinds[name], cell.strip()) for name, cell in row.items() if cell.strip()}
                given = {**settings, **own}
                if missing := [name for name in required if name not in given]:
                    raise ValueError(f"no {', '.join(missing)}")
                word = given["placeholder_token"]
                if not (name := own.get("output_dir", slug(word))):
                    raise ValueError(f"{word} gives no name of a folder; add a column output_dir")
                config = FitConfig(**given | {"output_dir": str(parent / name)})
            except ValueError as error:
                raise ValueError(f"line {rows.line_num} of {path}: {error}") from error
            places = [Path(config.output_dir).resolve(), *([config.hub_model_id] if config.hub_model_id else [])]
            for place in places:
                if place in taken:
                    raise ValueError(f"line {rows.line_num} of {path}: another concept goes to {place} already")
            taken.update(places)
            configs.append(config)
    if not configs:
        raise ValueError(f"{path} has no line below its first one, which names the columns")
    return configs


def _parse(name: str, kind: Any, cell: str) -> Any:
    """A cell as its setting's type."""
    if get_origin(kind) is list:
        return [cell]
    if get_args(kind):
        return cell
    try:
        return {"true": True, "false": False}[cell.lower()] if kind is bool else kind(cell)
    except (ValueError, KeyError) as error:
        expected = "true or false" if kind is bool else kind.__name__
        raise ValueError(f"{name} is {cell!r}; expected {expected}") from error


def _leave_the_others() -> None:
    """Make a launched process one of its own, with its own device.

    Fits of a queue are of one process each, and processes share nothing but the queue.

    Raises:
        RuntimeError: if accelerate has joined them already.
    """
    number = int(os.environ.get("LOCAL_RANK", 0))
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(number % torch.accelerator.device_count())
    if PartialState(cpu=not torch.accelerator.is_available()).num_processes > 1:
        raise RuntimeError("accelerate has joined the processes already; call fit_many before there is an Accelerator")


def fit_many(pipeline: Any, configs: Sequence[FitConfig]) -> None:
    """Fit concepts on one base model in memory, each into a folder of its own.

    Processes that are given the same fits share them: each takes the next that no other is at, and waits at the end
    until all are done. Concepts that are there already are left alone, and fits that were stopped go on from their
    last checkpoint; so a queue that was killed is started again as it was started first.

    Args:
        pipeline: as for `fit`.
        configs: of the fits; each with another `output_dir`.

    Raises:
        RuntimeError: if some could not be fitted or shared, when all others are, or if accelerate has joined the
            processes already.
    """
    _leave_the_others()
    errors: dict[str, str] = {}
    for config in configs:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK, timeout=0):
                if (folder / WEIGHT_NAME).is_file():
                    logger.warning(f"{folder / WEIGHT_NAME} is there already, and is left as it is.")
                else:
                    latest = "latest" if list_checkpoints(folder) else None
                    fit(pipeline, replace(config, resume_from_checkpoint=latest))
        except Timeout:
            continue
        except (ValueError, OSError, RuntimeError) as error:
            errors[config.output_dir] = " ".join(str(error).split())
            logger.error(f"{folder}: {errors[config.output_dir]}")
    for config in configs:
        with FileLock(Path(config.output_dir) / LOCK):
            if not (Path(config.output_dir) / WEIGHT_NAME).is_file():
                errors.setdefault(config.output_dir, "failed in another process")
    if errors:
        listed = "; ".join(f"{folder} ({error})" for folder, error in errors.items())
        raise RuntimeError(f"{len(errors)} of {len(configs)} concepts could not be fitted or shared: {listed}")
