"""The loss of a fit: what the model should have predicted, where it matters, at which noise."""

from typing import Any

import torch
from torch import Tensor


def prediction_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a model of this schedule's prediction type should predict.

    Args:
        scheduler: as `noise.noise_schedule`.
        latents: of the pictures, `(batch, channels, h, w)`.
        noise: that was added to them, likewise.
        timesteps: at which it was, `(batch,)`.

    Raises:
        ValueError: if the prediction type is none of epsilon, v_prediction, sample and flow_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    if kind == "flow_prediction":
        return noise - latents
    raise ValueError(f"prediction type {kind!r}; expected epsilon, v_prediction, sample or flow_prediction")


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR-γ weights of the loss (Hang et al. 2023, arXiv 2303.09556, Eq. 5), `(batch,)`; ones if `gamma` is 0.

    Raises:
        ValueError: if the model predicts a flow, for which they are not defined.
    """
    if gamma == 0:
        return torch.ones(timesteps.shape, device=timesteps.device)
    if scheduler.config.prediction_type == "flow_prediction":
        raise ValueError(f"snr_gamma is {gamma}, but this model predicts a flow, for which it must be 0")
    alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    clipped = snr.clamp(max=gamma)
    kind = scheduler.config.prediction_type
    return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[kind]


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Squared error averaged over the subject of each picture, then over the weighted batch; a scalar in float32.

    Args:
        prediction: of the model, `(batch, channels, h, w)`.
        target: as `prediction_target`.
        mask: soft mask of the subject, `(batch, 1, h, w)`.
        weights: one a picture, `(batch,)`.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    per_picture = (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    return (per_picture * weights).mean()
