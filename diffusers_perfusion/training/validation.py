"""Validation pictures, from the pipeline that is in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from .config import FitConfig

INFERENCE_STEPS = 25
GUIDANCE_SCALE = 6.0  # the paper's


@torch.no_grad()
def draw(
    pipeline: Any, name: str, prompts: Sequence[str], num_images: int, seed: int, accelerator: Accelerator
) -> list[list[Image.Image]]:
    """Pictures of each prompt, drawn with a concept that is loaded, at its own bias and temperature.

    Args:
        pipeline: with the concept loaded; its settings are put back.
        name: of the concept.
        prompts: what to draw.
        num_images: pictures of each prompt.
        seed: of each prompt's noise.
        accelerator: device and precision.

    Returns:
        A row a prompt.
    """
    rows = []
    with pipeline.set_perfusion(name), accelerator.autocast():
        for prompt in prompts:
            pictures = pipeline(
                prompt,
                num_inference_steps=INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                num_images_per_prompt=num_images,
                generator=torch.Generator(accelerator.device).manual_seed(seed),
            ).images
            rows.append(pictures)
    return rows


def validate(pipeline: Any, name: str, config: FitConfig, accelerator: Accelerator, step: int) -> Path:
    """Draw the validation prompts with the concept as it stands: a row a prompt, on a PNG sheet and to the trackers.

    Args:
        pipeline: with the concept loaded.
        name: of the concept.
        config: prompts, number of pictures, seed and output folder.
        accelerator: its trackers that take pictures get them.
        step: optimizer steps done.

    Returns:
        The sheet's path, `<output_dir>/validation/step-<step>.png`.
    """
    rows = draw(pipeline, name, config.validation_prompt, config.num_validation_images, config.seed, accelerator)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for prompt, pictures in zip(config.validation_prompt, rows, strict=True):
                arrays = np.stack([np.asarray(picture) for picture in pictures])
                tracker.log_images({prompt: arrays}, step=step, **options)
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * config.num_validation_images, height * len(rows)))
    for y, pictures in enumerate(rows):
        for x, picture in enumerate(pictures):
            sheet.paste(picture, (x * width, y * height))
    path = Path(config.output_dir) / "validation" / f"step-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
