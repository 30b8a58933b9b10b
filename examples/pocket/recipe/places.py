"""The places of the pocket world, each drawn anew by every call: functions from a random generator to an image."""

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # twice the side of the images; scaling down softens the edges

WINDOW_FRAME = (250, 250, 250)


def shade(rng, colour, spread=18):
    """`colour` with each channel moved by at most `spread`."""
    return tuple(int(np.clip(channel + rng.randint(-spread, spread), 0, 255)) for channel in colour)


def fade(rng, top, bottom, spread=14):
    """A canvas that fades from about `top` to about `bottom`."""
    upper, lower = (np.array(shade(rng, colour, spread), float) for colour in (top, bottom))
    down = np.linspace(0, 1, SIDE)[:, None, None]
    rows = (upper * (1 - down) + lower * down).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(rows, (SIDE, SIDE, 3))))


def horizon(rng, low=0.5, high=0.7):
    """Where the ground begins, in pixels from the top."""
    return int(SIDE * rng.uniform(low, high))


def dot(draw, x, y, radius, colour):
    """A filled circle."""
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def plain(rng, colour):
    """An even background of about `colour`."""
    return Image.new("RGB", (SIDE, SIDE), shade(rng, colour, 10))


def beach(rng):
    """Sky, sea and sand with a wavy edge."""
    image = fade(rng, (120, 195, 240), (190, 230, 250))
    draw = ImageDraw.Draw(image)
    sea = horizon(rng, 0.4, 0.52)
    draw.rectangle([0, sea, SIDE, SIDE], fill=shade(rng, (30, 120, 190)))
    sand = sea + rng.randint(12, 22)
    edge = [(x, sand + int(3 * np.sin(x / 9 + rng.random() * 6))) for x in range(0, SIDE + 8, 8)]
    draw.polygon([(0, SIDE), *edge, (SIDE, SIDE)], fill=shade(rng, (235, 210, 150)))
    return image


def snow(rng):
    """Two white hills and falling snow, under a grey sky."""
    image = fade(rng, (170, 190, 215), (215, 225, 240))
    draw = ImageDraw.Draw(image)
    hill = horizon(rng)
    draw.ellipse([-40, hill, 0.8 * SIDE, 2 * SIDE], fill=shade(rng, (240, 245, 250), 6))
    draw.ellipse([0.3 * SIDE, hill + 6, 1.4 * SIDE, 2 * SIDE], fill=shade(rng, (232, 240, 250), 6))
    for _ in range(rng.randint(25, 45)):
        dot(draw, rng.randint(0, SIDE), rng.randint(0, SIDE), rng.randint(1, 2), (255, 255, 255))
    return image


def night(rng):
    """A dark sky with stars and a moon, above dark ground."""
    image = fade(rng, (8, 10, 45), (30, 35, 90), 8)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(18, 35)):
        dot(draw, rng.randint(0, SIDE), rng.randint(0, int(SIDE * 0.75)), rng.choice([0, 0, 1]), (250, 250, 220))
    dot(draw, rng.choice([rng.randint(8, 30), rng.randint(95, 115)]), rng.randint(8, 30), 9, (245, 240, 190))
    draw.rectangle([0, horizon(rng, 0.78, 0.88), SIDE, SIDE], fill=shade(rng, (15, 20, 40), 6))
    return image


def forest(rng):
    """Firs in front of each other, on dark grass."""
    image = fade(rng, (150, 200, 150), (90, 150, 90))
    draw = ImageDraw.Draw(image)
    ground = horizon(rng, 0.62, 0.75)
    for _ in range(rng.randint(7, 10)):
        x, half_width, top = rng.randint(-5, SIDE + 5), rng.randint(10, 18), rng.randint(0, 30)
        green = shade(rng, (25, 95, 45), 20)
        draw.rectangle([x - 2, ground - 20, x + 2, ground + 5], fill=(90, 60, 35))
        for tip in (top, top + 16, top + 32):
            draw.polygon([(x, tip), (x - half_width, tip + 30), (x + half_width, tip + 30)], fill=green)
    draw.rectangle([0, ground, SIDE, SIDE], fill=shade(rng, (50, 100, 45)))
    return image


def desert(rng):
    """Two dunes under a yellow sky with a pale sun."""
    image = fade(rng, (250, 200, 120), (255, 230, 180))
    draw = ImageDraw.Draw(image)
    dune = horizon(rng, 0.5, 0.62)
    draw.ellipse([-60, dune - 5, 0.8 * SIDE, 1.9 * SIDE], fill=shade(rng, (220, 160, 80)))
    draw.ellipse([0.35 * SIDE, dune + 8, 1.6 * SIDE, 2 * SIDE], fill=shade(rng, (205, 140, 65)))
    dot(draw, rng.randint(15, 110), 18, 10, (255, 245, 200))
    return image


def meadow(rng):
    """Two green hills with flowers, under a blue sky."""
    image = fade(rng, (110, 190, 245), (200, 235, 255))
    draw = ImageDraw.Draw(image)
    hill = horizon(rng)
    draw.ellipse([-60, hill, 0.9 * SIDE, 2 * SIDE], fill=shade(rng, (110, 190, 70)))
    draw.ellipse([0.2 * SIDE, hill + 8, 1.6 * SIDE, 2 * SIDE], fill=shade(rng, (95, 175, 60)))
    for _ in range(rng.randint(6, 14)):
        x, y = rng.randint(0, SIDE), rng.randint(hill + 12, SIDE)
        dot(draw, x, y, 2, rng.choice([(255, 255, 255), (250, 220, 60), (240, 120, 160)]))
    return image


def city(rng):
    """A row of buildings with lit windows, behind a road."""
    image = fade(rng, (190, 205, 220), (225, 225, 230))
    draw = ImageDraw.Draw(image)
    road = horizon(rng, 0.68, 0.78)
    left = 0
    while left < SIDE:
        width, top = rng.randint(14, 26), rng.randint(8, 55)
        walls = shade(rng, rng.choice([(120, 125, 140), (150, 140, 135), (95, 105, 125)]), 15)
        draw.rectangle([left, top, left + width, road], fill=walls)
        for y in range(top + 4, road - 4, 8):
            for x in range(left + 3, left + width - 4, 7):
                draw.rectangle([x, y, x + 3, y + 3], fill=rng.choice([(250, 235, 160), (190, 205, 220)]))
        left += width + rng.randint(0, 3)
    draw.rectangle([0, road, SIDE, SIDE], fill=shade(rng, (75, 75, 80), 10))
    for x in range(0, SIDE, 26):
        draw.rectangle([x, road + 14, x + 13, road + 17], fill=(230, 230, 230))
    return image


def space(rng):
    """Stars and a planet, on black."""
    image = fade(rng, (5, 3, 15), (20, 8, 40), 5)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(40, 70)):
        dot(draw, rng.randint(0, SIDE), rng.randint(0, SIDE), rng.choice([0, 0, 0, 1]), (255, 255, 255))
    x, y, radius = rng.randint(10, 118), rng.randint(10, 118), rng.randint(10, 18)
    dot(draw, x, y, radius, shade(rng, rng.choice([(200, 90, 50), (90, 120, 200), (200, 170, 110)]), 25))
    return image


def sunset(rng):
    """A low sun before a violet and orange sky, above dark ground."""
    image = fade(rng, (110, 40, 110), (255, 140, 60))
    draw = ImageDraw.Draw(image)
    ground, x = horizon(rng, 0.62, 0.75), rng.randint(30, 98)
    dot(draw, x, ground - 2, 20, (255, 225, 120))
    draw.rectangle([0, ground, SIDE, SIDE], fill=shade(rng, (60, 25, 55), 10))
    return image


def ocean(rng):
    """Bubbles and weeds in deep water."""
    image = fade(rng, (40, 160, 200), (10, 50, 110))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(8, 16)):
        x, y, radius = rng.randint(0, SIDE), rng.randint(0, SIDE), rng.randint(2, 5)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=(190, 230, 245))
    for _ in range(rng.randint(3, 6)):
        x = rng.randint(0, SIDE)
        weed = [(x, SIDE), (x + rng.randint(-4, 4), SIDE - 18), (x + rng.randint(-5, 5), SIDE - 34)]
        draw.line(weed, fill=shade(rng, (30, 130, 70)), width=4)
    return image


def room(rng):
    """A pale wall with a window, above a wooden floor."""
    wall = rng.choice([(235, 215, 190), (200, 215, 200), (215, 200, 220), (225, 225, 215)])
    image = fade(rng, wall, wall, 10)
    draw = ImageDraw.Draw(image)
    floor = horizon(rng, 0.68, 0.78)
    draw.rectangle([0, floor, SIDE, SIDE], fill=shade(rng, (150, 100, 60)))
    for y in range(floor + 6, SIDE, 9):
        draw.line([0, y, SIDE, y], fill=(120, 78, 45))
    left = rng.choice([8, 80])
    draw.rectangle([left, 12, left + 36, 50], fill=(170, 210, 240), outline=WINDOW_FRAME, width=3)
    draw.line([left + 18, 12, left + 18, 50], fill=WINDOW_FRAME, width=3)
    draw.line([left, 31, left + 36, 31], fill=WINDOW_FRAME, width=3)
    return image
