"""The loss of a fit: what the UNet should have predicted, where it matters, at which noise."""

from typing import Any

import torch
from torch import Tensor


def prediction_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a UNet of this scheduler's prediction type should predict.

    Raises:
        ValueError: if the prediction type is neither epsilon, v_prediction nor sample.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(f"prediction type {kind!r}; expected epsilon, v_prediction or sample")


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR-γ weights of the loss (Hang et al. 2023, arXiv 2303.09556, Eq. 5), `(batch,)`; ones if `gamma` is 0."""
    if gamma == 0:
        return torch.ones(timesteps.shape, device=timesteps.device)
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    clipped = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[kind]


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Squared error averaged over the subject of each picture, then over the weighted batch; a scalar in float32.

    Args:
        prediction: of the UNet, `(batch, channels, h, w)`.
        target: as `prediction_target`.
        mask: soft mask of the subject, `(batch, 1, h, w)`.
        weights: one a picture, `(batch,)`.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    per_picture = (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    return (per_picture * weights).mean()
