"""Draw captioned scenes of the pocket world.

    python examples/pocket/recipe/scenes.py --output_dir data

Writes `scenes.npy`, `(count, side, side, 3)` bytes, and `captions.txt`, a line for each.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from files import finished
from icons import load_sprites
from tqdm import trange
from world import SIDE, sample_scene

HERE = Path(__file__).resolve().parent


def main(args=None):
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=HERE / "sprites.npz")
    parser.add_argument("--side", type=int, default=SIDE, help="Of an image, in pixels; a multiple of the default.")
    parser.add_argument("--count", type=int, default=160_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    rng = random.Random(arguments.seed)
    sprites = load_sprites(arguments.sprites)
    captions = []
    with finished(arguments.output_dir / "scenes.npy") as path:
        shape = (arguments.count, arguments.side, arguments.side, 3)
        images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)  # they may be larger than the memory
        for row in trange(arguments.count, mininterval=10):
            scene = sample_scene(sprites, rng)
            images[row] = scene.draw(sprites, rng, arguments.side)
            captions.append(scene.caption)
    with finished(arguments.output_dir / "captions.txt") as path:
        path.write_text("\n".join(captions) + "\n")


if __name__ == "__main__":
    main()
