"""`ModelFamily`: all that the rest of the package asks about a base model, with defaults that hold for most models."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, ProcessorMixin


class PromptEncoding(NamedTuple):
    """The text inputs of a model for a batch of prompts.

    Attributes:
        hidden_states: of text that the model is called with, `(batch, length, width)`, or a row for each prompt.
        inputs: `e`, the input of the key and value projections, `(batch, length, d)`. It is the same tensor unless the
            model projects hidden states before its cross-attention layers.
        pooled: the pooled vector of each prompt, `(batch, d_pooled)`; None for models without one.
        mask: one for tokens and zero for padding, `(batch, length)`; None for models that see padding.
    """

    hidden_states: Any
    inputs: Tensor
    pooled: Tensor | None
    mask: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> "PromptEncoding":
        """Return the same inputs with a function applied to every tensor."""
        hidden_states = change(self.hidden_states)
        inputs = hidden_states if self.inputs is self.hidden_states else change(self.inputs)
        pooled, mask = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return PromptEncoding(hidden_states, inputs, pooled, mask)


class TextPart(NamedTuple):
    """Where the output of a text encoder is in what the model gets.

    Attributes:
        positions: in a row of hidden states, `(length, width)`; None if the model gets none of this text encoder.
        columns: likewise.
        pooled: in a pooled vector; None if none of it is of this text encoder.
        zero_padded: whether zeros may stand behind it in a row, which are none of it.
    """

    positions: slice | None = None
    columns: slice = slice(None)
    pooled: slice | None = None
    zero_padded: bool = False

    @property
    def start(self) -> int:
        """The position of its first token in a row."""
        return 0 if self.positions is None else self.positions.start or 0

    def of(self, row: Tensor) -> Tensor | None:
        """Return a view of this part of a row `(length, width)` or a pooled vector `(width,)`; None for none."""
        if row.ndim == 1:
            return None if self.pooled is None else row[self.pooled]
        if self.positions is None:
            return None
        part = row[self.positions, self.columns]
        return part[: int(part.any(-1).nonzero().max()) + 1] if self.zero_padded and part.any() else part

    def put(self, row: Tensor, output: Tensor) -> Tensor:
        """Return a row or pooled vector that has another output in this part, without zeros behind it."""
        if self.zero_padded:  # it may be longer
            return output.to(row)
        row = row.clone()
        part: Any = self.of(row)
        part.copy_(output)
        return row


class ModelFamily:
    """A family of base models, bound to the components of one pipeline.

    Subclasses set the class attributes and override the methods in which their family differs.

    Args:
        pipeline: a pipeline that `matches`.

    Attributes:
        name: the name that people use.
        model_classes: classes that the model which concepts are edited into may have.
        text_components: names of the pipeline's tokenizers, each with the name of its text encoder, in the order of
            the arguments `prompt`, `prompt_2`, … that they read.
        optional: names of the text encoders that a pipeline may do without.
        pooled_only: names of the text encoders that give a pooled vector alone.
        joint: whether text and image attend to each other in joint layers. Then the model gets the super-class prompt,
            and concepts are edited into its hidden states and into values; see `joint_attention.py`.
        text_argument: name of a joint model's argument for the hidden states of text.
        mask_argument: name of a joint model's argument for the mask of text and what follows it; None for none.
        follows_length: whether a joint model gets text without padding, so that it gets more of it where the
            super-class prompt is longer than the prompt.
        text_behind_image: to what multiple a joint model pads text, if that comes behind the image in its layers; 0 if
            it comes before.
        predicts_flow: whether the model always predicts a flow, whatever its pipeline's scheduler says.
        hidden_state_index: index of the hidden states that pipelines take; None for the text encoder's own output.
        passes_attention_mask: whether pipelines tell the text encoder which tokens are padding.
        sees_padding: whether the model attends to padding, so that prompts are padded to their full length.
        max_sequence_length: the full length in tokens; None for the tokenizer's own.
        prompt_cleaning: name of the pipeline method that changes prompts before they are tokenized; None for no such
            method.
        instruction: text that the text encoder reads before every prompt.
        latent_patch_size: side of the patches of latents that the model takes as one token, where it has to divide
            the image's.
        half_precision: dtype of 16 bits in which models of this family work on an accelerator.
        repeats_rows: whether the model repeats each row of its hidden states (`repeat_interleave`) before its
            cross-attention layers, as models do that generate several frames of one prompt.
        model: the UNet or transformer.
        tokenizers: as in `text_components`, out of the processors of text and images that hold them.
        text_encoders: as in `text_components`.
        vae_scale_factor: pixels of an image along a side for each of its latents.

    Raises:
        ValueError: if a text encoder or tokenizer is missing, the model has no cross-attention from text, or takes
            hidden states of another width.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    text_components: ClassVar[tuple[tuple[str, str], ...]] = (("tokenizer", "text_encoder"),)
    optional: ClassVar[tuple[str, ...]] = ()
    pooled_only: ClassVar[tuple[str, ...]] = ()
    joint: ClassVar[bool] = False
    text_argument: ClassVar[str] = "encoder_hidden_states"
    mask_argument: ClassVar[str | None] = None
    follows_length: ClassVar[bool] = False
    text_behind_image: ClassVar[int] = 0
    predicts_flow: ClassVar[bool] = False
    hidden_state_index: ClassVar[int | None] = None
    passes_attention_mask: ClassVar[bool] = False
    sees_padding: ClassVar[bool] = True
    max_sequence_length: ClassVar[int | None] = None
    prompt_cleaning: ClassVar[str | None] = None
    latent_patch_size: ClassVar[int] = 1
    # Large text encoders and transformers have activations beyond the range of float16.
    half_precision: ClassVar[torch.dtype] = torch.bfloat16
    instruction: str = ""

    def __init__(self, pipeline: Any):
        self.model = edited_model(pipeline)
        self.vae_scale_factor: Any = getattr(pipeline, "vae_scale_factor", None)
        components = self.components_of(pipeline)
        for component in (component for pair in components for component in pair):
            if getattr(pipeline, component) is None:
                raise ValueError(
                    f"{type(pipeline).__name__} has no {component}, which Perfusion needs for placeholder tokens; "
                    "give it one, or, after loading, prompt embeddings that it has encoded before"
                )
        self.tokenizers = tuple(tokenizer_in(getattr(pipeline, tokenizer)) for tokenizer, _ in components)
        self.text_encoders = tuple(uncompiled(getattr(pipeline, text_encoder)) for _, text_encoder in components)
        if self.model_width != self.width:
            raise ValueError(
                f"{type(self.model).__name__} takes hidden states of width {self.model_width}, but the text encoders "
                f"of {type(pipeline).__name__} give width {self.width}; Perfusion knows no projection between"
            )

    @classmethod
    def matches(cls, pipeline: Any) -> bool:
        """Return whether a pipeline has a model of this family and its text encoders."""
        classes = {kind.__name__ for kind in type(edited_model(pipeline)).__mro__}
        components = [component for pair in cls.text_components for component in pair]
        return bool(classes & set(cls.model_classes)) and all(hasattr(pipeline, name) for name in components)

    @classmethod
    def components_of(cls, pipeline: Any) -> list[tuple[str, str]]:
        """Return `text_components` without the optional ones that a pipeline does without."""
        return [
            (tokenizer, text_encoder)
            for tokenizer, text_encoder in cls.text_components
            if text_encoder not in cls.optional or getattr(pipeline, text_encoder) is not None
        ]

    # The model

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The layers that concepts are edited into by module name; by default those of cross-attention from text."""
        return cross_attention_layers(self.model)

    @property
    def layer_widths(self) -> dict[str, tuple[int, int]]:
        """Width of the hidden states that each layer's values depend on, and of the values."""
        return {name: (layer.cross_attention_dim, layer.inner_kv_dim) for name, layer in self.layers.items()}

    @property
    def edited_weights(self) -> Iterable[Tensor]:
        """The weights of the projections that are edited."""
        return (part.weight for layer in self.layers.values() for part in (layer.to_k, layer.to_v))

    @property
    def projection(self) -> tuple[nn.Module, ...]:
        """The modules that hidden states go through, one after the other, between the model's input and its layers."""
        return ()

    @property
    def repeats_rows(self) -> bool:
        """Whether the model repeats rows before its cross-attention layers."""
        return False

    @property
    def model_width(self) -> int:
        """Width of the hidden states that the model takes."""
        return next(iter(self.layers.values())).cross_attention_dim

    @property
    def input_width(self) -> int:
        """`d`, the width of the input of the key and value projections."""
        return next(iter(self.layers.values())).cross_attention_dim

    # Prompts

    @property
    def position_encoder(self) -> int:
        """Index of the first text encoder whose hidden states the model gets."""
        return next(number for number, part in enumerate(self.layout) if part.positions is not None)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each text encoder's hidden states."""
        return tuple(embedding_table(text_encoder).shape[1] for text_encoder in self.text_encoders)

    @property
    def width(self) -> int:
        """Width of `PromptEncoding.hidden_states`."""
        return sum(self.widths)

    @property
    def layout(self) -> tuple[TextPart, ...]:
        """Where each text encoder's output is in what the model gets: by default side by side along the width.

        Also that of one which the pipeline does without, in whose place are zeros.
        """
        stops = accumulate(self.widths)
        return tuple(
            TextPart(slice(None), slice(stop - width, stop)) for width, stop in zip(self.widths, stops, strict=True)
        )

    def row_positions(self, positions: Sequence[Iterable[int]]) -> tuple[int, ...]:
        """Return the positions in the model's hidden states of positions in each text encoder's."""
        found = {
            part.start + position
            for part, of_part in zip(self.layout, positions, strict=False)
            if part.positions is not None
            for position in of_part
        }
        return tuple(sorted(found))

    def tokenize(self, prompts: Sequence[str], padding: str | None = None) -> tuple[Tensor, ...]:
        """Return token ids for each text encoder, `(len(prompts), length)`.

        Args:
            prompts: what to tokenize.
            padding: `max_length` or `longest`; by default as pipelines of this family pad.
        """
        padding = padding or ("max_length" if self.sees_padding else "longest")
        return tuple(self._tokens(tokenizer, prompts, padding).input_ids for tokenizer in self.tokenizers)

    def real_tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return which ids of `tokenize(prompts, "longest")` are no padding, bool, `(len(prompts), length)`."""
        return self._tokens(self.tokenizers[0], prompts, "longest").attention_mask.bool()

    def _tokens(self, tokenizer: Any, prompts: Sequence[str], padding: str) -> Any:
        return tokenizer(
            list(prompts),
            padding=padding,
            padding_side="right",
            truncation=True,
            max_length=self._max_length(tokenizer),
            return_tensors="pt",
        )

    def _max_length(self, tokenizer: Any) -> int | None:
        return self.max_sequence_length

    def encode(self, input_ids: Sequence[Tensor]) -> PromptEncoding:
        """Encode token ids as a pipeline encodes a prompt.

        Args:
            input_ids: for each text encoder, `(batch, length)`.
        """
        outputs, parts, mask = [], [], None
        for tokenizer, text_encoder, ids in zip(self.tokenizers, self.text_encoders, input_ids, strict=True):
            ids = ids.to(embedding_table(text_encoder).device)
            mask = ids.ne(tokenizer.pad_token_id).to(ids) if self.passes_attention_mask else None
            output = text_encoder(ids, attention_mask=mask, output_hidden_states=self.hidden_state_index is not None)
            outputs.append(output)
            parts.append(self.hidden_states(output, mask))
        hidden_states = torch.cat(parts, -1)
        pooled = outputs[-1][0] if outputs[-1][0].ndim == 2 else None
        return PromptEncoding(hidden_states, self._project(hidden_states), pooled, None if self.sees_padding else mask)

    @classmethod
    def hidden_states(cls, output: Any, attention_mask: Tensor | None = None) -> Tensor:
        """Return the hidden states that pipelines take from a text encoder's output, `(batch, length, width)`."""
        return output[0] if cls.hidden_state_index is None else output.hidden_states[cls.hidden_state_index]

    @classmethod
    def possible_hidden_states(
        cls, text_encoder: PreTrainedModel, output: Any, attention_mask: Tensor | None, clip_skip: int | None
    ) -> list[Tensor]:
        """Return all hidden states that a pipeline may take from a text encoder's output.

        Args:
            text_encoder: what gave the output.
            output: of the text encoder.
            attention_mask: that it was called with, `(batch, length)`.
            clip_skip: how many more layers than usual the pipeline leaves out; None for none.

        Returns:
            Hidden states of `(batch, length, width)`, or pooled vectors of `(batch, width)` if the model gets those of
            the super-class prompt; none if the text encoder was called for something else.
        """
        if cls.hidden_state_index is not None and output.hidden_states is None:
            return []
        return [cls.hidden_states(output, attention_mask)]

    @classmethod
    def kept_positions(cls, length: int, max_sequence_length: int | None) -> tuple[int, ...]:
        """Return the positions of a text encoder's hidden states that a pipeline keeps.

        Args:
            length: of the hidden states, without padding where the model gets none.
            max_sequence_length: that the pipeline was called with; None if it has no such argument.
        """
        return tuple(range(length))

    @classmethod
    def embedding_modules(cls, text_encoder: PreTrainedModel) -> list[nn.Embedding]:
        """Return the modules that look token embeddings up; some text encoders have two that share one table."""
        shape = embedding_table(text_encoder).shape
        return [
            module
            for module in text_encoder.modules()
            if isinstance(module, nn.Embedding) and (module.num_embeddings, module.embedding_dim) == shape
        ]

    @classmethod
    def embedding_scale(cls, embedding_module: nn.Embedding) -> float | Tensor:
        """Return the factor by which an embedding module multiplies what is in its table."""
        return 1.0

    def _project(self, hidden_states: Tensor) -> Tensor:
        """Apply `projection` in the precision of the hidden states, which may be higher than the model's."""
        for module in self.projection:
            weights = {f"module.{name}": weight.to(hidden_states) for name, weight in module.named_parameters()}
            hidden_states = functional_call(_WithoutHooks(module), weights, (hidden_states,))
        return hidden_states

    # Images

    def call_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """Return the arguments of a pipeline's call for a guidance scale, and for texts as long as in training.

        Args:
            guidance_scale: None for the paper's, 6.
        """
        return {"guidance_scale": 6.0 if guidance_scale is None else float(guidance_scale)}

    # Training

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the model takes."""
        return self.model.config.in_channels

    def initial_outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the target outputs that a training begins with, in float32, by layer: by default `W_V inputs`."""
        return {name: layer.to_v(inputs).float() for name, layer in self.layers.items()}

    @property
    def default_resolution(self) -> int:
        """Side of the square images that the model was made for, in pixels."""
        return self.model.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def encode_latents(self, vae: Any, images: Tensor) -> Tensor:
        """Return scaled latents in float32, `(N, channels, h, w)`; of a distribution, its mode.

        Args:
            vae: the pipeline's.
            images: in [0, 1], `(N, 3, height, width)`.
        """
        encoded = vae.encode((images * 2 - 1).to(next(vae.parameters())))
        latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
        return ((latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor).float()

    def enable_gradient_checkpointing(self) -> None:
        """Make the model compute activations a second time for gradients, in place of keeping them."""
        self.model.enable_gradient_checkpointing()

    def without_padding(self, encoding: PromptEncoding) -> PromptEncoding:
        """Return text inputs as `predict` takes them: with rows of different lengths for models that take those."""
        return encoding

    def conditions(self, encoding: PromptEncoding, resolution: int) -> dict[str, Any]:
        """Return the keyword arguments that the model takes besides latents, timestep and hidden states.

        Args:
            encoding: of the batch's prompts.
            resolution: side of the square images, in pixels.
        """
        return {}

    def predict(
        self, model: Any, noisy: Tensor, timesteps: Tensor, encoding: PromptEncoding, resolution: int
    ) -> Tensor:
        """Return the model's prediction for noisy latents, `(batch, channels, h, w)`.

        Args:
            model: the family's model, or what it was compiled to.
            noisy: latents with noise, `(batch, channels, h, w)`.
            timesteps: of the noise, `(batch,)`, from 0 to the number of training timesteps.
            encoding: of the batch's prompts.
            resolution: side of the square images, in pixels.
        """
        conditions = self.conditions(encoding, resolution)
        output = model(noisy, timestep=timesteps, encoder_hidden_states=encoding.hidden_states, **conditions).sample
        return output[:, : noisy.shape[1]]  # some models predict a variance in further channels


class _WithoutHooks(nn.Module):
    """Calls a module without its hooks, which are for the forward pass of the model alone."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.module.forward(hidden_states)


@torch.no_grad()
def frame_latents(vae: Any, images: Tensor) -> Tensor:
    """Return normalized latents of images as videos of one frame, in float32, `(N, channels, h, w)`.

    Args:
        vae: of videos, which knows the mean and the deviation of its latents.
        images: in [0, 1], `(N, 3, height, width)`.
    """
    videos = (images * 2 - 1).to(next(vae.parameters())).unsqueeze(2)
    latents = vae.encode(videos).latent_dist.mode()[:, :, 0].float()
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def edited_model(pipeline: Any) -> Any:
    """Return the UNet or transformer of a pipeline, out of `torch.compile`; None if it has neither."""
    unet = getattr(pipeline, "unet", None)
    model = getattr(pipeline, "transformer", None) if unet is None else unet
    return uncompiled(model)


def uncompiled(model: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def tokenizer_in(component: Any) -> Any:
    """Return the tokenizer that a processor of text and images holds, or the component itself if it is none."""
    return component.tokenizer if isinstance(component, ProcessorMixin) else component


def cross_attention_layers(model: Any) -> dict[str, Attention]:
    """Return the layers of a model that attend from image to text, by module name.

    Raises:
        ValueError: if there is none.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Attention) and layer.is_cross_attention and layer.added_kv_proj_dim is None
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no cross-attention layer from text; Perfusion edits the keys and values of "
            "cross-attention, which models that process text and image in one joint attention do not have"
        )
    return layers


def embedding_table(text_encoder: PreTrainedModel) -> Tensor:
    """Return the token embeddings of a text encoder, `(vocabulary, width)`."""
    return text_encoder.get_input_embeddings().weight  # type: ignore[return-value]
