"""The training loss: squared error under a mask, weighted by the noise level."""

from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor


def prediction_target(schedule: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target of a model that was trained with this schedule.

    Args:
        schedule: as `noise_schedule` returns it.
        latents: of the images, `(batch, channels, h, w)`.
        noise: that was added to them, `(batch, channels, h, w)`.
        timesteps: of the noise, `(batch,)`.

    Raises:
        ValueError: if the prediction type is none of epsilon, v_prediction, sample and flow_prediction.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    if kind == "flow_prediction":
        return noise - latents
    raise ValueError(f"prediction type {kind!r}; expected epsilon, v_prediction, sample or flow_prediction")


def snr_weights(schedule: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Return min-SNR-γ loss weights (Hang et al. 2023, arXiv 2303.09556, Eq. 5), `(batch,)`; ones if `gamma` is 0.

    Args:
        schedule: as `noise_schedule` returns it.
        timesteps: of the noise, `(batch,)`.
        gamma: `γ`.

    Raises:
        ValueError: if the model predicts a flow, for which the weights are not defined.
    """
    if gamma == 0:
        return torch.ones(timesteps.shape, device=timesteps.device)
    kind = schedule.config.prediction_type
    if kind == "flow_prediction":
        raise ValueError(f"snr_gamma is {gamma}, but this model predicts a flow, for which it must be 0")
    snr = compute_snr(schedule, timesteps)
    clipped = snr.clamp(max=gamma)
    return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[kind]


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Return the squared error averaged over each image's mask, then over the weighted batch, as a float32 scalar.

    Args:
        prediction: of the model, `(batch, channels, h, w)`.
        target: as `prediction_target` returns it.
        mask: soft mask of the subject, `(batch, 1, h, w)`.
        weights: one per image, `(batch,)`.
    """
    error = (prediction.float() - target.float()).square().mean(1, keepdim=True)
    per_image = (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
    return (per_image * weights).mean()
