"""FLUX.2 klein: a transformer with joint attention to Qwen3, which reads the prompt in a chat."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import PromptEncoding
from .joint import PackedFamily, chats


class Flux2Klein(PackedFamily):
    """Transformers with joint attention to the hidden states of three layers of Qwen3, side by side.

    Raises:
        ValueError: if the pipeline is of FLUX.2 dev.
    """

    name = "FLUX.2 klein"
    model_classes = ("Flux2Transformer2DModel",)
    layers_taken = (9, 18, 27)
    hidden_state_index = layers_taken[-1]
    passes_attention_mask = True
    position_axes = 4

    def __init__(self, pipeline: Any):
        if hasattr(pipeline, "system_message"):
            raise ValueError(
                f"Perfusion cannot edit {type(pipeline).__name__}, whose text encoder reads prompts behind a system "
                "message and by an image processor; expected a pipeline of FLUX.2 klein"
            )
        super().__init__(pipeline)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the hidden states of all three layers."""
        return (len(self.layers_taken) * super().widths[0],)

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], padding: str) -> Any:
        return super()._tokens(tokenizer, chats(tokenizer, prompts, enable_thinking=False), padding)

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
        """Return that there is no guidance: distilled models have none, and others take negative prompts."""
        return {"guidance": None}
