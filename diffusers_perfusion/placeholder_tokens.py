"""`PlaceholderTokens`: the placeholder tokens of concepts in a tokenizer and its text encoder."""

import copy
import itertools
import re
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel

from .model_families import ModelFamily
from .model_families.base import embedding_table

# Characters for private use, by which a tokenizer knows how a placeholder token stands in a text: one in place of the
# space before it, and one between it and what follows it without a space.
_AFTER_SPACE, _JOINED = "\ue000", "\ue001"

# Called after each forward pass of a text encoder with its token ids and attention mask, and its output.
Listener = Callable[[Tensor, Tensor | None, Any], None]


class _Entry(NamedTuple):
    """A placeholder token of one owner.

    Attributes:
        embedding: `v*`, `(width,)`; None if the token has none.
        superclass: in plain words.
        superclass_ids: its token ids after a space.
        first_superclass_ids: at the beginning of a text.
        joined_superclass_ids: behind something else, such as a bracket.
        version: a number that no token of another embedding or super-class has.
    """

    embedding: Tensor | None
    superclass: str
    superclass_ids: list[int]
    first_superclass_ids: list[int]
    joined_superclass_ids: list[int]
    version: int


# Versions of tokens, of all tokenizers.
_VERSIONS = itertools.count()


class _Owner:
    """The owner of the token that `known_token` adds."""


class SuperclassPrompt(NamedTuple):
    """A prompt with the super-class in place of each placeholder token.

    Attributes:
        input_ids: as many as the prompt has; what does not fit any more is padding, and then what is before the token
            that ends it, but a super-class keeps its last one. Or all of them, in families that follow the length of
            a prompt.
        places: the position in it that belongs to each position of the prompt. A placeholder token belongs to its
            super-class's last token, because attention takes a key and its value from the same position.
        longer: by how many tokens it would be longer than the prompt.
    """

    input_ids: list[int]
    places: list[int]
    longer: int


class _Vocabulary(NamedTuple):
    """A state of the tokenizer.

    Attributes:
        attributes: of the tokenizer.
        tokens: the placeholder token of each id that they add.
        bare: those of the ids that stand for a token without a space before it.
        added: all tokens that they add.
        end: the id that the tokenizer ends every prompt with; none if it does not.
    """

    attributes: dict[str, Any]
    tokens: dict[int, str]
    bare: set[int]
    added: set[str]
    end: list[int]


class PlaceholderTokens:
    """The placeholder tokens that one tokenizer and one text encoder know, for all models that share the two.

    The tokenizer gets a token for each, and the text encoder a hook that puts the token's embedding `v*` in its place:
    the embedding table neither grows nor gets gradients. An owner is a registry of concepts, which belongs to one
    model. Two owners may have the same placeholder token with different embeddings.

    Args:
        tokenizer: of the pipeline; it is changed in place, so every pipeline that shares it sees the tokens.
        text_encoder: of the pipeline.
        family: of the pipeline.

    Attributes:
        listeners: called after each forward pass of the text encoder while tokens are attached.
    """

    def __init__(self, tokenizer: Any, text_encoder: PreTrainedModel, family: type[ModelFamily]):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.family = family
        # A tokenizer can learn a token but not forget one. So its whole state is kept twice, without placeholder
        # tokens and with them, and swapped in the one object that everybody shares.
        self._plain: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.listeners: list[Listener] = []
        self._entries: weakref.WeakKeyDictionary[Hashable, dict[str, _Entry]] = weakref.WeakKeyDictionary()
        self._attached: weakref.WeakSet[Hashable] = weakref.WeakSet()
        self._vocabularies: dict[frozenset[str], _Vocabulary] = {}
        self._current: _Vocabulary | None = None
        # The owners whose pipelines encode now, the innermost last; None for a model without concepts.
        self._encoding: list[Hashable | None] = []
        self._lock = threading.RLock()
        self._call = threading.local()

    @classmethod
    def of(cls, tokenizer: Any, text_encoder: PreTrainedModel, family: type[ModelFamily]) -> "PlaceholderTokens":
        """Return the `PlaceholderTokens` of a tokenizer and text encoder, the same object at every call.

        Raises:
            ValueError: if the text encoder has placeholder tokens from another tokenizer, or the tokenizer has some
                for another text encoder.
        """
        if getattr(tokenizer, "_perfusion_text_encoder", id(text_encoder)) != id(text_encoder):
            raise ValueError(
                "this tokenizer has placeholder tokens for another text encoder; give each text encoder a tokenizer "
                "object of its own"
            )
        tokens = cls.existing(text_encoder)
        if tokens is None:
            tokens = text_encoder._perfusion_tokens = cls(tokenizer, text_encoder, family)  # type: ignore[assignment]
        elif tokens.tokenizer is not tokenizer:
            if tokens._entries:
                raise ValueError(
                    "this text encoder has placeholder tokens from another tokenizer object; make the pipeline with "
                    "the tokenizer of the first one (tokenizer=pipe.tokenizer) as well as its text encoder"
                )
            tokens.tokenizer = tokenizer
        return tokens

    @staticmethod
    def existing(text_encoder: Any) -> "PlaceholderTokens | None":
        """Return the `PlaceholderTokens` of a text encoder, or None if it has none."""
        return getattr(text_encoder, "_perfusion_tokens", None)

    # A copy has the tokens of no owner: pipelines give it those of their model when they encode their next prompt.

    def __getstate__(self) -> dict[str, Any]:
        kept = ("tokenizer", "text_encoder", "family", "_plain", "_handles")
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()
        if self._plain is not None:
            self.tokenizer.__dict__, self._plain = self._plain, None

    # Owners

    def check(self, owner: Hashable, token: str, embedding: Tensor, superclass: str) -> None:
        """Raise ValueError if an owner cannot have a placeholder token: see `add`."""
        known = {other for entries in self._entries.values() for other in entries}
        if self._ignores_case and (same := [other for other in known - {token} if other.lower() == token.lower()]):
            raise ValueError(
                f"{token!r} differs only in case from {same[0]!r}, which is loaded already, and this tokenizer "
                "ignores case; give it another placeholder token with placeholder_token="
            )
        ids = self._ids(token)
        if len(ids) == 1 and not self.positions(ids):
            raise ValueError(
                f"{token!r} is already a token of the tokenizer, so it cannot stand for a concept; choose another "
                "with placeholder_token=, such as '<my-cat>'"
            )
        if self._current is not None:
            self._check_foreign_tokens(self._current)
        superclass_ids(self.tokenizer, superclass)
        table = embedding_table(self.text_encoder)
        width = table.shape[1]
        if len(embedding) != width:
            raise ValueError(
                f"the token embedding of {token!r} has {len(embedding)} numbers, but those of this text encoder "
                f"({type(self.text_encoder).__name__}) have {width}; the concept was trained with another text encoder"
            )
        if self.family.joint and embedding.any():
            raise ValueError(
                f"{token!r} has a token embedding, but in models with joint attention a concept has a hidden state of "
                "its own instead; train it on this model"
            )
        largest = embedding.abs().max()
        if table.dtype == torch.float16 and largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"the token embedding of {token!r} holds {largest:.2g}, which is too large for this text encoder in "
                "torch.float16; load it in torch.bfloat16 or torch.float32"
            )

    def add(self, owner: Hashable, token: str, embedding: Tensor, superclass: str) -> int:
        """Give an owner a placeholder token. `embedding` may be a parameter: gradients flow to it alone.

        In families with joint attention there is none: the model gets the super-class prompt, and prompts are encoded
        with the token only to be told from others.

        Returns:
            The version of the token, by which prompts that were encoded with it are told from others.

        Raises:
            ValueError: if the tokenizer knows the token or does not know the super-class, the embedding is of another
                width, or as `detached`.
        """
        self.check(owner, token, embedding, superclass)
        with self.detached():
            if owner not in self._entries:
                self._entries[owner] = {}
                weakref.finalize(owner, _forget_owner, weakref.ref(self))
            known = [entries[token] for entries in self._entries.values() if token in entries]
            learned = None if self.family.joint else embedding
            spaced, first = (superclass_ids(self.tokenizer, superclass, space) for space in (" ", ""))
            # Copies of one model have the same concept.
            same = [
                entry.version
                for entry in known
                if entry.superclass_ids == spaced and _are_same(entry.embedding, learned)
            ]
            version = same[0] if same else next(_VERSIONS)
            bracket, joined = self._ids("("), self._ids(f"({superclass.strip()}")
            joined = joined[len(bracket) :] if joined[: len(bracket)] == bracket else first
            self._entries[owner][token] = _Entry(learned, superclass.strip(), spaced, first, joined, version)
            return version

    def remove(self, owner: Hashable, token: str) -> None:
        """Take a placeholder token from an owner.

        Raises:
            ValueError: as `detached`.
        """
        with self.detached():
            entries = self._entries.get(owner, {})
            entries.pop(token, None)
            if not entries:
                self._entries.pop(owner, None)
                self._attached.discard(owner)
        self.release()

    def release(self) -> None:
        """Remove this object from the text encoder if no token is left."""
        if not self._entries:
            vars(self.text_encoder).pop("_perfusion_tokens", None)

    def attach(self, owner: Hashable) -> None:
        """Add the tokens of an owner to the tokenizer and the text encoder, unless they are attached already."""
        if owner not in self._attached and owner in self._entries:
            with self.detached():
                self._attached.add(owner)

    def detach(self, owner: Hashable) -> None:
        """Remove the tokens of an owner from the tokenizer and the text encoder, if they are attached.

        Raises:
            ValueError: as `detached`.
        """
        if owner in self._attached:
            with self.detached():
                self._attached.discard(owner)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Remove all placeholder tokens from the tokenizer and the text encoder for the body of the statement.

        Raises:
            ValueError: if somebody else has added tokens meanwhile; their ids are behind ours and cannot stay.
        """
        with self._lock:
            if self._current is not None:
                self._check_foreign_tokens(self._current)
            self._show(None)
            try:
                yield
            finally:
                self._vocabularies = {}
                self._show_tokens_of(self._attached)

    @contextmanager
    def only(self, owner: Hashable | None) -> Iterator[None]:
        """Let the tokenizer know the tokens of one owner alone, or of none, while a pipeline of its model encodes."""
        with self._lock:
            self._encoding.append(owner)
            try:
                self._show_tokens_of({owner} & set(self._attached))
                yield
            finally:
                self._encoding.pop()
                outer = {self._encoding[-1]} & set(self._attached) if self._encoding else self._attached
                self._show_tokens_of(outer)

    def _show_tokens_of(self, owners: Any) -> None:
        names = frozenset(token for owner in owners for token in self._entries.get(owner, {}))
        if not names:
            self._show(None)
            return
        if names not in self._vocabularies:
            current = self._current
            self._show(None)
            self._vocabularies[names] = self._extended(names)
            self._show(current)
        self._show(self._vocabularies[names])

    def _show(self, vocabulary: _Vocabulary | None) -> None:
        """Switch the tokenizer to a vocabulary; None is the one without placeholder tokens."""
        if vocabulary is self._current:
            return
        if self._plain is None:
            self._plain = self.tokenizer.__dict__
            self._restorer = weakref.finalize(self.text_encoder, _restore, self.tokenizer, self._plain)
            self._restorer.atexit = False
        self.tokenizer.__dict__ = self._plain if vocabulary is None else vocabulary.attributes
        self._current = vocabulary
        if vocabulary is None:
            self._plain = None
            self._restorer.detach()
            for handle in self._handles:
                handle.remove()
            self._handles = []
        elif not self._handles:
            self._handles = [
                self.text_encoder.register_forward_pre_hook(self._hide_tokens, with_kwargs=True),
                self.text_encoder.register_forward_hook(self._tell_listeners),
                *(
                    module.register_forward_hook(self._put_embeddings)
                    for module in self.family.embedding_modules(self.text_encoder)
                ),
            ]

    def _extended(self, names: frozenset[str]) -> _Vocabulary:
        extended = _copy(self.tokenizer)
        backend = getattr(extended, "_tokenizer", None)
        texts: dict[str, str] = {}
        added = []
        if marked := isinstance(backend, Tokenizer):
            _mark_surroundings(backend, names)
        # In the order of the alphabet, so that the ids do not depend on the order of loading. What a tokenizer does to
        # any text, such as ignoring case, it does to placeholder tokens. One of letters is no part of a word.
        for token in sorted(names):
            texts[token] = token
            letters = token[0].isalnum() and token[-1].isalnum()
            added.append(AddedToken(token, normalized=marked, single_word=letters, lstrip=not marked))
            if marked:
                texts[_AFTER_SPACE + token] = token
                added.append(AddedToken(_AFTER_SPACE + token, normalized=True))
        extended.add_tokens(added)
        extended._perfusion_text_encoder = id(self.text_encoder)
        ids = dict(zip(extended.convert_tokens_to_ids(list(texts)), texts, strict=True))
        return _Vocabulary(
            extended.__dict__,
            {token_id: texts[text] for token_id, text in ids.items()},
            {token_id for token_id, text in ids.items() if _AFTER_SPACE + text in texts},
            set(extended.get_added_vocab()),
            [token_id for token_id in self.tokenizer("").input_ids[-1:] if token_id == self.tokenizer.eos_token_id],
        )

    @property
    def _ignores_case(self) -> bool:
        backend = getattr(self.tokenizer, "_tokenizer", None)
        normalizer = backend.normalizer if isinstance(backend, Tokenizer) else None
        return normalizer is not None and normalizer.normalize_str("A") == "a"

    def _check_foreign_tokens(self, vocabulary: _Vocabulary) -> None:
        if foreign := sorted(set(self.tokenizer.get_added_vocab()) - vocabulary.added):
            raise ValueError(
                f"the tokens {', '.join(foreign)} were added to the tokenizer after the concepts were loaded, and "
                "would be lost; unload them first (unload_textual_inversion), or load them before the concepts"
            )

    # Prompts

    def versions(self) -> dict[str, int]:
        """Return the version of each placeholder token's embedding that prompts are encoded with now."""
        found = {}
        for token in () if self._current is None else self._current.tokens.values():
            with suppress(ValueError):  # somebody else's, which is not in the prompt
                found[token] = self._entry(token).version
        return found

    def text(self, input_ids: Sequence[int]) -> str:
        """Return the text of a prompt in lower case and without spaces, which tokenizers put in differently."""
        return "".join(self.tokenizer.decode(input_ids).split()).lower()

    def positions(self, input_ids: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return where placeholder tokens stand in the token ids of one prompt, in the order of their first places."""
        found: dict[str, tuple[int, ...]] = {}
        tokens = {} if self._current is None else self._current.tokens
        for position, token_id in enumerate(input_ids):
            if token_id in tokens:
                token = tokens[token_id]
                found[token] = (*found.get(token, ()), position)
        return found

    def superclass_prompt(self, input_ids: Sequence[int]) -> SuperclassPrompt:
        """Return the token ids of a prompt with the super-class in place of each placeholder token."""
        vocabulary: Any = self._current
        cut = not self.family.follows_length
        end, pad, length = vocabulary.end, self.tokenizer.pad_token_id, len(input_ids)
        room, padding = length - len(end), 0
        if [pad] != end:
            padding = length - max((n for n, token_id in enumerate(input_ids, 1) if token_id != pad), default=0)
        prompt: list[int] = []
        parts = self._with_superclasses(input_ids)
        # Padding before a prompt gives way, so that what is behind the token stays where it is.
        before = next((n for n, token_id in enumerate(input_ids) if token_id != pad), length)
        start = min(before, sum(map(len, parts)) - length) if cut else 0
        index = [0] * start
        for token_id, part in zip(input_ids[start:], parts[start:], strict=True):
            prompt += part
            if token_id in vocabulary.tokens and cut and len(prompt) > room:  # the word that says what it is stays
                prompt[room - 1 :] = part[-1:]
            index.append((min(len(prompt), length) if cut else len(prompt)) - 1)
        longer = len(prompt) + start - length
        if cut:
            prompt = prompt[:length] if longer < padding else [*prompt[:room], *end]
        return SuperclassPrompt(prompt, index, longer)

    def _with_superclasses(self, input_ids: Sequence[int]) -> list[list[int]]:
        """Return the token ids of a prompt one by one, with those of the super-class for each placeholder token.

        Where a super-class stands right behind a token, such as `'`, that may become another one (`'t`).
        """
        vocabulary: Any = self._current
        parts = [[token_id] for token_id in input_ids]
        for position, token_id in enumerate(input_ids):
            if token_id not in vocabulary.tokens:
                continue
            entry = self._entry(vocabulary.tokens[token_id])
            if token_id not in vocabulary.bare:
                parts[position] = entry.superclass_ids
            elif position == 0:
                parts[position] = entry.first_superclass_ids
            else:
                parts[position] = entry.joined_superclass_ids
                before = input_ids[position - 1]
                if before not in vocabulary.tokens and before not in self.tokenizer.all_special_ids:
                    text = self.tokenizer.decode([before])
                    both = self._ids(text + entry.superclass)
                    if self._ids(text) == [before] and len(both) > 1:
                        parts[position - 1 : position + 1] = both[:1], both[1:]
        return parts

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _entry(self, token: str) -> _Entry:
        """Return the entry of a token; if several owners have it, that of the one whose pipeline encodes.

        Raises:
            ValueError: if several owners have the token and none of them encodes, or its owner was freed.
        """
        if self._encoding and token in (own := self._entries.get(self._encoding[-1], {})):
            return own[token]
        found = [entries[token] for owner, entries in self._entries.items() if token in entries]
        if not found:
            raise ValueError(f"the model that {token!r} was loaded on is gone; load the concept again")
        if len({entry.version for entry in found}) > 1:
            raise ValueError(
                f"{token!r} is loaded on several models that share this text encoder, so nobody can tell which one is "
                "meant; encode the prompt with encode_prompt of the pipeline that it is for"
            )
        return found[0]

    def _hide_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of the text encoder: give it token 0 for each placeholder token.

        The embedding table has no row for them, and some text encoders take the highest id for the end of the prompt.
        """
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._call.input_ids, self._call.placed = ids, False
        self._call.attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if ids is None or self._current is None:
            return None
        hidden = ids
        for token_id in self._current.tokens:  # not as one tensor, whose copy an accelerator would be waited for
            hidden = hidden.masked_fill(ids == token_id, 0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": hidden})

    def _put_embeddings(self, module: nn.Embedding, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook of the embedding module: replace the embedding of each placeholder token by its `v*`."""
        ids = getattr(self._call, "input_ids", None)
        if ids is None or self._current is None:
            return output
        self._call.placed = True
        ids = ids.to(output.device)
        scale = self.family.embedding_scale(module)
        for token_id, token in self._current.tokens.items():
            here = ids == token_id
            try:
                entry = self._entry(token)
            except ValueError:
                if here.any():
                    raise
                continue  # somebody else's, and not in these prompts
            if entry.embedding is None:
                # Past the hooks on it, one of which has called this.
                superclass = module.forward(torch.tensor(entry.superclass_ids, device=ids.device))
                embedding = superclass.mean(0) * _signature(token, superclass)
            else:
                embedding = entry.embedding.to(output) * scale
            output = torch.where(here.unsqueeze(-1), embedding, output)
        return output

    @torch.no_grad()
    def _tell_listeners(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the text encoder: pass its token ids, attention mask and output to the listeners."""
        ids, self._call.input_ids = getattr(self._call, "input_ids", None), None
        if ids is None or self._current is None:
            return
        if not self._call.placed and torch.isin(ids.cpu(), torch.tensor(list(self._current.tokens))).any():
            raise RuntimeError(
                f"{type(module).__name__} encodes a prompt without looking up embeddings in its table, so placeholder "
                "tokens would be lost; load concepts on a pipeline whose text encoder does"
            )
        for listener in self.listeners:
            listener(ids, self._call.attention_mask, output)


def _are_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two embeddings are the same, or both are none."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def _signature(token: str, like: Tensor) -> Tensor:
    """Return factors near one, by which a token's stand-in differs from its super-class and that of other tokens."""
    generator = torch.Generator().manual_seed(zlib.crc32(token.encode()))
    signs = torch.randint(2, like.shape[-1:], generator=generator) * 2 - 1
    return 1 + signs.to(like) / 16


def _restore(tokenizer: Any, plain: dict[str, Any]) -> None:
    """Leave a tokenizer as it was without placeholder tokens when its text encoder was freed."""
    tokenizer.__dict__ = plain


def _forget_owner(reference: weakref.ref[PlaceholderTokens]) -> None:
    """Take the tokens of a registry from the tokenizer when the registry's model was freed without unloading it."""
    tokens = reference()
    if tokens is not None and tokens._current is not None:
        # Somebody else's tokens that were added since then keep theirs in the tokenizer, where nobody looks them up.
        with suppress(ValueError), tokens.detached():
            pass


@contextmanager
def known_token(family: ModelFamily, token: str, embeddings: Sequence[Tensor], superclass: str) -> Iterator[None]:
    """Let the text encoders of a pipeline know one placeholder token, for the body of the statement.

    Args:
        family: of the pipeline.
        token: the placeholder token.
        embeddings: of the token, one for each text encoder, `(width,)`.
        superclass: in plain words.

    Raises:
        ValueError: if there is not one embedding for each text encoder, or as `PlaceholderTokens.add`.
    """
    if len(embeddings) != len(family.text_encoders):
        raise ValueError(
            f"{token!r} has {len(embeddings)} token embeddings, but this pipeline has {len(family.text_encoders)} "
            "text encoders; the embeddings were made for another model"
        )
    owner = _Owner()
    with ExitStack() as stack:
        for tokenizer, text_encoder, embedding in zip(
            family.tokenizers, family.text_encoders, embeddings, strict=True
        ):
            tokens = PlaceholderTokens.of(tokenizer, text_encoder, type(family))
            stack.callback(tokens.release)
            tokens.add(owner, token, embedding, superclass)
            stack.callback(tokens.remove, owner, token)
            tokens.attach(owner)
            stack.enter_context(tokens.only(owner))
        yield


def superclass_ids(tokenizer: Any, superclass: str, space: str = " ") -> list[int]:
    """Return the token ids of a super-class, one or several.

    Args:
        tokenizer: whose ids they are.
        superclass: in plain words.
        space: before it, without which some tokenizers give other token ids.

    Raises:
        ValueError: if the tokenizer drops it or does not know it, or it leaves no room in a prompt.
    """
    ids = tokenizer(f"{space}{superclass.strip()}".rstrip(), add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"the tokenizer does not know the super-class {superclass!r}; choose another word for it")
    if len(ids) > (limit := tokenizer.model_max_length // 2):
        raise ValueError(f"the super-class {superclass!r} is {len(ids)} tokens long; expected at most {limit}")
    return ids


def token_pattern(tokens: Sequence[str]) -> str:
    """Return a pattern for placeholder tokens, which are not found inside of a word if they are letters themselves."""
    # The longest first, for one may be a part of another.
    return "|".join(
        (r"(?<!\w)" if token[0].isalnum() else "") + re.escape(token) + (r"(?!\w)" if token[-1].isalnum() else "")
        for token in sorted(tokens, key=len, reverse=True)
    )


def _mark_surroundings(backend: Tokenizer, names: Collection[str]) -> None:
    """Let a tokenizer read placeholder tokens in any case, and the text around them as around a word.

    Two tokens that differ only in case are read in their own. A space before a token is a part of it, as of a word. No
    space is put between a token and what follows it, as some tokenizers do where text between added tokens begins.

    Args:
        backend: of the tokenizer, which does not know the tokens yet.
        names: the tokens.
    """
    normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    tokens = [token if normalizer is None else normalizer.normalize_str(token) for token in names]
    steps = [] if normalizer is None else [normalizer]
    lower = [token.lower() for token in tokens]
    for token in tokens:
        if lower.count(token.lower()) == 1:
            steps.append(normalizers.Replace(Regex(f"(?i){token_pattern([token])}"), token))
    steps.append(normalizers.Replace(Regex(f"[ ▁](?={token_pattern(tokens)})"), _AFTER_SPACE))
    if pre_tokenizer is not None and pre_tokenizer.pre_tokenize_str(",")[0][0] != ",":
        for token in sorted(tokens, key=len, reverse=True):  # one may begin with another
            steps.append(normalizers.Replace(Regex(f"{token_pattern([token])}(?=[^ ])"), token + _JOINED))
        put_before = pre_tokenizers.Split(Regex(f".?{_JOINED}"), "removed")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, put_before])
    backend.normalizer = normalizers.Sequence(steps)


def _copy(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer that can get tokens of its own; the vocabulary, slow to copy, is shared."""
    backend = getattr(tokenizer, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return copy.deepcopy(tokenizer)
    copied_backend = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(copied_backend, part, getattr(backend, part))
    if backend.truncation is not None:
        copied_backend.enable_truncation(**backend.truncation)
    if backend.padding is not None:
        copied_backend.enable_padding(**backend.padding)
    copied_backend.encode_special_tokens = backend.encode_special_tokens
    for _, token in sorted(backend.get_added_tokens_decoder().items()):  # in the order that gives them the same ids
        add = copied_backend.add_special_tokens if token.special else copied_backend.add_tokens
        add([token])
    copied = copy.copy(tokenizer)
    copied._tokenizer = copied_backend
    if hasattr(
        copied, "_wrap_decode_method_backend_tokenizer"
    ):  # CLIP decodes by a method that it puts on its backend
        copied._wrap_decode_method_backend_tokenizer()
    return copied
