"""More renditions of the icons: an evaluator that has seen four of a noun tells four apart, and no fifth."""

import numpy as np
import torch
import torch.nn.functional as F
from icons import NOUNS


def bend_and_shade(sprite, rng):
    """A sprite in another shape and light: stretched, bent by a smooth random field, lit from a random side.

    Args:
        sprite: RGBA, square.
        rng: a `numpy.random.Generator`.
    """
    side = len(sprite)
    rgba = torch.from_numpy(sprite).permute(2, 0, 1).float()[None] / 255
    alpha = rgba[:, 3:]
    rgba = torch.cat(
        [rgba[:, :3] * alpha, alpha], 1
    )  # premultiplied, so that nothing bleeds in from under transparency

    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    field = torch.from_numpy(rng.normal(0, 0.09, (1, 2, 4, 4))).float()
    field = F.interpolate(field, (side, side), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    stretch = torch.from_numpy(rng.uniform(1.0, 1.3, 2)).float()
    bent = F.grid_sample(rgba, (torch.stack([x, y], -1) * stretch + field)[None], align_corners=True)[0]

    alpha = bent[3:]
    colours = (bent[:3] / alpha.clamp(min=1e-3)).clamp(0, 1) ** rng.uniform(0.7, 1.4)
    direction = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.4) * (np.cos(direction) * x + np.sin(direction) * y)
    made = torch.cat([(colours * light).clamp(0, 1), alpha])
    return (made * 255).round().byte().permute(1, 2, 0).numpy()


def invent_renditions(sprites, copies, rng):
    """The sprites and, as rendition "<rendition>~<number>", `copies` of each thing in other shapes and lights."""
    more = {icon: dict(renditions) for icon, renditions in sprites.items()}
    for icon in NOUNS:
        for rendition, sprite in sprites[icon].items():
            for number in range(copies):
                more[icon][f"{rendition}~{number}"] = bend_and_shade(sprite, rng)
    return more
