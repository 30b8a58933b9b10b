"""FLUX.2: a transformer with joint attention to three layers of a text encoder, which reads the prompt in a chat."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor

from .base import PromptEncoding
from .joint import PackedFamily, chats


class Flux2(PackedFamily):
    """Transformers with joint attention to the hidden states of three layers of a text encoder, side by side.

    Attributes:
        layers_taken: numbers of the three layers.
    """

    model_classes = ("Flux2Transformer2DModel",)
    layers_taken: ClassVar[tuple[int, ...]]
    passes_attention_mask = True
    position_axes = 4

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the hidden states of all three layers."""
        return (len(self.layers_taken) * super().widths[0],)

    @classmethod
    def hidden_states(cls, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden states of the three layers side by side."""
        return torch.cat([output.hidden_states[layer] for layer in cls.layers_taken], -1)

    @torch.no_grad()
    def encode_latents(self, vae: Any, images: Tensor) -> Tensor:
        """Return latents of which each place in a patch is normalized on its own."""
        latents = vae.encode((images * 2 - 1).to(next(vae.parameters()))).latent_dist.mode()
        patches = F.pixel_unshuffle(latents, self.latent_patch_size).float()
        mean, variance = (part.float().view(1, -1, 1, 1) for part in (vae.bn.running_mean, vae.bn.running_var))
        patches = (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
        return F.pixel_shuffle(patches, self.latent_patch_size)

    def text_positions(self, noisy: Tensor, length: int) -> Tensor:
        """Return the numbers of text tokens as the last of their positions."""
        numbers = torch.arange(length, device=noisy.device)[:, None]
        return F.pad(numbers.to(noisy), (self.position_axes - 1, 0))

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the guidance scale."""
        return {"guidance": self.guidance(encoding)}


class Flux2Klein(Flux2):
    """FLUX.2 klein, whose text encoder is Qwen3. Distilled models have no guidance, others take negative prompts."""

    name = "FLUX.2 klein"
    layers_taken = (9, 18, 27)
    hidden_state_index = layers_taken[-1]

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], padding: str) -> Any:
        return super()._tokens(tokenizer, chats(tokenizer, prompts, enable_thinking=False), padding)


class Flux2Dev(Flux2):
    """FLUX.2 dev, whose text encoder is Mistral 3, which reads padding and a system message before every prompt."""

    name = "FLUX.2 dev"
    layers_taken = (10, 20, 30)
    hidden_state_index = layers_taken[-1]

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self.instruction = pipeline.system_message
        self._processor = pipeline.tokenizer

    @classmethod
    def matches(cls, pipeline: Any) -> bool:
        """Return whether a pipeline has such a model and text encoder, and a system message."""
        return super().matches(pipeline) and hasattr(pipeline, "system_message")

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], padding: str) -> Any:
        return self._processor.apply_chat_template(
            format_input(list(prompts), self.instruction),
            tokenize=True,
            padding=padding,
            truncation=True,
            max_length=self._max_length(tokenizer),
            return_dict=True,
            return_tensors="pt",
        )
