"""`perfusion fit | generate | info`, for people who write no Python."""

import argparse
import dataclasses
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from diffusers import DiffusionPipeline

from .concept import PerfusionConcept
from .hub import find_concept_file
from .loaders import add_perfusion
from .pipelines import PerfusionPipeline

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 for bad input (one sentence on stderr) or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="perfusion", description="Personalise a text-to-image model with Perfusion.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (run, add_arguments, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        add_arguments(command)
        command.set_defaults(run=run)
    arguments = vars(parser.parse_args(argv))
    run = arguments.pop("run")
    try:
        run(**arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"perfusion: {error}", file=sys.stderr)
        return 1
    return 0


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of `training.FitConfig`, with its type, default and description."""
    from .training import FitConfig

    hints = get_type_hints(FitConfig)
    for field in dataclasses.fields(FitConfig):
        kind = hints[field.name]
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(part for part in get_args(kind) if part is not type(None))
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
            options["required"] = True
        elif field.default not in (None, dataclasses.MISSING):
            options["help"] += f" Default: {field.default}."
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


def fit(**settings: Any) -> None:
    """Fit a concept; the settings are those of `training.FitConfig`."""
    from .training import FitConfig, make_accelerator
    from .training import fit as run_fit

    config = FitConfig(**settings)
    accelerator = make_accelerator(config)
    pipeline = PerfusionPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        safety_checker=None,
        requires_safety_checker=False,
    )
    concept = run_fit(pipeline, config, accelerator)
    if accelerator.is_main_process:
        print(f"{_describe(Path(config.output_dir) / 'perfusion.safetensors')}: {concept.placeholder_token}")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `generate`."""
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Id on the Hub, or folder, of the base."
    )
    parser.add_argument("--concept", action="append", required=True, help="Hub id, folder or file; repeatable.")
    parser.add_argument("--prompt", action="append", required=True, help="With the concept's word; repeatable.")
    parser.add_argument(
        "--bias", type=float, help="Bias of all concepts: low like the pictures, high like the prompt."
    )
    parser.add_argument("--temperature", type=float, help="Temperature of all concepts.")
    parser.add_argument("--locking", choices=("local", "global"), default="local", help="How keys are locked.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=6.0, help="Classifier-free guidance.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of each picture.")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="Folder for the pictures.")


def generate(
    pretrained_model_name_or_path: str,
    concept: list[str],
    prompt: list[str],
    bias: float | None,
    temperature: float | None,
    locking: Literal["local", "global"],
    num_inference_steps: int,
    guidance_scale: float,
    seed: int,
    output_dir: Path,
) -> None:
    """Draw prompts with concepts, one PNG each."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pipeline = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path)
    add_perfusion(pipeline)
    pipeline.load_perfusion(concept)
    pipeline.set_perfusion(bias=bias, temperature=temperature, locking=locking)
    if device.type == "cpu":
        # Some releases of transformers keep the half precision that a text encoder was stored in; a CPU cannot use it.
        pipeline.text_encoder.float()
    else:
        pipeline.to(device, torch.float16)
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(prompt):
        image = pipeline(
            text,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator(device).manual_seed(seed),
        ).images[0]
        path = output_dir / f"{number:02d}-{_slug(text)}.png"
        image.save(path)
        print(_describe(path))


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `info`."""
    parser.add_argument("concept", help="Hub id, folder or file.")


def info(concept: str) -> None:
    """Print what is in a concept file."""
    path = find_concept_file(concept)
    held = PerfusionConcept.load(path)
    print(_describe(path))
    rows: dict[str, Any] = {
        "placeholder_token": held.placeholder_token,
        "superclass": held.superclass,
        "base_model": held.base_model or "not recorded",
        "text encoder": f"width {held.width}",
        "layers": f"{len(held.target_outputs)}, {sum(len(o) for o in held.target_outputs.values())} numbers",
        "dtype": str(held.target_input.dtype).removeprefix("torch."),
        "bias": f"{held.bias} (worth trying: {held.bias_range[0]} to {held.bias_range[1]})",
        "temperature": held.temperature,
        **{f"training.{name}": value for name, value in held.training.items()},
    }
    for name, value in rows.items():
        print(f"  {name:34} {value}")


def _describe(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes)"


def _slug(text: str) -> str:
    """A prompt as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:80]


_COMMANDS = {
    "fit": (fit, add_fit_arguments, "Fit a concept to a folder of pictures."),
    "generate": (generate, add_generate_arguments, "Draw prompts with concepts."),
    "info": (info, add_info_arguments, "Show what is in a concept file, without a model."),
}


if __name__ == "__main__":
    sys.exit(main())
