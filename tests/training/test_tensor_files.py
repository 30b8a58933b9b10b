"""Files of strangers with tensors: what they hold is copied, and nothing else comes of them."""

import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from diffusers_perfusion.training.tensor_files import MAX_BYTES, check_extent, read_tensors


class Code:
    def __reduce__(self):
        return print, ("a stranger's code ran",)


@pytest.mark.parametrize(("save", "suffix"), [(save_file, "safetensors"), (torch.save, "pt"), (torch.save, "bin")])
def test_tensors_do_not_change_with_their_file(tmp_path, save, suffix):
    path = tmp_path / f"a.{suffix}"
    save({"a": torch.ones(4)}, path)
    tensors = read_tensors(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(tensors["a"], torch.ones(4))


def test_code_is_not_run(tmp_path, capfd):
    torch.save({"a": Code()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="it is broken, or holds more than tensors, which could run code"):
        read_tensors(tmp_path / "a.pt")
    assert "stranger" not in capfd.readouterr().out


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(4)}, path)
    size = path.stat().st_size
    with pytest.raises(ValueError, match=rf"it has {size} bytes; expected at most {size - 1}"):
        read_tensors(path, size - 1)
    assert read_tensors(path, size)
    os.truncate(path, MAX_BYTES + 1)
    with pytest.raises(ValueError, match=f"it has {MAX_BYTES + 1} bytes; expected at most {MAX_BYTES}"):
        read_tensors(path)


def test_a_zip_file_is_as_large_as_what_it_unpacks_to(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2):
            archive.writestr(f"archive/data/{number}", bytes(2**20))
    with pytest.raises(ValueError, match=f"it has {2**21} bytes; expected at most {2**21 - 1}"):
        read_tensors(path, 2**21 - 1)


def test_a_tensor_has_no_more_numbers_than_its_file(tmp_path):
    stored = torch.ones(6, dtype=torch.float16)
    for tensor in (stored, stored.reshape(2, 3).T, stored[1:3], stored[:0], stored[0]):
        assert check_extent(tensor) is tensor
    for tensor in (stored[:1].expand(7), torch.as_strided(stored, (2**20, 2**20), (0, 0))):
        torch.save({"a": tensor}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"is of shape \(.*\), but only [16] of its numbers are there"):
            check_extent(read_tensors(tmp_path / "a.pt")["a"])
