"""`PerfusionState`: the concepts loaded on one model, and the edit that its layers read.

It hangs on the model, because that is what pipelines share with each other and what outlives them.
"""

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from .concept import PerfusionConcept
from .editing import ParallelConceptsError, gates
from .vocabulary import Vocabulary

logger = logging.get_logger(__name__)

Locking = Literal["local", "global"]

# A pipeline casts an encoding at most from and to these on its way to the model.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# How many of the last encodings are known again: a few hundred bytes each, and with global key-locking a twin each.
_MAX_MARKS = 10_000 * len(_DTYPES)
_MAX_TWINS = 100 * len(_DTYPES)


@dataclass
class LoadedConcept:
    """A concept and the settings it is generated with.

    Attributes:
        concept: what was loaded.
        bias: `β`, a 0-dim float32 tensor.
        temperature: `τ`, a 0-dim float32 tensor.
    """

    concept: PerfusionConcept
    bias: Tensor
    temperature: Tensor


class Made(NamedTuple):
    """Keys or values of a layer, and what they were made of.

    Attributes:
        encodings: what the layer was called with.
        version: of all other tensors, and of the output itself, which somebody may have changed in place.
        output: the keys or values.
    """

    encodings: Tensor
    version: tuple[Any, ...]
    output: Tensor


@dataclass(frozen=True)
class Edit:
    """What every layer needs to edit one batch of text encodings.

    Attributes:
        concepts: the `J` concepts in it.
        target_input: `i_j`, `(J, d)`.
        superclass_input: `i_super` of each concept, `(J, d)`.
        coef: as `editing.gates`, `(batch, length, J)`; zero for a concept whose word is not in the row's prompt.
        gate: likewise.
        keys: encodings that feed every K projection instead, `(batch, length, d)`; None for local key-locking.
        made: the keys and values that its layers have made with it, by layer and projection.
    """

    concepts: tuple[PerfusionConcept, ...]
    target_input: Tensor
    superclass_input: Tensor
    coef: Tensor
    gate: Tensor
    keys: Tensor | None
    made: dict[tuple[str, str], Made] = field(default_factory=dict)


class PerfusionState:
    """Which concepts a model has, which are active, and the edit for the text encoding it works on.

    Args:
        words: where the concepts' words are known; it reports the encodings that hold them.

    Attributes:
        words: as given.
        loaded: concepts by name.
        active: names of those that edit, in the order they were activated.
        enabled: whether anything is edited at all.
        layers: the cross-attention layers of the model that it hangs on, by module name.
        projection: of that model, what it passes encodings through, one after the other, before its layers get them.
        edit: for the current text encoding; None if no row of it holds an active concept's word.
    """

    def __init__(self, words: Vocabulary) -> None:
        self.words = words
        words.listen(self.mark)
        self.loaded: dict[str, LoadedConcept] = {}
        self.active: list[str] = []
        self.enabled = True
        self.layers: dict[str, Any] = {}
        self.projection: tuple[nn.Module, ...] = ()
        self.edit: Edit | None = None
        self._words_of: dict[bytes, tuple[str, ...]] = {}
        self._twin_of: dict[bytes, Tensor] = {}
        self._source: tuple[weakref.ref[Tensor], int | None] | None = None
        self._unseen: tuple[str, ...] = ()

    @property
    def locking(self) -> Locking:
        """`local`, or `global`: the keys of the whole prompt from its super-category twin (paper Section 4)."""
        return "global" if self.words.twins else "local"

    @locking.setter
    def locking(self, locking: Locking) -> None:
        self.words.twins = locking == "global"

    def refresh(self) -> None:
        """Forget the current edit, because a setting it came from has changed."""
        self.edit = None
        self._source = None

    def mark(self, encoding: Tensor, words: tuple[str, ...], twin: Tensor | None) -> None:
        """Remember that the text encoding `(length, d)` of one text encoder is of a prompt with these concept words.

        A pipeline repeats, concatenates and casts encodings before the UNet gets them, and a user may keep them for
        another call, so they are known again by their content.
        """
        active = {self.loaded[name].concept.placeholder_token for name in self.active}
        if idle := [word for word in words if word not in active]:
            logger.warning(f"{', '.join(idle)} in a prompt is not active, so it is not applied; see set_perfusion().")
        for dtype in _DTYPES:
            digest = _digest(encoding.to(dtype))
            _remember(self._words_of, digest, words, _MAX_MARKS)
            if twin is not None:
                _remember(self._twin_of, digest, twin, _MAX_TWINS)
        self._unseen = tuple(word for word in words if word in active)

    def prepare(self, encodings: Tensor, words: Sequence[tuple[str, ...]] | None = None) -> None:
        """Make the edit for a batch of text encodings, unless it is the batch of the current edit.

        Args:
            encodings: `(batch, length, d)`.
            words: the concept words in each row's prompt, where the caller knows; otherwise they are looked up among
                the encodings that were marked.

        Raises:
            ValueError: if concepts in one prompt are nearly parallel, or a prompt has no twin for global key-locking.
        """
        version = version_of(encodings)
        if self._source is not None and self._source[0]() is encodings and self._source[1] == version:
            return
        self.refresh()
        if self.enabled and self.active:
            words = [self._words_in(row) for row in encodings] if words is None else words
            self.edit = self._make_edit(encodings, words)
        self._source = (weakref.ref(encodings), version)

    def _words_in(self, encoding: Tensor) -> tuple[str, ...]:
        """The concept words in the prompts that an encoding `(length, d)` was made of."""
        parts = encoding.split(self.words.widths, -1)
        return tuple(word for part in parts for word in self._words_of.get(_digest(part), ()))

    def _project(self, encodings: Tensor) -> Tensor:
        """What the layers get for some encodings."""
        for part in self.projection:
            encodings = part.forward(encodings)  # past the hooks on it, one of which has called this
        return encodings

    def _make_edit(self, states: Tensor, words: Sequence[tuple[str, ...]]) -> Edit | None:
        by_word = {self.loaded[name].concept.placeholder_token: name for name in self.active}
        rows_of: dict[tuple[str, ...], list[int]] = {}
        for row, held in enumerate(words):
            if names := tuple(sorted({by_word[word] for word in held if word in by_word})):
                rows_of.setdefault(names, []).append(row)
        if not rows_of:
            self._warn_unseen()
            return None
        self._unseen = ()
        encodings = self._project(states)
        # By name, so that the order in which they were loaded or stand in a prompt does not change a bit.
        order = sorted({name for names in rows_of for name in names})
        entries = [self.loaded[name] for name in order]
        for entry in entries:
            if entry.concept.target_input.device != encodings.device:
                entry.concept = entry.concept.to(encodings.device)
            entry.bias, entry.temperature = entry.bias.to(encodings.device), entry.temperature.to(encodings.device)
        target_input = torch.stack([entry.concept.target_input.float() for entry in entries])
        inverse = torch.stack([entry.concept.inverse_target_input.float() for entry in entries])
        bias = torch.stack([entry.bias for entry in entries])
        temperature = torch.stack([entry.temperature for entry in entries])

        dtype = torch.promote_types(encodings.dtype, torch.float32)
        coef = torch.zeros((*encodings.shape[:2], len(order)), dtype=dtype, device=encodings.device)
        gate = torch.zeros_like(coef)
        for names, rows in rows_of.items():
            # Not as an index if it is all, for an accelerator is waited for until it has that.
            at = slice(None) if len(rows) == len(encodings) else rows
            j = slice(None) if len(names) == len(order) else [order.index(name) for name in names]
            try:
                found = gates(encodings[at], target_input[j], inverse[j], bias[j], temperature[j])
            except ParallelConceptsError as error:
                first, second = (names[k] for k in error.pair)
                raise ValueError(
                    f"the concepts {first!r} and {second!r} have nearly parallel target inputs (cosine "
                    f"{error.cosine:.4f}), so they cannot be told apart in one prompt; use one of them, or fit one "
                    "anew with another super-category"
                ) from error
            for whole, part in zip((coef, gate), found, strict=True):
                of_rows = whole[at]
                of_rows[..., j] = part
                whole[at] = of_rows
        return Edit(
            concepts=tuple(entry.concept for entry in entries),
            target_input=target_input,
            superclass_input=torch.stack([entry.concept.superclass_input.float() for entry in entries]),
            coef=coef,
            gate=gate,
            keys=self._project(self._twins(states, [row for rows in rows_of.values() for row in rows]))
            if self.locking == "global"
            else None,
        )

    def _twins(self, encodings: Tensor, rows: Sequence[int]) -> Tensor:
        """The encodings with some rows replaced by their super-category twins."""
        keys = encodings.clone()
        for row in rows:
            keys[row] = torch.cat([self._twin(part) for part in encodings[row].split(self.words.widths, -1)], -1)
        return keys

    def _twin(self, encoding: Tensor) -> Tensor:
        """The twin of one text encoder's encoding `(length, d)`: itself, if no concept word was in its prompt."""
        digest = _digest(encoding)
        if digest not in self._words_of:
            return encoding
        if digest not in self._twin_of:
            raise ValueError(
                "global key-locking needs the prompt's super-category twin, which is encoded with the prompt; "
                "encode the prompt after set_perfusion(locking='global'), or of what was weighted or mixed, which has "
                "no twin, lock the keys with set_perfusion(locking='local')"
            )
        return self._twin_of[digest].to(encoding)

    def _warn_unseen(self) -> None:
        if self._unseen:
            logger.warning(
                f"A prompt with {', '.join(self._unseen)} was encoded, but its encoding has not reached the model as "
                "it was made, so no concept is applied. Those that were weighted, mixed or cut are not recognised; "
                "pass them to mark_perfusion() first."
            )
            self._unseen = ()


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None for those of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def _remember(store: dict[bytes, Any], key: bytes, value: Any, limit: int) -> None:
    """Put a value last in a store, and drop the first ones over its limit."""
    store.pop(key, None)
    store[key] = value
    while len(store) > limit:
        del store[next(iter(store))]


def _digest(encoding: Tensor) -> bytes:
    """Content of an encoding, with its dtype, in 16 bytes."""
    data = encoding.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=16, salt=str(encoding.dtype)[6:22].encode()).digest()
