"""The quality benchmark run end to end on the pocket model, only shorter."""

import json
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import ceiling
import compare
import file_sizes
import numpy as np
import plain_prompts
import prompt_forms
import pytest
import report
import run
import subjects
import torch
import two_concepts
from accelerate.state import AcceleratorState, GradientState
from icons import BASE_RENDITIONS, CONCEPT_RENDITION, load_sprites
from PIL import Image
from subjects import Prompt
from variants import Base, Baseline, Perfusion
from world import Thing

from diffusers_perfusion.evaluation import IdentityEncoder
from diffusers_perfusion.training.images import to_tensor


def test_the_images_of_a_thing_are_the_same_each_time(tmp_path):
    one, two = (subjects.compose_subject("teddy-bear", tmp_path / name) for name in ("one", "two"))
    assert (one.placeholder_token, one.superclass) == ("<my-bear>", "teddy bear")
    files = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*.png"))
    assert len(files) == 10 and len(one.images()) == 5
    assert all((one.folder / file).read_bytes() == (two.folder / file).read_bytes() for file in files)
    for path in one.folder.glob("*.png"):
        with Image.open(path) as image, Image.open(one.folder / "masks" / path.name) as mask:
            assert image.size == mask.size
            assert mask.getextrema() == (0, 255)
    large = subjects.compose_subject("teddy-bear", tmp_path / "large", side=128)
    assert (one.side, large.side) == (64, 128)
    for small, image in zip(one.images(), large.images(), strict=True):  # the same images in more detail
        difference = to_tensor([small]) - to_tensor([image.resize((64, 64), Image.Resampling.LANCZOS)])
        assert difference.abs().mean() < 0.02


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Run a panel of one thing, the base and a LoRA of one step."""
    monkeypatch.setitem(compare.ICONS, "main", ("robot",))
    monkeypatch.setitem(compare.PANELS, "main", [Base(), Baseline("lora", "lora", 1e-3, (1,), options={"rank": 2})])

    def run():
        compare.main(f"--seeds 1 --num_inference_steps 1 --processes 0 --output_dir {tmp_path}".split())
        return {name: tmp_path / "runs" / name / "robot" for name in ("base", "lora")}

    return run


def test_a_panel_is_trained_generated_and_reported_once(short, monkeypatch, tmp_path):
    for name, folder in short().items():
        facts = json.loads((folder / "run.json").read_text())
        assert facts["points"] == [{"steps": int(name == "lora"), "knob": None}]
        assert (facts["seeds"], facts["bytes"] > 0) == (1, name == "lora")
        with Image.open(folder / "images.png") as image:
            assert image.size == (64 * len(subjects.PROMPTS), 64)
            assert np.asarray(image).std() > 1
    monkeypatch.setattr(compare, "job", None)
    short()

    monkeypatch.setattr(report, "CONTACT_SHEET", (("base model", "base", 0), ("LoRA", "lora", 0)))
    results = tmp_path / "results"
    report.main(["--output_dir", str(tmp_path), "--report_dir", str(results)])
    rows = json.loads((results / "main.json").read_text())["rows"]
    of_plain, of_natural, of_appearance = (
        [prompt.family == family for prompt in subjects.PROMPTS] for family in subjects.FAMILIES
    )
    points, families = ((results / "main.md").read_text()).split("\n\n")
    table = points.splitlines()[2:]
    assert [row["variant"] for row in rows] == ["base", "lora"]
    for row, line in zip(rows, table, strict=True):
        identity, text, share = np.nanmean(np.array(row["cells"], float), 0)
        columns = [column.strip() for column in line.strip("|").split("|")]
        assert columns[0] == row["variant"]
        assert float(columns[3].split()[0]) == pytest.approx(identity, abs=2e-3)
        assert float(columns[4].split()[0]) == pytest.approx(text, abs=2e-3)
        assert float(columns[5].split()[0]) == pytest.approx(share, abs=2e-3)
    for row, line in zip(rows, families.splitlines()[2:], strict=True):
        cells = np.array(row["cells"], float)
        columns = [column.strip() for column in line.strip("|").split("|")]
        expected = [cells[of_plain, 0].mean(), cells[of_plain, 1].mean(), cells[of_natural, 0].mean()]
        expected += [cells[of_natural, 1].mean(), cells[of_appearance, 1].mean(), cells[of_appearance, 2].mean()]
        assert [float(column.split()[0]) for column in columns[3:]] == pytest.approx(expected, abs=2e-3)
    for name in ("main.png", "robot.png"):
        with Image.open(results / name) as image:
            assert image.width > 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of the base and of Perfusion, one step each, on two things."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compare.ICONS, "main", ("robot", "penguin"))
        perfusion = Perfusion("perfusion", {"max_train_steps": 1}, biases=(0.7,))
        patch.setitem(compare.PANELS, "main", [Base(), perfusion])
        compare.main(f"--seeds 1 --num_inference_steps 1 --processes 0 --output_dir {folder}".split())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


@pytest.fixture
def trained(runs, tmp_path, monkeypatch):
    """A copy of the runs, and the panel that they are of."""
    monkeypatch.setitem(compare.ICONS, "main", ("robot", "penguin"))
    perfusion = Perfusion("perfusion", {"max_train_steps": 1}, biases=(0.7,))
    monkeypatch.setitem(compare.PANELS, "main", [Base(), perfusion])
    return shutil.copytree(runs, tmp_path, dirs_exist_ok=True)


def test_plain_prompts_are_generated_before_and_while_a_concept_is_loaded(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(plain_prompts, "TEST", ("robot",))
    monkeypatch.setattr(plain_prompts, "PROMPTS", (Prompt("plain", "a {} in space", "a {} in space"),))
    arguments = ["--output_dir", str(trained), "--report_dir", str(tmp_path)]
    plain_prompts.main(arguments)
    assert json.loads((tmp_path / "plain_prompts.json").read_text()) == {"robot": 0.0}

    token = "a <my-robot> in space"
    monkeypatch.setattr(plain_prompts, "PROMPTS", (Prompt("plain", token, token),))
    plain_prompts.main(arguments)
    assert json.loads((tmp_path / "plain_prompts.json").read_text())["robot"] > 0.01


def test_an_image_is_as_near_as_the_nearest_of_some_sets(monkeypatch):
    near = {"a": torch.tensor([0.2, 0.6]), "b": torch.tensor([0.5, 0.1])}
    monkeypatch.setattr(ceiling, "image_similarity", lambda encoder, images, references: near[references])
    torch.testing.assert_close(ceiling.nearest(None, None, ["a", "b"]), torch.tensor([0.5, 0.6]))


def test_the_base_is_scored_beside_true_images(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(ceiling, "TEST", ("robot", "penguin"))
    ceiling.main(["--output_dir", str(trained), "--report_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "ceiling.json").read_text())
    generated_in_one_step, true = (scores[kind] for kind in ceiling.KINDS)
    assert generated_in_one_step["high"] < true["low"] < true["mean"] < 1


def test_sizes_are_of_what_each_method_stores(tmp_path):
    file_sizes.main(["--report_dir", str(tmp_path)])
    for sizes in json.loads((tmp_path / "file_sizes.json").read_text()).values():
        assert sizes["concept"] < sizes["LoRA of rank 4"] < sizes["LoRA of rank 16"]
        assert sizes["LoRA of rank 16"] / sizes["LoRA of rank 4"] == pytest.approx(4, rel=0.1)


def test_every_part_is_run(monkeypatch, tmp_path):
    parts = (compare, report, two_concepts, plain_prompts, prompt_forms, ceiling, file_sizes)
    calls = []
    for part in parts:
        monkeypatch.setattr(part, "main", lambda args, name=part.__name__: calls.append((name, args)))
    run.main(["--output_dir", "generated", "--report_dir", str(tmp_path)])
    assert {name for name, _ in calls} == {part.__name__ for part in parts}
    panels = [args[1] for name, args in calls if name == "report"]
    assert panels == ["tuning", "ablations", "main", "short"]
    assert all(str(tmp_path) in args for name, args in calls if name != "compare")


@pytest.mark.parametrize("script", ["run", "metric_trust"])
def test_scripts_start_alone(script):
    path = Path(run.__file__).with_name(f"{script}.py")
    result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True)
    assert "usage" in result.stdout


# Two concepts


def test_both_subjects_of_an_image_are_counted(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(two_concepts, "TEST", ("robot", "penguin"))
    monkeypatch.setattr(two_concepts, "PROMPTS", two_concepts.PROMPTS[:2])
    monkeypatch.setattr(two_concepts, "Finder", partial(two_concepts.Finder, views=10))
    monkeypatch.setattr(two_concepts, "ENTRIES", two_concepts.ENTRIES[:2])
    two_concepts.main(["--seeds", "1", "--output_dir", str(trained), "--report_dir", str(tmp_path)])
    counted = json.loads((tmp_path / "two_concepts.json").read_text())
    assert list(counted)[2:] == ["base model, two nouns", "Perfusion, β 0.7"]
    for shares in counted.values():
        assert list(shares) == list(two_concepts.MEASURES)
        assert all(0 <= share["low"] <= share["mean"] <= share["high"] <= 1 for share in shares.values())
    with Image.open(tmp_path / "two_concepts.png") as image:
        assert image.height == 64 * len(counted)


def test_halves_are_left_and_right_of_each_other():
    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (32, 0, 64, 64))
    left, right = two_concepts.halves(image)
    assert left.size == right.size
    assert (left.getpixel((4, 4)), right.getpixel((36, 4))) == ((255, 0, 0), (0, 0, 255))


@pytest.fixture(scope="module", params=[64, 128])
def side(request):
    return request.param


@pytest.fixture(scope="module")
def sprites(side):
    return load_sprites(subjects.sprites_of(side), [*BASE_RENDITIONS, CONCEPT_RENDITION])


@pytest.fixture(scope="module")
def finder(sprites, side):
    identity = IdentityEncoder.from_pretrained(str(subjects.POCKET / "evaluators" / "identity"))
    return two_concepts.Finder(identity, sprites, ("robot", "penguin"), side, views=40)


@pytest.fixture
def render_pairs(sprites, side):
    def render(first, second, count=24):
        rng = random.Random(3)
        return [two_concepts.side_by_side(Thing(*first), Thing(*second), sprites, rng, side) for _ in range(count)]

    return render


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        (("robot", CONCEPT_RENDITION), ("penguin", CONCEPT_RENDITION), 0.65, 1),
        (("penguin", CONCEPT_RENDITION), ("robot", CONCEPT_RENDITION), 0.65, 1),
        (("robot", "noto"), ("penguin", CONCEPT_RENDITION), 0, 0.5),
        (("robot", CONCEPT_RENDITION), ("robot", CONCEPT_RENDITION), 0, 0.2),
        (("robot", CONCEPT_RENDITION), ("cat", CONCEPT_RENDITION), 0, 0.2),
        (("cat", CONCEPT_RENDITION), ("owl", CONCEPT_RENDITION), 0, 0.1),
    ],
)
def test_both_things_are_found_where_both_are(finder, render_pairs, first, second, low, high):
    assert low <= finder.both(render_pairs(first, second), "robot", "penguin").float().mean() <= high


def test_which_of_both_is_on_which_side_is_known(finder, render_pairs):
    pairs = render_pairs(("robot", CONCEPT_RENDITION), ("penguin", CONCEPT_RENDITION))
    found = finder.find(pairs).float().mean(0)
    assert found.diagonal().min() > 0.65
    assert (1 - torch.eye(2)).mul(found).max() < 0.2
