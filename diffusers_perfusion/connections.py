"""`Connection`: the text encoders of a pipeline that know the tokens of a model's concepts, and recognise its rows."""

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor

from .concept import PerfusionConcept
from .model_families import ModelFamily, TextPart
from .placeholder_tokens import PlaceholderTokens
from .prompt_tracking import Prompt, PromptTracker


@dataclass(frozen=True)
class Row:
    """One row of a batch of hidden states, recognised.

    Attributes:
        parts: the prompt of each text encoder's part of the row, None for one without a part; none at all if nobody
            knows the prompts.
        trackers: what remembers these prompts.
        layout: of the row, as `ModelFamily.layout`.
        given: positions of each placeholder token, where the user or the trainer has said what is in the row.
    """

    parts: Sequence[Prompt | None] = ()
    trackers: Sequence[PromptTracker] = ()
    layout: Sequence[TextPart] = ()
    given: Mapping[str, tuple[int, ...]] | None = None

    @property
    def is_superclass_prompt(self) -> bool:
        """Whether the model gets the super-class prompt in place of the row, at whatever gate."""
        return any(part.replaced for part in self.parts if part is not None)

    @property
    def longer(self) -> int:
        """By how many tokens the super-class prompt is longer than the row, where the model gets it."""
        parts = [part.superclass for part in self.parts if part is not None and part.replaced]
        return max((superclass.longer for superclass in parts if superclass is not None), default=0)

    @property
    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        """Positions of each placeholder token, as given or in the parts of all text encoders that read it."""
        found: dict[str, tuple[int, ...]] = {}
        for part, place in zip(self.parts, self.layout, strict=True):
            for token, positions in () if part is None else part.tokens.items():
                found[token] = tuple(
                    sorted({*found.get(token, ()), *(place.start + position for position in positions)})
                )
        if self.given is None:
            return found
        if self.is_superclass_prompt:  # whose positions nobody can give
            return {token: found.get(token, positions) for token, positions in self.given.items()}
        return {token: positions or found.get(token, ()) for token, positions in self.given.items()}

    def superclass_row(self, row: Tensor) -> Tensor | None:
        """Return the row `(length, width)` or `(width,)` of the super-class prompt, where a part holds a token.

        None if nobody knows the prompt, or its text encoder is gone.
        """
        if not self.trackers:
            return None
        for place, prompt, tracker in zip(self.layout, self.parts, self.trackers, strict=False):
            if prompt is not None and prompt.tokens:
                if (found := tracker.superclass_hidden_states(prompt)) is None:
                    return None
                row = place.put(row, found)
        return row


class Connection:
    """Connects a registry of concepts to the text encoders of a pipeline.

    It outlives them, because prompts may be encoded and the text encoders freed.

    Args:
        owner: the registry.
        family: of the pipeline.

    Raises:
        ValueError: as `PlaceholderTokens.of`.
    """

    def __init__(self, owner: Hashable, family: ModelFamily):
        self.owner = weakref.ref(owner)
        self.layout = family.layout
        tokens: list[PlaceholderTokens] = []
        try:
            for tokenizer, text_encoder in zip(family.tokenizers, family.text_encoders, strict=True):
                tokens.append(PlaceholderTokens.of(tokenizer, text_encoder, type(family)))
        except ValueError:
            for part in tokens:
                part.release()
            raise
        self.trackers = [PromptTracker.of(part) for part in tokens]
        self._tokens = [weakref.ref(part) for part in tokens]
        self._versions: list[dict[str, int]] = [{} for _ in tokens]

    @property
    def tokens(self) -> list[PlaceholderTokens]:
        """The placeholder tokens of the text encoders that are still there."""
        return [tokens for reference in self._tokens if (tokens := reference()) is not None]

    @property
    def is_alive(self) -> bool:
        """Whether all of its text encoders are still there; otherwise it only recognises what they have encoded."""
        return len(self.tokens) == len(self.trackers)

    def is_of(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> bool:
        """Return whether it connects these tokenizers and text encoders."""
        pairs = [(id(tokens.tokenizer), id(tokens.text_encoder)) for tokens in self.tokens]
        return pairs == [(id(a), id(b)) for a, b in zip(tokenizers, text_encoders, strict=True)]

    def copy_for(self, owner: Hashable) -> "Connection":
        """Return a connection of another registry to the same text encoders, which knows no token yet."""
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        copied.owner, copied._versions = weakref.ref(owner), [{} for _ in self.trackers]
        return copied

    def check(self, concept: PerfusionConcept) -> None:
        """Raise ValueError if a text encoder cannot learn the placeholder token of a concept."""
        try:
            # A pipeline without an optional text encoder, the last, takes concepts of one that has it.
            if len(concept.token_embeddings) not in (len(self.tokens), len(self.layout)):
                raise ValueError(
                    f"{concept.placeholder_token!r} has {len(concept.token_embeddings)} token embeddings, but this "
                    f"pipeline has {len(self.tokens)} text encoders; the concept was trained on another model"
                )
            for tokens, embedding in zip(self.tokens, concept.token_embeddings, strict=False):
                tokens.check(self.owner(), concept.placeholder_token, embedding, concept.superclass)
        except ValueError:
            for tokens in self.tokens:
                tokens.release()
            raise

    def add(self, concept: PerfusionConcept) -> None:
        """Let the text encoders know the placeholder token of a concept that was checked."""
        token = concept.placeholder_token
        for tokens, versions, embedding in zip(self.tokens, self._versions, concept.token_embeddings, strict=False):
            versions[token] = tokens.add(self.owner(), token, embedding, concept.superclass)

    def remove(self, token: str) -> None:
        """Take a placeholder token from the text encoders that are still there."""
        for tokens in self.tokens:
            tokens.remove(self.owner(), token)
        for versions in self._versions:
            versions.pop(token, None)

    def recognise(self, row: Tensor, tokens: Sequence[str]) -> Row | None:
        """Return the prompts of a row; None if it is not recognised.

        Args:
            row: of hidden states, `(length, width)`, or a pooled vector, `(width,)`.
            tokens: placeholder tokens that the row may hold. A prompt that was encoded before one of them was loaded,
                although it has the token in its text, is not recognised.
        """
        found: list[Prompt | None] = []
        for place, tracker, versions in zip_longest(self.layout, self.trackers, self._versions):
            part = place.of(row)
            prompt = None if part is None or tracker is None else tracker.memory.find(part)
            # Zeros stand for a text encoder that the pipeline does without.
            if part is not None and prompt is None and part.any():
                return None
            if prompt is not None and any(_is_missed(prompt, token, versions) for token in tokens):
                return None
            found.append(prompt)
        return Row(found, self.trackers, self.layout)


def _is_missed(prompt: Prompt, token: str, versions: Mapping[str, int]) -> bool:
    """Return whether a prompt has a token in its text, but was encoded without the embedding that it has now."""
    return prompt.versions.get(token) != versions.get(token) and "".join(token.split()).lower() in prompt.text
