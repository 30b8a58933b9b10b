"""`make_contact_sheet`: a grid of images with a label for each row and a caption for each column."""

from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

GAP = 4
LINE = 16


def make_contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    captions: Sequence[str] = (),
    *,
    side: int = 128,
    label_width: int = 200,
) -> Image.Image:
    """Arrange images in labelled rows on one image.

    Args:
        rows: the label of each row, of one line or more, and its images, which are scaled to squares.
        captions: of the columns from the left, broken into lines and written below them.
        side: of each image on the contact sheet, in pixels.
        label_width: of the column of labels, in pixels.
    """
    columns = max(len(images) for _, images in rows)
    step = side + GAP
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    broken = [_break(caption, small, side) for caption in captions]
    lines = max([2, *(len(caption) for caption in broken)])
    sheet = Image.new("RGB", (label_width + columns * step + GAP, len(rows) * step + lines * LINE + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (label, images) in enumerate(rows):
        pen.multiline_text((GAP, y * step + side // 2 - 14), label, fill="black", font=font)
        for x, image in enumerate(images):
            tile = image.resize(
                (side, side), Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            )
            sheet.paste(tile, (label_width + x * step, y * step + GAP))
    for x, caption in enumerate(broken):
        pen.multiline_text(
            (label_width + x * step, len(rows) * step + 2), "\n".join(caption), fill="black", font=small
        )
    return sheet


def _break(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a caption into two lines of about as many words each, or more lines where one is wider than `width`."""
    words = caption.split()
    for count in range(2, max(len(words), 2) + 1):
        bounds = [len(words) * n // count for n in range(count + 1)]
        lines = [" ".join(words[start:end]) for start, end in pairwise(bounds)]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
