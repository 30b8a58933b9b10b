"""Qwen-Image: a transformer with joint attention to Qwen2.5-VL, which is told to describe an image in a chat."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import PromptEncoding, frame_latents
from .joint import PackedFamily, UnpaddedFamily

# Tokens of the chat before the prompt, whose hidden states pipelines leave out (`prompt_template_encode_start_idx`).
BEFORE_PROMPT = 34


class QwenImage(PackedFamily, UnpaddedFamily):
    """Transformers with joint attention to Qwen2.5-VL, from the prompt on, with a mask of its tokens."""

    name = "Qwen-Image"
    model_classes = ("QwenImageTransformer2DModel",)
    block_lists = ("transformer_blocks",)
    image_reader = "processor"
    true_guidance = True
    mask_argument = "encoder_hidden_states_mask"
    hidden_state_index = -1

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._chat = pipeline.prompt_template_encode
        ids = self.tokenizers[0](self._chat).input_ids
        self._before_prompt = torch.tensor(ids[:BEFORE_PROMPT])

    def tokenize(self, prompts: Sequence[str], padding: str | None = None) -> tuple[Tensor, ...]:
        """Return the token ids of prompts and of the chat behind them."""
        return tuple(ids[:, BEFORE_PROMPT:] for ids in super().tokenize(prompts, padding))

    def real_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return which ids of `tokenize(prompts, "longest")` are no padding, bool, `(len(prompts), length)`."""
        return super().real_tokens(prompts)[:, BEFORE_PROMPT:]

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], padding: str) -> Any:
        return super()._tokens(tokenizer, [self._chat.format(prompt) for prompt in prompts], padding)

    def _max_length(self, tokenizer: Any) -> int:
        return BEFORE_PROMPT + super()._max_length(tokenizer)

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode token ids behind the beginning of the chat, with zeros for padding."""
        (ids,) = input_ids
        self._before_prompt = self._before_prompt.to(ids.device)  # kept: a copy would be waited for at each step
        before = self._before_prompt.expand(len(ids), -1)
        encoding = super().encode([torch.cat([before, ids], 1)]).map(lambda part: part[:, BEFORE_PROMPT:])
        mask: Any = encoding.mask
        text = encoding.hidden_states * mask[..., None]
        return PromptEncoding(text, text, None, mask)

    @classmethod
    def kept_positions(cls, length: int, max_sequence_length: int | None) -> tuple[int, ...]:
        """Return the positions from the prompt on."""
        end = length if max_sequence_length is None else min(length, BEFORE_PROMPT + max_sequence_length)
        return tuple(range(BEFORE_PROMPT, end))

    def encode_latents(self, vae: Any, images: Tensor) -> Tensor:
        """Return normalized latents of images as videos of one frame."""
        return frame_latents(vae, images)

    def positions(self, noisy: Tensor, height: int, width: int, length: int) -> dict[str, Any]:
        """Return the shapes of the images, which are all that the model asks for."""
        return {"img_shapes": [[(1, height, width)]] * len(noisy)}

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the mask of the text."""
        return {"encoder_hidden_states_mask": encoding.mask}
