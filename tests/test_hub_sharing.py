"""Sharing concepts: the real client of the Hub against a server on this machine (`hub_server`)."""

import json
import os
import re
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub_server import Refusal
from huggingface_hub import ModelHubMixin
from PIL import Image, PngImagePlugin

from diffusers_perfusion import PerfusionConcept, PerfusionPipeline
from diffusers_perfusion.bounded_hub import BoundedHub
from diffusers_perfusion.cli import main
from diffusers_perfusion.concept_file import MAX_FILE_BYTES, MAX_HEADER_BYTES, WEIGHT_NAME
from diffusers_perfusion.hub import find_concept_file, push_concept_file, read_header, search_concepts
from diffusers_perfusion.training import TrainingConfig, train

POCKET = Path(__file__).resolve().parents[1] / "examples" / "pocket"
TOKEN = "hf_me"


@pytest.fixture
def content(make_concept, tmp_path):
    """The bytes of a concept file."""
    return make_concept().save(tmp_path / WEIGHT_NAME).read_bytes()


@pytest.fixture
def concept(make_concept):
    return make_concept(base_model="me/tiny")


def image(colour="red"):
    return Image.new("RGB", (8, 8), colour)


def files(hub, repo_id="me/my-cat", revision="main"):
    return hub.repositories[repo_id].files(revision)


def card(hub, repo_id="me/my-cat", revision="main"):
    return files(hub, repo_id, revision)["README.md"].decode()


# push


def test_a_pulled_file_is_the_pushed_one(hub, pipeline, concept, tmp_path):
    pipeline.load_perfusion(concept)
    commit = pipeline.push_perfusion_to_hub(
        "me/my-cat", samples=[("a <my-cat> on the beach", image())], license="mit", token=TOKEN
    )
    assert commit.commit_url.startswith(f"{hub.endpoint}/me/my-cat/commit/")
    assert files(hub).keys() == {".gitattributes", "README.md", WEIGHT_NAME, "images/perfusion/0.png"}
    assert not [request for request in hub.requests if request[2] != TOKEN]
    assert sum("/commit/" in path for _, path, _, _ in hub.requests) == 1

    reader = PerfusionPipeline(**pipeline.components, requires_safety_checker=False)
    pipeline.unload_perfusion()
    reader.load_perfusion("me/my-cat", cache_dir=tmp_path / "cache")
    assert reader.list_perfusion() == ["my-cat"]
    reader.save_perfusion(tmp_path / "copy")
    assert (tmp_path / "copy" / WEIGHT_NAME).read_bytes() == files(hub)[WEIGHT_NAME]


def test_one_of_several_is_named(hub, pipeline, make_concept):
    pipeline.load_perfusion([make_concept(), make_concept("<my-dog>", seed=1)])
    with pytest.raises(ValueError, match="several concepts are loaded; name one of my-cat, my-dog"):
        pipeline.push_perfusion_to_hub("me/my-dog", token=TOKEN)
    with pytest.raises(ValueError, match="no concept named 'bird' is loaded"):
        pipeline.push_perfusion_to_hub("me/my-dog", "bird", token=TOKEN)
    assert not hub.requests
    pipeline.push_perfusion_to_hub("me/my-dog", "my-dog", token=TOKEN)
    assert read_header("me/my-dog")[2].placeholder_token == "<my-dog>"


def test_only_the_pixels_of_an_image_are_pushed(hub, concept, tmp_path):
    told = PngImagePlugin.PngInfo()
    told.add_text("path", "/home/me/secret")
    exif = Image.Exif()
    exif[0x010E] = "secret"
    image().save(tmp_path / "told.png", pnginfo=told, exif=exif)
    with Image.open(tmp_path / "told.png") as opened:
        concept.push_to_hub("me/my-cat", samples=[("a <my-cat>", opened)], token=TOKEN)
    (name,) = (name for name in files(hub) if name.endswith(".png"))
    assert b"secret" not in files(hub)[name]


def test_a_push_replaces_the_one_before(hub, concept):
    samples = [("a <my-cat> on the beach", image("red")), ("a <my-cat> in the snow", image("blue"))]
    concept.push_to_hub("me/my-cat", samples=samples, license="mit", token=TOKEN)
    concept.bias = 0.7
    concept.push_to_hub("me/my-cat", samples=samples[:1], token=TOKEN, commit_message="Another bias")
    assert [name for name in files(hub) if name.endswith(".png")] == ["images/perfusion/0.png"]
    assert "license: mit" in card(hub)
    assert "in the snow" not in card(hub)
    assert read_header("me/my-cat")[2].bias == 0.7
    assert len(hub.repositories["me/my-cat"].commits) == 3


def test_the_sweep_is_in_the_card(hub, concept):
    concept.push_to_hub("me/my-cat", sweep=[{"bias": 0.5, "clip_i": 0.81}, {"bias": 0.7, "clip_i": 0.79}], token=TOKEN)
    assert "| 0.5 | 0.81 |" in card(hub)
    with pytest.raises(ValueError, match="the rows of the sweep have different columns"):
        concept.push_to_hub("me/my-cat", sweep=[{"bias": 0.5}, {"clip_i": 0.79}], token=TOKEN)


def test_a_card_without_a_licence_is_reported(hub, concept, caplog):
    concept.push_to_hub("me/my-cat", token=TOKEN)
    assert "The card of me/my-cat names no licence" in caplog.text
    assert "license" not in card(hub)
    caplog.clear()
    concept.push_to_hub("me/my-cat", license="cc-by-4.0", token=TOKEN)
    concept.push_to_hub("me/my-cat", token=TOKEN)
    assert "license: cc-by-4.0" in card(hub) and "licence" not in caplog.text


def test_a_concept_is_pushed_and_read_as_other_models_are(hub, concept, tmp_path):
    """`ModelHubMixin` has the same methods; unlike its own, they need no config.json and ask for none."""
    assert isinstance(concept, ModelHubMixin)
    folder = tmp_path / "my-cat"
    concept.save_pretrained(folder, push_to_hub=True, license="mit", token=TOKEN)
    concept.save_pretrained(
        folder, push_to_hub=True, repo_id="me/other", token=TOKEN, samples=[("a <my-cat>", image())]
    )
    assert files(hub).keys() == {".gitattributes", "README.md", WEIGHT_NAME}
    assert files(hub)[WEIGHT_NAME] == (folder / WEIGHT_NAME).read_bytes()
    assert "images/perfusion/0.png" in files(hub, "me/other")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", WEIGHT_NAME]
    hub.requests.clear()
    options = {"token": TOKEN, "cache_dir": tmp_path / "cache"}
    assert PerfusionConcept.from_pretrained("me/my-cat", **options).superclass == "cat"
    assert hub.requests and all(path.endswith(WEIGHT_NAME) for _, path, _, _ in hub.requests)
    hub.requests.clear()
    PerfusionConcept.from_pretrained("me/my-cat", local_files_only=True, cache_dir=tmp_path / "cache")
    assert not hub.requests
    with pytest.raises(ValueError, match="'me/nothing' is neither a file or folder here nor a Hub repository"):
        PerfusionConcept.from_pretrained("me/nothing")


def test_a_file_is_pushed_as_it_is(hub, make_concept, tmp_path):
    path = make_concept(base_model="me/tiny").save(tmp_path / "cat.safetensors", torch.float32)
    push_concept_file(path, "me/my-cat", token=TOKEN)
    assert files(hub)[WEIGHT_NAME] == path.read_bytes()
    path.write_bytes(b"PK" + bytes(100))
    hub.requests.clear()
    with pytest.raises(ValueError, match=r"cat\.safetensors is .* a pickle"):
        push_concept_file(path, "me/my-cat", token=TOKEN)
    assert not hub.requests


def test_a_collection_has_one_card(hub, pipeline, make_concept, caplog):
    cat, dog = make_concept(base_model="me/tiny"), make_concept("<my-dog>", "dog", seed=1, base_model="me/tiny")
    cat.push_to_hub("me/pets", weight_name="cat.safetensors", samples=[("a <my-cat>", image())], token=TOKEN)
    files(hub, "me/pets").update(
        {
            "lora.safetensors": struct.pack("<Q", 2) + b"{}",
            "../evil.safetensors": b"",
            "a|b](javascript:c).safetensors": files(hub, "me/pets")["cat.safetensors"],
            "images/dog/9.png": b"stale",
        }
    )
    dog.push_to_hub(
        "me/pets",
        weight_name="dog.safetensors",
        samples=[("a <my-dog>", image())],
        sweep=[{"bias": 0.5}],
        token=TOKEN,
    )
    assert "The card of me/pets is of 3 concepts, so it does not show the sweep" in caplog.text
    assert "images/dog/9.png" not in files(hub, "me/pets")
    text = card(hub, "me/pets")
    assert "# 3 concepts" in text
    assert "lora" not in text and "evil" not in text
    assert "](javascript" not in re.sub("```.*?```", "", text, flags=re.DOTALL)
    for pet in ("cat", "dog"):
        assert f"({pet}.safetensors)" in text
        assert f"images/{pet}/0.png" in text
    pipeline.load_perfusion("me/pets", weight_name="cat.safetensors")
    pipeline.load_perfusion("me/pets", weight_name="dog.safetensors")
    assert pipeline.list_perfusion() == ["my-cat", "my-dog"]


def test_several_repositories_at_once(hub, pipeline, make_concept):
    make_concept().push_to_hub("me/my-cat", token=TOKEN)
    make_concept("<my-dog>", "dog", seed=1).push_to_hub("me/my-dog", token=TOKEN)
    pipeline.load_perfusion(["me/my-cat", "me/my-dog"], concept_name=["rex", None])
    assert pipeline.list_perfusion() == ["rex", "my-dog"]


def test_private(hub, concept):
    concept.push_to_hub("me/my-cat", private=True, token=TOKEN)
    assert hub.repositories["me/my-cat"].private
    with pytest.raises(ValueError, match=r"'me/my-cat' is neither .* pass token= if it is private"):
        find_concept_file("me/my-cat")
    with pytest.raises(ValueError, match=r"'me/my-cat' is neither .* pass token= if it is private"):
        find_concept_file("me/my-cat", token="hf_you")
    assert find_concept_file("me/my-cat", token=TOKEN).is_file()


def test_private_is_never_public(hub, concept):
    hub.add("me/my-cat", {})
    with pytest.raises(ValueError, match="the repository me/my-cat is public already"):
        concept.push_to_hub("me/my-cat", private=True, token=TOKEN)
    assert not files(hub)


def test_a_pull_request_leaves_the_branch(hub, concept):
    hub.add("me/my-cat", {})
    commit = concept.push_to_hub("me/my-cat", create_pr=True, token=TOKEN)
    assert commit.pr_url == f"{hub.endpoint}/me/my-cat/discussions/1"
    assert not files(hub)
    assert WEIGHT_NAME in files(hub, revision="refs/pr/1")


def test_a_pull_request_to_another_s_repository(hub, concept):
    hub.add("you/my-cat", {})
    concept.push_to_hub("you/my-cat", create_pr=True, token=TOKEN)
    assert WEIGHT_NAME in files(hub, "you/my-cat", "refs/pr/1")
    with pytest.raises(OSError, match=r"the push to you/my-cat failed: your token does not allow it \(403\)"):
        concept.push_to_hub("you/my-cat", token=TOKEN)


@pytest.mark.parametrize("gallery", ["5", "text", "[5, {text: a}, {text: a, output: {url: [b]}}]"])
def test_a_card_that_someone_wrote_is_no_obstacle(hub, make_concept, tmp_path, monkeypatch, gallery):
    content = make_concept().save(tmp_path / "cat.safetensors").read_bytes()
    written = f"---\nlicense: mit\nwidget: {gallery}\n---\nMine.".encode()
    hub.add("me/pets", {"README.md": written, "cat.safetensors": content})
    # A folder of the same name is not the repository.
    (tmp_path / "me" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    make_concept("<my-dog>", "dog").push_to_hub("me/pets", weight_name="dog.safetensors", token=TOKEN)
    assert "# 2 concepts" in card(hub, "me/pets") and "license: mit" in card(hub, "me/pets")
    assert "\nMine." in card(hub, "me/pets")


def edit_card(hub, old, new, repo_id="me/my-cat"):
    """Edit a card by hand, in a commit of its own."""
    changed = files(hub, repo_id) | {"README.md": card(hub, repo_id).replace(old, new, 1).encode()}
    hub.repositories[repo_id].commit("main", changed)


def test_what_was_written_by_hand_stays(hub, concept):
    concept.push_to_hub("me/my-cat", samples=[("a <my-cat>", image())], license="mit", token=TOKEN)
    edit_card(hub, "license: mit", "license: mit\nlanguage: fr")
    edit_card(hub, "pipeline_tag: text-to-image", "pipeline_tag: image-to-image")
    edit_card(hub, "<!-- diffusers-perfusion: begin", "My cat is called Rex.\n\n<!-- diffusers-perfusion: begin")
    hub.repositories["me/my-cat"].commit("main", files(hub) | {"images/perfusion/rex.png": b"", "rex.txt": b""})
    concept.bias = 0.9
    concept.push_to_hub("me/my-cat", samples=[("a <my-cat> in snow", image())], token=TOKEN)
    for kept in ("license: mit", "language: fr", "pipeline_tag: image-to-image", "My cat is called Rex."):
        assert kept in card(hub)
    assert "| β | 0.9;" in card(hub) and card(hub).count("| β |") == 1
    assert "a <my-cat> in snow" in card(hub) and "text: a <my-cat>\n" not in card(hub)
    assert {"images/perfusion/rex.png", "rex.txt"} < files(hub).keys()


def test_the_readme_of_a_whole_model_stays(hub, concept, pipeline, caplog):
    pipeline.push_to_hub("me/whole", token=TOKEN)
    edit_card(hub, "library_name: diffusers", "library_name: diffusers\nlicense: mit", "me/whole")
    before = card(hub, "me/whole")
    for _ in range(2):
        concept.push_to_hub("me/whole", token=TOKEN)
        assert before.split("---\n", 2)[2].rstrip() in card(hub, "me/whole")
        assert "pipe.load_perfusion('me/whole')" in card(hub, "me/whole")
        assert "library_name: diffusers\nlicense: mit\ntags:" in card(hub, "me/whole")
    assert "me/whole" in [found.id for found in search_concepts()]
    concept.push_to_hub("me/whole", license="cc-by-4.0", token=TOKEN)
    assert "license: mit" in card(hub, "me/whole") and "keeps its licence, mit; write in it that" in caplog.text


def test_the_same_push_twice_is_one(hub, concept):
    samples = [("a <my-cat>", image())]
    first = concept.push_to_hub("me/my-cat", samples=samples, license="mit", token=TOKEN)
    again = concept.push_to_hub("me/my-cat", samples=samples, token=TOKEN)
    assert again.oid == first.oid and len(hub.repositories["me/my-cat"].commits) == 2


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_concept_of_another_token_is_not_replaced(hub, concept, make_concept, create_pr):
    concept.push_to_hub("me/my-cat", token=TOKEN)
    dog = make_concept("<my-dog>", "dog", seed=1)
    with pytest.raises(ValueError, match="is the concept <my-cat>; choose another weight_name for <my-dog>"):
        dog.push_to_hub("me/my-cat", create_pr=create_pr, token=TOKEN)
    assert read_header("me/my-cat")[2].placeholder_token == "<my-cat>"
    dog.push_to_hub("me/my-cat", weight_name="dog.safetensors", token=TOKEN)
    assert {WEIGHT_NAME, "dog.safetensors"} < files(hub).keys()
    make_concept("<my-cat>", "lion", seed=2).push_to_hub("me/my-cat", token=TOKEN)
    assert read_header("me/my-cat")[2].superclass == "lion"


@pytest.mark.parametrize("held", [b"", b"PK" + bytes(100), struct.pack("<Q", 2) + b"{}"])
def test_a_file_that_is_no_concept_is_not_replaced(hub, concept, held):
    hub.add("me/my-cat", {WEIGHT_NAME: held})
    with pytest.raises(ValueError, match="is no concept that this release reads; choose another weight_name"):
        concept.push_to_hub("me/my-cat", token=TOKEN)
    assert files(hub) == {WEIGHT_NAME: held}


def test_a_readme_that_cannot_be_read_is_not_replaced(hub, concept):
    for readme, match in (
        (b"---\nlicense: [\n---\nMine.", r"README\.md cannot be read, .* mend it"),
        (b" " * (2**20 + 1), r"the size of README\.md is 1048577; expected at most"),
    ):
        hub.add("me/my-cat", {"README.md": readme})
        with pytest.raises(ValueError, match=match):
            concept.push_to_hub("me/my-cat", token=TOKEN)
        assert files(hub) == {"README.md": readme}


def test_a_branch_is_made(hub, concept, make_concept, pipeline):
    concept.push_to_hub("me/my-cat", token=TOKEN)
    make_concept(bias=0.9).push_to_hub("me/my-cat", revision="v2", token=TOKEN)
    make_concept(bias=0.8).push_to_hub("me/my-cat", revision="v2", token=TOKEN)
    assert read_header("me/my-cat")[2].bias == concept.bias
    assert read_header("me/my-cat", revision="v2")[2].bias == 0.8
    pipeline.load_perfusion("me/my-cat", revision="v2")


@pytest.mark.parametrize(
    "name",
    [
        "cat.bin",
        "../cat.safetensors",
        "cats/cat.safetensors",
        "",
        ".safetensors",
        "..safetensors",
        "a\nb.safetensors",
        f"{'é' * 122}.safetensors",
    ],
)
def test_the_name_of_the_file_is_one(hub, concept, name):
    with pytest.raises(ValueError, match=r"weight_name is .*; expected the name of a file that ends in \.safetensors"):
        concept.push_to_hub("me/my-cat", weight_name=name, token=TOKEN)
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo_id", "token", "match"),
    [
        (
            "me/my-cat",
            None,
            r"neither found nor made, .*: the Hub does not know you; log in .* \(401\)",
        ),
        (
            "you/my-cat",
            TOKEN,
            r"neither found nor made, .*: your token does not allow it \(403\)",
        ),
    ],
)
def test_a_user_who_may_not_write_is_told_why(hub, concept, repo_id, token, match):
    with pytest.raises(OSError, match=match):
        concept.push_to_hub(repo_id, token=token)
    assert not hub.repositories


# what a new user meets


@pytest.mark.parametrize(
    "repo_id", ["datasets/me/x", "https://huggingface.co/me/my-cat", "me/my-cat/", "me/my cat", ""]
)
def test_what_is_no_id_is_named(hub, concept, repo_id):
    with pytest.raises(ValueError, match=rf"^'{repo_id}' is not the id of a repository of models, such as me/my-cat$"):
        concept.push_to_hub(repo_id, token=TOKEN)
    assert not hub.requests


@pytest.mark.parametrize("sample", [("a <my-cat>", "cat.png"), (image(), "a <my-cat>")], ids=["a path", "swapped"])
def test_a_sample_that_is_no_image(hub, concept, sample):
    with pytest.raises(ValueError, match="samples has a str; expected pairs of a prompt and an image"):
        concept.push_to_hub("me/my-cat", samples=[sample], token=TOKEN)
    assert not hub.requests


def test_a_licence_that_the_hub_does_not_know(hub, concept):
    with pytest.raises(OSError, match=r'"license" must be one of \[mit, cc-by-4.0\]; .* holds nothing of this push'):
        concept.push_to_hub("me/my-cat", license="free for all", token=TOKEN)


def test_a_renamed_repository_is_found_by_its_old_name(hub, concept, pipeline):
    hub.add("me/new", {"README.md": b"Mine."})
    hub.moved["me/old"] = "me/new"
    commit = concept.push_to_hub("me/old", token=TOKEN)
    assert commit.commit_url.startswith(f"{hub.endpoint}/me/new/commit/")
    assert set(hub.repositories) == {"me/new"}
    assert "pipe.load_perfusion('me/new')" in card(hub, "me/new") and "Mine." in card(hub, "me/new")
    pipeline.load_perfusion("me/old")
    assert read_header("me/old")[2].superclass == "cat"


def test_a_pull_request_needs_no_branch_of_one_s_own(hub, concept):
    yours = hub.add("you/my-cat", {"README.md": b"Yours."})
    yours.branches["next"] = yours.branches["main"]
    concept.push_to_hub("you/my-cat", create_pr=True, revision="next", token=TOKEN)
    assert b"Yours." in files(hub, "you/my-cat", "refs/pr/1")["README.md"]
    with pytest.raises(OSError, match="the push to you/my-cat failed: it has no such revision; "):
        concept.push_to_hub("you/my-cat", create_pr=True, revision="none", token=TOKEN)
    assert set(yours.branches) == {"main", "next", "refs/pr/1"}


def test_a_pull_request_to_a_repository_that_is_gated(hub, concept, content):
    hub.add("you/my-cat", {"README.md": b"Yours.", "dog.safetensors": content}, gated=True)
    with pytest.raises(OSError, match="the push to you/my-cat failed: it is gated; accept its conditions"):
        concept.push_to_hub("you/my-cat", create_pr=True, token=TOKEN)


@pytest.mark.parametrize("token", ["<🐻>", "<クマ>", "<x-*_|`>"])
def test_a_token_of_any_letters(hub, make_concept, pipeline, token):
    make_concept(token, base_model="me/tiny").push_to_hub("me/bear", weight_name="🐻.safetensors", token=TOKEN)
    assert read_header("me/bear", "🐻.safetensors")[2].placeholder_token == token
    (code,) = re.findall(r"```python\n(.*?)```", card(hub, "me/bear"), re.DOTALL)
    assert f"weight_name={'🐻.safetensors'!a}" in code
    pipeline.load_perfusion("me/bear", weight_name="🐻.safetensors")
    assert pipeline.list_perfusion() == [token[1:-1]]


def test_a_card_of_an_editor_of_windows(hub, concept):
    hub.add("me/my-cat", {"README.md": "\ufeff---\r\nlicense: mit\r\n---\r\nMine.\r\n".encode()})
    for _ in range(2):
        concept.push_to_hub("me/my-cat", token=TOKEN)
        text = card(hub)
        assert "license: mit\r\nbase_model: me/tiny\r\n" in text and "Mine.\r\n" in text
        assert text.count("\n") == text.count("\r\n") and text.count("---\r\n") == 2


def test_a_push_beside_large_files_does_not_read_them(hub, concept, monkeypatch):
    monkeypatch.setattr("diffusers_perfusion.hub.MAX_FILE_BYTES", 2**18)
    hub.add("me/my-cat", {"model.safetensors": bytes(2**18 + 1), "unet/model.safetensors": b""})
    concept.push_to_hub("me/my-cat", token=TOKEN)
    assert not [path for _, path, *_ in hub.requests if "model.safetensors" in path]


def test_an_empty_file_is_no_concept(hub, concept):
    hub.add("me/my-cat", {"empty.safetensors": b""})
    concept.push_to_hub("me/my-cat", token=TOKEN)
    assert files(hub)["empty.safetensors"] == b""
    with pytest.raises(ValueError, match=r"me/my-cat/empty\.safetensors is not a valid concept file: it is truncated"):
        read_header("me/my-cat", "empty.safetensors", token=TOKEN)


def test_a_push_has_time_for_each_concept_beside_it(hub, concept, content, monkeypatch):
    """It reads the headers of all, for the card."""
    payloads = []

    class Noted(BoundedHub):
        def __init__(self, *, payload=0, **options):
            payloads.append(payload)
            super().__init__(payload=payload, **options)

    monkeypatch.setattr("diffusers_perfusion.hub.BoundedHub", Noted)
    hub.add("me/pets", {f"{number}.safetensors": content for number in range(3)})
    concept.push_to_hub("me/pets", token=TOKEN)
    assert "# 4 concepts" in card(hub, "me/pets")
    assert 3 * MAX_HEADER_BYTES < max(payloads) < 4 * MAX_HEADER_BYTES


def test_a_push_needs_no_cache(hub, concept, tmp_path, monkeypatch):
    hub.add("me/my-cat", {"README.md": b"Mine."})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    concept.push_to_hub("me/my-cat", token=TOKEN)
    assert "Mine." in card(hub)


def hang_up(handler):
    raise ConnectionAbortedError


def hang_up_afterwards(handler):
    handler.mute = True


def limit(handler):
    raise Refusal(429, "", "We had to rate limit you")


def overtake(handler):
    raise Refusal(412, "", "A commit has happened since")


@pytest.mark.parametrize(
    ("route", "fault", "match"),
    [
        (
            "/api/models/me/my-cat",
            limit,
            r"was neither found nor made, so nothing was pushed: .* \(429\)",
        ),
        ("/preupload/", limit, r"wait some minutes \(429\); the repository .* holds nothing of this push; push again"),
        ("/preupload/", hang_up, "the repository is on the Hub and holds either all of this push or nothing of it"),
        ("/commit/", limit, r"wait some minutes \(429\); the repository .* holds nothing of this push; push again"),
        ("/commit/", hang_up, "the repository is on the Hub and holds either all of this push or nothing of it"),
        ("/commit/", hang_up_afterwards, "the repository is on the Hub and holds either all of this push or nothing"),
        ("/commit/", overtake, r"the repository was changed at the same time \(412\); .* nothing of this push"),
        ("/repos/create", hang_up, "the repository me/my-cat was neither found nor made, so nothing was pushed"),
    ],
)
def test_a_failed_push_says_what_to_do_and_can_be_repeated(hub, concept, route, fault, match):
    hub.fault = lambda handler: fault(handler) if route in handler.path else None
    with pytest.raises(OSError, match=match) as raised:
        concept.push_to_hub("me/my-cat", samples=[("a <my-cat>", image())], token=TOKEN)
    assert TOKEN not in str(raised.value) and "\n" not in str(raised.value)
    held = files(hub).keys() if hub.repositories else set()
    assert held in (set(), {".gitattributes"}) or fault is hang_up_afterwards
    hub.fault = lambda handler: None
    concept.push_to_hub("me/my-cat", samples=[("a <my-cat>", image())], token=TOKEN)
    assert files(hub).keys() == {".gitattributes", "README.md", WEIGHT_NAME, "images/perfusion/0.png"}
    assert find_concept_file("me/my-cat").read_bytes() == files(hub)[WEIGHT_NAME]


def test_two_who_push_at_once_do_not_lose_a_card(hub, concept):
    repository = hub.add("me/my-cat", {})
    hub.fault = lambda handler: repository.commit("main", {"other": b""}) if "/commit/" in handler.path else None
    with pytest.raises(OSError, match="the repository was changed at the same time"):
        concept.push_to_hub("me/my-cat", token=TOKEN)
    assert files(hub) == {"other": b""}


def test_a_base_model_that_is_not_on_the_hub_is_reported(hub, make_concept, caplog):
    make_concept(base_model="my-folder").push_to_hub("me/my-cat", token=TOKEN)
    assert "names its base model 'my-folder', which is not the id of a model on the Hub" in caplog.text
    assert "\nbase_model:" not in card(hub)


# pull


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "match"),
    [
        ({"source": "me/nothing"}, {}, ValueError, "'me/nothing' is neither a file or folder here nor a Hub repo"),
        ({"weight_name": "dog.safetensors"}, {}, FileNotFoundError, "me/my-cat has no dog.safetensors; choose a file"),
        ({"revision": "v9"}, {}, ValueError, "me/my-cat has no revision 'v9'"),
        ({}, {"gated": True}, ValueError, "me/my-cat is gated; accept its conditions"),
        ({"token": "hf_you"}, {"gated": True}, ValueError, "me/my-cat is gated; accept its conditions"),
        ({"weight_name": "../perfusion.safetensors"}, {}, ValueError, r"weight_name is '../perfusion.safetensors'"),
        ({"subfolder": "../my-dog"}, {}, ValueError, r"weight_name is '../my-dog/perfusion.safetensors'"),
        ({"force_download": True}, {"private": True}, ValueError, "'me/my-cat' is neither a file or folder"),
    ],
)
@pytest.mark.parametrize("read", [find_concept_file, read_header])
def test_each_refusal_says_why(hub, content, arguments, settings, error, match, read):
    if read is read_header and "force_download" in arguments:
        arguments = {}
    hub.add("me/my-cat", {WEIGHT_NAME: content}, **settings)
    with pytest.raises(error, match=match):
        read(**{"source": "me/my-cat", **arguments})


def cut(handler):
    handler.cut = 100


def claim_more(handler):
    handler.claim = 10**6


def claim_less(handler):
    handler.claim = 100


def is_file(handler):
    return "/resolve/" in handler.path


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (hang_up, "was not downloaded: "),
        (claim_more, "perfusion.safetensors of me/my-cat was not downloaded: .*should be of size 1000000"),
        (claim_less, "perfusion.safetensors of me/my-cat was not downloaded: .*should be of size 100 "),
        (limit, r"not in the cache, and it was not downloaded: the Hub limits the .*; wait some minutes \(429\)"),
    ],
)
def test_after_a_failed_download_the_cache_is_usable(hub, content, fault, match, pipeline):
    hub.add("me/my-cat", {WEIGHT_NAME: content})
    hub.fault = lambda handler: fault(handler) if is_file(handler) else None
    with pytest.raises(OSError, match=match) as raised:
        pipeline.load_perfusion("me/my-cat")
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError):
        find_concept_file("me/my-cat", local_files_only=True)
    hub.fault = lambda handler: None
    pipeline.load_perfusion("me/my-cat")


def test_a_cut_download_can_be_resumed(hub, content):
    hub.add("me/my-cat", {WEIGHT_NAME: content})
    cuts = []

    def cut_once(handler):
        if handler.command == "GET" and not cuts:
            cuts.append(handler.path)
            handler.cut = 100

    hub.fault = cut_once
    with suppress(OSError):  # before huggingface_hub 1 the client does not resume by itself
        find_concept_file("me/my-cat")
    assert find_concept_file("me/my-cat").read_bytes() == content
    assert cuts


def test_a_refused_file_is_taken_from_the_cache(hub, content):
    hub.add("me/my-cat", {WEIGHT_NAME: content})
    path = find_concept_file("me/my-cat")
    hub.fault = lambda handler: limit(handler)
    assert find_concept_file("me/my-cat") == path
    with pytest.raises(OSError, match=r"wait some minutes \(429\)"):
        find_concept_file("me/my-cat", force_download=True)


@pytest.mark.parametrize("read", [find_concept_file, read_header])
def test_a_file_too_large_for_a_concept_is_not_downloaded(hub, content, read):
    hub.add("me/my-cat", {WEIGHT_NAME: content})
    hub.fault = lambda handler: setattr(handler, "claim", MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=rf"the size of {WEIGHT_NAME} is {MAX_FILE_BYTES + 1}; expected at most"):
        read("me/my-cat")
    assert {method for method, *_ in hub.requests} == {"HEAD"}


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        b"<html>",
        header(b"{}"),
        header(b"[]"),
        header(b'{"a": 1}'),
        header(b"[" * 2000),
        header(b'{"a": {"dtype": [], "shape": 3, "data_offsets": [0, 1]}}'),
        struct.pack("<Q", 2**62),
    ],
    ids=range(9),
)
def test_a_file_of_another_format_under_the_right_name(hub, content, other, pipeline):
    hub.add("me/my-cat", {WEIGHT_NAME: other})
    with pytest.raises(ValueError, match=WEIGHT_NAME):
        read_header("me/my-cat")
    with pytest.raises(ValueError, match=WEIGHT_NAME):
        pipeline.load_perfusion("me/my-cat")
    hub.repositories["me/my-cat"].commit("main", {WEIGHT_NAME: content})
    pipeline.load_perfusion("me/my-cat")


def test_offline_after_one_download(hub, content, monkeypatch, pipeline):
    hub.add("me/my-cat", {WEIGHT_NAME: content})
    pipeline.load_perfusion("me/my-cat", "online")
    pipeline.unload_perfusion()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    pipeline.load_perfusion("me/my-cat", local_files_only=True)
    assert read_header("me/my-cat")[2].superclass == "cat"
    assert not hub.requests


# info, search


def test_the_header_is_read_by_range(hub, concept, tmp_path):
    concept.training = {"notes": "x" * 200_000}
    path = concept.save(tmp_path / WEIGHT_NAME)
    hub.add("me/my-cat", {f"step-1/{WEIGHT_NAME}": path.read_bytes()})
    name, size, found = read_header("me/my-cat", subfolder="step-1", token=TOKEN)
    assert (name, size) == (f"me/my-cat/step-1/{WEIGHT_NAME}", path.stat().st_size)
    assert found == read_header(path)[2]
    assert all(span for method, _, _, span in hub.requests if method == "GET")
    assert {token for _, _, token, _ in hub.requests} == {TOKEN}


def test_search_is_by_base_model(hub, make_concept):
    make_concept(base_model="me/tiny").push_to_hub("me/my-cat", token=TOKEN)
    make_concept(base_model="me/other").push_to_hub("me/my-dog", token=TOKEN)
    make_concept(base_model="me/tiny").push_to_hub("me/my-secret", private=True, token=TOKEN)
    hub.add("me/lora", {})
    assert [found.id for found in search_concepts()] == ["me/my-cat", "me/my-dog"]
    assert [found.id for found in search_concepts("me/tiny")] == ["me/my-cat"]
    assert [found.id for found in search_concepts("me/tiny", token=TOKEN)] == ["me/my-cat", "me/my-secret"]
    assert len(search_concepts(limit=1)) == 1
    for limit_ in (0, -5):
        with pytest.raises(ValueError, match=f"limit is {limit_}; expected at least 1"):
            search_concepts(limit=limit_)
    hub.fault = limit
    with pytest.raises(OSError, match=r"the search failed: .* \(429\)"):
        search_concepts()


# command line


def test_the_command_line(hub, concept, tmp_path, capsys):
    concept.training = {"no\x1b[2Jte": "\x1b]0;evil\x07"}
    path = concept.save(tmp_path / "trained" / WEIGHT_NAME)
    image().save(tmp_path / "beach.jpg")
    token = ["--token", TOKEN]
    sample = ["--sample", str(tmp_path / "beach.jpg"), "a <my-cat> on the beach"]
    assert main(["push", str(path.parent), "me/my-cat", *sample, "--license", "mit", "--private", *token]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.endpoint}/me/my-cat/commit/")
    assert "on the beach" in card(hub) and "license: mit" in card(hub)

    assert main(["info", "me/my-cat"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["info", "me/my-cat", *token]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"me/my-cat/{WEIGHT_NAME} ({path.stat().st_size:,} bytes)\n")
    assert "<my-cat>" in told and "\x1b" not in told
    assert not any(span is None for method, where, _, span in hub.requests if method == "GET" and "resolve" in where)

    assert main(["search", "me/tiny", *token]) == 0
    assert capsys.readouterr().out.split() == ["me/my-cat", "a", "photo", "of", "a", "<my-cat>"]

    assert main(["pull", "me/my-cat", "--output_dir", str(tmp_path / "pulled"), *token]) == 0
    assert (tmp_path / "pulled" / WEIGHT_NAME).read_bytes() == path.read_bytes()
    assert main(["push", str(path), "me/my-cat", "--create_pr", *token]) == 0
    assert capsys.readouterr().out.endswith("/discussions/2\n")


def test_a_file_that_is_not_a_concept_is_not_pulled(hub, tmp_path, capsys):
    hub.add("me/my-cat", {WEIGHT_NAME: b"PK" + bytes(100)})
    assert main(["pull", "me/my-cat", "--output_dir", str(tmp_path / "pulled")]) == 1
    assert not (tmp_path / "pulled").exists()


def test_one_concept_is_not_pulled_over_another(hub, make_concept, tmp_path, capsys):
    for name in ("cat", "dog"):
        make_concept(f"<{name}>", name).push_to_hub(f"me/{name}", token=TOKEN)
    folder = ["--output_dir", str(tmp_path / "pulled")]
    assert main(["pull", "me/cat", *folder]) == 0
    assert main(["pull", "me/dog", *folder]) == 1
    assert "is the concept <cat>; choose another folder or name for <dog>" in capsys.readouterr().err
    assert (tmp_path / "pulled" / WEIGHT_NAME).read_bytes() == files(hub, "me/cat")[WEIGHT_NAME]
    assert main(["pull", "me/cat", *folder]) == 0


# training


def test_training_shares_its_concept_and_nothing_else(hub, pipeline, training_settings, tmp_path):
    config = TrainingConfig(
        **training_settings,
        checkpointing_steps=2,
        validation_prompt=["a <my-cat> on the beach"],
        num_validation_images=2,
        push_to_hub=True,
        hub_token=TOKEN,
        hub_private=True,
    )
    assert TOKEN not in repr(config) and TOKEN not in json.dumps(config.recipe())
    train(pipeline, config)
    images = {"images/perfusion/0.png", "images/perfusion/1.png"}
    assert files(hub, "me/output").keys() == {".gitattributes", "README.md", WEIGHT_NAME} | images
    assert hub.repositories["me/output"].private
    assert {token for _, _, token, _ in hub.requests} == {TOKEN}
    output = Path(config.output_dir)
    assert files(hub, "me/output")[WEIGHT_NAME] == (output / WEIGHT_NAME).read_bytes()
    assert pipeline.list_perfusion() == []
    for content in [path.read_bytes() for path in output.rglob("*") if path.is_file()] + list(
        files(hub, "me/output").values()
    ):
        assert TOKEN.encode() not in content
    for content in files(hub, "me/output").values():
        assert str(tmp_path).encode() not in content


def test_training_that_may_not_share_does_not_start(hub, pipeline, training_settings):
    config = TrainingConfig(**training_settings, push_to_hub=True, hub_model_id="you/my-cat", hub_token=TOKEN)
    with pytest.raises(OSError, match=r"the repository you/my-cat was neither found nor made, .*: your token"):
        train(pipeline, config)
    assert [path.name for path in Path(config.output_dir).iterdir()] == [".lock"]


def test_training_whose_push_fails_says_how_to_push(hub, pipeline, training_settings):
    config = TrainingConfig(**training_settings, push_to_hub=True, hub_model_id="me/my-cat", hub_token=TOKEN)
    hub.fault = lambda handler: limit(handler) if "/commit/" in handler.path else None
    path = Path(config.output_dir) / WEIGHT_NAME
    with pytest.raises(OSError, match=re.escape(f"`perfusion push {path} me/my-cat`")):
        train(pipeline, config)
    hub.fault = lambda handler: None
    assert main(["push", str(path), "me/my-cat", "--token", TOKEN]) == 0


# from training to another machine

READER = """
import sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
exec(sys.stdin.read())
image.save(sys.argv[1])
"""

OFFLINE_READER = """
import sys
from diffusers_perfusion.hub import find_concept_file
print(find_concept_file("me/my-cat"))
"""


def test_a_reader_generates_the_author_s_image(hub, training_settings, tmp_path):
    """Train on the pocket model and push; on another machine run the card's code as printed."""
    pocket = {path.relative_to(POCKET).as_posix(): path.read_bytes() for path in POCKET.rglob("*") if path.is_file()}
    hub.add("me/pocket", pocket)
    captions = tmp_path / "few.txt"
    captions.write_text("\n".join((POCKET / "captions.txt").read_text().splitlines()[:300]))
    settings = training_settings | {
        "pretrained_model_name_or_path": "me/pocket",
        "covariance": str(captions),
        "max_train_steps": 2,
        "train_batch_size": 2,
    }
    author = PerfusionPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    train(author, TrainingConfig(**settings, push_to_hub=True, hub_model_id="me/my-cat", hub_token=TOKEN))

    (code,) = re.findall(r"```python\n(.*?)```", card(hub), re.DOTALL)
    author = PerfusionPipeline.from_pretrained(POCKET, torch_dtype=torch.float32)
    author.load_perfusion(settings["output_dir"])
    torch.manual_seed(0)
    expected = author("a photo of a <my-cat>").images[0]

    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "another-machine"),
        "HF_HUB_DISABLE_XET": "1",
    }
    online = [sys.executable, "-c", READER, str(tmp_path / "generated.png")]
    subprocess.run(online, input=code, text=True, check=True, env=environment)
    with Image.open(tmp_path / "generated.png") as generated:
        assert generated.tobytes() == expected.tobytes()
    hub.requests.clear()
    offline = [sys.executable, "-c", OFFLINE_READER]
    found = subprocess.run(
        offline, stdout=subprocess.PIPE, text=True, check=True, env=environment | {"HF_HUB_OFFLINE": "1"}
    ).stdout
    assert Path(found.strip()).read_bytes() == files(hub)[WEIGHT_NAME]
    assert not hub.requests
