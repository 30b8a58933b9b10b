"""The format of a concept file, and `ConceptHeader`, the description in it, which is read without torch.

A concept file is a safetensors file of one-dimensional tensors, with a JSON description under a single key of its
header: one key, because safetensors does not promise an order among several, and the same concept must give the same
bytes.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

WEIGHT_NAME = "perfusion.safetensors"
FORMAT_VERSION = 3
HEADER_KEY = "perfusion"

# A downloaded file is refused above these before any tensor is read: SDXL in float32 needs 0.4 MB and 75 tensors.
MAX_FILE_BYTES = 64 * 2**20
MAX_TENSORS = 4096

BIAS_BOUNDS = (0.0, 2.0)
TEMPERATURE_BOUNDS = (0.01, 1.0)

# The dtypes that a tensor may have, as safetensors names them, with the names that torch has for them.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

# Names of tensors: the vectors of a concept, and the prefixes before a text encoder's number and a layer's name.
VECTORS = ("target_input", "inverse_target_input", "superclass_input", "inverse_superclass_input")
EMBEDDING_PREFIX = "token_embeddings."
OUTPUT_PREFIX = "target_outputs."


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
    def parse(
        cls, metadata: Mapping[str, str] | None, tensors: Mapping[str, tuple[str, Sequence[int]]]
    ) -> "ConceptHeader":
        """Return the header that the metadata and the tensor shapes of a safetensors file describe.

        Args:
            metadata: the strings in the header.
            tensors: dtype, as safetensors names it, and shape of each tensor.

        Raises:
            ValueError: if it is not the header of a concept file of this format version.
        """
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"it has {len(tensors)} tensors; expected at most {MAX_TENSORS}")
        description = parse_description((metadata or {}).get(HEADER_KEY))
        check_names(tensors)
        for name, (dtype, shape) in tensors.items():
            if dtype not in DTYPES or len(shape) != 1:
                raise ValueError(f"{name} is {dtype} of shape {shape}; expected a vector of {', '.join(DTYPES)}")
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
    def read(cls, path: str | os.PathLike) -> "ConceptHeader":
        """Return the header of a concept file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a whole concept file of this format version.
        """
        with open_concept_file(path, "np") as file:
            return cls.of(file)

    @classmethod
    def of(cls, file: Any) -> "ConceptHeader":
        """Return the header of a file that `open_concept_file` has opened."""
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return cls.parse(
            file.metadata(), {name: (entry.get_dtype(), entry.get_shape()) for name, entry in slices.items()}
        )


def find_local_file(
    source: str | os.PathLike, weight_name: str = WEIGHT_NAME, subfolder: str | None = None
) -> Path | None:
    """Return the path of a concept file on disk, or None if `source` is neither a file nor a folder.

    Args:
        source: a concept file, or a folder with one.
        weight_name: name of the file in the folder.
        subfolder: where in the folder it is.

    Raises:
        FileNotFoundError: if there is no such file in the folder.
    """
    path = Path(source)
    if os.path.isfile(path):  # unlike Path.is_file, no error for a text that cannot be a path
        return path
    if not os.path.isdir(path):
        return None
    path = path / (subfolder or "") / weight_name
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in path.parent.glob("*.safetensors"))) or "no safetensors file"
        raise FileNotFoundError(f"{path.parent} has no {weight_name}; it holds {found} (choose with weight_name=)")
    return path


@contextmanager
def open_concept_file(path: str | os.PathLike, framework: str) -> Iterator[Any]:
    """Open a concept file as `safetensors.safe_open` does, and name its path in every error, also of the `with` body.

    Args:
        path: of the file.
        framework: of the tensors, as `safe_open` takes it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too large, not a whole safetensors file, or the body raises ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a concept file such as {WEIGHT_NAME}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a concept file has at most {MAX_FILE_BYTES}")
    try:
        with safe_open(path, framework) as file:
            yield file
    except SafetensorError as error:
        # Checked only now, because the length that a safetensors file begins with may be these very bytes.
        with path.open("rb") as file:
            if file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise ValueError(f"{path} is a pickle, which can run code; only safetensors files are read") from error
        raise ValueError(f"{path} is truncated or not a safetensors file ({error!s:.400})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a valid concept file: {error!s:.400}") from error


def check_names(names: Collection[str]) -> None:
    """Raise ValueError unless tensors are named like those of a concept file."""
    count = sum(name.startswith(EMBEDDING_PREFIX) for name in names)
    expected = [*VECTORS, *(f"{EMBEDDING_PREFIX}{number}" for number in range(max(count, 1)))]
    missing = [name for name in expected if name not in names]
    unexpected = [name for name in names if name not in expected and not name.startswith(OUTPUT_PREFIX)]
    if missing or unexpected:
        raise ValueError(f"tensors missing: {missing[:5]}; not expected: {unexpected[:5]}")


def parse_description(text: Any) -> dict[str, Any]:
    """Return the fields in the JSON description of a concept file, with their types checked but not their values."""
    if not isinstance(text, str):
        raise ValueError(f"there is no {HEADER_KEY!r} description in the header, so it is not a Perfusion concept")
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
        raise ValueError(f"the header describes {sorted(description)}; expected {sorted(expected)}")
    for name, kind in expected.items():
        if not isinstance(description[name], kind):
            raise ValueError(f"{name} in the header is {description[name]!r:.80}, which is of the wrong type")
    description["bias_range"] = tuple(description["bias_range"])
    return description


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise ValueError(f"{name} is {value!r:.80}; expected at most 256 printable characters")


def _check_number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and bounds[0] <= value <= bounds[1]):
        raise ValueError(f"{name} is {value!r}; expected a number from {bounds[0]} to {bounds[1]}")
    return float(value)
