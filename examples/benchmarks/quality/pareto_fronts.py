"""Scores of every point of every variant, with intervals, and comparisons of Pareto fronts."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subjects import PROMPTS, Subject, rephrased

from diffusers_perfusion.evaluation import ConceptMetrics

RESAMPLES = 2000


@dataclass(frozen=True)
class ParetoFront:
    """The points of a variant.

    Attributes:
        name: of the variant.
        points: settings of each, `{"steps": …, "knob": …}`.
        scores: `(points, cells, 3)`, averaged over seeds; a cell is a thing and a prompt. Identity, text alignment
            (CLIP-T), and the share of what the prompt asks for that CLIP finds, see `found`.
        seconds: of a training, the median over things.
        bytes: of what was trained.
    """

    name: str
    points: list
    scores: np.ndarray
    seconds: float
    bytes: int

    @property
    def means(self):
        """Scores of each point, `(points, 3)`."""
        return self.scores.mean(1)


def read_images(path, seeds):
    """Return the images of a run, `[point][prompt][seed]`."""
    with Image.open(path) as image:
        image.load()
    side = image.width // (len(PROMPTS) * seeds)
    return [
        [
            [
                image.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
                for x in range(p * seeds, (p + 1) * seeds)
            ]
            for p in range(len(PROMPTS))
        ]
        for y in range(image.height // side)
    ]


def found(clip, images, prompt):
    """Return the share of a prompt's phrases that CLIP finds in each image: it prefers them to all alternatives.

    Unlike CLIP-T this does not fall when a thing comes to look less like its noun.
    """
    seen = clip.encode_images(images)
    hits = [(seen @ clip.encode_texts(prompts).T).argmax(-1) == 0 for prompts in rephrased(prompt)]
    return torch.stack(hits).float().mean(0).tolist()


def score(folder, icons, clip, identity):
    """Return the Pareto front of one variant over subjects, from the images in `<folder>/<icon>`."""
    cells, runs = [], []
    for icon in icons:
        run = json.loads((folder / icon / "run.json").read_text())
        images = read_images(folder / icon / "images.png", run["seeds"])
        subject = Subject(icon, folder.parents[1] / "subjects" / icon)
        prompts = [prompt.format(subject.superclass) for prompt in PROMPTS for _ in range(run["seeds"])]
        scorer = ConceptMetrics(clip, identity, subject.images())
        scores = []
        for point in images:
            measured = scorer.score([one for prompt in point for one in prompt], prompts)
            shares = [found(clip, some, prompts[n * run["seeds"]]) for n, some in enumerate(point)]
            scores.append(np.column_stack([np.array(measured), np.concatenate(shares)]))
        cells.append(np.array(scores).reshape(len(images), len(PROMPTS), run["seeds"], 3).mean(2))
        runs.append(run)
    seconds, size = np.median([run["seconds"] for run in runs]), int(np.median([run["bytes"] for run in runs]))
    return ParetoFront(folder.name, runs[0]["points"], np.concatenate(cells, 1), float(seconds), size)


def identity_at(means, text, measure=1):
    """Return the identity of a Pareto front at a text alignment, by linear interpolation; beyond its ends, at the end.

    A point counts for no more than a better one of more text alignment: the front is what one would choose from.
    """
    order = means[:, measure].argsort()
    best = np.maximum.accumulate(means[order[::-1], 0])[::-1]
    return np.interp(text, means[order, measure], best)


def interval(values):
    """Return the 95 % interval of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def advantage(front, other, point, measure=1, resamples=RESAMPLES):
    """Return how far a Pareto front is above another's point, at that point's text alignment or other measure.

    Returns:
        The difference, and its interval over resampled cells, the same ones of both.
    """
    rng = np.random.default_rng(0)

    def difference(cells):
        scores = other.scores[point][cells].mean(0)
        return identity_at(front.scores[:, cells].mean(1), scores[measure], measure) - scores[0]

    count = front.scores.shape[1]
    resampled = [difference(rng.integers(count, size=count)) for _ in range(resamples)]
    return float(difference(np.arange(count))), interval(resampled)


def steps_to(points, means, identity):
    """Return the steps after which a method has an identity, by linear interpolation, and its text alignment then.

    NaN for both if it never has it; if its first point is above, that point's.
    """
    steps = np.array([point["steps"] for point in points], dtype=float)
    best = np.maximum.accumulate(means[:, 0])
    if identity > best[-1]:
        return np.nan, np.nan
    after = np.interp(identity, best, steps)
    return after, np.interp(after, steps, means[:, 1])


def score_all(output_dir, names, icons, clip, identity):
    """Return the Pareto fronts of those variants that have been run on all subjects."""
    fronts = {}
    for name in names:
        folder = Path(output_dir) / "runs" / name
        if all((folder / icon / "run.json").exists() for icon in icons):
            fronts[name] = score(folder, icons, clip, identity)
    return fronts
