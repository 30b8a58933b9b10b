"""The format of a concept file, and `ConceptHeader`, the description in it, which is read without torch.

A concept file is a safetensors file of one-dimensional tensors, with a JSON description under a single key of its
header: one key, because safetensors does not promise an order among several, and the same concept must give the same
bytes.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

WEIGHT_NAME = "perfusion.safetensors"
FORMAT_VERSION = 3
HEADER_KEY = "perfusion"

# A file is refused above these before it is parsed. SDXL in float32 needs 0.4 MB, of which 11 KB are the header.
MAX_FILE_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 256 * 2**10

# How many lists and objects of `training` may be in each other.
MAX_DEPTH = 16

BIAS_BOUNDS = (0.0, 2.0)
TEMPERATURE_BOUNDS = (0.01, 1.0)

# The dtypes that a tensor may have, as safetensors names them, with the names that torch has for them.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

# The fields that describe a concept, beside its tensors.
DESCRIPTION = ("placeholder_token", "superclass", "bias", "temperature", "bias_range", "base_model", "training")

# Names of tensors: the vectors of a concept, and the prefixes before a text encoder's number and a layer's name.
VECTORS = ("target_input", "inverse_target_input", "superclass_input", "inverse_superclass_input")
EMBEDDING_PREFIX = "token_embeddings."
OUTPUT_PREFIX = "target_outputs."

# How other files begin that are given for a concept file, and what they are.
_OTHER_KINDS = {
    b"PK": "it is a zip file, or it is a pickle, which can run code; only safetensors files are read",
    b"\x80": "it is a pickle, which can run code; only safetensors files are read",
    b"version https://git-lfs": "it is a pointer of Git LFS; `git lfs pull` gets the file itself",
    b"<": "it is a web page; download the file itself",
}


def printable(value: Any, limit: int = 400) -> str:
    """Return a stranger's text on one line, without control characters, cut to `limit` characters."""
    text = " ".join(str(value).split())
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def check_bias(bias: float) -> float:
    """Return `bias` as a float, or raise ValueError unless it is a number in `BIAS_BOUNDS`."""
    return _check_number("bias", bias, BIAS_BOUNDS)


def check_temperature(temperature: float) -> float:
    """Return `temperature` as a float, or raise ValueError unless it is a number in `TEMPERATURE_BOUNDS`."""
    return _check_number("temperature", temperature, TEMPERATURE_BOUNDS)


def check_token_and_superclass(placeholder_token: str, superclass: str) -> None:
    """Raise ValueError unless a placeholder token and a super-class are valid."""
    _check_text("placeholder_token", placeholder_token)
    _check_text("superclass", superclass)
    if not placeholder_token or any(c.isspace() for c in placeholder_token):
        raise ValueError(f"placeholder_token is {placeholder_token!r}; expected one token without spaces")
    if not superclass.strip():
        raise ValueError("superclass is empty; expected the super-class in plain words, such as 'teddy bear'")


def check_description(concept: Any) -> None:
    """Check the fields that describe a concept, and turn its numbers into floats and `bias_range` into a tuple.

    Args:
        concept: a `ConceptHeader` or a `PerfusionConcept`.

    Raises:
        ValueError: if a field is out of range.
    """
    check_token_and_superclass(concept.placeholder_token, concept.superclass)
    _check_text("base_model", concept.base_model)
    concept.bias = check_bias(concept.bias)
    concept.temperature = check_temperature(concept.temperature)
    if len(concept.bias_range) != 2:
        raise ValueError(f"bias_range is {concept.bias_range!r:.80}; expected two numbers")
    low, high = (_check_number("a bound of bias_range", bound, BIAS_BOUNDS) for bound in concept.bias_range)
    if low > high:
        raise ValueError(f"bias_range is ({low}, {high}); expected the lower bound first")
    concept.bias_range = (low, high)
    if not isinstance(concept.training, dict):
        raise ValueError(f"training is a {type(concept.training).__name__}; expected a dict")
    _check_json("training", concept.training, MAX_DEPTH)


def check_shapes(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless tensors have the names and shapes of those of a concept."""
    for name in shapes:
        _check_text("the name of a tensor", name)
    count = sum(name.startswith(EMBEDDING_PREFIX) for name in shapes)
    expected = [*VECTORS, *(f"{EMBEDDING_PREFIX}{number}" for number in range(max(count, 1)))]
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected and not name.startswith(OUTPUT_PREFIX)]
    if missing or unexpected:
        raise ValueError(f"tensors missing: {missing[:5]}; not expected: {unexpected[:5]}")
    if len(shapes) == len(expected):
        raise ValueError("target_outputs is empty; expected one vector for each cross-attention layer")
    for name, shape in shapes.items():
        if len(shape) != 1 or not 0 < shape[0] < MAX_FILE_BYTES:
            raise ValueError(f"{name} has shape {tuple(shape)}; expected a vector")
    for name in VECTORS:
        if shapes[name] != shapes["target_input"]:
            raise ValueError(f"{name} has {shapes[name][0]} numbers; expected {shapes['target_input'][0]}")


@dataclass
class ConceptHeader:
    """The description of a concept in the header of its file: enough to list it, find it and show it on a card.

    Attributes:
        placeholder_token, superclass, bias, temperature, bias_range, base_model, training: as in `PerfusionConcept`.
        width: of the encoder hidden states that it edits, `d`.
        layers: length of each target output by the module name of its attention layer.
        dtype: of the tensors, one of the values of `DTYPES`.

    Raises:
        ValueError: if a field is out of range.
    """

    placeholder_token: str
    superclass: str
    bias: float
    temperature: float
    bias_range: tuple[float, float]
    base_model: str
    training: dict[str, Any]
    width: int
    layers: dict[str, int]
    dtype: str

    def __post_init__(self) -> None:
        check_description(self)

    @classmethod
    def parse(cls, metadata: Any, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> "ConceptHeader":
        """Return the header that the metadata and the tensor shapes of a safetensors file describe.

        Args:
            metadata: `__metadata__` of the header, a mapping of strings or something else that a stranger put there.
            tensors: dtype, as safetensors names it, and shape of each tensor.

        Raises:
            ValueError: if it is not the header of a concept file of this format version.
        """
        description = _parse_description(metadata.get(HEADER_KEY) if isinstance(metadata, Mapping) else None)
        for name, (dtype, _) in tensors.items():
            if dtype not in DTYPES:
                raise ValueError(f"{printable(name)} is {printable(dtype)}; expected one of {', '.join(DTYPES)}")
        check_shapes({name: shape for name, (_, shape) in tensors.items()})
        width = tensors["target_input"][1][0]
        if description["width"] != width:
            raise ValueError(f"target_input has {width} numbers, but the header says {description['width']}")
        return cls(
            **description,
            layers={
                name.removeprefix(OUTPUT_PREFIX): shape[0]
                for name, (_, shape) in tensors.items()
                if name.startswith(OUTPUT_PREFIX)
            },
            dtype=DTYPES[tensors["superclass_input"][0]],
        )

    @classmethod
    def from_bytes(cls, start: bytes, size: int) -> "ConceptHeader":
        """Return the header of a concept file from the bytes that it begins with.

        Args:
            start: the first `8 + MAX_HEADER_BYTES` bytes, or all of a smaller file. What follows the header is unused.
            size: of the whole file.

        Raises:
            ValueError: if it is not the header of a concept file of this format version, or not of such a size.
        """
        if size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes, which no concept file has")
        length = int.from_bytes(start[:8], "little")
        header = start[: 8 + length]
        other = next((kind for magic, kind in _OTHER_KINDS.items() if start[:100].lstrip().startswith(magic)), None)
        if length > MAX_HEADER_BYTES and start[8:9] != b"{":
            raise ValueError(other or "it is not a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes; expected at most {MAX_HEADER_BYTES}")
        try:
            # Checked as a whole file is, with zeros in place of its numbers.
            tensors = deserialize(header + bytes(max(size - len(header), 0)))
        except SafetensorError as error:
            raise ValueError(other or f"it is truncated or not a safetensors file ({printable(error)})") from error
        return cls.parse(
            json.loads(header[8:]).get("__metadata__"),
            # The library's order is another in each call.
            {name: (tensor["dtype"], tensor["shape"]) for name, tensor in sorted(tensors, key=itemgetter(0))},
        )

    @classmethod
    def read(cls, path: str | os.PathLike) -> "ConceptHeader":
        """Return the header of a concept file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a whole concept file of this format version.
        """
        with open_concept_file(path) as content:
            return cls.from_bytes(content, len(content))


def find_local_file(
    source: str | os.PathLike, weight_name: str = WEIGHT_NAME, subfolder: str | None = None
) -> Path | None:
    """Return the path of a concept file on disk, or None if `source` is neither a file nor a folder.

    Args:
        source: a concept file, or a folder with one.
        weight_name: name of the file in the folder.
        subfolder: where in the folder it is.

    Raises:
        FileNotFoundError: if there is no such file in the folder, or a link to it leads nowhere.
    """
    # Not Path.is_file and Path.is_dir, which raise errors for a text that cannot be a path and take "" for ".".
    is_folder = os.path.isdir(source)
    path = Path(source, subfolder or "", weight_name) if is_folder else Path(source)
    if os.path.islink(path) and not os.path.exists(path):
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist")
    if not is_folder:
        return path if os.path.isfile(source) else None
    if not path.is_file():
        files = [*sorted(path.parent.glob("*.safetensors")), *sorted(path.parent.glob("*/*.safetensors"))]
        found = ", ".join(file.relative_to(path.parent).as_posix() for file in files[:5]) or "no safetensors file"
        raise FileNotFoundError(
            f"{path.parent} has no {weight_name}; it holds {found} (give the path of one, or weight_name=)"
        )
    return path


def check_same_token(path: Path, placeholder_token: str) -> None:
    """Raise ValueError if a file is there that a concept of this token must not replace: another's, or of none."""
    if not os.path.exists(path):
        return
    try:
        held = ConceptHeader.read(path).placeholder_token
    except ValueError as error:
        raise ValueError(f"{error}; delete it, or choose another folder or name") from error
    if held != placeholder_token:
        raise ValueError(f"{path} is the concept {held}; choose another folder or name for {placeholder_token}")


@contextmanager
def open_concept_file(path: str | os.PathLike) -> Iterator[bytes]:
    """Read a concept file into memory, where nobody changes it, and name its path in every error of the `with` body.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if the body raises ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a concept file such as {WEIGHT_NAME}")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    try:
        yield content
    except ValueError as error:
        raise ValueError(f"{path} is not a valid concept file: {error!s:.400}") from error


def _parse_description(text: Any) -> dict[str, Any]:
    """Return the fields in the JSON description of a concept file, with their types checked but not their values."""
    if not isinstance(text, str):
        raise ValueError(
            f"there is no {HEADER_KEY!r} description in the header, so it is not a Perfusion concept; load a LoRA "
            "with load_lora_weights() and a Textual Inversion with load_textual_inversion()"
        )
    try:
        description = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the {HEADER_KEY!r} description in the header is not JSON") from error
    if not isinstance(description, dict):
        raise ValueError(f"the {HEADER_KEY!r} description in the header is not a JSON object")
    version = description.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"it has format version {version!r:.80}, but this release of diffusers_perfusion reads version "
            f"{FORMAT_VERSION}; train the concept again, or install the release that wrote the file"
        )
    expected: dict[str, type | tuple[type, ...]] = {
        "placeholder_token": str,
        "superclass": str,
        "bias": (int, float),
        "temperature": (int, float),
        "bias_range": list,
        "base_model": str,
        "training": dict,
        "width": int,
    }
    if description.keys() != expected.keys():
        raise ValueError(f"the header describes {printable(sorted(description))}; expected {sorted(expected)}")
    for name, kind in expected.items():
        if not isinstance(description[name], kind):
            raise ValueError(f"{name} in the header is {description[name]!r:.80}, which is of the wrong type")
    description["bias_range"] = tuple(description["bias_range"])
    return description


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise ValueError(f"{name} is {value!r:.80}; expected at most 256 printable characters")


def _check_json(name: str, value: Any, depth: int) -> None:
    """Raise ValueError unless a value is plain JSON with at most `depth` lists and objects in each other."""
    if isinstance(value, (dict, list, tuple)):
        if depth == 0:
            raise ValueError(f"{name} has more than {MAX_DEPTH} lists and objects in each other")
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name} has a key that is no text; expected plain JSON")
        for part in value.values() if isinstance(value, dict) else value:
            _check_json(name, part, depth - 1)
    elif not isinstance(value, (str, int, float, type(None))):
        raise ValueError(f"{name} holds a {type(value).__name__}; expected plain JSON")


def _check_number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and bounds[0] <= value <= bounds[1]):
        raise ValueError(f"{name} is {value!r:.80}; expected a number from {bounds[0]} to {bounds[1]}")
    return float(value)
