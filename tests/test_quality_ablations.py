"""Each ablation changes one part of Perfusion inside its context and nothing after it."""

import ablations
import pytest
import torch

from diffusers_perfusion import attention_processor, registry
from diffusers_perfusion.model_families import ModelFamily, cross_attention_layers, family_of
from diffusers_perfusion.training import TrainingConfig, train, trainer, training_data, training_loop
from diffusers_perfusion.training.covariance import read_captions, second_moment
from diffusers_perfusion.training.trainer import PerfusionTrainer

PROMPT = "a photo of <my-cat>"


@pytest.fixture
def trained(pipeline, training_settings):
    """Train on the tiny pipeline for two steps at a rate at which they can be seen."""

    def run(**settings):
        settings = {"max_train_steps": 2, "value_learning_rate": 0.5, **settings}
        return train(pipeline, TrainingConfig(**training_settings | settings))

    return run


@pytest.fixture
def recorded(monkeypatch):
    """The subjects, timesteps and target inputs of every training step."""
    found = {"subjects": [], "timesteps": [], "targets": []}
    step = PerfusionTrainer.step

    def stepping(self, index):
        found["subjects"].append(self.data)
        loss = step(self, index)
        found["timesteps"].append(self._sample(index)[2].float().mean())
        found["targets"].append(self.concept.target_input.clone())
        return loss

    monkeypatch.setattr(PerfusionTrainer, "step", stepping)
    yield found


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


def test_padding_enters_the_covariance(pipeline, training_settings, tmp_path):
    (tmp_path / "captions.txt").write_text("a photo of a cat\na dog\n")
    config = TrainingConfig(**training_settings | {"pretrained_model_name_or_path": str(tmp_path)})
    family = family_of(pipeline)
    prompt_tokens = second_moment(family, read_captions(tmp_path / "captions.txt"))
    with ablations.padding_in_covariance():
        everything = training_loop._covariance(family, config)
    last = family.encode(family.tokenize(["a dog"])).inputs[0, -1].double()
    assert everything.shape == prompt_tokens.shape
    assert last @ everything @ last > last @ prompt_tokens @ last


def test_the_edit_is_at_one_position(pipeline, make_concept):
    concept = make_concept()
    _, everywhere = keys_and_gate(pipeline, concept)
    with ablations.token_only():
        _, once = keys_and_gate(pipeline, concept)
    assert (everywhere > 0).sum() > 1
    assert (once > 0).sum() == 1 and once.max() == everywhere.max()
    assert registry.gates is ablations.rank_one_edit.gates


def test_by_equation_4_what_the_gates_keep_closed_is_lost(pipeline, make_concept):
    concept = make_concept(bias=2.0)  # at which the gate is shut
    given, _ = keys_and_gate(pipeline, concept)
    with ablations.equation_4():
        lost, _ = keys_and_gate(pipeline, concept)
    again, _ = keys_and_gate(pipeline, concept)
    assert (given - lost).abs().max() > 1e-2
    assert torch.equal(given, again)


def test_the_target_input_stays_where_it_was(trained, recorded):
    with ablations.ema(1.0)():
        concept = trained()
    torch.testing.assert_close(recorded["targets"][-1], concept.superclass_input)
    assert not torch.allclose(trained().target_input, concept.target_input)
    assert trainer.EMA_DECAY == 0.997


def test_timesteps_are_noisier(trained, recorded):
    with ablations.noisier_timesteps():
        trained(max_train_steps=1, train_batch_size=32)
    trained(max_train_steps=1, train_batch_size=32)
    noisier, even = recorded["timesteps"]
    assert noisier > even + 50


def test_masks_are_tight(monkeypatch, pipeline):
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 24:40, 24:40] = 1
    latents = torch.zeros(1, 4, 32, 32)
    monkeypatch.setattr(ModelFamily, "encode_latents", lambda family, vae, images: latents)
    arguments = (family_of(pipeline), None, torch.zeros(1, 3, 64, 64), masks, False)
    grown = training_data.make_training_data(*arguments).masks
    with ablations.tight_masks():
        tight = training_data.make_training_data(*arguments).masks
    assert (grown.sum(), tight.sum()) == (12**2, 8**2)
    assert training_data.GROWTH == 1 / 16
