"""What a base model learns to predict from noisy latents, and the scheduler that belongs to it."""

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler


class VPrediction:
    """The v-prediction loss with min-SNR weights, γ = 5 (Hang et al. 2023, arXiv 2303.09556)."""

    def __init__(self):
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        alphas = self.scheduler.alphas_cumprod
        snr = alphas / (1 - alphas)
        self.snr_weights = snr.clamp(max=5) / (snr + 1)

    def timesteps(self, count, generator=None):
        """Random timesteps."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=generator)

    def noisy(self, latents, noise, timesteps):
        """The latents with as much noise as there is at these timesteps."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents, noise, timesteps):
        """What is to be predicted from them."""
        return self.scheduler.get_velocity(latents, noise, timesteps)

    def weights(self, timesteps):
        """By what an image's error counts."""
        return self.snr_weights[timesteps]


class FlowMatching:
    """Rectified flow with logit-normal timesteps (Esser et al. 2024, arXiv 2403.03206), shifted as the scheduler's."""

    def __init__(self):
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)

    def timesteps(self, count, generator=None):
        """Random timesteps, which are no whole numbers."""
        sigmas = torch.randn(count, generator=generator).sigmoid()
        shift = self.scheduler.config.shift
        return self.scheduler.config.num_train_timesteps * shift * sigmas / (1 + (shift - 1) * sigmas)

    def noisy(self, latents, noise, timesteps):
        """The point between the latents and the noise at these timesteps."""
        sigmas = (timesteps / self.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents, noise, timesteps):
        """The velocity from the latents to the noise."""
        return noise - latents

    def weights(self, timesteps):
        """All errors count alike."""
        return torch.ones(len(timesteps))
