"""Draw what the evaluators learn from: scenes with one word changed, and the same things in many scenes.

    python examples/pocket/recipe/evaluator_scenes.py --vae examples/pocket/vae --output_dir evaluators-data

Writes `clip.npy` and `clip.jsonl` for CLIP, where rows 2n and 2n + 1 differ in one word; and for the identity encoder
`identity.npy`, `(things, views, 64, 64, 3)`, and `identity.jsonl`, where rows 2n and 2n + 1 are looks of one sprite.
Fluent Emoji, of which the concepts are made, is left out.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from files import finished, save_array
from icons import NOUNS, WORN, load_sprites
from invent import invent_renditions
from tqdm import tqdm, trange
from world import COLOURS, SIDE, Thing, change, give, kinds_of, sample_place, sample_scene

HERE = Path(__file__).resolve().parent
WEIGHTS = {"noun": 0.15, "place": 0.15, "colour": 0.2, "worn": 0.35, "companion": 0.15}
COPIES = 8  # invented of each rendition
DIFFERENT = 20  # mean difference, of 255, from which two looks of a sprite count as two things


def clip_pair(sprites, rng):
    """Two scenes whose captions differ in one word; one time in six, in that what is worn is there or not."""
    (kind,) = rng.choices(list(WEIGHTS), WEIGHTS.values())
    scene = give(sample_scene(sprites, rng), kind, sprites, rng)
    if kind == "worn" and scene.subject.worn and rng.random() < 0.5:
        return scene, replace(scene, subject=replace(scene.subject, worn=None))
    return scene, change(scene, kind, sprites, rng)


def another_look(sprites, thing, rng):
    """The same rendition in another hue or colour, different enough to be another thing."""
    shape = sprites[thing.icon][thing.rendition][..., 3] > 100
    steady = random.Random(0)
    look = thing.draw(sprites, steady)[0][shape].astype(int)
    while True:
        if rng.random() < 0.5:
            other = replace(thing, hue=rng.uniform(-np.pi, np.pi), colour=None)
        else:
            other = replace(thing, colour=rng.choice(list(COLOURS)))
        if np.abs(other.draw(sprites, steady)[0][shape][:, :3] - look[:, :3]).mean() > DIFFERENT:
            return other


def scene_with(thing, sprites, rng):
    """A scene about `thing`, which may wear something or have a companion."""
    scene = sample_scene(sprites, rng)
    worn = rng.choice(list(WORN)) if rng.random() < 0.2 else None
    return replace(scene, subject=replace(thing, worn=worn), place=sample_place(rng))


def things(sprites, renditions, rng):
    """For each noun, things of `renditions` renditions: each as it is (or turned in hue), and in another look."""
    for icon in NOUNS:
        available = list(sprites[icon])
        for rendition in rng.sample(available, min(renditions, len(available))):
            thing = Thing(icon, rendition, rng.choice([0.0, rng.uniform(-np.pi, np.pi)]))
            yield from (thing, another_look(sprites, thing, rng))


@torch.no_grad()
def through_vae(vae, images, generator, share=0.25, noise=0.1):
    """Replace a share of the images by what the VAE makes of them, as the pocket model's own images look.

    Some noise in the latent stands for the errors that the model makes there.
    """
    flat = images.reshape(-1, *images.shape[-3:])
    chosen = torch.randperm(len(flat), generator=generator)[: int(share * len(flat))]
    for rows in tqdm(chosen.split(128), desc="VAE", mininterval=10):
        some = torch.from_numpy(flat[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(some.contiguous(memory_format=torch.channels_last)).latents
            drawn = vae.decode(latents + noise * torch.randn(latents.shape, generator=generator)).sample.float()
        flat[rows] = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def write_lines(path, rows):
    """Write a JSON object a line."""
    with finished(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def clip_set(folder, sprites, vae, pairs, seed):
    """Write `clip.npy` and `clip.jsonl`."""
    rng = random.Random(seed)
    images = np.empty((2 * pairs, SIDE, SIDE, 3), np.uint8)
    rows = []
    for _ in trange(pairs, desc="CLIP", mininterval=10):
        for scene in clip_pair(sprites, rng):
            images[len(rows)] = scene.draw(sprites, rng)
            changed = {kind: change(scene, kind, sprites, rng).caption for kind in kinds_of(scene)}
            rows.append({"caption": scene.caption, "changed": changed})
    through_vae(vae, images, torch.Generator().manual_seed(seed))
    save_array(folder / "clip.npy", images)
    write_lines(folder / "clip.jsonl", rows)


def identity_set(folder, sprites, vae, renditions, views, seed):
    """Write `identity.npy` and `identity.jsonl`."""
    rng = random.Random(seed)
    chosen = list(things(sprites, renditions, rng))
    images = np.empty((len(chosen), views, SIDE, SIDE, 3), np.uint8)
    for thing, row in zip(tqdm(chosen, desc="identity", mininterval=10), images, strict=True):
        for view in range(views):
            row[view] = scene_with(thing, sprites, rng).draw(sprites, rng)
    through_vae(vae, images, torch.Generator().manual_seed(seed))
    save_array(folder / "identity.npy", images)
    write_lines(folder / "identity.jsonl", [{"icon": thing.icon} for thing in chosen])


def main(args=None):
    """Draw both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=HERE / "sprites.npz")
    parser.add_argument("--vae", required=True, help="Folder of the pocket VAE.")
    parser.add_argument("--pairs", type=int, default=20_000, help="Pairs of scenes for CLIP.")
    parser.add_argument("--renditions", type=int, default=32, help="Renditions of each noun for the identity encoder.")
    parser.add_argument("--views", type=int, default=8, help="Scenes of each thing for the identity encoder.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    vae = AutoencoderTiny.from_pretrained(arguments.vae).float().to(memory_format=torch.channels_last)
    sprites = invent_renditions(load_sprites(arguments.sprites), COPIES, np.random.default_rng(arguments.seed))
    clip_set(arguments.output_dir, sprites, vae, arguments.pairs, arguments.seed)
    identity_set(arguments.output_dir, sprites, vae, arguments.renditions, arguments.views, arguments.seed)


if __name__ == "__main__":
    main()
