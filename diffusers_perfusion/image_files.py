"""Image files as people have them: of any format, mode and depth, and perhaps damaged."""

from pathlib import Path

import numpy as np
from diffusers.utils import logging
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.get_logger(__name__)


def read_image(path: Path) -> Image.Image:
    """Return the image in a file, upright: RGBA if it is transparent anywhere, else RGB.

    Of a file with several, it is the first. If only its Exif data are broken, it is not rotated, with a line.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            file.load()
            try:
                image = ImageOps.exif_transpose(file)
            except Exception as error:
                logger.warning(f"{path} is not rotated, because its Exif data cannot be read ({error}).")
                image = file
            image = _to_eight_bits(image)
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow can read; convert it to PNG or JPEG") from error
    except Exception as error:  # each decoder has errors of its own for a broken file
        raise ValueError(f"{path} cannot be read as an image ({str(error) or type(error).__name__})") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits per channel, where Pillow's `convert` would clip integers and floats to 255.

    White is the smallest of 1, 255 and 65535 that no pixel exceeds twice over: highlights may be brighter than it.
    """
    if image.mode[0] not in "IF":
        return image
    pixels = np.asarray(image, dtype=np.float64)
    brightest = pixels[np.isfinite(pixels)].max(initial=0)
    white = next((white for white in (1, 255) if brightest < 2 * white), 65535)
    return Image.fromarray((np.nan_to_num(pixels / white).clip(0, 1) * 255).round().astype(np.uint8))
