"""`PerfusionConcept`: everything a concept file holds, and the file itself; `ConceptHeader`: what it says of itself.

A file is one safetensors file: one-dimensional tensors, and a JSON description under a single key of its header (one
key, because safetensors does not promise an order among several, and a fit must give the same bytes each time).
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

WEIGHT_NAME = "perfusion.safetensors"
FORMAT_VERSION = 1
HEADER_KEY = "perfusion"

# A stranger's file is refused above these before anything in it is read: SDXL in float32 needs 0.4 MB and 74 tensors.
MAX_FILE_BYTES = 64 * 2**20
MAX_TENSORS = 4096

BIAS_BOUNDS = (0.0, 2.0)
TEMPERATURE_BOUNDS = (0.01, 1.0)

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_VECTORS = ("word_embedding", "target_input", "inverse_target_input", "superclass_input")
_OPTIONAL = ("word_embedding_2",)
_OUTPUT_PREFIX = "target_outputs."


def check_bias(bias: float) -> float:
    """Return `bias` as a float, or raise ValueError if it is no number in `BIAS_BOUNDS`."""
    return _check_number("bias", bias, BIAS_BOUNDS)


def check_temperature(temperature: float) -> float:
    """Return `temperature` as a float, or raise ValueError if it is no number in `TEMPERATURE_BOUNDS`."""
    return _check_number("temperature", temperature, TEMPERATURE_BOUNDS)


def check_words(placeholder_token: str, superclass: str) -> None:
    """Raise ValueError unless they can be a concept's word and its super-category."""
    _check_text("placeholder_token", placeholder_token)
    _check_text("superclass", superclass)
    if not placeholder_token or any(c.isspace() for c in placeholder_token):
        raise ValueError(f"placeholder_token is {placeholder_token!r}; expected one word without spaces")
    if not superclass.strip():
        raise ValueError("superclass is empty; expected the super-category in plain words, such as 'teddy bear'")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise ValueError(f"{name} is {value!r:.80}; expected at most 256 printable characters")


def _check_number(name: str, value: Any, bounds: tuple[float, float]) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number and bounds[0] <= value <= bounds[1]):
        raise ValueError(f"{name} is {value!r}; expected a number from {bounds[0]} to {bounds[1]}")
    return float(value)


def _check_description(described: "PerfusionConcept | ConceptHeader") -> None:
    """Check what a concept says of itself; whole numbers become floats, and a list of two a pair."""
    check_words(described.placeholder_token, described.superclass)
    _check_text("base_model", described.base_model)
    described.bias = check_bias(described.bias)
    described.temperature = check_temperature(described.temperature)
    if len(described.bias_range) != 2:
        raise ValueError(f"bias_range is {described.bias_range!r:.80}; expected two numbers")
    low, high = (_check_number("a bound of bias_range", bound, BIAS_BOUNDS) for bound in described.bias_range)
    if low > high:
        raise ValueError(f"bias_range is ({low}, {high}); expected the lower bound first")
    described.bias_range = (low, high)
    if not isinstance(described.training, dict):
        raise ValueError(f"training is a {type(described.training).__name__}; expected a dict")


@dataclass
class ConceptHeader:
    """What a concept file says of itself before any number in it is read: enough to list, describe and find it.

    Attributes:
        placeholder_token, superclass, bias, temperature, bias_range, base_model, training: as in `PerfusionConcept`.
        width: of the text encoding it edits, `d`.
        layers: how many numbers each target output has, by its layer's module name.
        dtype: of the numbers.

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
    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_description(self)

    @classmethod
    def parse(
        cls, metadata: Mapping[str, str] | None, tensors: Mapping[str, tuple[str, Sequence[int]]]
    ) -> "ConceptHeader":
        """The header from what any reader of safetensors files gives.

        Args:
            metadata: the strings in the header.
            tensors: dtype, as safetensors names it, and shape of each tensor.

        Raises:
            ValueError: if it is not the header of a concept file of this format version.
        """
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"it has {len(tensors)} tensors; expected at most {MAX_TENSORS}")
        description = _parse_header((metadata or {}).get(HEADER_KEY))
        _check_names(tensors)
        for name, (dtype, shape) in tensors.items():
            if dtype not in _DTYPES or len(shape) != 1:
                raise ValueError(f"{name} is {dtype} of shape {shape}; expected a vector of {', '.join(_DTYPES)}")
        return cls(
            **description,
            layers={
                name.removeprefix(_OUTPUT_PREFIX): shape[0]
                for name, (_, shape) in tensors.items()
                if name.startswith(_OUTPUT_PREFIX)
            },
            dtype=_DTYPES[tensors["target_input"][0]],
        )

    @classmethod
    def read(cls, path: str | os.PathLike) -> "ConceptHeader":
        """The header of a concept file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no whole concept file of this format version.
        """
        with _open(Path(path)) as file:
            return _header_of(file)


@dataclass(eq=False)
class PerfusionConcept:
    """One learned concept: the contents of a concept file.

    Attributes:
        placeholder_token: the word that calls the concept in a prompt, such as `<my-cat>`.
        superclass: the super-category in plain words, such as `teddy bear`.
        word_embedding: `v*`, the input embedding of the word, `(d_word,)`.
        word_embedding_2: the same for the second text encoder of a model that has two, such as SDXL.
        target_input: `i*`, where in text space the concept lives, `(d,)`.
        inverse_target_input: `C⁻¹ i*`, `(d,)`; its scale is free.
        superclass_input: `i_super`, the encoding of the super-category, `(d,)`. The locked key of a layer is
            `o*_K = W_K i_super`, of whichever model loads the concept.
        target_outputs: `o*_V`, `(d_out,)` for each cross-attention layer by its module name.
        bias: `β` to generate with unless another is set.
        temperature: `τ` to generate with unless another is set (the paper's 0.15).
        bias_range: the lowest and highest `β` worth trying.
        base_model: id or name of the model it was fitted on.
        training: how it was fitted; plain JSON.

    Raises:
        ValueError: if a field is out of range, or a tensor has a wrong shape or holds NaN or infinity.
    """

    placeholder_token: str
    superclass: str
    word_embedding: Tensor
    target_input: Tensor
    inverse_target_input: Tensor
    superclass_input: Tensor
    target_outputs: dict[str, Tensor]
    bias: float = 1.2
    temperature: float = 0.15
    bias_range: tuple[float, float] = (0.8, 1.8)
    base_model: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    word_embedding_2: Tensor | None = None

    def __post_init__(self) -> None:
        _check_description(self)
        if not self.target_outputs:
            raise ValueError("target_outputs is empty; expected one vector for each cross-attention layer")
        for name, tensor in self._tensors():
            if tensor.ndim != 1 or len(tensor) == 0:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a vector")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinity")
        for name in ("inverse_target_input", "superclass_input"):
            if len(getattr(self, name)) != self.width:
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers and target_input {self.width}")
        if not self.target_input.float() @ self.inverse_target_input.float() > 0:
            raise ValueError("target_input and inverse_target_input give ‖i*‖² ≤ 0; they are not from one fit")

    @property
    def width(self) -> int:
        """Width of the text encoding it edits, `d`: 768 for SD 1.x."""
        return len(self.target_input)

    @property
    def word_embeddings(self) -> list[Tensor]:
        """`v*` for each text encoder."""
        return [self.word_embedding] if self.word_embedding_2 is None else [self.word_embedding, self.word_embedding_2]

    def _vectors(self) -> dict[str, Tensor]:
        """The tensors that do not belong to a layer, by their names in the file."""
        vectors = {name: getattr(self, name) for name in (*_VECTORS, *_OPTIONAL)}
        return {name: vector for name, vector in vectors.items() if vector is not None}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name in the file."""
        yield from self._vectors().items()
        for layer, tensor in self.target_outputs.items():
            yield _OUTPUT_PREFIX + layer, tensor

    def to(self, *args: Any, **kwargs: Any) -> "PerfusionConcept":
        """The same concept with every tensor passed through `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> "PerfusionConcept":
        """The same concept with every tensor out of its graph."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PerfusionConcept":
        vectors: dict[str, Any] = {name: change(vector) for name, vector in self._vectors().items()}
        outputs = {layer: change(output) for layer, output in self.target_outputs.items()}
        return replace(self, **vectors, target_outputs=outputs)

    def state_dict(self, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
        """What is in the file: its tensors by name, and the JSON description under `perfusion`.

        Raises:
            ValueError: if a number is too large for `dtype`.
        """
        # C⁻¹ i* may have any scale; at a maximum of one its small entries stay normal numbers in float16.
        inverse = self.inverse_target_input / self.inverse_target_input.abs().max()
        tensors = {}
        for name, tensor in replace(self, inverse_target_input=inverse)._tensors():
            tensors[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if not torch.isfinite(tensors[name]).all():
                raise ValueError(f"{name} does not fit into {dtype}; save it with dtype=torch.float32")
        header = {
            name: getattr(self, name)
            for name in (f.name for f in fields(self))
            if name not in (*_VECTORS, *_OPTIONAL, "target_outputs")
        }
        return tensors | {HEADER_KEY: json.dumps({"format_version": FORMAT_VERSION, "width": self.width} | header)}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "PerfusionConcept":
        """A concept from what `state_dict` gives.

        Raises:
            ValueError: if anything is missing, left over, of a wrong kind or of another format version.
        """
        tensors = dict(state_dict)
        header = _parse_header(tensors.pop(HEADER_KEY, None))
        _check_names(tensors)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES.values():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} is {kind}; expected a tensor of float16, bfloat16 or float32")
        width = header.pop("width")
        concept = cls(
            **header,
            **{name: tensor for name, tensor in tensors.items() if not name.startswith(_OUTPUT_PREFIX)},
            target_outputs={
                name.removeprefix(_OUTPUT_PREFIX): tensor
                for name, tensor in tensors.items()
                if name.startswith(_OUTPUT_PREFIX)
            },
        )
        if concept.width != width:
            raise ValueError(f"target_input has {concept.width} numbers, but the header says {width}")
        return concept

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> Path:
        """Write the concept file, whole or not at all, and return its path.

        Args:
            path: the file to write; folders on the way are made.
            dtype: of the tensors in the file. float16 moves the gate by less than 0.001.

        Raises:
            ValueError: if a number is too large for `dtype`.
        """
        tensors = self.state_dict(dtype)
        header = tensors.pop(HEADER_KEY)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, serialize(tensors, metadata={HEADER_KEY: header}))
        return path

    def push_to_hub(self, repo_id: str, **options: Any) -> "CommitInfo":
        """Upload the concept with a card to the Hugging Face Hub, as `PerfusionLoaderMixin.push_perfusion_to_hub`.

        Args:
            repo_id: id of the repository; it is made if it is not there.
            options: `weight_name`, `samples`, `sweep`, `license`, `private`, `token`, `create_pr`, `commit_message`
                and `revision`, as `hub.push_concept` describes them.

        Raises:
            ValueError: if an option is out of range.
            OSError: if the Hub cannot be reached or refuses. It says what is on the Hub then; the same call goes on.
        """
        # Here, because `hub` reads concepts and so imports this module.
        from .hub import push_concept

        return push_concept(self, repo_id, **options)

    @classmethod
    def from_ckpt(
        cls, path: str | os.PathLike, pipeline: Any, placeholder_token: str, superclass: str | None = None
    ) -> "PerfusionConcept":
        """A concept from a checkpoint of another implementation, for the model that it was trained on.

        Those of ChenDarYen (`.ckpt`) and of `perfusion-pytorch` are known. A warning says what of it is lost. They are
        pickles, read with `weights_only=True`, so no code in them can run.

        Args:
            path: the checkpoint.
            pipeline: of its base model, Stable Diffusion 1.x or 2.x.
            placeholder_token: the concept's word here.
            superclass: its super-category; by default what the checkpoint says, which those of `perfusion-pytorch`
                do not.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no such checkpoint, holds more than one concept, is of another model, or nobody says
                the super-category.
        """
        # Here, because `foreign` makes concepts and so imports this module.
        from .foreign import read_ckpt

        return read_ckpt(Path(path), pipeline, placeholder_token, superclass)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PerfusionConcept":
        """Read a concept file. Sizes, names, shapes and dtypes are checked before a tensor is read.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no whole, valid concept file of this format version.
        """
        with _open(Path(path)) as file:
            _header_of(file)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return cls.from_state_dict(tensors | {HEADER_KEY: file.metadata()[HEADER_KEY]})


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A concept file as `safe_open` gives it; what is wrong with it, then or in the body, is said with its path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a concept file such as {WEIGHT_NAME}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a concept file has at most {MAX_FILE_BYTES}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        # Only now, because the length that a safetensors file begins with may be these very bytes.
        with path.open("rb") as file:
            if file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise ValueError(f"{path} is a pickle, which can run code; only safetensors files are read") from error
        raise ValueError(f"{path} is truncated or not a safetensors file ({error!s:.400})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a valid concept file: {error!s:.400}") from error


def _header_of(file: Any) -> ConceptHeader:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return ConceptHeader.parse(
        file.metadata(), {name: (entry.get_dtype(), entry.get_shape()) for name, entry in slices.items()}
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one, or none, but never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _check_names(names: Any) -> None:
    missing = [name for name in _VECTORS if name not in names]
    known = (*_VECTORS, *_OPTIONAL)
    unexpected = [name for name in names if name not in known and not name.startswith(_OUTPUT_PREFIX)]
    if missing or unexpected:
        raise ValueError(f"tensors missing: {missing}; not expected: {unexpected[:5]}")


def _parse_header(text: Any) -> dict[str, Any]:
    """The fields in the JSON description, types checked; what they may hold is the constructor's matter."""
    if not isinstance(text, str):
        raise ValueError(f"there is no {HEADER_KEY!r} description in the header, so it is not a Perfusion concept")
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the {HEADER_KEY!r} description in the header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"the {HEADER_KEY!r} description in the header is not a JSON object")
    version = header.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}; this release of diffusers_perfusion reads {FORMAT_VERSION}")
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
    if header.keys() != expected.keys():
        raise ValueError(f"the header describes {sorted(header)}; expected {sorted(expected)}")
    for name, kind in expected.items():
        if not isinstance(header[name], kind):
            raise ValueError(f"{name} in the header is {header[name]!r:.80}")
    header["bias_range"] = tuple(header["bias_range"])
    return header
