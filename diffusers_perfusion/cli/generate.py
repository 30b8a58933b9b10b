"""`perfusion generate`."""

import argparse
import math
import re
import sys
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from ..files import check_writable, slug, to_png, write_atomically
from ..training.config import MAX_SEED
from .common import describe, folder, from_pretrained, place

_EXAMPLE = """example:
  perfusion generate --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --concept my-cat --prompt "a <my-cat> on the beach" --bias 1.1 --output_dir images
"""


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `generate`."""
    parser.epilog = _EXAMPLE
    concept = parser.add_argument_group("concept and base model")
    concept.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    concept.add_argument(
        "--concept",
        action="append",
        required=True,
        help="Hub id, folder or file; repeatable. A second <my-cat> becomes <my-cat-2>.",
    )
    concept.add_argument(
        "--bias", type=float, help="Bias of all concepts: low is like the subject, high like the prompt."
    )
    concept.add_argument("--temperature", type=float, help="Temperature of all concepts.")
    concept.add_argument("--locking", choices=("local", "global"), default="local", help="How keys are locked.")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--prompt", action="append", required=True, help="Prompt with a placeholder token; repeatable."
    )
    images.add_argument("--negative_prompt", help="Prompt of what the images should not show.")
    images.add_argument("--num_images_per_prompt", type=int, default=1, help="Images per prompt. Default: 1.")
    images.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps. Default: 50.")
    images.add_argument(
        "--guidance_scale",
        type=float,
        help="Scale of classifier-free guidance. Default: 6.0, or in models with joint attention their pipeline's.",
    )
    images.add_argument("--seed", type=int, default=0, help="Seed of each prompt. Default: 0.")
    images.add_argument(
        "--output_dir",
        type=folder,
        default=Path("."),
        help="Folder for the images, which are numbered after those in it. Default: this one.",
    )


def generate(
    pretrained_model_name_or_path: str,
    concept: list[str],
    prompt: list[str],
    bias: float | None,
    temperature: float | None,
    locking: Literal["local", "global"],
    seed: int,
    output_dir: Path,
    negative_prompt: str | None,
    guidance_scale: float | None,
    **options: Any,
) -> None:
    """Generate prompts with concepts, and write a PNG for each image."""
    for name in ("num_inference_steps", "num_images_per_prompt"):
        if options[name] < 1:
            raise ValueError(f"{name} is {options[name]}; expected at least 1")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale is {guidance_scale}; expected a finite number")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; expected 0 to {MAX_SEED}")
    check_writable(output_dir)
    from .quiet import silence_libraries

    silence_libraries()
    import torch
    from tqdm.auto import tqdm

    from ..concept import PerfusionConcept
    from ..hub import find_concept_file
    from ..model_families import family_of

    concepts = [PerfusionConcept.load(find_concept_file(source)) for source in concept]
    _number_tokens(concepts, concept)
    for text in prompt:
        if not any(loaded.placeholder_token.lower() in text.lower() for loaded in concepts):
            tokens = ", ".join(loaded.placeholder_token for loaded in concepts)
            print(f"perfusion: the prompt {text!r} has none of the placeholder tokens {tokens}", file=sys.stderr)
    # The accelerator that torch was built for may be absent from this machine.
    device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    pipeline = from_pretrained(pretrained_model_name_or_path)
    pipeline.load_perfusion(concepts)
    pipeline.set_perfusion(bias=bias, temperature=temperature, locking=locking)
    place(pipeline, device)
    output_dir.mkdir(parents=True, exist_ok=True)
    options |= family_of(pipeline).call_arguments(guidance_scale)
    if negative_prompt is not None:  # not all pipelines take None
        parameters = signature(pipeline.__call__).parameters
        if "negative_prompt" not in parameters:
            raise ValueError(f"{type(pipeline).__name__} takes no negative prompt; leave --negative_prompt out")
        if "true_cfg_scale" in parameters and options.get("true_cfg_scale", parameters["true_cfg_scale"].default) <= 1:
            raise ValueError(
                f"{type(pipeline).__name__} ignores a negative prompt without guidance; give a --guidance_scale above "
                "1, or leave --negative_prompt out if the model is distilled from guidance"
            )
        options["negative_prompt"] = negative_prompt
    paths = []
    for text in tqdm(prompt, desc="Prompts"):
        images = pipeline(prompt=text, generator=torch.Generator(device).manual_seed(seed), **options).images
        number = _next_number(output_dir)
        for image_number, image in enumerate(images):
            suffix = f"-{image_number}" if len(images) > 1 else ""
            paths.append(output_dir / f"{number:02d}-{slug(text)}{suffix}.png")
            write_atomically(paths[-1], to_png(image))
    for path in paths:
        print(describe(path))


def _next_number(folder: Path) -> int:
    """Return the number after those with which the names of images in a folder begin."""
    numbers = [re.match(r"\d+(?=-.*\.png$)", path.name) for path in folder.iterdir()]
    return max((int(number.group()) + 1 for number in numbers if number), default=0)


def _number_tokens(concepts: list[Any], sources: list[str]) -> None:
    """Give each concept a placeholder token of its own, such as `<my-bear-2>` for the second `<my-bear>`."""
    tokens: set[str] = set()
    for concept, source in zip(concepts, sources, strict=True):
        token, number = concept.placeholder_token, 2
        while concept.placeholder_token.lower() in tokens:  # some pipelines ignore case
            concept.placeholder_token = f"{token[:-1]}-{number}>" if token.endswith(">") else f"{token}-{number}"
            number += 1
        if concept.placeholder_token != token:
            print(f"perfusion: {token} is loaded already; {source} is {concept.placeholder_token}", file=sys.stderr)
        tokens.add(concept.placeholder_token.lower())
