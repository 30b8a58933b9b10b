"""Writing files so that no accident leaves a part of one, and file names made from text."""

import glob
import io
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

# A name of their own, by which the next run finds what a killed one has left, and deletes nothing else.
_TEMPORARY_SUFFIX = ".perfusion-part"
# About what a concept file takes: a disk that is full to the last byte still makes empty files.
_PROBE = bytes(2**16)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old file or none, but never a part.

    Raises:
        OSError: if it cannot be written; with its name.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # its folder may be gone
            temporary.unlink()
        if isinstance(error, OSError):
            raise error_of(path, error) from error
        raise


def error_of(path: Path, error: OSError) -> OSError:
    """Return an error of the operating system that names a file or folder, and not a temporary one beside it."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def temporary_beside(path: Path) -> Path:
    """Return a new hidden name in the folder of a file or folder, for what will become it or is being deleted."""
    return path.with_name(f".{path.name[:50]}-{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}")


def delete_temporaries(folder: Path, start: str = "") -> None:
    """Delete what killed processes have left in a folder.

    Args:
        folder: in which no other process may be writing files of these names.
        start: of the names of the files and folders that were being written; by default of any.
    """
    for path in folder.glob(f".{glob.escape(start[:50])}*{_TEMPORARY_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be written into a folder, which need not exist yet."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(_PROBE)
            file.flush()
    except OSError as error:
        raise error_of(folder, error) from error


def to_png(image: Any) -> bytes:
    """Return an image of Pillow as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def slug(text: str) -> str:
    """Return a text, such as a prompt, in a form that can be part of a file name."""
    words = "-".join("".join(c if c.isalnum() else " " for c in text).split())
    return words.encode()[:80].decode(errors="ignore")  # a file system counts the bytes of a name
