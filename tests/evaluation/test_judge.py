import pytest
import torch
from PIL import Image

from diffusers_perfusion.evaluation import Judge, Scores, mean_scores, picture_similarity, text_alignment


class FirstPixel:
    """Encodes a picture as its first pixel, and a text as the pixel that it spells."""

    def encode_pictures(self, pictures):
        return torch.tensor([picture.getpixel((0, 0)) for picture in pictures]) / 255

    def encode_texts(self, texts):
        return torch.tensor([[float(digit) for digit in text] for text in texts])


def picture(*pixel):
    return Image.new("RGB", (4, 4), pixel)


def test_a_judge_gives_identity_and_text_alignment():
    encoder, references = FirstPixel(), [picture(255, 0, 0), picture(255, 51, 0)]
    pictures, prompts = [picture(255, 0, 0), picture(51, 255, 0), picture(0, 0, 102)], ["100", "010", "100"]
    scores = Judge(encoder, encoder, references).score(pictures, prompts)
    torch.testing.assert_close(
        torch.tensor([score.identity for score in scores]), picture_similarity(encoder, pictures, references)
    )
    torch.testing.assert_close(
        torch.tensor([score.text for score in scores]), text_alignment(encoder, pictures, prompts)
    )
    assert scores[0].identity != scores[0].text or scores[1].identity != scores[1].text


def test_the_harmonic_mean_is_near_the_smaller_score():
    assert Scores(0.5, 0.5).harmonic_mean == pytest.approx(0.5)
    assert Scores(0.2, 0.8).harmonic_mean == pytest.approx(0.32)
    assert Scores(0.8, 0.2).harmonic_mean == pytest.approx(0.32)


@pytest.mark.parametrize("scores", [Scores(0.0, 0.9), Scores(-0.1, 0.9), Scores(0.9, -0.1), Scores(-0.9, -0.1)])
def test_a_score_that_is_not_positive_leaves_nothing_to_choose_by(scores):
    assert scores.harmonic_mean == 0


def test_mean_scores():
    assert mean_scores([Scores(0.1, 0.6), Scores(0.3, 0.8)]) == pytest.approx((0.2, 0.7))
