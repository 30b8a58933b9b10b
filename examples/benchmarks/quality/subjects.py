"""Prompts and subjects of the comparison, of Fluent Emoji, which neither the model nor the metrics have seen."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2]
POCKET = EXAMPLES / "pocket"
sys.path += [str(POCKET / "recipe"), str(EXAMPLES / "data")]

from draw import city, compose, meadow, plain, room, snow  # noqa: E402
from icons import CONCEPT_RENDITION, NOUNS, WORN, load_sprites  # noqa: E402
from world import COLOURS  # noqa: E402

# Settings are chosen on the first, one is changed at a time on the second, figures come from the third.
TUNING = ("duck", "teapot")
ABLATED = (*TUNING, "fox", "alarm-clock")
TEST = ("teddy-bear", "robot", "chair", "hot-beverage", "backpack", "penguin")


@dataclass(frozen=True)
class Prompt:
    """A prompt of the comparison.

    Attributes:
        family: `plain`: the subject behind a leading "a", as in the templates that methods are trained with.
            `natural`: as people also write. `appearance`: asks for another look of the subject, so that its identity
            says little.
        text: the prompt, with a gap for what names the subject.
        caption: what an image of it shows, in the words that the metrics know.
    """

    family: str
    text: str
    caption: str


def _same(family, *texts):
    return [Prompt(family, text, text) for text in texts]


PROMPTS = (
    *_same(
        "plain",
        "a {} on the beach",
        "a {} in space",
        "a {} under water",
        "a {} in the forest",
        "a {} wearing a top hat in the city",
        "a {} wearing sunglasses in the snow",
        "a {} and a cat in a meadow",
        "a {} on top of a car in the desert",
    ),
    Prompt("natural", "{} on the beach", "a {} on the beach"),
    Prompt("natural", "a cute {} in the snow", "a {} in the snow"),
    *_same("natural", "a cat next to a {} in the city"),
    Prompt(
        "natural",
        "a photo of a dog wearing a top hat next to a {} in the desert",
        "a dog wearing a top hat next to a {} in the desert",
    ),
    Prompt("natural", "an oil painting of a {} in a meadow", "a {} in a meadow"),
    Prompt(
        "natural",
        "an image of a horse wearing a graduation cap and a bow next to a {} wearing a scarf on the grass in the city",
        "a horse wearing a graduation cap next to a {} wearing a scarf on the grass",
    ),
    *_same(
        "appearance",
        "a red {} on the beach",
        "a blue {} in the forest",
        "a black and white photo of a {} in the city",
        "pixel art of a {} in a meadow",
        "a {} wearing a crown in the desert",
        "a {} wearing a scarf in the snow",
    ),
)
FAMILIES = ("plain", "natural", "appearance")

# What else the captions could have said, phrase by phrase; nothing worn, no colour and no companion are among it.
ALTERNATIVES = (
    (
        "on the beach",
        "in space",
        "under water",
        "in the forest",
        "in the city",
        "in the snow",
        "in a meadow",
        "on the grass",
        "in the desert",
        "at night",
        "at sunset",
        "in a room",
    ),
    (*(f"wearing {worn.words} " for worn in WORN.values()), ""),
    (*(f"and a {noun} " for noun in ("cat", "dog", "horse", "pig", "cactus", "guitar", "house", "bus")), ""),
    (*(f"on top of a {noun} " for noun in ("car", "bus", "horse", "house", "pig", "turtle", "mushroom")), ""),
    tuple(f"a {noun} wearing " for noun in ("cat", "dog", "horse", "pig", "robot", "rabbit")),
    (*(f"a {noun} next to " for noun in ("cat", "dog", "horse", "pig", "cactus", "guitar", "house", "bus")), ""),
    (*(f"a {colour} {{}}" for colour in COLOURS), "a {}"),
    ("a black and white photo of ", "pixel art of ", "a photo of ", ""),
)


def rephrased(caption, superclass):
    """Return a list for each phrase of a caption: the caption, then captions with an alternative in its place.

    Args:
        caption: of a `Prompt`, with its gap.
        superclass: to put in the gaps.
    """
    return [
        [
            text.format(superclass)
            for text in (caption, *(caption.replace(phrase, other) for other in others if other != phrase))
        ]
        for others in ALTERNATIVES
        for phrase in others
        if phrase not in ("", "a {}") and phrase in caption
    ]


@dataclass(frozen=True)
class Subject:
    """A subject to train on.

    Attributes:
        icon: which.
        folder: with five images, and their masks in `masks`.
    """

    icon: str
    folder: Path

    @property
    def superclass(self):
        """Its super-class."""
        return NOUNS[self.icon]

    @property
    def placeholder_token(self):
        """The placeholder token of methods that train one."""
        return f"<my-{self.superclass.split()[-1]}>"

    @property
    def side(self):
        """Of its images, in pixels."""
        return self.images()[0].width

    def images(self):
        """Its images."""
        return [Image.open(path).convert("RGB") for path in sorted(self.folder.glob("*.png"))]


def sprites_of(side):
    """Return the sprites for images of a side in pixels."""
    return POCKET / "recipe" / ("sprites.npz" if side == 64 else "sprites-160.npz")


def compose_subject(icon, output_dir, side=64):
    """Compose the images of a subject as those in examples/data, `side × side`, unless they are there."""
    folder = Path(output_dir) / icon
    sprite = load_sprites(sprites_of(side), [CONCEPT_RENDITION])[icon][CONCEPT_RENDITION]
    compose_images(Image.fromarray(sprite), icon, folder, side)
    return Subject(icon, folder)


def compose_images(sprite, seed, folder, side=64):
    """Compose five images of a sprite, `side × side`, and their masks, unless they are there."""
    if (folder / "masks" / "5.png").exists():
        return
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for number, place in enumerate((room, meadow, plain, city, snow), start=1):
        image, mask = compose(rng, place, sprite, side)
        image.save(folder / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.png")
