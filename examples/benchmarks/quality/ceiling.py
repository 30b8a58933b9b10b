"""Measure how near the base model comes to subjects that it was trained on, and true images to each other.

    python examples/benchmarks/quality/ceiling.py --output_dir outputs/quality --report_dir results

The images that `compare.py --panel main` has generated with the base model and the noun alone are scored against five
images of each rendition of the noun that the base model was trained on, and the best score of each image counts. True
images of a subject alone in the prompts' places are scored against its five training images. Only for the pocket
model, whose training images are known.
"""

import argparse
import json
import random
from pathlib import Path

import subjects  # noqa: F401 (puts the recipe on the path)
import torch
from icons import BASE_RENDITIONS, CONCEPT_RENDITION, NOUNS, load_sprites
from pareto_fronts import read_images
from subjects import POCKET, PROMPTS, TEST, compose_subject
from world import BACKDROPS, Scene, Thing

from diffusers_perfusion.evaluation import IdentityEncoder, bootstrap_mean, image_similarity

PLACES = ("in a room", "in a meadow", "in the city", "in the snow", "at sunset")
KINDS = ("base model and the nearest it was trained on", "true images")


def nearest(encoder, images, sets):
    """Return the similarity of each image to the nearest of some sets of images."""
    return torch.stack([image_similarity(encoder, images, references) for references in sets]).amax(0)


def main(args=None):
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identity", default=str(POCKET / "evaluators" / "identity"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    encoder = IdentityEncoder.from_pretrained(arguments.identity)
    sprites = load_sprites(POCKET / "recipe" / "sprites.npz", [*BASE_RENDITIONS, CONCEPT_RENDITION])
    rng = random.Random(0)
    scores = {kind: [] for kind in KINDS}
    for icon in TEST:
        folder = arguments.output_dir / "runs" / "base" / icon
        seeds = json.loads((folder / "run.json").read_text())["seeds"]
        (point,) = read_images(folder / "images.png", seeds)
        comparable = [
            (prompt, images) for prompt, images in zip(PROMPTS, point, strict=True) if prompt.family != "appearance"
        ]
        generated = [image for _, images in comparable for image in images]
        known = [
            [Scene(Thing(icon, rendition), place).draw(sprites, rng) for place in PLACES]
            for rendition in BASE_RENDITIONS
            if rendition in sprites[icon]
        ]
        true = [
            Scene(Thing(icon, CONCEPT_RENDITION), place).draw(sprites, rng)
            for prompt, _ in comparable
            for place in BACKDROPS
            if prompt.caption.endswith(place)
            for _ in range(seeds)
        ]
        training_images = compose_subject(icon, arguments.output_dir / "subjects").images()
        for kind, values in zip(
            KINDS, (nearest(encoder, generated, known), nearest(encoder, true, [training_images])), strict=True
        ):
            scores[kind].append(values.unflatten(0, (-1, seeds)).mean(1))
            print(NOUNS[icon], kind, f"{float(values.mean()):.3f}", flush=True)
    report = {kind: bootstrap_mean(torch.cat(values), resamples=2000)._asdict() for kind, values in scores.items()}
    print(json.dumps(report, indent=2))
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    (arguments.report_dir / "ceiling.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
