"""How far the pocket evaluators can be trusted: writes `judge.json` and `judge.md`.

    python examples/benchmarks/quality/judge.py --output_dir examples/benchmarks/quality/judge

Held-out things are of Fluent Emoji, which neither the evaluators nor the pocket model have seen; seen things are in
new scenes. The intervals of shares are over scenes, those of similarities over nouns.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from diffusers_perfusion.evaluation import (
    ClipEncoder,
    IdentityEncoder,
    bootstrap_mean,
    picture_similarity,
    text_alignment,
)

POCKET = Path(__file__).resolve().parents[2] / "pocket"
sys.path.insert(0, str(POCKET / "recipe"))

from evaluator_scenes import another_look  # noqa: E402
from icons import CONCEPT_RENDITION, NOUNS, WORN, load_sprites  # noqa: E402
from world import Scene, Thing, change, give, sample_place, sample_scene, sample_thing  # noqa: E402

KINDS = ("place", "colour", "worn", "companion")
LEFT_OUT = ("worn", "companion")
REFERENCES = 5
BATCH = 25


class BaseModel:
    """The pocket model's own pictures of captions."""

    def __init__(self, source):
        self.pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
        self.pipeline.text_encoder.float()
        self.pipeline.set_progress_bar_config(disable=True)

    def draw(self, captions):
        """A picture a caption; the n-th from the n-th noise."""
        pictures = []
        for start in range(0, len(captions), BATCH):
            batch = captions[start : start + BATCH]
            generators = [torch.Generator().manual_seed(start + n) for n in range(len(batch))]
            pictures += self.pipeline(batch, num_inference_steps=25, guidance_scale=5.0, generator=generators).images
        return pictures


def plain_scene(sprites, rng, kind):
    """A scene in colour that has something of `kind`: for a worn thing, on the subject."""
    while True:
        scene = give(
            replace(sample_scene(sprites, rng), opening=rng.choice(["a photo of {}", "{}"])), kind, sprites, rng
        )
        if kind != "worn" or scene.subject.worn:
            return scene


def without(scene, kind):
    """The scene without its worn things, or without its companion."""
    if kind == "companion":
        return replace(scene, relation=None, companion=None)
    companion = scene.companion and replace(scene.companion, worn=None)
    return replace(scene, subject=replace(scene.subject, worn=None), companion=companion)


def drawn_from(sprites, seed=1):
    """A function from scenes to their true pictures."""
    rng = random.Random(seed)
    return lambda scenes: [scene.draw(sprites, rng) for scene in scenes]


def share(hits):
    """A share of hits with its interval."""
    return bootstrap_mean(hits.float(), resamples=2000)._asdict()


def judge_clip(clip, draw, sprites, count, seed=0):
    """Shares of scenes in which CLIP finds the right caption, or the right picture.

    Args:
        clip: the evaluator.
        draw: from scenes to their pictures.
        sprites: of the things.
        count: of scenes for each kind.
        seed: of the scenes.
    """
    rng = random.Random(seed)
    rows = {}
    for kind in KINDS:
        scenes = [plain_scene(sprites, rng, kind) for _ in range(count)]
        pictures, captions = draw(scenes), [scene.caption for scene in scenes]
        changed = [change(scene, kind, sprites, rng).caption for scene in scenes]
        right = text_alignment(clip, pictures, captions)
        rows[f"{kind} changed in the caption"] = share(right > text_alignment(clip, pictures, changed))
        if kind in LEFT_OUT:
            others = draw([without(scene, kind) for scene in scenes])
            rows[f"{kind} left out of the picture"] = share(right > text_alignment(clip, others, captions))
    return rows


def judge_identity(identity, base, sprites, seen, count, seed=0):
    """Similarity to five pictures of a held-out thing: of that thing, and of others.

    Args:
        identity: the evaluator.
        base: the pocket model.
        sprites: held-out things.
        seen: things of the renditions that the evaluator has seen.
        count: of pictures for each row and noun.
        seed: of the scenes.
    """
    rng = random.Random(seed)
    all_sprites = {icon: seen[icon] | sprites[icon] for icon in seen}
    scores = {}
    for icon in NOUNS:
        thing = Thing(icon, CONCEPT_RENDITION)
        references = [Scene(thing, sample_place(rng)).draw(sprites, rng) for _ in range(REFERENCES)]
        other_rendition = [Thing(icon, rng.choice(list(seen[icon]))) for _ in range(count)]
        other_noun = [Thing(rng.choice([n for n in NOUNS if n != icon]), CONCEPT_RENDITION) for _ in range(count)]
        worn = [replace(thing, worn=rng.choice(list(WORN))) for _ in range(count)]
        rows = {
            "the same thing": [Scene(thing, sample_place(rng)) for _ in range(count)],
            "the same thing, wearing something": [Scene(one, sample_place(rng)) for one in worn],
            "the same thing, with another": [
                Scene(thing, sample_place(rng), rng.choice(["and", "next to", "on top of"]), sample_thing(seen, rng))
                for _ in range(count)
            ],
            "another hue or colour of it": [
                Scene(another_look(sprites, thing, rng), sample_place(rng)) for _ in range(count)
            ],
            "another rendition of the noun": [Scene(other, sample_place(rng)) for other in other_rendition],
            "another noun": [Scene(other, sample_place(rng)) for other in other_noun],
        }
        pictures = {name: [scene.draw(all_sprites, rng) for scene in scenes] for name, scenes in rows.items()}
        pictures["the pocket model's picture of the noun"] = base.draw(
            [scene.caption for scene in rows["the same thing"]]
        )
        for name, drawn in pictures.items():
            scores.setdefault(name, []).append(picture_similarity(identity, drawn, references))

    same = scores["the same thing"]
    report = {}
    for name, each in scores.items():
        row = bootstrap_mean([score.mean().item() for score in each])._asdict()
        if name != "the same thing":
            below = [(own[:, None] > other[None]).float().mean().item() for own, other in zip(same, each, strict=True)]
            row["below the same thing"] = sum(below) / len(below)
        report[name] = row
    return report


def markdown(report):
    """The report as two tables."""
    lines = ["| similarity to five pictures of a held-out thing | mean | 95 % interval | below the same thing |"]
    lines.append("|---|---|---|---|")
    for name, row in report["identity"].items():
        below = f"{row['below the same thing']:.0%}" if "below the same thing" in row else ""
        lines.append(f"| {name} | {row['mean']:.2f} | {row['low']:.2f}–{row['high']:.2f} | {below} |")
    lines += ["", "| CLIP is right, with one | " + " | ".join(report["clip"]) + " |"]
    lines.append("|---|" + "---|" * len(report["clip"]))
    for name in next(iter(report["clip"].values())):
        cells = [rows[name] for rows in report["clip"].values()]
        shown = " | ".join(f"{cell['mean']:.0%} ({cell['low']:.0%}–{cell['high']:.0%})" for cell in cells)
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def main(args=None):
    """Judge the judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default=str(POCKET))
    parser.add_argument("--clip", default=str(POCKET / "evaluators" / "clip"))
    parser.add_argument("--identity", default=str(POCKET / "evaluators" / "identity"))
    parser.add_argument("--scenes", type=int, default=400, help="Scenes for each kind of word.")
    parser.add_argument(
        "--drawn", type=int, default=100, help="Of the pocket model's own pictures, for each kind of word."
    )
    parser.add_argument("--views", type=int, default=8, help="Pictures for each noun and row.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    clip, identity = ClipEncoder.from_pretrained(arguments.clip), IdentityEncoder.from_pretrained(arguments.identity)
    base = BaseModel(arguments.pretrained_model_name_or_path)
    seen = load_sprites(POCKET / "recipe" / "sprites.npz")
    held_out = load_sprites(POCKET / "recipe" / "sprites.npz", [CONCEPT_RENDITION])
    held_out |= {icon: seen[icon] for icon in WORN}  # what is worn is what the pocket model can draw

    report = {
        "identity": judge_identity(identity, base, held_out, seen, arguments.views),
        "clip": {
            "scenes of seen things": judge_clip(clip, drawn_from(seen), seen, arguments.scenes),
            "scenes of held-out things": judge_clip(clip, drawn_from(held_out), held_out, arguments.scenes),
            "the pocket model's pictures": judge_clip(
                clip, lambda scenes: base.draw([scene.caption for scene in scenes]), seen, arguments.drawn
            ),
        },
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "judge.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.output_dir / "judge.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
