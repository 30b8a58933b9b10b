"""Train the concepts of a table: `read_concepts_table` and `train_concepts`."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_origin

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.utils import logging
from torch import Tensor

from ..concept_file import WEIGHT_NAME, ConceptHeader
from ..files import slug
from .checkpoints import list_checkpoints
from .config import TrainingConfig, setting_types
from .training_loop import make_accelerator, train

logger = logging.get_logger(__name__)

# Settings of the model in memory, which all concepts share.
_SHARED = ("pretrained_model_name_or_path", "revision", "variant", "mixed_precision", "allow_tf32")


def read_concepts_table(path: str | os.PathLike, settings: Mapping[str, Any]) -> list[TrainingConfig]:
    """Read a table with one row per concept and one column per setting in which the concepts differ.

    Args:
        path: a CSV file whose first line names the columns, which are settings of `TrainingConfig`. An empty cell
            leaves its setting as in `settings`. Without a column `output_dir` each concept goes to a folder named
            after its placeholder token.
        settings: settings of all concepts; their folders are in `output_dir`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no CSV file in UTF-8, a column is no setting or one that all concepts share, a cell or
            setting is out of range, two concepts have one folder or repository, there is no row, or
            `resume_from_checkpoint` is given, since each concept resumes from its own checkpoint.
    """
    types = setting_types()
    required = [f.name for f in fields(TrainingConfig) if f.default is MISSING and f.default_factory is MISSING]
    parent = Path(settings.get("output_dir", TrainingConfig.output_dir))
    configs: list[TrainingConfig] = []
    taken: set[object] = set()
    columns, rows = _read_rows(path)
    if "resume_from_checkpoint" in {*settings, *columns}:
        raise ValueError(
            "resume_from_checkpoint cannot be given with a table; every concept resumes from its last checkpoint"
        )
    if len(columns) != len(set(columns)):
        raise ValueError(f"{path} has two columns of one name; expected each setting once")
    for name in columns:
        if name not in types or name in _SHARED:
            raise ValueError(
                f"{path} has a column {name!r}; expected settings of a training other than {', '.join(_SHARED)}"
            )
    for line, row in rows:
        try:
            if None in row or None in row.values():
                raise ValueError(f"its number of cells is not {len(columns)}")
            own = {name: _parse(name, types[name], cell.strip()) for name, cell in row.items() if cell.strip()}
            given = {**settings, **own}
            if missing := [name for name in required if name not in given]:
                raise ValueError(f"it has no {', '.join(missing)}")
            token = given["placeholder_token"]
            if not (name := own.get("output_dir", slug(token))):
                raise ValueError(f"{token!r} has no letters to name a folder by; add a column output_dir")
            config = TrainingConfig(**given | {"output_dir": str(parent / os.path.expanduser(name))})
        except ValueError as error:
            raise ValueError(f"line {line} of {path}: {error}") from error
        places = [Path(config.output_dir).resolve(), *([config.hub_model_id] if config.hub_model_id else [])]
        for place in places:
            if place in taken:
                raise ValueError(f"line {line} of {path}: an earlier line has {place} too")
        taken.update(places)
        configs.append(config)
    if not configs:
        raise ValueError(f"{path} has no concepts; expected a line with the columns, and one for each concept")
    return configs


def _read_rows(path: str | os.PathLike) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns of a table, and its rows after the numbers of their lines."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            return list(rows.fieldnames or ()), [(rows.line_num, row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}); save the table as one") from error


def _parse(name: str, kind: Any, cell: str) -> Any:
    """Return the value of a cell in the type of its setting."""
    if get_origin(kind) is list:
        return [cell]
    try:
        return {"true": True, "false": False}[cell.lower()] if kind is bool else kind(cell)
    except (ValueError, KeyError) as error:
        expected = "true or false" if kind is bool else kind.__name__
        raise ValueError(f"{name} is {cell!r}; expected {expected}") from error


class SingleProcess:
    """An accelerator that trains on this process alone, however many were launched.

    Device, precision and trackers are those of an `Accelerator`; there is one process, which is the main one.

    Args:
        accelerator: of this process.
    """

    num_processes = 1
    process_index = 0
    is_main_process = True

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def init_trackers(self, project_name: str, config: dict[str, Any]) -> None:
        """Start the trackers on this process; accelerate would start most of them on the main process alone."""
        trackers = []
        for tracker in self.log_with:
            if not isinstance(tracker, GeneralTracker):
                kind = LOGGER_TYPE_TO_CLASS[str(tracker)]
                folder = [self.logging_dir] if kind.requires_logging_directory else []
                tracker = kind(project_name, *folder)
            tracker.main_process_only = False
            trackers.append(tracker)
        self._accelerator.log_with = trackers
        self._accelerator.init_trackers(project_name, config)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        """Return the tensor: there is no other process to reduce it with."""
        return tensor

    def wait_for_everyone(self) -> None:
        """Return at once: there is no other process."""


def _is_trained(config: TrainingConfig) -> bool:
    """Return whether the output folder has the concept; `train` refuses a file that is another one or damaged."""
    try:
        header = ConceptHeader.read(Path(config.output_dir) / WEIGHT_NAME)
    except (OSError, ValueError):
        return False
    return header.placeholder_token == config.placeholder_token


def train_concepts(pipeline: Any, configs: Sequence[TrainingConfig]) -> None:
    """Train concepts on one base model in memory, each into a folder of its own.

    Under `accelerate launch` the concepts are split over the processes, of all machines, which need the output folders
    on a disk they share. Each concept is trained by one process, to the same bytes as alone. Concepts whose file
    exists are skipped, and those that were stopped resume from their last checkpoint, so a killed call is simply
    repeated. A concept that was trained and could not be shared is not shared by it: `perfusion push` does that.

    Args:
        pipeline: as for `train`.
        configs: of the concepts; each with another `output_dir`.

    Raises:
        RuntimeError: if some concepts could not be trained or shared, when all others are.
    """
    # Processes wait for the slowest one at the end, which may take longer than the default timeout.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    done = [_is_trained(config) for config in configs]
    (done,) = broadcast_object_list([done])  # all processes must split the same rows
    errors: list[tuple[str, str]] = []
    for config in (config for config, exists in zip(configs, done, strict=True) if exists):
        if state.is_main_process:
            logger.warning(f"{Path(config.output_dir) / WEIGHT_NAME} exists, so it is skipped.")
    remaining = [config for config, exists in zip(configs, done, strict=True) if not exists]
    with state.split_between_processes(remaining) as share:
        for config in share:
            latest = "latest" if list_checkpoints(config.output_dir) else None
            try:
                accelerator = SingleProcess(make_accelerator(config))
                try:
                    train(pipeline, replace(config, resume_from_checkpoint=latest), accelerator)
                finally:
                    for tracker in accelerator.trackers:
                        tracker.finish()
            except Exception as error:  # whatever it is, the others are trained
                told = isinstance(error, (ValueError, OSError, RuntimeError))
                sentence = " ".join((str(error) if told else repr(error)).split())
                errors.append((config.output_dir, sentence))
                logger.error(f"{config.output_dir}: {sentence}", exc_info=not told)
    # A launcher stops all processes when one fails, so every process fails, and only when all are through.
    errors = gather_object(errors)
    if errors:
        listed = "; ".join(f"{folder} ({error})" for folder, error in errors)
        raise RuntimeError(f"{len(errors)} of {len(configs)} concepts could not be trained or shared: {listed}")
