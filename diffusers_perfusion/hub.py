"""Where a concept file is: on disk, or on the Hugging Face Hub."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .concept import WEIGHT_NAME


def find_concept_file(
    source: str | os.PathLike,
    weight_name: str = WEIGHT_NAME,
    subfolder: str | None = None,
    **hub_options: Any,
) -> Path:
    """Path of a concept file, downloaded if `source` is the id of a Hub repository.

    Args:
        source: a concept file, a folder with one, or the id of a repository with one.
        weight_name: name of the file in the folder or repository.
        subfolder: where in the folder or repository it is.
        hub_options: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as
            `huggingface_hub.hf_hub_download` takes them.

    Raises:
        FileNotFoundError: if there is no such file in the folder or repository.
        ValueError: if `source` is neither a file, a folder nor the id of a repository that can be read.
    """
    path = Path(source)
    if os.path.isfile(path):  # unlike Path.is_file, no error for what cannot be a path
        return path
    if os.path.isdir(path):
        path = path / (subfolder or "") / weight_name
        if not path.is_file():
            held = ", ".join(sorted(file.name for file in path.parent.glob("*.safetensors"))) or "no safetensors file"
            raise FileNotFoundError(f"{path.parent} has no {weight_name}; it holds {held} (choose with weight_name=)")
        return path
    try:
        return Path(hf_hub_download(os.fspath(source), weight_name, subfolder=subfolder, **hub_options))
    except HFValidationError as error:
        raise ValueError(
            f"{os.fspath(source)!r} is neither a file, a folder nor the id of a Hub repository"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"the repository {source} is gated; accept its conditions on the Hub, log in or pass token="
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{os.fspath(source)!r} is neither a file or folder here nor a Hub repository you can read; check the "
            "spelling, and pass token= if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the repository {source} has no revision {hub_options.get('revision')!r}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{os.fspath(source)!r} is no file or folder here, {weight_name} of a repository of that id is not in the "
            "cache, and the Hub was not reached"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {source} has no {weight_name}; choose a file with weight_name="
        ) from error
