"""Draw the example images of this folder: each concept in five places, with exact soft masks of the subject."""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 64
CANVAS = 2 * SIZE  # places are drawn at twice the size and scaled down, which softens their edges
SEEDS = {"chair": 3, "mug": 4, "robot": 2, "teddy_bear": 1}
HERE = Path(__file__).resolve().parent


def shade(rng, colour, spread=18):
    """Return `colour` with each channel moved by at most `spread`."""
    return tuple(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)


def backdrop(rng, top, bottom, spread=14):
    """Return a canvas that fades from about `top` to about `bottom`."""
    upper, lower = (Image.new("RGB", (CANVAS, CANVAS), shade(rng, colour, spread)) for colour in (top, bottom))
    return Image.composite(lower, upper, Image.linear_gradient("L").resize((CANVAS, CANVAS)))


def dot(draw, x, y, radius, colour):
    """Draw a filled circle."""
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def room(rng):
    """A pale wall with a window, above a wooden floor."""
    wall = rng.choice([(235, 215, 190), (200, 215, 200), (215, 200, 220), (225, 225, 215)])
    image = backdrop(rng, wall, wall, spread=10)
    draw = ImageDraw.Draw(image)
    floor = round(CANVAS * rng.uniform(0.68, 0.78))
    draw.rectangle([0, floor, CANVAS, CANVAS], fill=shade(rng, (150, 100, 60)))
    for y in range(floor + 6, CANVAS, 9):
        draw.line([0, y, CANVAS, y], fill=(120, 78, 45))
    left, frame = rng.choice([8, 80]), (250, 250, 250)
    draw.rectangle([left, 12, left + 36, 50], fill=(170, 210, 240), outline=frame, width=3)
    draw.line([left + 18, 12, left + 18, 50], fill=frame, width=3)
    draw.line([left, 31, left + 36, 31], fill=frame, width=3)
    return image


def meadow(rng):
    """Two green hills with flowers, under a blue sky."""
    image = backdrop(rng, (110, 190, 245), (200, 235, 255))
    draw = ImageDraw.Draw(image)
    hill = round(CANVAS * rng.uniform(0.5, 0.7))
    draw.ellipse([-60, hill, 0.9 * CANVAS, 2 * CANVAS], fill=shade(rng, (110, 190, 70)))
    draw.ellipse([0.2 * CANVAS, hill + 8, 1.6 * CANVAS, 2 * CANVAS], fill=shade(rng, (95, 175, 60)))
    for _ in range(rng.randint(6, 14)):
        petals = rng.choice([(255, 255, 255), (250, 220, 60), (240, 120, 160)])
        dot(draw, rng.randint(0, CANVAS), rng.randint(hill + 12, CANVAS), 2, petals)
    return image


def plain(rng):
    """An even, almost white background."""
    return Image.new("RGB", (CANVAS, CANVAS), shade(rng, (245, 245, 245), spread=8))


def city(rng):
    """A row of buildings with lit windows, behind a road."""
    image = backdrop(rng, (190, 205, 220), (225, 225, 230))
    draw = ImageDraw.Draw(image)
    road = round(CANVAS * rng.uniform(0.68, 0.78))
    left = 0
    while left < CANVAS:
        width, top = rng.randint(14, 26), rng.randint(8, 55)
        walls = rng.choice([(120, 125, 140), (150, 140, 135), (95, 105, 125)])
        draw.rectangle([left, top, left + width, road], fill=shade(rng, walls, spread=15))
        for y in range(top + 4, road - 4, 8):
            for x in range(left + 3, left + width - 4, 7):
                draw.rectangle([x, y, x + 3, y + 3], fill=rng.choice([(250, 235, 160), (190, 205, 220)]))
        left += width + rng.randint(0, 3)
    draw.rectangle([0, road, CANVAS, CANVAS], fill=shade(rng, (75, 75, 80), spread=10))
    for x in range(0, CANVAS, 26):
        draw.rectangle([x, road + 14, x + 13, road + 17], fill=(230, 230, 230))
    return image


def snow(rng):
    """Two white hills and falling snow, under a grey sky."""
    image = backdrop(rng, (170, 190, 215), (215, 225, 240))
    draw = ImageDraw.Draw(image)
    hill = round(CANVAS * rng.uniform(0.5, 0.7))
    draw.ellipse([-40, hill, 0.8 * CANVAS, 2 * CANVAS], fill=shade(rng, (240, 245, 250), spread=6))
    draw.ellipse([0.3 * CANVAS, hill + 6, 1.4 * CANVAS, 2 * CANVAS], fill=shade(rng, (232, 240, 250), spread=6))
    for _ in range(rng.randint(25, 45)):
        dot(draw, rng.randint(0, CANVAS), rng.randint(0, CANVAS), rng.randint(1, 2), (255, 255, 255))
    return image


def compose(rng, place, sprite):
    """Return `sprite` somewhere near the middle of `place`, and the mask of what it covers."""
    image = place(rng).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    subject = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else sprite
    subject = subject.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)
    scale = rng.uniform(34, 44) / sprite.height
    width, height = round(scale * rng.uniform(0.94, 1.06) * subject.width), round(scale * subject.height)
    subject = subject.resize((width, height), Image.Resampling.LANCZOS)
    corner = round(rng.uniform(28, 36) - width / 2), round(rng.uniform(31, 38) - height / 2)
    mask = Image.new("L", image.size)
    mask.paste(subject.getchannel("A"), corner)
    image.paste(subject, corner, subject)
    return image, mask


def main(args=None):
    """Write `<concept>/1.png` to `5.png` and `<concept>/masks/1.png` to `5.png` for every concept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where the concepts' folders are written")
    output_dir = parser.parse_args(args).output_dir
    for concept, seed in SEEDS.items():
        rng = random.Random(seed)
        sprite = Image.open(HERE / "sprites" / f"{concept}.png").convert("RGBA")
        folder = output_dir / concept
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        for number, place in enumerate((room, meadow, plain, city, snow), start=1):
            image, mask = compose(rng, place, sprite)
            image.save(folder / f"{number}.png")
            mask.save(folder / "masks" / f"{number}.png")


if __name__ == "__main__":
    main()
