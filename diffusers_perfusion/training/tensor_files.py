"""Tensors in files that somebody else has made: no code in them runs, and none takes more memory than a file holds."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as deserialize
from torch import Tensor

# A covariance of width 4096 in float64 has half of them.
MAX_BYTES = 256 * 2**20


def read_tensors(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Return what `torch.save` has put into a file, or the tensors of a `.safetensors` file by their names.

    What happens to the file afterwards does not change them.

    Args:
        path: of the file.
        max_bytes: the largest size that it may have, of a zip file also once it is unpacked.

    Raises:
        ValueError: if it is larger, or a pickle that holds more than tensors.
        Exception: if it is broken; each reader has errors of its own.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    if size > max_bytes:
        raise ValueError(f"it has {size} bytes; expected at most {max_bytes}")
    if path.suffix == ".safetensors":
        return deserialize(path.read_bytes())
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it is broken, or holds more than tensors, which could run code") from error


def check_extent(tensor: Tensor) -> Tensor:
    """Return a tensor of a file, or raise ValueError if it has more numbers than the file holds.

    With strides of zero a tensor of a few bytes may have any shape, and a copy of it has all of its numbers.
    """
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > held:
        raise ValueError(f"a tensor in it is of shape {tuple(tensor.shape)}, but only {held} of its numbers are there")
    return tensor
