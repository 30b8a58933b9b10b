"""Training images: upright, square and of one size."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ..image_files import read_image
from .image_captions import read_image_captions, without_captions

logger = logging.get_logger(__name__)


@dataclass
class TrainingImage:
    """An upright, square image of the subject.

    Attributes:
        path: file that it was read from.
        image: RGB, `resolution × resolution`.
        alpha: its alpha channel, mode L and of the same size; None if it has none, or a constant one.
        caption: of the image, if it has one.
        box: the square that was cropped from the file, in fractions of the file's sides: left, top, right, bottom.
    """

    path: Path
    image: Image.Image
    alpha: Image.Image | None
    caption: str | None
    box: tuple[float, float, float, float]

    def crop_like(self, image: Image.Image) -> Image.Image:
        """Crop and scale another image of the same scene, such as a mask, exactly as this one was."""
        return _crop(image, self.box, self.image.size)


def read_images(
    folder: str | os.PathLike, resolution: int, *, center_crop: bool = False, seed: int = 0, min_side: int = 1
) -> list[TrainingImage]:
    """Read the images in a folder and their captions, in the order of names; log and skip files that are neither.

    A square of the shorter side is cropped and scaled.

    Args:
        folder: folder of the images; subfolders are not read.
        resolution: side of the returned images, in pixels.
        center_crop: crop at the centre instead of at a random place chosen once for each image.
        seed: of these places.
        min_side: the shortest side that a file may have, in pixels.

    Raises:
        ValueError: if there is no such folder, it has no image, an image is smaller than `min_side`, or as
            `read_image_captions`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with images of the subject")
    images = []
    place = random.Random(seed)
    # Links that lead nowhere are files too, or they would be left out without a line.
    files = [path for path in folder.iterdir() if path.is_file() or not path.exists()]
    for path in without_captions(sorted(files)):
        try:
            image = read_image(path)
        except ValueError as error:
            logger.warning(f"{error}; it is skipped.")
            continue
        side = min(image.size)
        if side < min_side:
            raise ValueError(f"{path} is {image.width}×{image.height} pixels; expected at least {min_side} each way")
        left, top = (
            ((length - side) / 2 if center_crop else place.random() * (length - side)) / length
            for length in image.size
        )
        box = (left, top, left + side / image.width, top + side / image.height)
        size = (resolution, resolution)
        alpha = None
        if image.mode == "RGBA":
            alpha = _crop(image.getchannel("A"), box, size)
            # The colours of transparent pixels are arbitrary; grey is the least far from any colour.
            image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
        if alpha is not None and is_constant(alpha):
            alpha = None
        images.append(TrainingImage(path, _crop(image.convert("RGB"), box, size), alpha, None, box))
    if not images:
        raise ValueError(f"{folder} has no image; expected about five of the subject in it, not in folders in it")
    captions = read_image_captions([entry.path for entry in images])
    for entry, caption in zip(images, captions, strict=True):
        entry.caption = caption
    return images


def _crop(image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """Resize the part of an image that `box` gives as fractions of its sides."""
    left, top, right, bottom = box
    pixels = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return image.resize(size, Image.Resampling.LANCZOS, box=pixels)


def is_constant(channel: Image.Image) -> bool:
    """Return whether all pixels of an image with one channel are equal."""
    low, high = channel.getextrema()
    return low == high


def to_tensor(images: list[Image.Image]) -> Tensor:
    """Return images of one size as a tensor `(N, channels, height, width)` in [0, 1]."""
    arrays = [np.atleast_3d(np.asarray(image, dtype=np.float32)) / 255 for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
