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

# Settings are chosen on the first, one is changed at a time on the second, figures come from the third.
TUNING = ("duck", "teapot")
ABLATED = (*TUNING, "fox", "alarm-clock")
TEST = ("teddy-bear", "robot", "chair", "hot-beverage", "backpack", "penguin")

PROMPTS = (
    "a {} on the beach",
    "a {} in space",
    "a {} under water",
    "a {} in the forest",
    "a {} wearing a top hat in the city",
    "a {} wearing sunglasses in the snow",
    "a {} and a cat in a meadow",
    "a {} on top of a car in the desert",
)

# What else the prompts could have asked for, phrase by phrase; nothing worn and no companion are among it.
ALTERNATIVES = (
    (
        "on the beach",
        "in space",
        "under water",
        "in the forest",
        "in the city",
        "in the snow",
        "in a meadow",
        "in the desert",
        "at night",
        "at sunset",
        "in a room",
    ),
    (*(f"wearing {worn.words} " for worn in WORN.values()), ""),
    (*(f"and a {noun} " for noun in ("cat", "dog", "horse", "pig", "cactus", "guitar", "house", "bus")), ""),
    (*(f"on top of a {noun} " for noun in ("car", "bus", "horse", "house", "pig", "turtle", "mushroom")), ""),
)


def rephrased(prompt):
    """Return a list for each phrase of a prompt: the prompt, then prompts with an alternative in its place."""
    return [
        [prompt, *(prompt.replace(phrase, other) for other in others if other != phrase)]
        for others in ALTERNATIVES
        for phrase in others
        if phrase and phrase in prompt
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

    def images(self):
        """Its images."""
        return [Image.open(path).convert("RGB") for path in sorted(self.folder.glob("*.png"))]


def compose_subject(icon, output_dir):
    """Compose the images of a subject as those in examples/data, unless they are there."""
    folder = Path(output_dir) / icon
    if not (folder / "masks" / "5.png").exists():
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        rng = random.Random(icon)
        sprite = Image.fromarray(
            load_sprites(POCKET / "recipe" / "sprites.npz", [CONCEPT_RENDITION])[icon][CONCEPT_RENDITION]
        )
        for number, place in enumerate((room, meadow, plain, city, snow), start=1):
            image, mask = compose(rng, place, sprite)
            image.save(folder / f"{number}.png")
            mask.save(folder / "masks" / f"{number}.png")
    return Subject(icon, folder)
