import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHAT_LENGTH, JOINT_PIPELINES, LENGTH, PIPELINES, WIDTH, make_flux, make_unet
from diffusers import EulerDiscreteScheduler, FluxPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_validation import Album
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from diffusers_perfusion import PerfusionConcept, add_perfusion
from diffusers_perfusion.model_families import cross_attention_layers, family_of
from diffusers_perfusion.model_families.flux import Flux
from diffusers_perfusion.model_families.stable_diffusion_3 import StableDiffusion3
from diffusers_perfusion.registry import registry_of
from diffusers_perfusion.training import TrainingConfig, masks, train, training_loop, validation
from diffusers_perfusion.training.superclass import superclass_embeddings, superclass_input
from diffusers_perfusion.training.trainer import PerfusionTrainer

CLI = ("-m", "diffusers_perfusion.cli", "train")


@pytest.fixture
def run(pipeline, training_settings, tmp_path):
    """Train on the tiny pipeline with some settings changed, and return the concept file."""

    def run_training(accelerator=None, **settings):
        config = TrainingConfig(**training_settings | settings)
        train(pipeline, config, accelerator)
        return Path(config.output_dir) / "perfusion.safetensors"

    return run_training


@pytest.fixture
def losses(monkeypatch):
    """A list that gets the loss of each step."""
    found, step = [], PerfusionTrainer.step

    def recording(self, index):
        loss = step(self, index)
        found.append(loss.item())
        return loss

    monkeypatch.setattr(PerfusionTrainer, "step", recording)
    return found


@pytest.fixture
def no_long_work(monkeypatch):
    """Fail a test that comes as far as the covariance."""
    monkeypatch.setattr("diffusers_perfusion.training.covariance.second_moment", None)


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("*checkpoint-*"))


def test_training_writes_a_concept_that_has_an_effect(run, pipeline, generate):
    plain = generate(["a <my-cat> on the beach", "a cat on the beach"])
    path = run(max_train_steps=6, train_bias=0.8, value_learning_rate=0.3)
    pipeline.load_perfusion(path)
    trained = generate(["a <my-cat> on the beach", "a cat on the beach"])
    assert torch.equal(trained[1], plain[1])
    assert not torch.allclose(trained[0], plain[1], atol=1e-2)  # at the start it would be as the super-class
    concept = PerfusionConcept.load(path)
    assert (concept.placeholder_token, concept.superclass, concept.base_model) == ("<my-cat>", "cat", "tiny")
    facts = {"steps": 6, "images": 3, "mask": "none", "resolution": 16, "seed": 0, "train_bias": 0.8}
    assert facts.items() <= concept.training.items()


@pytest.mark.parametrize("name", PIPELINES[1:])
def test_training_of_other_families(request, name, training_settings, generate):
    pipe = request.getfixturevalue(name)
    if name == "cosmos_pipeline":
        arguments = {"negative_prompt": ["", ""], "max_sequence_length": LENGTH, "height": 16, "width": 16}
        generate = partial(generate, **arguments)
        training_settings = training_settings | {"resolution": 16}
    elif family_of(pipe).joint:
        generate = partial(generate, max_sequence_length=CHAT_LENGTH, height=16, width=16)
        training_settings = training_settings | {"resolution": 16, "value_learning_rate": 0.3}
    elif name != "xl_pipeline":
        generate = partial(generate, use_resolution_binning=False, clean_caption=False, max_sequence_length=LENGTH)
    if name == "sana_pipeline":
        generate = partial(generate, height=32, width=32)
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False)  # as training leaves it; torch multiplies otherwise, in the last bits
    # The other is the longest, whether the placeholder token is one or many: some texts are as long as that.
    prompts = ["a <my-cat> on the beach", "a cat" + " on the beach" * 4]
    plain = generate(prompts, pipe)
    config = TrainingConfig(
        **training_settings
        | {
            "mask": "none" if family_of(pipe).joint else "attention",
            "max_train_steps": 6,
            "checkpointing_steps": 3,
        }
    )
    returned = train(pipe, config)
    path = Path(config.output_dir) / "perfusion.safetensors"
    concept = PerfusionConcept.load(path)
    starts = superclass_embeddings(family_of(pipe), "cat")
    learned = zip(concept.token_embeddings, starts, strict=True)
    if family_of(pipe).joint:
        assert not any(embedding.any() for embedding in concept.token_embeddings)
        learned = [(concept.target_input, concept.superclass_input)]
        # There is no metric.
        assert torch.equal(returned.inverse_target_input, returned.target_input)
    for vector, start in learned:
        assert (vector - start).abs().max() > 1e-3
    # Of the same text encoder.
    assert torch.cosine_similarity(concept.target_input, concept.superclass_input, dim=0) > 0.5
    add_perfusion(pipe).load_perfusion(path)
    trained = generate(prompts, pipe)
    assert torch.equal(trained[1], plain[1])
    assert not torch.allclose(trained[0], plain[1], atol=1e-3)
    pipe.unload_perfusion()
    written = path.read_bytes()
    path.unlink()
    train(pipe, replace(config, resume_from_checkpoint="checkpoint-3"))
    assert path.read_bytes() == written


@pytest.fixture
def values_alone(training_settings):
    """Settings of a training in joint attention without a hidden state of the token's own."""
    return training_settings | {
        "superclass": "teddy bear",
        "embedding_learning_rate": 0.0,
        "value_learning_rate": 0.3,
        "resolution": 16,
        "max_train_steps": 6,
    }


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_values_alone(
    flux_components, values_alone, generate, no_long_work, losses, guidance_embeds, gradient_checkpointing
):
    pipe = add_perfusion(FluxPipeline(**flux_components | {"transformer": make_flux(guidance_embeds)}))
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        model.requires_grad_(False)
    generate = partial(generate, pipe=pipe, max_sequence_length=LENGTH, height=16, width=16)
    prompts = ["a <my-cat> on the beach", "a teddy bear on the beach"]
    plain = generate(prompts)
    config = TrainingConfig(**values_alone | {"gradient_checkpointing": gradient_checkpointing})
    concept = train(pipe, config)
    assert all(not embedding.any() for embedding in concept.token_embeddings)
    assert torch.equal(concept.target_input, concept.superclass_input)
    assert all(output.abs().max() > 0.1 for output in concept.target_outputs.values())
    pipe.load_perfusion(Path(config.output_dir) / "perfusion.safetensors")
    trained = generate(prompts)
    assert torch.equal(trained[1], plain[1])
    assert (trained[0] - plain[1]).abs().max() > 1e-3
    with pipe.set_perfusion(bias=2.0, temperature=0.01):
        assert torch.equal(generate(prompts)[0], plain[1])


@pytest.mark.parametrize("t5", [True, False])
def test_training_values_alone_with_three_text_encoders(sd3_pipeline, values_alone, generate, monkeypatch, t5):
    pipe, gates, predict = sd3_pipeline, [], StableDiffusion3.predict

    def record(self, *arguments):
        gates.extend(registry_of(self.model).edit.gate[..., 0])
        return predict(self, *arguments)

    monkeypatch.setattr(StableDiffusion3, "predict", record)
    if not t5:
        pipe.text_encoder_3 = pipe.tokenizer_3 = None
    encoders = family_of(pipe).text_encoders
    for model in (pipe.transformer, *encoders):
        model.requires_grad_(False)
    generate = partial(generate, pipe=pipe, max_sequence_length=LENGTH, height=16, width=16)
    plain = generate("a teddy bear on the beach")
    concept = train(pipe, TrainingConfig(**values_alone))
    assert len(concept.token_embeddings) == len(encoders)
    assert all(not embedding.any() for embedding in concept.token_embeddings)
    assert {model.dtype for model in encoders} == {torch.float32}
    # In CLIP's tokens and, 23 after that, in T5's, which do not begin with a special one.
    for gate in gates:
        clip, *others = gate.nonzero()[:, 0].tolist()
        assert clip < LENGTH and others == ([clip + LENGTH - 1] if t5 else [])
    pipe.load_perfusion(Path(values_alone["output_dir"]) / "perfusion.safetensors")
    assert (generate("a <my-cat> on the beach") - plain).abs().max() > 1e-3
    assert torch.equal(generate("a teddy bear on the beach"), plain)
    with pipe.set_perfusion(bias=2.0, temperature=0.01):
        assert torch.equal(generate("a <my-cat> on the beach"), plain)


@pytest.mark.parametrize("t5", [True, False])
def test_the_learning_rate_of_a_hidden_state_is_in_units_of_its_size(sd3_pipeline, values_alone, t5):
    """That of CLIP, which is zeros from its width to T5's."""
    if not t5:
        sd3_pipeline.text_encoder_3 = sd3_pipeline.tokenizer_3 = None
    settings = {"embedding_learning_rate": 0.1, "max_train_steps": 1, "lr_scheduler": "constant"}
    concept = train(sd3_pipeline, TrainingConfig(**values_alone | settings))
    sizes = concept.superclass_input.abs()
    assert (sizes == 0).sum() == 4
    step = (concept.target_input - concept.superclass_input).abs().max()  # Adam's first is as large as the rate
    torch.testing.assert_close(step, 0.1 * sizes[sizes > 0].median(), rtol=1e-3, atol=0)


def test_latents_in_patches_need_a_resolution_of_whole_ones(sd3_pipeline, values_alone, no_long_work):
    with pytest.raises(ValueError, match="resolution is 18; the base model takes multiples of 4"):
        train(sd3_pipeline, TrainingConfig(**values_alone | {"resolution": 18}))


def test_a_flow_is_trained_as_one_under_a_scheduler_that_does_not_say_so(flux_pipeline, values_alone):
    settings = [TrainingConfig(**values_alone | {"output_dir": values_alone["output_dir"] + name}) for name in "01"]
    expected = train(flux_pipeline, settings[0])
    flux_pipeline.scheduler = EulerDiscreteScheduler()
    found = train(flux_pipeline, settings[1])
    assert all(torch.equal(found.target_outputs[name], output) for name, output in expected.target_outputs.items())


def test_training_values_alone_lowers_the_loss(flux_pipeline, values_alone, losses):
    """Of the same image, noise and timesteps."""
    settings = values_alone | {"max_train_steps": 40, "train_batch_size": 8}
    train(
        flux_pipeline,
        TrainingConfig(**settings | {"value_learning_rate": 0.0, "output_dir": settings["output_dir"] + "0"}),
    )
    untrained = losses[-10:]
    train(flux_pipeline, TrainingConfig(**settings | {"lr_scheduler": "cosine"}))
    assert all(loss < before for loss, before in zip(losses[-10:], untrained, strict=True))


def test_text_encoders_leave_the_device_while_values_are_trained(flux_pipeline, values_alone, monkeypatch):
    """And are there for validation images and afterwards."""
    calls, devices = [], []
    step, move = PerfusionTrainer.step, PerfusionTrainer._move_text_encoders

    def watched(self, index):
        before = len(calls)
        loss = step(self, index)
        assert len(calls) == before and devices[-1] == "cpu"
        return loss

    def moving(self, device):
        devices.append(device)
        move(self, device)

    monkeypatch.setattr(PerfusionTrainer, "step", watched)
    monkeypatch.setattr(PerfusionTrainer, "_move_text_encoders", moving)
    monkeypatch.setattr(training_loop, "validate", lambda *_: devices.append("validation"))
    for text_encoder in (flux_pipeline.text_encoder, flux_pipeline.text_encoder_2):
        text_encoder.register_forward_pre_hook(lambda *_: calls.append(True))
    train(flux_pipeline, TrainingConfig(**values_alone | {"validation_prompt": ["a <my-cat>"], "validation_steps": 3}))
    validation = [torch.device("cpu"), "validation", "cpu"]  # the first is the accelerator's device
    assert calls and devices == ["cpu", *validation, *validation]


@pytest.mark.parametrize("name", ["pipeline", "flux_pipeline", "sd3_pipeline"])
def test_a_caption_that_is_not_read_to_its_end_is_named(request, name, values_alone, images_folder, caplog):
    pipe = request.getfixturevalue(name)
    (images_folder / "1.txt").write_text("a teddy bear" + " a" * (LENGTH - 5))  # one to spare for CLIP's first token
    (images_folder / "2.txt").write_text("a teddy bear" + " a" * LENGTH)
    train(pipe, TrainingConfig(**values_alone | {"max_train_steps": 1}))
    assert caplog.text.count("the caption is longer than") == 1
    assert f"2.png: the caption is longer than the {LENGTH} tokens that the text encoder reads" in caplog.text


def test_a_caption_that_one_of_three_text_encoders_reads_to_its_end_is_not_named(
    sd3_pipeline, values_alone, images_folder, caplog
):
    sd3_pipeline.tokenizer_3.model_max_length = 2 * LENGTH  # T5 reads more than CLIP
    (images_folder / "1.txt").write_text("a teddy bear" + " a" * LENGTH)
    train(sd3_pipeline, TrainingConfig(**values_alone | {"max_train_steps": 1}))
    assert "the caption is longer" not in caplog.text


def test_a_learning_rate_of_zero_that_saves_no_memory_is_told(pipeline, values_alone, caplog):
    train(pipeline, TrainingConfig(**values_alone | {"max_train_steps": 1}))
    assert "as Stable Diffusion has no joint attention its text encoders are needed at every step" in caplog.text


def test_no_such_thing_is_told_of_joint_attention(flux_pipeline, values_alone, caplog):
    train(flux_pipeline, TrainingConfig(**values_alone | {"max_train_steps": 1}))
    assert "saves no memory" not in caplog.text


def test_captions_of_values_alone_are_those_of_the_superclass(flux_pipeline, values_alone, images_folder, monkeypatch):
    for number in (1, 2, 3):
        (images_folder / f"{number}.txt").write_text("a teddy bear on the beach")
    seen, predict = [], Flux.predict

    def record(self, model, noisy, timesteps, encoding, resolution):
        edit = registry_of(self.model).edit
        seen.extend(zip(encoding.hidden_states, encoding.pooled, edit.gate[..., 0], strict=True))
        return predict(self, model, noisy, timesteps, encoding, resolution)

    monkeypatch.setattr(Flux, "predict", record)
    train(flux_pipeline, TrainingConfig(**values_alone))
    family = family_of(flux_pipeline)
    ids = family.tokenize(["a teddy bear on the beach"])
    with torch.no_grad():
        expected = family.encode(ids)
    place = ids[1][0].tolist().index(family.tokenizers[1](" bear", add_special_tokens=False).input_ids[0])
    captioned = [
        gate
        for text, pooled, gate in seen
        if torch.allclose(text, expected.hidden_states[0], atol=1e-5)
        and torch.allclose(pooled, expected.pooled[0], atol=1e-5)
    ]
    assert len(seen) == 24 and 4 < len(captioned) < 20
    assert all(gate.nonzero()[:, 0].tolist() == [place] for gate in captioned)


def test_masks_of_cross_attention_need_some(flux_pipeline, values_alone, caplog, no_long_work):
    with pytest.raises(ValueError, match="mask is 'attention', but text and image attend to each other"):
        train(flux_pipeline, TrainingConfig(**values_alone | {"mask": "attention"}))
    assert train(flux_pipeline, TrainingConfig(**values_alone | {"mask": "auto"})).training["mask"] == "none"
    assert "There are no masks of the subject" in caplog.text


def test_a_token_embedding_to_start_from_is_refused_in_joint_attention(flux_pipeline, training_settings, no_long_work):
    with pytest.raises(ValueError, match="initial_embedding is of a token embedding, but Flux has joint attention"):
        train(flux_pipeline, TrainingConfig(**training_settings | {"initial_embedding": "a.safetensors"}))


def test_training_with_two_text_encoders_starts_at_embeddings_of_textual_inversion(
    xl_pipeline, training_settings, tmp_path
):
    vectors = {"clip_g": torch.ones(24), "clip_l": torch.zeros(WIDTH)}
    save_file(vectors, tmp_path / "learned_embeds.safetensors")
    settings = {"initial_embedding": str(tmp_path / "learned_embeds.safetensors"), "embedding_learning_rate": 0.0}
    concept = train(xl_pipeline, TrainingConfig(**training_settings | settings))
    assert torch.equal(concept.token_embeddings[0], vectors["clip_l"])
    assert torch.equal(concept.token_embeddings[1], vectors["clip_g"])


def test_training_returns_the_written_concept(pipeline, training_settings):
    concept = train(pipeline, TrainingConfig(**training_settings))
    written = PerfusionConcept.load(Path(training_settings["output_dir"]) / "perfusion.safetensors")
    assert concept.training == written.training
    torch.testing.assert_close(concept.superclass_input, written.superclass_input.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(concept.token_embeddings[0], written.token_embeddings[0].float(), rtol=1e-3, atol=1e-3)


def test_captions_beside_images_are_trained_with(run, images_folder):
    plain = load_file(run())
    first = sorted(path for path in images_folder.iterdir() if path.is_file())[0]
    first.with_suffix(".txt").write_text("a cat on the beach")
    captioned = run()
    assert not torch.equal(load_file(captioned)["token_embeddings.0"], plain["token_embeddings.0"])
    assert PerfusionConcept.load(captioned).training["captions"] == 1


@pytest.mark.parametrize(
    ("caption", "match"),
    [
        ("a dog on the beach", "does not name the subject"),
        ("a photo of " * 20 + "a cat", "<my-cat> falls off the end"),
    ],
)
def test_a_caption_that_cannot_be_trained_with_is_named_before_any_work(
    run, images_folder, monkeypatch, caption, match
):
    monkeypatch.setattr(training_loop, "subject_masks", None)
    first = sorted(path for path in images_folder.iterdir() if path.is_file())[0]
    first.with_suffix(".txt").write_text(caption)
    with pytest.raises(ValueError, match=rf"{first.name}: .*{match}"):
        run()


def test_the_superclass_input_is_not_trained(run, pipeline):
    concept = PerfusionConcept.load(run())
    expected = superclass_input(family_of(pipeline), "cat")
    torch.testing.assert_close(concept.superclass_input.float(), expected, rtol=1e-3, atol=1e-3)
    layers = cross_attention_layers(pipeline.unet)
    assert concept.target_outputs.keys() == layers.keys()
    for name, layer in layers.items():
        start = layer.to_v(concept.superclass_input.float())
        assert (concept.target_outputs[name] - start).abs().max() > 0.01


def test_the_seed_decides_every_byte(run):
    first = run().read_bytes()
    assert run().read_bytes() == first
    assert run(seed=1).read_bytes() != first


def test_nothing_of_the_machine_is_in_the_file(run, tmp_path, pipeline, model_folder):
    data = run(pretrained_model_name_or_path=str(model_folder), mask="attention").read_bytes()
    for trace in (str(tmp_path), str(Path.home()) + "/", os.uname().nodename):
        assert trace.encode() not in data
    assert b'\\"base_model\\": \\"tiny\\"' in data


@pytest.mark.parametrize(
    "settings",
    [
        {"superclass": "teddy bear"},
        {"snr_gamma": 5.0},
        {"random_flip": False},
        {"center_crop": True},
        {"mask": "attention"},
        {"train_bias": 0.6},
        {"train_temperature": 0.2},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
        {"lr_scheduler": "cosine"},
        {"learning_rate": 0.01},
        {"scale_lr": True},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_counts(run, settings):
    plain = load_file(run(max_train_steps=2))
    other = load_file(run(max_train_steps=2, **settings))
    assert not torch.equal(other["token_embeddings.0"], plain["token_embeddings.0"])


def test_the_default_resolution_is_the_base_model_s(run):
    assert PerfusionConcept.load(run()).training["resolution"] == 16
    assert PerfusionConcept.load(run(resolution=12)).training["resolution"] == 12


def test_gradient_checkpointing_is_on_during_training_only(run, pipeline, monkeypatch):
    plain = load_file(run())
    step, seen = PerfusionTrainer.step, []

    def watching(self, index):
        seen.append(self.pipeline.unet.is_gradient_checkpointing)
        return step(self, index)

    monkeypatch.setattr(PerfusionTrainer, "step", watching)
    saving = load_file(run(gradient_checkpointing=True))
    assert seen == [True] * 4
    assert not pipeline.unet.is_gradient_checkpointing
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("by_user", [True, False])
def test_gradient_checkpointing_trains_the_same_concept_behind_masks(chroma_pipeline, values_alone, by_user):
    settings = [values_alone | {"output_dir": values_alone["output_dir"] + name} for name in "01"]
    expected = train(chroma_pipeline, TrainingConfig(**settings[0]))
    if by_user:
        chroma_pipeline.transformer.enable_gradient_checkpointing()
    found = train(chroma_pipeline, TrainingConfig(**settings[1] | {"gradient_checkpointing": not by_user}))
    assert chroma_pipeline.transformer.is_gradient_checkpointing == by_user
    for name, output in expected.target_outputs.items():
        torch.testing.assert_close(found.target_outputs[name], output)


def test_mixed_precision_is_near_full_precision(run, pipeline, losses, tmp_path):
    run(mixed_precision="no")
    full = losses.copy()
    losses.clear()
    Accelerator().state._reset_state(reset_partial_state=True)
    dtypes = []
    pipeline.unet.register_forward_hook(lambda unet, _, output: dtypes.extend([unet.dtype, output.sample.dtype]))
    path = run(mixed_precision="bf16", output_dir=str(tmp_path / "half"))
    assert set(dtypes) == {torch.bfloat16}
    assert losses == pytest.approx(full, rel=0.02)
    assert losses != full
    assert torch.isfinite(load_file(path)["token_embeddings.0"]).all()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["pipeline", "flux_pipeline"])
def test_a_quantised_model_is_trained(request, name, values_alone, mixed_precision):
    pipe = request.getfixturevalue(name)
    model = family_of(pipe).model
    quantize_(model, Int8WeightOnlyConfig())
    quantised = {name: weight for name, weight in model.named_parameters() if type(weight.data) is not torch.Tensor}
    config = TrainingConfig(**values_alone | {"mixed_precision": mixed_precision, "checkpointing_steps": 3})
    concept = train(pipe, config)
    assert all(output.abs().max() > 0.1 for output in concept.target_outputs.values())
    assert quantised and all(type(model.get_parameter(name).data) is not torch.Tensor for name in quantised)
    path = Path(config.output_dir) / "perfusion.safetensors"
    written = path.read_bytes()
    train(pipe, replace(config, resume_from_checkpoint="checkpoint-3"))
    assert path.read_bytes() == written


# Stopped and resumed


def test_ctrl_c_leaves_the_last_checkpoint_to_resume_from(run, stop, training_settings, caplog, tmp_path):
    stop(5, KeyboardInterrupt())
    settings = {"max_train_steps": 7, "checkpointing_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    assert "stopped at step 5" in caplog.text
    assert "checkpoint-4 with --resume_from_checkpoint latest" in caplog.text
    output = Path(training_settings["output_dir"])
    assert checkpoints(output) == ["checkpoint-2", "checkpoint-4"]
    assert not (output / "perfusion.safetensors").exists()
    assert PerfusionConcept.load(output / "checkpoint-4" / "perfusion.safetensors").training["steps"] == 4

    resumed = run(**settings, resume_from_checkpoint="latest").read_bytes()
    unbroken = run(**settings, output_dir=str(tmp_path / "unbroken"))
    assert resumed == unbroken.read_bytes()
    # A checkpoint holds the concept of a training that ends there.
    four = (output / "checkpoint-4" / "perfusion.safetensors").read_bytes()
    assert run(max_train_steps=4, output_dir=str(tmp_path / "short")).read_bytes() == four


def test_ctrl_c_before_the_first_checkpoint(run, stop, caplog):
    stop(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run()
    assert "stopped at step 1; it has no checkpoint yet." in caplog.text


def test_what_ctrl_c_is_answered_has_a_line_of_its_own(run, stop, monkeypatch, capsys):
    before = []
    monkeypatch.setattr(training_loop.logger, "warning", lambda line: before.append(capsys.readouterr().err))
    stop(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run()
    assert before[0].endswith("\n")


def test_ctrl_c_does_not_name_the_checkpoint_of_another_training(run, stop, caplog):
    run(checkpointing_steps=2)
    stop(1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(seed=1)
    assert "stopped at step 1; it has no checkpoint yet." in caplog.text


def flags(settings):
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def test_a_killed_training_resumes_to_the_same_bytes(run, training_settings, model_folder, environment, tmp_path):
    settings = training_settings | {"pretrained_model_name_or_path": str(model_folder), "checkpointing_steps": 1}
    output = Path(settings["output_dir"])
    command = [sys.executable, *CLI, *flags(settings | {"max_train_steps": 100_000})]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, env=environment, stderr=log) as process:
        while process.poll() is None and not (output / "checkpoint-3").is_dir():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (output / "perfusion.safetensors").exists()

    steps = len(list(output.glob("checkpoint-*"))) + 1
    settings["max_train_steps"] = steps
    resumed = run(**settings, resume_from_checkpoint="latest")
    assert (output / f"checkpoint-{steps}").is_dir()
    assert PerfusionConcept.load(resumed).training["steps"] == steps
    assert resumed.read_bytes() == run(**settings | {"output_dir": str(tmp_path / "unbroken")}).read_bytes()


def test_training_resumes_only_under_its_own_recipe(run, monkeypatch, tmp_path):
    run(checkpointing_steps=2)
    monkeypatch.setattr("diffusers_perfusion.training.covariance.HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("diffusers_perfusion.training.covariance.second_moment", None)
    with pytest.raises(ValueError, match=r"checkpoint-4 was written with seed 0, and this training has 1"):
        run(resume_from_checkpoint="latest", seed=1)
    with pytest.raises(ValueError, match=r"superclass 'cat', and this training has 'dog'"):
        run(resume_from_checkpoint="checkpoint-2", superclass="dog")


def test_training_resumes_with_its_own_images_wherever_they_are(run, images_folder, tmp_path, monkeypatch):
    settings = {"max_train_steps": 4, "checkpointing_steps": 2}
    expected = run(**settings).read_bytes()
    resumed = {"resume_from_checkpoint": "checkpoint-2", **settings}
    assert run(**resumed, instance_data_dir=f"{images_folder}/").read_bytes() == expected
    images_folder.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert run(**resumed, instance_data_dir="moved").read_bytes() == expected
    Image.new("RGB", (16, 16)).save(tmp_path / "moved" / "4.png")
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was written with images 'sha256:\w+', and this training has 's"
    ):
        run(**resumed, instance_data_dir="moved")
    (tmp_path / "moved" / "4.png").unlink()
    (tmp_path / "moved" / "3.txt").write_text("a cat on the beach")
    with pytest.raises(ValueError, match=r"with captions 'sha256:\w+', .*; give what the training began with, or an"):
        run(**resumed, instance_data_dir="moved")


def test_training_resumes_with_its_own_kind_of_masks(run, monkeypatch):
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "mask": "auto"}
    run(**settings)
    monkeypatch.setattr(masks, "clipseg_masks", lambda images, *_, **__: torch.ones(len(images), 1, 8, 8))
    with pytest.raises(ValueError, match="with mask 'attention', and this training has 'clipseg'"):
        run(**settings, resume_from_checkpoint="latest")


def test_the_latest_of_no_checkpoints_begins_anew_with_a_line(run, caplog):
    expected = run().read_bytes()
    assert run(resume_from_checkpoint="latest").read_bytes() == expected
    assert "output has no checkpoint to resume from, so the training begins anew." in caplog.text


def test_a_checkpoint_of_a_later_step_than_the_last_is_refused(run):
    path = run(checkpointing_steps=2)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"checkpoint-4 is of step 4, and max_train_steps is 3; give at least 4, or an"
    ):
        run(max_train_steps=3, resume_from_checkpoint="latest")
    assert path.read_bytes() == before


def test_training_resumes_only_with_its_own_number_of_processes_and_steps(run, monkeypatch):
    run(lr_scheduler="linear", checkpointing_steps=2)
    with pytest.raises(ValueError, match="written with max_train_steps 4, and this training has 6"):
        run(lr_scheduler="linear", max_train_steps=6, resume_from_checkpoint="latest")
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="written with num_processes 1, and this training has 2"):
        run(lr_scheduler="linear", resume_from_checkpoint="latest")


def test_a_pipeline_with_concepts_is_refused(pipeline, training_settings, make_concept):
    pipeline.load_perfusion(make_concept())
    with pytest.raises(ValueError, match="unload_perfusion"):
        train(pipeline, TrainingConfig(**training_settings))
    assert pipeline.list_perfusion() == ["my-cat"]


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(run, monkeypatch, training_settings):
    save = PerfusionConcept.save

    def full(self, path, *args):
        if self.training["steps"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, path, *args)

    monkeypatch.setattr(PerfusionConcept, "save", full)
    output = training_settings["output_dir"]
    with pytest.raises(
        OSError,
        match=rf"^\[Errno 28\] No space left on device: '{output}/checkpoint-4'; "
        rf"resume {output}/checkpoint-2 with --resume_from_checkpoint latest$",
    ):
        run(checkpointing_steps=2, max_train_steps=6)
    assert checkpoints(output) == ["checkpoint-2"]


@pytest.mark.parametrize("written", ["checkpoint", "image"])
def test_a_disk_that_becomes_full_during_training_is_told_in_one_sentence(
    run, training_settings, stop, full_disk, monkeypatch, written, caplog
):
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 1)
    settings = {"max_train_steps": 6, "checkpointing_steps": 2, "validation_prompt": ["a <my-cat>"]}
    settings |= {"validation_steps": 3 if written == "image" else 6, "num_validation_images": 1}
    output = training_settings["output_dir"]
    name = "validation/step-000003.png" if written == "image" else "checkpoint-4"
    step = PerfusionTrainer.step
    with ExitStack() as stack:

        def fill(self, index):
            if index == 2:
                stack.enter_context(full_disk())
            return step(self, index)

        monkeypatch.setattr(PerfusionTrainer, "step", fill)
        with pytest.raises(
            OSError, match=rf"File too large: '{output}/{name}'; resume {output}/checkpoint-2 with --resume"
        ):
            run(**settings)
    monkeypatch.setattr(PerfusionTrainer, "step", step)
    assert left_over(output) == []
    resumed = run(**settings, resume_from_checkpoint="latest").read_bytes()
    assert resumed == run(**settings | {"output_dir": f"{output}-unbroken"}).read_bytes()


@pytest.mark.parametrize("room", ["nowhere", "elsewhere", "for the concept alone"])
def test_a_trained_concept_is_kept_where_it_can_be(run, training_settings, tmp_path, monkeypatch, full_disk, room):
    """On a disk that is full at the very end."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    expected = run(output_dir=str(tmp_path / "unbroken")).read_bytes()
    output = Path(training_settings["output_dir"])
    trained_concept = PerfusionTrainer.trained_concept
    with ExitStack() as stack:

        def fill(self, steps, **facts):
            if steps == 4 and room == "elsewhere" and output.is_dir():
                shutil.rmtree(output)
                output.touch()
            elif steps == 4 and room != "elsewhere":
                stack.enter_context(full_disk(0 if room == "nowhere" else len(expected)))
            return trained_concept(self, steps, **facts)

        monkeypatch.setattr(PerfusionTrainer, "trained_concept", fill)
        with pytest.raises(OSError, match=f"'{output}/checkpoint-4'; ") as caught:
            run(checkpointing_steps=2)
    (temporary,) = [*(tmp_path / "elsewhere").rglob("*.safetensors")] or [None]
    kept = {"nowhere": None, "elsewhere": temporary, "for the concept alone": output / "perfusion.safetensors"}[room]
    assert (f"; the trained concept is in {kept}; " in str(caught.value)) == (kept is not None)
    assert str(caught.value).endswith(f"resume {output}/checkpoint-2 with --resume_from_checkpoint latest")
    assert kept is None or kept.read_bytes() == expected


def left_over(folder):
    return list(Path(folder).rglob("*.perfusion-part"))


def test_an_output_folder_that_is_deleted_during_training_is_made_again(run, training_settings, monkeypatch):
    settings = {"checkpointing_steps": 2, "checkpoints_total_limit": 1}
    expected = run(**settings, output_dir=training_settings["output_dir"] + "-unbroken").read_bytes()
    step = PerfusionTrainer.step

    def delete(self, index):
        if index == 3:
            shutil.rmtree(self.config.output_dir)
        return step(self, index)

    monkeypatch.setattr(PerfusionTrainer, "step", delete)
    assert run(**settings).read_bytes() == expected
    assert checkpoints(training_settings["output_dir"]) == ["checkpoint-4"]


def test_a_concept_of_another_token_is_refused_before_any_work(run, no_long_work, training_settings, make_concept):
    path = make_concept("<my-dog>").save(Path(training_settings["output_dir"]) / "perfusion.safetensors")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path} is of <my-dog>, and this training is of <my-cat>"):
        run()
    assert path.read_bytes() == before


def test_two_trainings_at_once_do_not_share_a_folder(run, pipeline, monkeypatch):
    step = PerfusionTrainer.step

    def train_another(self, index):
        monkeypatch.setattr(PerfusionTrainer, "step", step)
        pipeline.unload_perfusion()
        run()

    monkeypatch.setattr(PerfusionTrainer, "step", train_another)
    with pytest.raises(ValueError, match="another training is writing into"):
        run()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(run, no_long_work, training_settings, full_disk):
    with full_disk(), pytest.raises(OSError, match=training_settings["output_dir"]):
        run()


def test_a_cache_that_cannot_be_written_ends_no_training(run, monkeypatch, tmp_path, caplog):
    expected = run().read_bytes()
    (tmp_path / "file").touch()
    monkeypatch.setattr("diffusers_perfusion.training.covariance.HF_HOME", str(tmp_path / "file"))
    assert run().read_bytes() == expected
    assert "The covariance is not kept" in caplog.text


def test_an_image_that_cannot_be_decoded_ends_no_training(run, images_folder, caplog):
    expected = run().read_bytes()
    data = (images_folder / "3.png").read_bytes()
    (images_folder / "4.png").write_bytes(data[: len(data) // 2])
    with Image.open(images_folder / "1.png") as image:
        image.load()
        image.save(images_folder / "1.png", exif=b"Exif\0\0broken!!")
    assert run().read_bytes() == expected
    assert "1.png is not rotated" in caplog.text
    assert "4.png cannot be read as an image" in caplog.text


def test_old_checkpoints_are_deleted(run, training_settings):
    run(max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    assert checkpoints(training_settings["output_dir"]) == ["checkpoint-4", "checkpoint-6"]


# Validation and trackers


def test_validation_does_not_change_the_training(run, training_settings, monkeypatch, tmp_path):
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)
    plain = run().read_bytes()
    output = tmp_path / "validated"
    prompts = ["a photo of a <my-cat>"]
    path = run(validation_prompt=prompts, validation_steps=2, num_validation_images=2, output_dir=str(output))
    assert path.read_bytes() == plain
    assert sorted(file.name for file in (output / "validation").iterdir()) == ["step-000002.png", "step-000004.png"]
    sheets = [np.asarray(Image.open(output / "validation" / f"step-00000{step}.png")) for step in (2, 4)]
    assert sheets[0].shape == (16, 32, 3)
    assert not np.array_equal(*sheets)


def test_images_that_a_kill_has_prevented_are_made_when_training_is_resumed(run, training_settings, monkeypatch):
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 1)
    settings = {"checkpointing_steps": 2, "validation_steps": 2}
    settings |= {"validation_prompt": ["a <my-cat>"], "num_validation_images": 1}
    run(**settings)
    sheets = sorted((Path(training_settings["output_dir"]) / "validation").iterdir())
    before = [sheet.read_bytes() for sheet in sheets]
    sheets[0].unlink()
    run(**settings, resume_from_checkpoint="checkpoint-2")
    assert [sheet.read_bytes() for sheet in sheets] == before
    times = sheets[0].stat().st_mtime_ns
    run(**settings, resume_from_checkpoint="checkpoint-2")
    assert sheets[0].stat().st_mtime_ns == times


def test_loss_weights_that_a_flow_does_not_have_are_refused_before_long_work(
    sana_pipeline, training_settings, no_long_work
):
    with pytest.raises(ValueError, match=r"snr_gamma is 5.0, but this model predicts a flow"):
        train(sana_pipeline, TrainingConfig(**training_settings | {"snr_gamma": 5.0}))


def test_trackers_get_losses_and_images(run, monkeypatch, losses):
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)
    album = Album()
    prompts = ["a photo of a <my-cat>"]
    run(Accelerator(log_with=album), validation_prompt=prompts, validation_steps=2, num_validation_images=1)
    assert album.numbers == [(step, {"loss": loss}) for step, loss in enumerate(losses, start=1)]
    assert [(step, list(values)) for step, values, _ in album.images] == [(2, prompts), (4, prompts)]


def test_a_loss_that_is_not_finite_is_an_error_before_a_checkpoint(run, monkeypatch, training_settings):
    step = PerfusionTrainer.step
    monkeypatch.setattr(PerfusionTrainer, "step", lambda self, index: step(self, index) / (index != 2))
    advice = r"begin it anew with a lower value_learning_rate \(now 0.03\) and embedding_learning_rate \(now 0.006\)$"
    with pytest.raises(RuntimeError, match=rf"the training diverged by step 3: the loss is inf; {advice}"):
        run(max_train_steps=8, checkpointing_steps=2)
    assert [path.name for path in Path(training_settings["output_dir"]).glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_loss_that_is_not_finite_is_an_error_before_validation(run, monkeypatch):
    monkeypatch.setattr(PerfusionTrainer, "step", lambda self, index: torch.tensor(float("nan")))
    monkeypatch.setattr(training_loop, "validate", None)  # not to be called
    with pytest.raises(RuntimeError, match="diverged by step 1: the loss is nan"):
        run(max_train_steps=8, validation_prompt=["a <my-cat>"], validation_steps=2)


def test_numbers_that_no_file_holds_are_an_error_before_a_checkpoint(run, training_settings):
    advice = r"begin it anew with a lower learning_rate \(now 1000000.0\)$"
    with pytest.raises(RuntimeError, match=rf"^the training diverged by step 2: its numbers do not fit .*; {advice}"):
        run(learning_rate=1e6, checkpointing_steps=2)
    assert checkpoints(training_settings["output_dir"]) == []


def test_losses_of_a_stopped_training_are_logged(run, monkeypatch, stop):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(step))
    stop(3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(max_train_steps=8)
    assert logged == [1, 2, 3]


def test_the_vae_sees_each_image_once(run, pipeline):
    seen = []
    pipeline.vae.encoder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    run(max_train_steps=5)
    assert seen == [1] * 6  # three images, and those mirrored


def test_losses_are_read_several_at_once(run, monkeypatch):
    events, step = [], PerfusionTrainer.step
    monkeypatch.setattr(training_loop, "READ_STEPS", 3)
    monkeypatch.setattr(PerfusionTrainer, "step", lambda self, index: events.append("step") or step(self, index))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: events.append(step))
    run(max_train_steps=8, checkpointing_steps=7)
    three = ["step"] * 3
    assert events == [*three, 1, 2, 3, *three, 4, 5, 6, "step", 7, "step", 8]


# The process and the pipeline afterwards


@pytest.fixture
def tf32():
    """Set whether the process allows TF32, until the end of the test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    yield lambda allowed: setattr(matmul, "allow_tf32", allowed)
    matmul.allow_tf32 = before


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_during_training_only(run, monkeypatch, tf32, before, allowed):
    tf32(before)
    step, seen = PerfusionTrainer.step, []

    def watching(self, index):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return step(self, index)

    monkeypatch.setattr(PerfusionTrainer, "step", watching)
    run(allow_tf32=allowed, max_train_steps=1)
    assert seen == [allowed or before]
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_only_an_accelerator_of_its_own_is_ended(run, monkeypatch):
    ended = []
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ended.append(self))
    environment = dict(os.environ)
    given = Accelerator()
    run(given, max_train_steps=1)
    assert ended == []
    run(max_train_steps=1)
    assert len(ended) == 1 and ended[0] is not given
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    "error", [None, RuntimeError("out of memory"), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
def test_the_pipeline_is_left_as_it_was(run, stop, pipeline, generate, error):
    prompts = ["a <my-cat> on the beach", "a cat"]
    before = generate(prompts)
    weights = {
        (name, key): tensor.clone()
        for name in ("unet", "vae", "text_encoder")
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }
    processors = dict(pipeline.unet.attn_processors)
    length, ids = len(pipeline.tokenizer), pipeline.tokenizer("a <my-cat>").input_ids
    if error is None:
        run()
    else:
        stop(2, error)
        with pytest.raises(type(error)):
            run()
    assert pipeline.list_perfusion() == []
    assert registry_of(pipeline.unet) is None
    assert {name: id(p) for name, p in pipeline.unet.attn_processors.items()} == {
        name: id(p) for name, p in processors.items()
    }
    assert (len(pipeline.tokenizer), pipeline.tokenizer("a <my-cat>").input_ids) == (length, ids)
    assert not pipeline.text_encoder._forward_hooks
    assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks
    assert not pipeline.unet._forward_pre_hooks
    for (name, key), tensor in weights.items():
        assert torch.equal(getattr(pipeline, name).state_dict()[key], tensor)
    for name in ("unet", "vae", "text_encoder"):
        assert all(parameter.grad is None for parameter in getattr(pipeline, name).parameters())
    assert torch.equal(generate(prompts), before)


def precisions(pipe):
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    return {(name, key): value.dtype for name, model in models.items() for key, value in model.state_dict().items()}


@pytest.fixture
def draw_after_training(monkeypatch, training_settings, generate):
    """Train a pipeline with validation images, and draw the concept with it."""
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 1)

    def run(pipe, **settings):
        settings = training_settings | {"resolution": 16, "max_train_steps": 1} | settings
        settings |= {"validation_prompt": ["a <my-cat>"], "validation_steps": 1, "num_validation_images": 1}
        concept = train(pipe, TrainingConfig(**settings))
        assert {vector.dtype for vector in (concept.target_input, *concept.target_outputs.values())} == {torch.float32}
        pipe.load_perfusion(concept)
        size = {"height": 16, "width": 16, "max_sequence_length": CHAT_LENGTH} if family_of(pipe).joint else {}
        return generate("a <my-cat> on the beach", pipe, **size)

    return run


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pipeline", *JOINT_PIPELINES])
def test_mixed_precision_leaves_a_pipeline_in_its_own(request, draw_after_training, name, loaded):
    """And, in joint attention, its text encoders while they encode."""
    pipe, seen = request.getfixturevalue(name), set()
    pipe.to(loaded)
    before = precisions(pipe)
    for text_encoder in family_of(pipe).text_encoders:
        text_encoder.register_forward_pre_hook(lambda model, _: seen.add(model.dtype))
    image = draw_after_training(pipe, mixed_precision="bf16")
    assert image.isfinite().all()
    assert precisions(pipe) == before
    assert seen == ({loaded} if family_of(pipe).joint else {torch.float32, loaded})  # the other one is of the drawing


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_weights_in_a_precision_of_their_own_are_left_so(flux_pipeline, draw_after_training, mixed_precision):
    """As T5 has them in half precision."""
    flux_pipeline.to(torch.bfloat16)
    wide = flux_pipeline.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo.float().weight
    before, numbers = precisions(flux_pipeline), wide.clone()
    assert set(before.values()) >= {torch.float32, torch.bfloat16}
    draw_after_training(flux_pipeline, mixed_precision=mixed_precision)
    assert precisions(flux_pipeline) == before
    assert torch.equal(wide, numbers)


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"instance_data_dir": "nowhere"}, ValueError, "nowhere is not a folder"),
        ({"instance_data_dir": "{tmp_path}"}, ValueError, "has no image"),
        ({"superclass": "<|endoftext|>"}, ValueError, "does not know the super"),
        ({"superclass": "cat " * 30}, ValueError, "30 tokens long; expected at most 12"),
        ({"placeholder_token": "cat"}, ValueError, "'cat' is already a "),
        ({"placeholder_token": "my cat"}, ValueError, "one token without spaces"),
        ({"placeholder_token": ""}, ValueError, "one token"),
        ({"train_bias": 3.0}, ValueError, "bias is 3.0"),
        ({"train_temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"resolution": 17}, ValueError, "resolution is 17; the base model takes multiples of 2"),
        ({"lr_scheduler": "zigzag"}, ValueError, "lr_scheduler is 'zigzag'"),
        ({"mask": "alpha"}, ValueError, "has no alpha channel"),
        ({"mask": "{tmp_path}"}, ValueError, "has no mask for 1.png"),
        ({"initial_embedding": "nowhere.bin"}, FileNotFoundError, "no Textual Inversion file nowhere.bin"),
        ({"covariance": "nowhere.txt"}, ValueError, "nowhere.txt is not a file"),
        ({"resume_from_checkpoint": "checkpoint-7"}, FileNotFoundError, "no checkpoint 'checkpoint-7'"),
        ({"resume_from_checkpoint": ""}, ValueError, "is not a complete checkpoint"),
        ({"output_dir": "{tmp_path}/captions.txt"}, OSError, "captions.txt"),
    ],
)
def test_bad_settings_are_told_before_any_long_work(run, no_long_work, pipeline, tmp_path, settings, error, message):
    filled = {k: v.replace("{tmp_path}", str(tmp_path)) if isinstance(v, str) else v for k, v in settings.items()}
    (tmp_path / "captions.txt").touch()
    with pytest.raises(error, match=message):
        run(**filled)
    assert registry_of(pipeline.unet) is None


def test_an_image_smaller_than_a_latent(run, no_long_work, images_folder):
    Image.new("RGB", (9, 1)).save(images_folder / "thin.png")
    with pytest.raises(ValueError, match=r"thin\.png is 9×1 pixels; expected at least 2"):
        run()


def test_a_covariance_of_another_text_encoder(run, no_long_work, tmp_path):
    np.save(tmp_path / "c.npy", np.eye(7))
    with pytest.raises(ValueError, match=r"width 7, but the text encoder has width 32"):
        run(covariance=str(tmp_path / "c.npy"))


def test_models_that_cannot_take_a_concept(training_settings, components, no_long_work):
    blind = components | {"unet": make_unet(cross_attention_dim=2 * WIDTH)}
    with pytest.raises(ValueError, match=r"takes hidden states of width 64, but .* give width 32"):
        train(StableDiffusionPipeline(**blind), TrainingConfig(**training_settings))
    pipeline = StableDiffusionPipeline(**components)
    for layer in cross_attention_layers(pipeline.unet).values():
        layer.is_cross_attention = False
    with pytest.raises(ValueError, match="has no cross-attention layer from text"):
        train(pipeline, TrainingConfig(**training_settings))
    pipeline.unet = None
    with pytest.raises(ValueError, match="cannot edit StableDiffusionPipeline, whose model is NoneType"):
        train(pipeline, TrainingConfig(**training_settings))


# C


def test_covariance_files_and_captions_of_the_base_model(run, tmp_path, model_folder, monkeypatch):
    with_captions = run().read_bytes()
    np.save(tmp_path / "c.npy", np.eye(WIDTH))
    assert run(covariance=str(tmp_path / "c.npy")).read_bytes() != with_captions

    (model_folder / "captions.txt").write_text((tmp_path / "captions.txt").read_text())
    monkeypatch.setattr("diffusers_perfusion.training.covariance.generate_captions", None)
    base = {"pretrained_model_name_or_path": str(model_folder), "covariance": None}
    assert run(**base).read_bytes() == with_captions
    (model_folder / "captions.txt").unlink()
    monkeypatch.setattr(
        "diffusers_perfusion.training.covariance.generate_captions", lambda: iter(["a dog", "the cat"])
    )
    assert run(**base).read_bytes() != with_captions


# Several processes


def test_only_the_main_process_writes(pipeline, training_settings, monkeypatch):
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    often = {"checkpointing_steps": 2, "validation_steps": 2, "validation_prompt": ["a <my-cat>"]}
    assert train(pipeline, TrainingConfig(**training_settings | often)).training["steps"] == 4
    assert not Path(training_settings["output_dir"]).exists()


def test_two_processes_are_one_with_twice_the_batch(run, training_settings, model_folder, environment, tmp_path):
    # The inverse of a covariance of four captions would magnify differences in the last digit.
    np.save(tmp_path / "c.npy", np.diag(np.linspace(1, 2, WIDTH)))
    settings = training_settings | {
        "pretrained_model_name_or_path": str(model_folder),
        "covariance": str(tmp_path / "c.npy"),
        "mask": "attention",
        "checkpointing_steps": 2,
    }
    alone = run(**settings | {"train_batch_size": 8}).parent
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    command = [sys.executable, *launch.split(), "--mixed_precision=no", "--dynamo_backend=no", *CLI]
    together = tmp_path / "together"
    done = subprocess.run(
        [*command, *flags(settings | {"output_dir": str(together)})], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perfusion.safetensors") == 1  # one process speaks
    assert checkpoints(together) == checkpoints(alone) == ["checkpoint-2", "checkpoint-4"]
    for name in (
        "checkpoint-2/training_state.safetensors",
        "checkpoint-4/training_state.safetensors",
        "perfusion.safetensors",
    ):
        expected, found = load_file(alone / name), load_file(together / name)
        assert found.keys() == expected.keys()
        # Gradients are summed in another order, and the last file is in float16.
        near = {"rtol": 1e-3, "atol": 1e-3 if name == "perfusion.safetensors" else 1e-4}
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key].float(), tensor.float(), **near)
