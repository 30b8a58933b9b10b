"""Encoders of images and texts as unit vectors: a CLIP, and a DINO-style vision transformer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

BATCH_SIZE = 64


class _Encoder(ABC):
    """A model in evaluation mode, with its image processor."""

    def __init__(self, model: Any, image_processor: Any):
        self.model = model.eval().requires_grad_(False)
        self.image_processor = image_processor

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images of any size, scaled and cropped by the model's own image processor.

        Returns:
            Float32 on the CPU, `(len(images), d)`; the rows have length 1.
        """
        return _in_batches(self._encode_images, [image.convert("RGB") for image in images])

    @torch.no_grad()
    def _encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.image_processor(images=list(images), return_tensors="pt").pixel_values
        return self._image_embeddings(pixels.to(self.model.device, self.model.dtype))

    @abstractmethod
    def _image_embeddings(self, pixels: Tensor) -> Tensor:
        """Return embeddings of preprocessed images, `(batch, d)`, of any length."""


class ClipEncoder(_Encoder):
    """A CLIP (Radford et al. 2021, arXiv 2103.00020), for CLIP-T and CLIP-I.

    Args:
        model: a `transformers.CLIPModel`.
        tokenizer: of the model.
        image_processor: of the model.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, image_processor: Any):
        super().__init__(model, image_processor)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, source: str, device: str | torch.device = "cpu", **kwargs: Any) -> "ClipEncoder":
        """Load one in float32.

        Args:
            source: Hub id, such as "openai/clip-vit-large-patch14", or folder.
            device: of the model.
            kwargs: more for each `from_pretrained`, such as `revision` or `token`.
        """
        return cls(
            CLIPModel.from_pretrained(source, **kwargs).float().to(device),
            AutoTokenizer.from_pretrained(source, **kwargs),
            AutoImageProcessor.from_pretrained(source, **kwargs),
        )

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encode texts; one that is too long is truncated.

        Returns:
            Float32 on the CPU, `(len(texts), d)`; the rows have length 1.
        """
        return _in_batches(self._encode_texts, texts)

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        output = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return self.model.text_projection(output.pooler_output)

    def _image_embeddings(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)


class IdentityEncoder(_Encoder):
    """A vision transformer whose CLS embedding tells objects apart: DINOv2 (Oquab et al. 2023, arXiv 2304.07193).

    Args:
        model: of `transformers`, with the CLS token first: DINOv2, DINO or another.
        image_processor: of the model.
    """

    @classmethod
    def from_pretrained(cls, source: str, device: str | torch.device = "cpu", **kwargs: Any) -> "IdentityEncoder":
        """Load one in float32.

        Args:
            source: Hub id, such as "facebook/dinov2-base", or folder.
            device: of the model.
            kwargs: more for each `from_pretrained`, such as `revision` or `token`.
        """
        return cls(
            AutoModel.from_pretrained(source, **kwargs).float().to(device),
            AutoImageProcessor.from_pretrained(source, **kwargs),
        )

    def _image_embeddings(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def _in_batches(encode: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
    """Encode items in batches and normalise the results."""
    if not items:
        raise ValueError("there is nothing to encode; expected at least one image or text")
    parts = [encode(items[start : start + BATCH_SIZE]) for start in range(0, len(items), BATCH_SIZE)]
    return F.normalize(torch.cat(parts).float().cpu(), dim=-1)
