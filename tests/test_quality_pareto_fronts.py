"""Scores, Pareto fronts and their comparison in the quality benchmark."""

import json

import numpy as np
import pareto_fronts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from subjects import FAMILIES, PROMPTS, rephrased

from diffusers_perfusion.evaluation import Scores


def front(means, name="front", spread=0.0, cells=6):
    """A front whose points have these means, cells spread around them alike."""
    around = np.linspace(-spread, spread, cells)[None, :, None]
    points = [{"steps": 1, "knob": number} for number in range(len(means))]
    return pareto_fronts.ParetoFront(name, points, np.array(means, float)[:, None] + around, 1.0, 10)


def test_identity_between_two_points_is_on_the_line_between_them():
    means = np.array([[0.3, 0.8], [0.5, 0.6]])
    assert pareto_fronts.identity_at(means, 0.7) == pytest.approx(0.4)
    assert pareto_fronts.identity_at(means[::-1], 0.7) == pytest.approx(0.4)
    assert pareto_fronts.identity_at(means, [0.6, 0.8]) == pytest.approx([0.5, 0.3])


def test_beyond_its_ends_a_front_is_not_extended():
    means = np.array([[0.3, 0.8], [0.5, 0.6]])
    assert pareto_fronts.identity_at(means, [0.1, 0.9]) == pytest.approx([0.5, 0.3])


def test_a_point_that_is_worse_in_both_is_not_on_the_front():
    means = np.array([[0.5, 0.6], [0.2, 0.65], [0.4, 0.7]])
    assert pareto_fronts.identity_at(means, [0.6, 0.65, 0.7]) == pytest.approx([0.5, 0.4, 0.4])


# Scores in thousandths: two texts that differ by rounding alone have no line between them to be on.
SCORES = st.integers(100, 900).map(lambda score: score / 1000)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=5, unique_by=lambda m: m[1]),
    st.floats(-0.2, 0.2),
)
def test_a_front_is_above_what_lies_under_it_by_that_much(means, down):
    moved = [(identity - down, text) for identity, text in means]
    for number in range(len(means)):
        better = max(identity for identity, text in means if text >= means[number][1])
        above = better - moved[number][0]
        difference, (low, high) = pareto_fronts.advantage(front(means), front(moved), number, resamples=5)
        assert difference == pytest.approx(above, abs=1e-9)
        assert low == pytest.approx(above, abs=1e-9) == high


def test_the_interval_of_an_advantage_is_over_pairs_of_cells():
    ours, theirs = front([(0.5, 0.7)]), front([(0.4, 0.7)])
    noisy = front([(0.4, 0.7)], spread=0.1)
    assert pareto_fronts.advantage(ours, theirs, 0)[1] == pytest.approx((0.1, 0.1))
    low, high = pareto_fronts.advantage(ours, noisy, 0)[1]
    assert low < 0.1 < high
    # What both fronts share is no doubt about their difference.
    assert pareto_fronts.advantage(front([(0.5, 0.7)], spread=0.1), noisy, 0)[1] == pytest.approx((0.1, 0.1))


class SeesNothing:
    """A CLIP to which all images and texts are the same."""

    def encode_images(self, images):
        return torch.ones(len(images), 1)

    encode_texts = encode_images


class ByColour:
    """Metrics of which each score is one channel of the first pixel."""

    def __init__(self, clip, identity, references):
        pass

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        return [Scores(*(value / 255 for value in image.getpixel((0, 0))[:2])) for image in images]


def test_images_of_a_run_are_scored_by_point_prompt_and_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto_fronts, "ConceptMetrics", ByColour)
    folder, seeds, side = tmp_path / "runs" / "variant", 2, 4
    values = np.zeros((2, len(PROMPTS), seeds), np.uint8)  # of points, prompts and seeds
    values[0], values[1, 3, 1] = 51, 102
    for icon in ("robot", "chair"):
        (folder / icon).mkdir(parents=True)
        (tmp_path / "subjects" / icon).mkdir(parents=True)
        pixels = np.zeros((2, len(PROMPTS) * seeds, 3), np.uint8)
        pixels[..., 0] = values.reshape(2, -1)
        pixels[..., 1] = 255 if icon == "robot" else 0
        Image.fromarray(pixels.repeat(side, 0).repeat(side, 1)).save(folder / icon / "images.png")
        run = {"seeds": seeds, "seconds": 2.0, "bytes": 7, "points": [{"steps": 1, "knob": k} for k in range(2)]}
        (folder / icon / "run.json").write_text(json.dumps(run))
    (scored,) = pareto_fronts.score_all(
        tmp_path, ["variant", "not run"], ["robot", "chair"], SeesNothing(), None
    ).values()
    assert scored.scores.shape == (2, 2 * len(PROMPTS), 3)
    comparable = np.resize([prompt.family != "appearance" for prompt in PROMPTS], 2 * len(PROMPTS))
    assert np.isnan(scored.scores[:, ~comparable, 0]).all()
    assert scored.scores[0, comparable, 0] == pytest.approx(0.2)
    assert scored.scores[1, [3, 3 + len(PROMPTS)], 0] == pytest.approx(0.2)
    assert np.nansum(scored.scores[1, :, 0]) == pytest.approx(0.4)
    assert scored.means[0] == pytest.approx([0.2, 0.5, 1])
    assert scored.scores[0, :, 1].tolist() == [1.0] * len(PROMPTS) + [0.0] * len(PROMPTS)
    assert (scored.seconds, scored.bytes) == (2.0, 7)


class Reads:
    """A CLIP that sees in an image, which is a text, what stands in it."""

    PHRASES = ("robot", "top hat", "crown", "city", "beach")

    def encode_texts(self, prompts):
        return torch.tensor([[float(phrase in text) for phrase in self.PHRASES] + [0.1] for text in prompts])

    encode_images = encode_texts


def test_what_is_asked_for_is_found_part_by_part():
    images = ["robot top hat city", "robot top hat beach", "robot crown beach", "top hat city"]
    assert pareto_fronts.found(Reads(), images, "a {} wearing a top hat in the city", "robot") == [1, 0.5, 0, 1]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.text)
def test_a_prompt_asks_for_one_place_and_perhaps_for_more(prompt):
    captions = rephrased(prompt.caption, "mug")
    more = ("wearing", "and a", "a cat next to", "dog wearing", "horse wearing", "on top of", "red {}", "blue {}")
    more += ("black and white", "pixel art")
    assert len(captions) == 1 + sum(prompt.caption.count(phrase) for phrase in more)
    for own, *others in captions:
        assert own == prompt.caption.format("mug") and own not in others
        assert len({*others}) == len(others) >= 3
        assert all("  " not in other and "mug" in other and "{}" not in other for other in others)
    assert prompt.text.count("{}") == prompt.caption.count("{}") == 1


def test_every_family_has_its_prompts():
    families = [prompt.family for prompt in PROMPTS]
    assert [families.count(family) for family in FAMILIES] == [8, 6, 6]
    plain = [prompt.text for prompt in PROMPTS if prompt.family == "plain"]
    assert all(text.startswith("a {}") for text in plain)
    assert not any(prompt.text.startswith("a {}") for prompt in PROMPTS if prompt.family == "natural")
    assert max(len(prompt.text.split()) for prompt in PROMPTS) == 25


def test_a_front_is_reported_by_families_of_prompts():
    plain, natural, appearance = ([prompt.family == family for prompt in PROMPTS] for family in FAMILIES)
    scores = np.zeros((1, 2 * len(PROMPTS), 3))
    one, two = scores[0, : len(PROMPTS)], scores[0, len(PROMPTS) :]
    one[plain], one[natural], one[appearance] = (0.5, 0.1, 0), (0.4, 0.2, 0), (np.nan, 0.3, 0)
    two[plain], two[natural], two[appearance] = (0.5, 0.1, 0), (0.2, 0.2, 0), (np.nan, 0.3, 0)
    front = pareto_fronts.ParetoFront("front", [{"steps": 1, "knob": None}], scores, 1.0, 10)
    assert [front.of_family(family).means[0, 1] for family in FAMILIES] == pytest.approx([0.1, 0.2, 0.3])
    assert front.of_family("natural").scores.shape == (1, 12, 3)
    ((ratio, (low, high), lowest),) = front.ratios()
    assert (ratio, lowest) == pytest.approx((0.6, 0.4))
    assert low < ratio < high
