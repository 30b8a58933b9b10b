"""Attach a registry to its model: the forward hook that prepares the edit, and the wrapped attention processors."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention_processor import PerfusionAttnProcessor, wrap
from .registry import ConceptRegistry, registry_of


def attach(model: Any, registry: ConceptRegistry) -> None:
    """Put a registry on a model, and wrap every cross-attention processor that is not wrapped yet.

    Raises:
        ValueError: as `check_processors`.
    """
    check_processors(registry)
    if registry_of(model) is None:
        model._perfusion = registry
        before = (
            registry.projection[0].register_forward_hook(partial(_prepare_projected, registry))
            if registry.projection
            else model.register_forward_pre_hook(_prepare, with_kwargs=True)
        )
        model._perfusion_hooks = [before, model.register_forward_hook(_finish)]
    for name in replaced_layers(registry):
        layer = registry.layers[name]
        layer.set_processor(wrap(layer.processor, (), name, registry))


def detach(model: Any) -> None:
    """Give every layer back the processor it had, and take the registry off. Does nothing if there is none.

    A `PerfusionAttnProcessor` that other code still holds edits nothing afterwards.
    """
    registry = registry_of(model)
    if registry is None:
        return
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
    """Return the layers whose processor is not of a registry, with the class of the one that is there."""
    return {
        name: type(layer.processor).__name__
        for name, layer in registry.layers.items()
        if not _is_of(registry, layer.processor)
    }


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


def _prepare_layers(registry: ConceptRegistry, hidden_states: Tensor | None) -> None:
    registry.prepare(hidden_states)
    registry.watched, registry.called = frozenset(replaced_layers(registry)), set()


@torch.compiler.disable
def _finish(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the model: raise RuntimeError if a layer was not edited, because its processor was replaced.

    And ValueError as `ConceptRegistry.finish`.

    A processor of somebody else that calls ours, as packages that look at attention set them, is none of those.
    """
    registry = model._perfusion
    missed = sorted(registry.watched - registry.called) if registry.edit is not None else []
    registry.finish(output)
    if missed:
        processor = type(registry.layers[missed[0]].processor).__name__
        raise RuntimeError(
            f"the attention processors of {len(missed)} layers were replaced after concepts were loaded ({missed[0]} "
            f"has {processor}), so the concepts would be lost there; call enable_perfusion() to wrap them again, or "
            "unload_perfusion() to do without concepts"
        )
