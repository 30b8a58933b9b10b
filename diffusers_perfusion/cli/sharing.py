"""`perfusion info | push | pull | search`."""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from ..concept_file import WEIGHT_NAME, ConceptHeader, check_same_token, find_local_file, printable
from ..files import write_atomically
from .common import describe, folder

# How many entries of `training` are printed; a training writes fewer.
MAX_ENTRIES = 50


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `info`."""
    parser.epilog = "example:\n  perfusion info my-cat"
    parser.add_argument("concept", help="Hub id, folder or file; of a file on the Hub only the header is downloaded.")
    _add_file_arguments(parser)


def info(concept: str, weight_name: str, subfolder: str | None, revision: str | None, token: str | None) -> None:
    """Print the description in a concept file."""
    path = find_local_file(concept, weight_name, subfolder)
    if path is not None:
        name, size, header = str(path), path.stat().st_size, ConceptHeader.read(path)
    else:
        from ..hub import read_header

        name, size, header = read_header(concept, weight_name, subfolder, revision, token)
    print(f"{printable(name)} ({size:,} bytes)")
    rows: dict[str, Any] = {
        "placeholder_token": header.placeholder_token,
        "superclass": header.superclass,
        "base_model": header.base_model or "not recorded",
        "text encoder": f"width {header.width}",
        "layers": f"{len(header.layers)}, {sum(header.layers.values())} numbers",
        "dtype": header.dtype,
        "bias": f"{header.bias} (worth trying: {header.bias_range[0]} to {header.bias_range[1]})",
        "temperature": header.temperature,
        **{f"training.{name}": value for name, value in islice(header.training.items(), MAX_ENTRIES)},
    }
    if (more := len(header.training) - MAX_ENTRIES) > 0:
        rows["training"] = f"… and {more} more entries"
    for name, value in rows.items():
        print(f"  {printable(name):34} {printable(value)}")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `push`."""
    parser.epilog = (
        "example:\n  perfusion push my-cat me/my-cat --license cc-by-4.0 "
        '--sample images/00-a-my-cat-on-the-beach.png "a <my-cat> on the beach"'
    )
    parser.add_argument("concept", help="Folder or file.")
    parser.add_argument("repo_id", help="Id of the repository, which is created if it does not exist.")
    parser.add_argument(
        "--sample",
        action="append",
        nargs=2,
        default=[],
        metavar=("IMAGE", "PROMPT"),
        help="An image that was generated with the concept, and its prompt; repeatable.",
    )
    parser.add_argument(
        "--sweep", help="A sweep.json of this concept, to show on the card of a repository with one concept."
    )
    parser.add_argument("--license", help="Id of the licence, as the Hub names it, such as cc-by-4.0.")
    parser.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="Whether a new repository is private."
    )
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request.")
    parser.add_argument("--commit_message", help="Message of the commit.")
    parser.add_argument("--weight_name", default=WEIGHT_NAME, help=f"Name of the file in it. Default: {WEIGHT_NAME}.")
    parser.add_argument("--revision", help="Branch to push to, which is created if it does not exist.")
    parser.add_argument("--token", help="Access token with write permission; by default the stored one.")


def push(concept: str, repo_id: str, sample: list[tuple[str, str]], sweep: str | None, **options: Any) -> None:
    """Push a concept file to the Hub."""
    from .quiet import silence_libraries

    silence_libraries()
    from diffusers.utils import load_image

    from ..concept import PerfusionConcept

    loaded = PerfusionConcept.load(find_local_file(concept) or concept)
    samples = [(prompt, load_image(path)) for path, prompt in sample]
    rows: list[dict[str, Any]] = []
    if sweep is not None:
        from ..evaluation import Sweep

        rows = Sweep.read(sweep).for_concept(loaded).table()
    commit = loaded.push_to_hub(repo_id, samples=samples, sweep=rows, **options)
    print(printable(commit.pr_url or commit.commit_url))


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `pull`."""
    parser.epilog = "example:\n  perfusion pull me/my-cat --output_dir my-cat"
    parser.add_argument("repo_id", help="Id of the repository.")
    _add_file_arguments(parser)
    parser.add_argument("--force_download", action="store_true", help="Download even what is in the cache.")
    parser.add_argument("--cache_dir", help="Folder of the cache.")
    parser.add_argument("--output_dir", type=folder, default=Path("."), help="Folder for the file. Default: this one.")


def pull(repo_id: str, output_dir: Path, **options: Any) -> None:
    """Download a concept file from the Hub into a folder."""
    from .quiet import silence_libraries

    silence_libraries()
    from ..concept import PerfusionConcept
    from ..hub import find_concept_file

    path = find_concept_file(repo_id, **options)
    concept = PerfusionConcept.load(path)  # raises if it is not a valid concept
    copy = output_dir / path.name
    check_same_token(copy, concept.placeholder_token)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(copy, path.read_bytes())
    print(describe(copy))


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `search`."""
    parser.epilog = "example:\n  perfusion search stable-diffusion-v1-5/stable-diffusion-v1-5"
    parser.add_argument("base_model", nargs="?", help="Hub id of the concepts' base model; by default any.")
    parser.add_argument("--limit", type=int, default=20, help="Number of concepts to list. Default: 20.")
    parser.add_argument("--token", help="Access token, to find private concepts too.")


def search(**options: Any) -> None:
    """List concepts on the Hub."""
    from ..hub import search_concepts

    for found in search_concepts(**options):
        prompt = getattr(found.card_data, "instance_prompt", None) or ""
        print(f"{printable(found.id):50} {printable(prompt)}".rstrip())


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a file of a repository."""
    parser.add_argument("--weight_name", default=WEIGHT_NAME, help=f"Name of the file. Default: {WEIGHT_NAME}.")
    parser.add_argument("--subfolder", help="Folder of the file in the folder or repository.")
    parser.add_argument("--revision", help="Branch, tag or commit of the repository.")
    parser.add_argument("--token", help="For private and gated repositories; by default the stored one.")
