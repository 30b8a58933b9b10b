"""A sheet of pictures, with a label for each row and a caption for each column."""

from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

GAP = 4
LINE = 16


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    captions: Sequence[str] = (),
    *,
    side: int = 128,
    label_width: int = 200,
) -> Image.Image:
    """Lay pictures out in rows.

    Args:
        rows: a label, of one line or more, and its pictures, which are scaled to squares.
        captions: of the columns from the left, put under them and broken into lines.
        side: of a picture on the sheet, in pixels.
        label_width: of the column of labels, in pixels.
    """
    columns = max(len(pictures) for _, pictures in rows)
    step = side + GAP
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    broken = [_break(caption, small, side) for caption in captions]
    lines = max([2, *(len(caption) for caption in broken)])
    image = Image.new("RGB", (label_width + columns * step + GAP, len(rows) * step + lines * LINE + GAP), "white")
    pen = ImageDraw.Draw(image)
    for y, (label, pictures) in enumerate(rows):
        pen.multiline_text((GAP, y * step + side // 2 - 14), label, fill="black", font=font)
        for x, picture in enumerate(pictures):
            tile = picture.resize(
                (side, side), Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            )
            image.paste(tile, (label_width + x * step, y * step + GAP))
    for x, caption in enumerate(broken):
        pen.multiline_text(
            (label_width + x * step, len(rows) * step + 2), "\n".join(caption), fill="black", font=small
        )
    return image


def _break(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Two lines of about as many words each, or as many as it takes for each to fit into `width`."""
    words = caption.split()
    for count in range(2, max(len(words), 2) + 1):
        bounds = [len(words) * n // count for n in range(count + 1)]
        lines = [" ".join(words[start:end]) for start, end in pairwise(bounds)]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
