"""`TrainingData`: latents of the training images, and masks of the subject in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_families import ModelFamily

# Masks grow by this fraction of the image's side: a loss that ended at the subject's edge would not see it spill over.
GROWTH = 1 / 16


@dataclass(frozen=True)
class TrainingData:
    """The tensors that batches are taken from, mirror images included.

    Attributes:
        latents: `(N, channels, h, w)`.
        masks: soft masks of the subject and its surroundings, `(N, 1, h, w)`, each with a maximum of one.
        prompts: of each image's own caption, with the placeholder token in it; None for an image without caption.
    """

    latents: Tensor
    masks: Tensor
    prompts: tuple[str | None, ...]


@torch.no_grad()
def make_training_data(
    family: ModelFamily,
    vae: Any,
    images: Tensor,
    masks: Tensor | None,
    random_flip: bool,
    prompts: Sequence[str | None] | None = None,
) -> TrainingData:
    """Encode the images once for the whole training.

    Args:
        family: of the base model.
        vae: of the pipeline.
        images: in [0, 1], `(N, 3, height, width)`.
        masks: of any size, `(N, 1, mask_height, mask_width)`; None for no mask.
        random_flip: add the mirror image of each. Mirror images are encoded, because a VAE is not symmetric.
        prompts: of each image's caption, with the placeholder token in it; by default none has one.
    """
    prompts = tuple(prompts or [None] * len(images))
    if random_flip:
        images = torch.cat([images, images.flip(-1)])
        masks = None if masks is None else torch.cat([masks, masks.flip(-1)])
        prompts *= 2
    # One at a time: at the base model's own resolution a batch of all would be the training's peak of memory.
    latents = torch.cat([family.encode_latents(vae, image[None]) for image in images])
    if masks is None:
        masks = torch.ones_like(latents[:, :1])
    masks = F.interpolate(masks.to(latents), size=latents.shape[-2:], mode="area")
    radius = round(GROWTH * latents.shape[-1])
    masks = F.max_pool2d(masks, 2 * radius + 1, stride=1, padding=radius)
    return TrainingData(latents, masks / masks.amax((1, 2, 3), keepdim=True), prompts)
