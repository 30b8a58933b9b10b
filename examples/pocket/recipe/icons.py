"""Icons as sprites: where they come from, what they are called, and how they are recoloured, dressed and pasted.

A sprite is an RGBA array of 80×80 bytes, or of a multiple; one that wears something is larger by a quarter. A set of
sprites is a dictionary of dictionaries: `sprites[icon][rendition]`.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

# The npm package of each rendition is @iconify-json/<name>.
BASE_RENDITIONS = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat")
CONCEPT_RENDITION = "fluent-emoji"  # kept out of everything that is trained: the concepts to train come from it

NOUNS = {icon: icon for icon in (
    "cat dog rabbit horse pig elephant penguin duck owl frog turtle snail butterfly panda fox robot ghost snowman "
    "chair teapot guitar backpack umbrella bus airplane rocket sailboat house cactus mushroom"
).split()} | {
    "tropical-fish": "fish",
    "teddy-bear": "teddy bear",
    "hot-beverage": "mug",
    "alarm-clock": "clock",
    "automobile": "car",
    "red-apple": "apple",
}  # fmt: skip


class Worn(NamedTuple):
    """What can be worn: its words, and for sprites of 80×80 its side and how far down from who wears it its top is."""

    words: str
    side: int
    down: float


HAT = {"side": 36, "down": -36 * 0.62}
WORN = {
    "top-hat": Worn("a top hat", **HAT),
    "crown": Worn("a crown", **HAT),
    "sunglasses": Worn("sunglasses", side=34, down=10),
    "billed-cap": Worn("a cap", **HAT),
    "ribbon": Worn("a bow", **HAT),
    "graduation-cap": Worn("a graduation cap", **HAT),
    "scarf": Worn("a scarf", side=36, down=26),
}


def load_sprites(path, renditions=BASE_RENDITIONS):
    """The sprites of some renditions; not every rendition has every icon."""
    sprites = {}
    with np.load(path) as file:
        for name in file.files:
            rendition, icon = name.split("/")
            if rendition in renditions:
                sprites.setdefault(icon, {})[rendition] = file[name]
    return sprites


def jitter(sprite, rng, hue=0.0):
    """Turn the hue of a sprite by an angle, and its contrast and brightness by a little chance."""
    colours = sprite[..., :3].astype(np.float32)
    if hue:
        colours = colours @ hue_rotation(hue).T.astype(np.float32)
    colours = (colours - 128) * rng.uniform(0.85, 1.1) + 128 * rng.uniform(0.9, 1.08)
    return np.concatenate([colours.clip(0, 255).astype(np.uint8), sprite[..., 3:]], -1)


def hue_rotation(angle):
    """The rotation of RGB space about its grey axis (Rodrigues' formula)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return np.eye(3) * np.cos(angle) + cross * np.sin(angle) + (1 - np.cos(angle)) / 3


def recolour(sprite, colour):
    """A sprite in shades of one colour: dark parts towards black, light parts towards white."""
    light = (sprite[..., :3].astype(np.float32) / 255 @ np.array([0.3, 0.59, 0.11], np.float32))[..., None]
    light = (light - light.min()) / (light.max() - light.min() + 1e-3)
    colour = np.array(colour, np.float32) / 255
    shaded = np.where(light < 0.5, colour * (light * 1.5 + 0.15), colour + (1 - colour) * (light - 0.5) * 1.1)
    return np.concatenate([(shaded * 255).clip(0, 255).astype(np.uint8), sprite[..., 3:]], -1)


def dress(sprite, worn, icon):
    """A sprite that wears the sprite `worn` of the given icon, on a larger canvas."""
    unit = len(sprite) // 80
    canvas = Image.new("RGBA", (100 * unit, 100 * unit))
    canvas.alpha_composite(Image.fromarray(sprite), (10 * unit, 20 * unit))
    opaque = sprite[..., 3] > 100
    top = opaque.any(1).argmax()
    head = np.flatnonzero(opaque[top : top + 26 * unit].any(0))
    side = WORN[icon].side * unit
    left = int(10 * unit + (head[0] + head[-1]) / 2 - side / 2)
    corner = (max(0, left), max(0, int(20 * unit + top + WORN[icon].down * unit)))
    canvas.alpha_composite(Image.fromarray(worn).resize((side, side), Image.Resampling.LANCZOS), corner)
    return np.array(canvas)


def paste(image, sprite, rng, *, size, x, y, tilt, unit):
    """Paste a sprite around `(x, y)`: perhaps mirrored, turned by up to `tilt` degrees, a little stretched.

    Sizes and places are in units of `unit` pixels.
    """
    turned = Image.fromarray(sprite)
    if rng.random() < 0.5:
        turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = turned.rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC)
    width, height = (unit * size * rng.uniform(0.92, 1.08) for _ in range(2))
    turned = turned.resize((int(width), int(height)), Image.Resampling.LANCZOS)
    image.paste(turned, (int(unit * x - width / 2), int(unit * y - height / 2)), turned)
