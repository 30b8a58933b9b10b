"""`perfusion fit | generate | info | push | pull | search`, for people who write no Python."""

import argparse
import dataclasses
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .concept import WEIGHT_NAME, PerfusionConcept, write_atomically
from .hub import find_concept_file, read_header, search_concepts
from .loaders import add_perfusion
from .pipelines import PerfusionPipeline

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 for bad input (one sentence on stderr) or 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="perfusion", description="Personalise a text-to-image model with Perfusion.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (run, add_arguments, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name in argv[:1]:  # the flags of a fit need the packages that a fit needs
            try:
                add_arguments(command)
            except ImportError as error:
                print(f"perfusion: {error}; install diffusers_perfusion[train]", file=sys.stderr)
                return 1
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
    concepts = [PerfusionConcept.load(find_concept_file(source)) for source in concept]
    for text in prompt:
        if not any(held.placeholder_token in text for held in concepts):
            words = ", ".join(held.placeholder_token for held in concepts)
            print(f"perfusion: the prompt {text!r} holds none of the words {words}", file=sys.stderr)
    # The accelerator that torch was built for need not be in this machine.
    device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    pipeline = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path)
    add_perfusion(pipeline)
    pipeline.load_perfusion(concepts)
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
    parser.add_argument("concept", help="Hub id, folder or file; of one on the Hub the header alone is read.")
    _add_file_arguments(parser)


def info(concept: str, **options: Any) -> None:
    """Print what a concept file says of itself."""
    path, size, header = read_header(concept, **options)
    print(f"{path} ({size:,} bytes)")
    rows: dict[str, Any] = {
        "placeholder_token": header.placeholder_token,
        "superclass": header.superclass,
        "base_model": header.base_model or "not recorded",
        "text encoder": f"width {header.width}",
        "layers": f"{len(header.layers)}, {sum(header.layers.values())} numbers",
        "dtype": str(header.dtype).removeprefix("torch."),
        "bias": f"{header.bias} (worth trying: {header.bias_range[0]} to {header.bias_range[1]})",
        "temperature": header.temperature,
        **{f"training.{name}": value for name, value in header.training.items()},
    }
    for name, value in rows.items():
        print(f"  {_printable(name):34} {_printable(value)}")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `push`."""
    parser.add_argument("concept", help="Folder or file.")
    parser.add_argument("repo_id", help="Id of the repository; it is made if it is not there.")
    parser.add_argument(
        "--sample",
        action="append",
        nargs=2,
        default=[],
        metavar=("PICTURE", "PROMPT"),
        help="A picture drawn with the concept, and its prompt; repeatable.",
    )
    parser.add_argument("--license", help="Id of the licence, as the Hub names it, such as cc-by-4.0.")
    parser.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="Whether a new repository is private."
    )
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request.")
    parser.add_argument("--commit_message", help="What the commit says.")
    parser.add_argument("--weight_name", default=WEIGHT_NAME, help=f"Name of the file there. Default: {WEIGHT_NAME}.")
    parser.add_argument("--revision", help="Branch to push to, made if it is not there.")
    parser.add_argument("--token", help="Token that may write there; by default the stored one.")


def push(concept: str, repo_id: str, sample: list[tuple[str, str]], **options: Any) -> None:
    """Share a concept file on the Hub."""
    held = PerfusionConcept.load(Path(concept, WEIGHT_NAME) if Path(concept).is_dir() else concept)
    samples = []
    for path, prompt in sample:
        with Image.open(path) as picture:
            samples.append((prompt, picture.convert("RGB")))
    commit = held.push_to_hub(repo_id, samples=samples, **options)
    print(commit.pr_url or commit.commit_url)


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `pull`."""
    parser.add_argument("repo_id", help="Id of the repository.")
    _add_file_arguments(parser)
    parser.add_argument("--force_download", action="store_true", help="Download even what is in the cache.")
    parser.add_argument("--cache_dir", help="Where downloads are kept.")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="Folder for the file. Default: this one.")


def pull(repo_id: str, output_dir: Path, **options: Any) -> None:
    """Copy a concept file from the Hub into a folder."""
    path = find_concept_file(repo_id, **options)
    PerfusionConcept.load(path)
    output_dir.mkdir(parents=True, exist_ok=True)
    copy = output_dir / path.name
    write_atomically(copy, path.read_bytes())
    print(_describe(copy))


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `search`."""
    parser.add_argument("base_model", nargs="?", help="Id of the base model that concepts are for; by default any.")
    parser.add_argument("--limit", type=int, default=20, help="How many to show. Default: 20.")
    parser.add_argument("--token", help="To find private ones as well.")


def search(**options: Any) -> None:
    """List concepts on the Hub."""
    for found in search_concepts(**options):
        prompt = getattr(found.card_data, "instance_prompt", None) or ""
        print(f"{_printable(found.id):50} {_printable(prompt)}".rstrip())


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which file of a repository is meant."""
    parser.add_argument("--weight_name", default=WEIGHT_NAME, help=f"Name of the file. Default: {WEIGHT_NAME}.")
    parser.add_argument("--subfolder", help="Where in the folder or repository it is.")
    parser.add_argument("--revision", help="Branch, tag or commit of the repository.")
    parser.add_argument("--token", help="For private and gated repositories; by default the stored one.")


def _printable(value: Any) -> str:
    """A stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _describe(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes)"


def _slug(text: str) -> str:
    """A prompt as part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:80]


_COMMANDS = {
    "fit": (fit, add_fit_arguments, "Fit a concept to a folder of pictures."),
    "generate": (generate, add_generate_arguments, "Draw prompts with concepts."),
    "info": (info, add_info_arguments, "Show what is in a concept file, without a model."),
    "push": (push, add_push_arguments, "Share a concept file on the Hub."),
    "pull": (pull, add_pull_arguments, "Copy a concept file from the Hub."),
    "search": (search, add_search_arguments, "List concepts on the Hub."),
}


if __name__ == "__main__":
    sys.exit(main())
