"""`PerfusionLoaderMixin`: concepts on a diffusers pipeline, named and shaped like diffusers' own loaders."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo
from PIL import Image
from torch import Tensor

from .attention_processor import check_concept_fits
from .concept import PerfusionConcept
from .concept_file import WEIGHT_NAME, check_bias, check_same_token, check_temperature, printable
from .model_card import is_hub_id
from .model_families import edited_model, family_of
from .model_hooks import attach, check_processors, detach
from .pipeline_compat import PipelineCompatMixin, with_mixin
from .registry import ConceptRegistry, Locking, registry_of
from .saved_concepts import FOLDER, has_saved_concepts, save_concepts, saved_concepts

logger = logging.get_logger(__name__)

Source = str | os.PathLike | PerfusionConcept | Mapping[str, Any]
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def add_perfusion(pipeline: Pipeline) -> Pipeline:
    """Add the methods of `PerfusionLoaderMixin` to an existing pipeline, in place, and return it.

    Nothing else about it changes: its components, hooks, settings and the class name that it is saved under stay.

    Raises:
        ValueError: if no family knows the pipeline's model, or a text encoder is missing or does not fit it.
    """
    if not isinstance(pipeline, PerfusionLoaderMixin):
        family_of(pipeline)
        pipeline.__class__ = with_mixin(PerfusionLoaderMixin, type(pipeline))
        folder = pipeline.config.get("_name_or_path")  # type: ignore[attr-defined]
        if folder and has_saved_concepts(Path(folder)) and registry_of(edited_model(pipeline)) is None:
            logger.warning(
                f"The concepts that were saved with {folder} are not loaded; load pipeline and concepts with "
                "PerfusionPipeline.from_pretrained()."
            )
    return pipeline


class PerfusionLoaderMixin(PipelineCompatMixin):
    """Load, set, switch and unload Perfusion concepts.

    Concepts stay with the model: a pipeline that is made of the same model (`from_pipe`, `unet=pipe.unet`) has them
    too. Settings hold for all of these pipelines, which may generate in several threads.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline as its diffusers class does, and the concepts that were saved or pushed with it."""
        source = pretrained_model_name_or_path
        pipeline = super().from_pretrained(source, **kwargs)  # type: ignore[misc]
        names = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        options = {name: kwargs[name] for name in names if name in kwargs}
        concepts = saved_concepts(source, **options)
        if concepts and pipeline.list_perfusion():
            logger.warning(
                f"The concepts that were saved with {source} are not loaded, because the model that was given for its "
                "own has concepts, and keeps them."
            )
            return pipeline
        for name, weight_name in concepts.items():
            pipeline.load_perfusion(source, name, weight_name=weight_name, subfolder=FOLDER, **options)
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
            concept_name: what to call it in the other methods; by default its placeholder token without angle
                brackets. A list if `source` is one.
            placeholder_token: another placeholder token than the one in the file. A list if `source` is one.
            weight_name: name of the concept file in a folder or repository.
            subfolder: where in the folder or repository it is.
            revision: branch, tag or commit of the repository.
            token: for private and gated repositories; True takes the stored one.
            cache_dir: where downloads are kept.
            force_download: download even what is in the cache.
            local_files_only: never ask the Hub.

        Raises:
            FileNotFoundError: if there is no concept file at `source`.
            ValueError: if the file is no valid concept, is for another model, or its name or placeholder token is
                taken. Then none of a list is loaded.
        """
        model, family = edited_model(self), family_of(self)
        sources: Sequence[Any] = source if isinstance(source, (list, tuple)) else [source]
        if not sources:
            raise ValueError("the list of concepts to load is empty")
        names = _one_each("concept_name", concept_name, len(sources))
        placeholder_tokens = _one_each("placeholder_token", placeholder_token, len(sources))
        loaded = self.list_perfusion()
        concepts: dict[str, PerfusionConcept] = {}
        for item, name, new_token in zip(sources, names, placeholder_tokens, strict=True):
            if isinstance(item, PerfusionConcept):
                concept = item.to()
            elif isinstance(item, Mapping):
                concept = PerfusionConcept.from_state_dict(item)
            else:
                concept = PerfusionConcept.from_pretrained(
                    item,
                    weight_name=weight_name,
                    subfolder=subfolder,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                )
            check_concept_fits(concept, model, family.layer_widths)
            base_model = getattr(self.config, "_name_or_path", "")  # type: ignore[attr-defined]
            if item != base_model:  # or it was saved with this very pipeline
                _warn_of_another_base_model(concept, base_model)
            if new_token is not None:
                concept = replace(concept, placeholder_token=new_token)
            name = name or concept.placeholder_token.strip("<>") or concept.placeholder_token
            if name in concepts or name in loaded:
                raise ValueError(f"a concept named {name!r} is loaded already; choose another with concept_name=")
            concepts[name] = concept

        registry = registry_of(model) or ConceptRegistry(family)
        check_processors(registry)
        registry.connect(family)
        added: list[str] = []
        try:
            for name, concept in concepts.items():
                registry.add(name, concept)
                added.append(name)
        except Exception:
            for name in added:
                registry.remove(name)
            raise
        attach(model, registry)
        if not registry.enabled:
            logger.warning(
                f"Perfusion is disabled on this pipeline; {', '.join(map(repr, concepts))} takes effect after "
                "enable_perfusion()."
            )

    def set_perfusion(
        self,
        names: str | Sequence[str] | None = None,
        bias: float | Mapping[str, float] | Sequence[float] | None = None,
        temperature: float | Mapping[str, float] | Sequence[float] | None = None,
        locking: Locking | None = None,
    ) -> ExitStack:
        """Choose the active concepts and their settings.

        What is not given stays as it is. The settings hold until the next call, or for the body of a `with` statement:

            with pipe.set_perfusion("my-cat", bias=1.0):
                image = pipe("a <my-cat> on the beach").images[0]

        Args:
            names: the concepts to activate, all others being switched off; by default the active ones.
            bias: `β` for all of them, one each, or by name. Low is like the images, high like the prompt. A concept is
                loaded with its own.
            temperature: `τ` likewise.
            locking: `local` locks the keys of the placeholder token to the super-class; `global` takes the keys of the
                whole prompt from its super-class prompt: richer scenes, looser identity, and a lower bias suits it. A
                model begins with `local`.

        Returns:
            A context manager that restores the previous settings.

        Raises:
            ValueError: if a concept is not loaded, or a setting out of range.
        """
        registry = self._registry("set")
        names = list(registry.active) if names is None else [names] if isinstance(names, str) else list(names)
        self._check_loaded(names)
        biases = _setting("bias", bias, names)
        temperatures = _setting("temperature", temperature, names)
        for value in biases.values():
            check_bias(value)
        for value in temperatures.values():
            check_temperature(value)
        if locking is not None and locking not in get_args(Locking):
            raise ValueError(f"locking is {locking!r}; expected one of {', '.join(get_args(Locking))}")
        if locking == "global" and registry.joint:
            raise ValueError(
                f"locking='global' is not for {type(edited_model(self)).__name__}: its text and image attend to each "
                "other, and it gets the super-class prompt already; expected 'local'"
            )

        before = ExitStack()
        settings = {name: (entry.bias, entry.temperature) for name, entry in registry.loaded.items()}
        before.callback(_restore, registry, list(registry.active), registry.locking, settings)
        for name, value in biases.items():
            registry.loaded[name].bias = torch.tensor(value, dtype=torch.float32)
        for name, value in temperatures.items():
            registry.loaded[name].temperature = torch.tensor(value, dtype=torch.float32)
        registry.configure(active=names, locking=locking or registry.locking)
        if not registry.enabled:
            logger.warning("Perfusion is disabled on this pipeline; settings take effect after enable_perfusion().")
        return before

    def mark_perfusion(
        self,
        prompt_embeds: Tensor | Sequence[Tensor],
        names: str | Sequence[str] | Mapping[str, int | Sequence[int]] | None = None,
    ) -> None:
        """Register which concepts prompt embeddings hold that were weighted, mixed or encoded elsewhere.

        What `encode_prompt` returns while the concepts are loaded is recognised by itself, as are its rows, repeated
        or in another precision. Without this call, a warning says that no concept is applied. Where nobody knows the
        super-class prompt, a high bias leads less far towards the super-class, and keys cannot be locked globally.

        Args:
            prompt_embeds: as the pipeline takes them, `(batch, length, width)` or `(length, width)` for each prompt.
            names: the concepts in every row of them; by default the active ones, and an empty list for none. A mapping
                gives the positions of each concept's token in every row. Without positions a token is where its prompt
                had it, or, with a warning, where embeddings that are not recognised are most like the concept.

        Raises:
            ValueError: if a concept is not loaded, none is named and none active, the embeddings are of another width
                than the pipeline's, or a position is outside of them.
        """
        registry = self._registry("mark")
        if names is None and not registry.active:
            raise ValueError("no concept is active; name the concepts that are in prompt_embeds")
        names = registry.active if names is None else [names] if isinstance(names, str) else names
        given = names if isinstance(names, Mapping) else dict.fromkeys(names, ())
        places = {name: (at,) if isinstance(at, int) else tuple(at) for name, at in given.items()}
        self._check_loaded(list(places))
        width = registry.width
        if any(row.ndim != 2 or row.shape[1] != width for row in prompt_embeds):
            shape: Any = [tuple(row.shape) for row in prompt_embeds]
            if isinstance(prompt_embeds, Tensor):
                shape = tuple(prompt_embeds.shape)
            raise ValueError(f"prompt_embeds has shape {shape}; expected (batch, length, {width})")
        length = min(map(len, prompt_embeds))
        taken: dict[int, str] = {}
        for name, positions in places.items():
            for position in positions:
                if not isinstance(position, int) or not 0 <= position < length:
                    raise ValueError(
                        f"position {position!r} of {name!r} is not in prompt_embeds; expected 0 to {length - 1}"
                    )
                if (other := taken.setdefault(position, name)) != name:
                    raise ValueError(f"position {position} is given for {other!r} and {name!r}; expected one of them")
        registry.register(
            prompt_embeds,
            {registry.loaded[name].concept.placeholder_token: positions for name, positions in places.items()},
        )

    def enable_perfusion(self) -> None:
        """Switch concepts on again, and wrap attention processors that something else has replaced."""
        registry = self._registry("enable")
        attach(edited_model(self), registry)
        registry.enable(True)

    def disable_perfusion(self) -> None:
        """Switch all concepts off, and keep them loaded: images are the base model's to the bit.

        Raises:
            ValueError: if somebody has added tokens to a tokenizer since the concepts were loaded.
        """
        self._registry("disable").enable(False)

    def delete_perfusion(self, names: str | Sequence[str]) -> None:
        """Unload some concepts.

        Raises:
            ValueError: if one is not loaded.
        """
        names = [names] if isinstance(names, str) else list(names)
        self._check_loaded(names)
        registry = self._registry("delete")
        for name in dict.fromkeys(names):
            registry.remove(name)
        if not registry.loaded:
            detach(edited_model(self))

    def unload_perfusion(self) -> None:
        """Unload every concept and leave the pipeline as it was, its very attention processors included.

        Raises:
            ValueError: if somebody has added tokens to a tokenizer since the concepts were loaded.
        """
        if names := self.list_perfusion():
            self.delete_perfusion(names)

    def list_perfusion(self) -> list[str]:
        """Return the names of the loaded concepts."""
        registry = registry_of(edited_model(self))
        return [] if registry is None else list(registry.loaded)

    def get_active_perfusion(self) -> list[str]:
        """Return the names of the concepts that edit; none while concepts are disabled."""
        registry = registry_of(edited_model(self))
        return [] if registry is None or not registry.enabled else list(registry.active)

    def save_perfusion(
        self, save_directory: str | os.PathLike, concept_name: str | None = None, weight_name: str = WEIGHT_NAME
    ) -> Path:
        """Write a loaded concept, with the placeholder token it has here, into a folder, and return the file's path.

        Args:
            save_directory: the folder; it is created if it does not exist.
            concept_name: which one; may be left out if only one is loaded.
            weight_name: name of the file.

        Raises:
            ValueError: if the concept is not loaded, or none is named and several are, or the file is there and is not
                of its token.
        """
        concept, path = self._one_concept("save", concept_name), Path(save_directory) / weight_name
        check_same_token(path, concept.placeholder_token)
        return concept.save(path)

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
        """Upload a loaded concept, with the placeholder token it has here and a card, to the Hugging Face Hub.

        Args:
            repo_id: id of the repository; it is created if it does not exist.
            concept_name: which one; may be left out if only one is loaded.
            weight_name: name of the file there, for a repository of several concepts.
            samples: images generated with it, each after its prompt. They replace those of an earlier push.
            sweep: scores at other settings, rows with the same columns, for the card of a repository with one concept.
            license: id of the licence, as the Hub names it; by default the one the card has already, if any.
            private: whether a new repository is private; by default as the owner's are.
            token: of a user who may write to it; by default the stored one.
            create_pr: open a pull request and leave the branch as it is.
            commit_message: by default it names the placeholder token.
            revision: branch to push to, created if it does not exist; by default `main`.

        Raises:
            ValueError: if the concept is not loaded, or none is named and several are; and as
                `PerfusionConcept.push_to_hub`.
            OSError: if the Hub cannot be reached or refuses. The message says what is on the Hub then; the same call
                can be repeated.
        """
        return self._one_concept("push", concept_name).push_to_hub(
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
        """Save the pipeline as a stock diffusers pipeline, and its concepts beside the models.

        The concepts go into its folder `perfusion`, in place of those of an earlier save; other files there stay.
        `PerfusionPipeline.from_pretrained` of the folder, or of the repository that it is pushed to, loads them again,
        all active and with their own settings.

        Arguments are those of `DiffusionPipeline.save_pretrained`.
        """
        registry = registry_of(edited_model(self))
        loaded = registry.loaded if registry is not None else {}
        save_concepts(save_directory, {name: entry.concept for name, entry in loaded.items()})
        with self._detached():
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _one_concept(self, action: str, concept_name: str | None) -> PerfusionConcept:
        """Return the concept of a name, or the only one."""
        registry = self._registry(action)
        if concept_name is None:
            if len(registry.loaded) > 1:
                raise ValueError(f"several concepts are loaded; name one of {printable(', '.join(registry.loaded))}")
            concept_name = next(iter(registry.loaded))
        self._check_loaded([concept_name])
        return registry.loaded[concept_name].concept

    def _registry(self, action: str) -> ConceptRegistry:
        registry = registry_of(edited_model(self))
        if registry is None:
            raise ValueError(f"there is no concept to {action}; load one with load_perfusion() first")
        return registry

    def _check_loaded(self, names: Sequence[str]) -> None:
        loaded = self.list_perfusion()
        for name in names:
            if name not in loaded:
                there = printable(", ".join(loaded)) or "none"
                raise ValueError(f"no concept named {name!r} is loaded; loaded are: {there}")


def _warn_of_another_base_model(concept: PerfusionConcept, name: str) -> None:
    """Log a warning if a concept was trained on another model of the Hub than a pipeline's, by the names of both."""
    if is_hub_id(concept.base_model) and is_hub_id(name) and not os.path.isdir(name):
        trained_on, here = (text.rpartition("/")[2].lower() for text in (concept.base_model, name))
        if trained_on != here:  # whoever has uploaded it
            logger.warning(
                f"{concept.placeholder_token!r} was trained on {concept.base_model}, and this pipeline is {name}; the "
                "subject may be less alike, or lost."
            )


def _restore(
    registry: ConceptRegistry, active: list[str], locking: Locking, settings: dict[str, tuple[Tensor, Tensor]]
) -> None:
    """Restore the settings from before a `with` statement, for the concepts that are still loaded."""
    for name, (bias, temperature) in settings.items():
        if name in registry.loaded:
            registry.loaded[name].bias, registry.loaded[name].temperature = bias, temperature
    registry.configure(active=[name for name in active if name in registry.loaded], locking=locking)


def _one_each(name: str, value: Any, count: int) -> list[str | None]:
    """Return one name or token per source, or None for each if there is none."""
    if value is None:
        return [None] * count
    values = [value] if isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} concepts; expected one each")
    return values


def _setting(name: str, value: Any, names: Sequence[str]) -> dict[str, float]:
    """Return the values of a setting by concept, from a number for all, a number each, numbers by name, or None."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        if unknown := value.keys() - set(names):
            raise ValueError(f"{name} is given for {', '.join(sorted(unknown))}; expected only {', '.join(names)}")
        return dict(value)
    if isinstance(value, (list, tuple)):
        if len(value) != len(names):
            raise ValueError(f"{name} has {len(value)} numbers for {len(names)} concepts; expected one each")
        return dict(zip(names, value, strict=True))
    return dict.fromkeys(names, value)
