"""Perfusion with one thing changed, for as long as a `with` lasts."""

import importlib

import ablations
import pytest
import torch

from diffusers_perfusion import attention, state
from diffusers_perfusion.covariance import read_captions, second_moment
from diffusers_perfusion.families import text_encoders
from diffusers_perfusion.training import FitConfig, fit, learner
from diffusers_perfusion.training import data as training_data
from diffusers_perfusion.training.learner import Learner

PROMPT = "a photo of <my-cat>"


@pytest.fixture
def fitted(pipeline, fit_settings):
    """Fit on the tiny pipeline for two steps at a rate at which they can be seen."""

    def run(**settings):
        settings = {"max_train_steps": 2, "value_learning_rate": 0.5, **settings}
        return fit(pipeline, FitConfig(**fit_settings | settings))

    return run


@pytest.fixture
def learned(monkeypatch):
    """The subjects, timesteps and target inputs of all learners."""
    found = {"subjects": [], "timesteps": [], "targets": []}
    step = Learner.step

    def stepping(self, index):
        found["subjects"].append(self.subject)
        loss = step(self, index)
        found["timesteps"].append(self._draw(index)[2].float().mean())
        found["targets"].append(self.concept.target_input.clone())
        return loss

    monkeypatch.setattr(Learner, "step", stepping)
    yield found


def keys_and_gate(pipeline, concept):
    """Edited keys of the first layer and the gate, for a prompt with the concept."""
    pipeline.load_perfusion(concept)
    encodings = pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0]
    known = attention.get_state(pipeline.unet)
    known.prepare(encodings)
    name, layer = next(iter(attention.cross_attention_layers(pipeline.unet).items()))
    edited = attention._EditedAttention(layer, name, known.edit)
    keys, gate = edited.to_k(encodings).detach(), known.edit.gate
    pipeline.unload_perfusion()
    return keys, gate


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_keys_learn_and_are_drawn_with(pipeline, fitted, rate):
    """At a rate of nothing they stay the locked ones."""
    before = attention._EditedAttention.to_k
    with ablations.trained_keys():
        concept = fitted(value_learning_rate=rate)
        keys, _ = keys_and_gate(pipeline, concept)
        assert attention._EditedAttention.to_k is not before
    assert attention._EditedAttention.to_k is before
    locked, _ = keys_and_gate(pipeline, concept)
    difference = (keys - locked).abs().max()
    assert difference > 1e-2 if rate else difference < 1e-5


def test_padding_enters_the_covariance(pipeline, fit_settings, tmp_path):
    (tmp_path / "captions.txt").write_text("a photo of a cat\na dog\n")
    config = FitConfig(**fit_settings | {"pretrained_model_name_or_path": str(tmp_path)})
    texts = text_encoders(pipeline)
    words = second_moment(texts, read_captions(tmp_path / "captions.txt"))
    with ablations.padding_in_covariance():
        # The package has a function of the module's name.
        everything = importlib.import_module("diffusers_perfusion.training.fit")._covariance(texts, config)
    last = texts.encode(texts.tokenize(["a dog"])).states[0, -1].double()
    assert everything.shape == words.shape
    assert last @ everything @ last > last @ words @ last


def test_the_edit_is_at_one_position(pipeline, make_concept):
    concept = make_concept()
    _, everywhere = keys_and_gate(pipeline, concept)
    with ablations.word_only():
        _, once = keys_and_gate(pipeline, concept)
    assert (everywhere > 0).sum() > 1
    assert (once > 0).sum() == 1 and once.max() == everywhere.max()
    assert state.gates is ablations.editing.gates


def test_by_equation_4_what_the_gates_leave_closed_is_lost(pipeline, make_concept):
    concept = make_concept(bias=2.0)  # at which the gate is shut
    given, _ = keys_and_gate(pipeline, concept)
    with ablations.equation_4():
        lost, _ = keys_and_gate(pipeline, concept)
    again, _ = keys_and_gate(pipeline, concept)
    assert (given - lost).abs().max() > 1e-2
    assert torch.equal(given, again)


def test_the_target_input_stays_where_it_was(fitted, learned):
    with ablations.ema(1.0)():
        concept = fitted()
    torch.testing.assert_close(learned["targets"][-1], concept.superclass_input)
    assert not torch.allclose(fitted().target_input, concept.target_input)
    assert learner.EMA_DECAY == 0.997


def test_timesteps_are_noisier(fitted, learned):
    with ablations.noisier_timesteps():
        fitted(max_train_steps=1, train_batch_size=32)
    fitted(max_train_steps=1, train_batch_size=32)
    noisier, even = learned["timesteps"]
    assert noisier > even + 50


def test_masks_are_tight(monkeypatch, pipeline):
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 24:40, 24:40] = 1
    latents = torch.zeros(1, 4, 32, 32)
    monkeypatch.setattr(training_data, "encode_latents", lambda vae, images: latents)
    arguments = (None, torch.zeros(1, 3, 64, 64), masks, False)
    grown = training_data.make_subject(*arguments).masks
    with ablations.tight_masks():
        tight = training_data.make_subject(*arguments).masks
    assert (grown.sum(), tight.sum()) == (12**2, 8**2)
    assert training_data.GROWTH == 1 / 16
