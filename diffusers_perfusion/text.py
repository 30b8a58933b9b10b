"""`TextEncoders`: what a model gets for a prompt, and where a super-category is in it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

# The super-category is encoded in these, and a concept is fitted in these with its word in the gap.
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a {}",
    "the photo of a {}",
    "a good photo of a {}",
)


class PromptEncoding(NamedTuple):
    """What a model gets for some prompts.

    Attributes:
        states: what it is called with, `(batch, length, width)`.
        inputs: `e`, what its keys and values are made of, `(batch, length, d)`; the same, unless the model has a
            projection of its own before its layers.
        pooled: the projected vector of each whole prompt, `(batch, d_pooled)`; None where it takes none.
        mask: one for tokens and zero for padding, `(batch, length)`; None where padding is seen like any token.
    """

    states: Tensor
    inputs: Tensor
    pooled: Tensor | None
    mask: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "PromptEncoding":
        """The same with every tensor changed."""
        states = change(self.states)
        inputs = states if self.inputs is self.states else change(self.inputs)
        pooled, mask = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return PromptEncoding(states, inputs, pooled, mask)


class TextEncoders:
    """The tokenizers and text encoders of a pipeline as one, which is the last encodings of each side by side.

    Args:
        tokenizers: one or several.
        models: the text encoder of each.
        layer: index of the hidden state that the pipeline takes; None for the last one after its norm.
        masked: whether padding is masked out, so that it does not matter how much there is.
        projection: of the model that is conditioned, what encodings go through before its layers get them.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        models: Sequence[PreTrainedModel],
        layer: int | None = None,
        masked: bool = False,
        projection: nn.Module | None = None,
    ):
        self.tokenizers, self.models, self.layer = tuple(tokenizers), tuple(models), layer
        self.masked, self.projection = masked, projection

    @property
    def width(self) -> int:
        """Width of `PromptEncoding.states`."""
        return sum(model.config.hidden_size for model in self.models)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids for each text encoder, `(len(prompts), length)`: padded as far as matters."""
        return tuple(
            tokenize(tokenizer, prompts, "longest" if self.masked else "max_length") for tokenizer in self.tokenizers
        )

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encodings of token ids, those for each text encoder in turn."""
        outputs, mask = [], None
        for tokenizer, model, ids in zip(self.tokenizers, self.models, input_ids, strict=True):
            ids = ids.to(embedding_table(model).device)
            mask = ids.ne(tokenizer.pad_token_id).to(ids) if self.masked else None
            outputs.append(model(ids, attention_mask=mask, output_hidden_states=self.layer is not None))
        states = torch.cat([states_of(output, self.layer) for output in outputs], -1)
        pooled = outputs[-1][0] if outputs[-1][0].ndim == 2 else None
        return PromptEncoding(states, self._project(states), pooled, mask)

    def _project(self, states: Tensor) -> Tensor:
        """In the precision of the encodings, which may be higher than the model's."""
        if self.projection is None:
            return states
        weights = {name: weight.to(states) for name, weight in self.projection.named_parameters()}
        return functional_call(self.projection, weights, (states,))


def states_of(output: Any, layer: int | None) -> Tensor:
    """Of what a text encoder returned, the hidden state that a pipeline takes, `(batch, length, d)`."""
    return output[0] if layer is None else output.hidden_states[layer]


def tokenize(tokenizer: Any, prompts: Sequence[str], padding: str = "max_length") -> Tensor:
    """Token ids padded to the tokenizer's full length, or to the `longest` of them: `(len(prompts), length)`."""
    return tokenizer(
        list(prompts),
        padding=padding,
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def embedding_table(text_encoder: PreTrainedModel) -> Tensor:
    """The input embeddings of a text encoder, `(vocabulary, d_word)`."""
    return text_encoder.get_input_embeddings().weight  # type: ignore[return-value]


def superclass_ids(tokenizer: Any, superclass: str) -> list[int]:
    """Token ids of a super-category, one or several.

    Raises:
        ValueError: if the tokenizer drops it or does not know it, or it leaves no room in a prompt.
    """
    ids = tokenizer(superclass, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"the tokenizer does not know the super-category {superclass!r}; choose another word for it")
    if len(ids) > (limit := tokenizer.model_max_length // 2):
        raise ValueError(f"the super-category {superclass!r} is {len(ids)} tokens long; expected at most {limit}")
    return ids


def superclass_positions(tokenizer: Any, superclass: str, input_ids: Tensor) -> Tensor:
    """Where a super-category stands last in each row of token ids: `(batch, its number of tokens)`.

    Raises:
        ValueError: as `superclass_ids`.
    """
    wanted = torch.tensor(superclass_ids(tokenizer, superclass))
    start = [int((row.unfold(0, len(wanted), 1) == wanted).all(-1).nonzero()[-1, 0]) for row in input_ids]
    return torch.tensor(start)[:, None] + torch.arange(len(wanted))


@torch.no_grad()
def superclass_input(texts: TextEncoders, superclass: str) -> Tensor:
    """`i_super`: the encoding at the last token of the super-category, averaged over `TEMPLATES`, `(d,)`.

    Raises:
        ValueError: if a tokenizer drops the super-category or does not know it.
    """
    ids = texts.tokenize([template.format(superclass) for template in TEMPLATES])
    last = superclass_positions(texts.tokenizers[0], superclass, ids[0])[:, -1]
    return texts.encode(ids).inputs[torch.arange(len(last)), last].mean(0)


def initial_word_embeddings(texts: TextEncoders, superclass: str) -> list[Tensor]:
    """Where `v*` starts: the input embedding of the super-category's last token in each text encoder, `(d_word,)`."""
    return [
        embedding_table(model)[superclass_ids(tokenizer, superclass)[-1]].detach().clone()
        for tokenizer, model in zip(texts.tokenizers, texts.models, strict=True)
    ]
