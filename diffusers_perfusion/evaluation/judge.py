"""`Judge`: both scores of a subject's pictures, and the one number to choose by."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from .encoders import ClipEncoder, IdentityEncoder
from .metrics import picture_similarity, text_alignment


class Scores(NamedTuple):
    """How much a picture is like the subject, and how much like the prompt.

    Attributes:
        identity: similarity to the subject's own pictures, see `picture_similarity`.
        text: alignment with the prompt, see `text_alignment`.
    """

    identity: float
    text: float

    @property
    def harmonic_mean(self) -> float:
        """Of both scores, the paper's choice of a checkpoint (Appendix A); 0 if one of them is not positive."""
        if min(self) <= 0:
            return 0.0
        return 2 / (1 / self.identity + 1 / self.text)


class Judge:
    """Scores pictures of one subject.

    Args:
        clip: reads the prompts.
        identity: knows the subject again; a `ClipEncoder` makes it CLIP-I.
        references: the pictures that the concept was fitted to.
    """

    def __init__(self, clip: ClipEncoder, identity: ClipEncoder | IdentityEncoder, references: Sequence[Image.Image]):
        self.clip = clip
        self.identity = identity
        self.references = references

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Scores]:
        """Scores of each picture.

        Args:
            pictures: of any sizes.
            prompts: one a picture, with super-categories for concept words (see `superclass_prompt`).

        Raises:
            ValueError: if there are not as many prompts as pictures.
        """
        text = text_alignment(self.clip, pictures, prompts)
        identity = picture_similarity(self.identity, pictures, self.references)
        return [Scores(*pair) for pair in zip(identity.tolist(), text.tolist(), strict=True)]


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of each score. The harmonic mean to choose by is that of the means (paper, Appendix A)."""
    return Scores(*(sum(values) / len(scores) for values in zip(*scores, strict=True)))
