"""Context managers that change one part of Perfusion each."""

import shutil
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn

from diffusers_perfusion import attention_processor
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.trainer import PerfusionTrainer


def first_images(source, folder, count):
    """Return a folder with the first images and masks of `source`."""
    target = folder / "images"
    (target / "masks").mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        shutil.copy(source / f"{number}.png", target)
        shutil.copy(source / "masks" / f"{number}.png", target / "masks")
    return target


def no_fading():
    """Project the hidden states of the prompt as they are, at every gate."""
    return patch("diffusers_perfusion.registry.fade", lambda e, e_super, gate: e)


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
        w_i = self._projected(self._attn.to_k, hidden_states.dtype)
        inputs = self._instead_of(hidden_states, self._edit.inputs)
        return self._edited(self._attn.to_k(inputs, *args), w_i, keys[self._layer][None].to(hidden_states.dtype))

    with (
        patch.object(attention_processor._EditedAttention, "to_k", to_k),
        patch("diffusers_perfusion.training.training_loop.PerfusionTrainer", KeyTrainer),
    ):
        yield
