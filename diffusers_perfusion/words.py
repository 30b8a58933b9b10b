"""The concept word: how tokenizers and text encoders come to know it, and which encodings hold it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from .text import embedding_table, states_of, superclass_ids

# Called with an encoding, the concept words in it, and its twin.
OnEncoding = Callable[[Tensor, tuple[str, ...], Tensor | None], None]


class ConceptWords:
    """The concept words that one tokenizer and one text encoder know, besides those they were made with.

    The tokenizer gets a token for each word and the embedding layer a hook that puts `v*` in its place: the embedding
    table neither grows nor gets gradients. `disable` gives both back exactly as they were.

    Args:
        tokenizer: of the pipeline; it is changed in place, so every pipeline that shares it sees the words.
        text_encoder: of the pipeline.
        layer: the hidden state that the pipeline takes from it, as in `TextEncoders`.

    Attributes:
        on_encoding: called for each encoding made of a prompt with concept words, with the encoding `(length, d)`, the
            words in it and, while `twins` is set, its super-category twin `(length, d)`.
        twins: whether prompts are encoded a second time with the super-category in place of each concept word, which
            global key-locking needs.
        clip_skip: how many layers before the usual one the pipeline takes encodings from; None for the usual one.
        max_length: how many tokens it takes of an encoding, the first and the last ones; None for all.
    """

    def __init__(self, tokenizer: Any, text_encoder: PreTrainedModel, layer: int | None = None):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.layer = layer
        self.on_encoding: OnEncoding | None = None
        self.twins = False
        self.clip_skip: int | None = None
        self.max_length: int | None = None
        self._words: dict[str, tuple[Tensor, list[int]]] = {}
        self._ids: dict[int, str] = {}
        self._handles: list[Any] = []
        # Of the call that the text encoder is in.
        self._input_ids: Tensor | None = None
        self._attention_mask: Tensor | None = None
        self._placed = False
        # A tokenizer can learn a token but not forget one. Its whole state is therefore held twice, with the concept
        # words and without, and put in and out of the one object that everybody shares.
        self._plain: dict[str, Any] | None = None
        self._extended: dict[str, Any] | None = None

    @property
    def enabled(self) -> bool:
        """Whether the words are in place."""
        return self._plain is not None

    def check_new(self, word: str) -> None:
        """Raise ValueError if `word` cannot become a concept word, because it is one already or is plain language."""
        if word in self._words:
            raise ValueError(
                f"{word!r} is the word of a concept that is loaded already; give this one another with "
                "placeholder_token="
            )
        if len(self.tokenizer.tokenize(word)) == 1:
            raise ValueError(
                f"{word!r} is already a word of the tokenizer, so it cannot stand for a concept; choose another with "
                "placeholder_token=, such as '<my-cat>'"
            )

    def check(self, word: str, embedding: Tensor, superclass: str) -> None:
        """Raise ValueError if a word cannot be taught: see `add`."""
        self.check_new(word)
        superclass_ids(self.tokenizer, superclass)
        width = embedding_table(self.text_encoder).shape[1]
        if len(embedding) != width:
            raise ValueError(
                f"the word embedding of {word!r} has {len(embedding)} numbers, but those of this text encoder "
                f"({type(self.text_encoder).__name__}) have {width}; the concept was made for another text encoder"
            )

    def add(self, word: str, embedding: Tensor, superclass: str) -> None:
        """Teach a word. `embedding` may be a parameter: gradients flow to it alone.

        Raises:
            ValueError: if the word is taken, the super-category unknown, or the embedding of another width.
        """
        self.check(word, embedding, superclass)
        self._renew(self._words | {word: (embedding, superclass_ids(self.tokenizer, superclass))})

    def remove(self, word: str) -> None:
        """Forget a word."""
        self._renew({other: entry for other, entry in self._words.items() if other != word})

    def enable(self) -> None:
        """Put the words in place. Does nothing if they are."""
        if self.enabled or not self._words:
            return
        if self._extended is None:
            self._extend()
        self._plain = self.tokenizer.__dict__
        self.tokenizer.__dict__ = self._extended
        shape = embedding_table(self.text_encoder).shape
        self._handles = [
            self.text_encoder.register_forward_pre_hook(self._hide, with_kwargs=True),
            self.text_encoder.register_forward_hook(self._report),
            # T5 has two modules with the one table, and looks up in that which `get_input_embeddings` does not give.
            *(
                module.register_forward_hook(self._put_embeddings)
                for module in self.text_encoder.modules()
                if isinstance(module, nn.Embedding) and (module.num_embeddings, module.embedding_dim) == shape
            ),
        ]

    def disable(self) -> None:
        """Give the tokenizer and the text encoder back as they were. Does nothing if they are.

        Raises:
            ValueError: if somebody else has added tokens in between; they have ids behind ours and cannot stay.
        """
        if self._plain is None:
            return
        if foreign := sorted(set(self.tokenizer.get_added_vocab()) - self._added):
            raise ValueError(
                f"the tokens {', '.join(foreign)} were added to the tokenizer after the concepts were loaded, and "
                "would be lost; unload them first (unload_textual_inversion), or load them before the concepts"
            )
        self.tokenizer.__dict__ = self._plain
        self._plain = None
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The tokenizer and the text encoder as they were, for others to change; the words come back behind theirs.

        Raises:
            ValueError: as `disable`.
        """
        enabled = self.enabled
        self.disable()
        try:
            yield
        finally:
            self._extended = None
            if enabled:
                self.enable()

    def positions(self, input_ids: Tensor, word: str) -> Tensor:
        """Where a word stands: the index of its first token in each row, `(batch,)`."""
        token_id = next(i for i, known in self._ids.items() if known == word)
        return (input_ids == token_id).int().argmax(-1)

    def _renew(self, words: dict[str, tuple[Tensor, list[int]]]) -> None:
        """Take other words in place of those so far, or if these cannot be taken away change nothing."""
        with self.aside():
            self._words = words

    def _extend(self) -> None:
        extended = _copy(self.tokenizer)
        # Not normalized, or a tokenizer that lower-cases would never meet a word with capitals. With the space before
        # it, which is a token of its own to some.
        tokens = [
            AddedToken(word, normalized=False, lstrip=True, single_word=word[0].isalnum() and word[-1].isalnum())
            for word in self._words
        ]
        extended.add_tokens(tokens)
        self._ids = dict(zip(extended.convert_tokens_to_ids(list(self._words)), self._words, strict=True))
        self._known = torch.tensor(list(self._ids))
        self._added = set(extended.get_added_vocab())
        self._extended = extended.__dict__

    def _mask(self, input_ids: Tensor) -> Tensor:
        self._known = self._known.to(input_ids.device)
        return torch.isin(input_ids, self._known)

    def _hide(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the text encoder: concept words look like the token 0.

        The table has no row for them, and some text encoders take the highest id for the end of the prompt.
        """
        self._input_ids = ids = kwargs.get("input_ids", args[0] if args else None)
        self._placed = False
        self._attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if ids is None:
            return None
        hidden = ids.masked_fill(self._mask(ids), 0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": hidden})

    def _put_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the embedding layer: `v*` in the place of what was looked up for concept words."""
        if self._input_ids is None:
            return output
        self._placed = True
        ids = self._input_ids.to(output.device)
        scale = getattr(module, "embed_scale", 1.0)  # of Gemma
        for token_id, word in self._ids.items():
            embedding = self._words[word][0].to(output) * scale
            output = torch.where((ids == token_id).unsqueeze(-1), embedding, output)
        return output

    @torch.no_grad()
    def _report(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the text encoder: tell which of the encodings it made hold concept words."""
        input_ids, self._input_ids = self._input_ids, None
        if input_ids is not None and not self._placed and self._mask(input_ids).any():
            raise RuntimeError(
                f"{type(module).__name__} encodes a prompt without looking up embeddings in its table, so the words "
                "of concepts would be lost; load concepts on a pipeline whose text encoder does"
            )
        if input_ids is None or self.on_encoding is None:
            return
        rows = self._mask(input_ids).any(-1).nonzero()[:, 0].tolist()
        if not rows:
            return
        ids = input_ids.tolist()
        words = [tuple(word for token_id, word in self._ids.items() if token_id in ids[row]) for row in rows]
        twins: Sequence[Sequence[Tensor | None] | Tensor] = [[None] * len(rows)] * 2
        if self.twins:
            mask = None if self._attention_mask is None else self._attention_mask[rows]
            twins = self._twin_encodings([ids[row] for row in rows], mask, input_ids.device)
        for encodings, their_twins in zip(self._encodings(output), twins, strict=False):
            for row, held, twin in zip(rows, words, their_twins, strict=True):
                self.on_encoding(self._cut(encodings[row]), held, None if twin is None else self._cut(twin))

    def _encodings(self, output: Any) -> list[Tensor]:
        """Of what the text encoder returned, what the pipeline may take, `(batch, length, d)` each.

        That is the usual layer's, since no layer is skipped of negative prompts, and the one that `clip_skip` leads
        to. Without the hidden states it was called for something else.
        """
        taken = []
        if self.layer is None or output.hidden_states is not None:
            taken.append(states_of(output, self.layer))
        if self.clip_skip is not None and output.hidden_states is not None:
            if self.layer is not None:
                taken.append(states_of(output, self.layer - self.clip_skip))
            else:  # the last layer's norm comes after whichever it takes
                transformer: Any = getattr(self.text_encoder, "text_model", self.text_encoder)
                taken.append(transformer.final_layer_norm(states_of(output, -1 - self.clip_skip)))
        return taken

    def _cut(self, encoding: Tensor) -> Tensor:
        """What the pipeline takes of an encoding `(length, d)`."""
        if self.max_length is None or len(encoding) <= self.max_length:
            return encoding
        return torch.cat([encoding[:1], encoding[1 - self.max_length :]])

    def _twin_encodings(self, rows: list[list[int]], mask: Tensor | None, device: torch.device) -> list[Tensor]:
        """As `_encodings`, of prompts with the super-category in place of each concept word, `(len(rows), length, d)`.

        `mask` is one for tokens and zero for padding, which begins after them, or None.

        A super-category of several tokens makes the twin longer than the prompt. The encodings are gathered so that
        position `p` of the twin belongs to position `p` of the prompt, a concept word to the super-category's last
        token, because attention takes a key and its value from the same position.
        """
        twins, gather, added = [], [], []
        for row in rows:
            twin: list[int] = []
            index = []
            for token_id in row:
                twin += self._words[self._ids[token_id]][1] if token_id in self._ids else [token_id]
                index.append(min(len(twin), len(row)) - 1)
            twins.append([*twin[: len(row) - 1], row[-1]])
            gather.append(index)
            added.append(len(twin) - len(row))
        if mask is not None:
            longer = mask.sum(-1, keepdim=True) + torch.tensor(added, device=mask.device)[:, None]
            mask = (torch.arange(mask.shape[1], device=mask.device) < longer).to(mask)
        output = self.text_encoder(
            torch.tensor(twins, device=device),
            attention_mask=mask,
            output_hidden_states=self.layer is not None or self.clip_skip is not None,
        )
        return [
            torch.stack([encoding[torch.tensor(index)] for encoding, index in zip(encodings, gather, strict=True)])
            for encodings in self._encodings(output)
        ]


def _copy(tokenizer: Any) -> Any:
    """A tokenizer that learns words without the other; the vocabulary, which takes longest to copy, is shared."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return copy.deepcopy(tokenizer)
    twin = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(twin, part, getattr(backend, part))
    if backend.truncation is not None:
        twin.enable_truncation(**backend.truncation)
    if backend.padding is not None:
        twin.enable_padding(**backend.padding)
    twin.encode_special_tokens = backend.encode_special_tokens
    for _, token in sorted(backend.get_added_tokens_decoder().items()):  # in the order that gives them the same ids
        add = twin.add_special_tokens if token.special else twin.add_tokens
        add([token])
    copied = copy.copy(tokenizer)
    copied._tokenizer = twin
    return copied
