"""Measure how far the pocket metrics can be trusted; writes `metric_trust.json` and `metric_trust.md`.

    python examples/benchmarks/quality/metric_trust.py --output_dir examples/benchmarks/quality/results

Held-out things are of Fluent Emoji, which neither the evaluators nor the pocket model have seen; seen things are in
new scenes. The intervals of shares are over scenes, those of similarities over nouns. True images of the comparison's
own prompts say what the best of methods could get.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import subjects  # noqa: F401 (puts the recipe on the path)
import torch
from diffusers import StableDiffusionPipeline
from evaluator_scenes import another_look
from icons import CONCEPT_RENDITION, NOUNS, WORN, load_sprites
from pareto_fronts import found
from subjects import FAMILIES, POCKET, PROMPTS, TEST
from world import BACKDROPS, BLACK_AND_WHITE, PIXEL_ART, Scene, Thing, change, give, sample_place, sample_scene

from diffusers_perfusion.evaluation import (
    ClipEncoder,
    IdentityEncoder,
    bootstrap_mean,
    image_similarity,
    text_alignment,
)

KINDS = ("place", "colour", "worn", "companion")
LEFT_OUT = ("worn", "companion")
SETTINGS = ("alone", "wearing something", "with another thing")
SAME = "the same thing"
REFERENCES = 5
GENERATED_VIEWS = 2  # of the pocket model for each noun and setting: its images take longest
BATCH = 25


class BaseModel:
    """The pocket model's own images of captions."""

    def __init__(self, source):
        self.pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(self, captions):
        """Return an image for each caption; the n-th from seed n."""
        images = []
        for start in range(0, len(captions), BATCH):
            batch = captions[start : start + BATCH]
            generators = [torch.Generator().manual_seed(start + n) for n in range(len(batch))]
            images += self.pipeline(batch, num_inference_steps=25, guidance_scale=5.0, generator=generators).images
        return images


def plain_scene(sprites, rng, kind):
    """Return a scene in colour that has something of `kind`: for a worn thing, on the subject."""
    while True:
        scene = give(
            replace(sample_scene(sprites, rng), opening=rng.choice(["a photo of {}", "{}"])), kind, sprites, rng
        )
        if kind != "worn" or scene.subject.worn:
            return scene


def without(scene, kind):
    """Return the scene without its worn things, or without its companion."""
    if kind == "companion":
        return replace(scene, relation=None, companion=None)
    companion = scene.companion and replace(scene.companion, worn=None)
    return replace(scene, subject=replace(scene.subject, worn=None), companion=companion)


def rendered_from(sprites, seed=1):
    """Return a function from scenes to their true images."""
    rng = random.Random(seed)
    return lambda scenes: [scene.draw(sprites, rng) for scene in scenes]


def share(hits):
    """Return the share of hits with its interval."""
    return bootstrap_mean(hits.float(), resamples=2000)._asdict()


def measure_clip(clip, render, sprites, count, seed=0):
    """Return the shares of scenes in which CLIP finds the right caption, or the right image.

    Args:
        clip: the evaluator.
        render: from scenes to their images.
        sprites: of the things.
        count: of scenes for each kind.
        seed: of the scenes.
    """
    rng = random.Random(seed)
    rows = {}
    for kind in KINDS:
        scenes = [plain_scene(sprites, rng, kind) for _ in range(count)]
        images, captions = render(scenes), [scene.caption for scene in scenes]
        changed = [change(scene, kind, sprites, rng).caption for scene in scenes]
        right = text_alignment(clip, images, captions)
        rows[f"{kind} changed in the caption"] = share(right > text_alignment(clip, images, changed))
        if kind in LEFT_OUT:
            others = render([without(scene, kind) for scene in scenes])
            rows[f"{kind} left out of the image"] = share(right > text_alignment(clip, others, captions))
    return rows


def scene_of(caption, thing, sprites, rng):
    """Return the scene that a caption of the comparison describes, with a thing in its gap.

    Args:
        caption: of a `subjects.Prompt`.
        thing: for the gap.
        sprites: of all other things.
        rng: which rendition of them.
    """
    opening = next((style for style in (BLACK_AND_WHITE, PIXEL_ART) if caption.startswith(style[:-2])), "{}")
    where = max((words for words in BACKDROPS if caption.endswith(words)), key=len)
    words = caption[len(opening) - 2 :].removesuffix(f" {where}")
    relation = next((word for word in ("next to", "on top of", "and") if f" {word} " in words), None)
    things = []
    for part in words.split(f" {relation} ") if relation else [words]:
        name, _, wears = part.removeprefix("a ").partition(" wearing ")
        *colour, noun = name.split()
        icon = next((icon for icon, its_noun in NOUNS.items() if its_noun == noun), None)
        one = thing if noun == "{}" else Thing(icon, rng.choice(list(sprites[icon])))
        worn = next((icon for icon, worn in WORN.items() if worn.words == wears), None)
        things.append(replace(one, colour=colour[0] if colour else None, worn=worn))
    return Scene(things[0], where, relation, things[1] if relation else None, opening)


def measure_prompts(clip, identity, sprites, seen, count, seed=0):
    """Return what the metrics give true images of the comparison's prompts, by families of prompts.

    Args:
        clip: the evaluator.
        identity: the evaluator.
        sprites: held-out things.
        seen: things of the renditions that the evaluators have seen.
        count: of images of each subject of the comparison in each prompt.
        seed: of the scenes.

    Returns:
        For each family the share of what is asked for that CLIP finds, the similarity to five images of the same
        thing, and how often an image of another rendition is below the same thing in the same prompt.
    """
    rng = random.Random(seed)
    all_sprites = {icon: seen[icon] | sprites[icon] for icon in seen}
    scores = {family: {"found": [], "identity": [], "another": []} for family in FAMILIES}
    for icon in TEST * count:
        thing, other = Thing(icon, CONCEPT_RENDITION), Thing(icon, rng.choice(list(seen[icon])))
        references = [Scene(thing, sample_place(rng)).draw(sprites, rng) for _ in range(REFERENCES)]
        for prompt in PROMPTS:
            images = [scene_of(prompt.caption, one, seen, rng).draw(all_sprites, rng) for one in (thing, other)]
            same, another = image_similarity(identity, images, references).tolist()
            of_family = scores[prompt.family]
            of_family["found"] += found(clip, images[:1], prompt.caption, NOUNS[icon])
            of_family["identity"].append(same)
            of_family["another"].append(float(another < same))
    return {
        family: {
            "asked for and found": bootstrap_mean(of_family["found"])._asdict(),
            SAME: bootstrap_mean(of_family["identity"])._asdict(),
            "another rendition below it": bootstrap_mean(of_family["another"])._asdict(),
        }
        for family, of_family in scores.items()
    }


def place(thing, setting, sprites, rng):
    """Return a scene about a thing that is alone, wears something or is with another thing."""
    if setting == "wearing something":
        thing = replace(thing, worn=rng.choice(list(WORN)))
    scene = Scene(thing, sample_place(rng))
    if setting == "with another thing":
        return give(scene, "companion", sprites, rng)
    return scene


def measure_identity(identity, base, sprites, seen, count, generated, seed=0):
    """Return the similarity to five images of a held-out thing: of that thing, and of others in the same settings.

    Args:
        identity: the evaluator.
        base: the pocket model.
        sprites: held-out things.
        seen: things of the renditions that the evaluator has seen.
        count: of images for each setting, kind of thing and noun.
        generated: of images by the pocket model for each setting and noun.
        seed: of the scenes.
    """
    rng = random.Random(seed)
    all_sprites = {icon: seen[icon] | sprites[icon] for icon in seen}
    scores = {setting: {} for setting in SETTINGS}
    for icon in NOUNS:
        thing = Thing(icon, CONCEPT_RENDITION)
        others = [other for other in NOUNS if other != icon]
        references = [Scene(thing, sample_place(rng)).draw(sprites, rng) for _ in range(REFERENCES)]
        for setting, of_setting in scores.items():
            things = {
                SAME: [thing] * count,
                "another hue or colour of it": [another_look(sprites, thing, rng) for _ in range(count)],
                "another rendition of the noun": [Thing(icon, rng.choice(list(seen[icon]))) for _ in range(count)],
                "another noun": [Thing(rng.choice(others), CONCEPT_RENDITION) for _ in range(count)],
            }
            images = {
                name: [place(one, setting, seen, rng).draw(all_sprites, rng) for one in some]
                for name, some in things.items()
            }
            captions = [place(thing, setting, seen, rng).caption for _ in range(generated)]
            images["the pocket model's image of the noun"] = base.generate(captions)
            for name, some in images.items():
                of_setting.setdefault(name, []).append(image_similarity(identity, some, references))
    return {setting: rank(of_setting) for setting, of_setting in scores.items()}


def rank(scores):
    """Return the mean of each row of scores over nouns, and how often a score is below one of the same thing."""
    report = {}
    for name, each in scores.items():
        below = [(own[:, None] > one[None]).float().mean() for own, one in zip(scores[SAME], each, strict=True)]
        means = bootstrap_mean([one.mean().item() for one in each])
        report[name] = means._asdict() | {"below the same thing": sum(below).item() / len(below)}
    return report


def markdown(report):
    """Return the report as three tables."""
    settings = report["identity"]
    lines = ["| similarity to five images of a held-out thing | " + " | ".join(settings) + " |"]
    lines.append("|---|" + "---|" * len(settings))
    for name in next(iter(settings.values())):
        cells = []
        for rows in settings.values():
            row = rows[name]
            below = "" if name == SAME else f", {row['below the same thing']:.0%} below"
            cells.append(f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f}){below}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| CLIP is right, with one | " + " | ".join(report["clip"]) + " |"]
    lines.append("|---|" + "---|" * len(report["clip"]))
    for name in next(iter(report["clip"].values())):
        cells = [rows[name] for rows in report["clip"].values()]
        shown = " | ".join(f"{cell['mean']:.0%} ({cell['low']:.0%} to {cell['high']:.0%})" for cell in cells)
        lines.append(f"| {name} | {shown} |")
    lines += ["", "| true images of the comparison's subjects and prompts | " + " | ".join(report["prompts"]) + " |"]
    lines.append("|---|" + "---|" * len(report["prompts"]))
    for name in next(iter(report["prompts"].values())):
        cells = [rows[name] for rows in report["prompts"].values()]
        shown = " | ".join(f"{cell['mean']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})" for cell in cells)
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines) + "\n"


def main(args=None):
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default=str(POCKET))
    parser.add_argument("--clip", default=str(POCKET / "evaluators" / "clip"))
    parser.add_argument("--identity", default=str(POCKET / "evaluators" / "identity"))
    parser.add_argument("--scenes", type=int, default=400, help="Scenes for each kind of phrase.")
    parser.add_argument(
        "--generated", type=int, default=100, help="Of the pocket model's own images, for each kind of phrase."
    )
    parser.add_argument("--views", type=int, default=8, help="Images for each noun, setting and kind of thing.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    clip, identity = ClipEncoder.from_pretrained(arguments.clip), IdentityEncoder.from_pretrained(arguments.identity)
    base = BaseModel(arguments.pretrained_model_name_or_path)
    seen = load_sprites(POCKET / "recipe" / "sprites.npz")
    held_out = load_sprites(POCKET / "recipe" / "sprites.npz", [CONCEPT_RENDITION])
    held_out |= {icon: seen[icon] for icon in WORN}  # what is worn is what the pocket model knows

    report = {
        "identity": measure_identity(identity, base, held_out, seen, arguments.views, GENERATED_VIEWS),
        "prompts": measure_prompts(clip, identity, held_out, seen, arguments.views),
        "clip": {
            "scenes of seen things": measure_clip(clip, rendered_from(seen), seen, arguments.scenes),
            "scenes of held-out things": measure_clip(clip, rendered_from(held_out), held_out, arguments.scenes),
            "the pocket model's images": measure_clip(
                clip, lambda scenes: base.generate([scene.caption for scene in scenes]), seen, arguments.generated
            ),
        },
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "metric_trust.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.output_dir / "metric_trust.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
