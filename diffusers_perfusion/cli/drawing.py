"""`perfusion generate | sweep`."""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from ..concept import PerfusionConcept
from ..families import edited_model
from ..hub import find_concept_file
from ..loaders import add_perfusion
from ..pictures import read_pictures, slug
from .common import describe, place, unchecked


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
    place(pipeline, device)
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
        print(describe(path))


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `sweep`."""
    # What draws the plot is missed now, and not when all pictures are drawn.
    from ..evaluation import plots  # noqa: F401
    from ..evaluation.sweep import PROMPTS

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

    from ..evaluation import ClipEncoder, IdentityEncoder, Judge
    from ..evaluation import sweep as run_sweep

    if write_default and not Path(concept).exists():
        raise ValueError(
            f"--write_default rewrites a file on this disk, and {concept} is none; `perfusion pull {concept}` copies "
            "one from the Hub"
        )
    path = find_concept_file(concept)
    held = PerfusionConcept.load(path)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipeline = unchecked(pretrained_model_name_or_path)
    place(pipeline, accelerator.device)
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
            print(describe(output_dir / name))
        if write_default:
            swept.write_default(path)
            print(describe(path))
    accelerator.end_training()
