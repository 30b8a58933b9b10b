"""The edit in joint attention: target outputs are added to the values of text tokens.

In a joint model text goes through every block beside the image, so that its keys and values follow the image and the
timestep, and no target output can stand for a value. The model gets the super-class prompt, whose hidden states at the
super-class's last token and values there become, with g = σ((1 − β)/τ),

    e + g (i* − i_super)        V + g o*

So keys and queries of text are those of the super-class but for what i* learns.

The edit is in forward hooks on the modules that compute values, and not in attention processors. So it does not matter
which processor and attention backend the user has chosen, and a LoRA, quantisation or offloading in these modules is
respected.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .attention_processor import Edit, EditSource


class ValueSite(NamedTuple):
    """A module whose output holds the values of text tokens, in its first rows or behind those of the image.

    Attributes:
        module: the projection, below a LoRA.
        start: where the values begin in the last dimension of the output.
        stop: where they end.
    """

    module: nn.Module
    start: int
    stop: int


def value_sites(attn: Any) -> list[ValueSite]:
    """Return the modules by which a joint attention layer may compute the values of text tokens.

    They are named alike in all of diffusers. Of a module and its fused form only one is called.

    Raises:
        ValueError: if there is none.
    """
    width = attn.inner_dim
    if getattr(attn, "add_v_proj", None) is not None:  # text has projections of its own
        starts = {"add_v_proj": 0, "to_added_qkv": 2 * width}
    else:
        starts = {"to_v": 0, "to_qkv": 2 * width, "to_qkv_mlp_proj": 2 * width}
    modules = {name: getattr(attn, name) for name in starts if getattr(attn, name, None) is not None}
    if not modules:
        raise ValueError(
            f"{type(attn).__name__} computes values by no module that Perfusion knows ({', '.join(starts)}), so "
            "concepts cannot be edited in"
        )
    return [ValueSite(_below_lora(module), starts[name], starts[name] + width) for name, module in modules.items()]


def _below_lora(module: Any) -> nn.Module:
    """Return the module that peft has wrapped, which stays when its LoRA comes or goes."""
    while (base := getattr(module, "base_layer", None)) is not None:
        module = base
    return module


class ValueHook:
    """Forward hook of a value projection, which adds target outputs at the placeholder tokens.

    Args:
        edits: where the edit comes from.
        layer: name of the attention module in its model, the key of `PerfusionConcept.target_outputs`.
        start: as in `ValueSite`.
        stop: likewise.
    """

    def __init__(self, edits: EditSource, layer: str, start: int, stop: int):
        self.edits, self.layer, self.start, self.stop = edits, layer, start, stop

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Return the edited output, or None to leave it as it is.

        Raises:
            RuntimeError: if the module returns only a part of the values, as under tensor parallelism.
        """
        edit = self.edits.edit_for(output, self.layer)
        if edit is None:
            return None
        if isinstance(output, DTensor) or output.shape[-1] < self.stop:
            raise RuntimeError(
                f"the projection to values of {self.layer} is distributed over several devices, which get only parts "
                "of the values, so concepts cannot be edited in; generate on one device, or unload_perfusion()"
            )
        added = self._added(edit, output)
        rows, length = output.shape[1], added.shape[1]
        before = 0
        if multiple := edit.text_behind_image:
            before = rows - math.ceil(length / multiple) * multiple
        return output + F.pad(added, (self.start, output.shape[2] - self.stop, before, rows - before - length))

    def _added(self, edit: Edit, output: Tensor) -> Tensor:
        # Cast one by one: autocast on a CPU does not stack half precision, in which files are stored.
        outputs = torch.stack([concept.target_outputs[self.layer].to(output) for concept in edit.concepts])
        return edit.repeated(edit.gate, len(output)).to(output.dtype) @ outputs


def hook_values(edits: EditSource, layers: dict[str, Any]) -> None:
    """Put a `ValueHook` of these edits on every value projection of joint attention layers, unless it has one.

    What has one and is no value projection any more, because another module wraps it now, loses it.

    Raises:
        ValueError: as `value_sites`.
    """
    for name, attn in layers.items():
        sites = {site.module: site for site in value_sites(attn)}
        for module in attn.modules():
            if module not in sites:
                _unhook(edits, module)
        for module, start, stop in sites.values():
            if not list(_hooks(edits, module)):
                module.register_forward_hook(ValueHook(edits, name, start, stop))


def unhook_values(edits: EditSource, layers: dict[str, Any]) -> None:
    """Remove the hooks of `hook_values`."""
    for attn in layers.values():
        for module in attn.modules():
            _unhook(edits, module)


def _unhook(edits: EditSource, module: nn.Module) -> None:
    for number in list(_hooks(edits, module)):
        del module._forward_hooks[number]


def _hooks(edits: EditSource, module: nn.Module) -> Iterator[int]:
    for number, hook in module._forward_hooks.items():
        if isinstance(hook, ValueHook) and hook.edits is edits:
            yield number
