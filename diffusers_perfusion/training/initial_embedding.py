"""The token embeddings that a training starts from."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model_families import ModelFamily
from ..placeholder_tokens import PlaceholderTokens, known_token
from .config import TrainingConfig
from .superclass import TEMPLATES, superclass_embeddings
from .tensor_files import check_extent, read_tensors

# Keys of the two embeddings in a Textual Inversion file for two text encoders, in the order of the encoders.
_TWO_ENCODERS = ("clip_l", "clip_g")


def load_embeddings(path: str | os.PathLike) -> list[Tensor]:
    """Read the vectors of a Textual Inversion file, one per text encoder, `(d_token,)` each.

    Files of diffusers (`.safetensors`, `.bin`) and of A1111 (`.pt`) are read, without running code in them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no Textual Inversion file {path}")
    try:
        content = read_tensors(path)
        content = content.get("string_to_param", content)
        names = _TWO_ENCODERS if content.keys() == set(_TWO_ENCODERS) else tuple(content)
        if len(names) != 1 and names is not _TWO_ENCODERS:
            raise ValueError(f"it has {len(names)} tensors")
        vectors = [check_extent(content[name]).detach().float().squeeze() for name in names]
        for vector in vectors:
            if vector.ndim != 1 or not torch.isfinite(vector).all():
                raise ValueError(f"its tensor is of shape {tuple(vector.shape)}")
    except Exception as error:  # each reader has errors of its own for a broken file
        raise ValueError(f"{path} does not hold one finite vector of Textual Inversion: {error}") from error
    return vectors


def initial_embeddings(family: ModelFamily, config: TrainingConfig) -> list[Tensor]:
    """Return the initial `v*` of each text encoder: from the file, or of the super-class's last token.

    In joint attention, where none is learned, they are zeros.

    Raises:
        FileNotFoundError: as `load_embeddings`.
        ValueError: as `load_embeddings`, or if a tokenizer does not know the super-class.
    """
    if config.initial_embedding:
        return load_embeddings(config.initial_embedding)
    embeddings = superclass_embeddings(family, config.superclass)
    return [torch.zeros_like(vector) for vector in embeddings] if family.joint else embeddings


@torch.no_grad()
def token_input(family: ModelFamily, token: str, embeddings: Sequence[Tensor], superclass: str) -> Tensor:
    """Return the encoder hidden state at a token with these embeddings, averaged over `TEMPLATES`, `(d,)`.

    Raises:
        ValueError: if there is not one embedding per text encoder, or one has another width than its text encoder's.
    """
    with known_token(family, token, embeddings, superclass):
        ids = family.tokenize([template.format(token) for template in TEMPLATES])
        positions = [places[0] for places in token_positions(family, token, ids)]
        return family.encode(ids).inputs[torch.arange(len(positions)), torch.tensor(positions)].mean(0)


def token_positions(family: ModelFamily, token: str, input_ids: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return the positions of a placeholder token in the hidden states of each prompt.

    Args:
        family: whose tokenizers know the token.
        token: the placeholder token.
        input_ids: of the prompts, for each text encoder, `(prompts, length)`.

    Raises:
        ValueError: if a prompt does not hold the token, because it is longer than the text encoders read.
    """
    found = []
    for text_encoder, ids in zip(family.text_encoders, input_ids, strict=True):
        tokens: Any = PlaceholderTokens.existing(text_encoder)
        found.append([tokens.positions(row).get(token, ()) for row in ids.tolist()])
    positions = [family.row_positions(of_prompt) for of_prompt in zip(*found, strict=True)]
    if not all(positions):
        raise ValueError(
            f"{token} falls off the end of the caption, of which the text encoder reads "
            f"{max(ids.shape[-1] for ids in input_ids)} tokens; expected it earlier"
        )
    return positions
