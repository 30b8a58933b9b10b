"""Atomic writes of files, and file names made from text."""

import os
import secrets
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old file or none, but never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def slug(text: str) -> str:
    """Return a text, such as a prompt, in a form that can be part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())[:80]
