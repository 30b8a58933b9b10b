"""`PerfusionLoaderMixin`: concepts on a diffusers pipeline, named and shaped like diffusers' own loaders."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import quote, unquote

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo
from PIL import Image
from torch import Tensor

from .aside import AsideMixin
from .attention import attach, check_concept_fits, detach, get_state, replaced_layers
from .concept import WEIGHT_NAME, PerfusionConcept, check_bias, check_temperature
from .families import edited_model, text_encoders
from .hub import find_concept_file, push_concept
from .state import LoadedConcept, Locking, PerfusionState
from .text import TextEncoders
from .vocabulary import Vocabulary

logger = logging.get_logger(__name__)

# Folder for concepts beside the models of a pipeline.
CONCEPTS = "perfusion"

Source = str | os.PathLike | PerfusionConcept | Mapping[str, Any]
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def add_perfusion(pipeline: Pipeline) -> Pipeline:
    """Give a pipeline that exists already the methods of `PerfusionLoaderMixin`, in place, and return it.

    Nothing else about it changes: its components, hooks, settings and the class name that it is saved under stay.

    Raises:
        ValueError: if the model has no cross-attention from text.
    """
    if not isinstance(pipeline, PerfusionLoaderMixin):
        text_encoders(pipeline)
        kind = type(pipeline)
        pipeline.__class__ = type(kind.__name__, (PerfusionLoaderMixin, kind), {"__module__": kind.__module__})
    return pipeline


class PerfusionLoaderMixin(AsideMixin):
    """Load, set, switch and unload Perfusion concepts.

    Concepts stay with the model: a pipeline made of the same components (`from_pipe`) has them too.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As the pipeline's own; of a folder also the concepts that were saved in it."""
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        for path in sorted((Path(pretrained_model_name_or_path) / CONCEPTS).glob("*.safetensors")):
            pipeline.load_perfusion(path, unquote(path.stem))
        return pipeline

    def load_perfusion(
        self,
        source: Source | Sequence[Source],
        concept_name: str | Sequence[str | None] | None = None,
        placeholder_token: str | Sequence[str | None] | None = None,
        *,
        weight_name: str = WEIGHT_NAME,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> None:
        """Load a concept, or several, and activate it beside those that are active.

        Args:
            source: id of a Hub repository, a folder, a file, a `PerfusionConcept`, what `PerfusionConcept.state_dict`
                gives, or a list of these.
            concept_name: what to call it in the other methods; by default its word without angle brackets. A list if
                `source` is one.
            placeholder_token: another word for it than the one in the file. A list if `source` is one.
            weight_name: name of the concept file in a folder or repository.
            subfolder: where in the folder or repository it is.
            revision: branch, tag or commit of the repository.
            token: for private and gated repositories; True takes the stored one.
            cache_dir: where downloads are kept.
            force_download: download even what is in the cache.
            local_files_only: never ask the Hub.

        Raises:
            FileNotFoundError: if there is no concept file at `source`.
            ValueError: if the file is no valid concept, is made for another model, or its name or word is taken. Then
                none of a list is loaded.
        """
        model, texts = edited_model(self), text_encoders(self)
        sources: Sequence[Any] = source if isinstance(source, (list, tuple)) else [source]
        names = _one_each("concept_name", concept_name, len(sources))
        words = _one_each("placeholder_token", placeholder_token, len(sources))
        concepts: dict[str, PerfusionConcept] = {}
        state = get_state(model)
        for item, name, word in zip(sources, names, words, strict=True):
            if isinstance(item, PerfusionConcept):
                concept = item.to()
            elif isinstance(item, Mapping):
                concept = PerfusionConcept.from_state_dict(item)
            else:
                path = find_concept_file(
                    item,
                    weight_name,
                    subfolder,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
                concept = PerfusionConcept.load(path)
            check_concept_fits(concept, model)
            if word is not None:
                concept = replace(concept, placeholder_token=word)
            name = name or concept.placeholder_token.strip("<>")
            if name in concepts or (state is not None and name in state.loaded):
                raise ValueError(f"a concept named {name!r} is loaded already; choose another with concept_name=")
            concepts[name] = concept

        loaded: list[str] = []
        try:
            for name, concept in concepts.items():
                self._add_concept(name, concept, texts)
                loaded.append(name)
        except Exception:
            self.delete_perfusion(loaded)
            raise

    def _add_concept(self, name: str, concept: PerfusionConcept, texts: TextEncoders) -> None:
        state = get_state(edited_model(self)) or PerfusionState(Vocabulary(texts))
        state.words.add(concept.placeholder_token, concept.word_embeddings, concept.superclass)
        if get_state(edited_model(self)) is None:
            attach(edited_model(self), state)
        state.loaded[name] = LoadedConcept(concept, torch.tensor(concept.bias), torch.tensor(concept.temperature))
        state.active.append(name)
        state.refresh()
        if state.enabled:
            state.words.enable()
        else:
            logger.warning(f"Perfusion is disabled on this pipeline; {name!r} is applied from enable_perfusion() on.")
        self._check_processors()

    def set_perfusion(
        self,
        names: str | Sequence[str] | None = None,
        bias: float | Mapping[str, float] | Sequence[float] | None = None,
        temperature: float | Mapping[str, float] | Sequence[float] | None = None,
        locking: Locking | None = None,
    ) -> ExitStack:
        """Choose the active concepts and their settings.

        The settings hold until the next call, or for the body of a `with` statement:

            with pipe.set_perfusion("my-cat", bias=1.0):
                image = pipe("a <my-cat> on the beach").images[0]

        Args:
            names: the concepts to activate, all others being switched off; by default the active ones.
            bias: `β` for all of them, one each, or by name. Low is like the pictures, high like the prompt. By
                default each concept's own.
            temperature: `τ` likewise. By default each concept's own.
            locking: `local` locks the keys of the concept's word to the super-category, `global` takes the keys of
                the whole prompt from its super-category twin: richer scenes, looser identity, and a lower bias suits
                it. By default as it is.

        Returns:
            A context manager that puts back the settings from before.

        Raises:
            ValueError: if a concept is not loaded, or a setting out of range.
        """
        state = self._state("set")
        names = list(state.active) if names is None else [names] if isinstance(names, str) else list(names)
        self._check_loaded(names)
        biases = _setting("bias", bias, {name: state.loaded[name].concept.bias for name in names})
        temperatures = _setting(
            "temperature", temperature, {name: state.loaded[name].concept.temperature for name in names}
        )
        for name in names:
            check_bias(biases[name])
            check_temperature(temperatures[name])
        if locking is not None and locking not in get_args(Locking):
            raise ValueError(f"locking is {locking!r}; expected one of {', '.join(get_args(Locking))}")

        before = ExitStack()
        before.callback(
            self._restore,
            state.active,
            state.locking,
            {name: (entry.bias, entry.temperature) for name, entry in state.loaded.items()},
        )
        state.active = list(dict.fromkeys(names))
        for name in names:
            state.loaded[name].bias = torch.tensor(biases[name], dtype=torch.float32)
            state.loaded[name].temperature = torch.tensor(temperatures[name], dtype=torch.float32)
        if locking is not None:
            state.locking = locking
        state.refresh()
        self._check_processors()
        if not state.enabled:
            logger.warning("Perfusion is disabled on this pipeline; the settings hold from enable_perfusion() on.")
        return before

    def _restore(self, active: list[str], locking: Locking, settings: dict[str, tuple[Any, Any]]) -> None:
        state = get_state(edited_model(self))
        if state is None:
            return
        state.active = [name for name in active if name in state.loaded]
        state.locking = locking
        for name, (bias, temperature) in settings.items():
            if name in state.loaded:
                state.loaded[name].bias, state.loaded[name].temperature = bias, temperature
        state.refresh()

    def mark_perfusion(self, prompt_embeds: Tensor, names: str | Sequence[str] | None = None) -> None:
        """Say which concepts are in text encodings that were weighted, mixed or cut, to be generated with later.

        What `encode_prompt` gives needs no mark, nor do its rows, repeated or in another precision.

        Args:
            prompt_embeds: as the pipeline takes them, `(batch, length, d)`.
            names: the concepts in every row of them; by default the active ones.

        Raises:
            ValueError: if a concept is not loaded, none is named and none active, or the encodings are of another
                width than the pipeline's.
        """
        state = self._state("mark")
        names = list(state.active) if names is None else [names] if isinstance(names, str) else list(names)
        self._check_loaded(names)
        if not names:
            raise ValueError("no concept is active, so there is none to mark; name those that are in the encodings")
        widths = state.words.widths
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != sum(widths):
            raise ValueError(
                f"prompt_embeds has shape {tuple(prompt_embeds.shape)}; expected (batch, length, {sum(widths)})"
            )
        for row in prompt_embeds:
            for part in row.split(widths, -1):
                state.mark(part, tuple(state.loaded[name].concept.placeholder_token for name in names), None)
        state.refresh()

    def enable_perfusion(self) -> None:
        """Switch concepts on again, and put back attention processors that something else has replaced."""
        state = self._state("enable")
        attach(edited_model(self), state)
        state.enabled = True
        state.refresh()
        state.words.enable()

    def disable_perfusion(self) -> None:
        """Switch all concepts off, and keep them loaded: the pipeline gives the very pictures it gave without them."""
        state = self._state("disable")
        state.words.disable()
        state.enabled = False
        state.refresh()

    def delete_perfusion(self, names: str | Sequence[str]) -> None:
        """Unload some concepts.

        Raises:
            ValueError: if one is not loaded.
        """
        names = [names] if isinstance(names, str) else list(names)
        self._check_loaded(names)
        for name in dict.fromkeys(names):
            state = self._state("delete")
            state.words.remove(state.loaded[name].concept.placeholder_token)
            del state.loaded[name]
            state.active = [other for other in state.active if other != name]
            state.refresh()
            if not state.loaded:
                self.unload_perfusion()

    def unload_perfusion(self) -> None:
        """Unload every concept and leave the pipeline as it was, its very attention processors included."""
        state = get_state(edited_model(self))
        if state is not None:
            state.words.disable()
            detach(edited_model(self))

    def list_perfusion(self) -> list[str]:
        """Names of the loaded concepts."""
        state = get_state(edited_model(self))
        return [] if state is None else list(state.loaded)

    def get_active_perfusion(self) -> list[str]:
        """Names of the concepts that edit; none while concepts are disabled."""
        state = get_state(edited_model(self))
        return [] if state is None or not state.enabled else list(state.active)

    def save_perfusion(
        self, save_directory: str | os.PathLike, concept_name: str | None = None, weight_name: str = WEIGHT_NAME
    ) -> Path:
        """Write a loaded concept, under the word it has here, into a folder, and return the file's path.

        Args:
            save_directory: the folder; it is made if it is not there.
            concept_name: which one; may be left out if only one is loaded.
            weight_name: name of the file.

        Raises:
            ValueError: if the concept is not loaded, or none is named and several are.
        """
        return self._one_concept("save", concept_name).save(Path(save_directory) / weight_name)

    def push_perfusion_to_hub(
        self,
        repo_id: str,
        concept_name: str | None = None,
        *,
        weight_name: str = WEIGHT_NAME,
        samples: Sequence[tuple[str, Image.Image]] = (),
        sweep: Sequence[Mapping[str, Any]] = (),
        license: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """Upload a loaded concept, under the word it has here, with a card, to the Hugging Face Hub.

        Args:
            repo_id: id of the repository; it is made if it is not there.
            concept_name: which one; may be left out if only one is loaded.
            weight_name: name of the file there, for a repository of several concepts.
            samples: pictures drawn with it, each after its prompt. They replace those of an earlier push.
            sweep: scores at other settings, rows with the same columns, for the card of a repository with one concept.
            license: id of the licence, as the Hub names it; by default the one the card has already, if any.
            private: whether a new repository is private; by default as the owner's are.
            token: of a user who may write to it; by default the stored one.
            create_pr: open a pull request and leave the branch as it is.
            commit_message: by default it names the concept's word.
            revision: branch to push to, made if it is not there; by default `main`.

        Raises:
            ValueError: if the concept is not loaded, or none is named and several are; and as `hub.push_concept`.
            OSError: if the Hub cannot be reached or refuses. It says what is on the Hub then; the same call goes on.
        """
        return push_concept(
            self._one_concept("push", concept_name),
            repo_id,
            weight_name=weight_name,
            samples=samples,
            sweep=sweep,
            license=license,
            private=private,
            token=token,
            create_pr=create_pr,
            commit_message=commit_message,
            revision=revision,
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as the diffusers pipeline it is, which any diffusers loads, and its concepts beside it.

        The concepts go to `perfusion/<concept name>.safetensors`, from where `PerfusionPipeline.from_pretrained` of
        the folder loads them again, all active and with their own settings, and any that were there before.

        Arguments are those of `DiffusionPipeline.save_pretrained`.
        """
        kind = type(self)
        plain = next(
            c for c in kind.__mro__ if issubclass(c, DiffusionPipeline) and not issubclass(c, PerfusionLoaderMixin)
        )
        if (state := get_state(edited_model(self))) is not None:
            for name, entry in state.loaded.items():
                entry.concept.save(Path(save_directory) / CONCEPTS / f"{quote(name, safe='')}.safetensors")
        with self._aside():
            # A pipeline is saved under the name of its class.
            self.__class__ = plain  # type: ignore[assignment]
            try:
                plain.save_pretrained(self, save_directory, *args, **kwargs)
            finally:
                self.__class__ = kind

    def _one_concept(self, action: str, concept_name: str | None) -> PerfusionConcept:
        """The concept of that name, or the only one."""
        state = self._state(action)
        if concept_name is None:
            if len(state.loaded) > 1:
                raise ValueError(f"several concepts are loaded; name one of {', '.join(state.loaded)}")
            concept_name = next(iter(state.loaded))
        self._check_loaded([concept_name])
        return state.loaded[concept_name].concept

    def _state(self, action: str) -> PerfusionState:
        state = get_state(edited_model(self))
        if state is None:
            raise ValueError(f"there is no concept to {action}; load one with load_perfusion() first")
        return state

    def _check_loaded(self, names: Sequence[str]) -> None:
        loaded = self.list_perfusion()
        for name in names:
            if name not in loaded:
                raise ValueError(f"no concept named {name!r} is loaded; loaded are: {', '.join(loaded) or 'none'}")

    def _check_processors(self) -> None:
        if replaced := replaced_layers(self._state("check")):
            logger.warning(
                f"The attention processors of {len(replaced)} layers were replaced after concepts were loaded (now "
                f"{', '.join(sorted(set(replaced.values())))}); call enable_perfusion() to put the concepts back."
            )


def _one_each(name: str, value: Any, count: int) -> list[str | None]:
    """A name or word for each of several sources."""
    if value is None:
        return [None] * count
    values = [value] if isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} concepts; expected one each")
    return values


def _setting(name: str, value: Any, defaults: dict[str, float]) -> dict[str, float]:
    """A setting for each concept from a number for all, a number each, numbers by name, or None."""
    if value is None:
        return defaults
    if isinstance(value, Mapping):
        if unknown := value.keys() - defaults.keys():
            raise ValueError(f"{name} is given for {', '.join(sorted(unknown))}; expected only {', '.join(defaults)}")
        return defaults | dict(value)
    if isinstance(value, (list, tuple)):
        if len(value) != len(defaults):
            raise ValueError(f"{name} has {len(value)} numbers for {len(defaults)} concepts; expected one each")
        return dict(zip(defaults, value, strict=True))
    return dict.fromkeys(defaults, value)
