"""The model card of a repository of concepts, rendered from the templates in `hub_cards/`.

The texts in a concept file are a stranger's, so a template cannot show any text unescaped: see `_finalize`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load, metadata_save
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from .concept_file import WEIGHT_NAME, ConceptHeader

# Not `diffusers`, for which the Hub prints code that takes a concept for a pipeline. Nor is there a tag `lora` or
# `template:…`, for which it prints code that takes a concept for a LoRA.
LIBRARY_NAME = "diffusers-perfusion"
TAGS = ["perfusion", "diffusers", "text-to-image"]

# Around the text of a card, so that a later push can tell it from what somebody has written above and below.
_BEGIN = "<!-- diffusers-perfusion: begin. A push writes the text down to the end mark anew, and keeps all other. -->"
_END = "<!-- diffusers-perfusion: end -->"
_WRITTEN = re.compile(r"^<!-- diffusers-perfusion: begin\b[^\n]*$.*?^<!-- diffusers-perfusion: end -->", re.M | re.S)

_PACKAGE = Path(__file__).parent

# Longer than any placeholder token, super-class or model id in a concept file may be.
_MAX_TEXT = 300


@dataclass(frozen=True)
class CardEntry:
    """One concept of a repository, as the model card describes it.

    Attributes:
        weight_name: name of its file.
        header: the header of the file.
        size: of the file, in bytes.
        sha256: of the file, in hexadecimal; None if it is not known.
        samples: prompt, and path in the repository, of each sample image.
    """

    weight_name: str
    header: ConceptHeader
    size: int
    sha256: str | None
    samples: Sequence[tuple[str, str]] = ()


def make_card(
    repo_id: str,
    entries: Sequence[CardEntry],
    license: str | None = None,
    sweep: Sequence[Mapping[str, Any]] = (),
) -> ModelCard:
    """Return the card of a repository, which describes its one concept or lists its several.

    Args:
        repo_id: id of the repository.
        entries: the concepts in it, at least one.
        license: id of the licence, as the Hub names it.
        sweep: scores of the one concept at other settings: rows with the same columns.

    Raises:
        ValueError: if the rows of `sweep` have different columns.
    """
    if any(row.keys() != sweep[0].keys() for row in sweep):
        raise ValueError("the rows of the sweep have different columns; expected the same in each")
    base_models = sorted({e.header.base_model for e in entries if is_hub_id(e.header.base_model)})
    data = ModelCardData(
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        base_model_relation="adapter" if base_models else None,
        library_name=LIBRARY_NAME,
        license=license,
        pipeline_tag="text-to-image",
        tags=list(TAGS),
        instance_prompt=_prompt(entries[0]) if len(entries) == 1 else None,
        widget=[{"text": prompt, "output": {"url": path}} for e in entries for prompt, path in e.samples] or None,
    )
    template = _TEMPLATES.get_template("concept.md" if len(entries) == 1 else "collection.md")
    body = template.render(entry=entries[0], entries=entries, code=Markup(_code(repo_id, entries[0])), sweep=sweep)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_BEGIN}\n\n{body.strip()}\n\n{_END}\n")


def card_metadata(readme: Path) -> dict[str, Any]:
    """Return the metadata of a README, which is empty if there is none.

    Raises:
        ValueError: if they cannot be read.
    """
    try:
        return metadata_load(readme) or {} if readme.exists() else {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{readme.name} cannot be read, so nothing can be added to it ({reason}); mend it") from error


def gallery(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield prompt and path of the images in the gallery of a card, whose entries may have any form."""
    entries = metadata.get("widget")
    for entry in entries if isinstance(entries, list) else []:
        try:
            yield str(entry["text"]), str(entry["output"]["url"])
        except (KeyError, TypeError):
            continue


def merge_card(readme: Path, card: ModelCard, earlier: ModelCard | None) -> None:
    """Write a card into a README, and leave what is not of an earlier card as it is.

    The text goes between marks, to the end if there are none yet. Metadata stay if they are not those of the earlier
    card, except for the licence; tags and gallery are added to. The README of a model of another library, such as a
    whole pipeline, keeps its licence too, and gets no metadata but these three.

    Args:
        readme: the file; it need not exist.
        card: the card to write.
        earlier: the card that described the concepts until now; None if there were none.

    Raises:
        ValueError: if the README cannot be read.
    """
    held, new = card_metadata(readme), card.data.to_dict()
    text = readme.read_bytes().decode() if readme.exists() else ""
    line_break = "\r\n" if "\r\n" in text else "\n"
    written = card.text.strip().replace("\n", line_break)
    if match := _WRITTEN.search(text):
        text = text[: match.start()] + written + text[match.end() :]
    else:
        text = (text.rstrip() + line_break if text else "") + line_break + written + line_break
    readme.write_bytes(text.encode())
    merged = _merge_metadata(held, new, earlier.data.to_dict() if earlier else {})
    if merged != held:
        metadata_save(readme, merged)


def _merge_metadata(held: dict[str, Any], new: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return metadata in which those of an earlier card are replaced by those of a new one."""
    shared = ("license", "tags", "widget")
    is_ours = held.get("library_name", LIBRARY_NAME) == LIBRARY_NAME
    merged = dict(held)
    for key in [key for key in {**earlier, **new} if is_ours or key in shared]:
        if key == "tags" and isinstance(held.get(key), list):
            merged[key] = held[key] + [tag for tag in new[key] if tag not in held[key]]
        elif key == "widget" and isinstance(held.get(key), list):
            ours = {url for metadata in (earlier, new) for _, url in gallery(metadata)}
            others = [entry for entry in held[key] if not {url for _, url in gallery({key: [entry]})} & ours]
            merged[key] = others + new.get(key, [])
        elif key in new and ((key == "license" and is_ours) or held.get(key) == earlier.get(key)):
            merged[key] = new[key]
        elif key not in new and key in held and held[key] == earlier[key]:
            del merged[key]
    return merged


def is_hub_id(name: str) -> bool:
    """Return whether a base model's name is `user/model`, as on the Hub, and not the path of a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _prompt(entry: CardEntry) -> str:
    return f"a photo of a {entry.header.placeholder_token}"


def _code(repo_id: str, entry: CardEntry) -> str:
    """Return Python that generates with a concept; `!a` escapes strings, so that they cannot end the code block."""
    where = "" if entry.weight_name == WEIGHT_NAME else f", weight_name={entry.weight_name!a}"
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "from diffusers_perfusion import add_perfusion",
            "",
            f"pipe = add_perfusion(DiffusionPipeline.from_pretrained({entry.header.base_model!a})).to(torch.float32)",
            f"pipe.load_perfusion({repo_id!a}{where})",
            f"image = pipe(prompt={_prompt(entry)!a}).images[0]",
        ]
    )


def _finalize(value: Any) -> Any:
    """Return what a template shows for a value: numbers and `Markup` unchanged, everything else as escaped text.

    Character references do not make Markdown or HTML in any place where a template puts a value.
    """
    if isinstance(value, (int, float, Markup, jinja2.Undefined)):
        return value
    text = str(value)
    if len(text) > _MAX_TEXT:
        text = text[: _MAX_TEXT - 1] + "…"
    return "".join(
        c if c.isalnum() or c in " -,…" else f"&#{ord(c)};" if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


_TEMPLATES = jinja2.Environment(
    # A wheel has the templates within the package, a checkout beside it.
    loader=jinja2.FileSystemLoader([_PACKAGE / "hub_cards", _PACKAGE.parent / "hub_cards"]),
    undefined=jinja2.StrictUndefined,
    finalize=_finalize,
    autoescape=False,
)
_TEMPLATES.filters["url"] = lambda path: Markup(quote(path))
