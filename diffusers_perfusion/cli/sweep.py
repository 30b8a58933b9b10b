"""`perfusion sweep`."""

import argparse
from pathlib import Path
from typing import Any

from ..concept_file import WEIGHT_NAME
from .common import describe, folder, load_pipeline, place

_EXAMPLE = """example:
  perfusion sweep --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
      --concept my-cat --checkpoints --instance_data_dir my-cat-images --bias 0.7 0.9 1.1 --write_default
"""


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sweep`."""
    parser.epilog = _EXAMPLE
    concept = parser.add_argument_group("concept and base model")
    concept.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    concept.add_argument("--concept", required=True, help="Hub id, folder or file.")
    concept.add_argument(
        "--checkpoints",
        action="store_true",
        help="Compare the checkpoints in the folder of a training, which --concept names, instead of its last step.",
    )
    concept.add_argument(
        "--write_default",
        action="store_true",
        help="Write the best bias and temperature into the concept file, and with --checkpoints the best checkpoint.",
    )
    images = parser.add_argument_group("images")
    images.add_argument("--instance_data_dir", required=True, help="Folder with the training images.")
    images.add_argument(
        "--prompt",
        action="append",
        help="Prompt with the placeholder token; repeatable. Default: 8 such as 'a <token> on the beach'.",
    )
    images.add_argument(
        "--bias", type=float, nargs="+", help="Biases. Default: the range in the concept file, in steps of 0.1."
    )
    images.add_argument("--temperature", type=float, nargs="+", help="Temperatures. Default: the concept's own.")
    images.add_argument(
        "--seed", type=int, nargs="+", default=[0, 1], help="Seeds; each gives an image per prompt. Default: 0 1."
    )
    images.add_argument("--locking", choices=("local", "global"), default="local", help="How keys are locked.")
    images.add_argument("--num_inference_steps", type=int, default=50, help="Denoising steps. Default: 50.")
    images.add_argument(
        "--guidance_scale",
        type=float,
        help="Scale of classifier-free guidance. Default: 6.0, or in models with joint attention their pipeline's.",
    )
    images.add_argument("--batch_size", type=int, default=4, help="Images in a batch, per process. Default: 4.")
    images.add_argument(
        "--output_dir",
        type=folder,
        default=Path("sweep"),
        help="Folder for images, scores and plots; a stopped sweep resumes there. Default: sweep.",
    )
    metrics = parser.add_argument_group("metrics")
    metrics.add_argument(
        "--clip_model",
        default="openai/clip-vit-large-patch14",
        help="Hub id or folder of the CLIP for text alignment. Default: openai/clip-vit-large-patch14.",
    )
    metrics.add_argument(
        "--identity_model",
        default="facebook/dinov2-base",
        help="Hub id or folder of the vision transformer for identity. Default: facebook/dinov2-base.",
    )


def sweep(
    pretrained_model_name_or_path: str,
    concept: str,
    checkpoints: bool,
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
    """Find the best bias, temperature and checkpoint of a concept."""
    from .quiet import silence_libraries

    silence_libraries()
    import torch
    from accelerate import Accelerator

    from ..concept import PerfusionConcept
    from ..evaluation import ClipEncoder, ConceptMetrics, IdentityEncoder
    from ..evaluation import sweep as run_sweep
    from ..hub import find_concept_file
    from ..model_families import family_of
    from ..training.checkpoints import list_checkpoints
    from ..training.images import read_images

    if write_default and not Path(concept).exists():
        raise ValueError(
            f"--write_default rewrites a local file, and {concept} is none; `perfusion pull {concept}` downloads it"
        )
    concepts: Any
    if checkpoints:
        folders = list_checkpoints(concept)
        if not folders:
            raise ValueError(f"{concept} has no checkpoints; expected the output folder of a training")
        # An earlier training into the same folder may have left later steps.
        steps = [int(path.name.rpartition("-")[2]) for path in folders]
        first = max((number for number in range(1, len(steps)) if steps[number] <= steps[number - 1]), default=0)
        folders = folders[first:]
        concepts = {folder.name: PerfusionConcept.load(folder / WEIGHT_NAME) for folder in folders}
        path = Path(concept) / WEIGHT_NAME
    else:
        path = find_concept_file(concept)
        concepts = PerfusionConcept.load(path)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipeline = load_pipeline(pretrained_model_name_or_path)
    place(pipeline, accelerator.device)
    resolution = family_of(pipeline).default_resolution
    metrics = ConceptMetrics(
        ClipEncoder.from_pretrained(clip_model, accelerator.device),
        IdentityEncoder.from_pretrained(identity_model, accelerator.device),
        [image.image for image in read_images(instance_data_dir, resolution)],
    )
    result = run_sweep(
        pipeline,
        concepts,
        metrics,
        prompt,
        biases=bias,
        temperatures=temperature,
        seeds=seed,
        output_dir=output_dir,
        accelerator=accelerator,
        **options,
    )
    if accelerator.is_main_process:
        table = result.table()
        lines = [list(table[0]), *(list(map(str, row.values())) for row in table)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if best := result.best:
            print(f"best: {best.checkpoint + ', ' if best.checkpoint else ''}β {best.bias}, τ {best.temperature}")
        else:
            print("best: none, since no row has both scores above 0")
        for name in ("sweep.json", "pareto_front.png", "contact_sheet.png"):
            print(describe(output_dir / name))
        if write_default:
            result.write_default(path)
            print(describe(path))
    accelerator.end_training()
