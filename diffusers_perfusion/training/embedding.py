"""A Textual Inversion embedding as what a concept starts from."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..text import TEMPLATES, ConceptWords, encode, tokenize


def load_embedding(path: str | os.PathLike) -> Tensor:
    """The one vector in a Textual Inversion file of diffusers (`.safetensors`, `.bin`) or A1111 (`.pt`): `(d_word,)`.

    A pickle is read with `weights_only=True`, so no code in it can run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold one vector.
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
        (vector,) = (value.detach().float().squeeze() for value in held.values())
        if vector.ndim != 1 or not torch.isfinite(vector).all():
            raise ValueError(f"its tensor is of shape {tuple(vector.shape)}")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, which could run code; expected one embedding") from error
    except Exception as error:  # each reader has errors of its own for a broken file
        raise ValueError(f"{path} does not hold one finite vector of Textual Inversion: {error}") from error
    return vector


@torch.no_grad()
def word_input(tokenizer: Any, text_encoder: Any, word: str, embedding: Tensor, superclass: str) -> Tensor:
    """The encoding at a word with this embedding, averaged over `TEMPLATES`, `(d,)`.

    Raises:
        ValueError: if the embedding is of another width than the text encoder's.
    """
    words = ConceptWords(tokenizer, text_encoder)
    words.add(word, embedding, superclass)
    words.enable()
    try:
        ids = tokenize(tokenizer, [template.format(word) for template in TEMPLATES])
        at = words.positions(ids, word)
        return encode(text_encoder, ids)[torch.arange(len(ids)), at].mean(0)
    finally:
        words.disable()
