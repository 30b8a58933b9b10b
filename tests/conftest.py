"""Tiny real models, built here and never downloaded."""

import json
import os
import re
import resource
from contextlib import contextmanager
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    ChromaPipeline,
    ChromaTransformer2DModel,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from hub_server import HubServer
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, Unigram
from tokenizers.normalizers import NFC, Replace
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    Gemma2Model,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from diffusers_perfusion import (
    PerfusionConcept,
    PerfusionPipeline,
    PerfusionPixArtSigmaPipeline,
    PerfusionSanaPipeline,
    PerfusionXLPipeline,
    add_perfusion,
)
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.registry import ConceptRegistry
from diffusers_perfusion.training.superclass import superclass_input
from diffusers_perfusion.training.trainer import PerfusionTrainer

# Tiny models gain nothing from more threads, which would wait for each other on a busy machine.
torch.set_num_threads(1)

WIDTH = 32
LENGTH = 24
TINY_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = (
    "a",
    "an",
    "photo",
    "picture",
    "image",
    "good",
    "the",
    "of",
    "on",
    "in",
    "cat",
    "teddy",
    "bear",
    "dog",
    "beach",
)


@pytest.fixture(autouse=True)
def hugging_face_home(tmp_path, monkeypatch):
    """An empty Hugging Face home for each test, so that no test sees what another or a user has cached."""
    home = tmp_path / "hugging-face"
    monkeypatch.setattr("diffusers_perfusion.training.covariance.HF_HOME", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(home / "hub"), raising=False)  # of 4.x
    return home


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, empty, and a client that asks no other and never waits between two tries."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = HubServer().start()
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", server.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.endpoint)
    # Before huggingface_hub 1 the second module has a copy of the first one's.
    for module in ("constants", "file_download"):
        template = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(template, server.endpoint + "/{repo_id}/resolve/{revision}/{filename}", raising=False)
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps its settings for the life of a process; forget them, or no test could have its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A CLIP tokenizer whose vocabulary is every byte and a few whole words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    # The byte alphabet of byte-level BPE: printable bytes are themselves, the others follow from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols)]
    merges = []
    for word in WORDS:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += letter
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "pad_token": "<|endoftext|>"})
    )
    return folder


class NoSafetyChecker:
    """Stands in for Cosmos's, which is a package of its own, and lets everything pass."""

    def to(self, *args):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def make_unet(seed=0, cross_attention_dim=WIDTH, channels=(16, 32), **settings):
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    ).eval()


def make_pixart(sample_size=8):
    """Of sample size 128, which is PixArt-α's of 1024 pixels, it is told the size of the picture."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=12,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=48,
        caption_channels=20,
    ).eval()
    # It begins at zero, and would draw nothing.
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    return transformer


def make_text_encoder(tokenizer, kind=CLIPTextModel, width=WIDTH, seed=0, **settings):
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_encoder = kind(CLIPTextConfig(**config | settings)).eval()
    # Initial weights are so small that every token is encoded alike.
    text_encoder.get_input_embeddings().weight.data *= 30
    return text_encoder


def make_vae(kind=AutoencoderTiny, seed=0, latent_channels=4):
    torch.manual_seed(seed)
    if kind is AutoencoderTiny:
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).eval()
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


@pytest.fixture
def components(tokenizer_folder):
    """Parts of a Stable Diffusion pipeline: 16×16 pictures, 8×8 latents, text of width 32 and length 24."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    return {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": make_unet(),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@pytest.fixture
def fast_tokenizer(components, tokenizer_folder):
    """Give the components a tokenizer of the tokenizers library, whose added tokens can ignore case.

    In transformers 4 the other is none of these; there the pipelines find tokens in any case, and not the tokenizer.
    """
    components["tokenizer"] = CLIPTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def pipeline(components):
    """A tiny `PerfusionPipeline`."""
    pipeline = PerfusionPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def plain_pipeline(components):
    """The same as an ordinary diffusers pipeline, from the same components."""
    pipeline = StableDiffusionPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def xl_components(components, tokenizer_folder):
    """Parts of a Stable Diffusion XL pipeline, which differ from the other as the published ones do."""
    tokenizer_2 = CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token="!")
    kept = ("vae", "text_encoder", "tokenizer", "scheduler")
    return {name: components[name] for name in kept} | {
        # The published encoder names 2 for the end of a prompt, and takes the highest id instead.
        "text_encoder_2": make_text_encoder(
            tokenizer_2, CLIPTextModelWithProjection, 24, seed=1, eos_token_id=2, projection_dim=16
        ),
        "tokenizer_2": tokenizer_2,
        "unet": make_unet(
            cross_attention_dim=WIDTH + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
    }


@pytest.fixture
def xl_pipeline(xl_components):
    """A tiny `PerfusionXLPipeline`."""
    pipeline = PerfusionXLPipeline(**xl_components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def unigrams(*special):
    """A tokenizer whose vocabulary is a few whole words and letters behind some special tokens, the last of them for
    what it does not know."""
    pieces = [*special, *(f"{SPACE}{word}" for word in WORDS)]
    letters = [SPACE, *map(chr, range(33, 127))]
    scores = [(piece, -1.0) for piece in pieces] + [(letter, -5.0) for letter in letters]
    return Tokenizer(Unigram(scores, unk_id=len(special) - 1))


@pytest.fixture(scope="session")
def t5_tokenizer_folder(tmp_path_factory):
    """A T5 tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = unigrams("<pad>", "</s>", "<unk>")
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LENGTH,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pixart_components(t5_tokenizer_folder):
    """Parts of a PixArt pipeline: text of width 20, which the transformer brings to its own 48."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(t5_tokenizer_folder)
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=20, d_ff=40, d_kv=5, num_heads=4, num_layers=2)
    ).eval()
    return {
        "vae": make_vae(AutoencoderKL),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": make_pixart(),
        "scheduler": DDIMScheduler(clip_sample=False),
    }


@pytest.fixture(scope="session")
def gemma_tokenizer_folder(tmp_path_factory):
    """A Gemma tokenizer, to which a word without a space before it is another word, as a folder."""
    folder = tmp_path_factory.mktemp("gemma")
    tokenizer = unigrams("<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer.normalizer = Replace(" ", SPACE)
    tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def sana_components(gemma_tokenizer_folder):
    """Parts of a Sana pipeline: text of width 20, which the transformer brings to its own 32; 32×32 pictures."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gemma_tokenizer_folder)
    torch.manual_seed(0)
    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=20,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=10,
            query_pre_attn_scalar=10,
            initializer_range=0.3,
        )
    ).eval()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=20,
        sample_size=8,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    ).eval()
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@pytest.fixture
def cosmos_components(t5_tokenizer_folder):
    """Parts of a Cosmos pipeline: text of width 20, which its layers get as it is; 16×16 images."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(t5_tokenizer_folder)
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=20, d_ff=40, d_kv=5, num_heads=4, num_layers=2)
    ).eval()
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # it takes torchvision
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 2.0, 1.0],
    ).eval()
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "safety_checker": NoSafetyChecker(),
    }


def make_flux(guidance_embeds=False):
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    ).eval()


@pytest.fixture
def flux_components(components, t5_tokenizer_folder):
    """Parts of a Flux pipeline: text of width 20 from T5, and a pooled vector from CLIP; 16×16 images."""
    tokenizer_2 = PreTrainedTokenizerFast.from_pretrained(t5_tokenizer_folder)
    torch.manual_seed(0)
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_2), d_model=20, d_ff=40, d_kv=5, num_heads=4, num_layers=2)
    ).eval()
    vae = make_vae(AutoencoderKL)
    vae.register_to_config(shift_factor=0.1)
    return {name: components[name] for name in ("text_encoder", "tokenizer")} | {
        "vae": vae,
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
        "transformer": make_flux(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


@pytest.fixture
def chroma_components(flux_components):
    """Parts of a Chroma pipeline: as those of Flux, without CLIP."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    return {
        "vae": flux_components["vae"],
        "text_encoder": flux_components["text_encoder_2"],
        "tokenizer": flux_components["tokenizer_2"],
        "transformer": transformer,
        "scheduler": flux_components["scheduler"],
    }


CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)

# As words of Qwen's tokenizers, behind a space but for the last ones.
DESCRIBED = "by detailing color shape size texture quantity text spatial relationships objects and background"
CHAT_WORDS = (
    *(f" {word}" for word in (*WORDS, *DESCRIBED.split())),
    "assistant",
    "Describe",
    "system",
    "think",
    "teddy",
    "user",
    "cat",
)


def byte_level_tokenizer(chat_words):
    """A tokenizer to which a space is the beginning of a word, and which knows these words."""
    vocabulary = sorted(ByteLevel.alphabet())
    merges = []
    for word in chat_words:
        left, *letters = word.replace(" ", "Ġ")
        for letter in letters:
            if (left, letter) not in merges:
                merges.append((left, letter))
                vocabulary.append(left + letter)
            left += letter
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(vocabulary)}, merges))
    tokenizer.normalizer = NFC()
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(words), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def qwen_tokenizer_folder(tmp_path_factory):
    """A tokenizer of Qwen with its chat template, as a folder."""
    tokenizer = byte_level_tokenizer(CHAT_WORDS)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>"])
    folder = tmp_path_factory.mktemp("qwen")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


MISTRAL_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set name = {'system': 'SYSTEM_PROMPT', 'user': 'INST'}[message.role] %}"
    "{{- '[' + name + ']' + message.content[0].text + '[/' + name + ']' }}"
    "{%- endfor %}"
)


@pytest.fixture(scope="session")
def mistral_processor_folder(tmp_path_factory):
    """A tokenizer of Mistral 3 with its chat template in a processor of text and images, as a folder.

    Mistral's own processor needs torchvision; that of Llava is the same to text.
    """
    tokenizer = byte_level_tokenizer((*CHAT_WORDS, *re.findall(r" ?\w+", SYSTEM_MESSAGE)))
    brackets = [f"[{name}]" for name in ("INST", "/INST", "SYSTEM_PROMPT", "/SYSTEM_PROMPT", "IMG")]
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", *brackets])
    tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
    )
    folder = tmp_path_factory.mktemp("mistral")
    LlavaProcessor(
        CLIPImageProcessor(), tokenizer, patch_size=16, image_token="[IMG]", chat_template=MISTRAL_TEMPLATE
    ).save_pretrained(folder)
    return folder


# Of a prompt, the template around it and a system message.
CHAT_LENGTH = 88

# Names of the fixtures with a pipeline of each family.
JOINT_PIPELINES = (
    "sd3_pipeline",
    "flux_pipeline",
    "chroma_pipeline",
    "klein_pipeline",
    "dev_pipeline",
    "z_image_pipeline",
    "qwen_image_pipeline",
)
PIPELINES = ("pipeline", "xl_pipeline", "pixart_pipeline", "sana_pipeline", "cosmos_pipeline", *JOINT_PIPELINES)


def make_qwen3(tokenizer, layers):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            initializer_range=0.3,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def flux2_components(tokenizer, text_encoder, guidance_embeds):
    """Parts of a FLUX.2 pipeline: text from three layers of the text encoder side by side; 16×16 images."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * text_encoder.get_input_embeddings().embedding_dim,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


@pytest.fixture
def klein_components(qwen_tokenizer_folder):
    """Parts of a FLUX.2 klein pipeline: text of width 3 · 8 from Qwen3."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen_tokenizer_folder)
    return flux2_components(tokenizer, make_qwen3(tokenizer, 28), guidance_embeds=False)


@pytest.fixture
def dev_components(mistral_processor_folder):
    """Parts of a FLUX.2 dev pipeline: text of width 3 · 12 from Mistral 3, with a processor of text and images."""
    processor = LlavaProcessor.from_pretrained(mistral_processor_folder)
    torch.manual_seed(0)
    text_encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config={
                "model_type": "mistral",
                "vocab_size": len(processor.tokenizer),
                "hidden_size": 12,
                "intermediate_size": 16,
                "num_hidden_layers": 31,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 6,
                "initializer_range": 0.3,
                "pad_token_id": processor.tokenizer.pad_token_id,
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 8,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
            },
            image_token_id=processor.image_token_id,
        )
    ).eval()
    parts = flux2_components(processor, text_encoder, guidance_embeds=True)
    # More of the text has to come through to the image, because no guidance multiplies it.
    for modulation in (
        parts["transformer"].double_stream_modulation_img,
        parts["transformer"].single_stream_modulation,
    ):
        torch.nn.init.normal_(modulation.linear.weight)
    return parts


@pytest.fixture
def z_image_components(qwen_tokenizer_folder):
    """Parts of a Z-Image pipeline: text of width 8 from Qwen3, which the transformer brings to its own 16."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen_tokenizer_folder)
    text_encoder = make_qwen3(tokenizer, 3)
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    ).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    vae = make_vae(AutoencoderKL)
    vae.register_to_config(shift_factor=0.1)
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


@pytest.fixture
def qwen_image_components(qwen_tokenizer_folder):
    """Parts of a Qwen-Image pipeline: text of width 16 from Qwen2.5-VL; 16×16 images."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen_tokenizer_folder)
    length = len(tokenizer)
    torch.manual_seed(0)
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": length + 8,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.3,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
            image_token_id=length + 1,
            video_token_id=length + 2,
            vision_start_token_id=length + 3,
            vision_end_token_id=length + 4,
        )
    ).eval()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 2.0, 1.0],
    ).eval()
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def make_sd3(**settings):
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=60,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 16,
        pos_embed_max_size=8,
        **settings,
    ).eval()


@pytest.fixture
def sd3_components(components, t5_tokenizer_folder, tokenizer_folder):
    """Parts of a Stable Diffusion 3.5 pipeline: text of width 60 from T5, behind that of two CLIPs; 16×16 images."""
    tokenizer_2 = CLIPTokenizer.from_pretrained(tokenizer_folder, pad_token="!")
    tokenizer_3 = PreTrainedTokenizerFast.from_pretrained(t5_tokenizer_folder)
    torch.manual_seed(0)
    text_encoder_3 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer_3), d_model=60, d_ff=40, d_kv=15, num_heads=4, num_layers=2)
    ).eval()
    clip = partial(make_text_encoder, kind=CLIPTextModelWithProjection)
    vae = make_vae(AutoencoderKL, latent_channels=16)
    vae.register_to_config(shift_factor=0.1)
    return {
        "vae": vae,
        "text_encoder": clip(components["tokenizer"], projection_dim=12),
        "tokenizer": components["tokenizer"],
        "text_encoder_2": clip(tokenizer_2, width=24, seed=1, eos_token_id=2, projection_dim=16),
        "tokenizer_2": tokenizer_2,
        "text_encoder_3": text_encoder_3,
        "tokenizer_3": tokenizer_3,
        "transformer": make_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def _with_concepts(kind, components):
    """Return a fixture of a tiny pipeline that loads concepts."""

    @pytest.fixture
    def pipeline(request):
        pipeline = add_perfusion(kind(**request.getfixturevalue(components)))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return pipeline


cosmos_pipeline = _with_concepts(Cosmos2TextToImagePipeline, "cosmos_components")
chroma_pipeline = _with_concepts(ChromaPipeline, "chroma_components")
dev_pipeline = _with_concepts(Flux2Pipeline, "dev_components")
klein_pipeline = _with_concepts(Flux2KleinPipeline, "klein_components")
z_image_pipeline = _with_concepts(ZImagePipeline, "z_image_components")
qwen_image_pipeline = _with_concepts(QwenImagePipeline, "qwen_image_components")
flux_pipeline = _with_concepts(FluxPipeline, "flux_components")
sd3_pipeline = _with_concepts(StableDiffusion3Pipeline, "sd3_components")


@pytest.fixture
def sana_pipeline(sana_components):
    """A tiny `PerfusionSanaPipeline`."""
    pipeline = PerfusionSanaPipeline(**sana_components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pixart_pipeline(pixart_components):
    """A tiny `PerfusionPixArtSigmaPipeline`."""
    pipeline = PerfusionPixArtSigmaPipeline(**pixart_components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected_gates(hidden_states, *concepts, tokens=None, bias=None):
    """`coef` and `gate` of concepts in one row, `(length, J)`, written out.

    Args:
        hidden_states: `(length, d)`.
        concepts: to edit in.
        tokens: positions of each concept's token; by default the first with 0.6 of the highest similarity to its
            target input.
        bias: of each concept; by default its own.
    """
    coef, gate = [], torch.zeros(len(hidden_states), len(concepts))
    for n, concept in enumerate(concepts):
        i, inverse = concept.superclass_input.float(), concept.inverse_superclass_input.float()
        coef.append(hidden_states @ inverse / (i @ inverse))
        likeness = (hidden_states @ concept.inverse_target_input.float()).tolist()
        first = next(place for place, value in enumerate(likeness) if value >= 0.6 * max(likeness))
        places = [first] if tokens is None else tokens[n]
        beta = concept.bias if bias is None else bias[n]
        gate[list(places), n] = torch.sigmoid(torch.tensor((1 - beta) / concept.temperature))
    return torch.stack(coef, -1), gate


def random_concept(pipeline, word="<my-cat>", superclass="cat", seed=0, **fields):
    """A concept for a pipeline with random numbers, so that it has an effect and two seeds differ."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    family = family_of(pipeline)
    i_super = superclass_input(family, superclass)
    i_star = i_super + 0.3 * random(len(i_super))
    embeddings = [random(model.get_input_embeddings().embedding_dim) for model in family.text_encoders]
    if family.joint:  # where tokens have none
        embeddings = [torch.zeros_like(embedding) for embedding in embeddings]
    return PerfusionConcept(
        **{
            "placeholder_token": word,
            "superclass": superclass,
            "token_embeddings": embeddings,
            "target_input": i_star,
            "inverse_target_input": i_star + 0.3 * random(len(i_super)),
            "superclass_input": i_super,
            "inverse_superclass_input": i_super + 0.3 * random(len(i_super)),
            # Large enough that one position of a prompt is seen in a tiny model's image; Cosmos returns bytes.
            "target_outputs": {
                name: (40 if "Cosmos" in family.name else 4) * random(width)
                for name, (_, width) in family.layer_widths.items()
            },
            "base_model": "tiny",
            **fields,
        }
    )


@pytest.fixture
def concept(pipe):
    """Make a random concept for the pipeline of a file of tests."""

    def make(word="<my-bear>", superclass="teddy bear", seed=0, **fields):
        return random_concept(pipe, word, superclass, seed, **fields)

    return make


def places_of(tokenizer, prompt, token):
    """The positions of a placeholder token in the token ids of a prompt."""
    ids = [token_id for text, token_id in tokenizer.get_added_vocab().items() if text.endswith(token)]
    return [place for place, token_id in enumerate(tokenizer(prompt).input_ids) if token_id in ids]


def effect(one, other):
    """The largest difference between two images."""
    return float((one - other).abs().max())


@pytest.fixture
def make_concept(pipeline):
    """Make a random concept for `pipeline`."""
    return partial(random_concept, pipeline)


@pytest.fixture
def family(pipeline):
    """The family of `pipeline`."""
    return family_of(pipeline)


@pytest.fixture
def registry(family):
    """A registry without a concept, connected to the text encoder of `pipeline`."""
    registry = ConceptRegistry(family)
    registry.connect(family)
    return registry


@pytest.fixture
def load(registry, make_concept):
    """Load a random concept into `registry`."""

    def run(name, seed=0, superclass="cat", **fields):
        concept = make_concept(f"<{name}>", superclass, seed, **fields)
        registry.add(name, concept)
        return concept

    return run


@pytest.fixture
def encode(family):
    """Return the hidden states of prompts."""
    return torch.no_grad()(lambda *prompts: family.encode(family.tokenize(prompts)).hidden_states)


@pytest.fixture
def generate(pipeline):
    """Draw prompts with `pipeline` (or another) in three steps of fixed noise: `(N, 3, 16, 16)`."""

    def run(prompts, pipe=None, **arguments):
        prompts = [prompts] if isinstance(prompts, str) else [*prompts]
        pipe = pipe or pipeline
        guidance = {"guidance_scale": 4.0} if "guidance_scale" in signature(pipe.__call__).parameters else {}
        return pipe(
            **guidance
            | {
                "prompt": prompts,
                "num_inference_steps": 3,
                "generator": [torch.Generator().manual_seed(7) for _ in prompts],
                "output_type": "pt",
                **arguments,
            }
        ).images

    return run


@pytest.fixture
def images_folder(tmp_path):
    """A folder with three images for the tiny pipeline, of different shapes and colours."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate([(16, 16), (24, 16), (20, 28)], start=1):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def training_settings(tmp_path, images_folder, fresh_accelerate):
    """Settings of a `TrainingConfig` for a short training on the tiny pipeline."""
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\na dog on the beach\na good picture of the teddy bear\nan image of a photo\n")
    return {
        "pretrained_model_name_or_path": "tiny",
        "instance_data_dir": str(images_folder),
        "placeholder_token": "<my-cat>",
        "superclass": "cat",
        "output_dir": str(tmp_path / "output"),
        "covariance": str(captions),
        "mask": "none",
        "train_batch_size": 4,
        "max_train_steps": 4,
        # As many steps do as much in a longer training.
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    }


@pytest.fixture
def stop(monkeypatch):
    """Make training fail at a step; nothing is raised in a training started after that."""

    def stop_at(index, error):
        step = PerfusionTrainer.step

        def stopping(self, current):
            if current == index:
                monkeypatch.setattr(PerfusionTrainer, "step", step)
                raise error
            return step(self, current)

        monkeypatch.setattr(PerfusionTrainer, "step", stopping)

    return stop_at


@pytest.fixture
def full_disk(capsys):
    """A context in which files cannot grow beyond a size; what is printed is in memory, which has no such bound."""

    @contextmanager
    def limit(size=0):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def model_folder(tmp_path, plain_pipeline):
    """The tiny pipeline as a folder."""
    folder = tmp_path / "tiny"
    plain_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory, tokenizer_folder):
    """A random CLIP in half precision, as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    text = {
        **TINY_TRANSFORMER,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_factor": 5.0,
    }
    vision = {**TINY_TRANSFORMER, "image_size": 16, "patch_size": 4, "initializer_factor": 5.0}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def identity_folders(tmp_path_factory):
    """Random vision transformers in half precision, as folders: a DINOv2 and a ViT."""
    torch.manual_seed(0)
    models = {
        "dinov2": Dinov2Model(
            Dinov2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=4
            )
        ),
        "vit": ViTModel(ViTConfig(**TINY_TRANSFORMER, image_size=16, patch_size=4)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.half().save_pretrained(folders[name])
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folders[name])
    return folders


@pytest.fixture
def environment(hugging_face_home):
    """Of a process like this one: alone, without the Hub, and on one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "HF_"))}
    return kept | {
        "HF_HOME": str(hugging_face_home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
