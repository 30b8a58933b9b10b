"""Captions beside training images, in the two forms in which people have them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusers_perfusion.training import images
from diffusers_perfusion.training.image_captions import read_image_captions, training_prompt, without_captions


@pytest.fixture
def paths(tmp_path):
    """Three images."""
    found = [tmp_path / name for name in ("1.png", "2.jpg", "three.of.them.png")]
    for path in found:
        Image.new("RGB", (8, 8)).save(path)
    return found


def write_metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )


def test_images_without_captions_have_none(paths):
    assert read_image_captions(paths) == [None] * 3
    assert read_image_captions([]) == []


def test_a_text_beside_an_image_is_its_caption(paths, tmp_path):
    (tmp_path / "1.txt").write_text("\ufeff a dog\n on the beach \n", encoding="utf-8")
    (tmp_path / "2.txt").write_text(" \n")
    (tmp_path / "three.of.them.txt").write_text("un chien à l'école", encoding="utf-8")
    (tmp_path / "4.txt").write_text("of no image")
    assert read_image_captions(paths) == ["a dog on the beach", None, "un chien à l'école"]


def test_metadata_has_captions_by_file_name(paths, tmp_path, caplog):
    lines = {"file_name": "1.png", "text": "a dog"}, "", {"file_name": "2.jpg", "text": "a cat", "more": [1]}
    write_metadata(tmp_path, *lines, {"file_name": "gone.png", "text": "a cow"})
    (tmp_path / "2.txt").write_text("beside it")
    assert read_image_captions(paths) == ["a dog", "beside it", None]
    assert "gone.png" in caplog.text


def test_metadata_may_come_from_other_systems(paths, tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "1.png", "text": "a dog"}\r\n\r\n')
    assert read_image_captions(paths) == ["a dog", None, None]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"text"',
        "[" * 100_000,
        '{"file_name": "1.png"}',
        '{"file_name": 1, "text": "a"}',
        '{"file_name": "1.png", "text": ["a"]}',
    ],
)
def test_a_broken_line_is_named(paths, tmp_path, line):
    write_metadata(tmp_path, {"file_name": "1.png", "text": "a dog"}, line)
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: .*file_name.*text"):
        read_image_captions(paths)


@pytest.mark.parametrize("data", ["un café".encode("latin-1"), "a dog".encode("utf-16")])
@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl"])
def test_a_file_that_is_no_text_is_named(paths, tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text; expected the caption of an image, saved as"):
        read_image_captions(paths)


def test_images_are_read_with_their_captions_and_no_word_of_the_files(paths, tmp_path, caplog):
    (tmp_path / "2.txt").write_text("a cat")
    write_metadata(tmp_path, {"file_name": "three.of.them.png", "text": "a cow"})
    assert [image.caption for image in images.read_images(tmp_path, 8)] == [None, "a cat", "a cow"]
    assert not caplog.records


def test_a_text_of_no_image_is_no_caption():
    files = [Path(name) for name in ("1.png", "1.txt", "2.txt", "captions.txt", "metadata.jsonl", "1.png.txt")]
    assert [path.name for path in without_captions(files)] == ["1.png", "2.txt", "captions.txt", "1.png.txt"]


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("a photo of <my-bear>, a teddy bear", "a photo of <my-bear>, a teddy bear"),
        ("a {} on a street", "a <my-bear> on a street"),
        ("A Teddy Bear and a teddy bear", "A <my-bear> and a teddy bear"),
        ("teddy bear's house", "<my-bear>'s house"),
        ("(teddy bear)", "(<my-bear>)"),
    ],
)
def test_a_caption_names_the_subject_by_token_gap_or_super_class(caption, prompt):
    assert training_prompt(caption, "<my-bear>", "teddy bear") == prompt


@pytest.mark.parametrize("caption", ["a bear on a street", "teddy bears", "myteddy bear", ""])
def test_a_caption_that_does_not_name_the_subject_is_refused(caption):
    with pytest.raises(ValueError, match=r"does not name the subject; expected <my-bear>, \{\} or 'teddy bear' in it"):
        training_prompt(caption, "<my-bear>", "teddy bear")


def test_a_super_class_is_no_pattern_and_a_token_no_template():
    assert training_prompt("a c.t or a c++ c4t", r"\1<my>", "c4t") == r"a c.t or a c++ \1<my>"
    assert training_prompt("a robot (r2)", "<my>", "robot (r2)") == "a <my>"
