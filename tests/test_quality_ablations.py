"""Each ablation changes one part of Perfusion inside its context and nothing after it."""

import ablations
import pytest

from diffusers_perfusion import attention_processor, registry
from diffusers_perfusion.model_families import ModelFamily, cross_attention_layers
from diffusers_perfusion.training import TrainingConfig, train, trainer

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


def test_more_templates_are_trained_with(trained, monkeypatch):
    seen = []
    encode = ModelFamily.tokenize
    monkeypatch.setattr(
        ModelFamily, "tokenize", lambda self, prompts, *args: seen.extend(prompts) or encode(self, prompts, *args)
    )
    with ablations.more_templates():
        trained()
    assert {"my <my-cat>", "a nice <my-cat>"} <= set(seen)
    assert len(trainer.TEMPLATES) == 6
