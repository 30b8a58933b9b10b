"""The word embedding that a concept starts from."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..text import TEMPLATES, TextEncoders, initial_word_embeddings
from ..vocabulary import Vocabulary
from .config import FitConfig

# Names of the embeddings for the two text encoders of SDXL, in their order.
SDXL = ("clip_l", "clip_g")


def load_embeddings(path: str | os.PathLike) -> list[Tensor]:
    """The vectors in a Textual Inversion file, `(d_word,)` each: one, or one for each text encoder of SDXL.

    It may be of diffusers (`.safetensors`, `.bin`) or of A1111 (`.pt`). A pickle is read with `weights_only=True`, so
    no code in it can run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no Textual Inversion file {path}")
    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
        held = held.get("string_to_param", held)
        if len(names := SDXL if held.keys() == set(SDXL) else tuple(held)) != 1 and names is not SDXL:
            raise ValueError(f"it has {len(names)} tensors")
        vectors = [held[name].detach().float().squeeze() for name in names]
        for vector in vectors:
            if vector.ndim != 1 or not torch.isfinite(vector).all():
                raise ValueError(f"its tensor is of shape {tuple(vector.shape)}")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, which could run code; expected one embedding") from error
    except Exception as error:  # each reader has errors of its own for a broken file
        raise ValueError(f"{path} does not hold one finite vector of Textual Inversion: {error}") from error
    return vectors


def initial_embeddings(texts: TextEncoders, config: FitConfig) -> list[Tensor]:
    """Where `v*` starts in each text encoder: what the config names, or the super-category's last token.

    Raises:
        FileNotFoundError: as `load_embeddings`.
        ValueError: as `load_embeddings`, or if a tokenizer does not know the super-category.
    """
    if config.initial_embedding:
        return load_embeddings(config.initial_embedding)
    return initial_word_embeddings(texts, config.superclass)


@torch.no_grad()
def word_input(texts: TextEncoders, word: str, embeddings: Sequence[Tensor], superclass: str) -> Tensor:
    """The encoding at a word with these embeddings, averaged over `TEMPLATES`, `(d,)`.

    Raises:
        ValueError: if there is not one for each text encoder, of its width.
    """
    words = Vocabulary(texts)
    words.add(word, embeddings, superclass)
    words.enable()
    try:
        ids = texts.tokenize([template.format(word) for template in TEMPLATES])
        at = words.positions(ids, word)
        return texts.encode(ids).inputs[torch.arange(len(at)), at].mean(0)
    finally:
        words.disable()
