import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_perfusion import PerfusionPipeline
from diffusers_perfusion.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_example_images_are_what_their_script_draws(tmp_path):
    runpy.run_path(str(EXAMPLES / "data" / "draw.py"))["main"](["--output_dir", str(tmp_path)])
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len(names) == 4 * 5 * 2
    for name in names:
        with Image.open(tmp_path / name) as drawn, Image.open(EXAMPLES / "data" / name) as committed:
            assert drawn.mode == committed.mode
            assert np.array_equal(np.asarray(drawn), np.asarray(committed)), name


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train_perfusion.py", *arguments])
    runpy.run_path(str(EXAMPLES / "train_perfusion.py"), run_name="__main__")


def test_the_training_script_shows_its_usage(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_script(monkeypatch, "--help")
    output = capsys.readouterr().out
    assert "accelerate launch examples/train_perfusion.py" in output
    assert "--instance_data_dir" in output


def test_the_training_script_trains_the_same_concept_as_the_command(
    monkeypatch, capsys, training_settings, model_folder, tmp_path
):
    settings = training_settings | {"pretrained_model_name_or_path": str(model_folder), "mask": "attention"}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    run_script(monkeypatch, *flags)
    path = Path(training_settings["output_dir"]) / "perfusion.safetensors"
    assert capsys.readouterr().out == f"{path} ({path.stat().st_size:,} bytes): <my-cat>\n"
    assert main(["train", *flags, "--output_dir", str(tmp_path / "command")]) == 0
    assert path.read_bytes() == (tmp_path / "command" / "perfusion.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is of <my-cat>, and this training is of <my-dog>"):
        run_script(monkeypatch, *flags, "--placeholder_token", "<my-dog>")


def test_the_training_script_trains_joint_attention_without_a_metric(
    monkeypatch, training_settings, flux_pipeline, tmp_path
):
    monkeypatch.setattr("diffusers_perfusion.training.covariance.cached_covariance", None)
    flux_pipeline.save_pretrained(tmp_path / "flux")
    settings = {"pretrained_model_name_or_path": tmp_path / "flux", "mask": "none", "resolution": 16}
    flags = [text for name, value in (training_settings | settings).items() for text in (f"--{name}", str(value))]
    run_script(monkeypatch, *flags)
    assert main(["train", *flags, "--output_dir", str(tmp_path / "command")]) == 0
    path = Path(training_settings["output_dir"]) / "perfusion.safetensors"
    assert path.read_bytes() == (tmp_path / "command" / "perfusion.safetensors").read_bytes()


def test_the_attention_processor_alone_generates_the_concept(tmp_path, monkeypatch):
    """With guidance too it is nearly the Perfusion pipeline's image, and not the base model's."""
    base, concept = str(EXAMPLES / "pocket"), str(EXAMPLES / "hub" / "my-bear")
    settings = {"num_inference_steps": 10, "guidance_scale": 5.0}
    command = ["--pretrained_model_name_or_path", base, "--concept", concept, "--prompt", "a <my-bear> on the beach"]
    command += ["--num_inference_steps", "10", "--output", str(tmp_path / "image.png")]
    monkeypatch.setattr(sys, "argv", ["attention_processor.py", *command])
    runpy.run_path(str(EXAMPLES / "attention_processor.py"), run_name="__main__")
    found = np.asarray(Image.open(tmp_path / "image.png"), dtype=float)

    def generate(pipe, prompt):
        image = pipe(prompt, **settings, generator=torch.Generator().manual_seed(0)).images[0]
        return np.asarray(image, dtype=float)

    pipe = PerfusionPipeline.from_pretrained(base, safety_checker=None)
    plain = generate(pipe, "a teddy bear on the beach")
    pipe.load_perfusion(concept)
    assert abs(found - generate(pipe, "a <my-bear> on the beach")).mean() < 2 < 10 < abs(found - plain).mean()
