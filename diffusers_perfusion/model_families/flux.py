"""FLUX.1: a transformer with joint attention to T5, and CLIP for a pooled vector."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .base import PromptEncoding, TextPart, embedding_table
from .joint import PackedFamily


class Flux(PackedFamily):
    """Transformers with joint attention to T5, which CLIP's pooled vector modulates."""

    name = "Flux"
    model_classes = ("FluxTransformer2DModel",)
    text_components = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    pooled_only = ("text_encoder",)

    @property
    def width(self) -> int:
        """Width of T5's hidden states."""
        return self.widths[1]

    @property
    def layout(self) -> tuple[TextPart, ...]:
        """CLIP's output is the pooled vector, and T5's the hidden states."""
        return TextPart(pooled=slice(None)), TextPart(slice(None))

    @property
    def true_guidance(self) -> bool:
        """Whether the model is not distilled from guidance, which it would get as a number."""
        return not self.model.config.guidance_embeds

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode token ids to T5's hidden states and CLIP's pooled vectors."""
        clip, t5 = (
            text_encoder(ids.to(embedding_table(text_encoder).device))
            for text_encoder, ids in zip(self.text_encoders, input_ids, strict=True)
        )
        return PromptEncoding(t5[0], t5[0], clip.pooler_output, None)

    @classmethod
    def possible_hidden_states(
        cls, text_encoder: PreTrainedModel, output: Any, attention_mask: Tensor | None, clip_skip: int | None
    ) -> list[Tensor]:
        """Return the pooled vectors of CLIP, or the hidden states of T5."""
        pooled = getattr(output, "pooler_output", None)
        return [output[0] if pooled is None else pooled]

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the pooled vectors and, for models distilled from guidance, its scale."""
        return {"pooled_projections": encoding.pooled, "guidance": self.guidance(encoding)}
