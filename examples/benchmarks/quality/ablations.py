"""Context managers that change one part of Perfusion each."""

import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_perfusion import attention_processor, rank_one_edit
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.covariance import read_captions
from diffusers_perfusion.training.trainer import PerfusionTrainer


def first_images(source, folder, count):
    """Return a folder with the first images and masks of `source`."""
    target = folder / "images"
    (target / "masks").mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        shutil.copy(source / f"{number}.png", target)
        shutil.copy(source / "masks" / f"{number}.png", target / "masks")
    return target


def tight_masks():
    """Let the loss end where the subject ends."""
    return patch("diffusers_perfusion.training.training_data.GROWTH", 0.0)


def ema(decay):
    """Return a context with another decay of the moving average of `i*`; 1 keeps the super-class input."""
    return partial(patch, "diffusers_perfusion.training.trainer.EMA_DECAY", decay)


def noisier_timesteps():
    """Take the larger of two random timesteps."""
    sample = PerfusionTrainer._sample

    def noisier(self, index):
        images, prompts, timesteps, noise = sample(self, index)
        generator = torch.Generator().manual_seed(index)
        others = torch.randint(self.schedule.config.num_train_timesteps, timesteps.shape, generator=generator)
        return images, prompts, timesteps.maximum(others), noise

    return patch.object(PerfusionTrainer, "_sample", noisier)


def padding_in_covariance():
    """Let padding enter `C` too."""

    def covariance(family, config):
        (ids,) = family.tokenize(read_captions(Path(config.pretrained_model_name_or_path) / "captions.txt"))
        with torch.no_grad():
            e = torch.cat([family.encode([part]).inputs for part in ids.split(250)]).flatten(0, 1).double()
        return e.T @ e / len(e)

    return patch("diffusers_perfusion.training.training_loop._covariance", covariance)


def token_only():
    """Edit only the position most similar to the concept, and so none of the tokens after it."""

    def gates(e, *args):
        coef, gate = rank_one_edit.gates(e, *args)
        peak = F.one_hot(gate.argmax(-2), gate.shape[-2]).transpose(-1, -2).to(gate)
        return coef * peak, gate * peak

    return patch("diffusers_perfusion.registry.gates", gates)


def equation_4():
    """Drop what the gates keep closed, as in the paper, instead of giving it to the super-class."""

    def edit(h, coef, gate, w_i, o, w_super):
        return rank_one_edit.edit(h, coef, gate, w_i, o, torch.zeros_like(w_super))

    return patch("diffusers_perfusion.attention_processor.edit", edit)


@contextmanager
def trained_keys():
    """Train the `o*_K` as the `o*_V`, and generate with those trained last."""
    keys = {}

    class KeyTrainer(PerfusionTrainer):
        def __init__(self, pipeline, config, *args):
            super().__init__(pipeline, config, *args)
            inputs = self.concept.superclass_input.to(pipeline.unet.dtype)
            with torch.no_grad():
                for layer, module in family_of(pipeline).layers.items():
                    keys[layer] = nn.Parameter(module.to_k(inputs).float())
            self.parameters |= {f"target_keys.{layer}": key for layer, key in keys.items()}
            self.optimizer.optimizer.add_param_group({"params": list(keys.values())})
            self._learning_rates.append(config.value_learning_rate)

    def to_k(self, hidden_states, *args):
        self.unused.discard("to_k")
        w_i, w_super = self._projected(self._attn.to_k, hidden_states.dtype)
        o = keys[self._layer][None].to(hidden_states.dtype)
        return self._edited(self._attn.to_k(hidden_states, *args), w_i, o, w_super)

    with (
        patch.object(attention_processor._EditedAttention, "to_k", to_k),
        patch("diffusers_perfusion.training.training_loop.PerfusionTrainer", KeyTrainer),
    ):
        yield
