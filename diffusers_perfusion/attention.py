"""`PerfusionAttnProcessor`, and how it is put on a model and taken off."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from .concept import PerfusionConcept
from .editing import edit
from .state import Edit, Made, PerfusionState, version_of

# From encodings `(..., d)` to keys or values `(..., d_out)`.
Projection = Callable[[Tensor], Tensor]


class PerfusionAttnProcessor:
    """Cross-attention with the concepts of a `PerfusionState` edited into its keys and values.

    It wraps the processor that was there and hands it the same layer with `to_k` and `to_v` edited, so that attention
    itself is computed by whatever the user has chosen, and without an edit to the very same bits. The projections are
    called as modules, never read as weights: a LoRA, quantisation or offloading in them is respected.

    Args:
        processor: the processor it wraps.
        layer: name of the attention module in its model, the key of `PerfusionConcept.target_outputs`.
        state: what to edit in.
    """

    processor: Any
    layer: str
    state: PerfusionState

    def __init__(self, processor: Any, layer: str, state: PerfusionState):
        # Past `nn.Module.__setattr__`, which would save the weights of a processor that has some under another name.
        vars(self).update(processor=processor, layer=layer, state=state)
        # `Attention` passes on only the arguments that it finds in the signature of its processor.
        vars(self)["__call__"] = update_wrapper(partial(type(self).__call__, self), processor.__call__)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As any diffusers attention processor; further keyword arguments go to the wrapped one."""
        if self.state.edit is None or encoder_hidden_states is None:
            return self.processor(attn, hidden_states, encoder_hidden_states, **kwargs)
        edited = _EditedAttention(attn, self.layer, self.state.edit)
        output = self.processor(edited, hidden_states, encoder_hidden_states, **kwargs)
        if edited.unused:
            raise RuntimeError(
                f"{type(self.processor).__name__} on {self.layer} computes attention without calling "
                f"{' and '.join(sorted(edited.unused))}, so concepts cannot be edited in; set another processor or "
                "unfuse the projections (unfuse_qkv_projections)"
            )
        return output


class _PerfusionModuleProcessor(PerfusionAttnProcessor, nn.Module):
    """Around a processor with weights of its own, such as IP-Adapter's: they stay where the UNet finds them."""

    def __init__(self, processor: nn.Module, layer: str, state: PerfusionState):
        nn.Module.__init__(self)
        super().__init__(processor, layer, state)
        self._modules, self._parameters, self._buffers = processor._modules, processor._parameters, processor._buffers


class _EditedAttention:
    """Stands in for an `Attention` whose `to_k` and `to_v` give edited keys and values (paper Eq. 4).

    Text does not change between denoising steps, so what they give is made once for an encoding, and given again.
    """

    def __init__(self, attn: Attention, layer: str, edit: Edit):
        self._attn = attn
        self._layer = layer
        self._edit = edit
        self.unused = {"to_k", "to_v"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_k(self, encodings: Tensor, *args: Any) -> Tensor:
        """Locked keys: `o*_K = W_K i_super`, or globally the keys of the super-category twin (paper Section 4)."""
        self.unused.discard("to_k")
        return self._once("to_k", self._keys, encodings, args)

    def to_v(self, encodings: Tensor, *args: Any) -> Tensor:
        """Learned values `o*_V`."""
        self.unused.discard("to_v")
        return self._once("to_v", self._values, encodings, args)

    def to_kv(self, encodings: Tensor, *args: Any) -> Tensor:
        """Keys and values side by side, of projections that are fused."""
        self.unused.clear()
        return self._once("to_kv", self._keys_and_values, encodings, args)

    def _once(self, name: str, make: Callable[..., Tensor], encodings: Tensor, args: tuple[Any, ...]) -> Tensor:
        """What `make` gives; not made again while all that it is made of is the same."""
        projection = getattr(self._attn, name)
        if args or not _is_repeatable(projection):
            return make(lambda inputs: projection(inputs, *args), encodings)
        outputs = [concept.target_outputs[self._layer] for concept in self._edit.concepts]
        version = (
            [version_of(tensor) for tensor in (encodings, *projection.parameters(), *outputs)],
            [(weight.data_ptr(), weight.dtype) for weight in projection.parameters()],
            torch.is_autocast_enabled(encodings.device.type) and torch.get_autocast_dtype(encodings.device.type),
        )
        made = self._edit.made.get((self._layer, name))
        if made is None or made.encodings is not encodings or made.version != (*version, version_of(made.output)):
            output = make(projection, encodings)
            made = self._edit.made[self._layer, name] = Made(encodings, (*version, version_of(output)), output)
        return made.output

    def _keys(self, projection: Projection, encodings: Tensor) -> Tensor:
        if self._edit.keys is not None:
            return projection(self._edit.keys.to(encodings.dtype))
        w_i, w_super = self._project(projection, encodings.dtype)
        return edit(projection(encodings), self._edit.coef, self._edit.gate, w_i, w_super, w_super)

    def _values(self, projection: Projection, encodings: Tensor) -> Tensor:
        w_i, w_super = self._project(projection, encodings.dtype)
        # Cast one by one: autocast on a CPU does not stack half precision, in which files are stored.
        o = torch.stack([concept.target_outputs[self._layer].to(encodings.dtype) for concept in self._edit.concepts])
        return edit(projection(encodings), self._edit.coef, self._edit.gate, w_i, o, w_super)

    def _keys_and_values(self, projection: Projection, encodings: Tensor) -> Tensor:
        keys, values = (partial(_half, projection, number) for number in range(2))
        return torch.cat([self._keys(keys, encodings), self._values(values, encodings)], -1)

    def _project(self, projection: Projection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`W i_j` and `W i_super` of all concepts, `(J, d_out)` each."""
        inputs = torch.cat([self._edit.target_input, self._edit.superclass_input])
        w_i, w_super = _linear(projection, inputs.to(dtype)).chunk(2)
        return w_i, w_super


def _is_repeatable(projection: nn.Module) -> bool:
    """Whether a projection gives the same for the same: not while learning, nor with what others have put on it.

    A LoRA, quantisation or offloading may change at any step, and a graph cannot hold what it has given.
    """
    return (
        type(projection) is nn.Linear
        and "forward" not in vars(projection)
        and not (projection._forward_hooks or projection._forward_pre_hooks)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _half(projection: Projection, number: int, inputs: Tensor) -> Tensor:
    """Of what fused projections give, the keys or the values."""
    return projection(inputs).chunk(2, -1)[number]


def _linear(projection: Projection, inputs: Tensor) -> Tensor:
    """`W x` of a projection that may add a bias, without reading it: `(J, d)` to `(J, d_out)`."""
    outputs = projection(torch.cat([inputs, torch.zeros_like(inputs[:1])]))
    return outputs[:-1] - outputs[-1:]


def cross_attention_layers(model: Any) -> dict[str, Attention]:
    """The cross-attention layers of a model by module name.

    Raises:
        ValueError: if it has none, as joint-attention models do.
    """
    state = get_state(model)
    if state is not None:
        return state.layers
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Attention) and layer.is_cross_attention and layer.added_kv_proj_dim is None
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no cross-attention layer from text; Perfusion edits the keys and values of "
            "cross-attention, and cannot work on models that process text and picture in one joint attention"
        )
    return layers


def text_projection(model: Any) -> tuple[nn.Module, ...]:
    """What a model passes text encodings through, one after the other, before its cross-attention layers get them."""
    parts = (getattr(model, name, None) for name in ("caption_projection", "caption_norm"))
    return tuple(part for part in parts if part is not None)


def check_concept_fits(concept: PerfusionConcept, model: Any) -> None:
    """Raise ValueError unless a concept has an output of the right width for each cross-attention layer of a model."""
    layers = cross_attention_layers(model)
    base = f"{type(model).__name__} ({getattr(model, 'name_or_path', '') or 'unnamed'})"
    made_for = f"The concept was made for {concept.base_model or 'an unnamed model'}."
    for name, layer in layers.items():
        if layer.cross_attention_dim != concept.width:
            raise ValueError(
                f"the concept {concept.placeholder_token!r} edits text encodings of width {concept.width}, but "
                f"{base} takes width {layer.cross_attention_dim}. {made_for}"
            )
        if name in concept.target_outputs and len(concept.target_outputs[name]) != layer.inner_kv_dim:
            raise ValueError(
                f"the concept {concept.placeholder_token!r} has an output of {len(concept.target_outputs[name])} "
                f"numbers for {name}, but that layer of {base} has {layer.inner_kv_dim}. {made_for}"
            )
    missing = sorted(layers.keys() - concept.target_outputs.keys())
    unexpected = sorted(concept.target_outputs.keys() - layers.keys())
    if missing or unexpected:
        raise ValueError(
            f"the concept {concept.placeholder_token!r} does not have the cross-attention layers of {base}: "
            f"{len(missing)} missing ({', '.join(missing[:2])}), {len(unexpected)} unknown "
            f"({', '.join(unexpected[:2])}). {made_for}"
        )


def get_state(model: Any) -> PerfusionState | None:
    """The state that hangs on a model, or None if there is none."""
    return getattr(model, "_perfusion", None)


def attach(model: Any, state: PerfusionState) -> None:
    """Hang a state on a model, and put a `PerfusionAttnProcessor` around every processor that has none.

    Raises:
        ValueError: if the model has no cross-attention from text.
    """
    if get_state(model) is None:
        state.layers, state.projection = cross_attention_layers(model), text_projection(model)
        model._perfusion = state
        model._perfusion_hook = (
            model.register_forward_pre_hook(_prepare, with_kwargs=True)
            if not state.projection
            else state.projection[0].register_forward_hook(partial(_prepare_projected, state))
        )
    for name, layer in state.layers.items():
        if not isinstance(layer.processor, PerfusionAttnProcessor):
            module = isinstance(layer.processor, nn.Module)
            kind = _PerfusionModuleProcessor if module else PerfusionAttnProcessor
            layer.set_processor(kind(layer.processor, name, state))


def detach(model: Any) -> None:
    """Give every layer back the very processor it had, and drop the state. Does nothing if there is none."""
    if get_state(model) is None:
        return
    for layer in cross_attention_layers(model).values():
        if isinstance(layer.processor, PerfusionAttnProcessor):
            layer.set_processor(layer.processor.processor)
    model._perfusion_hook.remove()
    del model._perfusion, model._perfusion_hook


def replaced_layers(state: PerfusionState) -> dict[str, str]:
    """Layers whose `PerfusionAttnProcessor` someone has replaced since `attach`, with what is there now."""
    return {
        name: type(layer.processor).__name__
        for name, layer in state.layers.items()
        if not isinstance(layer.processor, PerfusionAttnProcessor)
    }


@torch.compiler.disable  # encodings are known by their content, which no graph can hold
def _prepare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: the edit for its text encoding, once for all layers and steps."""
    state = model._perfusion
    encodings = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
    if isinstance(encodings, tuple):  # text and image encodings, as IP-Adapter passes them
        encodings = encodings[0]
    if encodings is None:
        state.refresh()
        return
    state.prepare(encodings)
    _check_processors(state)


@torch.compiler.disable
def _prepare_projected(state: PerfusionState, projection: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    """Forward hook of the first module that a model passes text encodings through, as `_prepare`."""
    state.prepare(args[0])
    _check_processors(state)


def _check_processors(state: PerfusionState) -> None:
    if state.edit is not None and (replaced := replaced_layers(state)):
        name, processor = next(iter(replaced.items()))
        raise RuntimeError(
            f"the attention processors of {len(replaced)} layers were replaced after concepts were loaded ({name} has "
            f"{processor}), so the concepts would be lost there; call enable_perfusion() to put them back, or "
            "unload_perfusion() to do without"
        )
