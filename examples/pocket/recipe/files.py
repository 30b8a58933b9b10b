"""Outputs that appear whole or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def finished(path):
    """A temporary path beside `path` for a file or a folder; it takes the name of `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    if temporary.is_dir():  # of a run that was stopped
        shutil.rmtree(temporary)
    yield temporary
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(temporary, path)


def save_array(path, array):
    """Write an array as .npy."""
    with finished(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
