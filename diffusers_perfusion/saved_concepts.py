"""Concepts beside the models of a saved pipeline: `perfusion/concepts.json` has the file of each by its name.

Files that are not in that list are not the pipeline's: somebody has put them there, so they are neither loaded nor
deleted.
"""

import json
import logging
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

from .concept import PerfusionConcept
from .concept_file import printable
from .files import slug, write_atomically
from .hub import download

logger = logging.getLogger(__name__)

FOLDER = "perfusion"
_INDEX = "concepts.json"
_MAX_INDEX_BYTES = 2**20


def save_concepts(save_directory: str | os.PathLike, concepts: Mapping[str, PerfusionConcept]) -> None:
    """Write the concepts of a pipeline into the folder that it is saved in, in place of those of an earlier save.

    Raises:
        ValueError: if a concept cannot be saved, or the list of an earlier save cannot be read.
    """
    folder = Path(save_directory) / FOLDER
    if not concepts and not folder.exists():
        return
    earlier = set(_read_index(folder / _INDEX).values())
    folder.mkdir(parents=True, exist_ok=True)
    taken = {file.name.casefold() for file in folder.iterdir() if file.name not in earlier}
    names: dict[str, str] = {}
    for name in concepts:
        stem = slug(name)[:40] or "concept"  # a name may be longer than that of a file
        files = (f"{stem}{f'-{number}' if number else ''}.safetensors" for number in count())
        names[name] = next(file for file in files if file.casefold() not in taken)
        taken.add(names[name].casefold())
    for name, concept in concepts.items():
        concept.save(folder / names[name])
    write_atomically(folder / _INDEX, (json.dumps(names, indent=2) + "\n").encode())
    for file in earlier.difference(names.values()):
        (folder / file).unlink(missing_ok=True)


def has_saved_concepts(folder: Path) -> bool:
    """Return whether a folder of a pipeline has a list of concepts."""
    return (folder / FOLDER / _INDEX).is_file()


def saved_concepts(source: str | os.PathLike, **hub_options: Any) -> dict[str, str]:
    """Return the file in `perfusion/` of each concept that was saved with a pipeline, by the concept's name.

    Args:
        source: the folder of the pipeline, or its id on the Hub.
        hub_options: as `huggingface_hub.hf_hub_download` takes them.

    Raises:
        FileNotFoundError: if a file in the list is not in the folder.
        ValueError: if there is a list of concepts and it cannot be read.
    """
    folder = Path(source) / FOLDER
    if os.path.isdir(source):
        names = _read_index(folder / _INDEX)
        for file in names.values():
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {printable(file)}, a concept that was saved with the pipeline; put it back, or "
                    f"delete its line in {_INDEX}"
                )
        others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in names.values())
        if others:
            logger.warning(
                f"{folder} has {printable(', '.join(others))} beside the concepts that were saved with the pipeline; "
                "load such a file with load_perfusion()."
            )
        return names
    try:
        return _read_index(download(os.fspath(source), _INDEX, _MAX_INDEX_BYTES, subfolder=FOLDER, **hub_options))
    except (EntryNotFoundError, HTTPError, OSError) as error:
        is_absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not (is_absent or hub_options.get("local_files_only") or constants.HF_HUB_OFFLINE):
            reason = printable(error.__cause__ or error)
            logger.warning(f"Whether concepts were saved with {source} is not known ({reason}), so none is loaded.")
        return {}


def _read_index(path: Path) -> dict[str, str]:
    """Return the file names in a list of concepts, which is empty if there is none."""
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON, so the concepts of the pipeline are not known; delete it") from error
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise ValueError(f"{path} does not name a safetensors file for each concept of the pipeline; delete it")
    return names


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and PureWindowsPath(name).name == name
