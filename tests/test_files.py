"""Files are written whole or not at all."""

import os
import stat

import pytest

from diffusers_perfusion.files import slug, write_atomically


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
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


def test_a_file_has_the_permissions_of_any_other_new_file(tmp_path, monkeypatch):
    (tmp_path / "other").touch()
    monkeypatch.setattr(os, "umask", None)  # it belongs to the whole process, threads of others included
    write_atomically(tmp_path / "file", b"new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_prompt_becomes_a_file_name():
    assert slug("a <my-cat>: on/the beach!") == "a-my-cat-on-the-beach"
    assert len(slug("x" * 100)) == 80
