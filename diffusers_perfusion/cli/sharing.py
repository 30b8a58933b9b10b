"""`perfusion info | push | pull | search`."""

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from ..concept import WEIGHT_NAME, PerfusionConcept, write_atomically
from ..hub import find_concept_file, read_header, search_concepts
from .common import describe, printable


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `info`."""
    parser.add_argument("concept", help="Hub id, folder or file; of one on the Hub the header alone is read.")
    _add_file_arguments(parser)


def info(concept: str, **options: Any) -> None:
    """Print what a concept file says of itself."""
    path, size, header = read_header(concept, **options)
    print(f"{path} ({size:,} bytes)")
    rows: dict[str, Any] = {
        "placeholder_token": header.placeholder_token,
        "superclass": header.superclass,
        "base_model": header.base_model or "not recorded",
        "text encoder": f"width {header.width}",
        "layers": f"{len(header.layers)}, {sum(header.layers.values())} numbers",
        "dtype": str(header.dtype).removeprefix("torch."),
        "bias": f"{header.bias} (worth trying: {header.bias_range[0]} to {header.bias_range[1]})",
        "temperature": header.temperature,
        **{f"training.{name}": value for name, value in header.training.items()},
    }
    for name, value in rows.items():
        print(f"  {printable(name):34} {printable(value)}")


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `push`."""
    parser.add_argument("concept", help="Folder or file.")
    parser.add_argument("repo_id", help="Id of the repository; it is made if it is not there.")
    parser.add_argument(
        "--sample",
        action="append",
        nargs=2,
        default=[],
        metavar=("PICTURE", "PROMPT"),
        help="A picture drawn with the concept, and its prompt; repeatable.",
    )
    parser.add_argument(
        "--sweep", help="A sweep.json of this concept, whose scores a card that is of this concept alone shows."
    )
    parser.add_argument("--license", help="Id of the licence, as the Hub names it, such as cc-by-4.0.")
    parser.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="Whether a new repository is private."
    )
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request.")
    parser.add_argument("--commit_message", help="What the commit says.")
    parser.add_argument("--weight_name", default=WEIGHT_NAME, help=f"Name of the file there. Default: {WEIGHT_NAME}.")
    parser.add_argument("--revision", help="Branch to push to, made if it is not there.")
    parser.add_argument("--token", help="Token that may write there; by default the stored one.")


def push(concept: str, repo_id: str, sample: list[tuple[str, str]], sweep: str | None, **options: Any) -> None:
    """Share a concept file on the Hub."""
    held = PerfusionConcept.load(Path(concept, WEIGHT_NAME) if Path(concept).is_dir() else concept)
    samples = []
    for path, prompt in sample:
        with Image.open(path) as picture:
            samples.append((prompt, picture.convert("RGB")))
    rows: list[dict[str, Any]] = []
    if sweep is not None:
        from ..evaluation import Sweep

        swept = Sweep.read(sweep)
        swept.check_concept(held)
        rows = swept.table()
    commit = held.push_to_hub(repo_id, samples=samples, sweep=rows, **options)
    print(commit.pr_url or commit.commit_url)


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `pull`."""
    parser.add_argument("repo_id", help="Id of the repository.")
    _add_file_arguments(parser)
    parser.add_argument("--force_download", action="store_true", help="Download even what is in the cache.")
    parser.add_argument("--cache_dir", help="Where downloads are kept.")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="Folder for the file. Default: this one.")


def pull(repo_id: str, output_dir: Path, **options: Any) -> None:
    """Copy a concept file from the Hub into a folder."""
    path = find_concept_file(repo_id, **options)
    PerfusionConcept.load(path)
    output_dir.mkdir(parents=True, exist_ok=True)
    copy = output_dir / path.name
    write_atomically(copy, path.read_bytes())
    print(describe(copy))


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `search`."""
    parser.add_argument("base_model", nargs="?", help="Id of the base model that concepts are for; by default any.")
    parser.add_argument("--limit", type=int, default=20, help="How many to show. Default: 20.")
    parser.add_argument("--token", help="To find private ones as well.")


def search(**options: Any) -> None:
    """List concepts on the Hub."""
    for found in search_concepts(**options):
        prompt = getattr(found.card_data, "instance_prompt", None) or ""
        print(f"{printable(found.id):50} {printable(prompt)}".rstrip())


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which file of a repository is meant."""
    parser.add_argument("--weight_name", default=WEIGHT_NAME, help=f"Name of the file. Default: {WEIGHT_NAME}.")
    parser.add_argument("--subfolder", help="Where in the folder or repository it is.")
    parser.add_argument("--revision", help="Branch, tag or commit of the repository.")
    parser.add_argument("--token", help="For private and gated repositories; by default the stored one.")
