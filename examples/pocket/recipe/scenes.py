"""Draw captioned scenes of the pocket world.

    python examples/pocket/recipe/scenes.py --output_dir data

Writes `scenes.npy`, `(count, 64, 64, 3)` bytes, and `captions.txt`, a line for each.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from files import finished, save_array
from icons import load_sprites
from tqdm import trange
from world import SIDE, sample_scene

HERE = Path(__file__).resolve().parent


def main(args=None):
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=HERE / "sprites.npz")
    parser.add_argument("--count", type=int, default=160_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    rng = random.Random(arguments.seed)
    sprites = load_sprites(arguments.sprites)
    images = np.empty((arguments.count, SIDE, SIDE, 3), np.uint8)
    captions = []
    for row in trange(arguments.count, mininterval=10):
        scene = sample_scene(sprites, rng)
        images[row] = scene.draw(sprites, rng)
        captions.append(scene.caption)
    save_array(arguments.output_dir / "scenes.npy", images)
    with finished(arguments.output_dir / "captions.txt") as path:
        path.write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()
