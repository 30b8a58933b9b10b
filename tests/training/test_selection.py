import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from test_validation import Album

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.evaluation import Scores
from diffusers_perfusion.training import FitConfig, fit, selection, validation
from diffusers_perfusion.training.learner import Learner
from diffusers_perfusion.training.selection import make_judge, plot

# The last step is the best text, the first the best identity, and the one between the best of both.
TABLE = {2: Scores(0.8, 0.2), 4: Scores(0.5, 0.5), 5: Scores(0.4, 0.4), 6: Scores(0.2, 0.7)}
SELECT = {
    "select_by": "harmonic_mean",
    "selection_prompt": ["a <my-cat> on the beach"],
    "selection_steps": 2,
    "checkpointing_steps": 2,
    "max_train_steps": 6,
}


class Table:
    """A judge whose scores depend on the step alone, and that remembers what it has seen."""

    def __init__(self):
        self.scores, self.step, self.seen = dict(TABLE), 0, {}

    def score(self, pictures, prompts):
        self.seen[self.step] = (pictures, prompts)
        found = self.scores[self.step]
        if isinstance(found, BaseException):
            raise found
        return [found._replace(text=found.text + 0.1 * (-1) ** n) for n in range(len(pictures))]


@pytest.fixture
def judge(monkeypatch):
    table, step = Table(), Learner.step

    def counting(self, index):
        table.step = index + 1
        return step(self, index)

    monkeypatch.setattr(Learner, "step", counting)
    monkeypatch.setattr(selection, "make_judge", lambda *_: table)
    monkeypatch.setattr(selection, "plot", lambda *_: Figure())  # a plot takes as long as a fit here
    return table


@pytest.fixture
def run(pipeline, fit_settings, monkeypatch):
    """Fit on the tiny pipeline, choosing among three steps, and return the output folder."""
    monkeypatch.setattr(validation, "INFERENCE_STEPS", 2)

    def run_with(accelerator=None, **settings):
        config = FitConfig(**fit_settings | SELECT | settings)
        fit(pipeline, config, accelerator)
        return Path(config.output_dir)

    return run_with


def result(folder):
    return (folder / "perfusion.safetensors").read_bytes()


def record(folder):
    return json.loads((folder / "selection.json").read_text())


# What is kept


def test_the_best_step_is_kept(run, judge, caplog):
    folder = run()
    kept = load_file(folder / "perfusion.safetensors")
    four, *others = (load_file(folder / f"checkpoint-{step}" / "perfusion.safetensors") for step in (4, 2, 6))
    for name, tensor in kept.items():
        assert torch.equal(tensor, four[name])
    for other in others:
        assert not torch.equal(kept["word_embedding"], other["word_embedding"])
    training = PerfusionConcept.load(folder / "perfusion.safetensors").training
    assert (training["steps"], training["select_by"]) == (4, "harmonic_mean")
    assert "Step 4 is kept, the best of 2, 4, 6: identity 0.5000, text alignment 0.5000, " in caplog.text


def test_the_concept_that_is_kept_is_returned(pipeline, fit_settings, run, judge, tmp_path):
    chosen = fit(pipeline, FitConfig(**fit_settings | SELECT))
    assert chosen.training["steps"] == 4
    plain = fit(pipeline, FitConfig(**fit_settings | {"output_dir": str(tmp_path / "short"), "max_train_steps": 4}))
    for name in ("word_embedding", "target_input", "inverse_target_input"):
        assert torch.equal(getattr(chosen, name), getattr(plain, name))
    assert all(torch.equal(output, plain.target_outputs[name]) for name, output in chosen.target_outputs.items())


@pytest.mark.parametrize(("select_by", "step"), [("identity", 2), ("harmonic_mean", 4), ("text", 6)])
def test_the_criterion_decides(run, judge, select_by, step):
    assert record(run(select_by=select_by))["chosen_step"] == step


def test_of_equal_steps_the_first_is_kept(run, judge):
    judge.scores = dict.fromkeys(TABLE, Scores(0.5, 0.5))
    assert record(run())["chosen_step"] == 2


def test_the_last_step_is_scored_out_of_turn(run, judge):
    judge.scores[5] = Scores(0.9, 0.9)
    folder = run(max_train_steps=5)
    assert [entry["step"] for entry in record(folder)["scores"]] == [2, 4, 5]
    assert PerfusionConcept.load(folder / "perfusion.safetensors").training["steps"] == 5


# What is scored, and what that leaves alone


def test_the_concept_is_scored_as_it_would_be_generated(pipeline, fit_settings, run, judge):
    prompts = ["a <my-cat> on the beach", "a dog and a <my-cat>"]
    options = {"selection_prompt": prompts, "num_selection_images": 3, "seed": 4}
    concept = fit(pipeline, FitConfig(**fit_settings | SELECT | options))
    pictures, read = judge.seen[4]
    assert list(read) == ["a cat on the beach"] * 3 + ["a dog and a cat"] * 3
    pipeline.load_perfusion(concept)
    for row, prompt in enumerate(prompts):
        images = pipeline(
            prompt,
            num_inference_steps=2,
            guidance_scale=6.0,
            num_images_per_prompt=3,
            generator=torch.Generator().manual_seed(4),
        ).images
        for drawn, image in zip(pictures[3 * row : 3 * row + 3], images, strict=True):
            assert np.array_equal(np.asarray(drawn), np.asarray(image))


def test_choosing_disturbs_nothing(run, judge, tmp_path):
    plain, chosen, state = (
        run(select_by=by, output_dir=str(tmp_path / str(by))) / "checkpoint-6" for by in (None, "text", "identity")
    )
    before, after = load_file(plain / "fit.safetensors"), load_file(state / "fit.safetensors")
    assert result(plain) == result(chosen) == result(state)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_without_it_there_is_nothing_of_it(run, monkeypatch):
    monkeypatch.setattr(selection, "Selection", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = run(select_by=None)
    assert not list(folder.glob("selection*"))
    assert "select_by" not in PerfusionConcept.load(folder / "perfusion.safetensors").training
    assert not [name for name in load_file(folder / "checkpoint-6" / "fit.safetensors") if "selection" in name]


# What is written


def test_the_record_and_the_plot_agree(run, judge, monkeypatch):
    monkeypatch.setattr(selection, "plot", plot)
    folder = run()
    found = record(folder)
    assert (found["select_by"], found["chosen_step"]) == ("harmonic_mean", 4)
    scores = {entry["step"]: Scores(entry["identity"], entry["text"]) for entry in found["scores"]}
    assert list(scores) == [2, 4, 6]
    for entry in found["scores"]:
        assert scores[entry["step"]] == pytest.approx(TABLE[entry["step"]])
        assert entry["harmonic_mean"] == pytest.approx(TABLE[entry["step"]].harmonic_mean)
    figure, png = plot(scores, 4), io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    assert (folder / "selection.png").read_bytes() == png.getvalue()
    for axes, name in zip(figure.axes, ("identity", "text", "harmonic_mean"), strict=True):
        line, mark = axes.lines
        assert line.get_xydata().tolist() == [[step, getattr(entry, name)] for step, entry in scores.items()]
        assert list(mark.get_xdata()) == [4, 4]


def test_trackers_get_the_scores(run, judge):
    album = Album()
    run(Accelerator(log_with=album))
    found = {step: values for step, values in album.numbers if "loss" not in values}
    assert found.keys() == {2, 4, 6}
    names = ["selection/identity", "selection/text", "selection/harmonic_mean"]
    for step, values in found.items():
        assert list(values) == names
        assert list(values.values()) == pytest.approx([*TABLE[step], TABLE[step].harmonic_mean])


# Stopped, and gone on with


@pytest.mark.parametrize(
    ("best", "stopped", "checkpointing"), [(2, 4, 2), (2, 6, 1), (4, 4, 3), (4, 6, 4), (6, 4, 3), (6, 6, 2)]
)
def test_a_fit_that_goes_on_keeps_the_same_step(run, judge, tmp_path, best, stopped, checkpointing):
    judge.scores[best] = Scores(0.9, 0.9)
    settings = {"checkpointing_steps": checkpointing}
    unbroken = run(**settings, output_dir=str(tmp_path / "unbroken"))
    right, judge.scores[stopped] = judge.scores[stopped], KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    judge.scores[stopped] = right
    folder = run(**settings, resume_from_checkpoint="latest")
    assert PerfusionConcept.load(folder / "perfusion.safetensors").training["steps"] == best
    for name in ("perfusion.safetensors", "selection.json"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()


def test_scores_of_later_steps_are_forgotten(run, judge):
    folder = run()
    expected = result(folder)
    judge.scores[4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(resume_from_checkpoint="checkpoint-2")
    assert [entry["step"] for entry in record(folder)["scores"]] == [2]
    judge.scores[4] = TABLE[4]
    judge.seen.clear()
    assert result(run(resume_from_checkpoint="checkpoint-2")) == expected
    assert judge.seen.keys() == {4, 6}


def test_a_fit_that_is_over_is_not_scored_again(run, judge):
    expected = result(run())
    judge.seen.clear()
    assert result(run(resume_from_checkpoint="latest")) == expected
    assert not judge.seen


def test_a_longer_fit_forgets_the_last_step_of_a_shorter_one(run, judge, tmp_path):
    judge.scores[5] = Scores(0.9, 0.9)
    unbroken = run(output_dir=str(tmp_path / "unbroken"), checkpointing_steps=5)
    folder = run(max_train_steps=5, checkpointing_steps=5)
    assert record(folder)["chosen_step"] == 5
    assert result(run(checkpointing_steps=5, resume_from_checkpoint="latest")) == result(unbroken)
    assert (folder / "selection.json").read_bytes() == (unbroken / "selection.json").read_bytes()


def test_a_fit_goes_on_only_with_what_it_chooses_by(run, judge):
    run()
    for settings, message in (
        ({"select_by": "text"}, "select_by 'harmonic_mean', and this fit has 'text'"),
        ({"select_by": None}, "select_by 'harmonic_mean', and this fit has None"),
        ({"clip_model": "other/clip"}, "clip_model 'openai/clip-vit-large-patch14', and this fit has 'other/clip'"),
        ({"selection_steps": 3}, "selection_steps 2, and this fit has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**settings, resume_from_checkpoint="latest")


# Several processes


def test_only_the_main_process_scores_and_all_have_its_choice(
    pipeline, fit_settings, run, judge, monkeypatch, tmp_path
):
    state = load_file(run() / "checkpoint-4" / "fit.safetensors")
    judge.seen.clear()
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    told = []

    def broadcast(items):
        told.append(items)
        return [4, state]

    monkeypatch.setattr(sys.modules[fit.__module__], "broadcast_object_list", broadcast)
    output = tmp_path / "other"
    concept = fit(pipeline, FitConfig(**fit_settings | SELECT | {"output_dir": str(output)}))
    assert len(told) == 1 and told[0][0] == 6
    assert concept.training["steps"] == 4
    assert torch.equal(concept.word_embedding, state["word_embedding"])
    assert not judge.seen and not output.exists()


# Judges


@pytest.fixture
def identity_folder(identity_folders):
    return identity_folders["dinov2"]


def judges(clip_folder, identity_folder):
    return {"clip_model": str(clip_folder), "identity_model": str(identity_folder)}


def test_a_fit_is_judged_by_models_of_transformers(run, clip_folder, identity_folder):
    folder = run(**judges(clip_folder, identity_folder))
    found = record(folder)
    assert len({entry["identity"] for entry in found["scores"]}) == 3
    assert len({entry["text"] for entry in found["scores"]}) == 3
    again = run(**judges(clip_folder, identity_folder), resume_from_checkpoint="checkpoint-2")
    assert record(again) == found


def test_the_same_model_for_both_is_loaded_once(fit_settings, clip_folder):
    config = FitConfig(**fit_settings, clip_model=str(clip_folder), identity_model=str(clip_folder))
    picture = Image.new("RGB", (16, 16))
    judge = make_judge(config, [picture], torch.device("cpu"))
    assert judge.identity is judge.clip
    assert judge.score([picture], ["a cat"])[0].identity == pytest.approx(1)


@pytest.mark.parametrize("setting", ["clip_model", "identity_model"])
@pytest.mark.parametrize("source", ["nowhere/at-all", "{other}", "{empty}"])
def test_a_judge_that_cannot_be_used_is_told_before_any_long_work(
    run, fit_settings, monkeypatch, tmp_path, clip_folder, identity_folder, setting, source
):
    monkeypatch.setattr("diffusers_perfusion.covariance.second_moment", None)
    monkeypatch.setattr(Learner, "step", None)
    (tmp_path / "empty").mkdir()
    right = judges(clip_folder, identity_folder)
    other = next(folder for name, folder in right.items() if name != setting)
    wrong = source.format(other=str(other) + "/", empty=tmp_path / "empty")
    with pytest.raises(ValueError, match=f"{setting} '{wrong}' cannot be used .*; expected the id or folder") as found:
        run(**right | {setting: wrong})
    assert "\n" not in str(found.value)
    assert not Path(fit_settings["output_dir"]).exists()


def test_what_to_install_is_told_before_any_long_work(run, judge, monkeypatch):
    monkeypatch.setattr("diffusers_perfusion.covariance.second_moment", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"matplotlib, which is missing; install diffusers_perfusion\[train\]"):
        run()
