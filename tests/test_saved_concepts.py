"""Concepts that are saved or pushed with a pipeline: they come back, and no others."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CHAT_LENGTH, LENGTH, effect, random_concept
from diffusers import DiffusionPipeline

from diffusers_perfusion import PerfusionPipeline, add_perfusion
from diffusers_perfusion.saved_concepts import FOLDER, save_concepts, saved_concepts

TOKEN = "hf_me"
INDEX = "concepts.json"


@pytest.fixture
def cat(make_concept):
    return make_concept()


@pytest.fixture
def dog(make_concept):
    return make_concept("<my-dog>", "dog", seed=1)


def held(folder):
    return sorted(path.name for path in (folder / FOLDER).iterdir())


def test_names_come_back_in_their_order(cat, dog, tmp_path):
    save_concepts(tmp_path, {"rex": dog, "a/b: ..": cat})
    assert list(saved_concepts(tmp_path).items()) == [("rex", "rex.safetensors"), ("a/b: ..", "a-b.safetensors")]
    assert held(tmp_path) == ["a-b.safetensors", INDEX, "rex.safetensors"]


def test_names_that_are_alike_or_cannot_be_those_of_files(cat, tmp_path):
    names = ["", "<>", "..", "Cat", "cat", "cat ", "x" * 244, "é" * 100, "猫" * 200, "🐻", "CON/\0"]
    save_concepts(tmp_path, dict.fromkeys(names, cat))
    assert list(saved_concepts(tmp_path)) == names
    files = saved_concepts(tmp_path).values()
    assert sorted([*files, INDEX]) == held(tmp_path) and len({file.casefold() for file in files}) == len(names)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flux_pipeline", {"max_sequence_length": LENGTH}),
        ("z_image_pipeline", {"max_sequence_length": CHAT_LENGTH}),
        ("xl_pipeline", {}),
        ("pixart_pipeline", {"use_resolution_binning": False}),
    ],
)
def test_pipelines_of_other_families_are_loaded_with_their_concepts(
    request, generate, tmp_path, caplog, name, settings
):
    pipe = request.getfixturevalue(name)
    draw = partial(generate, "a <my-cat> on the beach", height=16, width=16, **settings)
    plain = draw(pipe=pipe)
    pipe.load_perfusion(random_concept(pipe))
    pipe.save_pretrained(tmp_path)
    loaded = PerfusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded).__name__ == type(pipe).__name__ and loaded.list_perfusion() == ["my-cat"]
    edited = draw(pipe=pipe)
    assert effect(edited, plain) > 1e-3
    torch.testing.assert_close(draw(pipe=loaded), edited, atol=1e-3, rtol=0)  # numbers of a file are in half precision
    assert "are not loaded" not in caplog.text

    add_perfusion(DiffusionPipeline.from_pretrained(tmp_path))
    assert f"The concepts that were saved with {tmp_path} are not loaded" in caplog.text


@pytest.mark.parametrize("name", ["AutoPipelineForText2Image", "utils", ["pipeline_mine", "MyPipeline"]])
def test_a_class_that_is_no_pipeline_of_diffusers_is_not_loaded(flux_pipeline, tmp_path, name):
    flux_pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    with pytest.raises(ValueError, match="unet"):
        PerfusionPipeline.from_pretrained(tmp_path)


def test_a_concept_that_was_deleted_stays_so(pipeline, cat, dog, tmp_path):
    pipeline.load_perfusion([cat, dog])
    pipeline.save_pretrained(tmp_path)
    pipeline.delete_perfusion("my-cat")
    pipeline.save_pretrained(tmp_path)
    assert held(tmp_path) == [INDEX, "my-dog.safetensors"]
    assert PerfusionPipeline.from_pretrained(tmp_path).list_perfusion() == ["my-dog"]
    pipeline.unload_perfusion()
    pipeline.save_pretrained(tmp_path)
    assert held(tmp_path) == [INDEX]
    assert PerfusionPipeline.from_pretrained(tmp_path).list_perfusion() == []


def test_files_of_others_stay_and_are_named(pipeline, cat, dog, tmp_path, caplog):
    path = dog.save(tmp_path / FOLDER / "my-cat.safetensors")  # of the name that the pipeline would choose
    before = path.read_bytes()
    for _ in range(2):
        save_concepts(tmp_path, {"my-cat": cat})
    assert path.read_bytes() == before
    assert saved_concepts(tmp_path) == {"my-cat": "my-cat-1.safetensors"}
    assert f"{tmp_path / FOLDER} has my-cat.safetensors beside the concepts" in caplog.text
    save_concepts(tmp_path, {})
    assert held(tmp_path) == [INDEX, "my-cat.safetensors"] and saved_concepts(tmp_path) == {}


def test_a_file_that_was_deleted_by_hand_is_named(pipeline, cat, dog, tmp_path):
    pipeline.load_perfusion([cat, dog])
    pipeline.save_pretrained(tmp_path)
    (tmp_path / FOLDER / "my-cat.safetensors").unlink()
    match = r"perfusion has no my-cat\.safetensors, .*; put it back, or delete its line in concepts\.json"
    with pytest.raises(FileNotFoundError, match=match):
        PerfusionPipeline.from_pretrained(tmp_path)
    index = tmp_path / FOLDER / INDEX
    index.write_text(
        json.dumps({name: file for name, file in json.loads(index.read_text()).items() if name != "my-cat"})
    )
    assert PerfusionPipeline.from_pretrained(tmp_path).list_perfusion() == ["my-dog"]


def test_a_model_that_is_given_keeps_its_own_concepts(pipeline, cat, dog, make_concept, tmp_path, caplog):
    pipeline.load_perfusion([cat, dog])
    pipeline.save_pretrained(tmp_path)
    pipeline.delete_perfusion("my-dog")
    again = PerfusionPipeline.from_pretrained(tmp_path, unet=pipeline.unet)
    assert again.list_perfusion() == pipeline.list_perfusion() == ["my-cat"]
    assert f"saved with {tmp_path} are not loaded" in caplog.text


def test_a_name_that_could_control_a_terminal_is_not_printed(pipeline, cat, tmp_path):
    """A list of concepts may be a stranger's."""
    save_concepts(tmp_path, {"\x1b[2J": cat, "b": cat})
    pipeline.load_perfusion(
        tmp_path, next(iter(saved_concepts(tmp_path))), subfolder=FOLDER, weight_name="2J.safetensors"
    )
    pipeline.load_perfusion(cat, "b", "<other>")
    for call in (lambda: pipeline.delete_perfusion("c"), lambda: pipeline.save_perfusion(tmp_path)):
        with pytest.raises(ValueError, match="loaded") as caught:
            call()
        assert str(caught.value).isprintable()


def test_a_pipeline_without_concepts_has_no_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    assert saved_concepts(tmp_path) == {}


def test_until_all_are_written_the_earlier_ones_count(cat, dog, tmp_path, monkeypatch):
    save_concepts(tmp_path, {"my-cat": cat})
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(type(dog), "save", lambda self, path: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        save_concepts(tmp_path, {"my-dog": dog})
    assert saved_concepts(tmp_path) == {"my-cat": "my-cat.safetensors"}
    assert held(tmp_path) == [INDEX, "my-cat.safetensors"]


@pytest.mark.parametrize(
    "written",
    [
        "",
        "[]",
        "5",
        '{"a": 5}',
        '{"a": "../b.safetensors"}',
        '{"a": "b.bin"}',
        '{"a": "c:\\\\b.safetensors"}',
        "[" * 5000,
    ],
)
def test_a_list_that_is_none(cat, tmp_path, written):
    index = tmp_path / FOLDER / INDEX
    index.parent.mkdir()
    index.write_text(written)
    for use in (saved_concepts, lambda folder: save_concepts(folder, {"my-cat": cat})):
        with pytest.raises(ValueError, match=r"concepts\.json (is no JSON|does not name a safe).*delete it"):
            use(tmp_path)
    assert held(tmp_path) == [INDEX] and index.read_text() == written


# on the Hub


@pytest.fixture
def whole(hub, pipeline, cat, dog):
    """A pipeline on the Hub with two concepts."""
    cat.base_model = "me/tiny"
    pipeline.load_perfusion([cat, dog], ["rex", None])
    pipeline.push_to_hub("me/whole", token=TOKEN)
    hub.requests.clear()
    return "me/whole"


def test_a_pushed_pipeline_comes_with_its_concepts(hub, whole, pipeline, tmp_path, caplog):
    caplog.clear()
    loaded = PerfusionPipeline.from_pretrained(whole, cache_dir=tmp_path / "cache", token=TOKEN)
    assert "was trained on" not in caplog.text  # another repository, but with this very pipeline
    assert loaded.list_perfusion() == ["rex", "my-dog"]
    assert {token for _, path, token, _ in hub.requests if FOLDER in path} == {TOKEN}
    hub.requests.clear()
    again = PerfusionPipeline.from_pretrained(whole, cache_dir=tmp_path / "cache", local_files_only=True)
    assert again.list_perfusion() == ["rex", "my-dog"] and not hub.requests

    pipeline.delete_perfusion("rex")
    pipeline.push_to_hub(whole, token=TOKEN)
    loaded = PerfusionPipeline.from_pretrained(whole, cache_dir=tmp_path / "cache")
    assert loaded.list_perfusion() == ["my-dog"]


def test_concepts_are_of_the_same_revision(hub, whole, pipeline):
    repository = hub.repositories[whole]
    repository.branches["v1"] = repository.branches["main"]
    pipeline.delete_perfusion("rex")
    pipeline.push_to_hub(whole, token=TOKEN)
    assert list(saved_concepts(whole, revision="v1")) == ["rex", "my-dog"]
    assert list(saved_concepts(whole)) == ["my-dog"]


def test_a_model_without_concepts_costs_one_question(hub, caplog):
    hub.add("me/base", {})
    assert saved_concepts("me/base") == {}
    assert [(method, Path(path).name) for method, path, *_ in hub.requests] == [("HEAD", INDEX)]
    assert saved_concepts("me/base", local_files_only=True) == {}
    assert not caplog.messages


def test_what_is_not_known_is_said(hub, whole, caplog):
    def stall(handler):
        raise ConnectionAbortedError

    hub.fault = stall
    assert saved_concepts(whole) == {}
    (message,) = caplog.messages
    assert "Whether concepts were saved with me/whole is not known (" in message and message.isprintable()


def test_a_list_of_a_stranger_is_checked(hub):
    hub.add("me/whole", {f"{FOLDER}/{INDEX}": json.dumps({"a": "../../model.safetensors"}).encode()})
    with pytest.raises(ValueError, match="does not name a safetensors file"):
        saved_concepts("me/whole")
    hub.add("me/whole", {f"{FOLDER}/{INDEX}": b" " * (2**20 + 1)})
    with pytest.raises(ValueError, match=r"the size of concepts\.json is 1048577; expected at most"):
        saved_concepts("me/whole")
