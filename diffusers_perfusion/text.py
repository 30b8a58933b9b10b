"""`TextEncoders`: what a model gets for a prompt, and where a super-category is in it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BatchEncoding, PreTrainedModel

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
        projection: of the model that is conditioned, what encodings go through, one after the other, before its
            layers get them.
        instruction: what the pipeline puts before every prompt, and takes the encodings of away again.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        models: Sequence[PreTrainedModel],
        layer: int | None = None,
        masked: bool = False,
        projection: Sequence[nn.Module] = (),
        instruction: str = "",
    ):
        self.tokenizers, self.models, self.layer = tuple(tokenizers), tuple(models), layer
        self.masked, self.projection, self.instruction = masked, tuple(projection), instruction
        # But for its last token, which may have grown together with the prompt.
        words = self.tokenizers[0].encode(instruction)[1:-1] if instruction else []
        self._instruction = torch.tensor(words, dtype=torch.long)

    @property
    def width(self) -> int:
        """Width of `PromptEncoding.states`."""
        return sum(model.config.hidden_size for model in self.models)

    def tokenize(self, prompts: Sequence[str], padding: str | None = None) -> tuple[Tensor, ...]:
        """Token ids for each text encoder, `(len(prompts), length)`: padded as far as matters, or as `tokenize`."""
        prompts = [self.instruction + prompt for prompt in prompts]
        padding = padding or ("longest" if self.masked else "max_length")
        return tuple(self._cut(tokenize(tokenizer, prompts, padding).input_ids) for tokenizer in self.tokenizers)

    def real_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Which ids of `tokenize(prompts, "longest")` are no padding, bool of `(len(prompts), length)`."""
        prompts = [self.instruction + prompt for prompt in prompts]
        return self._cut(tokenize(self.tokenizers[0], prompts, "longest").attention_mask).bool()

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encodings of token ids, those for each text encoder in turn."""
        outputs, mask = [], None
        for tokenizer, model, ids in zip(self.tokenizers, self.models, input_ids, strict=True):
            ids = ids.to(embedding_table(model).device)
            if len(self._instruction):
                self._instruction = self._instruction.to(ids.device)
                ids = torch.cat([ids[:, :1], self._instruction.expand(len(ids), -1), ids[:, 1:]], 1)
            mask = ids.ne(tokenizer.pad_token_id).to(ids) if self.masked else None
            outputs.append(model(ids, attention_mask=mask, output_hidden_states=self.layer is not None))
        states = self._cut(torch.cat([states_of(output, self.layer) for output in outputs], -1))
        pooled = outputs[-1][0] if outputs[-1][0].ndim == 2 else None
        return PromptEncoding(states, self._project(states), pooled, None if mask is None else self._cut(mask))

    def _cut(self, tokens: Tensor) -> Tensor:
        """What is left of `(batch, length, ...)` for the model: the first token, and what follows the instruction."""
        if not len(self._instruction):
            return tokens
        return torch.cat([tokens[:, :1], tokens[:, 1 + len(self._instruction) :]], 1)

    def _project(self, states: Tensor) -> Tensor:
        """In the precision of the encodings, which may be higher than the model's."""
        for part in self.projection:
            weights = {f"part.{name}": weight.to(states) for name, weight in part.named_parameters()}
            states = functional_call(_Unhooked(part), weights, (states,))
        return states


class _Unhooked(nn.Module):
    """A module without the hooks on it: what a model is given is not made here."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, states: Tensor) -> Tensor:
        return self.part.forward(states)


def states_of(output: Any, layer: int | None) -> Tensor:
    """Of what a text encoder returned, the hidden state that a pipeline takes, `(batch, length, d)`."""
    return output[0] if layer is None else output.hidden_states[layer]


def tokenize(tokenizer: Any, prompts: Sequence[str], padding: str = "max_length") -> BatchEncoding:
    """Tokens padded to the tokenizer's full length, or to the `longest` of them: `(len(prompts), length)` each."""
    return tokenizer(list(prompts), padding=padding, padding_side="right", truncation=True, return_tensors="pt")


def embedding_table(text_encoder: PreTrainedModel) -> Tensor:
    """The input embeddings of a text encoder, `(vocabulary, d_word)`."""
    return text_encoder.get_input_embeddings().weight  # type: ignore[return-value]


def superclass_ids(tokenizer: Any, superclass: str) -> list[int]:
    """Token ids of a super-category, one or several.

    Raises:
        ValueError: if the tokenizer drops it or does not know it, or it leaves no room in a prompt.
    """
    # Some take it for another word without the space before it.
    ids = tokenizer(f" {superclass.strip()}".rstrip(), add_special_tokens=False).input_ids
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
