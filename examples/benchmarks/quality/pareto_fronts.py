"""Scores of every point of every variant, with intervals, and comparisons of Pareto fronts."""

import json
from dataclasses import dataclass, replace
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
        scores: `(points, cells, 3)`, averaged over seeds; a cell is a thing and a prompt, the prompts of the first
            thing coming first. Identity, text alignment (CLIP-T), and the share of what the prompt asks for that CLIP
            finds, see `found`. Identity is NaN where the prompt asks for another appearance.
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
        return mean(self.scores, 1)

    def of_family(self, family):
        """Return the Pareto front of the prompts of one family."""
        chosen = [prompt.family == family for prompt in PROMPTS]
        return replace(self, scores=self.scores[:, np.resize(chosen, self.scores.shape[1])])

    def ratios(self, resamples=RESAMPLES):
        """Return identity in natural prompts divided by identity in plain ones, for each point.

        Returns:
            A list of the ratio over all things, its interval over resampled cells, and the lowest ratio of one thing.
        """
        plain, natural = (self.of_family(family).scores[..., 0] for family in ("plain", "natural"))
        rng, found = np.random.default_rng(0), []
        picks = [rng.integers(cells.shape[1], size=(resamples, cells.shape[1])) for cells in (plain, natural)]
        things = self.scores.shape[1] // len(PROMPTS)
        for of_plain, of_natural in zip(plain, natural, strict=True):
            resampled = of_natural[picks[1]].mean(1) / of_plain[picks[0]].mean(1)
            each = of_natural.reshape(things, -1).mean(1) / of_plain.reshape(things, -1).mean(1)
            found.append((float(of_natural.mean() / of_plain.mean()), interval(resampled), float(each.min())))
        return found


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


def found(clip, images, caption, superclass):
    """Return the share of a caption's phrases that CLIP finds in each image: it prefers them to all alternatives.

    Unlike CLIP-T this does not fall when a thing comes to look less like its noun.
    """
    seen = clip.encode_images(images)
    hits = [(seen @ clip.encode_texts(prompts).T).argmax(-1) == 0 for prompts in rephrased(caption, superclass)]
    return torch.stack(hits).float().mean(0).tolist()


def score(folder, icons, clip, identity):
    """Return the Pareto front of one variant over subjects, from the images in `<folder>/<icon>`."""
    cells, runs = [], []
    for icon in icons:
        run = json.loads((folder / icon / "run.json").read_text())
        images = read_images(folder / icon / "images.png", run["seeds"])
        subject = Subject(icon, folder.parents[1] / "subjects" / icon)
        captions = [prompt.caption.format(subject.superclass) for prompt in PROMPTS for _ in range(run["seeds"])]
        scorer = ConceptMetrics(clip, identity, subject.images())
        scores = []
        for point in images:
            measured = scorer.score([one for prompt in point for one in prompt], captions)
            shares = [
                found(clip, some, prompt.caption, subject.superclass)
                for some, prompt in zip(point, PROMPTS, strict=True)
            ]
            scores.append(np.column_stack([np.array(measured), np.concatenate(shares)]))
        of_icon = np.array(scores).reshape(len(images), len(PROMPTS), run["seeds"], 3).mean(2)
        of_icon[:, [prompt.family == "appearance" for prompt in PROMPTS], 0] = np.nan
        cells.append(of_icon)
        runs.append(run)
    seconds, size = np.median([run["seconds"] for run in runs]), int(np.median([run["bytes"] for run in runs]))
    return ParetoFront(folder.name, runs[0]["points"], np.concatenate(cells, 1), float(seconds), size)


def mean(scores, axis):
    """Return the mean of scores over those cells of an axis that are comparable; NaN if none is."""
    counts = (~np.isnan(scores)).sum(axis)
    return np.where(counts, np.nansum(scores, axis) / counts.clip(1), np.nan)


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
        scores = mean(other.scores[point][cells], 0)
        return identity_at(mean(front.scores[:, cells], 1), scores[measure], measure) - scores[0]

    count = front.scores.shape[1]
    resampled = [difference(rng.integers(count, size=count)) for _ in range(resamples)]
    return float(difference(np.arange(count))), interval(resampled)


def score_all(output_dir, names, icons, clip, identity):
    """Return the Pareto fronts of those variants that have been run on all subjects."""
    fronts = {}
    for name in names:
        folder = Path(output_dir) / "runs" / name
        if all((folder / icon / "run.json").exists() for icon in icons):
            fronts[name] = score(folder, icons, clip, identity)
    return fronts
