"""The places of the pocket world, each drawn anew by every call on a canvas, by a random generator."""

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # of a canvas, in units

WINDOW_FRAME = (250, 250, 250)


def shade(rng, colour, spread=18):
    """`colour` with each channel moved by at most `spread`."""
    return tuple(int(np.clip(channel + rng.randint(-spread, spread), 0, 255)) for channel in colour)


class Canvas:
    """An image that is drawn in units.

    Args:
        scale: pixels to a unit.
    """

    def __init__(self, scale):
        self.scale = scale
        self.image = Image.new("RGB", (SIDE * scale, SIDE * scale))
        self.draw = ImageDraw.Draw(self.image)

    def fade(self, rng, top, bottom, spread=14):
        """Fill it: from about `top` to about `bottom`."""
        upper, lower = (np.array(shade(rng, colour, spread), float) for colour in (top, bottom))
        down = np.linspace(0, 1, self.image.height)[:, None, None]
        rows = (upper * (1 - down) + lower * down).astype(np.uint8)
        self.image.paste(Image.fromarray(np.repeat(rows, self.image.width, 1)))

    def box(self, corners):
        """The pixels of a box whose corners belong to it."""
        left, top, right, bottom = (self.scale * corner for corner in corners)
        return [left, top, right + self.scale - 1, bottom + self.scale - 1]

    def rectangle(self, corners, fill, outline=None, width=1):
        """A rectangle, with its border inside."""
        self.draw.rectangle(self.box(corners), fill, outline, width * self.scale)

    def ellipse(self, corners, fill=None, outline=None):
        """The ellipse inside a box."""
        self.draw.ellipse(self.box(corners), fill, outline, self.scale)

    def dot(self, x, y, radius, colour):
        """A filled circle."""
        self.ellipse([x - radius, y - radius, x + radius, y + radius], colour)

    def polygon(self, corners, fill):
        """A filled polygon."""
        self.draw.polygon([(x * self.scale, y * self.scale) for x, y in corners], fill)

    def line(self, points, fill, width=1):
        """A line through points."""
        self.draw.line([(x * self.scale, y * self.scale) for x, y in points], fill, width * self.scale)


def horizon(rng, low=0.5, high=0.7):
    """Where the ground begins, in units from the top."""
    return int(SIDE * rng.uniform(low, high))


def plain(canvas, rng, colour):
    """An even background of about `colour`."""
    canvas.rectangle([0, 0, SIDE, SIDE], fill=shade(rng, colour, 10))


def beach(canvas, rng):
    """Sky, sea and sand with a wavy edge."""
    canvas.fade(rng, (120, 195, 240), (190, 230, 250))
    sea = horizon(rng, 0.4, 0.52)
    canvas.rectangle([0, sea, SIDE, SIDE], fill=shade(rng, (30, 120, 190)))
    sand = sea + rng.randint(12, 22)
    edge = [(x, sand + int(3 * np.sin(x / 9 + rng.random() * 6))) for x in range(0, SIDE + 8, 8)]
    canvas.polygon([(0, SIDE), *edge, (SIDE, SIDE)], fill=shade(rng, (235, 210, 150)))


def snow(canvas, rng):
    """Two white hills and falling snow, under a grey sky."""
    canvas.fade(rng, (170, 190, 215), (215, 225, 240))
    hill = horizon(rng)
    canvas.ellipse([-40, hill, 0.8 * SIDE, 2 * SIDE], fill=shade(rng, (240, 245, 250), 6))
    canvas.ellipse([0.3 * SIDE, hill + 6, 1.4 * SIDE, 2 * SIDE], fill=shade(rng, (232, 240, 250), 6))
    for _ in range(rng.randint(25, 45)):
        canvas.dot(rng.randint(0, SIDE), rng.randint(0, SIDE), rng.randint(1, 2), (255, 255, 255))


def night(canvas, rng):
    """A dark sky with stars and a moon, above dark ground."""
    canvas.fade(rng, (8, 10, 45), (30, 35, 90), 8)
    for _ in range(rng.randint(18, 35)):
        canvas.dot(rng.randint(0, SIDE), rng.randint(0, int(SIDE * 0.75)), rng.choice([0, 0, 1]), (250, 250, 220))
    canvas.dot(rng.choice([rng.randint(8, 30), rng.randint(95, 115)]), rng.randint(8, 30), 9, (245, 240, 190))
    canvas.rectangle([0, horizon(rng, 0.78, 0.88), SIDE, SIDE], fill=shade(rng, (15, 20, 40), 6))


def forest(canvas, rng):
    """Firs in front of each other, on dark grass."""
    canvas.fade(rng, (150, 200, 150), (90, 150, 90))
    ground = horizon(rng, 0.62, 0.75)
    for _ in range(rng.randint(7, 10)):
        x, half_width, top = rng.randint(-5, SIDE + 5), rng.randint(10, 18), rng.randint(0, 30)
        green = shade(rng, (25, 95, 45), 20)
        canvas.rectangle([x - 2, ground - 20, x + 2, ground + 5], fill=(90, 60, 35))
        for tip in (top, top + 16, top + 32):
            canvas.polygon([(x, tip), (x - half_width, tip + 30), (x + half_width, tip + 30)], fill=green)
    canvas.rectangle([0, ground, SIDE, SIDE], fill=shade(rng, (50, 100, 45)))


def desert(canvas, rng):
    """Two dunes under a yellow sky with a pale sun."""
    canvas.fade(rng, (250, 200, 120), (255, 230, 180))
    dune = horizon(rng, 0.5, 0.62)
    canvas.ellipse([-60, dune - 5, 0.8 * SIDE, 1.9 * SIDE], fill=shade(rng, (220, 160, 80)))
    canvas.ellipse([0.35 * SIDE, dune + 8, 1.6 * SIDE, 2 * SIDE], fill=shade(rng, (205, 140, 65)))
    canvas.dot(rng.randint(15, 110), 18, 10, (255, 245, 200))


def meadow(canvas, rng):
    """Two green hills with flowers, under a blue sky."""
    canvas.fade(rng, (110, 190, 245), (200, 235, 255))
    hill = horizon(rng)
    canvas.ellipse([-60, hill, 0.9 * SIDE, 2 * SIDE], fill=shade(rng, (110, 190, 70)))
    canvas.ellipse([0.2 * SIDE, hill + 8, 1.6 * SIDE, 2 * SIDE], fill=shade(rng, (95, 175, 60)))
    for _ in range(rng.randint(6, 14)):
        x, y = rng.randint(0, SIDE), rng.randint(hill + 12, SIDE)
        canvas.dot(x, y, 2, rng.choice([(255, 255, 255), (250, 220, 60), (240, 120, 160)]))


def city(canvas, rng):
    """A row of buildings with lit windows, behind a road."""
    canvas.fade(rng, (190, 205, 220), (225, 225, 230))
    road = horizon(rng, 0.68, 0.78)
    left = 0
    while left < SIDE:
        width, top = rng.randint(14, 26), rng.randint(8, 55)
        walls = shade(rng, rng.choice([(120, 125, 140), (150, 140, 135), (95, 105, 125)]), 15)
        canvas.rectangle([left, top, left + width, road], fill=walls)
        for y in range(top + 4, road - 4, 8):
            for x in range(left + 3, left + width - 4, 7):
                canvas.rectangle([x, y, x + 3, y + 3], fill=rng.choice([(250, 235, 160), (190, 205, 220)]))
        left += width + rng.randint(0, 3)
    canvas.rectangle([0, road, SIDE, SIDE], fill=shade(rng, (75, 75, 80), 10))
    for x in range(0, SIDE, 26):
        canvas.rectangle([x, road + 14, x + 13, road + 17], fill=(230, 230, 230))


def space(canvas, rng):
    """Stars and a planet, on black."""
    canvas.fade(rng, (5, 3, 15), (20, 8, 40), 5)
    for _ in range(rng.randint(40, 70)):
        canvas.dot(rng.randint(0, SIDE), rng.randint(0, SIDE), rng.choice([0, 0, 0, 1]), (255, 255, 255))
    x, y, radius = rng.randint(10, 118), rng.randint(10, 118), rng.randint(10, 18)
    canvas.dot(x, y, radius, shade(rng, rng.choice([(200, 90, 50), (90, 120, 200), (200, 170, 110)]), 25))


def sunset(canvas, rng):
    """A low sun before a violet and orange sky, above dark ground."""
    canvas.fade(rng, (110, 40, 110), (255, 140, 60))
    ground, x = horizon(rng, 0.62, 0.75), rng.randint(30, 98)
    canvas.dot(x, ground - 2, 20, (255, 225, 120))
    canvas.rectangle([0, ground, SIDE, SIDE], fill=shade(rng, (60, 25, 55), 10))


def ocean(canvas, rng):
    """Bubbles and weeds in deep water."""
    canvas.fade(rng, (40, 160, 200), (10, 50, 110))
    for _ in range(rng.randint(8, 16)):
        x, y, radius = rng.randint(0, SIDE), rng.randint(0, SIDE), rng.randint(2, 5)
        canvas.ellipse([x - radius, y - radius, x + radius, y + radius], outline=(190, 230, 245))
    for _ in range(rng.randint(3, 6)):
        x = rng.randint(0, SIDE)
        weed = [(x, SIDE), (x + rng.randint(-4, 4), SIDE - 18), (x + rng.randint(-5, 5), SIDE - 34)]
        canvas.line(weed, fill=shade(rng, (30, 130, 70)), width=4)


def room(canvas, rng):
    """A pale wall with a window, above a wooden floor."""
    wall = rng.choice([(235, 215, 190), (200, 215, 200), (215, 200, 220), (225, 225, 215)])
    canvas.fade(rng, wall, wall, 10)
    floor = horizon(rng, 0.68, 0.78)
    canvas.rectangle([0, floor, SIDE, SIDE], fill=shade(rng, (150, 100, 60)))
    for y in range(floor + 6, SIDE, 9):
        canvas.line([(0, y), (SIDE, y)], fill=(120, 78, 45))
    left = rng.choice([8, 80])
    canvas.rectangle([left, 12, left + 36, 50], fill=(170, 210, 240), outline=WINDOW_FRAME, width=3)
    canvas.line([(left + 18, 12), (left + 18, 50)], fill=WINDOW_FRAME, width=3)
    canvas.line([(left, 31), (left + 36, 31)], fill=WINDOW_FRAME, width=3)
