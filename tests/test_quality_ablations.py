"""Each ablation changes one part of Perfusion inside its context and nothing after it."""

import ablations
import pytest
import torch

from diffusers_perfusion import attention_processor, registry
from diffusers_perfusion.model_families import cross_attention_layers
from diffusers_perfusion.training import TrainingConfig, train

PROMPT = "a photo of <my-cat>"


@pytest.fixture
def trained(pipeline, training_settings):
    """Train on the tiny pipeline for two steps at a rate at which they can be seen."""

    def run(**settings):
        settings = {"max_train_steps": 2, "value_learning_rate": 0.5, **settings}
        return train(pipeline, TrainingConfig(**training_settings | settings))

    return run


def keys_and_gate(pipeline, concept):
    """Edited keys of the first layer and the gate, for a prompt with the concept."""
    pipeline.load_perfusion(concept)
    hidden_states = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
    concepts = registry.registry_of(pipeline.unet)
    concepts.prepare(hidden_states)
    name, layer = next(iter(cross_attention_layers(pipeline.unet).items()))
    edited = attention_processor._EditedAttention(layer, name, concepts.edit)
    keys, gate = edited.to_k(hidden_states).detach(), concepts.edit.gate
    pipeline.unload_perfusion()
    return keys, gate


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_keys_are_trained_and_used(pipeline, trained, rate):
    """At a learning rate of zero they stay the locked ones."""
    before = attention_processor._EditedAttention.to_k
    with ablations.trained_keys():
        concept = trained(value_learning_rate=rate)
        keys, _ = keys_and_gate(pipeline, concept)
        assert attention_processor._EditedAttention.to_k is not before
    assert attention_processor._EditedAttention.to_k is before
    locked, _ = keys_and_gate(pipeline, concept)
    difference = (keys - locked).abs().max()
    assert difference > 1e-2 if rate else difference < 1e-5


def test_without_fading_keys_are_of_the_prompt_itself(pipeline, trained):
    concept = trained()
    faded, _ = keys_and_gate(pipeline, concept)
    with ablations.no_fading():
        keys, gate = keys_and_gate(pipeline, concept)
    again, _ = keys_and_gate(pipeline, concept)
    assert torch.equal(again, faded)
    position = gate[0, :, 0].argmax()
    assert not torch.allclose(keys[0, position:], faded[0, position:], atol=1e-4)
    assert torch.equal(keys[0, :position], faded[0, :position])
