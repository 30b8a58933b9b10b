"""PixArt-α and PixArt-Σ: a transformer and T5, with padding masked out and a learned variance."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import ModelFamily, PromptEncoding


class PixArt(ModelFamily):
    """Transformers with cross-attention from T5, whose hidden states they project first."""

    name = "PixArt"
    model_classes = ("PixArtTransformer2DModel",)
    passes_attention_mask = True
    sees_padding = False
    prompt_cleaning = "_text_preprocessing"

    @property
    def projection(self) -> tuple[nn.Module, ...]:
        """The caption projection."""
        return (self.model.caption_projection,)

    @property
    def model_width(self) -> int:
        """Width of the caption projection's input."""
        return self.model.config.caption_channels

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the mask of the padding and, for models that take them, the image's size and shape."""
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            one = torch.ones(len(encoding.hidden_states), 1).to(encoding.hidden_states)
            sizes = {"resolution": resolution * one.expand(-1, 2), "aspect_ratio": one}
        return {"encoder_attention_mask": encoding.mask, "added_cond_kwargs": sizes}
