"""`PromptTracker`: which rows of which hidden states hold which placeholder tokens, and at which positions.

A pipeline repeats, concatenates, casts and cuts the rows that a text encoder returns before its model gets them, and a
user may keep them for another call. So a row is recognised by its content: a digest of its numbers. What changes the
numbers themselves (weighting, mixing, concatenating prompts along the length) makes another row, which nobody
recognises.
"""

import hashlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import Any

import torch
from torch import Tensor

from .model_families.base import embedding_table
from .placeholder_tokens import PlaceholderTokens, SuperclassPrompt

# How many prompts are remembered, of a few hundred bytes each, and for how many the super-class prompt's hidden
# states, as long as these are no more bytes: T5-XXL has 4 MB of them for a prompt in half precision, CLIP 0.2 MB.
MAX_PROMPTS = 10_000
MAX_SUPERCLASS_PROMPTS = 100
MAX_SUPERCLASS_BYTES = 2**27

# A row may be rounded to one of these on its way to the model, and then to another.
_ROUNDINGS: tuple[tuple[torch.dtype, ...], ...] = (
    (),
    (torch.float16,),
    (torch.bfloat16,),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt that a text encoder encoded, and which of its hidden states a pipeline uses.

    Attributes:
        tokens: positions of each placeholder token in the row that the model gets; empty for a prompt without any.
            Without positions where only the user knows what is in a row.
        superclass: the super-class prompt; None where only the user knows what is in a row.
        replaced: whether the model gets the super-class prompt instead, as under joint attention.
        attention_mask: `(length,)`, or None.
        clip_skip: as in `ModelFamily.possible_hidden_states`.
        kept: the positions of the super-class prompt in the text encoder's output that belong to the row, or that the
            pipeline keeps of it where that replaces the row.
        choice: which of the possible hidden states this row is from.
        text: of the whole prompt, as `PlaceholderTokens.text` returns it.
        versions: of the embeddings that all placeholder tokens had then, as `PlaceholderTokens.versions` returns them.
    """

    tokens: Mapping[str, tuple[int, ...]]
    superclass: SuperclassPrompt | None = None
    replaced: bool = False
    attention_mask: Tensor | None = None
    clip_skip: int | None = None
    kept: tuple[int, ...] = ()
    choice: int = 0
    text: str = ""
    versions: Mapping[str, int] = field(default_factory=dict)


class RowMemory:
    """Remembers prompts by the rows of hidden states that were computed from them."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, Prompt] = {}

    def remember(self, row: Tensor, prompt: Prompt) -> None:
        """Remember the prompt of a row of hidden states `(length, width)`, or of a pooled vector `(width,)`.

        It is remembered in every precision that a pipeline may round it to.
        """
        row = row.detach().cpu()
        for roundings in _ROUNDINGS:
            rounded = row
            for dtype in roundings:
                rounded = rounded.to(dtype)
            key = _digest(rounded)
            self._prompts.pop(key, None)
            self._prompts[key] = prompt
        while len(self._prompts) > MAX_PROMPTS * len(_ROUNDINGS):
            del self._prompts[next(iter(self._prompts))]

    def find(self, row: Tensor) -> Prompt | None:
        """Return the prompt of a row or pooled vector, or None if it is not recognised."""
        return self._prompts.get(_digest(row))


class PromptTracker:
    """Remembers the prompts that one text encoder encodes while placeholder tokens are attached, plain ones included.

    Args:
        tokens: of the text encoder.
    """

    def __init__(self, tokens: PlaceholderTokens):
        self.family = tokens.family
        self.memory = RowMemory()
        self._tokens = weakref.ref(tokens)  # rows outlive a text encoder that the user has freed
        self._call = local()
        self._superclass_prompts: dict[Prompt, Tensor] = {}
        tokens.listeners.append(self._remember)

    @classmethod
    def of(cls, tokens: PlaceholderTokens) -> "PromptTracker":
        """Return the tracker of a text encoder, the same object at every call."""
        for listener in tokens.listeners:
            if isinstance(tracker := getattr(listener, "__self__", None), cls):
                return tracker
        return cls(tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remember nothing that this thread encodes in the body of the statement."""
        before = getattr(self._call, "paused", False)
        self._call.paused = True
        try:
            yield
        finally:
            self._call.paused = before

    @contextmanager
    def taking(self, clip_skip: int | None, max_sequence_length: int | None) -> Iterator[Counter[str]]:
        """Set which hidden states the pipeline uses of prompts that this thread encodes in the body of the statement.

        Yields:
            In how many rows of hidden states each placeholder token was found.

        Args:
            clip_skip: as in `ModelFamily.possible_hidden_states`.
            max_sequence_length: as in `ModelFamily.kept_positions`.
        """
        call = vars(self._call)
        before = dict(call)
        call |= {"clip_skip": clip_skip, "max_length": max_sequence_length, "found": Counter()}
        try:
            yield call["found"]
        finally:
            call.clear()
            call.update(before)

    def _remember(self, input_ids: Tensor, attention_mask: Tensor | None, output: Any) -> None:
        tokens = self._tokens()
        if tokens is None or getattr(self._call, "paused", False):
            return
        clip_skip = getattr(self._call, "clip_skip", None)
        max_length = getattr(self._call, "max_length", None)
        possible = self.family.possible_hidden_states(tokens.text_encoder, output, attention_mask, clip_skip)
        versions = tokens.versions()
        superclass_prompts = {}
        for number, ids in enumerate(input_ids.tolist()):
            mask = None if attention_mask is None else attention_mask[number].cpu().clone()
            if self.family.follows_length and mask is not None:
                ids = ids[: int(mask.sum())]
            kept = self.family.kept_positions(len(ids), max_length)
            if not kept:  # somebody else's text, which no pipeline gives to the model
                continue
            positions_of = tokens.positions(ids)
            replaced = self.family.joint and bool(positions_of)
            superclass = tokens.superclass_prompt(ids)
            superclass_kept = tuple(superclass.places[position] for position in kept)
            places = {position: place for place, position in enumerate(kept)}
            if replaced:
                superclass_kept = tuple(range(kept[0], superclass.places[kept[-1]] + 1))
                places = {position: place for place, position in enumerate(superclass_kept)}
                # At the end of a long prompt one may have taken the place of another that was before it.
                in_order = sorted((at, token) for token, positions in positions_of.items() for at in positions)
                last = {superclass.places[position]: token for position, token in in_order}
                positions_of = {
                    token: tuple(place for place, other in last.items() if other == token) for token in positions_of
                }
            found = {
                token: tuple(places[position] for position in positions if position in places)
                for token, positions in positions_of.items()
                if not places.keys().isdisjoint(positions)
            }
            if any(hidden_states.ndim > 2 for hidden_states in possible):
                getattr(self._call, "found", Counter()).update(Counter(found.keys()))
            text = tokens.text(ids)
            for choice, hidden_states in enumerate(possible):
                prompt = Prompt(
                    found,
                    superclass if found else None,
                    replaced,
                    mask,
                    clip_skip,
                    superclass_kept,
                    choice,
                    text,
                    versions,
                )
                row = hidden_states[number]
                self.memory.remember(row if row.ndim == 1 else row[list(kept)], prompt)
                if found:
                    superclass_prompts[prompt] = superclass
        if superclass_prompts:  # now, when an offloaded text encoder is where it computes
            self._encode_superclass(superclass_prompts, tokens)

    def superclass_hidden_states(self, prompt: Prompt) -> Tensor | None:
        """Return the hidden states of a prompt with the super-class in place of each token, `(length, width)`.

        Or its pooled vector `(width,)`, if the prompt was recognised by that. Each position belongs to the same one of
        the prompt, as `SuperclassPrompt.places` says, unless the super-class prompt replaces it. None if nobody knows
        the prompt's tokens, or its super-class prompt is not kept any more and the text encoder is gone.
        """
        tokens, superclass = self._tokens(), prompt.superclass
        if prompt not in self._superclass_prompts and tokens is not None and superclass is not None:
            self._encode_superclass({prompt: superclass}, tokens)
        return self._superclass_prompts.get(prompt)

    @torch.no_grad()
    def _encode_superclass(self, prompts: Mapping[Prompt, SuperclassPrompt], tokens: PlaceholderTokens) -> None:
        """Encode the super-class prompts of prompts that were encoded together, and keep their hidden states."""
        table = embedding_table(tokens.text_encoder)
        device = "cpu" if table.is_meta else table.device  # hooks of an offloaded one move its inputs
        distinct = {tuple(superclass.input_ids): prompt for prompt, superclass in prompts.items()}
        # As the pipeline pads, or the last bits differ.
        old_masks = {
            prompt: prompt.attention_mask for prompt in distinct.values() if prompt.attention_mask is not None
        }
        length = max(map(len, (*distinct, *old_masks.values())))
        masks = [_mask(old, int(old.sum()) + prompts[prompt].longer, length) for prompt, old in old_masks.items()]
        mask = torch.stack(masks).to(device) if masks else None
        padding = tokens.tokenizer.pad_token_id
        ids = [[*prompt, *[padding] * (length - len(prompt))] for prompt in distinct]
        clip_skip = next(iter(prompts)).clip_skip
        with self.paused():
            output = tokens.text_encoder(
                torch.tensor(ids, device=device),
                attention_mask=mask,
                # Only where it is needed: transformers 5 leaves hooks on the layers that it was asked about.
                output_hidden_states=self.family.hidden_state_index is not None or clip_skip is not None,
            )
        possible = self.family.possible_hidden_states(tokens.text_encoder, output, mask, clip_skip)
        rows = {ids: number for number, ids in enumerate(distinct)}
        for prompt, superclass in prompts.items():
            found = possible[prompt.choice][rows[tuple(superclass.input_ids)]]
            if found.ndim > 1:
                found = found[list(prompt.kept)]
            self._superclass_prompts[prompt] = found.cpu()
        size = sum(kept.nbytes for kept in self._superclass_prompts.values())
        for oldest in [prompt for prompt in self._superclass_prompts if prompt not in prompts]:
            if len(self._superclass_prompts) <= MAX_SUPERCLASS_PROMPTS and size <= MAX_SUPERCLASS_BYTES:
                break
            size -= self._superclass_prompts.pop(oldest).nbytes


def _mask(old: Tensor, tokens: int, length: int) -> Tensor:
    """Return a mask of `(length,)` that shows so many tokens, with padding on the side where another has it."""
    shown = torch.arange(length) < tokens
    return (shown if old[0] else shown.flip(0)).to(old)


def _digest(row: Tensor) -> bytes:
    """Return a 16-byte digest of a row's values in float32."""
    data = row.detach().float().cpu().contiguous().numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()
