"""Cosmos-Predict2 text to image: a video transformer for one frame, T5 with padding set to zero, and a video VAE."""

from typing import Any

from torch import Tensor

from .base import ModelFamily, PromptEncoding, frame_latents


class Cosmos(ModelFamily):
    """Transformers with cross-attention from T5, which predict a flow at timesteps from 0 to 1."""

    name = "Cosmos"
    model_classes = ("CosmosTransformer3DModel",)
    predicts_flow = True
    passes_attention_mask = True
    max_sequence_length = 512

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self.vae_scale_factor = pipeline.vae_scale_factor_spatial
        self._num_train_timesteps = pipeline.scheduler.config.num_train_timesteps

    @property
    def default_resolution(self) -> int:
        """The shorter side of the pipeline's default images, in pixels."""
        return 768

    @classmethod
    def hidden_states(cls, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Return the last hidden states with zeros for padding, which the model sees."""
        hidden_states = output[0]
        if attention_mask is None:
            return hidden_states
        return hidden_states.masked_fill(attention_mask.unsqueeze(-1) == 0, 0)

    def encode_latents(self, vae: Any, images: Tensor) -> Tensor:
        """Return normalized latents of images as videos of one frame."""
        return frame_latents(vae, images)

    def predict(
        self, model: Any, noisy: Tensor, timesteps: Tensor, encoding: PromptEncoding, resolution: int
    ) -> Tensor:
        """Return the flow that the model predicts for one frame."""
        return model(
            noisy.unsqueeze(2),
            timestep=(timesteps / self._num_train_timesteps).to(noisy),
            encoder_hidden_states=encoding.hidden_states,
            padding_mask=noisy.new_zeros(1, 1, resolution, resolution),
        ).sample[:, :, 0]
