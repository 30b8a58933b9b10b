"""From pictures to fronts: scores of every point of every variant, with intervals, and comparisons of two."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subjects import PROMPTS, Subject, rephrased

from diffusers_perfusion.evaluation import Judge

RESAMPLES = 2000


@dataclass(frozen=True)
class Front:
    """A variant's points.

    Attributes:
        name: of the variant.
        points: settings of each, `{"steps": …, "knob": …}`.
        scores: `(points, cells, 3)`, averaged over seeds; a cell is a thing and a prompt. Identity, text alignment
            (CLIP-T), and the share of what the prompt asks for that CLIP finds, see `found`.
        seconds: of a fit, the median over things.
        bytes: of what was fitted.
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


def read_pictures(path, seeds):
    """The pictures of a run, `[point][prompt][seed]`."""
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


def found(clip, pictures, prompt):
    """The share of what a prompt asks for that is in each picture: CLIP prefers it to all that stands in its place.

    Unlike CLIP-T this does not fall when a thing comes to look less like its noun.
    """
    seen = clip.encode_pictures(pictures)
    hits = [(seen @ clip.encode_texts(prompts).T).argmax(-1) == 0 for prompts in rephrased(prompt)]
    return torch.stack(hits).float().mean(0).tolist()


def score(folder, icons, clip, identity):
    """The front of one variant over things, from the pictures in `<folder>/<icon>`."""
    cells, runs = [], []
    for icon in icons:
        run = json.loads((folder / icon / "run.json").read_text())
        pictures = read_pictures(folder / icon / "pictures.png", run["seeds"])
        subject = Subject(icon, folder.parents[1] / "subjects" / icon)
        texts = [prompt.format(subject.superclass) for prompt in PROMPTS for _ in range(run["seeds"])]
        judge = Judge(clip, identity, subject.pictures())
        scores = []
        for point in pictures:
            judged = judge.score([one for prompt in point for one in prompt], texts)
            shares = [found(clip, some, texts[n * run["seeds"]]) for n, some in enumerate(point)]
            scores.append(np.column_stack([np.array(judged), np.concatenate(shares)]))
        cells.append(np.array(scores).reshape(len(pictures), len(PROMPTS), run["seeds"], 3).mean(2))
        runs.append(run)
    seconds, size = np.median([run["seconds"] for run in runs]), int(np.median([run["bytes"] for run in runs]))
    return Front(folder.name, runs[0]["points"], np.concatenate(cells, 1), float(seconds), size)


def identity_at(means, text, measure=1):
    """Identity where a front passes a text alignment, between its points on a line; beyond its ends, at the end.

    A point counts for no more than a better one of more text alignment: the front is what one would choose from.
    """
    order = means[:, measure].argsort()
    best = np.maximum.accumulate(means[order[::-1], 0])[::-1]
    return np.interp(text, means[order, measure], best)


def interval(values):
    """A 95 % interval of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def advantage(front, other, point, measure=1, resamples=RESAMPLES):
    """By how much the identity of a front is above another's point, at that point's text alignment or other measure.

    Returns:
        The difference, and its interval over resampled cells, the same ones of both.
    """
    draw = np.random.default_rng(0)

    def difference(cells):
        scores = other.scores[point][cells].mean(0)
        return identity_at(front.scores[:, cells].mean(1), scores[measure], measure) - scores[0]

    count = front.scores.shape[1]
    resampled = [difference(draw.integers(count, size=count)) for _ in range(resamples)]
    return float(difference(np.arange(count))), interval(resampled)


def steps_to(points, means, identity):
    """After how many steps a method has an identity, between its points on a line, and its text alignment then.

    NaN for both if it never has it; if its first point is above, that point's.
    """
    steps = np.array([point["steps"] for point in points], dtype=float)
    best = np.maximum.accumulate(means[:, 0])
    if identity > best[-1]:
        return np.nan, np.nan
    after = np.interp(identity, best, steps)
    return after, np.interp(after, steps, means[:, 1])


def score_all(output_dir, names, icons, clip, identity):
    """Fronts of those variants that have been run on all things."""
    fronts = {}
    for name in names:
        folder = Path(output_dir) / "runs" / name
        if all((folder / icon / "run.json").exists() for icon in icons):
            fronts[name] = score(folder, icons, clip, identity)
    return fronts
