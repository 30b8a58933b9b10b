"""`Vocabulary`: the concept words of all text encoders of a pipeline, taught and forgotten together."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from .text import TextEncoders
from .words import ConceptWords, OnEncoding


class Vocabulary:
    """The concept words of a pipeline: each with a word embedding in each of its text encoders.

    Args:
        texts: the text encoders; their tokenizers are changed in place.

    Attributes:
        widths: of the encodings of each text encoder, which stand side by side in those that the pipeline makes.
    """

    def __init__(self, texts: TextEncoders):
        self._parts = [
            ConceptWords(tokenizer, model, texts.layer)
            for tokenizer, model in zip(texts.tokenizers, texts.models, strict=True)
        ]
        self.widths = [model.config.hidden_size for model in texts.models]

    @property
    def twins(self) -> bool:
        """As in `ConceptWords`, for all."""
        return self._parts[0].twins

    @twins.setter
    def twins(self, twins: bool) -> None:
        for part in self._parts:
            part.twins = twins

    def listen(self, on_encoding: OnEncoding) -> None:
        """Set `ConceptWords.on_encoding` of all."""
        for part in self._parts:
            part.on_encoding = on_encoding

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Report no encoding meanwhile."""
        reports = [part.on_encoding for part in self._parts]
        for part in self._parts:
            part.on_encoding = None
        try:
            yield
        finally:
            for part, report in zip(self._parts, reports, strict=True):
                part.on_encoding = report

    @contextmanager
    def taking(self, clip_skip: int | None, max_length: int | None) -> Iterator[None]:
        """Set `ConceptWords.clip_skip` and `ConceptWords.max_length` of all, while the pipeline encodes a prompt."""
        for part in self._parts:
            part.clip_skip, part.max_length = clip_skip, max_length
        try:
            yield
        finally:
            for part in self._parts:
                part.clip_skip = part.max_length = None

    def add(self, word: str, embeddings: Sequence[Tensor], superclass: str) -> None:
        """Teach a word to all, or to none: as `ConceptWords.add`, with an embedding for each.

        Raises:
            ValueError: as `ConceptWords.add`, or if there are more or fewer embeddings than text encoders.
        """
        if len(embeddings) != len(self._parts):
            raise ValueError(
                f"{word!r} has {len(embeddings)} word embeddings, but this pipeline has {len(self._parts)} text "
                "encoders; the concept was made for another model"
            )
        for part, embedding in zip(self._parts, embeddings, strict=True):
            part.check(word, embedding, superclass)
        with self.aside():
            for part, embedding in zip(self._parts, embeddings, strict=True):
                part.add(word, embedding, superclass)

    def remove(self, word: str) -> None:
        """Forget a word."""
        with self.aside():
            for part in self._parts:
                part.remove(word)

    def enable(self) -> None:
        """As `ConceptWords.enable`."""
        for part in self._parts:
            part.enable()

    def disable(self) -> None:
        """As `ConceptWords.disable`, of all or of none."""
        with ExitStack() as stack:
            for part in self._parts:
                part.disable()
                stack.callback(part.enable)
            stack.pop_all()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """As `ConceptWords.aside`."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.aside())
            yield

    def positions(self, input_ids: Sequence[Tensor], word: str) -> Tensor:
        """As `ConceptWords.positions`, in token ids for each text encoder."""
        return self._parts[0].positions(input_ids[0], word)
