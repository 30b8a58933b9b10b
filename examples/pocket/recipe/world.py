"""The pocket world: scenes that have a caption and can be drawn.

A scene is first sampled as words (`sample_scene`), so that one word of it can be changed (`change`), and then drawn.
"""

from dataclasses import dataclass, replace
from functools import partial

from icons import NOUNS, WORN, dress, jitter, paste, recolour
from PIL import Image
from places import Canvas, beach, city, desert, forest, meadow, night, ocean, plain, room, snow, space, sunset

SIDE = 64  # of an image, in units

COLOURS = {
    "red": (215, 45, 45),
    "blue": (50, 90, 220),
    "green": (50, 160, 70),
    "yellow": (245, 210, 50),
    "pink": (245, 140, 185),
    "purple": (130, 70, 180),
    "orange": (240, 140, 40),
    "white": (248, 248, 248),
    "black": (30, 30, 32),
    "gray": (140, 140, 145),
}
PLACES = {
    beach: ("on the beach", "at the beach"),
    snow: ("in the snow",),
    night: ("at night",),
    forest: ("in the forest", "in the woods"),
    desert: ("in the desert",),
    meadow: ("on the grass", "in a meadow"),
    city: ("in the city", "on a city street"),
    space: ("in space",),
    sunset: ("at sunset",),
    ocean: ("under water", "in the ocean"),
    room: ("in a room", "in the living room"),
}
OPENINGS = ("a photo of {}", "a picture of {}", "{}", "an image of {}", "{}")
BLACK_AND_WHITE = "a black and white photo of {}"
PIXEL_ART = "pixel art of {}"


def with_article(words):
    """`words` behind "a" or "an"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


BACKGROUNDS = {f"on {with_article(name)} background": partial(plain, colour=rgb) for name, rgb in COLOURS.items()}
BACKDROPS = {words: draw for draw, phrases in PLACES.items() for words in phrases} | BACKGROUNDS


@dataclass(frozen=True)
class Thing:
    """A thing in a scene.

    Attributes:
        icon: what it is.
        rendition: which set of icons drew it.
        hue: by what angle its hue is turned.
        colour: the colour it is all in, or None.
        worn: the icon of what it wears, or None.
    """

    icon: str
    rendition: str
    hue: float = 0.0
    colour: str | None = None
    worn: str | None = None

    @property
    def words(self):
        """Such as "a blue cat" or "a cat wearing a crown"."""
        noun = NOUNS[self.icon]
        words = with_article(f"{self.colour} {noun}" if self.colour else noun)
        return f"{words} wearing {WORN[self.worn].words}" if self.worn else words

    def draw(self, sprites, rng):
        """Its sprite, and by how much that is larger for what it wears."""
        sprite = jitter(sprites[self.icon][self.rendition], rng, self.hue)
        if self.colour:
            sprite = recolour(sprite, COLOURS[self.colour])
        if not self.worn:
            return sprite, 1.0
        worn = rng.choice(list(sprites[self.worn].values()))
        return dress(sprite, worn, self.worn), 1.2


@dataclass(frozen=True)
class Scene:
    """One thing or two, in a place.

    Attributes:
        subject: the thing that comes first.
        place: a phrase of `BACKDROPS`.
        relation: of the subject to its companion, "and", "next to" or "on top of"; None without one.
        companion: the second thing, or None.
        opening: what the caption begins with; `BLACK_AND_WHITE` and `PIXEL_ART` also say how the scene is drawn.
        names_place: whether the caption says where it is.
    """

    subject: Thing
    place: str
    relation: str | None = None
    companion: Thing | None = None
    opening: str = "{}"
    names_place: bool = True

    @property
    def caption(self):
        """Such as "a photo of a cat next to a red mug on the beach"."""
        words = self.subject.words
        if self.companion:
            words = f"{words} {self.relation} {self.companion.words}"
        words = self.opening.format(words)
        return f"{words} {self.place}" if self.names_place else words

    def draw(self, sprites, rng, side=SIDE):
        """An image of the scene, `side × side`, a multiple of `SIDE`; each call draws another."""
        unit = side // SIDE
        canvas = Canvas(unit)  # of twice the side: scaling down softens the edges
        BACKDROPS[self.place](canvas, rng)
        image = canvas.image.resize((side, side), Image.Resampling.LANCZOS)
        put = partial(paste, image, rng=rng, unit=unit)
        sprite, scale = self.subject.draw(sprites, rng)
        if not self.companion:
            size = scale * rng.uniform(34, 46)
            put(sprite, size=size, x=rng.uniform(28, 36), y=rng.uniform(31, 38), tilt=8)
        else:
            other, other_scale = self.companion.draw(sprites, rng)
            if self.relation == "on top of":
                size = other_scale * rng.uniform(26, 32)
                put(other, size=size, x=rng.uniform(27, 37), y=rng.uniform(44, 48), tilt=5)
                size = scale * rng.uniform(22, 28)
                put(sprite, size=size, x=rng.uniform(27, 37), y=rng.uniform(18, 24), tilt=8)
            else:
                size = scale * rng.uniform(24, 31)
                put(sprite, size=size, x=rng.uniform(16, 20), y=rng.uniform(30, 42), tilt=8)
                size = other_scale * rng.uniform(24, 31)
                put(other, size=size, x=rng.uniform(44, 48), y=rng.uniform(30, 42), tilt=8)
        if self.opening == BLACK_AND_WHITE:
            image = image.convert("L").convert("RGB")
        elif self.opening == PIXEL_ART:
            image = image.resize((20, 20), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)
        return image


def sample_thing(sprites, rng):
    """A thing as the world has it: half of them in another hue, 18 % in one colour, 12 % wearing something."""
    icon = rng.choice(list(NOUNS))
    thing = Thing(icon, rng.choice(list(sprites[icon])), rng.uniform(-1.2, 1.2) if rng.random() < 0.5 else 0.0)
    looks = rng.random()
    if looks < 0.18:
        return replace(thing, colour=rng.choice(list(COLOURS)))
    if looks < 0.30:
        return replace(thing, worn=rng.choice(list(WORN)))
    return thing


def sample_place(rng):
    """A phrase for where a scene is: one of the eleven places, or in 2 of 13 scenes a plain background."""
    draw = rng.choice([*PLACES, None, None])
    return rng.choice(PLACES[draw]) if draw else rng.choice(list(BACKGROUNDS))


def sample_scene(sprites, rng):
    """A scene as the pocket model was trained on: 32 % with a companion, 5 % black and white, 5 % pixel art."""
    scene = Scene(sample_thing(sprites, rng), sample_place(rng))
    if rng.random() >= 0.68:
        relation = "on top of" if rng.random() < 0.3 else "and" if rng.random() < 0.6 else "next to"
        scene = replace(scene, relation=relation, companion=sample_thing(sprites, rng))
    opening, names_place, style = rng.choice(OPENINGS), rng.random() < 0.93, rng.random()
    if style < 0.05:
        # "a photo of" becomes "a black and white photo of"; a caption with another opening also says where it is.
        return replace(scene, opening=BLACK_AND_WHITE, names_place=names_place or opening != "a photo of {}")
    if style < 0.10:
        return replace(scene, opening=PIXEL_ART)
    return replace(scene, opening=opening, names_place=names_place)


KINDS = ("noun", "place", "colour", "worn", "companion")


def kinds_of(scene):
    """Which of `KINDS` the caption and the image of a scene have."""
    things = [thing for thing in (scene.subject, scene.companion) if thing]
    return [
        kind
        for kind, present in (
            ("noun", True),
            ("place", scene.names_place),
            ("colour", any(thing.colour for thing in things) and scene.opening != BLACK_AND_WHITE),
            ("worn", any(thing.worn for thing in things)),
            ("companion", scene.companion),
        )
        if present
    ]


def change(scene, kind, sprites, rng):
    """The scene with one word (or phrase) of its caption changed: of a kind that it has.

    "noun" changes the subject; "colour" and "worn" the first thing that has one; a place becomes another place and not
    another phrase for the same.
    """
    if kind == "place":
        others = [words for words, draw in BACKDROPS.items() if draw is not BACKDROPS[scene.place]]
        return replace(scene, place=rng.choice(others))
    if kind in ("noun", "companion"):
        field = "subject" if kind == "noun" else "companion"
        present = {thing.icon for thing in (scene.subject, scene.companion) if thing}
        icon = rng.choice([icon for icon in NOUNS if icon not in present])
        thing = replace(getattr(scene, field), icon=icon, rendition=rng.choice(list(sprites[icon])))
    else:
        field = "subject" if getattr(scene.subject, kind) else "companion"
        thing = getattr(scene, field)
        words = COLOURS if kind == "colour" else WORN
        thing = replace(thing, **{kind: rng.choice([word for word in words if word != getattr(thing, kind)])})
    return replace(scene, **{field: thing})


def give(scene, kind, sprites, rng):
    """The scene, and if it has nothing of `kind`, something of it."""
    if kind in kinds_of(scene):
        return scene
    if kind == "place":
        return replace(scene, names_place=True)
    if kind == "companion":
        return replace(
            scene, relation=rng.choice(["and", "next to", "on top of"]), companion=sample_thing(sprites, rng)
        )
    if kind == "worn":
        return replace(scene, subject=replace(scene.subject, worn=rng.choice(list(WORN)), colour=None))
    opening = "a photo of {}" if scene.opening == BLACK_AND_WHITE else scene.opening
    subject = replace(scene.subject, colour=rng.choice(list(COLOURS)), worn=None)
    return replace(scene, subject=subject, opening=opening)
