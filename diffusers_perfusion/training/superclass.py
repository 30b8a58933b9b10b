"""Initial values of a concept, from the super-class in template prompts."""

from typing import Any

import torch
from torch import Tensor

from ..model_families import ModelFamily
from ..model_families.base import embedding_table
from ..placeholder_tokens import superclass_ids

# Prompts in which the super-class is encoded, and the concept is trained with its placeholder token.
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a {}",
    "the photo of a {}",
    "a good photo of a {}",
)


def superclass_positions(tokenizer: Any, superclass: str, input_ids: Tensor) -> Tensor:
    """Return the positions of the last occurrence of a super-class in each row of token ids.

    Args:
        tokenizer: of the token ids.
        superclass: in plain words.
        input_ids: of prompts with the super-class, `(batch, length)`.

    Returns:
        `(batch, number of the super-class's tokens)`.

    Raises:
        ValueError: as `superclass_ids`.
    """
    wanted = torch.tensor(superclass_ids(tokenizer, superclass))
    start = [int((row.unfold(0, len(wanted), 1) == wanted).all(-1).nonzero()[-1, 0]) for row in input_ids]
    return torch.tensor(start)[:, None] + torch.arange(len(wanted))


@torch.no_grad()
def superclass_input(family: ModelFamily, superclass: str) -> Tensor:
    """Return `i_super`, the mean hidden state at the super-class's last token over `TEMPLATES`, `(d,)` in float32.

    Raises:
        ValueError: if a tokenizer drops the super-class or does not know it.
    """
    ids = family.tokenize([template.format(superclass) for template in TEMPLATES])
    number = family.position_encoder
    last = superclass_positions(family.tokenizers[number], superclass, ids[number])[:, -1]
    return family.encode(ids).inputs[torch.arange(len(last)), last].float().mean(0)


def superclass_embeddings(family: ModelFamily, superclass: str) -> list[Tensor]:
    """Return the token embedding of the super-class's last token in each text encoder, `(d_token,)`."""
    return [
        embedding_table(model)[superclass_ids(tokenizer, superclass)[-1]].detach().clone()
        for tokenizer, model in zip(family.tokenizers, family.text_encoders, strict=True)
    ]
