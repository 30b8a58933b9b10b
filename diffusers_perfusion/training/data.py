"""What a fit learns from: latents of the pictures, and where the subject is in them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pictures import encode_latents

# By how much of a picture's side masks grow. A loss that ends where the subject ends does not see it spill over.
GROWTH = 1 / 16


@dataclass(frozen=True)
class Subject:
    """The pictures as the UNet sees them, mirrored ones included.

    Attributes:
        latents: `(N, channels, h, w)`.
        masks: where the subject is and what surrounds it, `(N, 1, h, w)` with a maximum of one in each.
    """

    latents: Tensor
    masks: Tensor


def make_subject(vae: Any, images: Tensor, masks: Tensor | None, flip: bool) -> Subject:
    """Encode the pictures once for the whole fit.

    Args:
        vae: `AutoencoderKL` or `AutoencoderTiny`.
        images: in [0, 1], `(N, 3, height, width)`.
        masks: of any size, `(N, 1, mask_height, mask_width)`; None for no mask.
        flip: add each picture mirrored. Its latents are encoded, not flipped: a VAE is not symmetric.
    """
    if flip:
        images = torch.cat([images, images.flip(-1)])
        masks = None if masks is None else torch.cat([masks, masks.flip(-1)])
    # One at a time: at the base model's own resolution a batch of all would be the fit's peak of memory.
    latents = torch.cat([encode_latents(vae, image[None]) for image in images])
    if masks is None:
        masks = torch.ones_like(latents[:, :1])
    masks = F.interpolate(masks.to(latents), size=latents.shape[-2:], mode="area")
    radius = round(GROWTH * latents.shape[-1])
    masks = F.max_pool2d(masks, 2 * radius + 1, stride=1, padding=radius)
    return Subject(latents, masks / masks.amax((1, 2, 3), keepdim=True))
