import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_perfusion.training.loss import masked_loss, prediction_target, snr_weights
from diffusers_perfusion.training.noise_schedule import FlowSchedule


def scheduler(kind):
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)


def noisy(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([5, 400, 990])


def test_epsilon_and_sample_targets():
    latents, noise, timesteps = noisy()
    assert torch.equal(prediction_target(scheduler("epsilon"), latents, noise, timesteps), noise)
    assert torch.equal(prediction_target(scheduler("sample"), latents, noise, timesteps), latents)


def test_a_velocity_target_leads_back_to_the_latents():
    latents, noise, timesteps = noisy()
    velocity = prediction_target(scheduler("v_prediction"), latents, noise, timesteps)
    alphas = scheduler("v_prediction").alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    seen = scheduler("v_prediction").add_noise(latents, noise, timesteps)
    torch.testing.assert_close(alphas.sqrt() * seen - (1 - alphas).sqrt() * velocity, latents, rtol=1e-4, atol=1e-4)


def test_another_prediction_type_is_an_error():
    odd = scheduler("epsilon")
    odd.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow'; expected epsilon, v_prediction, sample or flow_prediction"):
        prediction_target(odd, *noisy())


def test_a_flow_leads_from_the_image_to_the_noise():
    latents, noise, timesteps = noisy()
    flow = FlowSchedule(1000)
    seen, target = flow.add_noise(latents, noise, timesteps), prediction_target(flow, latents, noise, timesteps)
    t = (timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen - t * target, latents)
    torch.testing.assert_close(seen + (1 - t) * target, noise)
    with pytest.raises(ValueError, match=r"snr_gamma is 5.0, but this model predicts a flow"):
        snr_weights(flow, timesteps, 5.0)


def test_min_snr_weights():
    timesteps = torch.tensor([0, 200, 600, 999])
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timesteps]
    snr = alphas / (1 - alphas)
    assert snr[0] > 5 > snr[-1]
    clipped = snr.minimum(torch.tensor(5.0))
    for kind, expected in {
        "epsilon": clipped / snr,
        "v_prediction": clipped / (snr + 1),
        "sample": clipped,
    }.items():
        found = snr_weights(scheduler(kind), timesteps, 5.0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_gamma_zero_weighs_nothing():
    for kind in ("epsilon", "v_prediction"):
        assert snr_weights(scheduler(kind), torch.tensor([0, 999]), 0).tolist() == [1, 1]


def test_only_what_is_under_the_mask_counts():
    target = torch.zeros(2, 4, 8, 8)
    prediction = torch.zeros(2, 4, 8, 8)
    prediction[:, :, :, :4] = 2.0  # an error of 4 on the left, and none on the right
    left, right = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    left[..., :4], right[..., 4:] = 1, 1
    ones = torch.ones(2)
    assert masked_loss(prediction, target, left, ones) == 4
    assert masked_loss(prediction, target, right, ones) == 0
    assert masked_loss(prediction, target, torch.ones(2, 1, 8, 8), ones) == 2
    assert masked_loss(prediction, target, left + 0.5 * right, ones) == pytest.approx(4 / 1.5)


def test_a_small_subject_counts_as_much_as_a_large_one():
    prediction, target, _ = noisy()
    mask = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = masked_loss(prediction, target, mask, torch.ones(3))
    scales = torch.tensor([0.01, 1, 7]).view(-1, 1, 1, 1)
    torch.testing.assert_close(masked_loss(prediction, target, mask * scales, torch.ones(3)), whole)
    each = [masked_loss(*(t[i : i + 1] for t in (prediction, target, mask)), torch.ones(1)) for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_images_are_weighted_and_the_loss_is_in_float32():
    prediction, target, _ = noisy()
    mask = torch.ones(3, 1, 8, 8)
    each = (prediction - target).square().mean((1, 2, 3))
    weights = torch.tensor([0.0, 2, 1])
    torch.testing.assert_close(masked_loss(prediction, target, mask, weights), (2 * each[1] + each[2]) / 3)
    assert masked_loss(prediction.bfloat16(), target.bfloat16(), mask, weights).dtype == torch.float32
