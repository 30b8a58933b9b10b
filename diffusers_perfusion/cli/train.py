"""`perfusion train`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..concept_file import WEIGHT_NAME
from ..training.config import GROUPS, TrainingConfig, setting_types
from .common import describe, load_pipeline

_EXAMPLE = """examples:
  perfusion train --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --instance_data_dir my-cat-images --placeholder_token "<my-cat>" --superclass cat --output_dir my-cat
  accelerate launch -m diffusers_perfusion.cli train --concepts concepts.csv --output_dir concepts \\
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5
"""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of `TrainingConfig`, with its type, default and description."""
    parser.epilog = _EXAMPLE
    parser.usage = (
        "perfusion train --pretrained_model_name_or_path BASE --instance_data_dir FOLDER --placeholder_token TOKEN\n"
        "                       --superclass WORDS [--output_dir FOLDER] [more flags]"
    )
    types = setting_types()
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    required = []
    # Not transformers' HfArgumentParser, whose import alone takes longer than the help should.
    for field in dataclasses.fields(TrainingConfig):
        kind = types[field.name]
        options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%")}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is list:
            options["action"] = "append"
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = kind
        if field.default not in (None, dataclasses.MISSING):
            options["help"] += f" Default: {field.default}."
        # A setting that is not given is left to TrainingConfig.
        action = groups[field.metadata["group"]].add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            action.required = True
            required.append(action)

    class Table(argparse.Action):
        """The table of concepts, whose columns may be the settings that are required otherwise."""

        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            namespace.concepts = values
            for action in required:
                action.required = False

    groups["concept"].add_argument(
        "--concepts",
        action=Table,
        help="CSV file with a row for each concept and a column for each setting in which they differ, such as "
        "instance_data_dir, placeholder_token and superclass; flags are for all. Concepts that exist in the output "
        "folder are skipped, others resume from their last checkpoint. Under `accelerate launch` the processes train "
        "different concepts.",
    )


def train(concepts: str | None, **settings: Any) -> None:
    """Train a concept, or the concepts of a table, with the settings of `TrainingConfig`."""
    config = None if concepts is not None else TrainingConfig(**settings)
    from .quiet import silence_libraries

    silence_libraries()
    if config is None:
        _train_table(str(concepts), settings)
        return
    from ..training.output_folder import check_output_folder
    from ..training.training_loop import make_accelerator
    from ..training.training_loop import train as run_training

    check_output_folder(config)  # before the base model is loaded, and perhaps downloaded
    accelerator = make_accelerator(config)
    try:
        pipeline = load_pipeline(
            config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant
        )
        concept = run_training(pipeline, config, accelerator)
        if accelerator.is_main_process:
            print(f"{describe(Path(config.output_dir) / WEIGHT_NAME)}: {concept.placeholder_token}")
    finally:
        accelerator.end_training()


def _train_table(path: str, settings: dict[str, Any]) -> None:
    from accelerate import PartialState

    from ..training.concepts_table import read_concepts_table, train_concepts

    configs = read_concepts_table(path, settings)
    base = configs[0]
    pipeline = load_pipeline(base.pretrained_model_name_or_path, revision=base.revision, variant=base.variant)
    train_concepts(pipeline, configs)
    if PartialState().is_main_process:
        for config in configs:
            print(f"{describe(Path(config.output_dir) / WEIGHT_NAME)}: {config.placeholder_token}")
