"""Files are written whole or not at all."""

import errno
import os
import stat

import numpy as np
import pytest
from PIL import Image

from diffusers_perfusion.files import (
    check_writable,
    delete_temporaries,
    slug,
    temporary_beside,
    to_png,
    write_atomically,
)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*args):
        raise error

    monkeypatch.setattr(os, call, crash)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file_and_is_an_error_with_its_name(tmp_path, full_disk):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with full_disk(2), pytest.raises(OSError, match=rf"^\[Errno {errno.EFBIG}\] File too large: '{path}'$"):
        write_atomically(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_folder_that_is_gone_is_an_error_with_the_file_s_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"directory: '{tmp_path}/gone/file'$"):
        write_atomically(tmp_path / "gone" / "file", b"new")


def test_every_name_that_a_file_can_have_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write_atomically(tmp_path / name, b"new")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_has_the_permissions_of_any_other_new_file(tmp_path, monkeypatch):
    (tmp_path / "other").touch()
    monkeypatch.setattr(os, "umask", None)  # it belongs to the whole process, threads of others included
    write_atomically(tmp_path / "file", b"new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path):
    kept = ["file", ".file", ".file-0123456789abcdef", "[a]"]
    for name in kept:
        (tmp_path / name).touch()
    for name in ("file", "[a]", "[a]"):
        temporary_beside(tmp_path / name).touch()
    folder = temporary_beside(tmp_path / "folder")
    folder.mkdir()
    (folder / "part").touch()
    delete_temporaries(tmp_path, "[a]")
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    delete_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    delete_temporaries(tmp_path / "nowhere")


def test_a_folder_is_tried_before_it_is_written(tmp_path, full_disk):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(NotADirectoryError, match=rf"'{folder}'$"):
            check_writable(folder)
    with full_disk(), pytest.raises(OSError, match=rf"File too large: '{tmp_path}'$"):
        check_writable(tmp_path)


def test_an_image_becomes_a_png(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8))
    (tmp_path / "1.png").write_bytes(to_png(image))
    with Image.open(tmp_path / "1.png") as file:
        assert file.format == "PNG"
        assert np.array_equal(np.asarray(file), np.asarray(image))


def test_a_prompt_becomes_a_file_name():
    assert slug("a <my-cat>: on/the beach!") == "a-my-cat-on-the-beach"
    assert len(slug("x" * 100)) == 80
    assert slug("猫" * 100) == "猫" * 26
