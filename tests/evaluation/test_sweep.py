import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_concept
from PIL import Image

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.concept_file import ConceptHeader
from diffusers_perfusion.evaluation import Mean, Scores, Sweep, SweepRow, bootstrap_mean, mean_scores, sweep
from diffusers_perfusion.registry import registry_of

PROMPTS = ("a <my-cat> on the beach", "a photo of a <my-cat>")


class PixelMetrics:
    """Scores an image by its pixels, and records the prompts."""

    def __init__(self):
        self.clip = self.identity = SimpleNamespace(model=SimpleNamespace(name_or_path="me/metrics"))
        self.prompts = []

    def score(self, images, prompts):
        self.prompts += prompts
        return [Scores(0.1 + sum(p.tobytes()) % 101 / 200, 0.2 + sum(p.tobytes()) % 89 / 200) for p in images]


class Processes:
    """One of several processes, of which the others wait for nothing."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process = process_index == 0

    def wait_for_everyone(self):
        pass


@pytest.fixture
def concept(make_concept):
    return make_concept()


@pytest.fixture
def generated(monkeypatch):
    """Make a pipeline record bias, temperature, prompt and seed of every image that it generates from now on."""

    def watch(pipeline):
        seen, call = [], type(pipeline).__call__

        def watched(self, prompt, generator, **options):
            state = registry_of(self.unet).loaded["sweep"]
            settings = (round(state.bias.item(), 4), round(state.temperature.item(), 4))
            seen.extend((*settings, text, noise.initial_seed()) for text, noise in zip(prompt, generator, strict=True))
            return call(self, prompt, generator=generator, **options)

        monkeypatch.setattr(type(pipeline), "__call__", watched)
        return seen

    return watch


@pytest.fixture
def run(pipeline, concept, tmp_path, fresh_accelerate):
    """Sweep a concept on the tiny pipeline."""

    def run(prompts=PROMPTS, folder="sweep", concept=concept, metrics=None, **options):
        settings = {"biases": [0.5, 0.9], "seeds": [3, 4], "num_inference_steps": 2, "accelerator": Processes(0, 1)}
        metrics = metrics or PixelMetrics()
        return sweep(pipeline, concept, metrics, prompts, output_dir=tmp_path / folder, **settings | options)

    return run


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_image_is_generated_with_its_settings_and_seed(run, pipeline, generated, concept):
    seen = generated(pipeline)
    run(temperatures=[0.2, 0.1], batch_size=3)
    assert sorted(seen) == sorted(
        (b, t, p, s) for b in (0.5, 0.9) for t in (0.1, 0.2) for p in PROMPTS for s in (3, 4)
    )
    assert pipeline.list_perfusion() == []


def test_an_image_is_what_the_pipeline_generates(run, pipeline, concept, tmp_path):
    run(batch_size=1, guidance_scale=3.0, locking="global", temperatures=[0.3])
    (path,) = (tmp_path / "sweep" / "images" / "bias-0.9-temperature-0.3").glob("a-my-cat-on-the-beach-*-seed-4.png")
    pipeline.load_perfusion(concept)
    pipeline.set_perfusion(bias=0.9, temperature=0.3, locking="global")
    generator = torch.Generator().manual_seed(4)
    expected = pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    with Image.open(path) as image:
        assert image.tobytes() == expected.tobytes()


def test_a_pipeline_whose_first_argument_is_an_image_gets_the_prompts(klein_pipeline, tmp_path):
    settings = {"biases": [0.5], "seeds": [3], "num_inference_steps": 1, "accelerator": Processes(0, 1)}
    found = sweep(
        klein_pipeline,
        random_concept(klein_pipeline),
        PixelMetrics(),
        PROMPTS,
        output_dir=tmp_path / "sweep",
        **settings,
    )
    assert len(found.rows) == 1


def test_rows_are_the_means_of_their_images(run, tmp_path):
    metrics = PixelMetrics()
    found = run(metrics=metrics)
    assert set(metrics.prompts) == {"a cat on the beach", "a photo of a cat"}
    assert [(row.bias, row.temperature) for row in found.rows] == [(0.5, 0.15), (0.9, 0.15)]
    for row in found.rows:
        held = [image for image in found.images if image["bias"] == row.bias]
        assert len(held) == 4 and all((tmp_path / "sweep" / image["file"]).is_file() for image in held)
        means = [
            mean_scores([Scores(p["identity"], p["text"]) for p in held if p["prompt"] == prompt])
            for prompt in PROMPTS
        ]
        assert row.identity == bootstrap_mean([mean.identity for mean in means])
        assert row.text == bootstrap_mean([mean.text for mean in means])
        assert row.harmonic_mean == mean_scores(means).harmonic_mean
    assert found.best.harmonic_mean == max(row.harmonic_mean for row in found.rows)


def test_the_best_has_the_highest_harmonic_mean():
    def row(bias, identity, text):
        return SweepRow(bias, 0.15, Mean(identity, identity, identity), Mean(text, text, text))

    # By the arithmetic mean, the first; by either score alone, the first or the last.
    rows = [row(0.5, 0.9, 0.1), row(0.7, 0.4, 0.3), row(0.9, 0.4, 0.3), row(1.1, 0.05, 0.5)]
    assert Sweep({}, rows, []).best is rows[1]


def test_the_files_say_what_was_found(run, tmp_path):
    found = run()
    folder = tmp_path / "sweep"
    assert Sweep.read(folder / "sweep.json") == found
    data = json.loads((folder / "sweep.json").read_text())
    assert data["best"] == {"checkpoint": "", "bias": found.best.bias, "temperature": 0.15}
    assert data["settings"]["num_inference_steps"] == 2
    assert data["settings"]["clip_model"] == data["settings"]["identity_model"] == "me/metrics"
    for line, row in zip(found.table(), data["rows"], strict=True):
        assert (line["β"], line["τ"]) == (row["bias"], row["temperature"])
        assert line["harmonic mean"] == f"{row['harmonic_mean']:.3f}"
        for name, score in (("identity", row["identity"]), ("text alignment", row["text"])):
            assert line[name] == f"{score['mean']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
    with Image.open(folder / "pareto_front.png") as plot, Image.open(folder / "contact_sheet.png") as grid:
        assert plot.size == (960, 720)
        assert grid.width > 2 * 128 and grid.height > 2 * 128


def test_prompts_biases_and_temperature_have_defaults(run, pipeline, generated, concept):
    seen = generated(pipeline)
    found = run(
        None,
        biases=None,
        seeds=[0],
        num_inference_steps=1,
        concept=replace(concept, bias_range=(0.6, 0.85)),
        batch_size=8,
    )
    assert [(row.bias, row.temperature) for row in found.rows] == [(0.6, 0.15), (0.725, 0.15), (0.85, 0.15)]
    assert len(seen) == 3 * 8 and all("<my-cat>" in prompt for _, _, prompt, _ in seen)


# Resumed


def test_a_finished_sweep_generates_nothing(run, pipeline, generated, tmp_path):
    run()
    before = files(tmp_path / "sweep")
    seen = generated(pipeline)
    run()
    assert seen == []
    assert files(tmp_path / "sweep") == before


def test_a_stopped_sweep_is_resumed(run, pipeline, generated, monkeypatch, caplog, tmp_path):
    whole = run(folder="whole", batch_size=1)
    kind, call, calls = type(pipeline), type(pipeline).__call__, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=1)
    assert "The same call resumes" in caplog.text
    assert pipeline.list_perfusion() == []
    assert not (tmp_path / "sweep" / "sweep.json").exists()
    monkeypatch.setattr(kind, "__call__", call)
    seen = generated(pipeline)
    assert run(batch_size=1) == whole
    assert len(seen) == 8 - 3
    assert files(tmp_path / "sweep") == files(tmp_path / "whole")


def test_more_of_anything_generates_what_is_new(run, pipeline, generated):
    run()
    seen = generated(pipeline)
    found = run((*PROMPTS, "a <my-cat>"), biases=[0.9, 0.7, 0.5, 0.7], seeds=[3, 5])
    assert len(found.rows) == 3 and len(found.images) == 3 * 3 * 2
    assert len(seen) == 3 * 3 * 2 - 2 * 2 * 1


def test_a_crash_leaves_no_part_of_a_file(run, monkeypatch, tmp_path):
    replaced = []

    def full(source, target):
        replaced.append(target)
        if len(replaced) == 3:  # the settings, one image, and this
            raise OSError("no space left")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        run()
    monkeypatch.undo()
    held = files(tmp_path / "sweep")
    assert len(held) == 2 and "settings.json" in held


def test_an_image_that_was_damaged_is_named(run, tmp_path):
    run()
    path = min((tmp_path / "sweep" / "images").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"^{path} cannot be read as an image"):
        run()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_inference_steps": 3}, "num_inference_steps 2, and this sweep has 3"),
        ({"guidance_scale": 2.0}, r"guidance_scale 6.0, and this sweep has 2.0"),
        ({"locking": "global"}, "locking local, and this sweep has global"),
    ],
)
def test_images_of_other_settings_are_refused(run, pipeline, generated, tmp_path, changed, words):
    run()
    before = files(tmp_path / "sweep")
    seen = generated(pipeline)
    with pytest.raises(ValueError, match=words + "; give the same again, or choose another output_dir"):
        run(**changed)
    assert seen == [] and files(tmp_path / "sweep") == before


def test_images_of_another_concept_are_refused(run, concept, make_concept):
    run()
    run(concept=replace(concept, bias=0.8, temperature=0.2), temperatures=[0.15])  # other defaults generate the same
    with pytest.raises(ValueError, match=r"generated with concept_sha256 .*, and this sweep has "):
        run(concept=make_concept(seed=1))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_settings_that_are_none_are_refused(run, tmp_path, text):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json (is not JSON|does not hold the settings of a sweep)"):
        run()


# Several processes


def test_processes_share_the_work(run, tmp_path):
    def images(folder):
        return {name: data for name, data in files(tmp_path / folder).items() if name.startswith("images")}

    run(batch_size=2, folder="alone")
    # Here they do not run at once, so neither finds the other's images in the end.
    with pytest.raises(ValueError, match=r"seed-\d\.png"):
        run(batch_size=2, folder="first", accelerator=Processes(0, 2))
    with pytest.raises(FileNotFoundError, match=r"sweep\.json"):
        run(batch_size=2, folder="second", accelerator=Processes(1, 2))
    first, second = images("first"), images("second")
    assert len(first) == len(second) == 4
    assert first | second == images("alone")
    assert files(tmp_path / "second") == second  # the main process writes all else


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": [PROMPTS[0], "a cat"]}, "the prompt 'a cat' does not contain the placeholder token <my-cat>"),
        ({"prompts": []}, "prompts is empty"),
        ({"biases": []}, "biases is empty"),
        ({"temperatures": []}, "temperatures is empty"),
        ({"seeds": []}, "seeds is empty"),
        ({"biases": [0.5, 5]}, "bias is 5"),
        ({"temperatures": [0]}, "temperature is 0"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; expected at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; expected a finite number"),
        ({"locking": "loose"}, "locking is 'loose'"),
    ],
)
def test_bad_settings(run, pipeline, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        run(**options)
    assert not (tmp_path / "sweep").exists()
    assert pipeline.list_perfusion() == []


def test_a_pipeline_with_concepts_is_refused(run, pipeline, concept):
    pipeline.load_perfusion(concept)
    with pytest.raises(ValueError, match=r"call unload_perfusion\(\) before a sweep"):
        run()
    assert pipeline.list_perfusion() == ["my-cat"]


def test_a_missing_matplotlib_is_an_error_before_images_are_generated(run, pipeline, generated, monkeypatch):
    seen = generated(pipeline)
    monkeypatch.delitem(sys.modules, "diffusers_perfusion.evaluation.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        run()
    assert seen == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"settings": {}, "images": [], "rows": []}',
        '{"settings": {}, "images": [], "rows": [5]}',
        '{"settings": [], "images": [], "rows": [ROW]}',
        '{"settings": {}, "images": [], "rows": {"bias": 1}}',
        '{"settings": {}, "images": [], "rows": [ROW, {"bias": 0.5}]}'.replace("ROW", "{}"),
    ],
)
def test_a_file_of_another_kind_is_no_sweep(tmp_path, text):
    path = tmp_path / "sweep.json"
    path.write_text(text.replace("ROW", json.dumps(ROW)))
    with pytest.raises(ValueError, match=r"sweep\.json is not "):
        Sweep.read(path)


SCORE = {"mean": 0.5, "low": 0.4, "high": 0.6}
ROW = {"checkpoint": "", "bias": 0.5, "temperature": 0.15, "identity": SCORE, "text": SCORE, "harmonic_mean": 0.5}


@pytest.mark.parametrize(
    "changed",
    [
        {"bias": "0.5"},
        {"bias": 9},
        {"temperature": None},
        {"checkpoint": "../elsewhere"},
        {"checkpoint": 5},
        {"identity": 0.5},
        {"text": {"mean": 0.5}},
        {"text": {**SCORE, "low": "<script>"}},
        {"text": {**SCORE, "mean": float("nan")}},
        {"identity": {**SCORE, "high": 10**400}},
        {"identity": {**SCORE, "high": True}},
    ],
)
def test_a_row_that_cannot_be_is_refused(tmp_path, changed):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"settings": {}, "images": [], "rows": [ROW]}))
    assert Sweep.read(path).rows == [SweepRow(0.5, 0.15, Mean(0.5, 0.4, 0.6), Mean(0.5, 0.4, 0.6))]
    path.write_text(json.dumps({"settings": {}, "images": [], "rows": [ROW, ROW | changed]}))
    with pytest.raises(ValueError, match=r"sweep\.json is not a sweep's sweep\.json"):
        Sweep.read(path)


# The concept's default


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_best_becomes_the_default_and_nothing_else_changes(run, concept, tmp_path, dtype):
    path = concept.save(tmp_path / "perfusion.safetensors", dtype)
    found = run(biases=[0.7, 0.8], temperatures=[0.2])
    found.write_default(path)
    written = PerfusionConcept.load(path)
    assert (written.bias, written.temperature) == (found.best.bias, 0.2)
    assert ConceptHeader.read(path).dtype == str(dtype).removeprefix("torch.")
    replace(written, bias=concept.bias, temperature=concept.temperature).save(tmp_path / "back.safetensors", dtype)
    assert (tmp_path / "back.safetensors").read_bytes() == concept.save(tmp_path / "again", dtype).read_bytes()
    found.write_default(path)  # it is still the same concept


def test_a_default_is_for_the_concept_that_was_swept(run, make_concept, tmp_path):
    path = make_concept(seed=1).save(tmp_path / "perfusion.safetensors")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="the sweep is of another concept than this <my-cat>"):
        run().write_default(path)
    assert path.read_bytes() == before


@pytest.fixture
def checkpoints(make_concept):
    """Concepts of one training by checkpoint."""
    return {f"checkpoint-{step}": make_concept(seed=step) for step in (5, 10)}


def test_checkpoints_are_compared(run, pipeline, checkpoints, generated, tmp_path):
    seen = generated(pipeline)
    found = run(concept=checkpoints)
    assert [(row.checkpoint, row.bias) for row in found.rows] == [
        (name, bias) for name in checkpoints for bias in (0.5, 0.9)
    ]
    assert [line["checkpoint"] for line in found.table()] == [row.checkpoint for row in found.rows]
    assert Sweep.read(tmp_path / "sweep" / "sweep.json") == found
    assert len(seen) == 2 * 2 * 4
    for name, concept in checkpoints.items():
        alone = run(concept=concept, folder=name)
        assert replace(found.for_concept(concept).rows[1], checkpoint="") == alone.rows[1]
        images = files(tmp_path / "sweep" / "images" / name)
        assert images == files(tmp_path / name / "images")


def test_a_new_checkpoint_generates_only_its_own_images(run, pipeline, checkpoints, generated, make_concept):
    run(concept=checkpoints)
    seen = generated(pipeline)
    run(concept=checkpoints | {"checkpoint-15": make_concept(seed=15)})
    assert len(seen) == 2 * 4
    with pytest.raises(ValueError, match=r"concept_sha256.checkpoint-5 .*, and this sweep has "):
        run(concept=checkpoints | {"checkpoint-5": make_concept(seed=6)})


def test_checkpoints_of_different_concepts_are_refused(run, checkpoints, make_concept):
    with pytest.raises(ValueError, match="no checkpoints"):
        run(concept={})
    with pytest.raises(ValueError, match="different placeholder tokens or super-classes"):
        run(concept=checkpoints | {"checkpoint-15": make_concept("<my-dog>")})


def test_the_best_checkpoint_becomes_the_concept(run, checkpoints, tmp_path):
    folder = tmp_path / "output"
    for name, concept in checkpoints.items():
        concept.save(folder / name / "perfusion.safetensors")
    found = run(concept=checkpoints)
    found.write_default(folder / "perfusion.safetensors")
    written = PerfusionConcept.load(folder / "perfusion.safetensors")
    best = PerfusionConcept.load(folder / found.best.checkpoint / "perfusion.safetensors")
    assert written.bias == found.best.bias
    assert torch.equal(written.superclass_input, best.superclass_input)
    assert found.for_concept(written).best == found.best


def test_without_a_best_there_is_no_default(run, concept, tmp_path):
    class Hopeless(PixelMetrics):
        def score(self, images, prompts):
            return [Scores(-0.1, 0.5)] * len(images)

    path = concept.save(tmp_path / "perfusion.safetensors")
    before = path.read_bytes()
    found = run(metrics=Hopeless())
    assert found.best is None
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["best"] is None
    with pytest.raises(ValueError, match="no settings have both scores above 0"):
        found.write_default(path)
    assert path.read_bytes() == before
