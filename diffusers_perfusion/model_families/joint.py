"""`JointFamily`: models in whose layers text and image attend to each other."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..joint_attention import value_sites
from .base import ModelFamily, PromptEncoding, TextPart

# Of models that are distilled from guidance, in training: at 1 they predict the flow of the images themselves.
TRAINING_GUIDANCE = 1.0


class JointFamily(ModelFamily):
    """Transformers with joint attention, named alike in diffusers.

    Attributes:
        block_lists: names of the model's lists of blocks.
        attention: name of each block's attention layer.
        image_reader: name of the component by which a pipeline's text encoder also reads images; None for none.

    Raises:
        ValueError: if the pipeline has such a component.
    """

    joint = True
    predicts_flow = True
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    attention: ClassVar[str] = "attn"
    image_reader: ClassVar[str | None] = None
    max_sequence_length: ClassVar[int] = 512

    def __init__(self, pipeline: Any):
        if self.image_reader is not None and hasattr(pipeline, self.image_reader):
            raise ValueError(
                f"{type(pipeline).__name__} gives its model images among the words of the prompt ({self.image_reader})"
                ", and Perfusion knows a placeholder token's place among words alone; expected a pipeline without it"
            )
        super().__init__(pipeline)

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The joint attention layers by module name."""
        return {
            f"{blocks}.{number}.{self.attention}": getattr(block, self.attention)
            for blocks in self.block_lists
            for number, block in enumerate(getattr(self.model, blocks))
        }

    @property
    def layer_widths(self) -> dict[str, tuple[int, int]]:
        """Width of the hidden states of text that the model takes, and of each layer's values."""
        return {name: (self.model_width, layer.inner_dim) for name, layer in self.layers.items()}

    @property
    def edited_weights(self) -> Iterable[Tensor]:
        """The weights of the projections to values of text."""
        return (value_sites(layer)[0].module.weight for layer in self.layers.values())  # type: ignore[misc]

    @property
    def model_width(self) -> int:
        """Width of the hidden states of text that the model takes."""
        return self.model.config.joint_attention_dim

    @property
    def input_width(self) -> int:
        """`d`, the same."""
        return self.model_width

    def _max_length(self, tokenizer: Any) -> int:
        return min(tokenizer.model_max_length, self.max_sequence_length)

    @property
    def true_guidance(self) -> bool:
        """Whether pipelines are guided by `true_cfg_scale`, which they leave out where there is no negative prompt."""
        return False

    def call_arguments(self, guidance_scale: float | None) -> dict[str, Any]:
        """Return the arguments of a pipeline's call for a guidance scale, and for texts as long as in training.

        Args:
            guidance_scale: None for the pipeline's own. That depends on the model: to one that is distilled from
                guidance it is a number that it gets, and not a scale.
        """
        name = "true_cfg_scale" if self.true_guidance else "guidance_scale"
        arguments: dict[str, Any] = {} if guidance_scale is None else {name: float(guidance_scale)}
        if self.true_guidance:
            arguments["negative_prompt"] = ""
        # Pipelines limit the text of the last text encoder, by default to the same length for every tokenizer.
        if len(self.tokenizers) == len(self.text_components):
            length = self.tokenizers[-1].model_max_length
            if length < self.max_sequence_length:
                arguments["max_sequence_length"] = length
        return arguments

    def initial_outputs(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return zeros, which change no value."""
        return {name: torch.zeros(width).to(inputs.device) for name, (_, width) in self.layer_widths.items()}


class UnpaddedFamily(JointFamily):
    """Transformers that get text without padding, or with zeros in its place."""

    passes_attention_mask = True
    sees_padding = False
    follows_length = True

    @property
    def layout(self) -> tuple[TextPart, ...]:
        """The text is the whole row but for zeros behind it."""
        return (TextPart(slice(None), zero_padded=True),)


def chats(tokenizer: Any, prompts: Sequence[str], **settings: Any) -> list[str]:
    """Return prompts as what a user says in a chat, by the tokenizer's own template.

    Args:
        tokenizer: whose template it is.
        prompts: one for each chat.
        settings: of the template.
    """
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)


class PackedFamily(JointFamily):
    """Transformers that take latents packed in patches, and predict a flow at timesteps from 0 to 1.

    Attributes:
        position_axes: how many numbers a position has; the second and third are rows and columns of the image.
    """

    latent_patch_size = 2
    position_axes: ClassVar[int] = 3

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self._sample_size = pipeline.default_sample_size
        self._num_train_timesteps = pipeline.scheduler.config.num_train_timesteps

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the model takes, out of their patches."""
        return self.model.config.in_channels // self.latent_patch_size**2

    @property
    def default_resolution(self) -> int:
        """Side of the pipeline's default images, in pixels."""
        return self._sample_size * self.vae_scale_factor

    def predict(
        self, model: Any, noisy: Tensor, timesteps: Tensor, encoding: PromptEncoding, resolution: int
    ) -> Tensor:
        """Return the flow that the model predicts, unpacked."""
        patch = self.latent_patch_size
        height, width = (side // patch for side in noisy.shape[-2:])
        packed = model(
            hidden_states=F.pixel_unshuffle(noisy, patch).flatten(2).mT,
            timestep=(timesteps / self._num_train_timesteps).to(noisy),
            encoder_hidden_states=encoding.hidden_states,
            **self.positions(noisy, height, width, encoding.hidden_states.shape[1]),
            **self.conditions(encoding, resolution),
        ).sample
        return F.pixel_shuffle(packed.mT.unflatten(2, (height, width)), patch)

    def positions(self, noisy: Tensor, height: int, width: int, length: int) -> dict[str, Any]:
        """Return the keyword arguments that say where the tokens of image and text are.

        Args:
            noisy: latents, for their device and precision.
            height: of the image in patches.
            width: likewise.
            length: of the text.
        """
        image = noisy.new_zeros(height, width, self.position_axes)
        image[..., 1] += torch.arange(height, device=noisy.device)[:, None]
        image[..., 2] += torch.arange(width, device=noisy.device)
        return {"img_ids": image.flatten(0, 1), "txt_ids": self.text_positions(noisy, length)}

    def text_positions(self, noisy: Tensor, length: int) -> Tensor:
        """Return the positions of text tokens, `(length, position_axes)`, on the device of latents."""
        return noisy.new_zeros(length, self.position_axes)

    def guidance(self, encoding: PromptEncoding) -> Tensor | None:
        """Return the guidance scale of each prompt in training; None for models not distilled from guidance."""
        if not self.model.config.guidance_embeds:
            return None
        text = encoding.hidden_states
        return torch.full((len(text),), TRAINING_GUIDANCE, device=text.device)
