"""`perfusion fit | fit-many | generate | sweep | info | push | pull | search`, for people who write no Python."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .concept import WEIGHT_NAME, PerfusionConcept, write_atomically
from .families import edited_model, text_encoders
from .hub import find_concept_file, read_header, search_concepts
from .loaders import add_perfusion
from .pictures import read_pictures, slug

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
        # Errors of the libraries have several lines.
        print(f"perfusion: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def add_fit_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """A flag for each setting of `training.FitConfig`, with its type, default and description.

    Args:
        parser: that gets the flags.
        optional: also those of settings without a default.
    """
    from .training.config import FitConfig, setting_kinds

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
    from .training import FitConfig, make_accelerator
    from .training import fit as run_fit

    config = FitConfig(**settings)
    accelerator = make_accelerator(config)
    pipeline = _unchecked(config.pretrained_model_name_or_path, revision=config.revision, variant=config.variant)
    concept = run_fit(pipeline, config, accelerator)
    if accelerator.is_main_process:
        print(f"{_describe(Path(config.output_dir) / WEIGHT_NAME)}: {concept.placeholder_token}")


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
    from .training import fit_many as run_fit_many
    from .training.queue import read_queue

    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    configs = read_queue(concepts, settings)
    base = configs[0]
    pipeline = _unchecked(base.pretrained_model_name_or_path, revision=base.revision, variant=base.variant)
    run_fit_many(pipeline, configs)
    for config in configs if speaks else ():
        print(f"{_describe(Path(config.output_dir) / WEIGHT_NAME)}: {config.placeholder_token}")


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
    _place(pipeline, device)
    output_dir.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(prompt):
        image = pipeline(
            text,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator(device).manual_seed(seed),
        ).images[0]
        path = output_dir / f"{number:02d}-{slug(text)}.png"
        image.save(path)
        print(_describe(path))


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `sweep`."""
    # What draws the plot is missed now, and not when all pictures are drawn.
    from .evaluation import plots  # noqa: F401
    from .evaluation.sweep import PROMPTS

    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="Id on the Hub, or folder, of the base."
    )
    parser.add_argument("--concept", required=True, help="Hub id, folder or file.")
    parser.add_argument("--instance_data_dir", required=True, help="Folder with the pictures it was fitted to.")
    parser.add_argument(
        "--prompt",
        action="append",
        help=f"With the concept's word; repeatable. Default: {len(PROMPTS)} such as '{PROMPTS[0].format('<word>')}'.",
    )
    parser.add_argument(
        "--bias", type=float, nargs="+", help="Biases. Default: the range in the concept file, in steps of 0.1."
    )
    parser.add_argument("--temperature", type=float, nargs="+", help="Temperatures. Default: the concept's own.")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0, 1], help="Seeds: a picture of each prompt from each. Default: 0 1."
    )
    parser.add_argument("--locking", choices=("local", "global"), default="local", help="How keys are locked.")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--guidance_scale", type=float, default=6.0, help="Classifier-free guidance.")
    parser.add_argument("--batch_size", type=int, default=4, help="Pictures that a process draws at once. Default: 4.")
    parser.add_argument(
        "--clip_model",
        default="openai/clip-vit-large-patch14",
        help="Id on the Hub, or folder, of the CLIP that reads the prompts. Default: openai/clip-vit-large-patch14.",
    )
    parser.add_argument(
        "--identity_model",
        default="facebook/dinov2-base",
        help="Of the vision transformer that knows the subject again. Default: facebook/dinov2-base.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("sweep"),
        help="Folder for pictures, scores and plots; a stopped sweep goes on there. Default: sweep.",
    )
    parser.add_argument(
        "--write_default", action="store_true", help="Write the best bias and temperature into the concept file."
    )


def sweep(
    pretrained_model_name_or_path: str,
    concept: str,
    instance_data_dir: str,
    prompt: list[str] | None,
    bias: list[float] | None,
    temperature: list[float] | None,
    seed: list[int],
    clip_model: str,
    identity_model: str,
    output_dir: Path,
    write_default: bool,
    **options: Any,
) -> None:
    """Find the best bias and temperature of a concept."""
    from accelerate import Accelerator

    from .evaluation import ClipEncoder, IdentityEncoder, Judge
    from .evaluation import sweep as run_sweep

    if write_default and not Path(concept).exists():
        raise ValueError(
            f"--write_default rewrites a file on this disk, and {concept} is none; `perfusion pull {concept}` copies "
            "one from the Hub"
        )
    path = find_concept_file(concept)
    held = PerfusionConcept.load(path)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipeline = _unchecked(pretrained_model_name_or_path)
    _place(pipeline, accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    resolution = edited_model(pipeline).config.sample_size * pipeline.vae_scale_factor
    judge = Judge(
        ClipEncoder.from_pretrained(clip_model, accelerator.device),
        IdentityEncoder.from_pretrained(identity_model, accelerator.device),
        [picture.image for picture in read_pictures(instance_data_dir, resolution)],
    )
    swept = run_sweep(
        pipeline,
        held,
        judge,
        prompt,
        biases=bias,
        temperatures=temperature,
        seeds=seed,
        output_dir=output_dir,
        accelerator=accelerator,
        **options,
    )
    if accelerator.is_main_process:
        lines = [list(swept.table()[0]), *(list(map(str, row.values())) for row in swept.table())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        best = swept.best
        print(f"best: β {best.bias}, τ {best.temperature}" if best else "best: none, for none has both scores above 0")
        for name in ("sweep.json", "front.png", "grid.png"):
            print(_describe(output_dir / name))
        if write_default:
            swept.write_default(path)
            print(_describe(path))
    accelerator.end_training()


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
    parser.add_argument(
        "--sweep", help="A sweep.json of this concept, whose scores a card that is of this concept alone shows."
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


def push(concept: str, repo_id: str, sample: list[tuple[str, str]], sweep: str | None, **options: Any) -> None:
    """Share a concept file on the Hub."""
    held = PerfusionConcept.load(Path(concept, WEIGHT_NAME) if Path(concept).is_dir() else concept)
    samples = []
    for path, prompt in sample:
        with Image.open(path) as picture:
            samples.append((prompt, picture.convert("RGB")))
    rows: list[dict[str, Any]] = []
    if sweep is not None:
        from .evaluation import Sweep

        swept = Sweep.read(sweep)
        swept.check_concept(held)
        rows = swept.table()
    commit = held.push_to_hub(repo_id, samples=samples, sweep=rows, **options)
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


def _unchecked(base: str, **options: Any) -> Any:
    """The pipeline of a base model, of whichever family, without the safety checker that some have."""
    if "safety_checker" in DiffusionPipeline.load_config(base, revision=options.get("revision")):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return add_perfusion(DiffusionPipeline.from_pretrained(base, **options))


def _place(pipeline: Any, device: torch.device) -> None:
    """Put a pipeline on its device: in half precision, but in full precision on a CPU."""
    if device.type == "cpu":
        # Some releases of transformers keep the half precision that a text encoder was stored in; a CPU cannot use it.
        for model in text_encoders(pipeline).models:
            model.float()
    else:
        pipeline.to(device, torch.float16)


def _printable(value: Any) -> str:
    """A stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _describe(path: Path) -> str:
    return f"{path} ({path.stat().st_size:,} bytes)"


_COMMANDS = {
    "fit": (fit, add_fit_arguments, "Fit a concept to a folder of pictures."),
    "fit-many": (fit_many, add_fit_many_arguments, "Fit a table of concepts, one after the other or in processes."),
    "generate": (generate, add_generate_arguments, "Draw prompts with concepts."),
    "sweep": (sweep, add_sweep_arguments, "Find the best bias and temperature of a concept."),
    "info": (info, add_info_arguments, "Show what is in a concept file, without a model."),
    "push": (push, add_push_arguments, "Share a concept file on the Hub."),
    "pull": (pull, add_pull_arguments, "Copy a concept file from the Hub."),
    "search": (search, add_search_arguments, "List concepts on the Hub."),
}


if __name__ == "__main__":
    sys.exit(main())
