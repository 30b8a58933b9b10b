"""`JointFamily`: models in whose layers text and image attend to each other."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..joint_attention import value_sites
from .base import ModelFamily, PromptEncoding


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


class PackedFamily(JointFamily):
    """Transformers that take latents packed in patches, and predict a flow at timesteps from 0 to 1.

    Attributes:
        position_axes: how many numbers a position has; the second and third are rows and columns of the image.
    """

    max_sequence_length = 512
    latent_patch_size = 2
    position_axes: ClassVar[int] = 3

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._sample_size = pipeline.default_sample_size
        self._num_train_timesteps = pipeline.scheduler.config.num_train_timesteps

    @property
    def default_resolution(self) -> int:
        """Side of the pipeline's default images, in pixels."""
        return self._sample_size * self.vae_scale_factor

    def predict(
        self, model: Any, noisy: Tensor, timesteps: Tensor, encoding: PromptEncoding, resolution: int
    ) -> Tensor:
        """Return the flow that the model predicts, unpacked."""
        patch = self.latent_patch_size
        height, width = (side // patch for side in noisy.shape[-2:])
        positions = noisy.new_zeros(height, width, self.position_axes)
        positions[..., 1] += torch.arange(height, device=noisy.device)[:, None]
        positions[..., 2] += torch.arange(width, device=noisy.device)
        packed = model(
            hidden_states=F.pixel_unshuffle(noisy, patch).flatten(2).mT,
            timestep=(timesteps / self._num_train_timesteps).to(noisy),
            encoder_hidden_states=encoding.hidden_states,
            img_ids=positions.flatten(0, 1),
            txt_ids=self.text_positions(encoding.hidden_states.shape[1]).to(noisy),
            **self.conditions(encoding, resolution),
        ).sample
        return F.pixel_shuffle(packed.mT.unflatten(2, (height, width)), patch)

    def text_positions(self, length: int) -> Tensor:
        """Return the positions of text tokens that the model takes, `(length, position_axes)`."""
        return torch.zeros(length, self.position_axes)
