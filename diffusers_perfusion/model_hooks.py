"""Attach a registry to its model: the forward hook that prepares the edit, and what edits in the layers.

That is wrapped attention processors, or in joint attention hooks on the projections.
"""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_processor import PerfusionAttnProcessor, wrap
from .joint_attention import hook_values, unhook_values
from .model_families.base import uncompiled
from .registry import ConceptRegistry, registry_of

_DISTRIBUTED = (
    "{} is distributed over several devices (enable_parallelism), whose layers get only parts of the text, so "
    "concepts cannot be edited in; generate on one device, or without concepts"
)


def attach(model: Any, registry: ConceptRegistry) -> None:
    """Put a registry on a model, and its edit into every layer that does not have it yet.

    Raises:
        ValueError: as `check_processors` or `value_sites`, or if the model is distributed over several devices.
    """
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(_DISTRIBUTED.format(type(model).__name__))
    check_processors(registry)
    if registry.joint:
        hook_values(registry, registry.layers)
    if registry_of(model) is None:
        model._perfusion = registry
        if registry.joint:
            before = model.register_forward_pre_hook(_prepare_joint, with_kwargs=True)
        elif registry.projection:
            before = registry.projection[0].register_forward_hook(partial(_prepare_projected, registry))
        else:
            before = model.register_forward_pre_hook(_prepare, with_kwargs=True)
        model._perfusion_hooks = [before, model.register_forward_hook(_finish)]
    for name in {} if registry.joint else replaced_layers(registry):
        layer = registry.layers[name]
        layer.set_processor(wrap(layer.processor, (), name, registry))


def detach(model: Any) -> None:
    """Give every layer back the processor it had, and take the registry off. Does nothing if there is none.

    A `PerfusionAttnProcessor` that other code still holds edits nothing afterwards.
    """
    registry = registry_of(model)
    if registry is None:
        return
    if registry.joint:
        unhook_values(registry, registry.layers)
    for layer in registry.layers.values():
        if _is_of(registry, layer.processor):
            layer.set_processor(layer.processor.processor)
    for hook in model._perfusion_hooks:
        hook.remove()
    del model._perfusion, model._perfusion_hooks


def check_processors(registry: ConceptRegistry) -> None:
    """Raise ValueError if a layer has a `PerfusionAttnProcessor` of somebody else, which would hide the registry's."""
    for name, layer in registry.layers.items():
        if isinstance(layer.processor, PerfusionAttnProcessor) and layer.processor.edits is not registry:
            raise ValueError(
                f"{name} has a PerfusionAttnProcessor already, from attn_processors() or another model, which would "
                "hide these concepts; set the model's own processors again, such as AttnProcessor2_0(), before loading"
            )


def replaced_layers(registry: ConceptRegistry) -> dict[str, str]:
    """Return the layers whose processor may not edit, with the class of the one that is there.

    These are processors that are not the registry's, or in joint attention not diffusers', which call the projections.
    """
    return {
        name: type(layer.processor).__name__
        for name, layer in registry.layers.items()
        if not (_is_of_diffusers(layer.processor) if registry.joint else _is_of(registry, layer.processor))
    }


def _is_of_diffusers(processor: Any) -> bool:
    return type(processor).__module__.partition(".")[0] == "diffusers"


def _is_of(registry: ConceptRegistry, processor: Any) -> bool:
    return isinstance(processor, PerfusionAttnProcessor) and processor.edits is registry


@torch.compiler.disable  # rows are recognised by their content, which no graph can hold
def _prepare(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the model: compute the edit for its hidden states, once for all layers and steps."""
    hidden_states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
    if isinstance(hidden_states, tuple):  # of text and image, as IP-Adapter passes them
        hidden_states = hidden_states[0]
    _prepare_layers(model._perfusion, hidden_states)


@torch.compiler.disable
def _prepare_projected(
    registry: ConceptRegistry, projection: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> None:
    """Forward hook of the model's first projection module: compute the edit, as `_prepare` does."""
    _prepare_layers(registry, args[0])


@torch.compiler.disable
def _prepare_joint(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Forward pre-hook of a joint-attention model: compute the edit, and give the model the super-class prompt.

    Raises:
        RuntimeError: if the model is sharded, because its layers get parts of what is edited.
    """
    registry = model._perfusion
    names = list(signature(type(model).forward).parameters)[1:]
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    text: Any = kwargs.get(registry.text_argument)
    _prepare_layers(registry, text, kwargs.get("pooled_projections"))
    edit = registry.edit
    if edit is None:
        return (), kwargs
    if getattr(model, "_parallel_config", None) is not None:
        registry.clear_edit()
        raise RuntimeError(_DISTRIBUTED.format(type(model).__name__))
    hook_values(registry, registry.layers)  # projections may have been fused since
    inputs: Any = edit.inputs
    if not isinstance(text, Tensor):
        lengths = [len(row) + more for row, more in zip(text, edit.longer, strict=True)]
        inputs = [row[:end] for row, end in zip(inputs, lengths, strict=True)]
    kwargs[registry.text_argument] = inputs
    if edit.pooled is not None:
        kwargs["pooled_projections"] = edit.pooled
    if registry.mask_argument is not None and any(edit.longer):
        mask = kwargs.get(registry.mask_argument)
        kwargs[registry.mask_argument] = _lengthened(mask, text, inputs.shape[1], edit.longer)
    return (), kwargs


def _lengthened(mask: Tensor | None, text: Tensor, length: int, longer: Sequence[int]) -> Tensor | None:
    """Return a mask that shows as many tokens more of each row's text; None if it is of text alone and shows all.

    Args:
        mask: of the text and what follows it, `(batch, old length + …)`; None if it shows all.
        text: that the mask is of, `(batch, old length, width)`.
        length: of the text that the model gets instead.
        longer: by how many tokens that is longer in each row.
    """
    if mask is None:
        mask = text.new_ones(text.shape[:2], dtype=torch.bool)
    shown, behind = mask[:, : text.shape[1]], mask[:, text.shape[1] :]
    shown = F.pad(shown, (0, length - text.shape[1]))
    for row, more in zip(shown, longer, strict=True):
        row[more:] = row[: length - more].clone()
        row[:more] = row[0]
    if not behind.shape[1] and shown.all():  # as pipelines do
        return None
    return torch.cat([shown, behind], 1)


def _prepare_layers(registry: ConceptRegistry, hidden_states: Tensor | None, pooled: Tensor | None = None) -> None:
    registry.prepare(hidden_states, pooled=pooled)
    registry.watched, registry.called = frozenset(replaced_layers(registry)), set()


@torch.compiler.disable
def _finish(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model: raise RuntimeError if a layer, or its processor, was replaced and is not edited.

    And ValueError as `ConceptRegistry.finish`.

    A processor of somebody else that calls ours, as packages that look at attention set them, is none of those. One
    that has edited once is not called at every step where a cache of attention or blocks is enabled.
    """
    registry = model._perfusion
    processors = {name: registry.layers[name].processor for name in registry.watched}
    registry.trusted |= {name: processors[name] for name in registry.called}
    missed, gone = [], []
    if registry.edit is not None:
        missed = sorted(name for name, processor in processors.items() if registry.trusted.get(name) is not processor)
        gone = [name for name, layer in registry.layers.items() if _layer_at(model, name) is not layer]
    registry.finish(output)
    if gone:
        raise RuntimeError(
            f"{len(gone)} attention layers were replaced after concepts were loaded ({gone[0]}), so the concepts are "
            "lost there; call unload_perfusion() and load them again"
        )
    if missed:
        processor = type(registry.layers[missed[0]].processor).__name__
        if registry.joint:
            raise RuntimeError(
                f"{processor} on {missed[0]} computes attention without calling the projection to values, so concepts "
                "cannot be edited in; set another processor, or unload_perfusion() to do without concepts"
            )
        raise RuntimeError(
            f"the attention processors of {len(missed)} layers were replaced after concepts were loaded ({missed[0]} "
            f"has {processor}), so the concepts would be lost there; call enable_perfusion() to wrap them again, or "
            "unload_perfusion() to do without concepts"
        )


def _layer_at(model: Any, name: str) -> Any:
    """Return the module that a model has by a name now; None for none."""
    try:
        return uncompiled(model.get_submodule(name))
    except AttributeError:
        return None
