import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusers_perfusion.evaluation import (
    ConceptMetrics,
    Scores,
    bootstrap_mean,
    drift,
    image_similarity,
    mean_scores,
    superclass_prompt,
    text_alignment,
)


class ColourEncoder:
    """Encodes an image as its mean colour, and a text as the colour it names."""

    COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def encode_images(self, images):
        means = [np.asarray(image.convert("RGB"), float).mean((0, 1)) for image in images]
        return F.normalize(torch.tensor(np.array(means)).float(), dim=-1)

    def encode_texts(self, texts):
        return torch.tensor(
            [next(self.COLOURS[word] for word in text.split() if word in self.COLOURS) for text in texts]
        )


RED, GREEN, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", (0, 255, 0), "blue"))


def test_a_placeholder_token_becomes_its_superclass():
    superclasses = {"<my-bear>": "teddy bear", "<my-bear>2": "panda", "sks": "mug"}
    assert superclass_prompt("a blue <my-bear> at night", superclasses) == "a blue teddy bear at night"
    assert superclass_prompt("a <my-bear>2 on a sks", superclasses) == "a panda on a mug"
    with pytest.raises(ValueError, match="no placeholder token"):
        superclass_prompt("a teddy bear", superclasses)


def test_text_alignment_is_a_image_with_its_own_prompt():
    scores = text_alignment(ColourEncoder(), [RED, GREEN, BLUE], ["red", "green", "a red thing"])
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.0, 0.0]))


def test_text_alignment_wants_a_prompt_for_each_image():
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        text_alignment(ColourEncoder(), [RED, GREEN], ["red"])


def test_image_similarity_is_the_mean_over_the_references():
    scores = image_similarity(ColourEncoder(), [RED, BLUE], [RED, RED, GREEN, BLUE])
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.25]))


def test_image_similarity_is_the_mean_of_all_cosines():
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(7)]
    encoder = ColourEncoder()
    each = [image_similarity(encoder, images[:4], [reference]) for reference in images[4:]]
    torch.testing.assert_close(image_similarity(encoder, images[:4], images[4:]), torch.stack(each).mean(0))


def test_drift_is_the_largest_change_of_a_pixel():
    base = torch.rand(2, 3, 4, 4)
    moved = base.clone()
    moved[1, 2, 3, 0] += 0.25
    moved[0, 0, 0, 0] -= 0.125
    assert drift(base.clone(), base) == 0
    assert drift(moved, base) == pytest.approx(0.25)
    assert drift(base, moved) == drift(moved, base)
    with pytest.raises(ValueError, match="shape"):
        drift(base[:1], base)


def test_an_image_that_is_not_a_number_is_drift():
    base = torch.rand(1, 3, 2, 2)
    assert drift(base * torch.nan, base) != 0


def test_prompts_without_a_placeholder_token_do_not_drift(pipeline, plain_pipeline, make_concept, generate):
    plain = ["a cat", "a photo of the dog"]
    base = generate(plain, pipe=plain_pipeline)
    pipeline.load_perfusion(make_concept())
    assert drift(generate(plain), base) == 0
    assert drift(generate(["a <my-cat>", "a photo of the <my-cat>"]), base) > 0


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_the_interval_holds_the_mean_of_the_scores(scores):
    mean, low, high = bootstrap_mean(scores, resamples=200)
    assert mean == pytest.approx(np.mean(scores))
    assert min(scores) - 1e-9 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= max(scores) + 1e-9


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        _, low, high = bootstrap_mean(random.normal(0.3, 1.0, 50), level=0.8, resamples=300)
        covered += low <= 0.3 <= high
    assert 0.7 < covered / 200 < 0.88


def test_the_interval_narrows_with_more_scores():
    random = np.random.default_rng(0)
    few, many = (bootstrap_mean(torch.from_numpy(random.normal(size=n))) for n in (20, 2000))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(10, rel=0.4)


@pytest.mark.parametrize("scores", [[], [[1.0, 2.0]]])
def test_a_mean_needs_scores(scores):
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_mean(scores)


class FirstPixel:
    """Encodes an image as its first pixel, and a text as the pixel that it spells."""

    def encode_images(self, images):
        return torch.tensor([image.getpixel((0, 0)) for image in images]) / 255

    def encode_texts(self, texts):
        return torch.tensor([[float(digit) for digit in text] for text in texts])


def test_concept_metrics_are_identity_and_text_alignment():
    encoder = FirstPixel()
    references = [Image.new("RGB", (4, 4), pixel) for pixel in ((255, 0, 0), (255, 51, 0))]
    images = [Image.new("RGB", (4, 4), pixel) for pixel in ((255, 0, 0), (51, 255, 0), (0, 0, 102))]
    prompts = ["100", "010", "100"]
    scores = ConceptMetrics(encoder, encoder, references).score(images, prompts)
    torch.testing.assert_close(
        torch.tensor([score.identity for score in scores]), image_similarity(encoder, images, references)
    )
    torch.testing.assert_close(
        torch.tensor([score.text for score in scores]), text_alignment(encoder, images, prompts)
    )
    assert scores[0].identity != scores[0].text or scores[1].identity != scores[1].text


def test_the_harmonic_mean_is_near_the_smaller_score():
    assert Scores(0.5, 0.5).harmonic_mean == pytest.approx(0.5)
    assert Scores(0.2, 0.8).harmonic_mean == pytest.approx(0.32)
    assert Scores(0.8, 0.2).harmonic_mean == pytest.approx(0.32)


@pytest.mark.parametrize("scores", [Scores(0.0, 0.9), Scores(-0.1, 0.9), Scores(0.9, -0.1), Scores(-0.9, -0.1)])
def test_a_score_that_is_not_positive_has_no_harmonic_mean(scores):
    assert scores.harmonic_mean == 0


def test_mean_scores():
    assert mean_scores([Scores(0.1, 0.6), Scores(0.3, 0.8)]) == pytest.approx((0.2, 0.7))
