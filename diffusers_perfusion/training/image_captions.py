"""Captions of the training images themselves: what a caption names is not learned into the concept."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging

logger = logging.get_logger(__name__)

METADATA_NAME = "metadata.jsonl"


def read_image_captions(paths: Sequence[Path]) -> list[str | None]:
    """Return the caption of each image in a folder, or None for an image without one.

    A caption is the text of a `.txt` file beside the image and of its name, or else the `text` of the line with its
    `file_name` in `metadata.jsonl`, as `datasets.load_dataset("imagefolder")` reads it. An empty one is none.

    Args:
        paths: of the images, all in one folder.

    Raises:
        ValueError: if a file is no UTF-8 text, or a line of `metadata.jsonl` no JSON object with both keys.
    """
    if not paths:
        return []
    listed = _read_metadata(paths[0].parent / METADATA_NAME)
    if unknown := sorted(set(listed) - {path.name for path in paths}):
        logger.warning(f"{METADATA_NAME} has captions of {', '.join(unknown)}, which are no images in its folder.")
    captions: list[str | None] = []
    for path in paths:
        beside = path.with_suffix(".txt")
        caption = _read_text(beside) if beside.is_file() else listed.get(path.name, "")
        captions.append(" ".join(caption.split()) or None)
    return captions


def without_captions(paths: Sequence[Path]) -> list[Path]:
    """Return the files of a folder without `metadata.jsonl` and without texts that have the name of another file."""
    named = {path.stem for path in paths if path.suffix != ".txt"}
    return [
        path for path in paths if path.name != METADATA_NAME and not (path.suffix == ".txt" and path.stem in named)
    ]


def training_prompt(caption: str, placeholder_token: str, superclass: str) -> str:
    """Return the prompt that a caption stands for, with the placeholder token where it names the subject.

    Args:
        caption: with the placeholder token, a gap `{}`, or the super-class, whose first occurrence is replaced.
        placeholder_token: of the concept.
        superclass: in plain words; capital letters make no difference.

    Raises:
        ValueError: if the caption has none of the three.
    """
    if placeholder_token in caption:
        return caption
    if "{}" in caption:
        return caption.replace("{}", placeholder_token)
    prompt, found = re.subn(
        rf"(?<!\w){re.escape(superclass)}(?!\w)",
        lambda match: placeholder_token,
        caption,
        count=1,
        flags=re.IGNORECASE,
    )
    if not found:
        raise ValueError(
            f"the caption {caption!r:.200} does not name the subject; expected {placeholder_token}, {{}} or "
            f"{superclass!r} in it"
        )
    return prompt


def _read_metadata(path: Path) -> dict[str, str]:
    """Return the captions of a `metadata.jsonl` by file name; none if there is no such file."""
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
            name, caption = entry["file_name"], entry["text"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f'{path}, line {number}: expected {{"file_name": "1.png", "text": "…"}}') from error
        if not (isinstance(name, str) and isinstance(caption, str)):
            raise ValueError(f"{path}, line {number}: file_name and text are expected to be strings")
        captions[name] = caption
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its encoding
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; expected the caption of an image, saved as UTF-8") from error
