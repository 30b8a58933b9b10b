"""The noise schedule that a base model was trained with."""

from types import SimpleNamespace
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from ..model_families import ModelFamily


class FlowSchedule:
    """Noise schedule of rectified flow, `x_t = (1 − t) x + t ε` (Liu et al. 2022, arXiv 2209.03003, Eq. 1).

    It has the parts of a diffusers scheduler that training needs.
    """

    def __init__(self, num_train_timesteps: int):
        self.config = SimpleNamespace(num_train_timesteps=num_train_timesteps, prediction_type="flow_prediction")

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to latents `(batch, channels, h, w)` at timesteps `(batch,)` from 0 to `num_train_timesteps`."""
        t = (timesteps / self.config.num_train_timesteps).to(latents).view(-1, 1, 1, 1)
        return (1 - t) * latents + t * noise


def noise_schedule(family: ModelFamily, scheduler: Any) -> Any:
    """Return the schedule that the model behind a pipeline's scheduler was trained with.

    Args:
        family: of the pipeline. Of a flow not every scheduler says that it is one.
        scheduler: of the pipeline.

    Returns:
        A `DDPMScheduler` or a `FlowSchedule`.

    Raises:
        ValueError: if the scheduler has another prediction type.
    """
    config = scheduler.config
    kind = "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise ValueError(
            f"the scheduler {type(scheduler).__name__} is of a model that predicts {kind!r}; expected epsilon, "
            "v_prediction, sample or flow_prediction"
        )
    if family.predicts_flow or kind == "flow_prediction":
        return FlowSchedule(config.num_train_timesteps)
    return DDPMScheduler.from_config(config)
