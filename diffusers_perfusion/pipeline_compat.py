"""`PipelineCompatMixin`: keep concepts working when diffusers replaces processors, tokens or prompts."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging

from .model_families import FAMILIES, edited_model, family_class, family_of
from .model_families.base import tokenizer_in, uncompiled
from .model_hooks import attach, detach
from .placeholder_tokens import PlaceholderTokens, token_pattern
from .registry import registry_of

logger = logging.get_logger(__name__)

# Pipeline methods that replace attention processors or count the tokenizer's tokens.
REPLACING = (
    "load_ip_adapter",
    "set_ip_adapter_scale",
    "unload_ip_adapter",
    "load_textual_inversion",
    "unload_textual_inversion",
    "enable_attention_slicing",
    "disable_attention_slicing",
    "enable_xformers_memory_efficient_attention",
    "disable_xformers_memory_efficient_attention",
    "fuse_qkv_projections",
    "unfuse_qkv_projections",
)

_TEXT_COMPONENTS = {pair for family in FAMILIES for pair in family.text_components}

# Components that a registry belongs to.
KEPT_COMPONENTS = {"unet", "transformer", *(name for pair in _TEXT_COMPONENTS for name in pair)}

_CLEANING = tuple({family.prompt_cleaning for family in FAMILIES if family.prompt_cleaning})


class PipelineCompatMixin:
    """Keeps concepts attached when pipeline methods replace processors or tokens, and tracks encoded prompts."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in REPLACING:
            if hasattr(cls, name):
                setattr(cls, name, _without_concepts(getattr(cls, name)))
        for name in _CLEANING:
            if hasattr(cls, name):
                setattr(cls, name, _keeping_tokens(getattr(cls, name)))
        if hasattr(cls, "encode_prompt"):
            cls.encode_prompt = _encoding_with_tokens(cls.encode_prompt)
        if hasattr(cls, "upsample_prompt"):
            cls.upsample_prompt = _rewriting_as_text(cls.upsample_prompt)
        if issubclass(cls, DiffusionPipeline):
            # diffusers knows a pipeline by the name of its class, in `AutoPipeline….from_pipe` and `model_index.json`.
            cls.__name__ = stock_class(cls).__name__

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another model or tokenizer while concepts are loaded, since they would stay with the old one."""
        # Not while the pipeline is made: diffusers warns of an attribute that is not there yet.
        if name in KEPT_COMPONENTS and self.__dict__.get(name) is not None and value is not None:
            current = getattr(self, name)
            if uncompiled(value) is not uncompiled(current) and registry_of(edited_model(self)) is not None:
                raise ValueError(
                    f"concepts are loaded on this pipeline and would stay with its {name}; call unload_perfusion() "
                    "before it gets another, and load them again"
                )
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the pipeline by a class that can be imported: that of `add_perfusion` is made at run time."""
        kind: Any = type(self)
        importable = getattr(sys.modules[kind.__module__], kind.__qualname__, None) is kind
        return _empty_pipeline, (kind if importable else stock_class(kind), _mixin_of(kind)), vars(self)

    @contextmanager
    def _detached(self) -> Iterator[None]:
        """Detach concepts while diffusers changes the pipeline in the body of the statement, then re-attach them.

        Raises:
            ValueError: if somebody has added tokens to a tokenizer since concepts were loaded.
        """
        model = edited_model(self)
        registry = registry_of(model)
        if registry is None:
            yield
            return
        with registry.detached_tokens():
            detach(model)
            try:
                yield
            finally:
                attach(model, registry)

    @contextmanager
    def _without_tokens(self) -> Iterator[None]:
        """Let the tokenizers know no placeholder token in the body of the statement, also none of other models."""
        with ExitStack() as stack:
            for _, name in _TEXT_COMPONENTS:
                text_encoder = uncompiled(getattr(self, name, None))
                if (tokens := PlaceholderTokens.existing(text_encoder)) is not None:
                    stack.enter_context(tokens.only(None))
            yield


@cache
def with_mixin(mixin: Any, stock: Any) -> Any:
    """Return a pipeline class with the methods of a mixin; the same class for the same two."""
    return type(stock.__name__, (mixin, stock), {"__module__": stock.__module__})


def stock_class(kind: Any) -> Any:
    """Return the diffusers class that a pipeline class with concepts is derived from."""
    return next(c for c in kind.__mro__ if issubclass(c, DiffusionPipeline) and not issubclass(c, PipelineCompatMixin))


def _mixin_of(kind: Any) -> Any:
    return next(c for c in kind.__mro__ if issubclass(c, PipelineCompatMixin) and not issubclass(c, DiffusionPipeline))


def _empty_pipeline(kind: Any, mixin: Any) -> Any:
    """Return a pipeline without components, for pickle to fill."""
    return object.__new__(kind if issubclass(kind, PipelineCompatMixin) else with_mixin(mixin, kind))


def _without_concepts(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline method so that concepts are detached while it runs."""

    @wraps(method)
    def run(self: PipelineCompatMixin, *args: Any, **kwargs: Any) -> Any:
        with self._detached():
            return method(self, *args, **kwargs)

    return run


def _encoding_with_tokens(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `encode_prompt` so that the text encoders know the tokens of this pipeline's model, and no others."""
    parameters = signature(encode_prompt)

    @wraps(encode_prompt)
    def run(self: PipelineCompatMixin, *args: Any, **kwargs: Any) -> Any:
        registry = registry_of(edited_model(self))
        if registry is None or not registry.enabled:
            with self._without_tokens():
                return encode_prompt(self, *args, **kwargs)
        family = family_class(self)
        components = family.components_of(self)
        tokenizers = [tokenizer_in(getattr(self, name)) for name, _ in components]
        text_encoders = [uncompiled(getattr(self, name)) for _, name in components]
        if None not in text_encoders and not registry.is_connected(tokenizers, text_encoders):
            registry.connect(family_of(self))
        given = parameters.bind(self, *args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            if "prompt" in name:
                given.arguments[name] = _with_exact_tokens(value, registry.placeholder_tokens)
                _warn_of_missing_brackets(given.arguments[name], registry.placeholder_tokens)
        prompts = {name: value for name, value in given.arguments.items() if re.fullmatch(r"prompt(_\d)?", name)}
        held = any(any(_holds(prompt, token)) for prompt in prompts.values() for token in registry.placeholder_tokens)
        if held and None in text_encoders:
            family_of(self)  # raises if it is one that has to read the token
        clip_skip, max_length = given.arguments.get("clip_skip"), given.arguments.get("max_sequence_length")
        with registry.encoding(text_encoders, clip_skip, max_length) as found:
            encoded = encode_prompt(*given.args, **given.kwargs)
        read = {
            "prompt" if number == 1 else f"prompt_{number}": counter
            for number, ((_, name), counter) in enumerate(zip(components, found, strict=True), start=1)
            if name not in family.pooled_only
        }
        _leave_negative_prompts_out(read, given.arguments, registry.placeholder_tokens)
        _warn_of_lost_tokens(prompts, read, registry.placeholder_tokens)
        return encoded

    return run


def _rewriting_as_text(rewrite: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Wrap the method by which a text encoder rewrites prompts, so that it reads placeholder tokens letter by letter.

    So it can write them again. A warning says where it has not.
    """

    @wraps(rewrite)
    def run(self: PipelineCompatMixin, prompt: str | Sequence[str], *args: Any, **kwargs: Any) -> list[str]:
        registry = registry_of(edited_model(self))
        tokens = registry.placeholder_tokens if registry is not None and registry.enabled else []
        prompt = _with_exact_tokens(prompt, tokens)
        with self._without_tokens():
            rewritten = rewrite(self, prompt, *args, **kwargs)
        rewritten = _with_exact_tokens(rewritten, tokens)
        for token in tokens:
            kept = zip(_holds(prompt, token), _holds(rewritten, token), strict=True)
            if any(before and not after for before, after in kept):
                logger.warning(
                    f"{token} is in a prompt, but not in what the text encoder has rewritten it to, so the concept is "
                    "not applied there; rewrite the prompt with the super-class by upsample_prompt, and put the token "
                    "into what that returns."
                )
        return rewritten

    return run


def _with_exact_tokens(prompt: Any, tokens: Sequence[str]) -> Any:
    """Return a prompt, or several, with placeholder tokens in the case in which they were loaded."""
    if isinstance(prompt, (list, tuple)):
        return [_with_exact_tokens(one, tokens) for one in prompt]
    if not isinstance(prompt, str) or not tokens:
        return prompt
    exact = {token.lower(): token for token in tokens} | {token: token for token in tokens}
    return re.sub(
        token_pattern(tokens), lambda found: exact.get(found[0], exact[found[0].lower()]), prompt, flags=re.IGNORECASE
    )


def _warn_of_lost_tokens(prompts: Mapping[str, Any], read: Mapping[str, Counter[str]], tokens: Sequence[str]) -> None:
    """Log a warning if a placeholder token is in a prompt and in none of the hidden states that the model gets for it.

    Args:
        prompts: by the name of the pipeline's argument: a prompt, several, or None for what `prompt` has.
        read: for each text encoder whose hidden states the model gets, by the name of its argument, in how many rows
            each token was found.
        tokens: of all concepts.
    """
    for token in tokens:
        held = {name: _holds(prompt, token) for name, prompt in prompts.items() if prompt}
        seen = {name: held.get(name, held.get("prompt", [])) for name in read}
        anywhere, somewhere = (sum(map(any, zip(*by_name.values(), strict=False))) for by_name in (held, seen))
        if anywhere > somewhere:
            logger.warning(
                f"{token} is in a prompt of which the model gets no hidden states, so the concept is not applied "
                f"there; expected it in {' or '.join(read)}."
            )
        lost = [sum(rows) > read[name][token] for name, rows in seen.items() if any(rows)]
        if lost and all(lost):
            logger.warning(
                f"{token} falls off the end of a prompt, of which the text encoder reads only the beginning, so the "
                "concept is not applied there; expected it earlier."
            )


def _leave_negative_prompts_out(
    read: Mapping[str, Counter[str]], arguments: Mapping[str, Any], tokens: Sequence[str]
) -> None:
    """Subtract the rows of negative prompts, which were encoded with the others, from the rows that hold each token.

    Where a negative prompt has lost its token, too few are left for the others.

    Args:
        read: as in `_warn_of_lost_tokens`.
        arguments: of the pipeline.
        tokens: of all concepts.
    """
    if not arguments.get("do_classifier_free_guidance", True):
        return
    prompt = arguments.get("prompt")
    for name, counter in read.items():
        negative = arguments.get(f"negative_{name}") or arguments.get("negative_prompt")
        times = len(prompt) if isinstance(negative, str) and isinstance(prompt, (list, tuple)) else 1
        for token in tokens:
            counter[token] -= times * sum(_holds(negative, token))


def _holds(prompt: Any, token: str) -> list[bool]:
    """Return whether each text holds a token: of a prompt, of several, or of None."""
    texts = [prompt] if isinstance(prompt, str) else prompt or ()
    return [bool(re.search(token_pattern([token]), text)) for text in texts]


def _warn_of_missing_brackets(prompt: Any, tokens: Sequence[str]) -> None:
    """Log a warning if a prompt has my-cat or < my-cat > where the placeholder token is <my-cat>."""
    if isinstance(prompt, (list, tuple)):
        for one in prompt:
            _warn_of_missing_brackets(one, tokens)
    elif isinstance(prompt, str):
        for token in tokens:
            name = token.strip("<>")
            # A name of letters alone may be meant as a word: "a cat" beside <cat>.
            written = (
                name
                and not name.isalpha()
                and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", prompt, re.IGNORECASE)
            )
            if written and token not in prompt:
                logger.warning(
                    f"The prompt {prompt!r} has {written[0]!r}, but not the placeholder token {token!r}, so the "
                    "concept is not applied."
                )


def _keeping_tokens(clean: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Wrap the method that changes a prompt before it is tokenized, so that placeholder tokens stay as they are.

    It lower-cases prompts, and may take out what looks like HTML.
    """

    @wraps(clean)
    def run(self: PipelineCompatMixin, text: str | Sequence[str], *args: Any, **kwargs: Any) -> list[str]:
        registry = registry_of(edited_model(self))
        tokens = registry.placeholder_tokens if registry is not None and registry.enabled else []
        stand_ins = {
            token: f"placeholdertoken{chr(97 + number // 26)}{chr(97 + number % 26)}"
            for number, token in enumerate(tokens)
        }
        texts = [text] if isinstance(text, str) else list(text)
        if tokens:
            texts = [re.sub(token_pattern(tokens), lambda found: stand_ins[found[0]], one) for one in texts]
        texts = clean(self, texts, *args, **kwargs)
        for token, stand_in in stand_ins.items():
            texts = [one.replace(stand_in, token) for one in texts]
        return texts

    return run
