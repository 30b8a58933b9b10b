"""Count what a training step holds on the device, of Perfusion and of diffusers' LoRA scripts, for large models.

    python examples/benchmarks/counted_memory.py --output examples/benchmarks/results/counted-memory.json

It is counted and not measured: models are on the meta device, one forward pass notes each tensor that autograd saves
(attention as flash attention saves it), and there is no allocator, no library, no copy that autocast makes and no peak
within an operation. One image of 1024 pixels, weights in bfloat16, what is trained with its gradients and Adam's two
moments in float32. With gradient checkpointing the inputs of all blocks are held, and what the largest block saves.

Shapes, by the file they are from:
- FLUX.1-dev: the defaults of diffusers' `FluxTransformer2DModel`, with `guidance_embeds`; T5-XXL of
  google/t5-v1_1-xxl/config.json; CLIP of openai/clip-vit-large-patch14/config.json.
- FLUX.2-klein-4B: `klein-4b` in diffusers' scripts/convert_flux2_to_diffusers.py; Qwen/Qwen3-4B/config.json.
- SDXL: stabilityai/stable-diffusion-xl-base-1.0, the config.json of its unet, text_encoder, text_encoder_2 and vae.

LoRA: rank 4 and the target modules of diffusers' examples/dreambooth/train_dreambooth_lora_{flux,flux2_klein,sdxl}.py.
They keep text encoders where images have captions of their own, and free them where all have one prompt; that of klein
computes all prompts before the first step.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models import Flux2Transformer2DModel
from diffusers.utils import logging
from peft import LoraConfig
from timing import machine, write
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from diffusers_perfusion.attention_processor import Edit, wrap
from diffusers_perfusion.joint_attention import hook_values
from diffusers_perfusion.model_families import cross_attention_layers

TEXT_TOKENS, IMAGE_TOKENS = 512, 64 * 64
KLEIN = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
QWEN = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
T5 = {"vocab_size": 32_128, "d_model": 4096, "d_ff": 10_240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_CLIP = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
FLUX_TARGETS = [
    *(f"attn.{name}" for name in ("to_k", "to_q", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
KLEIN_TARGETS = [
    *("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"),
    *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(24)),
]
SDXL_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


class Flash(torch.autograd.Function):
    """Attention that saves what flash attention saves; it has no values."""

    @staticmethod
    def forward(ctx, query, key, value):
        """Return the output, and save it with the inputs and the sums of each row."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        """Not called."""
        raise NotImplementedError


def flash(query, key, value, *args, **kwargs):
    """Return the output of `Flash`."""
    return Flash.apply(query, key, value)


class Saved:
    """The bytes that autograd saves in a forward pass, but for weights: by block, and those of the blocks' inputs."""

    def __init__(self, model, blocks):
        self.weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.seen = {}  # with its tensor, or another might get the same address
        self.current, self.by_block, self.inputs = None, {None: 0}, {}
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)

    def _enter(self, block, args, kwargs):
        self.current = block
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, torch.Tensor):
                self.inputs[tensor.untyped_storage()._cdata] = tensor

    def _leave(self, block, args, output):
        self.current = None

    def pack(self, tensor):
        """Note a tensor that is saved."""
        address = tensor.untyped_storage()._cdata
        if address not in self.weights and address not in self.seen:
            self.seen[address] = tensor
            self.by_block[self.current] = self.by_block.get(self.current, 0) + tensor.untyped_storage().nbytes()
        return tensor

    @property
    def whole(self):
        """Bytes without gradient checkpointing."""
        return sum(self.by_block.values())

    @property
    def checkpointed(self):
        """Bytes with gradient checkpointing."""
        *blocks, outside = (self.by_block[key] for key in sorted(self.by_block, key=lambda key: key is None))
        held = sum(tensor.untyped_storage().nbytes() for tensor in self.inputs.values())
        return held + outside + max(blocks, default=0)


class Trained:
    """A concept in training, of which only the target outputs and the gate are read, in all positions."""

    def __init__(self, widths, length, d):
        self.target_outputs = {
            name: torch.zeros(width, device="meta", requires_grad=True) for name, width in widths.items()
        }
        one = torch.zeros(1, d, device="meta")
        coef = torch.zeros(1, length, 1, device="meta")
        self.edit = Edit((self,), one, coef, coef)

    def edit_for(self, hidden_states, layer):
        """Return the edit of every layer."""
        return self.edit


def meta(kind, *args, **settings):
    """Return a frozen model in bfloat16 on the meta device."""
    with torch.device("meta"):
        model = kind(*args, **settings)
    return model.requires_grad_(False).to(torch.bfloat16)


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, device="meta", dtype=dtype)


def weights(*models):
    return sum(weight.numel() for model in models for weight in model.parameters() if not weight.requires_grad)


def transformer_inputs(model, **more):
    """Return the arguments of a FLUX transformer for an image of 1024 pixels."""
    axes = len(model.config.axes_dims_rope)
    return {
        "hidden_states": zeros(1, IMAGE_TOKENS, model.config.in_channels),
        "encoder_hidden_states": zeros(1, TEXT_TOKENS, model.config.joint_attention_dim),
        "timestep": zeros(1),
        "img_ids": zeros(IMAGE_TOKENS, axes),
        "txt_ids": zeros(TEXT_TOKENS, axes),
        **more,
    }


def joint_layers(model):
    lists = ("transformer_blocks", "single_transformer_blocks")
    return {f"{name}.{n}.attn": block.attn for name in lists for n, block in enumerate(getattr(model, name))}


def joint_perfusion(model, inputs):
    """Train the target outputs, beside which what a hidden state adds is nothing; return the trained tensors."""
    layers = joint_layers(model)
    widths = {name: layer.inner_dim for name, layer in layers.items()}
    concept = Trained(widths, TEXT_TOKENS, model.config.joint_attention_dim)
    hook_values(concept, layers)
    return list(concept.target_outputs.values())


def unet_perfusion(model, inputs):
    """Train values and token embeddings, of which the hidden states have gradients; return the trained tensors."""
    layers = cross_attention_layers(model)
    concept = Trained({name: layer.inner_kv_dim for name, layer in layers.items()}, 77, 2048)
    for name, layer in layers.items():
        layer.set_processor(wrap(layer.processor, (), name, concept))
    inputs["encoder_hidden_states"].requires_grad_()
    return [*concept.target_outputs.values(), zeros(768, dtype=torch.float32), zeros(1280, dtype=torch.float32)]


def lora(targets):
    """Return what adds a LoRA of rank 4 to a model, and returns its tensors."""

    def add(model, inputs):
        with torch.device("meta"):
            model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in trained:  # as under autocast
            weight.data = weight.data.to(torch.bfloat16)
        return trained

    return add


def flux():
    """Return the model, its inputs, its blocks, text encoders and VAE."""
    model = meta(FluxTransformer2DModel, guidance_embeds=True)
    inputs = transformer_inputs(model, pooled_projections=zeros(1, 768), guidance=zeros(1, dtype=torch.float32))
    t5 = meta(T5EncoderModel, T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    vae = meta(AutoencoderKL, **VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return model, inputs, blocks, [meta(CLIPTextModel, CLIPTextConfig(**CLIP)), t5], vae


def klein():
    """Likewise."""
    model = meta(Flux2Transformer2DModel, **KLEIN)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return model, transformer_inputs(model), blocks, [meta(Qwen3Model, Qwen3Config(**QWEN))], meta(AutoencoderKLFlux2)


def sdxl():
    """Likewise."""
    model = meta(UNet2DConditionModel, **SDXL)
    inputs = {
        "sample": zeros(1, 4, 128, 128),
        "timestep": zeros(1),
        "encoder_hidden_states": zeros(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": zeros(1, 1280), "time_ids": zeros(1, 6)},
    }
    parts = (*model.down_blocks, model.mid_block, *model.up_blocks)
    blocks = [
        block
        for part in parts
        for of_part in (part.resnets, getattr(part, "attentions", ()))
        for one in of_part
        for block in getattr(one, "transformer_blocks", [one])
    ]
    big = CLIPTextConfig(**BIG_CLIP, projection_dim=1280, hidden_act="gelu")
    encoders = [meta(CLIPTextModel, CLIPTextConfig(**CLIP)), meta(CLIPTextModelWithProjection, big)]
    return model, inputs, blocks, encoders, meta(AutoencoderKL, **VAE)


# Of each model: what makes it, what trains it by Perfusion and by LoRA, the bytes of a weight of Perfusion's text
# encoders (none where they have left the device) and of the LoRA script's where it keeps them, and of the VAE's.
MODELS = {
    "FLUX.1-dev": (flux, joint_perfusion, FLUX_TARGETS, 0, 2, 2),
    "FLUX.2-klein-4B": (klein, joint_perfusion, KLEIN_TARGETS, 0, 0, 2),
    "SDXL": (sdxl, unet_perfusion, SDXL_TARGETS, 4, 2, 4),
}


def text_activations(encoders):
    """Return the bytes that are saved of text encoders in float32 in which token embeddings are trained."""
    total = 0
    for encoder in encoders:
        encoder.float()
        encoder.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        saved = Saved(encoder, [])
        with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            encoder(zeros(1, 77, dtype=torch.long), output_hidden_states=True)
        total += saved.whole
    return total


def count(make, train, text_bytes, vae_bytes):
    """Return the bytes of each kind that a step holds with one image, and how many numbers are trained."""
    model, inputs, blocks, encoders, vae = make()
    frozen = weights(model)
    trained = train(model, inputs)
    numbers = sum(tensor.numel() for tensor in trained)
    saved = Saved(model, blocks)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(**inputs)
    of_text = text_activations(encoders) if inputs["encoder_hidden_states"].requires_grad else 0
    return {
        "trained_numbers": numbers,
        "weights": 2 * frozen,
        "text_encoders": text_bytes * weights(*encoders),
        "vae": vae_bytes * weights(vae),
        "trained": 4 * numbers,
        "gradients": 4 * numbers,
        "optimizer": 8 * numbers,
        "activations": saved.whole + of_text,
        "activations_checkpointed": saved.checkpointed + of_text,
    }


def totals(row):
    """Return the sum without and with gradient checkpointing."""
    fixed = sum(row[name] for name in ("weights", "text_encoders", "vae", "trained", "gradients", "optimizer"))
    return fixed + row["activations"], fixed + row["activations_checkpointed"]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    logging.set_verbosity_error()  # it asks for `from_pretrained`, to make models in bfloat16
    rows = []
    for name in arguments.model:
        make, perfusion, targets, kept, resident, vae_bytes = MODELS[name]
        trainings = {"Perfusion": (perfusion, kept, 4), "LoRA, rank 4": (lora(targets), 0, vae_bytes)}
        if resident:
            trainings["LoRA, rank 4, text encoders kept"] = (lora(targets), resident, vae_bytes)
        for training, (train, *sizes) in trainings.items():
            with patch.object(F, "scaled_dot_product_attention", flash):
                rows.append({"model": name, "training": training, **count(make, train, *sizes)})
    kinds = ("weights", "text_encoders", "vae", "trained", "gradients", "optimizer", "activations")
    print("counted, not measured, in GB\n")
    print(f"| | | {' | '.join(kinds)} | sum | sum with gradient checkpointing |\n|{'---|' * (len(kinds) + 4)}")
    for row in rows:
        cells = [f"{row[kind] / 1e9:.3f}" for kind in kinds] + [f"{total / 1e9:.2f}" for total in totals(row)]
        print(f"| {row['model']} | {row['training']} | {' | '.join(cells)} |")
    write(arguments.output, {"counted": True, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
