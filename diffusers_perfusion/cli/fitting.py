"""`perfusion fit | fit-many`."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..concept import WEIGHT_NAME
from .common import describe, unchecked


def add_fit_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """A flag for each setting of `training.FitConfig`, with its type, default and description.

    Args:
        parser: that gets the flags.
        optional: also those of settings without a default.
    """
    from ..training.config import FitConfig, setting_kinds

    kinds = setting_kinds()
    for field in dataclasses.fields(FitConfig):
        kind = kinds[field.name]
        options: dict[str, Any] = {"help": field.metadata["help"]}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is list:
            options["action"] = "append"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = kind
        # A setting that is not given is left to FitConfig.
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required:
            options["required"] = not optional
        elif field.default not in (None, dataclasses.MISSING):
            options["help"] += f" Default: {field.default}."
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


def fit(**settings: Any) -> None:
    """Fit a concept; the settings are those of `training.FitConfig`."""
    from ..training import FitConfig, make_accelerator
    from ..training import fit as run_fit

    config = FitConfig(**settings)
    accelerator = make_accelerator(config)
    pipeline = unchecked(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    concept = run_fit(pipeline, config, accelerator)
    if accelerator.is_main_process:
        print(f"{describe(Path(config.output_dir) / WEIGHT_NAME)}: {concept.placeholder_token}")


def add_fit_many_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `fit-many`: the table, and settings of all."""
    parser.add_argument(
        "concepts",
        help="CSV file with a line for each concept and a column for each setting in which they differ, such as "
        "instance_data_dir, placeholder_token and superclass; flags are for all.",
    )
    add_fit_arguments(parser, optional=True)


def fit_many(concepts: str, **settings: Any) -> None:
    """Fit the concepts of a table, with all processes that are started with it."""
    from ..training import fit_many as run_fit_many
    from ..training.queue import read_queue

    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    configs = read_queue(concepts, settings)
    base = configs[0]
    pipeline = unchecked(base.pretrained_model_name_or_path, revision=base.revision, variant=base.variant)
    run_fit_many(pipeline, configs)
    for config in configs if speaks else ():
        print(f"{describe(Path(config.output_dir) / WEIGHT_NAME)}: {config.placeholder_token}")
