"""`PerfusionConcept`: what a concept file holds, with its tensors."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin
from PIL import Image
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from .attention_processor import attn_processors
from .concept_file import (
    DESCRIPTION,
    DTYPES,
    EMBEDDING_PREFIX,
    FORMAT_VERSION,
    HEADER_KEY,
    OUTPUT_PREFIX,
    VECTORS,
    WEIGHT_NAME,
    ConceptHeader,
    check_description,
    check_same_token,
    check_shapes,
    open_concept_file,
    printable,
)
from .files import write_atomically
from .hub import card_entry, find_concept_file, push_concept_file
from .model_card import make_card

# As safetensors names them.
_DTYPES = {getattr(torch, name): code for code, name in DTYPES.items()}


@dataclass(eq=False)
class PerfusionConcept(ModelHubMixin):
    """One trained concept: the contents of a concept file.

    Attributes:
        placeholder_token: the token that stands for the concept in a prompt, such as `<my-cat>`.
        superclass: the super-class in plain words, such as `teddy bear`.
        token_embeddings: `v*`, the input embedding of the placeholder token for each text encoder, `(d_token,)` each.
        target_input: `i*`, the encoder hidden state at the placeholder token, `(d,)`.
        inverse_target_input: `C⁻¹ i*`, `(d,)`; its scale is free.
        superclass_input: `i_super`, the encoder hidden state of the super-class, `(d,)`. The locked key of a layer is
            `o*_K = W_K i_super`, of whichever model loads the concept.
        inverse_superclass_input: `C⁻¹ i_super`, `(d,)`; its scale is free.
        target_outputs: `o*_V`, `(d_out,)` for each cross-attention layer by its module name.
        bias: `β` to generate with unless another is set.
        temperature: `τ` to generate with unless another is set (the paper's 0.15).
        bias_range: the lowest and highest `β` worth trying.
        base_model: id or name of the model it was trained on.
        training: how it was trained; plain JSON.

    Raises:
        ValueError: if a field is out of range, or a tensor has a wrong shape or holds NaN or infinity.
    """

    # ModelHubMixin's own methods keep a config.json beside the weights: they read its fields into the constructor, ask
    # the Hub for it, delete it and write it. A concept file describes itself, so the methods here use that file alone.

    placeholder_token: str
    superclass: str
    token_embeddings: list[Tensor]
    target_input: Tensor
    inverse_target_input: Tensor
    superclass_input: Tensor
    inverse_superclass_input: Tensor
    target_outputs: dict[str, Tensor]
    bias: float = 0.7
    temperature: float = 0.15
    bias_range: tuple[float, float] = (0.6, 1.2)
    base_model: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def __new__(cls, *args: Any, **kwargs: Any) -> "PerfusionConcept":
        """Create the object without the copy of its arguments that ModelHubMixin keeps."""
        return object.__new__(cls)

    def __post_init__(self) -> None:
        check_description(self)
        if not isinstance(self.token_embeddings, (list, tuple)) or not self.token_embeddings:
            raise ValueError("token_embeddings is not a list of vectors; expected one vector for each text encoder")
        self.token_embeddings = list(self.token_embeddings)
        tensors = dict(self._tensors())
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        check_shapes({name: tensor.shape for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinity")
        for name in ("target_input", "superclass_input"):
            norm = getattr(self, name).float() @ getattr(self, f"inverse_{name}").float()
            if not torch.finfo(torch.float32).tiny < norm < torch.inf:
                raise ValueError(
                    f"{name} and inverse_{name} give ‖i‖² = {norm:.2g}; expected a positive number, as of one concept"
                )

    @property
    def width(self) -> int:
        """Width of the encoder hidden states that the concept edits, `d`: 768 for SD 1.x."""
        return len(self.target_input)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name in the file."""
        for number, embedding in enumerate(self.token_embeddings):
            yield f"{EMBEDDING_PREFIX}{number}", embedding
        for name in VECTORS:
            yield name, getattr(self, name)
        for layer, output in self.target_outputs.items():
            yield OUTPUT_PREFIX + layer, output

    def to(self, *args: Any, **kwargs: Any) -> "PerfusionConcept":
        """Return the same concept with every tensor passed through `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> "PerfusionConcept":
        """Return the same concept with every tensor detached from its graph."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PerfusionConcept":
        return replace(self, **_fields_of({name: change(tensor) for name, tensor in self._tensors()}))

    def attn_processors(
        self, model: Any, bias: float | None = None, temperature: float | None = None
    ) -> dict[str, Any]:
        """Return processors for `model.set_attn_processor` with which an ordinary pipeline generates the concept.

        The pipeline's tokenizer and text encoder must know the placeholder token, as after
        `pipeline.load_textual_inversion({concept.placeholder_token: concept.token_embeddings[0]})`. The
        docstring of `PerfusionAttnProcessor` lists the drawbacks compared with `load_perfusion`.

        Args:
            model: a UNet, or a transformer with `attn_processors`; its processors are wrapped in the layers that the
                concept edits.
            bias: `β`; by default the concept's own.
            temperature: `τ`; by default the concept's own.

        Raises:
            ValueError: if the concept is of another model.
        """
        return attn_processors([self], model, bias, temperature)

    def state_dict(self, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
        """Return the contents of the file: its tensors by name, and the JSON description under `perfusion`.

        Raises:
            ValueError: if the numbers do not fit into `dtype`.
        """
        # C⁻¹ i may have any scale; at a maximum of one its small entries stay normal numbers in float16.
        inverses = {
            name: getattr(self, name) / getattr(self, name).abs().max()
            for name in ("inverse_target_input", "inverse_superclass_input")
        }
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
            for name, tensor in replace(self, **inverses)._tensors()
        }
        description = {
            "format_version": FORMAT_VERSION,
            "width": self.width,
            "placeholder_token": self.placeholder_token,
            "superclass": self.superclass,
            "bias": self.bias,
            "temperature": self.temperature,
            "bias_range": self.bias_range,
            "base_model": self.base_model,
            "training": self.training,
        }
        state_dict = tensors | {HEADER_KEY: json.dumps(description)}
        try:
            self.from_state_dict(state_dict)
        except ValueError as error:
            raise ValueError(f"in {dtype} {error}; save the concept with dtype=torch.float32") from error
        return state_dict

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> "PerfusionConcept":
        """Return the concept that a state dict describes.

        Raises:
            ValueError: if anything is missing, left over, of a wrong kind or of another format version.
        """
        tensors = dict(state_dict)
        description = tensors.pop(HEADER_KEY, None)
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        shapes = {name: (_DTYPES.get(tensor.dtype, tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
        header = ConceptHeader.parse({HEADER_KEY: description}, shapes)
        return cls._of(header, tensors)

    @classmethod
    def _of(cls, header: ConceptHeader, tensors: Mapping[str, Tensor]) -> "PerfusionConcept":
        return cls(**{name: getattr(header, name) for name in DESCRIPTION}, **_fields_of(tensors))

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> Path:
        """Write the concept file, whole or not at all, and return its path.

        Args:
            path: the file to write; missing folders are made.
            dtype: of the tensors in the file. float16 moves the gate by less than 0.001.

        Raises:
            ValueError: if the numbers do not fit into `dtype`, or the description is too long.
            OSError: if the file cannot be written.
        """
        tensors = self.state_dict(dtype)
        description = tensors.pop(HEADER_KEY)
        content = serialize(tensors, metadata={HEADER_KEY: description})
        ConceptHeader.from_bytes(content, len(content))  # raises if its description is too long
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "PerfusionConcept":
        """Return the concept in a file, whose sizes, names, shapes and dtypes are checked before any tensor is made.

        What happens to the file afterwards does not change the concept.

        Raises:
            FileNotFoundError: if there is no such file.
            OSError: if it cannot be read.
            ValueError: if it is not a whole, valid concept file of this format version.
        """
        with open_concept_file(path) as content:
            header = ConceptHeader.from_bytes(content, len(content))
            return cls._of(header, dict(sorted(deserialize(content).items())))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        weight_name: str = WEIGHT_NAME,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "PerfusionConcept":
        """Return the concept in a Hub repository, a folder or a file.

        Args:
            pretrained_model_name_or_path: id of a Hub repository, a folder or a file.
            weight_name: name of the concept file in the folder or repository.
            subfolder: where in the folder or repository it is.
            revision: branch, tag or commit of the repository.
            token: for private and gated repositories; True takes the stored one.
            cache_dir: where downloads are kept.
            force_download: download even a file that is in the cache.
            local_files_only: never ask the Hub.

        Raises:
            FileNotFoundError: if there is no such file in the folder or repository.
            ValueError: if there is no such file, folder or repository, or the file is not a valid concept file.
            OSError: if the download fails.
        """
        return cls.load(
            find_concept_file(
                pretrained_model_name_or_path,
                weight_name,
                subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_options: Any,
    ) -> CommitInfo | None:
        """Write the concept file and a model card into a folder. A card that is there already is kept.

        Args:
            save_directory: the folder; it is made if it does not exist.
            repo_id: id of the repository that the card names; by default the folder's name.
            push_to_hub: whether to push the concept to that repository too.
            push_options: as `push_to_hub` takes them.

        Returns:
            The commit if the concept was pushed.

        Raises:
            ValueError: if the folder has the file of another token.
        """
        path = Path(save_directory) / WEIGHT_NAME
        check_same_token(path, self.placeholder_token)
        self.save(path)
        repo_id = repo_id or path.parent.resolve().name
        if not (readme := path.with_name("README.md")).exists():
            write_atomically(readme, str(self.generate_model_card(repo_id)).encode())
        return self.push_to_hub(repo_id, **push_options) if push_to_hub else None

    def generate_model_card(self, repo_id: str) -> ModelCard:
        """Return the model card of a repository that holds this concept alone."""
        with tempfile.TemporaryDirectory() as folder:
            return make_card(repo_id, [card_entry(self.save(Path(folder) / WEIGHT_NAME))])

    def push_to_hub(  # type: ignore[override]
        self,
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
        """Upload the concept, its sample images and a model card to the Hugging Face Hub, in one commit.

        Args:
            repo_id: id of the repository; it is made if it does not exist. Other concepts in it stay.
            weight_name: name of the file there, for a repository of several concepts.
            samples: images generated with the concept, each after its prompt. They replace those of an earlier push.
            sweep: scores at other settings, rows with the same columns, for the card of a repository with one concept.
            license: id of the licence, as the Hub names it; by default the one that the card has already, if any.
            private: whether a new repository is private; by default as the owner's are.
            token: of a user who may write to it; by default the stored one.
            create_pr: open a pull request and leave the branch as it is.
            commit_message: by default it names the placeholder token.
            revision: branch to push to, made if it does not exist; by default `main`.

        Raises:
            ValueError: if an option is out of range, or a repository that is to be private is public.
            OSError: if the Hub cannot be reached or refuses. The message says what is on the Hub then; the same call
                can be repeated.
        """
        with tempfile.TemporaryDirectory() as folder:
            return push_concept_file(
                self.save(Path(folder) / WEIGHT_NAME),
                repo_id,
                weight_name=weight_name,
                samples=samples,
                sweep=sweep,
                license=license,
                private=private,
                token=token,
                create_pr=create_pr,
                commit_message=commit_message,
                revision=revision,
            )


def _check_tensor(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a tensor whose numbers can be read and saved."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{printable(name)} is a {type(value).__name__}; expected a tensor")
    kinds = {
        "nested": value.is_nested,
        "on meta": value.is_meta,
        "sparse": value.layout != torch.strided,
        "quantised": value.is_quantized,
    }
    if found := [kind for kind, is_it in kinds.items() if is_it]:
        raise ValueError(f"{printable(name)} is {found[0]}; expected an ordinary tensor")


def _fields_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the constructor arguments for tensors named as in a file, after `check_shapes`."""
    count = sum(name.startswith(EMBEDDING_PREFIX) for name in tensors)
    return {
        "token_embeddings": [tensors[f"{EMBEDDING_PREFIX}{number}"] for number in range(count)],
        **{name: tensors[name] for name in VECTORS},
        "target_outputs": {
            name.removeprefix(OUTPUT_PREFIX): tensor
            for name, tensor in tensors.items()
            if name.startswith(OUTPUT_PREFIX)
        },
    }
