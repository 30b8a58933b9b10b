"""Concept files on the Hugging Face Hub: find one, read its header, push one, search for more."""

import codecs
import hashlib
import logging
import os
import tempfile
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
    get_session,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of whichever client this release of huggingface_hub speaks through
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id
from PIL import Image

from .bounded_hub import BoundedHub, OddAnswerError
from .concept_file import MAX_FILE_BYTES, MAX_HEADER_BYTES, WEIGHT_NAME, ConceptHeader, find_local_file, printable
from .files import to_png
from .model_card import TAGS, CardEntry, card_metadata, gallery, is_hub_id, make_card, merge_card

logger = logging.getLogger(__name__)

# Of a README, and of the answers to a search or about a file.
_MAX_CARD_BYTES = 2**20
_MAX_ANSWER_BYTES = 8 * 2**20

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
    with _explained(source, _in_folder(weight_name, subfolder), hub_options.get("revision")):
        return download(os.fspath(source), weight_name, MAX_FILE_BYTES, subfolder=subfolder, **hub_options)


def download(
    repo_id: str,
    name: str,
    max_bytes: int,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **options: Any,
) -> Path:
    """Return the path of a repository's file in the cache, which gets the newest version if the Hub can be reached.

    Args:
        repo_id: id of the repository.
        name: of the file.
        max_bytes: the largest size that it may have.
        token: for private and gated repositories.
        endpoint: address of the Hub.
        local_files_only: never ask the Hub.
        force_download: download even what is in the cache.
        options: `subfolder`, `revision` and `cache_dir`, as `huggingface_hub.hf_hub_download` takes them.

    Raises:
        ValueError: if the file is too large.
        Exception: as `hf_hub_download` raises it. The cause of a `LocalEntryNotFoundError` is why the Hub was not
            reached.
    """
    options["force_download"] = force_download
    reason: Exception | None = None
    if not local_files_only:
        where = {key: options.get(key) for key in ("subfolder", "revision")}
        url = hf_hub_url(repo_id, name, endpoint=endpoint, **where)
        hub = BoundedHub(token=token, endpoint=endpoint, max_bytes=max_bytes)
        try:
            size = _check_size(name, hub.ask(lambda api: api.get_hf_file_metadata(url=url)).size or 0, max_bytes)
        except (EntryNotFoundError, RevisionNotFoundError):
            raise
        except (HTTPError, OSError) as error:
            if force_download:
                raise
            reason = error
        else:
            hub = BoundedHub(token=token, endpoint=endpoint, max_bytes=max_bytes, payload=size)
            return Path(hub.ask(lambda api: api.hf_hub_download(repo_id, name, **options)))
    try:
        return Path(hf_hub_download(repo_id, name, local_files_only=True, **options))
    except LocalEntryNotFoundError as error:
        if isinstance(reason, RepositoryNotFoundError):
            raise reason from None
        raise error from reason


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

    name = _in_folder(weight_name, subfolder)
    repo_id = os.fspath(source)
    hub = BoundedHub(token=token, max_bytes=_MAX_ANSWER_BYTES)
    with _explained(source, name, revision):
        url = hf_hub_url(repo_id, name, revision=revision)
        size = _check_size(name, hub.ask(lambda api: api.get_hf_file_metadata(url=url)).size, MAX_FILE_BYTES)
        return f"{repo_id}/{name}", size, _read_remote_header(hub, repo_id, name, size, revision)


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

    What somebody else has put into the repository stays: other files, the text of the card outside of the part that
    pushes write, metadata that are not what a push wrote. Of the sample images only the pixels are uploaded. `path` is
    the concept file; the other arguments are those of `PerfusionConcept.push_to_hub`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole concept file, a sample is no image, `weight_name` is not the name of a
            safetensors file or is that of another concept in the repository, the rows of `sweep` differ, a repository
            that is to be private is public, or the README there cannot be read.
        OSError: if the Hub cannot be reached or refuses. The message says what is on the Hub then; the same call can
            be repeated.
    """
    _check_weight_name(weight_name)
    images = {_sample_path(weight_name, number): _png(image) for number, (_, image) in enumerate(samples)}
    shown = [(prompt, image) for (prompt, _), image in zip(samples, images, strict=True)]
    entry = replace(card_entry(Path(path), shown), weight_name=weight_name)
    if not is_hub_id(entry.header.base_model):
        logger.warning(
            f"The concept names its base model {entry.header.base_model!r}, which is not the id of a model on the "
            "Hub, so its card cannot say how to load it; set base_model to the id and push again."
        )
    uploads = {weight_name: Path(path).read_bytes()} | images

    repo_id = create_repository(repo_id, private=private, token=token)
    hub = BoundedHub(token=token, max_bytes=_MAX_ANSWER_BYTES)
    committing = False
    try:
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            hub.ask(lambda api: api.create_branch(repo_id, branch=revision, exist_ok=True))
        repository = hub.ask(lambda api: _repository(api, repo_id, revision))
        payload = sum(map(len, uploads.values())) + MAX_HEADER_BYTES * len(_candidates(repository))
        hub = BoundedHub(token=token, max_bytes=MAX_FILE_BYTES, payload=payload)
        uploads["README.md"] = _readme_after(hub, repository, entry, license, sweep)
        files = [file.rfilename for file in repository.siblings or []]
        stale = [path for path in files if path not in uploads and _is_sample(path, weight_name)]
        operations: list[CommitOperation] = [CommitOperationAdd(path, data) for path, data in uploads.items()]
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        committing = True
        return hub.ask(
            lambda api: api.create_commit(
                repository.id,
                operations,
                commit_message=commit_message or f"Upload the Perfusion concept {entry.header.placeholder_token}",
                revision=revision,
                create_pr=create_pr,
                # The card describes the files of this commit.
                parent_commit=repository.sha,
            )
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
    hub = BoundedHub(token=token, max_bytes=_MAX_ANSWER_BYTES)

    def find_or_make(api: HfApi) -> ModelInfo:
        if "/" in repo_id:
            try:
                # One that was renamed is found by its old name, of which the Hub would make another.
                return _repository(api, repo_id)
            except RepositoryNotFoundError:
                pass
        return _repository(api, api.create_repo(repo_id, private=private, exist_ok=True).repo_id)

    try:
        repository = hub.ask(find_or_make)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the id of a repository of models, such as me/my-cat") from error
    except (HTTPError, OSError) as error:
        raise OSError(
            f"the repository {repo_id} was neither found nor made, so nothing was pushed: {_reason(error)}"
        ) from error
    if private and repository.private is False:
        raise ValueError(f"the repository {repository.id} is public already; make it private in its settings first")
    return repository.id


def search_concepts(
    base_model: str | None = None, *, limit: int = 20, token: str | bool | None = None
) -> list[ModelInfo]:
    """Return the repositories with concepts, which are found by the tags of their cards.

    Args:
        base_model: id of the base model that they are for; by default any.
        limit: the largest number of repositories to return.
        token: to find private repositories as well.

    Raises:
        ValueError: if `limit` is below 1.
        OSError: if the Hub cannot be reached or refuses.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    tags = TAGS + ([f"base_model:adapter:{base_model}"] if base_model else [])
    hub = BoundedHub(token=token, max_bytes=_MAX_ANSWER_BYTES)

    def search(cards: bool) -> list[ModelInfo]:
        return hub.ask(lambda api: list(api.list_models(filter=tags, limit=limit, cardData=cards)))

    try:
        try:
            return search(cards=True)
        except OddAnswerError:
            # One card that the client cannot take, in anybody's repository, is enough for this.
            return search(cards=False)
    except (HTTPError, OSError) as error:
        raise OSError(f"the search failed: {_reason(error)}") from error


def _read_remote_header(hub: BoundedHub, repo_id: str, name: str, size: int, revision: str | None) -> ConceptHeader:
    """Return the header of a concept file on the Hub, of which it downloads the beginning.

    Raises:
        ValueError: if it is not a valid concept file.
    """
    url = hf_hub_url(repo_id, name, revision=revision)

    def get_start(api: HfApi) -> bytes:
        headers = build_hf_headers(token=api.token) | {"Range": f"bytes=0-{MAX_HEADER_BYTES + 7}"}
        response = get_session().get(url, headers=headers)
        hf_raise_for_status(response)
        return response.content

    # Of no bytes there is no range.
    start = hub.ask(get_start) if size else b""
    try:
        return ConceptHeader.from_bytes(start, size)
    except ValueError as error:
        raise ValueError(f"{repo_id}/{name} is not a valid concept file: {error}") from error


def _check_weight_name(name: str) -> None:
    """Raise ValueError unless everybody can have a file of this name."""
    is_name = name.endswith(".safetensors") and name.isprintable() and PurePosixPath(name).name == name
    if not is_name or name.startswith(".") or len(name.encode()) > 255:
        raise ValueError(f"weight_name is {name!r:.300}; expected the name of a file that ends in .safetensors")


def _check_size(name: str, size: int | None, max_bytes: int) -> int:
    if size is None or size > max_bytes:
        raise ValueError(f"the size of {name} is {size or 'unknown'}; expected at most {max_bytes} bytes")
    return size


def _repository(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo:
    """Return what the Hub says of a repository and its files."""
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    files = info.siblings or []
    if not all(isinstance(name, str) for name in (info.id, info.sha, *(file.rfilename for file in files))):
        raise TypeError("a name is no text")
    try:
        validate_repo_id(info.id)
    except HFValidationError as error:  # which would read as if the user's id were wrong
        raise TypeError(f"{info.id!r} is no id") from error
    if not all(isinstance(file.size, int | None) for file in files):
        raise TypeError("a size is no number")
    return info


def _readme_after(
    hub: BoundedHub, repository: ModelInfo, entry: CardEntry, license: str | None, sweep: Sequence[Mapping[str, Any]]
) -> bytes:
    """Return the README of a repository with a card of the concepts that it holds once it holds one more.

    Raises:
        ValueError: if the file of that one is another concept's, or the README that is there cannot be read.
    """
    files = {file.rfilename: file for file in repository.siblings or []}
    with tempfile.TemporaryDirectory() as folder:
        readme = Path(folder, "README.md")
        if readme.name in files:
            _check_size(readme.name, files[readme.name].size, _MAX_CARD_BYTES)
            there = hub.ask(
                lambda api: api.hf_hub_download(repository.id, readme.name, revision=repository.sha, cache_dir=folder)
            )
            # Before huggingface_hub 1 the metadata behind such a mark are not seen.
            readme.write_bytes(Path(there).read_bytes().removeprefix(codecs.BOM_UTF8))
        before = {held.weight_name: held for held in _entries(hub, repository, card_metadata(readme))}
        if entry.weight_name in files:
            held = before.get(entry.weight_name)
            token = entry.header.placeholder_token
            if held is None or held.header.placeholder_token != token:
                what = f"the concept {held.header.placeholder_token}" if held else "no concept that this release reads"
                raise ValueError(
                    f"{entry.weight_name} in {repository.id} is {what}; choose another weight_name for {token}, or "
                    "delete that file first"
                )
        entries = [one for _, one in sorted((before | {entry.weight_name: entry}).items())]
        if len(entries) > 1 and sweep:
            logger.warning(
                f"The card of {repository.id} is of {len(entries)} concepts, so it does not show the sweep."
            )
            sweep = ()
        earlier = make_card(repository.id, list(before.values())) if before else None
        merge_card(readme, make_card(repository.id, entries, license, sweep), earlier)
        if (shown := card_metadata(readme).get("license")) is None:
            logger.warning(
                f"The card of {repository.id} names no licence, so nobody knows what they may do with the concept; "
                "push again with a licence, such as license='cc-by-4.0' (--license cc-by-4.0)."
            )
        elif license not in (None, shown):
            logger.warning(
                f"The README of {repository.id} is that of a whole model and keeps its licence, {printable(shown)}; "
                f"write in it that the concept's is {license}."
            )
        return readme.read_bytes()


def _entries(hub: BoundedHub, repository: ModelInfo, metadata: Mapping[str, Any]) -> Iterator[CardEntry]:
    """Yield the concepts at the top of a repository, with the images that the metadata of its card show of them."""
    files = {file.rfilename for file in repository.siblings or []}
    shown = [(text, url) for text, url in gallery(metadata) if url in files]
    for file in _candidates(repository):
        name = file.rfilename
        try:
            header = _read_remote_header(hub, repository.id, name, file.size, repository.sha)
        except ValueError:
            continue
        samples = [(text, url) for text, url in shown if _is_sample(url, name)]
        yield CardEntry(name, header, file.size, file.lfs.sha256 if file.lfs else None, samples)


def _candidates(repository: ModelInfo) -> list[Any]:
    """Return the files at the top of a repository that may be concepts by their names and sizes."""
    return [
        file
        for file in repository.siblings or []
        if file.rfilename.endswith(".safetensors")
        and "/" not in file.rfilename
        and file.size is not None
        and file.size <= MAX_FILE_BYTES
    ]


def _sample_path(weight_name: str, number: int | str) -> str:
    """Return the path in a repository of a sample image of a concept."""
    return f"images/{weight_name.removesuffix('.safetensors')}/{number}.png"


def _is_sample(path: str, weight_name: str) -> bool:
    """Return whether an image is one that a push of a concept has written."""
    number = PurePosixPath(path).stem
    return number.isdecimal() and path == _sample_path(weight_name, number)


def _png(image: Image.Image) -> bytes:
    """Return an image as PNG without metadata, such as place, date and camera settings."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"samples has a {type(image).__name__}; expected pairs of a prompt and an image of Pillow")
    image = image.convert("RGB")
    return to_png(Image.frombytes("RGB", image.size, image.tobytes()))


@contextmanager
def _explained(source: str | os.PathLike, weight_name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub's client into one sentence: why a file cannot be read, and what to do."""
    name = os.fspath(source)
    if ".." in PurePosixPath(weight_name).parts:
        raise ValueError(f"weight_name is {weight_name!r}; expected a file in the repository {name}")
    try:
        yield
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is neither a file, a folder nor the id of a Hub repository, such as me/my-cat"
        ) from error
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
            + (f"it was not downloaded: {_reason(cause)}" if cause else "the Hub was not asked")
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the repository {name} has no {weight_name}; choose a file with weight_name="
        ) from error
    except (HTTPError, OSError) as error:
        raise OSError(
            f"{weight_name} of {name} was not downloaded: {_reason(error)}; the cache is as it was, so try again"
        ) from error


def _in_folder(name: str, subfolder: str | None) -> str:
    return f"{subfolder}/{name}" if subfolder else name


def _reason(error: BaseException) -> str:
    """Return why a request failed, as a clause."""
    if isinstance(error, GatedRepoError):
        return "it is gated; accept its conditions on the Hub"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    response = getattr(error, "response", None)
    if response is not None and response.status_code in _REFUSALS:
        return f"{_REFUSALS[response.status_code]} ({response.status_code})"
    return printable(error).rstrip(".") or type(error).__name__
