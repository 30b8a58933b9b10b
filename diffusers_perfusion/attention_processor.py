"""`PerfusionAttnProcessor`: cross-attention with concepts edited into its keys and values."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from inspect import signature
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from .rank_one_edit import edit, find_tokens, gates, similarities

# What models give any processor; further arguments only to one that names them.
_USUAL_ARGUMENTS = {"attn", "hidden_states", "encoder_hidden_states", "attention_mask", "temb", "args", "kwargs"}

# From hidden states `(..., d)` to keys or values `(..., d_out)`.
Projection = Callable[[Tensor], Tensor]


# Similarity to the target input from which on a position may be a token, where prompts are not known.
MIN_SIMILARITY = 0.5


class Concept(Protocol):
    """The attributes of a `PerfusionConcept` that the edit reads."""

    placeholder_token: str
    base_model: str
    target_input: Tensor
    inverse_target_input: Tensor
    superclass_input: Tensor
    inverse_superclass_input: Tensor
    target_outputs: dict[str, Tensor]
    bias: float
    temperature: float

    @property
    def width(self) -> int:
        """Width of the hidden states that it edits, `d`."""

    def to(self, *args: Any, **kwargs: Any) -> "Concept":
        """Return the same concept with every tensor passed through `Tensor.to`."""


@dataclass(frozen=True)
class Edit:
    """The part of the edit that all layers share, for one batch of hidden states.

    Attributes:
        concepts: the `J` concepts.
        superclass_input: `i_super` of each concept, `(J, d)`.
        coef: similarity of hidden states to these, of `rank_one_edit.similarities`, `(batch, length, J)`.
        gate: of `rank_one_edit.gates`, `(batch, length, J)`.
        inputs: what layers project instead of their hidden states, of `rank_one_edit.fade`, `(batch, length, d)`;
            None for the hidden states as they are. Under joint attention what the model gets, of
            `rank_one_edit.moved`.
        pooled: the pooled vectors that the model gets instead of its own, `(batch, d_pooled)`; None for its own.
        longer: by how many tokens the text that the model gets is longer in each row than its own, whose mask it has.
        superclass_prompt: hidden states of the super-class prompts, `(batch, length, d)`, which all keys are computed
            from under global key-locking; None under local key-locking.
        repeats_rows: whether the model repeats each row (`repeat_interleave`) before it calls its layers.
        text_behind_image: as in `ModelFamily`.
    """

    concepts: tuple[Concept, ...]
    superclass_input: Tensor
    coef: Tensor
    gate: Tensor
    inputs: Tensor | None = None
    pooled: Tensor | None = None
    longer: tuple[int, ...] = ()
    superclass_prompt: Tensor | None = None
    repeats_rows: bool = False
    text_behind_image: int = 0

    def repeated(self, tensor: Tensor, batch: int) -> Tensor:
        """Return a tensor `(rows, length, ...)` of this edit with each row repeated to fill a layer's batch.

        One row of text may stand for a batch of images, without a model that repeats it.

        Raises:
            RuntimeError: if the layer's batch is another than the model's, and the model does not repeat rows.
        """
        if len(tensor) == batch:
            return tensor
        if (len(tensor) > 1 and not self.repeats_rows) or batch % len(tensor):
            raise RuntimeError(
                f"an attention layer got {batch} rows of hidden states, but its model got {len(tensor)}; "
                "Perfusion does not know which prompt each row belongs to"
            )
        return tensor.repeat_interleave(batch // len(tensor), dim=0)


class EditSource(Protocol):
    """Where a processor finds the edit for the hidden states that its layer is called with."""

    def edit_for(self, hidden_states: Tensor, layer: str) -> Edit | None:
        """Return the edit for hidden states `(batch, length, d)`, or None to leave the layer as it is."""


class ContentGate:
    """Computes the edit from hidden states alone, at the positions that are most like each concept.

    Args:
        concepts: what to edit in.
        bias: `β` of each concept; by default its own.
        temperature: `τ` of each concept; by default its own.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        bias: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
    ):
        self.concepts = tuple(concepts)
        self.bias = _one_each("bias", bias, [concept.bias for concept in self.concepts])
        self.temperature = _one_each("temperature", temperature, [concept.temperature for concept in self.concepts])
        self._last: tuple[weakref.ref[Tensor], int | None, Edit] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}

    def edit_for(self, hidden_states: Tensor, layer: str) -> Edit | None:
        """Return the edit for hidden states `(batch, length, d)`; it is computed once for all layers and steps."""
        if torch.compiler.is_compiling():  # a graph cannot hold what an earlier call has computed
            return self._edit(hidden_states)
        last, version = self._last, version_of(hidden_states)
        if last is None or last[0]() is not hidden_states or last[1] != version:
            last = (weakref.ref(hidden_states), version, self._edit(hidden_states))
            self._last = last
        return last[2]

    def _edit(self, hidden_states: Tensor) -> Edit:
        device = hidden_states.device
        if any(concept.superclass_input.device != device for concept in self.concepts):
            self.concepts = tuple(concept.to(device) for concept in self.concepts)

        def stack(name: str) -> Tensor:
            return torch.stack([getattr(concept, name).float() for concept in self.concepts])

        similarity = similarities(hidden_states, stack("target_input"), stack("inverse_target_input"))
        tokens = find_tokens(similarity) & (similarity > MIN_SIMILARITY)
        superclass_input = stack("superclass_input")
        coef = similarities(hidden_states, superclass_input, stack("inverse_superclass_input"))
        gate = gates(tokens, self.bias.to(coef), self.temperature.to(coef))
        return Edit(self.concepts, superclass_input, coef, gate)


def _one_each(name: str, value: float | Sequence[float] | None, defaults: Sequence[float]) -> Tensor:
    """Return one value of a setting per concept, as a float32 vector."""
    if value is None:
        value = defaults
    values = [value] * len(defaults) if isinstance(value, (int, float)) else list(value)
    if len(values) != len(defaults):
        raise ValueError(f"{name} has {len(values)} numbers for {len(defaults)} concepts; expected one each")
    return torch.tensor(values, dtype=torch.float32)


class PerfusionAttnProcessor:
    """An attention processor that edits concepts into the keys and values of one cross-attention layer (paper Eq. 3).

    It calls the processor that it wraps with the same layer, whose `to_k` and `to_v` return edited keys and values. So
    attention itself is computed as the user has chosen. The projections are called as modules and never read as
    weights, which respects a LoRA, quantisation or offloading in them.

    Used alone, as in `unet.set_attn_processor(concept.attn_processors(unet))`, it knows hidden states and not prompts.
    In each row the position that is most like a concept's target input counts as its token, if it is at least half as
    similar as that itself. That costs six things:
    - A token is not found where the words around it change it too much, and only one of several occurrences is.
    - A prompt of the plain super-class may be edited too.
    - Global key-locking is not there: it needs the super-class prompt.
    - A high bias leads less far towards the super-class, because hidden states do not fade (`rank_one_edit.fade`).
    - A prompt without the token, or whose token the tokenizer does not know, gets no warning.
    - Numbers of a concept that make the model return NaN get no error.
    Pipelines with `load_perfusion` know the rows and have none of these costs.

    Args:
        concepts: one `PerfusionConcept`, or several.
        layer: name of the attention module in its model, the key of `PerfusionConcept.target_outputs`.
        bias: `β`, one for all concepts or one each; by default each concept's own.
        temperature: `τ`, likewise.
        processor: the processor to wrap; by default `AttnProcessor2_0`.
        edits: where edits come from instead of the content gate; `bias` and `temperature` then have no meaning.

    Raises:
        ValueError: if there is not one bias or temperature for each concept, or a concept has no output for the layer.
    """

    processor: Any
    layer: str
    edits: EditSource

    def __init__(
        self,
        concepts: Concept | Sequence[Concept],
        layer: str,
        bias: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        processor: Any = None,
        edits: EditSource | None = None,
    ):
        concepts = list(concepts) if isinstance(concepts, Sequence) else [concepts]
        for concept in concepts:
            if layer not in concept.target_outputs:
                raise ValueError(
                    f"the concept {concept.placeholder_token!r} has no output for the layer {layer!r}; expected one "
                    f"of {', '.join(list(concept.target_outputs)[:3])}, …"
                )
        self.__setstate__(
            {
                "processor": AttnProcessor2_0() if processor is None else processor,
                "layer": layer,
                "edits": edits or ContentGate(concepts, bias, temperature),
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "__call__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not by `nn.Module.__setattr__`, which would save the weights of a wrapped module under a second name.
        vars(self).update(state)
        # `Attention` passes on only the arguments that it finds in the signature of its processor. Not for a processor
        # without others: `torch.compile` cannot trace a `__call__` of an instance.
        if set(signature(self.processor.__call__).parameters) - _USUAL_ARGUMENTS:
            vars(self)["__call__"] = update_wrapper(partial(type(self).__call__, self), self.processor.__call__)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute attention, with all arguments of the wrapped processor."""
        edit = None if encoder_hidden_states is None else self.edits.edit_for(encoder_hidden_states, self.layer)
        if edit is None or isinstance(attn, _EditedAttention):  # a wrapper of another package holds our processor
            return self.processor(attn, hidden_states, encoder_hidden_states, **kwargs)
        edited = _EditedAttention(attn, self.layer, edit)
        output = self.processor(edited, hidden_states, encoder_hidden_states, **kwargs)
        if edited.unused:
            raise RuntimeError(
                f"{type(self.processor).__name__} on {self.layer} computes attention without calling "
                f"{' and '.join(sorted(edited.unused))}, so concepts cannot be edited in; set another processor or "
                "unfuse the projections (unfuse_qkv_projections)"
            )
        return output


class _PerfusionModuleProcessor(PerfusionAttnProcessor, nn.Module):
    """Wraps a processor that has weights, such as IP-Adapter's, and keeps their names in the model's state dict."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        super().__setstate__(state)
        wrapped = self.processor
        self._modules, self._parameters, self._buffers = wrapped._modules, wrapped._parameters, wrapped._buffers


def wrap(processor: Any, concepts: Sequence[Concept], layer: str, edits: EditSource) -> PerfusionAttnProcessor:
    """Wrap an attention processor in a `PerfusionAttnProcessor`."""
    kind = _PerfusionModuleProcessor if isinstance(processor, nn.Module) else PerfusionAttnProcessor
    return kind(concepts, layer, processor=processor, edits=edits)


def attn_processors(
    concepts: Sequence[Concept],
    model: Any,
    bias: float | Sequence[float] | None = None,
    temperature: float | Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return all processors of a model for its `set_attn_processor`, wrapped in the layers that concepts edit.

    Args:
        concepts: what to edit in.
        model: a UNet, or a transformer with `attn_processors`.
        bias: `β`, one for all concepts or one each; by default each concept's own.
        temperature: `τ`, likewise.

    Raises:
        ValueError: if the model has no cross-attention, or the concepts are of another one.
    """
    processors = dict(getattr(model, "attn_processors", {}))  # some models with joint attention have none
    modules = {name.removesuffix(".processor"): name for name in processors}
    layers = {name: model.get_submodule(name) for name in modules}
    layers = {name: layer for name, layer in layers.items() if getattr(layer, "is_cross_attention", False)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no cross-attention for processors to edit; load the concept into a pipeline "
            "with load_perfusion()"
        )
    widths = {name: (layer.cross_attention_dim, layer.inner_kv_dim) for name, layer in layers.items()}
    for concept in concepts:
        check_concept_fits(concept, model, widths)
    if edited := [name for name, layer in layers.items() if isinstance(layer.processor, PerfusionAttnProcessor)]:
        raise ValueError(
            f"{len(edited)} layers ({edited[0]}, …) have a PerfusionAttnProcessor already, whose concepts would be "
            "lost; set the model's own processors again, such as AttnProcessor2_0(), and name all concepts in one call"
        )
    edits = ContentGate(concepts, bias, temperature)
    return processors | {modules[layer]: wrap(processors[modules[layer]], concepts, layer, edits) for layer in layers}


def check_concept_fits(concept: Concept, model: Any, widths: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError unless a concept has the layers and widths of a model, and its numbers are within its dtype.

    Args:
        concept: to edit in.
        model: to edit it into.
        widths: of the hidden states that the model takes and of each layer's values, by the layer's name.
    """
    base = f"{type(model).__name__} ({getattr(model, 'name_or_path', '') or 'unnamed'})"
    trained_on = f"The concept was trained on {concept.base_model or 'an unnamed model'}."
    for name, (input_width, output_width) in widths.items():
        if input_width != concept.width:
            raise ValueError(
                f"the concept {concept.placeholder_token!r} edits hidden states of width {concept.width}, but {base} "
                f"takes width {input_width}. {trained_on}"
            )
        if name in concept.target_outputs and len(concept.target_outputs[name]) != output_width:
            raise ValueError(
                f"the concept {concept.placeholder_token!r} has an output of {len(concept.target_outputs[name])} "
                f"numbers for {name}, but that layer of {base} has {output_width}. {trained_on}"
            )
    missing = sorted(widths.keys() - concept.target_outputs.keys())
    unexpected = sorted(concept.target_outputs.keys() - widths.keys())
    if missing or unexpected:
        raise ValueError(
            f"the concept {concept.placeholder_token!r} does not have the attention layers of {base}: "
            f"{len(missing)} missing ({', '.join(missing[:2])}), {len(unexpected)} unknown "
            f"({', '.join(unexpected[:2])}). {trained_on}"
        )
    if getattr(model, "dtype", None) == torch.float16:  # the one dtype with a smaller range than a concept file's
        largest = max(output.abs().max() for output in (concept.superclass_input, *concept.target_outputs.values()))
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"the concept {concept.placeholder_token!r} holds {largest:.2g}, which is too large for {base} in "
                f"torch.float16; load the model in torch.bfloat16 or torch.float32. {trained_on}"
            )


class _EditedAttention:
    """Stands in for an `Attention`, with a `to_k` and a `to_v` that return edited keys and values (paper Eq. 3)."""

    def __init__(self, attn: Attention, layer: str, edit: Edit):
        self._attn = attn
        self._layer = layer
        self._edit = edit
        self.unused = {"to_k", "to_v"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_k(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """Return keys locked to the super-class: `o*_K = W_K i_super`, or globally those of the super-class prompt.

        Both are from the paper's Section 4.
        """
        self.unused.discard("to_k")
        return self._keys(lambda inputs: self._attn.to_k(inputs, *args), hidden_states)

    def to_v(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """Return values with the learned `o*_V`."""
        self.unused.discard("to_v")
        return self._values(lambda inputs: self._attn.to_v(inputs, *args), hidden_states)

    def to_kv(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """Return keys and values side by side, as fused projections do."""
        self.unused.clear()
        projection: Any = self._attn.to_kv
        keys = self._keys(lambda inputs: projection(inputs, *args).chunk(2, -1)[0], hidden_states)
        values = self._values(lambda inputs: projection(inputs, *args).chunk(2, -1)[1], hidden_states)
        return torch.cat([keys, values], -1)

    def _keys(self, projection: Projection, hidden_states: Tensor) -> Tensor:
        if self._edit.superclass_prompt is not None:
            return projection(self._instead_of(hidden_states, self._edit.superclass_prompt))
        w_i = self._projected(projection, hidden_states.dtype)
        return self._edited(projection(self._instead_of(hidden_states, self._edit.inputs)), w_i, w_i)

    def _values(self, projection: Projection, hidden_states: Tensor) -> Tensor:
        # Cast one by one: autocast on a CPU does not stack half precision, in which files are stored.
        outputs = [concept.target_outputs[self._layer].to(hidden_states) for concept in self._edit.concepts]
        w_i = self._projected(projection, hidden_states.dtype)
        inputs = self._instead_of(hidden_states, self._edit.inputs)
        return self._edited(projection(inputs), w_i, torch.stack(outputs))

    def _instead_of(self, hidden_states: Tensor, others: Tensor | None) -> Tensor:
        """Return other hidden states of the edit as the layer takes them, or its own if there are none."""
        if others is None:
            return hidden_states
        return self._edit.repeated(others.to(hidden_states.dtype), len(hidden_states))

    def _edited(self, h: Tensor, w_i: Tensor, o: Tensor) -> Tensor:
        coef, gate = (self._edit.repeated(part, len(h)) for part in (self._edit.coef, self._edit.gate))
        return edit(h, coef, gate, w_i, o)

    def _projected(self, projection: Projection, dtype: torch.dtype) -> Tensor:
        """Return `W i_j` of all concepts, `(J, d_out)`, without the projection's bias."""
        inputs = self._edit.superclass_input.to(dtype)
        # The bias is found by calling the projection, because its weights may not be there to read.
        outputs = projection(torch.cat([inputs, torch.zeros_like(inputs[:1])]))
        return outputs[:-1] - outputs[-1:]


def version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None in inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version
