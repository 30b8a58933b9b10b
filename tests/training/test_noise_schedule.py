import pytest
import torch
from conftest import JOINT_PIPELINES
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.noise_schedule import FlowSchedule, noise_schedule


def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))


def test_a_diffusion_keeps_its_settings(family):
    schedule = noise_schedule(family, DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"))
    assert isinstance(schedule, DDPMScheduler)
    assert (schedule.config.prediction_type, schedule.config.beta_schedule) == ("v_prediction", "scaled_linear")


@pytest.mark.parametrize("name", ["pipeline", "sana_pipeline"])
def test_a_model_that_predicts_something_else_is_refused(request, name):
    family = family_of(request.getfixturevalue(name))
    with pytest.raises(ValueError, match="of a model that predicts 'trigflow'; expected epsilon"):
        noise_schedule(family, DDIMScheduler(prediction_type="trigflow"))


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_a_flow_goes_from_the_image_to_noise_as_its_scheduler_comes_back(family, scheduler):
    schedule = noise_schedule(family, scheduler)
    assert isinstance(schedule, FlowSchedule)
    latents, noise = latents_and_noise()
    assert torch.equal(schedule.add_noise(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(schedule.add_noise(latents, noise, torch.full((3,), 1000)), noise)
    # A whole step along the flow ends at the image, whatever timesteps the scheduler takes.
    scheduler.set_timesteps(1)
    (timestep,) = scheduler.timesteps
    seen = schedule.add_noise(latents, noise, timestep.expand(3))
    torch.testing.assert_close(
        scheduler.step(noise - latents, timestep, seen).prev_sample, latents, rtol=1e-2, atol=5e-3
    )


@pytest.mark.parametrize("name", ["sana_pipeline", "cosmos_pipeline", *JOINT_PIPELINES])
def test_a_flow_is_one_under_a_scheduler_that_does_not_say_so(request, name):
    family = family_of(request.getfixturevalue(name))
    for scheduler in (
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        UniPCMultistepScheduler(use_flow_sigmas=True),
        EulerDiscreteScheduler(),
    ):
        assert isinstance(noise_schedule(family, scheduler), FlowSchedule)
