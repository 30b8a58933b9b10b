"""Concept files on the Hugging Face Hub: find one, read its header, push one, search for more."""

import hashlib
import io
import logging
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever client this release of huggingface_hub speaks through
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from PIL import Image

from .concept_file import MAX_FILE_BYTES, WEIGHT_NAME, ConceptHeader, find_local_file
from .model_card import TAGS, CardEntry, is_hub_id, make_card

logger = logging.getLogger(__name__)

_REFUSALS = {
    401: "the Hub does not know you; log in with `hf auth login` or pass token=",
    403: "your token does not allow it",
    412: "the repository was changed at the same time",
    429: "the Hub limits the number of requests; wait some minutes",
}


def find_concept_file(
    source: str | os.PathLike,
    weight_name: str = WEIGHT_NAME,
    subfolder: str | None = None,
    **hub_options: Any,
) -> Path:
    """Return the path of a concept file, which is downloaded if `source` is the id of a Hub repository.

    Args:
        source: a concept file, a folder with one, or the id of a repository with one.
        weight_name: name of the file in the folder or repository.
        subfolder: where in the folder or repository it is.
        hub_options: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as
            `huggingface_hub.hf_hub_download` takes them.

    Raises:
        FileNotFoundError: if there is no such file in the folder or repository.
        ValueError: if `source` is neither a file, a folder nor the id of a repository that can be read, or the file
            is too large to be a concept.
        OSError: if the download fails; the cache stays as it is.
    """
    path = find_local_file(source, weight_name, subfolder)
    if path is not None:
        return path
    with _explained(source, weight_name, hub_options.get("revision")):
        if not hub_options.get("local_files_only"):
            options = {name: hub_options.get(name) for name in ("revision", "endpoint")}
            url = hf_hub_url(os.fspath(source), weight_name, subfolder=subfolder, **options)
            try:
                _check_size(get_hf_file_metadata(url, token=hub_options.get("token")).size or 0)
            except (HTTPError, OSError):
                # The download meets this too, unless it has the file in the cache.
                if hub_options.get("force_download"):
                    raise
        return Path(hf_hub_download(os.fspath(source), weight_name, subfolder=subfolder, **hub_options))


def read_header(
    source: str | os.PathLike,
    weight_name: str = WEIGHT_NAME,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[str, int, ConceptHeader]:
    """Return path, size and header of a concept file. Of a file on the Hub only the header is downloaded.

    Offline, it is read from the cache. The arguments are those of `find_concept_file`.

    Raises:
        FileNotFoundError: if there is no such file in the folder or repository.
        ValueError: if `source` is neither a file, a folder nor the id of a repository that can be read, or the file
            is not a valid concept file.
        OSError: if the Hub cannot be reached or refuses.
    """
    path = find_local_file(source, weight_name, subfolder)
    if path is None and constants.HF_HUB_OFFLINE:
        path = find_concept_file(source, weight_name, subfolder, revision=revision, local_files_only=True)
    if path is not None:
        return str(path), path.stat().st_size, ConceptHeader.read(path)

    name = f"{subfolder}/{weight_name}" if subfolder else weight_name
    return f"{os.fspath(source)}/{name}", *_read_remote_header(os.fspath(source), name, revision, token)


def card_entry(path: Path, samples: Sequence[tuple[str, str]] = ()) -> CardEntry:
    """Return the entry of a concept file in a model card.

    Args:
        path: of the file.
        samples: prompt, and path in the repository, of each sample image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole concept file.
    """
    header, content = ConceptHeader.read(path), path.read_bytes()
    return CardEntry(path.name, header, len(content), hashlib.sha256(content).hexdigest(), samples)


def push_concept_file(
    path: str | os.PathLike,
    repo_id: str,
    *,
    weight_name: str = WEIGHT_NAME,
    samples: Sequence[tuple[str, Image.Image]] = (),
    sweep: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Upload a concept file, its sample images and a card in one commit, to a repository that is created if missing.

    The card is rendered again by each push and lists every concept in the repository. Of the sample images only the
    pixels are uploaded. `path` is the concept file; the other arguments are those of `PerfusionConcept.push_to_hub`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole concept file, `weight_name` is not the name of a safetensors file, the rows of
            `sweep` differ, or a repository that is to be private is public.
        OSError: if the Hub cannot be reached or refuses. The message says what is on the Hub then; the same call can
            be repeated.
    """
    if PurePosixPath(weight_name).name != weight_name or not weight_name.endswith(".safetensors"):
        raise ValueError(f"weight_name is {weight_name!r}; expected the name of a file that ends in .safetensors")
    folder_of_samples = f"images/{weight_name.removesuffix('.safetensors')}/"
    images = {f"{folder_of_samples}{number}.png": _png(image) for number, (_, image) in enumerate(samples)}
    shown = [(prompt, image) for (prompt, _), image in zip(samples, images, strict=True)]
    entry = replace(card_entry(Path(path), shown), weight_name=weight_name)
    if not is_hub_id(entry.header.base_model):
        logger.warning(
            f"The concept names its base model {entry.header.base_model!r}, which is not the id of a model on the "
            "Hub, so its card cannot say how to load it; set base_model to the id and push again."
        )

    api = HfApi(token=token)
    repo_id = create_repository(repo_id, private=private, token=token)
    committing = False
    try:
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        entries = sorted([entry, *_other_entries(info, weight_name, token)], key=lambda entry: entry.weight_name)
        license = license or getattr(info.card_data, "license", None)
        if license is None:
            logger.warning(
                f"The card of {repo_id} names no licence, so nobody knows what they may do with the concept; push "
                "again with a licence, such as license='cc-by-4.0' (--license cc-by-4.0)."
            )
        if sweep and len(entries) > 1:
            logger.warning(f"The card of {repo_id} is of {len(entries)} concepts, so it does not show the sweep.")
        card = make_card(repo_id, entries, license, sweep if len(entries) == 1 else ())
        files = {weight_name: Path(path).read_bytes(), "README.md": str(card).encode()} | images
        stale = [
            file.rfilename
            for file in info.siblings or []
            if file.rfilename.startswith(folder_of_samples) and file.rfilename not in files
        ]
        operations: list[CommitOperation] = [CommitOperationAdd(path, data) for path, data in files.items()]
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        committing = True
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload the Perfusion concept {entry.header.placeholder_token}",
            revision=revision,
            create_pr=create_pr,
            # The card describes the files of this commit.
            parent_commit=info.sha,
        )
    except (HTTPError, OSError) as error:
        answer = getattr(error, "response", None)
        # Without an answer, or with a gateway's, the commit may have been made.
        unsure = committing and (answer is None or answer.status_code >= 500)
        held = "either all of this push or nothing of it" if unsure else "nothing of this push"
        raise OSError(
            f"the push to {repo_id} failed: {_reason(error)}; the repository is on the Hub and holds {held}; "
            "push again"
        ) from error


def create_repository(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Create a repository unless it exists, and return its id with its owner's name.

    Raises:
        ValueError: if it is to be private but exists and is public, or `repo_id` cannot be an id.
        OSError: if the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        public = private and api.model_info(repo_id).private is False
    except (HTTPError, OSError) as error:
        raise OSError(f"the repository {repo_id} was not made, so nothing was pushed: {_reason(error)}") from error
    if public:
        raise ValueError(f"the repository {repo_id} is public already; make it private in its settings first")
    return repo_id


def search_concepts(
    base_model: str | None = None, *, limit: int = 20, token: str | bool | None = None
) -> list[ModelInfo]:
    """Return the repositories with concepts, which are found by the tags of their cards.

    Args:
        base_model: id of the base model that they are for; by default any.
        limit: the largest number of repositories to return.
        token: to find private repositories as well.

    Raises:
        OSError: if the Hub cannot be reached or refuses.
    """
    tags = TAGS + ([f"base_model:adapter:{base_model}"] if base_model else [])
    try:
        return list(HfApi(token=token).list_models(filter=tags, limit=limit, cardData=True))
    except (HTTPError, OSError) as error:
        raise OSError(f"the search failed: {_reason(error)}") from error


def _read_remote_header(
    repo_id: str, name: str, revision: str | None, token: str | bool | None
) -> tuple[int, ConceptHeader]:
    """Return size and header of a concept file on the Hub."""
    with _explained(repo_id, name, revision):
        size = _check_size(get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision), token=token).size)
        try:
            found = HfApi().parse_safetensors_file_metadata(repo_id, name, revision=revision, token=token)
            tensors = {tensor: (entry.dtype, entry.shape) for tensor, entry in found.tensors.items()}
        except (SafetensorsParsingError, struct.error, AttributeError, TypeError, RecursionError) as error:
            # The client parses any JSON as if it were a header, and before huggingface_hub 1 any eight bytes.
            raise ValueError(f"{repo_id}/{name} is not a safetensors file") from error
    try:
        return size, ConceptHeader.parse(found.metadata, tensors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{repo_id}/{name} is not a valid concept file: {error!s:.400}") from error


def _check_size(size: int | None) -> int:
    if size is None or size > MAX_FILE_BYTES:
        raise ValueError(f"the file's size is {size or 'unknown'}; expected at most {MAX_FILE_BYTES} bytes")
    return size


def _other_entries(info: ModelInfo, weight_name: str, token: str | bool | None) -> Iterator[CardEntry]:
    """Yield the other concepts at the top of a repository, with the images that its card shows of them."""
    files = {file.rfilename: file for file in info.siblings or []}
    gallery = getattr(info.card_data, "widget", None)
    shown = [_widget(entry) for entry in gallery] if isinstance(gallery, list) else []
    for name, file in files.items():
        if "/" in name or not name.endswith(".safetensors") or name == weight_name:
            continue
        try:
            size, header = _read_remote_header(info.id, name, info.sha, token)
        except ValueError:
            continue  # a file of another kind
        folder = f"images/{name.removesuffix('.safetensors')}/"
        samples = [(text, url) for text, url in shown if url in files and url.startswith(folder)]
        yield CardEntry(name, header, size, file.lfs.sha256 if file.lfs else None, samples)


def _widget(entry: Any) -> tuple[str, str]:
    """Return prompt and image path of an entry in a card's gallery, which may have any form."""
    try:
        return str(entry["text"]), str(entry["output"]["url"])
    except (KeyError, TypeError):
        return "", ""


def _png(image: Image.Image) -> bytes:
    """Return an image as PNG without metadata, such as place, date and camera settings."""
    image = image.convert("RGB")
    buffer = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _explained(source: str | os.PathLike, weight_name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub's client into one sentence: why a file cannot be read, and what to do."""
    name = os.fspath(source)
    if ".." in PurePosixPath(weight_name).parts:
        raise ValueError(f"weight_name is {weight_name!r}; expected a file in the repository {name}")
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{name!r} is neither a file, a folder nor the id of a Hub repository") from error
    except GatedRepoError as error:
        raise ValueError(
            f"the repository {name} is gated; accept its conditions on the Hub, log in or pass token="
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a file or folder here nor a Hub repository you can read; check the spelling, and "
            "pass token= if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the repository {name} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        raise FileNotFoundError(
            f"{name!r} is not a local file or folder, {weight_name} of such a repository is not in the cache, and "
            + (_reason(cause) if isinstance(cause, HfHubHTTPError) else "the Hub was not reached")
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {name} has no {weight_name}; choose a file with weight_name="
        ) from error
    except (HTTPError, OSError) as error:
        raise OSError(
            f"{weight_name} of {name} was not downloaded: {_reason(error)}; the cache is as it was, so try again"
        ) from error


def _reason(error: BaseException) -> str:
    """Return why a request failed, as a clause."""
    response = getattr(error, "response", None)
    if response is not None and response.status_code in _REFUSALS:
        return f"{_REFUSALS[response.status_code]} ({response.status_code})"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
