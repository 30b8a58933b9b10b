"""Chroma: FLUX.1's transformer without a pooled vector, and T5 with all padding but the first masked out."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import PromptEncoding
from .joint import PackedFamily


class Chroma(PackedFamily):
    """Transformers with joint attention to T5, whose padding they do not see but for the first."""

    name = "Chroma"
    model_classes = ("ChromaTransformer2DModel",)
    passes_attention_mask = True
    mask_argument = "attention_mask"

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode token ids, with a mask of the tokens and the first padding."""
        encoding = super().encode(input_ids)
        tokens = input_ids[0].ne(self.tokenizers[0].pad_token_id).sum(1, keepdim=True)
        mask = torch.arange(input_ids[0].shape[1], device=tokens.device) <= tokens
        return encoding._replace(mask=mask.to(encoding.hidden_states))

    def enable_gradient_checkpointing(self) -> None:
        """Checkpoint every block with the mask of text, which diffusers leaves out of the single-stream ones."""
        mask: Tensor | None = None

        def checkpointed(block: Any, *inputs: Any) -> Any:
            nonlocal mask
            if isinstance(block, ChromaSingleTransformerBlock):
                inputs = (*inputs[:3], mask)
            else:  # a double-stream block, which all come before
                mask = inputs[4]
            return checkpoint(block, *inputs, use_reentrant=False)

        self.model.enable_gradient_checkpointing(checkpointed)

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the mask of the text, with the image behind it."""
        mask: Any = encoding.mask
        side = resolution // (self.vae_scale_factor * self.latent_patch_size)
        return {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), side * side)], 1)}
