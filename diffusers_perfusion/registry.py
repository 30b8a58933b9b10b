"""`ConceptRegistry`: the concepts of one model, their settings, and the edit that its layers read.

It is an attribute of the model, because pipelines share the model and the model outlives them.
"""

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .attention_processor import Edit, version_of
from .concept import PerfusionConcept
from .connections import Connection, Row
from .model_families import ModelFamily
from .placeholder_tokens import PlaceholderTokens
from .prompt_tracking import Prompt, PromptTracker, RowMemory
from .rank_one_edit import fade, find_tokens, gates, moved, similarities

logger = logging.get_logger(__name__)

Locking = Literal["local", "global"]

# How many batches' edits a thread keeps.
_RECENT = 4

_GONE = (
    "the super-class prompts of some prompt embeddings are not kept any more, and their text encoder is gone, so the "
    "model cannot get them; encode the prompts again, fewer of them before they are used, or keep the text encoder"
)

# How many freed pipelines' prompts are still recognised.
_KEPT_GONE = 4


@dataclass
class LoadedConcept:
    """A concept and the settings it generates with.

    Attributes:
        concept: as it was loaded.
        bias: `β`, a 0-dim float32 tensor, because another number would recompile a compiled model.
        temperature: `τ`, likewise.
    """

    concept: PerfusionConcept
    bias: Tensor
    temperature: Tensor


class _Current:
    """The edit of the batch that a thread calls the model with.

    Attributes:
        edit: None if no row of the batch holds an active concept.
        unchecked: an edit that the model has not returned finite numbers with yet.
        recent: the last batches of hidden states and pooled vectors with how often each had been changed in place, and
            their edits. Some pipelines call the model with the prompts and the negative prompts in turn.
        rows: how many rows each layer that takes them in parts has had in this forward pass.
    """

    def __init__(self) -> None:
        self.edit: Edit | None = None
        self.unchecked: Edit | None = None
        self.recent: list[tuple[list[weakref.ref[Tensor]], list[int | None], Edit | None]] = []
        self.rows: Counter[str] = Counter()


class ConceptRegistry:
    """The concepts that are loaded on a model.

    Args:
        family: of the pipeline that loads the first one.

    Attributes:
        loaded: concepts by name.
        active: names of those that edit, in the order of activation.
        enabled: whether anything is edited at all.
        locking: `local`, or `global`: the keys of the whole prompt from its super-class prompt (paper Section 4).
        layers: the model's edited attention layers by module name.
        projection: of the model, as in `ModelFamily`.
        joint: likewise.
        text_argument: likewise.
        mask_argument: likewise.
        text_behind_image: likewise.
        width: of the hidden states that the model takes.
    """

    def __init__(self, family: ModelFamily) -> None:
        self.loaded: dict[str, LoadedConcept] = {}
        self.active: list[str] = []
        self.enabled = True
        self.locking: Locking = "local"
        self.layers: dict[str, Any] = family.layers
        self.projection: tuple[nn.Module, ...] = family.projection
        self.joint = family.joint
        self.text_argument = family.text_argument
        self.mask_argument = family.mask_argument
        self.text_behind_image = family.text_behind_image
        self.width = family.width
        self.repeats_rows = family.repeats_rows
        self._reset()

    def _reset(self) -> None:
        self._connections: list[Connection] = []
        # Layers whose processor is somebody else's, which may call ours; and those of them that have.
        self.watched: frozenset[str] = frozenset()
        self.called: set[str] = set()
        # The last of those processors of each layer that has called ours.
        self.trusted: dict[str, Any] = {}
        self._given_rows = RowMemory()
        self._warned: dict[tuple[int, str], weakref.ref[Tensor]] = {}
        # Each thread has the edit of the batch that it calls the model with. A backward pass may compute layers again
        # in a thread of its own, which finds the last edit of all.
        self._of_thread = threading.local()
        self._all_current: weakref.WeakSet[_Current] = weakref.WeakSet()
        self._last = _Current()

    def clear_edit(self) -> None:
        """Clear the current edit of every thread, because one of its inputs has changed."""
        for current in list(self._all_current):
            current.edit, current.unchecked, current.recent = None, None, []

    # What is pickled has the concepts and knows no text encoder: pipelines connect theirs when they encode a prompt.

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_connections", "_given_rows", "_warned", "_of_thread", "_all_current", "_last")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConceptRegistry":
        """Return a registry for a copy of the model, which shares the text encoders and does not copy them."""
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._connections = [connection.copy_for(copied) for connection in self._connections]
        for connection in copied._alive:
            for entry in copied.loaded.values():
                connection.add(entry.concept)
        copied._update()
        return copied

    # Concepts

    @property
    def placeholder_tokens(self) -> list[str]:
        """The placeholder tokens of all loaded concepts."""
        return [entry.concept.placeholder_token for entry in self.loaded.values()]

    @property
    def _name_of_token(self) -> dict[str, str]:
        return {entry.concept.placeholder_token: name for name, entry in self.loaded.items()}

    def add(self, name: str, concept: PerfusionConcept) -> None:
        """Load a concept and activate it.

        Raises:
            ValueError: if another has its placeholder token, or a text encoder cannot learn that; then nothing is
                changed.
        """
        if (token := concept.placeholder_token) in self.placeholder_tokens:
            raise ValueError(
                f"{token!r} is the placeholder token of a concept that is loaded already; give this one another with "
                "placeholder_token="
            )
        for connection in self._alive:
            connection.check(concept)
        for connection in self._alive:
            connection.add(concept)
        self.loaded[name] = LoadedConcept(concept, torch.tensor(concept.bias), torch.tensor(concept.temperature))
        self.active.append(name)
        self._update()

    def remove(self, name: str) -> None:
        """Unload a concept.

        Raises:
            ValueError: if somebody has added tokens to a tokenizer since it was loaded.
        """
        token = self.loaded[name].concept.placeholder_token
        with self.detached_tokens():
            for connection in self._connections:
                connection.remove(token)
        del self.loaded[name]
        self.active = [other for other in self.active if other != name]
        self._update()

    def enable(self, enabled: bool) -> None:
        """Enable concepts, or disable them in prompts and layers while they stay loaded.

        Raises:
            ValueError: if somebody has added tokens to a tokenizer since they were loaded.
        """
        if not enabled:
            with self.detached_tokens():
                pass  # all text encoders can give their tokens up
        self.enabled = enabled
        self._update()

    def configure(self, active: Sequence[str], locking: Locking) -> None:
        """Set which concepts are active and how keys are locked, and clear the current edit."""
        self.active, self.locking = list(dict.fromkeys(active)), locking
        self.clear_edit()

    def _update(self) -> None:
        """Clear the current edit, and attach the placeholder tokens if enabled, or else detach them."""
        self.clear_edit()
        for tokens in self._all_tokens:
            if self.enabled:
                tokens.attach(self)
            else:
                tokens.detach(self)

    # Text encoders

    @property
    def _alive(self) -> list[Connection]:
        return [connection for connection in self._connections if connection.is_alive]

    @property
    def _all_tokens(self) -> list[PlaceholderTokens]:
        unique = {id(tokens): tokens for connection in self._connections for tokens in connection.tokens}
        return list(unique.values())

    def connect(self, family: ModelFamily) -> None:
        """Add the placeholder tokens of all concepts to a pipeline's text encoders, unless they have them.

        Raises:
            ValueError: if one cannot learn them; then none does.
        """
        if self.is_connected(family.tokenizers, family.text_encoders):
            return
        connection = Connection(self, family)
        concepts = [entry.concept for entry in self.loaded.values()]
        for concept in concepts:
            connection.check(concept)
        for concept in concepts:
            connection.add(concept)
        gone = [connection for connection in self._connections if not connection.is_alive]
        self._connections = [*gone[-_KEPT_GONE:], *self._alive, connection]
        self._update()

    def is_connected(self, tokenizers: Sequence[Any], text_encoders: Sequence[Any]) -> bool:
        """Return whether these tokenizers and text encoders know the placeholder tokens of all concepts."""
        return any(connection.is_of(tokenizers, text_encoders) for connection in self._connections)

    @contextmanager
    def encoding(
        self, text_encoders: Sequence[Any], clip_skip: int | None, max_sequence_length: int | None
    ) -> Iterator[list[Counter[str]]]:
        """Let a pipeline encode prompts with this registry's tokens alone, and track which hidden states it uses.

        Yields:
            For each text encoder, in how many rows of hidden states each placeholder token was found.

        Args:
            text_encoders: of the pipeline; those that are None encode nothing, and their counters stay empty.
            clip_skip: as in `ModelFamily.possible_hidden_states`.
            max_sequence_length: as in `ModelFamily.kept_positions`.
        """
        found: list[Counter[str]] = []
        with ExitStack() as stack:
            for text_encoder in text_encoders:
                counter: Counter[str] = Counter()
                if (tokens := PlaceholderTokens.existing(text_encoder)) is not None:
                    stack.enter_context(tokens.only(self))
                    tracker = PromptTracker.of(tokens)
                    counter = stack.enter_context(tracker.taking(clip_skip, max_sequence_length))
                found.append(counter)
            yield found

    @contextmanager
    def paused_tracking(self) -> Iterator[None]:
        """Remember no prompt that is encoded in the body of the statement."""
        with ExitStack() as stack:
            for connection in self._connections:
                for tracker in connection.trackers:
                    stack.enter_context(tracker.paused())
            yield

    @contextmanager
    def detached_tokens(self) -> Iterator[None]:
        """Detach all placeholder tokens from tokenizers and text encoders for the body of the statement.

        Raises:
            ValueError: if somebody has added tokens to a tokenizer since concepts were loaded.
        """
        with ExitStack() as stack:
            for tokens in self._all_tokens:
                stack.enter_context(tokens.detached())
            yield

    # Rows

    def register(self, rows: Tensor | Sequence[Tensor], tokens: Mapping[str, tuple[int, ...]]) -> None:
        """Remember which placeholder tokens every row of hidden states `(length, width)` holds.

        Args:
            rows: of hidden states.
            tokens: positions of each token; none where nobody knows them.
        """
        for row in rows:
            self._given_rows.remember(row, Prompt(tokens))
        self.clear_edit()

    def _recognise(self, row: Tensor) -> Row | None:
        """Return which tokens a row `(length, width)` or pooled vector holds; None if it is not recognised."""
        active = sorted(self._active_tokens)
        parts = (connection.recognise(row, active) for connection in self._connections)
        found = next((one for one in parts if one is not None), None)
        if (given := self._given_rows.find(row)) is not None:
            return replace(found or Row(), given=given.tokens)
        # Zeros stand for an empty prompt, in Stable Diffusion XL say.
        return found if found or row.any() else Row()

    def prepare(
        self,
        hidden_states: Tensor | Sequence[Tensor] | None,
        rows: Sequence[Mapping[str, tuple[int, ...]]] | None = None,
        pooled: Tensor | None = None,
    ) -> None:
        """Compute the edit for a batch of hidden states, unless it is the batch of this thread's current edit.

        Args:
            hidden_states: as the model gets them, `(batch, length, width)` or a row for each prompt; None if it is
                called without any.
            rows: positions of the placeholder tokens in each row, where the caller knows them. Then nothing fades.
            pooled: vectors of the prompts, `(batch, d_pooled)`, that a joint-attention model gets beside them.

        Raises:
            ValueError: if tokens whose positions nobody knows cannot be told apart, or a super-class prompt cannot be
                encoded.
        """
        current = getattr(self._of_thread, "current", None)
        if current is None:
            current = self._of_thread.current = _Current()
            self._all_current.add(current)
        self._last = current
        current.rows.clear()
        if hidden_states is None:
            current.edit = None
            return
        inputs = [hidden_states] if isinstance(hidden_states, Tensor) else [*hidden_states]
        inputs += [] if pooled is None else [pooled]
        versions = [version_of(tensor) for tensor in inputs]
        for sources, its_versions, edit in current.recent:
            if [id(source()) for source in sources] == [id(tensor) for tensor in inputs] and its_versions == versions:
                current.edit = edit
                return
        current.edit = None  # also after an error
        # Under joint attention the tokens of concepts that are not active are replaced by their super-class.
        if self.enabled and (self.active or self.joint):
            current.edit = self._edit_of(hidden_states, rows, pooled)
        current.unchecked = current.edit
        alive = [entry for entry in current.recent if all(source() is not None for source in entry[0])]
        current.recent = [*alive[1 - _RECENT :], (list(map(weakref.ref, inputs)), versions, current.edit)]

    def finish(self, output: Any) -> None:
        """Check the output of a forward pass, and leave layers without an edit, for somebody else may call them.

        With gradients the edit stays: a backward pass with gradient checkpointing calls the layers again.

        Args:
            output: of the model: a tensor, one for each image, or a tuple that begins with these.

        Raises:
            ValueError: if it is not finite.
        """
        current = getattr(self._of_thread, "current", None)
        if current is None or torch.is_grad_enabled():
            return
        edit, current.edit = current.edit, None
        if edit is None or edit is not current.unchecked:
            return
        # Once per batch, because it waits for an accelerator.
        output = output if isinstance(output, Tensor) else output[0]
        output = output if isinstance(output, Tensor) else torch.cat([image.flatten() for image in output])
        if not output.isfinite().all():
            self.clear_edit()
            tokens = ", ".join(repr(concept.placeholder_token) for concept in edit.concepts)
            raise ValueError(
                f"with {tokens} the model returns NaN or infinity in {output.dtype}; if it does not without "
                "(disable_perfusion()), use torch.bfloat16 or torch.float32, or train the concept again"
            )
        current.unchecked = None

    @property
    def edit(self) -> Edit | None:
        """The edit of the batch that this thread calls the model with; None if no row holds an active concept."""
        return getattr(self._of_thread, "current", self._last).edit

    def edit_for(self, hidden_states: Tensor, layer: str) -> Edit | None:
        """Return the current edit, since layers get the hidden states of `prepare` or their projection.

        In joint attention a processor may take the rows in parts, one after the other, as that of perturbed-attention
        guidance does.
        """
        if layer in self.watched:
            self.called.add(layer)
        edit = self.edit
        if edit is None or not self.joint or len(hidden_states) >= len(edit.gate):
            return edit
        current = getattr(self._of_thread, "current", self._last)
        start, stop = current.rows[layer], current.rows[layer] + len(hidden_states)
        current.rows[layer] = stop
        return replace(edit, gate=edit.gate[start:stop])

    def _edit_of(
        self,
        texts: Tensor | Sequence[Tensor],
        given: Sequence[Mapping[str, tuple[int, ...]]] | None,
        pooled: Tensor | None,
    ) -> Edit | None:
        if given is not None:
            recognised: list[Row | None] = [Row(given=tokens) for tokens in given]
        else:
            recognised = [self._recognise(row) for row in texts]
        hidden_states = texts if isinstance(texts, Tensor) else pad_sequence(list(texts), batch_first=True)
        if unknown := [number for number, row in enumerate(recognised) if row is None]:
            self._warn(
                hidden_states,
                f"Perfusion does not recognise {len(unknown)} of {len(recognised)} prompt embeddings, so no concept "
                "is applied to them. They were not encoded by this pipeline since its concepts were loaded, or were "
                "weighted or mixed since then: say what they hold, and where, with "
                "mark_perfusion(prompt_embeds, {name: [position]}).",
            )
        inactive = {token for row in recognised if row is not None for token in row.tokens} - self._active_tokens
        if inactive:
            self._warn(
                hidden_states,
                f"{', '.join(sorted(inactive))} in a prompt is not active, so it is not applied; see set_perfusion().",
            )
        rows: dict[int, dict[str, tuple[int, ...]]] = {}
        for number, row in enumerate(recognised):
            tokens = {} if row is None else row.tokens
            edited = self._name_of_token if self.joint else self._active_tokens
            names = {self._name_of_token[token]: places for token, places in tokens.items() if token in edited}
            if names:
                rows[number] = names
        if not rows:
            return None
        if guessed := sorted({name for names in rows.values() for name, places in names.items() if not places}):
            self._warn(
                hidden_states,
                f"Nobody knows where the tokens of {', '.join(map(repr, guessed))} are in these prompt embeddings, so "
                "they are taken to be where the embeddings are most like the concepts, which may be another word; "
                "give their positions, as in mark_perfusion(prompt_embeds, {name: [position]}).",
            )
        superclass_prompt = self._superclass_prompt(hidden_states, {number: recognised[number] for number in rows})
        replaced = [number for number in rows if (row := recognised[number]) and row.is_superclass_prompt]
        longer = 0 if superclass_prompt is None else superclass_prompt.shape[1] - hidden_states.shape[1]
        inputs = self._project(F.pad(hidden_states, (0, 0, 0, longer)))
        # By name, so that the order in which they were loaded or stand in a prompt does not change a bit.
        order = sorted({name for names in rows.values() for name in names})
        entries = [self.loaded[name] for name in order]
        for entry in entries:
            if entry.concept.superclass_input.device != inputs.device:
                entry.concept = entry.concept.to(inputs.device)
            entry.bias, entry.temperature = entry.bias.to(inputs.device), entry.temperature.to(inputs.device)
        coef, gate = self._coefficients(inputs, order, rows)
        new_inputs: Tensor | None = None
        if self.joint:
            concepts = [entry.concept for entry in entries]
            learned = torch.stack([c.target_input.float() - c.superclass_input.float() for c in concepts])
            new_inputs = moved(inputs if superclass_prompt is None else superclass_prompt, gate, learned)
        elif superclass_prompt is not None:
            new_inputs = fade(inputs, superclass_prompt, gate)
        return Edit(
            concepts=tuple(entry.concept for entry in entries),
            superclass_input=torch.stack([entry.concept.superclass_input.float() for entry in entries]),
            coef=coef,
            gate=gate,
            inputs=new_inputs,
            pooled=None if pooled is None or given is not None else self._superclass_pooled(pooled, replaced),
            longer=tuple(0 if row is None else row.longer for row in recognised),
            superclass_prompt=superclass_prompt if self.locking == "global" else None,
            repeats_rows=self.repeats_rows,
            text_behind_image=self.text_behind_image,
        )

    def _superclass_prompt(self, hidden_states: Tensor, rows: Mapping[int, Row | None]) -> Tensor | None:
        """Return what layers get of the super-class prompts, `(batch, length, d)`; None if none is known.

        Args:
            hidden_states: of all rows, as the model gets them.
            rows: those with concepts, by number. The others stay as they are.

        Raises:
            ValueError: if one is not known and keys are locked globally, or the model gets it at whatever gate.
        """
        known = {
            number: found
            for number, row in rows.items()
            if row is not None and (found := row.superclass_row(hidden_states[number])) is not None
        }
        if len(known) < len(rows) and self.locking == "global":
            raise ValueError(
                f"global key-locking needs the super-class prompt, and nobody knows that of {len(rows) - len(known)} "
                "prompt embeddings: they were weighted or mixed, or their text encoder is gone; lock the keys with "
                "set_perfusion(locking='local')"
            )
        gone = [row for number, row in rows.items() if row is not None and row.parts and number not in known]
        if any(row.is_superclass_prompt for row in gone):
            raise ValueError(_GONE)
        if gone:
            self._warn(
                hidden_states,
                "The super-class prompts of some prompt embeddings are not kept any more, and their text encoder is "
                "gone, so a high bias leads less far towards the super-class; keep the text encoder, or encode fewer "
                "prompts.",
            )
        if not known:
            return None
        # They may be longer, where the model gets as much text as there is.
        length = max(hidden_states.shape[1], *map(len, known.values()))
        superclass_prompt = F.pad(hidden_states, (0, 0, 0, length - hidden_states.shape[1])).clone()
        for number, found in known.items():
            superclass_prompt[number, : len(found)] = found
        return self._project(superclass_prompt)

    def _superclass_pooled(self, pooled: Tensor, replaced: Sequence[int]) -> Tensor:
        """Return pooled vectors `(batch, d_pooled)`, with those of super-class prompts where a prompt has a token.

        Args:
            pooled: of all prompts, as the model gets them.
            replaced: numbers of the prompts that are replaced by super-class prompts.

        Raises:
            ValueError: as `_superclass_prompt`.
        """
        found = pooled.clone()
        recognised = [self._recognise(vector) for vector in pooled]
        for number, row in enumerate(recognised):
            if row is not None and row.tokens:
                superclass = row.superclass_row(pooled[number])
                if superclass is None:
                    raise ValueError(_GONE)
                found[number] = superclass
        if unknown := [number for number in replaced if recognised[number] is None]:
            self._warn(
                pooled,
                f"Perfusion does not recognise {len(unknown)} of {len(pooled)} pooled prompt embeddings, so the model "
                "does not get those of the super-class prompts in their place; give them as encode_prompt returns "
                "them.",
            )
        return found

    def _coefficients(
        self, inputs: Tensor, order: Sequence[str], rows: Mapping[int, Mapping[str, tuple[int, ...]]]
    ) -> tuple[Tensor, Tensor]:
        """Return `coef` and `gate` of the concepts in `order`, `(batch, length, J)`.

        Args:
            inputs: `e`, `(batch, length, d)`.
            order: names of the concepts.
            rows: positions of each concept's token by the number of the row; empty where nobody knows them.

        Raises:
            ValueError: if tokens whose positions nobody knows cannot be told apart.
        """
        entries = [self.loaded[name] for name in order]

        def stack(name: str) -> Tensor:
            return torch.stack([getattr(entry.concept, name).float() for entry in entries])

        coef = similarities(inputs, stack("superclass_input"), stack("inverse_superclass_input"))
        known, unknown = torch.zeros(2, *coef.shape, dtype=torch.bool)
        for number, row in rows.items():
            for name, places in row.items():
                if name in self.active:
                    known[number, list(places), order.index(name)] = True
                    unknown[number, :, order.index(name)] = not places
        tokens = upload(known, coef.device)
        if unknown.any():
            similarity = similarities(inputs, stack("target_input"), stack("inverse_target_input"))
            # Concepts that are not in a row are not told apart from those that are.
            asked = upload(unknown, coef.device)
            found = find_tokens(similarity.masked_fill(~asked, 0)) & asked
            if ((tokens | found).sum(-1) > 1).any():
                raise ValueError(
                    f"the tokens of {', '.join(map(repr, order))} cannot be told apart in these prompt embeddings; "
                    "give their positions, as in mark_perfusion(prompt_embeds, {'my-cat': [2], 'my-dog': [5]})"
                )
            tokens = tokens | found
        bias, temperature = (
            torch.stack([getattr(entry, name) for entry in entries]).to(coef) for name in ("bias", "temperature")
        )
        return coef, gates(tokens, bias, temperature)

    @property
    def _active_tokens(self) -> set[str]:
        return {self.loaded[name].concept.placeholder_token for name in self.active}

    def _project(self, hidden_states: Tensor) -> Tensor:
        """Apply the model's projection to hidden states, as its cross-attention layers get them."""
        for module in self.projection:
            hidden_states = module.forward(hidden_states)  # past the hooks on it, one of which has called this
        return hidden_states

    def _warn(self, hidden_states: Tensor, message: str) -> None:
        """Log a warning once per batch, although pipelines call the model with it at every denoising step."""
        self._warned = {key: reference for key, reference in self._warned.items() if reference() is not None}
        if (key := (id(hidden_states), message)) not in self._warned:
            self._warned[key] = weakref.ref(hidden_states)
            logger.warning(message)


def registry_of(model: Any) -> ConceptRegistry | None:
    """Return the registry of a model, or None if it has no concept."""
    return getattr(model, "_perfusion", None)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting for the copy."""
    # Copies from memory that is not pinned are waited for; Apple's accelerator may read memory after it is freed.
    if device.type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
