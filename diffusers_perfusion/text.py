"""The concept word: how a tokenizer and a text encoder come to know it, and which encodings hold it."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

# The super-category is encoded in these, and a concept is fitted in these with its word in the gap.
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a {}",
    "the photo of a {}",
    "a good photo of a {}",
)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids padded to the tokenizer's full length, as diffusers pads a prompt: `(len(prompts), length)`."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def embedding_table(text_encoder: PreTrainedModel) -> Tensor:
    """The input embeddings of a text encoder, `(vocabulary, d_word)`."""
    return text_encoder.get_input_embeddings().weight  # type: ignore[return-value]


def encode(text_encoder: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Text encodings of token ids as the UNet gets them: `(batch, length, d)`."""
    return text_encoder(input_ids.to(embedding_table(text_encoder).device))[0]


def superclass_ids(tokenizer: Any, superclass: str) -> list[int]:
    """Token ids of a super-category, one or several.

    Raises:
        ValueError: if the tokenizer drops it or does not know it, or it leaves no room in a prompt.
    """
    ids = tokenizer(superclass, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"the tokenizer does not know the super-category {superclass!r}; choose another word for it")
    if len(ids) > (limit := tokenizer.model_max_length // 2):
        raise ValueError(f"the super-category {superclass!r} is {len(ids)} tokens long; expected at most {limit}")
    return ids


@torch.no_grad()
def superclass_input(tokenizer: Any, text_encoder: PreTrainedModel, superclass: str) -> Tensor:
    """`i_super`: the encoding at the last token of the super-category, averaged over `TEMPLATES`, `(d,)`.

    Raises:
        ValueError: if the tokenizer drops the super-category or does not know it.
    """
    wanted = torch.tensor(superclass_ids(tokenizer, superclass))
    ids = tokenize(tokenizer, [template.format(superclass) for template in TEMPLATES])
    last = [int((row.unfold(0, len(wanted), 1) == wanted).all(-1).nonzero()[-1, 0]) + len(wanted) - 1 for row in ids]
    return encode(text_encoder, ids)[torch.arange(len(ids)), last].mean(0)


def initial_word_embedding(tokenizer: Any, text_encoder: PreTrainedModel, superclass: str) -> Tensor:
    """Where `v*` starts: the input embedding of the super-category's last token, `(d_word,)`."""
    return embedding_table(text_encoder)[superclass_ids(tokenizer, superclass)[-1]].detach().clone()


class ConceptWords:
    """The concept words that one tokenizer and one text encoder know, besides those they were made with.

    The tokenizer gets a token for each word and the embedding layer a hook that puts `v*` in its place: the embedding
    table neither grows nor gets gradients. `disable` gives both back exactly as they were.

    Args:
        tokenizer: of the pipeline; it is changed in place, so every pipeline that shares it sees the words.
        text_encoder: of the pipeline.

    Attributes:
        on_encoding: called for each encoding made of a prompt with concept words, with the encoding `(length, d)`, the
            words in it and, while `twins` is set, its super-category twin `(length, d)`.
        twins: whether prompts are encoded a second time with the super-category in place of each concept word, which
            global key-locking needs.
    """

    def __init__(self, tokenizer: Any, text_encoder: PreTrainedModel):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.on_encoding: Callable[[Tensor, tuple[str, ...], Tensor | None], None] | None = None
        self.twins = False
        self._words: dict[str, tuple[Tensor, list[int]]] = {}
        self._ids: dict[int, str] = {}
        self._handles: list[Any] = []
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

    def add(self, word: str, embedding: Tensor, superclass: str) -> None:
        """Teach a word. `embedding` may be a parameter: gradients flow to it alone.

        Raises:
            ValueError: if the word is taken, the super-category unknown, or the embedding of another width.
        """
        self.check_new(word)
        width = embedding_table(self.text_encoder).shape[1]
        if len(embedding) != width:
            raise ValueError(
                f"the word embedding of {word!r} has {len(embedding)} numbers, but those of this text encoder "
                f"({type(self.text_encoder).__name__}) have {width}; the concept was made for another text encoder"
            )
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
        embeddings = self.text_encoder.get_input_embeddings()
        looked_up: list[Tensor] = []

        def hide_words(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # The table has no row for a concept word: look up row 0, and replace what comes out.
            looked_up[:] = [args[0]]
            return (args[0].masked_fill(self._mask(args[0]), 0), *args[1:])

        def put_embeddings(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = looked_up.pop()
            for token_id, word in self._ids.items():
                vector = self._words[word][0].to(output)
                output = torch.where((ids == token_id).unsqueeze(-1), vector, output)
            return output

        self._handles = [
            embeddings.register_forward_pre_hook(hide_words),
            embeddings.register_forward_hook(put_embeddings),
            self.text_encoder.register_forward_hook(self._report, with_kwargs=True),
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
        extended = copy.deepcopy(self.tokenizer)
        # Not normalized, or a tokenizer that lower-cases would never meet a word with capitals.
        tokens = [
            AddedToken(word, normalized=False, single_word=word[0].isalnum() and word[-1].isalnum())
            for word in self._words
        ]
        extended.add_tokens(tokens)
        self._ids = dict(zip(extended.convert_tokens_to_ids(list(self._words)), self._words, strict=True))
        self._added = set(extended.get_added_vocab())
        self._extended = extended.__dict__

    def _mask(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids, torch.tensor(list(self._ids), device=input_ids.device))

    @torch.no_grad()
    def _report(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the text encoder: tell which of the encodings it made hold concept words."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None or self.on_encoding is None:
            return
        rows = self._mask(input_ids).any(-1).nonzero()[:, 0].tolist()
        if not rows:
            return
        ids = input_ids.tolist()
        twins = (
            self._twin_encodings([ids[row] for row in rows], input_ids.device) if self.twins else [None] * len(rows)
        )
        for row, twin in zip(rows, twins, strict=True):
            words = tuple(word for token_id, word in self._ids.items() if token_id in ids[row])
            self.on_encoding(output[0][row], words, twin)

    def _twin_encodings(self, rows: list[list[int]], device: torch.device) -> Tensor:
        """Encodings of prompts with the super-category in place of each concept word, `(len(rows), length, d)`.

        A super-category of several tokens makes the twin longer than the prompt. The encodings are gathered so that
        position `p` of the twin belongs to position `p` of the prompt, a concept word to the super-category's last
        token, because attention takes a key and its value from the same position.
        """
        twins, gather = [], []
        for row in rows:
            twin: list[int] = []
            index = []
            for token_id in row:
                twin += self._words[self._ids[token_id]][1] if token_id in self._ids else [token_id]
                index.append(min(len(twin), len(row)) - 1)
            twins.append([*twin[: len(row) - 1], row[-1]])
            gather.append(index)
        encodings = self.text_encoder(torch.tensor(twins, device=device))[0]
        return torch.stack(
            [e[i] for e, i in zip(encodings, torch.tensor(gather, device=encodings.device), strict=True)]
        )
