"""The command line on an accelerator, which `pretended.py` pretends to be one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import random_concept
from PIL import Image

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.cli import main

SCRIPT = Path(__file__).parent / "pretended.py"


def flags(settings):
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def accelerated(environment, tmp_path):
    """Run the command line there; gives what each training step waited for."""
    del environment["ACCELERATE_USE_CPU"]

    def run(*argv):
        report = tmp_path / "report.json"
        command = [sys.executable, str(SCRIPT), str(report), *argv]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(report.read_text())
        assert found["tensors"] > 100
        return found

    return run


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("xl_pipeline", {}),  # two text encoders
        ("sana_pipeline", {}),  # a projection and an instruction
        # joint attention, with the text encoders off the accelerator
        ("flux_pipeline", {"mask": "none", "resolution": 16, "embedding_learning_rate": 0.0}),
        ("klein_pipeline", {"mask": "none", "resolution": 16, "embedding_learning_rate": 0.0}),
    ],
)
def test_training_waits_for_nothing_and_gives_the_same_concept(
    request, accelerated, training_settings, family, changed, tmp_path
):
    request.getfixturevalue(family).save_pretrained(tmp_path / "model")
    settings = training_settings | {"pretrained_model_name_or_path": tmp_path / "model", "mask": "attention"} | changed
    found = accelerated("train", *flags(settings | {"output_dir": tmp_path / "there"}))
    first, *others = found["steps"]
    assert found["held"]["afterwards"] == {"model": 0, "text_encoders": 0}  # as the pipeline was loaded
    assert first  # its gradients are looked at
    theirs = str(Path(transformers.__file__).parent)
    assert [[wait for wait in waits if not wait.startswith(theirs)] for waits in others] == [[]] * 3
    assert main(["train", *flags(settings | {"output_dir": tmp_path / "here"})]) == 0
    here, there = (PerfusionConcept.load(tmp_path / name / "perfusion.safetensors") for name in ("here", "there"))
    assert torch.equal(here.superclass_input, there.superclass_input)
    for layer, output in here.target_outputs.items():
        assert torch.equal(output, there.target_outputs[layer])


def test_text_encoders_and_the_model_are_not_there_together_where_values_are_trained(
    flux_pipeline, accelerated, training_settings, tmp_path
):
    flux_pipeline.save_pretrained(tmp_path / "model")
    settings = {"pretrained_model_name_or_path": tmp_path / "model", "resolution": 16, "embedding_learning_rate": 0.0}
    held = accelerated("train", *flags(training_settings | settings))["held"]
    size = sum(weight.nbytes for weight in flux_pipeline.transformer.parameters())
    assert held["encoding"]["model"] == 0 < held["encoding"]["text_encoders"]
    assert held["step"] == {"model": size, "text_encoders": 0}


def test_images_equal_those_of_the_cpu(accelerated, model_folder, pipeline, tmp_path):
    random_concept(pipeline, "<my-cat>", seed=1).save(tmp_path / "cat.safetensors")
    random_concept(pipeline, "<my-dog>", seed=2).save(tmp_path / "dog.safetensors")
    settings = {"pretrained_model_name_or_path": model_folder, "num_inference_steps": 2, "locking": "global"}
    command = ["generate", *flags(settings), "--prompt", "a <my-cat> and a <my-dog>", "--prompt", "a <my-dog>"]
    command += ["--concept", str(tmp_path / "cat.safetensors"), "--concept", str(tmp_path / "dog.safetensors")]
    accelerated(*command, "--output_dir", str(tmp_path / "there"))
    assert main([*command, "--output_dir", str(tmp_path / "here")]) == 0
    folders = tmp_path / "here", tmp_path / "there"
    names = sorted(path.name for path in folders[0].glob("*.png"))
    assert len(names) == 2
    for name in names:
        here, there = (np.asarray(Image.open(folder / name), dtype=int) for folder in folders)
        assert abs(here - there).max() <= 1
