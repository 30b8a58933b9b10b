"""Stable Diffusion XL: a UNet and two CLIP text encoders, of which the second also gives a pooled vector."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .base import ModelFamily, PromptEncoding


class StableDiffusionXL(ModelFamily):
    """UNets with cross-attention from two CLIPs."""

    name = "Stable Diffusion XL"
    model_classes = ("UNet2DConditionModel",)
    text_components = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    hidden_state_index = -2
    half_precision = torch.float16

    @classmethod
    def possible_hidden_states(
        cls, text_encoder: PreTrainedModel, output: Any, attention_mask: Tensor | None, clip_skip: int | None
    ) -> list[Tensor]:
        """Return the last hidden states but one, which negative prompts always get, and those of `clip_skip`."""
        if output.hidden_states is None:
            return []
        skipped = (0,) if clip_skip is None else (0, clip_skip)
        return [output.hidden_states[cls.hidden_state_index - layers] for layers in skipped]

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the pooled vectors, and the sizes of an uncropped image."""
        pooled: Any = encoding.pooled
        sizes = pooled.new_full((6,), resolution)
        sizes[2:4] = 0  # where the crop begins
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}}
