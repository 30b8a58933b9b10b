"""The shapes of the base models that the recipe makes.

`pocket` and `flux` are the models of `examples/pocket` and `examples/pocket-flux`. What was chosen on these may be
their private numbers, so there are two to compare with: `unet-77`, a UNet of another width and depth, with a text
encoder of 77 positions; and `pixart`, a transformer with a T5 text encoder.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from objectives import FlowMatching, VPrediction
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

POCKET = Path(__file__).resolve().parent.parent


def new_t5(tokenizer, width, layers):
    """A T5 text encoder for a tokenizer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_ff=4 * width,
            d_kv=32,
            num_heads=width // 32,
            num_layers=layers,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class QuickFluxAttnProcessor:
    """Computes what `FluxAttnProcessor` does, in two thirds of the time of a training step over short sequences.

    Attention is two matrix products, for the backward of the fused one is slow there.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        cos, sin = image_rotary_emb
        cos, sin = cos[:, None, ::2], sin[:, None, ::2]

        def rotate(heads):
            real, imaginary = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
            rotated = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], -1)
            return rotated.flatten(-2).to(heads.dtype)

        def heads(project, states):
            return project(states).unflatten(-1, (attn.heads, -1))

        query = attn.norm_q(heads(attn.to_q, hidden_states))
        key = attn.norm_k(heads(attn.to_k, hidden_states))
        value = heads(attn.to_v, hidden_states)
        if encoder_hidden_states is not None:
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj, encoder_hidden_states)), query], 1)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj, encoder_hidden_states)), key], 1)
            value = torch.cat([heads(attn.add_v_proj, encoder_hidden_states), value], 1)
        query, key, value = (states.transpose(1, 2) for states in (rotate(query), rotate(key), value))
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[0](image), attn.to_add_out(text)


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
    text_encoder_classes = {"text_encoder": CLIPTextModel}
    objective = VPrediction()

    def tokenizers(self, folder):
        """The tokenizer that train_tokenizer.py made."""
        return {"tokenizer": CLIPTokenizer.from_pretrained(folder)}

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

    def new_text_encoders(self, tokenizer):
        """A text encoder for the tokenizer."""
        config = CLIPTextConfig(
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
        return {"text_encoder": CLIPTextModel(config)}

    def predict(self, unet, text_encoder, noisy, timesteps, tokens):
        """The prediction for noisy latents, `(batch, 4, 16, 16)`."""
        return unet(noisy, timesteps, text_encoder(tokens)[0], return_dict=False)[0]

    def pipeline(self, **components):
        """A pipeline of these components."""
        return StableDiffusionPipeline(
            **components,
            scheduler=self.objective.scheduler,
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
    text_encoder_classes = {"text_encoder": T5EncoderModel}
    objective = VPrediction()

    def tokenizers(self, folder):
        """The tokenizer that train_tokenizer.py made."""
        return {"tokenizer": PreTrainedTokenizerFast.from_pretrained(folder)}

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

    def new_text_encoders(self, tokenizer):
        """A text encoder for the tokenizer."""
        return {"text_encoder": new_t5(tokenizer, self.width, self.text_layers)}

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
        return PixArtSigmaPipeline(**components, scheduler=self.objective.scheduler)


@dataclass(frozen=True)
class FluxBase:
    """A FLUX transformer, in whose layers text and image attend to each other, with two text encoders.

    CLIP, of which the pooled output alone is used, is the pocket model's and stays as it is; T5 is trained.

    Attributes:
        layers: of the transformer, in which text and image have weights of their own.
        single_layers: behind them, in which both have the same.
        heads: of the transformer, each 64 wide.
        width: of T5.
        text_layers: of T5.
    """

    layers: int = 3
    single_layers: int = 6
    heads: int = 4
    width: int = 192
    text_layers: int = 3

    component = "transformer"
    model_class = FluxTransformer2DModel
    text_encoder_classes = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    objective = FlowMatching()

    def tokenizers(self, folder):
        """The pocket model's tokenizer, and that which train_tokenizer.py made."""
        return {
            "tokenizer": CLIPTokenizer.from_pretrained(POCKET / "tokenizer"),
            "tokenizer_2": PreTrainedTokenizerFast.from_pretrained(folder),
        }

    def new_model(self):
        """A transformer for 16×16×16 latents, packed into 64 tokens; of 14 M parameters with the defaults."""
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=self.layers,
            num_single_layers=self.single_layers,
            num_attention_heads=self.heads,
            attention_head_dim=64,
            axes_dims_rope=(8, 28, 28),
            joint_attention_dim=self.width,
            pooled_projection_dim=192,  # of the pocket model's text encoder
        )
        for name, parameter in transformer.named_parameters():
            # At first each layer passes on what it gets (adaLN-Zero, Peebles and Xie 2023, arXiv 2212.09748).
            if name.startswith("proj_out") or ("norm" in name and ".linear." in name):
                torch.nn.init.zeros_(parameter)
        transformer.set_attn_processor(QuickFluxAttnProcessor())
        return transformer

    def new_text_encoders(self, tokenizer, tokenizer_2):
        """The pocket model's text encoder, and one for the second tokenizer."""
        clip = CLIPTextModel.from_pretrained(POCKET / "text_encoder").requires_grad_(False)
        return {"text_encoder": clip, "text_encoder_2": new_t5(tokenizer_2, self.width, self.text_layers)}

    def predict(self, transformer, clip, t5, noisy, timesteps, tokens):
        """The prediction for noisy latents, `(batch, 16, 16, 16)`."""
        clip_tokens, t5_tokens = tokens.chunk(2, dim=1)
        batch, channels, height, width = noisy.shape
        hidden_states = t5(t5_tokens)[0]
        pooled = clip(clip_tokens).pooler_output
        predicted = transformer(
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            hidden_states,
            pooled,
            timesteps / 1000,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(t5_tokens.shape[1], 3),
            return_dict=False,
        )[0]
        return FluxPipeline._unpack_latents(predicted, height, width, vae_scale_factor=1)

    def pipeline(self, **components):
        """A pipeline of these components."""
        return FluxPipeline(**components, scheduler=self.objective.scheduler)


BASES = {
    "pocket": StableDiffusionBase(),
    "flux": FluxBase(),
    "unet-77": StableDiffusionBase((48, 96, 128), 2, width=128, text_layers=3, text_heads=4, groups=16),
    "pixart": PixArtBase(),
}
