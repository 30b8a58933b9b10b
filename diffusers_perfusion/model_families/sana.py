"""Sana: a transformer and Gemma, which reads an instruction before every prompt."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .base import ModelFamily, PromptEncoding


class Sana(ModelFamily):
    """Transformers with cross-attention from Gemma, whose hidden states they project and normalize first."""

    name = "Sana"
    model_classes = ("SanaTransformer2DModel",)
    predicts_flow = True
    passes_attention_mask = True
    sees_padding = False
    prompt_cleaning = "_text_preprocessing"

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        parameter = signature(pipeline.__call__).parameters.get("complex_human_instruction")
        self.instruction = "\n".join(parameter.default or ()) if parameter else ""
        # Without its last token, which may have merged with the prompt.
        ids = self.tokenizers[0].encode(self.instruction)[1:-1] if self.instruction else []
        self._instruction_ids = torch.tensor(ids, dtype=torch.long)

    @property
    def projection(self) -> tuple[nn.Module, ...]:
        """The caption projection and its norm."""
        return self.model.caption_projection, self.model.caption_norm

    @property
    def model_width(self) -> int:
        """Width of the caption projection's input."""
        return self.model.config.caption_channels

    def tokenize(self, prompts: Sequence[str], padding: str | None = None) -> tuple[Tensor, ...]:
        """Return the token ids of prompts after the instruction, without the ids of the instruction."""
        prompts = [self.instruction + prompt for prompt in prompts]
        return tuple(self._without_instruction(ids) for ids in super().tokenize(prompts, padding))

    def real_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return which ids of `tokenize(prompts, "longest")` are no padding, bool, `(len(prompts), length)`."""
        return self._without_instruction(super().real_tokens([self.instruction + prompt for prompt in prompts]))

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode token ids after the instruction, and drop the instruction's hidden states, as pipelines do."""
        if not len(self._instruction_ids):
            return super().encode(input_ids)
        (ids,) = input_ids
        self._instruction_ids = self._instruction_ids.to(ids.device)  # kept: a copy would be waited for at each step
        instruction = self._instruction_ids.expand(len(ids), -1)
        encoding = super().encode([torch.cat([ids[:, :1], instruction, ids[:, 1:]], 1)])
        return encoding.map(self._without_instruction)

    def _without_instruction(self, tokens: Tensor) -> Tensor:
        """Return the first token and what follows the instruction, of `(batch, length, ...)`."""
        return torch.cat([tokens[:, :1], tokens[:, 1 + len(self._instruction_ids) :]], 1)

    @classmethod
    def kept_positions(cls, length: int, max_sequence_length: int | None) -> tuple[int, ...]:
        """Return the first position and the last ones, which leaves the instruction out."""
        if max_sequence_length is None or length <= max_sequence_length:
            return tuple(range(length))
        return (0, *range(length - max_sequence_length + 1, length))

    @classmethod
    def embedding_scale(cls, embedding_module: nn.Embedding) -> float | Tensor:
        """Return Gemma's factor, the root of its width."""
        return getattr(embedding_module, "embed_scale", 1.0)

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the mask of the padding."""
        return {"encoder_attention_mask": encoding.mask}
