"""The quality benchmark run end to end on the pocket model, only shorter."""

import json
import random

import compare
import numpy as np
import pytest
import report
import subjects
import torch
import two_concepts
from icons import BASE_RENDITIONS, CONCEPT_RENDITION, load_sprites
from PIL import Image
from variants import Base, Rival
from world import Thing

from diffusers_perfusion.evaluation import IdentityEncoder


def test_the_pictures_of_a_thing_are_the_same_each_time(tmp_path):
    one, two = (subjects.draw_subject("teddy-bear", tmp_path / name) for name in ("one", "two"))
    assert (one.word, one.superclass) == ("<my-bear>", "teddy bear")
    files = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*.png"))
    assert len(files) == 10 and len(one.pictures()) == 5
    assert all((one.folder / file).read_bytes() == (two.folder / file).read_bytes() for file in files)
    for path in one.folder.glob("*.png"):
        with Image.open(path) as picture, Image.open(one.folder / "masks" / path.name) as mask:
            assert picture.size == mask.size
            assert mask.getextrema() == (0, 255)


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Run a panel of one thing, the base and a LoRA of one step."""
    for module in (compare, report):
        monkeypatch.setattr(module, "TEST", ("robot",))
    monkeypatch.setitem(compare.PANELS, "main", [Base(), Rival("lora", "lora", 1e-3, (1,), options={"rank": 2})])

    def run():
        compare.main(f"--seeds 1 --num_inference_steps 1 --processes 0 --output_dir {tmp_path}".split())
        return {name: tmp_path / "runs" / name / "robot" for name in ("base", "lora")}

    return run


def test_a_panel_is_fitted_drawn_and_reported_once(short, monkeypatch, tmp_path):
    for name, folder in short().items():
        run = json.loads((folder / "run.json").read_text())
        assert run["points"] == [{"steps": int(name == "lora"), "knob": None}]
        assert (run["seeds"], run["bytes"] > 0) == (1, name == "lora")
        with Image.open(folder / "pictures.png") as picture:
            assert picture.size == (64 * len(subjects.PROMPTS), 64)
            assert np.asarray(picture).std() > 1
    monkeypatch.setattr(compare, "job", None)
    short()

    monkeypatch.setattr(report, "SHEET", (("base model", "base", 0), ("LoRA", "lora", 0)))
    results = tmp_path / "results"
    report.main(["--output_dir", str(tmp_path), "--report_dir", str(results)])
    rows = json.loads((results / "main.json").read_text())["rows"]
    table = (results / "main.md").read_text().splitlines()[2:]
    assert [row["variant"] for row in rows] == ["base", "lora"]
    for row, line in zip(rows, table, strict=True):
        identity, text, share = np.mean(row["cells"], 0)
        columns = [column.strip() for column in line.strip("|").split("|")]
        assert columns[0] == row["variant"]
        assert float(columns[3].split()[0]) == pytest.approx(identity, abs=2e-3)
        assert float(columns[4].split()[0]) == pytest.approx(text, abs=2e-3)
        assert float(columns[5].split()[0]) == pytest.approx(share, abs=2e-3)
    for name in ("main.png", "robot.png"):
        with Image.open(results / name) as picture:
            assert picture.width > 300


# Two concepts


def test_halves_are_left_and_right_of_each_other():
    picture = Image.new("RGB", (64, 64), "red")
    picture.paste("blue", (32, 0, 64, 64))
    left, right = two_concepts.halves(picture)
    assert left.size == right.size
    assert (left.getpixel((4, 4)), right.getpixel((36, 4))) == ((255, 0, 0), (0, 0, 255))


@pytest.fixture(scope="module")
def sprites():
    return load_sprites(subjects.POCKET / "recipe" / "sprites.npz", [*BASE_RENDITIONS, CONCEPT_RENDITION])


@pytest.fixture(scope="module")
def finder(sprites):
    identity = IdentityEncoder.from_pretrained(str(subjects.POCKET / "evaluators" / "identity"))
    return two_concepts.Finder(identity, sprites, ("robot", "penguin"), views=40)


def draw_pairs(sprites, first, second, count=24):
    rng = random.Random(3)
    return [two_concepts.side_by_side(Thing(*first), Thing(*second), sprites, rng) for _ in range(count)]


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
def test_both_things_are_found_where_both_are(finder, sprites, first, second, low, high):
    assert low <= finder.both(draw_pairs(sprites, first, second), "robot", "penguin").float().mean() <= high


def test_which_of_both_is_on_which_side_is_known(finder, sprites):
    found = (
        finder.find(draw_pairs(sprites, ("robot", CONCEPT_RENDITION), ("penguin", CONCEPT_RENDITION))).float().mean(0)
    )
    assert found.diagonal().min() > 0.65
    assert (1 - torch.eye(2)).mul(found).max() < 0.2
