"""Stable Diffusion 3 and 3.5: a transformer with joint attention to two CLIPs and to T5, which may be missing."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .base import PromptEncoding, TextPart, embedding_table
from .joint import JointFamily


class StableDiffusion3(JointFamily):
    """Transformers with joint attention to text, which is CLIP's tokens and then T5's.

    The two CLIPs are side by side, with zeros up to T5's width, and give a pooled vector. Without T5 its tokens are
    zeros.
    """

    name = "Stable Diffusion 3"
    model_classes = ("SD3Transformer2DModel",)
    text_components = (
        ("tokenizer", "text_encoder"),
        ("tokenizer_2", "text_encoder_2"),
        ("tokenizer_3", "text_encoder_3"),
    )
    optional = ("text_encoder_3",)
    block_lists = ("transformer_blocks",)
    hidden_state_index = -2
    max_sequence_length = 256
    latent_patch_size = 2

    @property
    def width(self) -> int:
        """Width of T5's hidden states, or of the zeros in their place."""
        return self.widths[2] if len(self.widths) > 2 else self.model_width

    @property
    def layout(self) -> tuple[TextPart, ...]:
        """CLIP's tokens stand before T5's."""
        length = self.tokenizers[0].model_max_length
        pooled = [text_encoder.config.projection_dim for text_encoder in self.text_encoders[:2]]
        clips = (
            TextPart(slice(0, length), slice(stop - width, stop), slice(end - size, end))
            for width, stop, size, end in zip(
                self.widths[:2], accumulate(self.widths[:2]), pooled, accumulate(pooled), strict=True
            )
        )
        return *clips, TextPart(slice(length, None))

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode token ids, with zeros in T5's place where there is none."""
        outputs = [
            text_encoder(ids.to(embedding_table(text_encoder).device), output_hidden_states=number < 2)
            for number, (text_encoder, ids) in enumerate(zip(self.text_encoders, input_ids, strict=True))
        ]
        clip = torch.cat([self.hidden_states(output) for output in outputs[:2]], -1)
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        t5 = clip.new_zeros(len(clip), self.max_sequence_length, self.width)
        if len(outputs) > 2:
            t5 = self.hidden_states(outputs[2])
        hidden_states = torch.cat([clip, t5], 1)
        pooled = torch.cat([output.text_embeds for output in outputs[:2]], -1)
        return PromptEncoding(hidden_states, hidden_states, pooled, None)

    @classmethod
    def hidden_states(cls, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Return CLIP's last hidden states but one, or T5's last."""
        return output.hidden_states[cls.hidden_state_index] if "text_embeds" in output else output[0]

    @classmethod
    def possible_hidden_states(
        cls, text_encoder: PreTrainedModel, output: Any, attention_mask: Tensor | None, clip_skip: int | None
    ) -> list[Tensor]:
        """Return T5's hidden states, or CLIP's as negative prompts get them and of `clip_skip`, and pooled vectors."""
        if "text_embeds" not in output:
            return [output[0]]
        if output.hidden_states is None:
            return []
        skipped = (0,) if clip_skip is None else (0, clip_skip)
        found = [output.hidden_states[cls.hidden_state_index - layers] for layers in skipped]
        return [*found, output.text_embeds]

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the pooled vectors."""
        return {"pooled_projections": encoding.pooled}
