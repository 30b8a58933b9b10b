"""`AsideMixin`: what diffusers' own methods do to a pipeline that has concepts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

from .attention import attach, detach, get_state
from .families import edited_model

# Methods of pipelines that replace attention processors or count the tokenizer's words.
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

# Components that concepts hang on.
KEEPING = ("unet", "transformer", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")


class AsideMixin:
    """Put concepts aside while other methods of a pipeline replace what they hang on, and hear how it encodes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in REPLACING:
            if hasattr(cls, name):
                setattr(cls, name, _without_concepts(getattr(cls, name)))
        if hasattr(cls, "_text_preprocessing"):
            cls._text_preprocessing = _without_words(cls._text_preprocessing)
        if hasattr(cls, "encode_prompt"):
            cls.encode_prompt = _heard(cls.encode_prompt)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another model or tokenizer while concepts are on the one there is, since they would stay behind."""
        # Not while the pipeline is made: diffusers warns of an attribute that is not there yet.
        if name in KEEPING and name in self.__dict__ and value is not None:
            current = getattr(self, name)
            if getattr(value, "_orig_mod", value) is not current and get_state(edited_model(self)) is not None:
                raise ValueError(
                    f"concepts are loaded on this pipeline and would stay with its {name}; call unload_perfusion() "
                    "before it gets another, and load them again"
                )
        super().__setattr__(name, value)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The pipeline as it is without concepts, for diffusers to change; they come back around what it is then.

        Raises:
            ValueError: if somebody has added tokens to the tokenizer behind those of the concepts.
        """
        state = get_state(edited_model(self))
        if state is None:
            yield
            return
        with state.words.aside():
            detach(edited_model(self))
            try:
                yield
            finally:
                attach(edited_model(self), state)


def _without_concepts(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a pipeline, called while concepts are aside."""

    @wraps(method)
    def run(self: AsideMixin, *args: Any, **kwargs: Any) -> Any:
        with self._aside():
            return method(self, *args, **kwargs)

    return run


def _heard(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `encode_prompt`, which tells the concept words what it takes of encodings."""
    parameters = signature(encode_prompt)

    @wraps(encode_prompt)
    def run(self: AsideMixin, *args: Any, **kwargs: Any) -> Any:
        state = get_state(edited_model(self))
        if state is None:
            return encode_prompt(self, *args, **kwargs)
        given = parameters.bind(self, *args, **kwargs)
        given.apply_defaults()
        with state.words.taking(given.arguments.get("clip_skip"), given.arguments.get("max_sequence_length")):
            return encode_prompt(self, *args, **kwargs)

    return run


def _without_words(clean: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """What PixArt does to prompts, which are lower-cased or cleaned of what looks like HTML, but not to our words."""

    @wraps(clean)
    def run(self: AsideMixin, text: str | Sequence[str], *args: Any, **kwargs: Any) -> list[str]:
        state = get_state(edited_model(self))
        loaded = state.loaded.values() if state is not None and state.enabled else ()
        # The longest first, for one may be a part of another.
        words = sorted((entry.concept.placeholder_token for entry in loaded), key=len, reverse=True)
        stand_ins = {word: f"conceptword{chr(97 + n // 26)}{chr(97 + n % 26)}" for n, word in enumerate(words)}
        texts = [text] if isinstance(text, str) else list(text)
        for word, stand_in in stand_ins.items():
            texts = [one.replace(word, stand_in) for one in texts]
        texts = clean(self, texts, *args, **kwargs)
        for word, stand_in in stand_ins.items():
            texts = [one.replace(stand_in, word) for one in texts]
        return texts

    return run
