"""`JointFamily`: models in whose layers text and image attend to each other."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..joint_attention import value_sites
from .base import ModelFamily


class JointFamily(ModelFamily):
    """Transformers with joint attention, named alike in diffusers.

    Attributes:
        block_lists: names of the model's lists of blocks; each block has its attention layer as `attn`.
    """

    joint = True
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The joint attention layers by module name."""
        return {
            f"{blocks}.{number}.attn": block.attn
            for blocks in self.block_lists
            for number, block in enumerate(getattr(self.model, blocks))
        }

    @property
    def layer_widths(self) -> dict[str, tuple[int, int]]:
        """Width of the hidden states of text that the model takes, and of each layer's values."""
        return {name: (self.model_width, layer.inner_dim) for name, layer in self.layers.items()}

    @property
    def edited_weights(self) -> Iterable[Tensor]:
        """The weights of the projections to values of text."""
        return (value_sites(layer)[0].module.weight for layer in self.layers.values())  # type: ignore[misc]

    @property
    def model_width(self) -> int:
        """Width of the hidden states of text that the model takes."""
        return self.model.config.joint_attention_dim

    @property
    def input_width(self) -> int:
        """`d`, the same."""
        return self.model_width

    def initial_outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return zeros, which change no value."""
        return {name: torch.zeros(width).to(inputs.device) for name, (_, width) in self.layer_widths.items()}
