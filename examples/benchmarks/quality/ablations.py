"""Ways to change one thing of Perfusion, for the length of a `with`."""

import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_perfusion import attention, editing
from diffusers_perfusion.covariance import read_captions
from diffusers_perfusion.training.learner import Learner


def first_pictures(source, folder, count):
    """A folder with the first of the pictures and masks in `source`."""
    target = folder / "pictures"
    (target / "masks").mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        shutil.copy(source / f"{number}.png", target)
        shutil.copy(source / "masks" / f"{number}.png", target / "masks")
    return target


def tight_masks():
    """The loss ends where the subject ends."""
    return patch("diffusers_perfusion.training.data.GROWTH", 0.0)


def ema(decay):
    """Another decay of the moving average of `i*`; 1 keeps the super-category's encoding."""
    return partial(patch, "diffusers_perfusion.training.learner.EMA_DECAY", decay)


def noisier_timesteps():
    """Each timestep is the larger of two."""
    draw = Learner._draw

    def noisier(self, index):
        pictures, prompts, timesteps, noise = draw(self, index)
        generator = torch.Generator().manual_seed(index)
        others = torch.randint(self.scheduler.config.num_train_timesteps, timesteps.shape, generator=generator)
        return pictures, prompts, timesteps.maximum(others), noise

    return patch.object(Learner, "_draw", noisier)


def padding_in_covariance():
    """Padding enters `C` too."""

    def covariance(texts, config):
        (ids,) = texts.tokenize(read_captions(Path(config.pretrained_model_name_or_path) / "captions.txt"))
        with torch.no_grad():
            e = torch.cat([texts.encode([part]).states for part in ids.split(250)]).flatten(0, 1).double()
        return e.T @ e / len(e)

    return patch("diffusers_perfusion.training.fit._covariance", covariance)


def word_only():
    """The edit is made at the one position that is most like the concept, and so not at the words after it."""

    def gates(e, *args):
        coef, gate = editing.gates(e, *args)
        peak = F.one_hot(gate.argmax(-2), gate.shape[-2]).transpose(-1, -2).to(gate)
        return coef * peak, gate * peak

    return patch("diffusers_perfusion.state.gates", gates)


def equation_4():
    """What the gates leave closed is lost, as in the paper, and does not go to the super-category."""

    def edit(h, coef, gate, w_i, o, w_super):
        return editing.edit(h, coef, gate, w_i, o, torch.zeros_like(w_super))

    return patch("diffusers_perfusion.attention.edit", edit)


@contextmanager
def trained_keys():
    """The `o*_K` learn as the `o*_V` do, and what was learned last is drawn with."""
    keys = {}

    class KeyLearner(Learner):
        def __init__(self, pipeline, config, *args):
            super().__init__(pipeline, config, *args)
            inputs = self.concept.superclass_input.to(pipeline.unet.dtype)
            with torch.no_grad():
                for layer, module in attention.cross_attention_layers(pipeline.unet).items():
                    keys[layer] = nn.Parameter(module.to_k(inputs).float())
            self.parameters |= {f"target_keys.{layer}": key for layer, key in keys.items()}
            self.optimizer.optimizer.add_param_group({"params": list(keys.values())})
            self._rates.append(config.value_learning_rate)

    def to_k(self, encodings, *args):
        self.unused.discard("to_k")
        w_i, w_super = self._project(self._attn.to_k, encodings.dtype)
        o = keys[self._layer][None].to(encodings.dtype)
        return editing.edit(self._attn.to_k(encodings, *args), self._edit.coef, self._edit.gate, w_i, o, w_super)

    with (
        patch.object(attention._EditedAttention, "to_k", to_k),
        patch("diffusers_perfusion.training.fit.Learner", KeyLearner),
    ):
        yield
