"""Stable Diffusion 1.x and 2.x, and the models that share its UNet: a UNet and one CLIP text encoder."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .base import ModelFamily


class StableDiffusion(ModelFamily):
    """UNets with cross-attention from one CLIP."""

    name = "Stable Diffusion"
    model_classes = ("UNet2DConditionModel", "UNet3DConditionModel", "UNetMotionModel")
    half_precision = torch.float16

    @property
    def repeats_rows(self) -> bool:
        """Whether rows are repeated for frames: by `UNet3DConditionModel`, in its `forward`."""
        return type(self.model).__name__ == "UNet3DConditionModel"

    @classmethod
    def possible_hidden_states(
        cls, text_encoder: PreTrainedModel, output: Any, attention_mask: Tensor | None, clip_skip: int | None
    ) -> list[Tensor]:
        """Return the last hidden states, and those of `clip_skip`, to which pipelines apply the last layer's norm."""
        hidden_states = [cls.hidden_states(output, attention_mask)]
        if clip_skip is not None and output.hidden_states is not None:
            transformer: Any = getattr(text_encoder, "text_model", text_encoder)
            hidden_states.append(transformer.final_layer_norm(output.hidden_states[-1 - clip_skip]))
        return hidden_states
