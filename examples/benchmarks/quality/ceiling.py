"""How near the base model itself comes to things that it has seen in training, and true pictures to each other.

    python examples/benchmarks/quality/ceiling.py --output_dir outputs/quality --report_dir results

The pictures that `compare.py --panel main` has drawn with the base and the noun alone are scored against five pictures
of each rendition of the noun that the base was trained on, and the best score of each picture counts. True pictures of
a thing alone in the prompts' places are scored against the five that it is learned from. Only for the pocket model,
whose training pictures are known.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from fronts import read_pictures
from icons import BASE_RENDITIONS, CONCEPT_RENDITION, NOUNS, load_sprites
from subjects import POCKET, PROMPTS, TEST, draw_subject
from world import BACKDROPS, Scene, Thing

from diffusers_perfusion.evaluation import IdentityEncoder, bootstrap_mean, picture_similarity

PLACES = ("in a room", "in a meadow", "in the city", "in the snow", "at sunset")
KINDS = ("base model and the nearest it was trained on", "true pictures")


def nearest(encoder, pictures, sets):
    """Similarity of each picture to the nearest of some sets of pictures."""
    return torch.stack([picture_similarity(encoder, pictures, references) for references in sets]).amax(0)


def main(args=None):
    """Score, print and write."""
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
        drawn = [picture for prompt in read_pictures(folder / "pictures.png", seeds)[0] for picture in prompt]
        known = [
            [Scene(Thing(icon, rendition), place).draw(sprites, rng) for place in PLACES]
            for rendition in BASE_RENDITIONS
            if rendition in sprites[icon]
        ]
        true = [
            Scene(Thing(icon, CONCEPT_RENDITION), next(place for place in BACKDROPS if prompt.endswith(place))).draw(
                sprites, rng
            )
            for prompt in PROMPTS
            for _ in range(seeds)
        ]
        learned_from = draw_subject(icon, arguments.output_dir / "subjects").pictures()
        for kind, values in zip(
            KINDS, (nearest(encoder, drawn, known), nearest(encoder, true, [learned_from])), strict=True
        ):
            scores[kind].append(values.unflatten(0, (len(PROMPTS), seeds)).mean(1))
            print(NOUNS[icon], kind, f"{float(values.mean()):.3f}", flush=True)
    report = {kind: bootstrap_mean(torch.cat(values), resamples=2000)._asdict() for kind, values in scores.items()}
    print(json.dumps(report, indent=2))
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    (arguments.report_dir / "ceiling.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
