"""Z-Image: a transformer with joint attention to Qwen3, which reads the prompt in a chat; it takes lists of rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import PromptEncoding
from .joint import UnpaddedFamily, chats


class ZImage(UnpaddedFamily):
    """Transformers that refine the hidden states of Qwen3, and put them behind the image in joint attention."""

    name = "Z-Image"
    model_classes = ("ZImageTransformer2DModel",)
    block_lists = ("context_refiner", "layers")
    attention = "attention"
    image_reader = "siglip"
    text_argument = "cap_feats"
    text_behind_image = 32
    hidden_state_index = -2
    latent_patch_size = 2
    default_resolution = 1024

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._num_train_timesteps = pipeline.scheduler.config.num_train_timesteps

    @property
    def model_width(self) -> int:
        """Width of the hidden states of text that the model takes."""
        return self.model.config.cap_feat_dim

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], padding: str) -> Any:
        return super()._tokens(tokenizer, chats(tokenizer, prompts, enable_thinking=True), padding)

    def without_padding(self, encoding: PromptEncoding) -> PromptEncoding:
        """Return a row for each prompt, of its own length."""
        mask: Any = encoding.mask
        lengths = mask.bool().sum(1).tolist()
        rows = [row[:length] for row, length in zip(encoding.hidden_states, lengths, strict=True)]
        return encoding._replace(hidden_states=rows)

    def predict(
        self, model: Any, noisy: Tensor, timesteps: Tensor, encoding: PromptEncoding, resolution: int
    ) -> Tensor:
        """Return the flow that the model predicts, which counts time and takes flows the other way round."""
        images = model(
            list(noisy.unsqueeze(2)), (1 - timesteps / self._num_train_timesteps).to(noisy), encoding.hidden_states
        ).sample
        return -torch.stack(images).squeeze(2)
