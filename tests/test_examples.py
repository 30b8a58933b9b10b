import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_perfusion import PerfusionConcept

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_example_pictures_are_what_their_script_draws(tmp_path):
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


def test_the_training_script_says_how_it_is_used(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run_script(monkeypatch, "--help")
    output = capsys.readouterr().out
    assert "accelerate launch examples/train_perfusion.py" in output
    assert "--instance_data_dir" in output


def test_the_training_script_fits_a_concept(monkeypatch, capsys, fit_settings, model_folder):
    settings = fit_settings | {"pretrained_model_name_or_path": str(model_folder)}
    run_script(monkeypatch, *(text for name, value in settings.items() for text in (f"--{name}", str(value))))
    path = Path(fit_settings["output_dir"]) / "perfusion.safetensors"
    assert PerfusionConcept.load(path).placeholder_token == "<my-cat>"
    assert capsys.readouterr().out.startswith(str(path))
