"""Pictures of the subject, upright and square, and their latents."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

logger = logging.get_logger(__name__)


@dataclass
class Picture:
    """A picture of the subject, upright and square.

    Attributes:
        path: where it came from.
        image: RGB, `resolution × resolution`.
        alpha: its alpha channel, mode L and of the same size, or None if it has none or an empty one.
        box: the square it was cut from, in fractions of the file's sides: left, top, right, bottom.
    """

    path: Path
    image: Image.Image
    alpha: Image.Image | None
    box: tuple[float, float, float, float]

    def crop_like(self, image: Image.Image) -> Image.Image:
        """Crop and scale another image of the same scene, such as a mask, exactly as this picture was."""
        return _crop(image, self.box, self.image.size)


def read_pictures(
    folder: str | os.PathLike, resolution: int, *, center_crop: bool = False, seed: int = 0, smallest: int = 1
) -> list[Picture]:
    """Read the pictures in a folder, in the order of their names; files that are none are skipped with a line.

    EXIF rotation is applied, any mode becomes RGB, and a square of the shorter side is cut out and scaled.

    Args:
        folder: where the pictures are; folders in it are not entered.
        resolution: side of the pictures, in pixels.
        center_crop: cut the square from the middle, and not at a place drawn at random once for each picture.
        seed: for those places.
        smallest: the least side that a picture may have, in pixels.

    Raises:
        ValueError: if there is no such folder, no picture in it, or one that is smaller than `smallest`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with pictures of the subject")
    pictures = []
    place = random.Random(seed)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            with Image.open(path) as file:
                image = eight_bits(ImageOps.exif_transpose(file))
                image.load()
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            logger.warning(f"{path} is skipped: it cannot be read as a picture ({error}).")
            continue
        side = min(image.size)
        if side < smallest:
            raise ValueError(f"{path} is {image.width}×{image.height} pixels; expected at least {smallest} each way")
        left, top = (
            ((length - side) / 2 if center_crop else place.random() * (length - side)) / length
            for length in image.size
        )
        box = (left, top, left + side / image.width, top + side / image.height)
        size = (resolution, resolution)
        rgba = image.convert("RGBA") if image.has_transparency_data else None
        alpha = _crop(rgba.getchannel("A"), box, size) if rgba else None
        if rgba:
            # What lies under transparency is arbitrary; grey is what is farthest from no colour.
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (128, 128, 128, 255)), rgba)
        if alpha is not None and alpha.getextrema()[0] == alpha.getextrema()[1]:
            alpha = None
        pictures.append(Picture(path, _crop(image.convert("RGB"), box, size), alpha, box))
    if not pictures:
        raise ValueError(f"{folder} holds no picture; expected about five of the subject")
    return pictures


def _crop(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """Resize a part of an image, given as fractions of its sides."""
    left, top, right, bottom = box
    pixels = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return image.resize(size, Image.Resampling.LANCZOS, box=pixels)


def eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, or the upper eight of 16 bits a pixel, which Pillow's `convert` would clip to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Images of one size as `(N, channels, height, width)` in [0, 1]."""
    arrays = [np.atleast_3d(np.asarray(image, dtype=np.float32)) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def slug(text: str) -> str:
    """A prompt as part of a picture's file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:80]


@torch.no_grad()
def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents of images in [0, 1], `(N, channels, h, w)`; of a distribution, the mode.

    Takes `AutoencoderKL`, `AutoencoderTiny` and `AutoencoderDC`.
    """
    parameter = next(vae.parameters())
    encoded = vae.encode((images * 2 - 1).to(parameter))
    latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    return ((latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor).float()
