"""Models of the benchmarks: the pocket model, and one with the shapes of Stable Diffusion 1.5 and random weights."""

import itertools
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.model_families import cross_attention_layers, family_of
from diffusers_perfusion.training.superclass import superclass_input

POCKET = Path(__file__).resolve().parents[1] / "pocket"
VOCABULARY = 49_408


def clip_tokenizer():
    """Return a byte-level BPE tokenizer with a vocabulary as large as CLIP's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges = [*itertools.product(letters, letters)]
    merges = merges[: VOCABULARY - 2 - len(vocabulary)]
    vocabulary += [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (Path(folder) / "merges.txt").write_text(
            "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n"
        )
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
        return CLIPTokenizer.from_pretrained(folder)


def load(name, device="cpu", dtype=torch.float32):
    """Return a frozen pipeline of the model `pocket` or `sd15`."""
    if name == "pocket":
        pipeline = StableDiffusionPipeline.from_pretrained(POCKET, safety_checker=None)
    else:
        torch.manual_seed(0)
        tokenizer = clip_tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        part.requires_grad_(False).eval().to(device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_concept(pipeline, number):
    """Return a concept with random tensors that fits a pipeline."""
    generator = torch.Generator().manual_seed(number)
    i_super = superclass_input(family_of(pipeline), "cat").float().cpu()
    i_star = i_super + 0.3 * i_super.std() * torch.randn(i_super.shape, generator=generator)
    return PerfusionConcept(
        placeholder_token=f"<thing-{number}>",
        superclass="cat",
        token_embeddings=[0.02 * torch.randn(pipeline.text_encoder.config.hidden_size, generator=generator)],
        target_input=i_star,
        inverse_target_input=i_star,
        superclass_input=i_super,
        inverse_superclass_input=i_super,
        target_outputs={
            name: torch.randn(layer.inner_kv_dim, generator=generator)
            for name, layer in cross_attention_layers(pipeline.unet).items()
        },
    )
