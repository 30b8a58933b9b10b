"""Validation images, from the pipeline that is in memory."""

from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from ..files import to_png, write_atomically
from ..model_families import edited_model, family_of
from ..registry import registry_of
from .config import TrainingConfig

INFERENCE_STEPS = 25
IMAGES_FOLDER = "validation"  # in the output folder


@torch.no_grad()
def generate(pipeline: Any, name: str, config: TrainingConfig, accelerator: Any) -> list[list[Image.Image]]:
    """Generate the validation prompts with a loaded concept, at its own bias and temperature.

    The images are of the training's resolution, if it was given, and prompts no longer than in training.

    Args:
        pipeline: with the concept loaded; its settings are restored.
        name: of the concept.
        config: prompts, number of images of each, seed of the noise of each, and resolution.
        accelerator: device and precision.

    Returns:
        The images of each prompt.
    """
    options = family_of(pipeline).call_arguments(None)
    if config.resolution is not None and {"height", "width"} <= signature(pipeline.__call__).parameters.keys():
        options |= {"height": config.resolution, "width": config.resolution}
    rows = []
    concept = registry_of(edited_model(pipeline)).loaded[name].concept  # type: ignore[union-attr]
    settings = pipeline.set_perfusion(name, bias=concept.bias, temperature=concept.temperature)
    with settings, accelerator.autocast():
        for prompt in config.validation_prompt:
            images = pipeline(
                prompt=prompt,
                num_inference_steps=INFERENCE_STEPS,
                num_images_per_prompt=config.num_validation_images,
                generator=torch.Generator(accelerator.device).manual_seed(config.seed),
                **options,
            ).images
            rows.append(images)
    return rows


def sheet_path(config: TrainingConfig, step: int) -> Path:
    """Return the path of the validation images of a step, `<output_dir>/validation/step-<step>.png`."""
    return Path(config.output_dir) / IMAGES_FOLDER / f"step-{step:06d}.png"


def validate(pipeline: Any, name: str, config: TrainingConfig, accelerator: Any, step: int) -> Path:
    """Generate the validation prompts, and give the images to the trackers and to a PNG with one row per prompt.

    Args:
        pipeline: with the concept loaded.
        name: of the concept.
        config: as in `generate`, and output folder.
        accelerator: device, precision and trackers.
        step: number of optimizer steps done.

    Returns:
        The path of the PNG, which is `sheet_path`.
    """
    rows = generate(pipeline, name, config, accelerator)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for prompt, images in zip(config.validation_prompt, rows, strict=True):
                arrays = np.stack([np.asarray(image) for image in images])
                tracker.log_images({prompt: arrays}, step=step, **options)
    path = sheet_path(config, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_image_grid([image for images in rows for image in images], len(rows), config.num_validation_images)
    write_atomically(path, to_png(grid))
    return path
