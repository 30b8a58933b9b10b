"""The evaluators beside the pocket model, and the report on how far they can be trusted."""

import random
from pathlib import Path

import icons
import metric_trust
import pytest
import scenes
import subjects
import torch
import world
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor, Dinov2Model

from diffusers_perfusion.evaluation import ClipEncoder, IdentityEncoder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EVALUATORS = EXAMPLES / "pocket" / "evaluators"


@pytest.fixture(scope="module")
def sprites():
    """Those that the evaluators have seen, and those held out, who wear what has been seen."""
    path = scenes.HERE / "sprites.npz"
    seen = icons.load_sprites(path)
    return seen, icons.load_sprites(path, [icons.CONCEPT_RENDITION]) | {icon: seen[icon] for icon in icons.WORN}


class BlankModel:
    """A base model whose images are blank."""

    def generate(self, captions):
        return [Image.new("RGB", (64, 64), "white") for _ in captions]


def test_the_evaluators_load_as_transformers_does():
    processor = CLIPProcessor.from_pretrained(EVALUATORS / "clip")
    inputs = processor(text=["a cat"], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    assert CLIPModel.from_pretrained(EVALUATORS / "clip").float()(**inputs).logits_per_image.isfinite().all()
    model = AutoModel.from_pretrained(EVALUATORS / "identity")
    pixels = AutoImageProcessor.from_pretrained(EVALUATORS / "identity")(
        Image.new("RGB", (64, 64)), return_tensors="pt"
    )
    assert isinstance(model, Dinov2Model) and model.float()(**pixels).pooler_output.isfinite().all()


@pytest.mark.parametrize("name", ["clip", "identity"])
def test_the_evaluators_are_small(name):
    assert (EVALUATORS / name / "model.safetensors").stat().st_size < 6e6


def test_clip_tells_one_phrase_in_scenes_of_things_it_has_not_seen(sprites):
    _, held_out = sprites
    clip = ClipEncoder.from_pretrained(str(EVALUATORS / "clip"))
    render = metric_trust.rendered_from(held_out)
    rows = metric_trust.measure_clip(clip, render, held_out, count=40)
    assert len(rows) == len(metric_trust.KINDS) + len(metric_trust.LEFT_OUT)
    for name, row in rows.items():
        assert 0.5 <= row["low"] <= row["mean"] <= row["high"] <= 1, name
    # The report gives figures from more scenes; what is asked here is that a broken evaluator is noticed.
    assert min(row["mean"] for row in rows.values()) > 0.6


def test_identity_is_highest_for_the_same_thing(sprites, monkeypatch):
    seen, held_out = sprites
    monkeypatch.setattr(metric_trust, "NOUNS", list(icons.NOUNS)[::4])
    identity = IdentityEncoder.from_pretrained(str(EVALUATORS / "identity"))
    report = metric_trust.measure_identity(identity, BlankModel(), held_out, seen, count=2, generated=1)
    assert set(report) == set(metric_trust.SETTINGS)
    for rows in report.values():
        assert max(rows, key=lambda name: rows[name]["mean"]) == metric_trust.SAME
        assert rows["another rendition of the noun"]["mean"] > rows["another noun"]["mean"]
        assert rows["another noun"]["below the same thing"] > 0.8


@pytest.mark.parametrize("prompt", subjects.PROMPTS, ids=lambda prompt: prompt.text)
def test_every_prompt_of_the_comparison_is_a_scene_of_the_world(sprites, prompt):
    seen, _ = sprites
    thing = world.Thing("tropical-fish", icons.CONCEPT_RENDITION)
    scene = metric_trust.scene_of(prompt.caption, thing, seen, random.Random(0))
    assert scene.caption == prompt.caption.format("fish")
    assert icons.CONCEPT_RENDITION in [one.rendition for one in (scene.subject, scene.companion) if one]


def test_true_images_of_prompts_are_found_and_more_alike_than_another_rendition(sprites):
    seen, held_out = sprites
    clip, identity = (
        kind.from_pretrained(str(EVALUATORS / name))
        for kind, name in ((ClipEncoder, "clip"), (IdentityEncoder, "identity"))
    )
    report = metric_trust.measure_prompts(clip, identity, held_out, seen, count=1)
    assert list(report) == list(subjects.FAMILIES)
    for rows in report.values():
        assert rows["asked for and found"]["mean"] > 0.7
    assert report["plain"][metric_trust.SAME]["mean"] > 0.3
    assert report["plain"]["another rendition below it"]["mean"] > 0.6


def test_an_encoder_that_cannot_see_is_right_half_the_time(sprites):
    seen, _ = sprites

    class Guess:
        def encode_images(self, images):
            return torch.nn.functional.normalize(torch.randn(len(images), 8), dim=-1)

        encode_texts = encode_images

    torch.manual_seed(0)
    rows = metric_trust.measure_clip(Guess(), lambda scenes: scenes, seen, count=400)
    assert all(row["low"] - 0.05 < 0.5 < row["high"] + 0.05 for row in rows.values())


def test_the_report_is_three_tables():
    score = {"mean": 0.5, "low": -0.25, "high": 0.75, "below the same thing": 0.9}
    report = {
        "identity": {"alone": {metric_trust.SAME: score, "another noun": score}},
        "clip": {"scenes": {"place": score}, "images": {"place": score}},
        "prompts": {"plain": {"found": score}, "natural": {"found": score}},
    }
    assert metric_trust.markdown(report).splitlines()[2:] == [
        "| the same thing | 0.50 (-0.25 to 0.75) |",
        "| another noun | 0.50 (-0.25 to 0.75), 90% below |",
        "",
        "| CLIP is right, with one | scenes | images |",
        "|---|---|---|",
        "| place | 50% (-25% to 75%) | 50% (-25% to 75%) |",
        "",
        "| true images of the comparison's subjects and prompts | plain | natural |",
        "|---|---|---|",
        "| found | 0.50 (-0.25 to 0.75) | 0.50 (-0.25 to 0.75) |",
    ]
