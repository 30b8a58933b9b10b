import numpy as np
from PIL import Image

from diffusers_perfusion.evaluation.contact_sheet import make_contact_sheet

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (256, 256), "blue")


def ink(sheet, box):
    """Whether a part of a sheet is not white."""
    return bool((np.asarray(sheet.crop(box)) != 255).any())


def test_images_stand_in_rows_beside_their_labels():
    sheet = make_contact_sheet([("first", [RED, BLUE]), ("", [BLUE])], side=32, label_width=60)
    assert sheet.width == 60 + 2 * 36 + 4
    assert sheet.getpixel((60 + 16, 4 + 16)) == (255, 0, 0)
    assert sheet.getpixel((60 + 36 + 16, 4 + 16)) == (0, 0, 255)
    assert sheet.getpixel((60 + 16, 36 + 4 + 16)) == (0, 0, 255)
    assert not ink(sheet, (60 + 32, 36 + 4, sheet.width, sheet.height))
    assert ink(sheet, (0, 0, 60, 36)) and not ink(sheet, (0, 36, 60, 72))


def test_captions_keep_to_their_columns():
    long = "an image of a cat on the beach beside a dog"
    sheet = make_contact_sheet([("", [RED, RED])], ["", long], side=60, label_width=10)
    assert sheet.height > make_contact_sheet([("", [RED, RED])], ["", "a cat"], side=60, label_width=10).height
    below = 64 + 1
    assert not ink(sheet, (0, below, 10 + 64, sheet.height))
    assert ink(sheet, (10 + 64, below, 10 + 64 + 60, sheet.height))
    assert not ink(sheet, (10 + 64 + 61, below, sheet.width, sheet.height))
