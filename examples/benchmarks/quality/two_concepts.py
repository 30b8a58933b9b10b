"""Measure how often two subjects, trained apart, both appear when a prompt names both side by side, in either order.

    python examples/benchmarks/quality/two_concepts.py --output_dir outputs/quality --report_dir results

Uses what `compare.py --panel main` or `--panel flux` has trained, and two classifiers. One is the identity encoder, on
the left and the right half of an image. The other is CLIP: it sees both nouns if an image is nearer to the full prompt
than to either prompt with one of both things alone. True images say how far to trust them.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from baselines import METHODS, scale_lora
from compare import generate, load_base, paste
from icons import BASE_RENDITIONS, CONCEPT_RENDITION, load_sprites
from subjects import POCKET, TEST, compose_subject, sprites_of
from tqdm import tqdm
from world import Scene, Thing, sample_place, sample_thing

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.evaluation import ClipEncoder, IdentityEncoder, bootstrap_mean, text_alignment

PROMPTS = (
    "a {} next to a {} on the beach",
    "a {} and a {} in the snow",
    "a {} next to a {} in a meadow",
    "a {} and a {} in space",
    "a photo of a {} wearing a top hat next to a {} in the desert",
)
HALVES = (0, 1 / 4, 5 / 8, 7 / 8), (3 / 8, 1 / 4, 1, 7 / 8)  # as shares of an image's sides
MEASURES = ("both things found in the halves", "CLIP sees both nouns")


def halves(image):
    """Return the left and the right part of an image, where the two subjects of a scene are."""
    return [image.crop([round(image.width * share) for share in box]) for box in HALVES]


class Finder:
    """A classifier of which subject is in which half of an image.

    A thing is found where the identity encoder gives more than it gives to 95 of 100 scenes without its noun.

    Args:
        identity: the encoder.
        sprites: of all renditions.
        icons: of the things, in the rendition of the concepts.
        side: of the scenes, in pixels.
        views: scenes that each thing is learned from, and half as many as those that set its threshold.
    """

    def __init__(self, identity, sprites, icons, side, views=200, seed=0):
        self.identity, self.icons, rng = identity, list(icons), random.Random(seed)
        seen = {icon: {name: s for name, s in sprites[icon].items() if name in BASE_RENDITIONS} for icon in sprites}
        prototypes, thresholds = [], []
        for icon in tqdm(self.icons, desc="finder"):
            thing, right = Thing(icon, CONCEPT_RENDITION), []
            for view in range(views):
                pair = (thing, another_thing(seen, icon, rng)) if view % 2 else (another_thing(seen, icon, rng), thing)
                right.append(halves(side_by_side(*pair, sprites, rng, side))[0 if view % 2 else 1])
            prototype = F.normalize(identity.encode_images(right).mean(0), dim=0)
            pairs = [[another_thing(seen, icon, rng) for _ in range(2)] for _ in range(2 * views)]
            wrong = [half for pair in pairs for half in halves(side_by_side(*pair, sprites, rng, side))]
            highest = (identity.encode_images(wrong) @ prototype).unflatten(0, (-1, 2)).amax(-1)
            prototypes.append(prototype)
            thresholds.append(highest.quantile(0.95))
        self.prototypes, self.thresholds = torch.stack(prototypes), torch.stack(thresholds)

    def find(self, images):
        """Return whether each thing is in each half, `(images, 2, things)`."""
        encoded = self.identity.encode_images([half for image in images for half in halves(image)])
        return (encoded @ self.prototypes.T > self.thresholds).unflatten(0, (len(images), 2))

    def both(self, images, first, second):
        """Return whether one of two things is in one half of each image and the other in the other half."""
        found = self.find(images)[:, :, [self.icons.index(first), self.icons.index(second)]]
        return (found[:, 0, 0] & found[:, 1, 1]) | (found[:, 0, 1] & found[:, 1, 0])


def another_thing(sprites, icon, rng):
    """Return a thing of another noun."""
    while (thing := sample_thing(sprites, rng)).icon == icon:
        pass
    return thing


def side_by_side(first, second, sprites, rng, side):
    """Return a true image of two things somewhere, `side × side`."""
    return Scene(first, sample_place(rng), "next to", second).draw(sprites, rng, side)


def clip_sees_both(clip, images, prompts, alone):
    """Return whether each image is nearer to its prompt than to either prompt with one of both things alone."""
    full = text_alignment(clip, images, prompts)
    first, second = (text_alignment(clip, images, list(prompts)) for prompts in zip(*alone, strict=True))
    return (full > first) & (full > second)


@dataclass(frozen=True)
class Entry:
    """A method with two trained subjects.

    Attributes:
        name: in the report.
        run: whose trainings are used, a folder of `compare.py`'s runs.
        load: a function of a fresh pipeline and two folders, which loads both.
        calls: what names a subject in a prompt, of its `placeholder_token` and `superclass`.
    """

    name: str
    run: str
    load: Callable
    calls: str

    def generate(self, base, side, runs, subjects, seeds):
        """Return an image of each prompt and seed, `side × side`."""
        pipeline = load_base(base)
        self.load(pipeline, [runs / self.run / subject.icon for subject in subjects])
        names = [
            self.calls.format(placeholder_token=subject.placeholder_token, superclass=subject.superclass)
            for subject in subjects
        ]
        return generate(pipeline, [prompt.format(*names) for prompt in PROMPTS], range(seeds), side=side)


def perfusion(bias):
    """Return the entry of two concepts at one bias."""

    def load(pipeline, folders):
        add_perfusion(pipeline).load_perfusion([folder / "training" / "perfusion.safetensors" for folder in folders])
        pipeline.set_perfusion(bias=bias)

    return Entry(f"Perfusion, β {bias}", "perfusion", load, "{placeholder_token}")


def baseline(name, run, method, step, scale=None):
    """Return the entry of two subjects of another method; of LoRAs, merged by peft with this weight each."""

    def load(pipeline, folders):
        METHODS[method].load(pipeline, *[folder / f"step-{step}" for folder in folders])
        if scale is not None:
            scale_lora(pipeline, scale)

    return Entry(name, run, load, METHODS[method].calls)


ENTRIES = [
    Entry("base model, two nouns", "base", lambda pipeline, folders: None, "{superclass}"),
    *[perfusion(bias) for bias in (0.7, 1.0)],
    baseline("LoRAs of rank 4 merged, scale 0.6", "lora4", "lora", 250, 0.6),
    baseline("Textual Inversion tokens", "textual inversion", "textual_inversion", 150),
]


def true_scenes(rendition, pair, seeds, rng, sprites, side):
    """Return true images of what the prompts say, with things of one rendition."""
    first, second = (Thing(subject.icon, rendition) for subject in pair)
    scenes = [
        Scene(
            replace(first, worn="top-hat" if "wearing a top hat" in prompt else None),
            prompt.split("{} ")[-1],
            "next to",
            second,
        )
        for prompt in PROMPTS
    ]
    return [scene.draw(sprites, rng, side) for scene in scenes for _ in range(seeds)]


def count(images, pair, seeds, finder, clip):
    """Return whether the identity encoder finds both things in each image, and whether CLIP sees both nouns."""
    nouns = [subject.superclass for subject in pair]
    prompts = [prompt.format(*nouns) for prompt in PROMPTS for _ in range(seeds)]
    places = [prompt.split("{} ")[-1] for prompt in PROMPTS for _ in range(seeds)]
    alone = [tuple(f"a {noun} {place}" for noun in nouns) for place in places]
    return torch.stack([finder.both(images, *[s.icon for s in pair]), clip_sees_both(clip, images, prompts, alone)])


def main(args=None):
    """Generate the pairs and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(POCKET))
    parser.add_argument("--side", type=int, default=64, help="Of the images, in pixels: 64 or 128.")
    parser.add_argument("--clip", default=str(POCKET / "evaluators" / "clip"))
    parser.add_argument("--identity", default=str(POCKET / "evaluators" / "identity"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    clip, identity = ClipEncoder.from_pretrained(arguments.clip), IdentityEncoder.from_pretrained(arguments.identity)
    side, runs = arguments.side, arguments.output_dir / "runs"
    sprites = load_sprites(sprites_of(side), [*BASE_RENDITIONS, CONCEPT_RENDITION])
    finder, rng = Finder(identity, sprites, TEST, side), random.Random(1)
    subjects = [compose_subject(icon, arguments.output_dir / "subjects", side) for icon in TEST]
    neighbours = list(zip(subjects, subjects[1:] + subjects[:1], strict=True))
    pairs = [*neighbours, *(pair[::-1] for pair in neighbours)]
    sources = {
        name: partial(true_scenes, rendition, seeds=arguments.seeds, rng=rng, sprites=sprites, side=side)
        for name, rendition in (
            ("true images of both", CONCEPT_RENDITION),
            ("true images of another rendition", "twemoji"),
        )
    } | {
        entry.name: partial(entry.generate, arguments.base, side, runs, seeds=arguments.seeds)
        for entry in ENTRIES
        if (runs / entry.run).exists()
    }
    lines = [f"| | {' | '.join(MEASURES)} |", "|---|---|---|"]
    report, shown = {}, []
    for name, images_of in sources.items():
        rows = [images_of(pair) for pair in tqdm(pairs, desc=name)]
        counts = [count(row, pair, arguments.seeds, finder, clip) for row, pair in zip(rows, pairs, strict=True)]
        shares = [bootstrap_mean(column.float(), resamples=2000) for column in torch.cat(counts, 1)]
        report[name] = dict(zip(MEASURES, [share._asdict() for share in shares], strict=True))
        cells = [f"{share.mean:.0%} ({share.low:.0%} to {share.high:.0%})" for share in shares]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        shown.append([row[column] for row in rows[: len(neighbours)] for column in (0, arguments.seeds)])
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    (arguments.report_dir / "two_concepts.md").write_text("\n".join(lines) + "\n")
    (arguments.report_dir / "two_concepts.json").write_text(json.dumps(report, indent=2) + "\n")
    paste(shown).save(arguments.report_dir / "two_concepts.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
