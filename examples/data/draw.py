"""Draw the example images of this folder: each concept in five places, with exact soft masks of the subject."""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent / "pocket" / "recipe"))

from places import SIDE, Canvas, shade

SEEDS = {"chair": 3, "mug": 4, "robot": 2, "teddy_bear": 1}
HERE = Path(__file__).resolve().parent


def fade(canvas, rng, top, bottom, spread=14):
    """Fill a canvas: from about `top` to about `bottom`."""
    size = canvas.image.size
    upper, lower = (Image.new("RGB", size, shade(rng, colour, spread)) for colour in (top, bottom))
    canvas.image.paste(Image.composite(lower, upper, Image.linear_gradient("L").resize(size)))


def room(canvas, rng):
    """A pale wall with a window, above a wooden floor."""
    wall = rng.choice([(235, 215, 190), (200, 215, 200), (215, 200, 220), (225, 225, 215)])
    fade(canvas, rng, wall, wall, spread=10)
    floor = round(SIDE * rng.uniform(0.68, 0.78))
    canvas.rectangle([0, floor, SIDE, SIDE], fill=shade(rng, (150, 100, 60)))
    for y in range(floor + 6, SIDE, 9):
        canvas.line([(0, y), (SIDE, y)], fill=(120, 78, 45))
    left, frame = rng.choice([8, 80]), (250, 250, 250)
    canvas.rectangle([left, 12, left + 36, 50], fill=(170, 210, 240), outline=frame, width=3)
    canvas.line([(left + 18, 12), (left + 18, 50)], fill=frame, width=3)
    canvas.line([(left, 31), (left + 36, 31)], fill=frame, width=3)


def meadow(canvas, rng):
    """Two green hills with flowers, under a blue sky."""
    fade(canvas, rng, (110, 190, 245), (200, 235, 255))
    hill = round(SIDE * rng.uniform(0.5, 0.7))
    canvas.ellipse([-60, hill, 0.9 * SIDE, 2 * SIDE], fill=shade(rng, (110, 190, 70)))
    canvas.ellipse([0.2 * SIDE, hill + 8, 1.6 * SIDE, 2 * SIDE], fill=shade(rng, (95, 175, 60)))
    for _ in range(rng.randint(6, 14)):
        petals = rng.choice([(255, 255, 255), (250, 220, 60), (240, 120, 160)])
        canvas.dot(rng.randint(0, SIDE), rng.randint(hill + 12, SIDE), 2, petals)


def plain(canvas, rng):
    """An even, almost white background."""
    canvas.rectangle([0, 0, SIDE, SIDE], fill=shade(rng, (245, 245, 245), spread=8))


def city(canvas, rng):
    """A row of buildings with lit windows, behind a road."""
    fade(canvas, rng, (190, 205, 220), (225, 225, 230))
    road = round(SIDE * rng.uniform(0.68, 0.78))
    left = 0
    while left < SIDE:
        width, top = rng.randint(14, 26), rng.randint(8, 55)
        walls = rng.choice([(120, 125, 140), (150, 140, 135), (95, 105, 125)])
        canvas.rectangle([left, top, left + width, road], fill=shade(rng, walls, spread=15))
        for y in range(top + 4, road - 4, 8):
            for x in range(left + 3, left + width - 4, 7):
                canvas.rectangle([x, y, x + 3, y + 3], fill=rng.choice([(250, 235, 160), (190, 205, 220)]))
        left += width + rng.randint(0, 3)
    canvas.rectangle([0, road, SIDE, SIDE], fill=shade(rng, (75, 75, 80), spread=10))
    for x in range(0, SIDE, 26):
        canvas.rectangle([x, road + 14, x + 13, road + 17], fill=(230, 230, 230))


def snow(canvas, rng):
    """Two white hills and falling snow, under a grey sky."""
    fade(canvas, rng, (170, 190, 215), (215, 225, 240))
    hill = round(SIDE * rng.uniform(0.5, 0.7))
    canvas.ellipse([-40, hill, 0.8 * SIDE, 2 * SIDE], fill=shade(rng, (240, 245, 250), spread=6))
    canvas.ellipse([0.3 * SIDE, hill + 6, 1.4 * SIDE, 2 * SIDE], fill=shade(rng, (232, 240, 250), spread=6))
    for _ in range(rng.randint(25, 45)):
        canvas.dot(rng.randint(0, SIDE), rng.randint(0, SIDE), rng.randint(1, 2), (255, 255, 255))


def compose(rng, place, sprite, side=64):
    """Return `sprite` somewhere near the middle of `place`, and the mask of what it covers, `side × side` pixels."""
    unit = side // 64
    canvas = Canvas(unit)  # of twice the side: scaling down softens the edges
    place(canvas, rng)
    image = canvas.image.resize((side, side), Image.Resampling.LANCZOS)
    subject = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else sprite
    subject = subject.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)
    scale = unit * rng.uniform(34, 44) / sprite.height
    width, height = round(scale * rng.uniform(0.94, 1.06) * subject.width), round(scale * subject.height)
    subject = subject.resize((width, height), Image.Resampling.LANCZOS)
    corner = round(unit * rng.uniform(28, 36) - width / 2), round(unit * rng.uniform(31, 38) - height / 2)
    mask = Image.new("L", image.size)
    mask.paste(subject.getchannel("A"), corner)
    image.paste(subject, corner, subject)
    return image, mask


def main(args=None):
    """Write `<concept>/1.png` to `5.png` and `<concept>/masks/1.png` to `5.png` for every concept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=64, help="Of an image, in pixels; a multiple of the default.")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="Where the concepts' folders are written.")
    arguments = parser.parse_args(args)
    for concept, seed in SEEDS.items():
        rng = random.Random(seed)
        sprite = Image.open(HERE / "sprites" / f"{concept}.png").convert("RGBA")
        folder = arguments.output_dir / concept
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        for number, place in enumerate((room, meadow, plain, city, snow), start=1):
            image, mask = compose(rng, place, sprite, arguments.side)
            image.save(folder / f"{number}.png")
            mask.save(folder / "masks" / f"{number}.png")


if __name__ == "__main__":
    main()
