"""The shapes of the base models that the recipe makes: the pocket model's, and two others to compare with it.

What was chosen on the pocket model may be its private numbers. `unet-77` is a UNet of another width and depth, with a
text encoder of 77 positions; `pixart` is a transformer with a T5 text encoder.
"""

from dataclasses import dataclass

import torch
from diffusers import (
    DDIMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class StableDiffusionBase:
    """A UNet with a CLIP text encoder.

    Attributes:
        channels: of the UNet's blocks.
        layers_per_block: of the UNet.
        width: of the text encoder.
        text_layers: of the text encoder.
        text_heads: of the text encoder.
        groups: of the UNet's norms.
    """

    channels: tuple = (64, 128, 192)
    layers_per_block: int = 1
    width: int = 192
    text_layers: int = 4
    text_heads: int = 6
    groups: int = 32

    component = "unet"
    model_class = UNet2DConditionModel
    text_encoder_class = CLIPTextModel
    tokenizer_class = CLIPTokenizer

    def new_model(self):
        """A UNet for 4×16×16 latents; of 11 M parameters with the defaults."""
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=self.channels,
            layers_per_block=self.layers_per_block,
            cross_attention_dim=self.width,
            attention_head_dim=4,
            norm_num_groups=self.groups,
        )
        unet.set_attn_processor(AttnProcessor())  # over short sequences the backward of the fused attention is slower
        return unet.to(memory_format=torch.channels_last)

    def new_text_encoder(self, tokenizer):
        """A text encoder for a tokenizer."""
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.width,
                intermediate_size=4 * self.width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=self.text_heads,
                max_position_embeddings=tokenizer.model_max_length,
                projection_dim=self.width,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    def predict(self, unet, text_encoder, noisy, timesteps, tokens):
        """The prediction for noisy latents, `(batch, 4, 16, 16)`."""
        return unet(noisy, timesteps, text_encoder(tokens)[0], return_dict=False)[0]

    def pipeline(self, **components):
        """A pipeline of these components."""
        return StableDiffusionPipeline(
            **components,
            scheduler=DDIMScheduler(**SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@dataclass(frozen=True)
class PixArtBase:
    """A PixArt transformer, whose layers attend to text, with a T5 text encoder.

    Attributes:
        layers: of the transformer.
        heads: of the transformer, each 32 wide.
        width: of the text encoder.
        text_layers: of the text encoder.
    """

    layers: int = 8
    heads: int = 6
    width: int = 128
    text_layers: int = 3

    component = "transformer"
    model_class = PixArtTransformer2DModel
    text_encoder_class = T5EncoderModel
    tokenizer_class = PreTrainedTokenizerFast

    def new_model(self):
        """A transformer for 4×16×16 latents in patches of 2×2; of 5 M parameters with the defaults."""
        transformer = PixArtTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=self.layers,
            num_attention_heads=self.heads,
            attention_head_dim=32,
            cross_attention_dim=32 * self.heads,
            caption_channels=self.width,
        )
        transformer.set_attn_processor(AttnProcessor())  # as for the UNet
        return transformer

    def new_text_encoder(self, tokenizer):
        """A text encoder for a tokenizer."""
        return T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=self.width,
                d_ff=4 * self.width,
                d_kv=32,
                num_heads=self.width // 32,
                num_layers=self.text_layers,
                dropout_rate=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )

    def predict(self, transformer, text_encoder, noisy, timesteps, tokens):
        """The prediction for noisy latents, `(batch, 4, 16, 16)`."""
        mask = tokens.ne(text_encoder.config.pad_token_id).long()
        hidden_states = text_encoder(tokens, attention_mask=mask)[0]
        sizes = {"resolution": None, "aspect_ratio": None}
        return transformer(
            noisy,
            hidden_states,
            timesteps,
            added_cond_kwargs=sizes,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def pipeline(self, **components):
        """A pipeline of these components."""
        return PixArtSigmaPipeline(**components, scheduler=DDIMScheduler(**SCHEDULER))


BASES = {
    "pocket": StableDiffusionBase(),
    "unet-77": StableDiffusionBase((48, 96, 128), 2, width=128, text_layers=3, text_heads=4, groups=16),
    "pixart": PixArtBase(),
}
