"""A queue of fits: `read_queue` from a table, `fit_many` by any number of processes."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
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
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def read_queue(path: str | os.PathLike, settings: Mapping[str, Any]) -> list[FitConfig]:
    """The fits in a table with a line for each and a column for each setting in which they differ.

    Args:
        path: a CSV file whose first line names the columns, which are settings of `FitConfig`; an empty cell leaves
            its setting as it is. Without a column `output_dir` each goes to a folder named after its word.
        settings: of all, and the `output_dir` that their folders are in.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is no setting or one of all, a cell or setting is out of range, two have one folder, or
            there is no line.
    """
    kinds = setting_kinds()
    required = [f.name for f in fields(FitConfig) if f.default is MISSING and f.default_factory is MISSING]
    parent = Path(settings.get("output_dir", FitConfig.output_dir))
    configs: dict[Path, FitConfig] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, skipinitialspace=True)
        for name in rows.fieldnames or ():
            if name not in kinds or name in _OF_ALL:
                raise ValueError(
                    f"{path} has a column {name!r}; expected settings of a fit, but for {', '.join(_OF_ALL)}"
                )
        for row in rows:
            try:
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(rows.fieldnames or ())} cells")
                own = {name: _parse(kinds[name], cell) for name, cell in row.items() if cell}
                given = {**settings, **own}
                if missing := [name for name in required if name not in given]:
                    raise ValueError(f"no {', '.join(missing)}")
                folder = parent / own.get("output_dir", slug(given["placeholder_token"]))
                config = FitConfig(**given | {"output_dir": str(folder)})
            except ValueError as error:
                raise ValueError(f"line {rows.line_num} of {path}: {error}") from error
            if folder in configs:
                raise ValueError(f"line {rows.line_num} of {path}: another concept goes to {folder} already")
            configs[folder] = config
    if not configs:
        raise ValueError(f"{path} has no line below its first one, which names the columns")
    return list(configs.values())


def _parse(kind: Any, cell: str) -> Any:
    """A cell as its setting's type."""
    if kind is bool:
        if cell.lower() not in ("true", "false"):
            raise ValueError(f"{cell!r} is neither true nor false")
        return cell.lower() == "true"
    if get_origin(kind) is list:
        return [cell]
    return cell if get_args(kind) else kind(cell)


def leave_the_others() -> int:
    """Make a launched process one of its own, with its own device, before it has an `Accelerator`; returns its number.

    Fits of a queue are of one process each, and processes share nothing but the queue.
    """
    number = int(os.environ.get("LOCAL_RANK", 0))
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    if torch.cuda.is_available():
        torch.cuda.set_device(number)
    return number


def fit_many(pipeline: Any, configs: Sequence[FitConfig]) -> None:
    """Fit concepts on one base model in memory, each into a folder of its own.

    Processes that are given the same fits share them: each takes the next that no other is at, and waits at the end
    until all are done. Concepts that are there already are left alone, and fits that were stopped go on from their
    last checkpoint; so a queue that was killed is started again as it was started first.

    Args:
        pipeline: as for `fit`.
        configs: of the fits; each with another `output_dir`.

    Raises:
        RuntimeError: if some could not be fitted, when all others are.
    """
    errors: dict[str, str] = {}
    for config in configs:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK, timeout=0):
                if (folder / WEIGHT_NAME).is_file():
                    logger.info(f"{folder / WEIGHT_NAME} is there already.")
                else:
                    latest = "latest" if list_checkpoints(folder) else None
                    fit(pipeline, replace(config, resume_from_checkpoint=latest))
        except Timeout:
            continue
        except (ValueError, OSError, RuntimeError) as error:
            errors[config.output_dir] = " ".join(str(error).split())
            logger.error(f"{folder}: {errors[config.output_dir]}")
    missing = []
    for config in configs:
        with FileLock(Path(config.output_dir) / LOCK):
            if not (Path(config.output_dir) / WEIGHT_NAME).is_file():
                missing.append(f"{config.output_dir} ({errors.get(config.output_dir, 'failed in another process')})")
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(configs)} concepts could not be fitted: {'; '.join(missing)}")
