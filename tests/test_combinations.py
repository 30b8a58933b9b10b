"""A concept in the pipelines people have, beside what else they load: it has an effect, and leaves without a trace."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from compel import Compel
from conftest import CHAT_LENGTH, LENGTH, make_flux, make_pixart, make_sd3, make_vae, random_concept
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ControlNetModel,
    Cosmos2TextToImagePipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FirstBlockCacheConfig,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    LCMScheduler,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.model_families import cross_attention_layers, edited_model, family_of

PROMPTS = ["a <my-cat> on the beach", "a cat on the beach"]


def image(seed=0, channels=3):
    """Noise as a batch of two images."""
    return torch.rand(2, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def controlnet(components):
    torch.manual_seed(1)
    net = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8, 16)).eval()
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block]:  # they begin at zero
        torch.nn.init.normal_(block.weight, std=0.1)
    return {**components, "controlnet": net}


def scheduled(scheduler, **settings):
    def make(components):
        return StableDiffusionPipeline(
            **{**components, "scheduler": scheduler.from_config(components["scheduler"].config, **settings)}
        )

    return make


def mask():
    return (image(2, 1) > 0.5).float()


PIXART = {"use_resolution_binning": False, "max_sequence_length": LENGTH, "clean_caption": False}

SANA = {"height": 32, "width": 32, "use_resolution_binning": False, "max_sequence_length": LENGTH}

COSMOS = {"height": 16, "width": 16, "max_sequence_length": LENGTH, "negative_prompt": ["", ""]}

FLUX = {"height": 16, "width": 16, "max_sequence_length": LENGTH}

CHAT = {"height": 16, "width": 16, "max_sequence_length": CHAT_LENGTH}


# The other prompt is the longest, whether the placeholder token is one or many: the length of all is that.
QWEN = CHAT | {"prompt": [PROMPTS[0], f"{PROMPTS[1]} on the beach on the beach on the beach"]}


def reference_image():
    return Image.fromarray((image()[0].permute(1, 2, 0) * 255).byte().numpy()).resize((64, 64))


def flux_controlnet(components):
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    net = FluxControlNetModel.from_transformer(components["transformer"], **sizes).eval()
    for block in (*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder):
        torch.nn.init.normal_(block.weight, std=0.1)  # they begin at zero
    return {**components, "controlnet": net}


SD3 = FLUX | {"guidance_scale": 4.0}


def sd3_controlnet(components, inpainting=False):
    torch.manual_seed(1)
    net = SD3ControlNetModel.from_transformer(
        components["transformer"], num_layers=2, num_extra_conditioning_channels=int(inpainting)
    ).eval()
    for block in (*net.controlnet_blocks, net.pos_embed_input.proj):
        torch.nn.init.normal_(block.weight, std=0.1)  # they begin at zero
    return {**components, "controlnet": net}


def controlled():
    torch.manual_seed(2)  # the latents of the control image are drawn with no generator of the caller's
    return SD3


# By family, what makes a pipeline of components, and what it is called with.
PIPELINES = {
    "Stable Diffusion": {
        "text to image": (lambda parts: StableDiffusionPipeline(**parts), lambda: {}),
        "image to image": (
            lambda parts: StableDiffusionImg2ImgPipeline(**parts),
            lambda: {"image": image(), "strength": 0.9},
        ),
        "inpainting": (
            lambda parts: StableDiffusionInpaintPipeline(**parts),
            lambda: {"image": image(), "mask_image": mask(), "height": 16, "width": 16},
        ),
        "ControlNet": (
            lambda parts: StableDiffusionControlNetPipeline(**controlnet(parts)),
            lambda: {"image": image()},
        ),
        "ControlNet image to image": (
            lambda parts: StableDiffusionControlNetImg2ImgPipeline(**controlnet(parts)),
            lambda: {"image": image(), "control_image": image(1), "strength": 0.9},
        ),
        "ControlNet inpainting": (
            lambda parts: StableDiffusionControlNetInpaintPipeline(**controlnet(parts)),
            lambda: {"image": image(), "mask_image": mask(), "control_image": image(1), "height": 16, "width": 16},
        ),
        "PAG": (
            lambda parts: StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"]),
            lambda: {"pag_scale": 2.0},
        ),
        "LCM without guidance": (scheduled(LCMScheduler), lambda: {"guidance_scale": 1.0}),
        "v-prediction": (scheduled(EulerAncestralDiscreteScheduler, prediction_type="v_prediction"), lambda: {}),
        "DPM-Solver++ with guidance rescale": (
            scheduled(DPMSolverMultistepScheduler),
            lambda: {"guidance_rescale": 0.7},
        ),
        "several of each prompt": (
            lambda parts: StableDiffusionPipeline(**parts),
            lambda: {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]},
        ),
    },
    "Stable Diffusion XL": {
        "text to image": (lambda parts: StableDiffusionXLPipeline(**parts), lambda: {}),
        "image to image": (
            lambda parts: StableDiffusionXLImg2ImgPipeline(**parts),
            lambda: {"image": image(), "strength": 0.9},
        ),
        "inpainting": (
            lambda parts: StableDiffusionXLInpaintPipeline(**parts),
            lambda: {"image": image(), "mask_image": mask(), "height": 16, "width": 16},
        ),
        "ControlNet": (
            lambda parts: StableDiffusionXLControlNetPipeline(**controlnet(parts)),
            lambda: {"image": image()},
        ),
        "ControlNet image to image": (
            lambda parts: StableDiffusionXLControlNetImg2ImgPipeline(**controlnet(parts)),
            lambda: {"image": image(), "control_image": image(1), "strength": 0.9},
        ),
        "PAG": (
            lambda parts: StableDiffusionXLPAGPipeline(**parts, pag_applied_layers=["mid"]),
            lambda: {"pag_scale": 2.0},
        ),
        "without guidance": (lambda parts: StableDiffusionXLPipeline(**parts), lambda: {"guidance_scale": 1.0}),
        "clip skip": (lambda parts: StableDiffusionXLPipeline(**parts), lambda: {"clip_skip": 1}),
        "two prompts": (
            lambda parts: StableDiffusionXLPipeline(**parts),
            lambda: {"prompt_2": ["a image of a dog"] * 2, "negative_prompt": ["a beach"] * 2},
        ),
        "several of each prompt": (
            lambda parts: StableDiffusionXLPipeline(**parts),
            lambda: {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]},
        ),
    },
    "PixArt": {
        "text to image": (lambda parts: PixArtSigmaPipeline(**parts), lambda: PIXART),
        "PixArt-α": (
            lambda parts: PixArtAlphaPipeline(**parts | {"transformer": make_pixart(128)}),
            lambda: PIXART | {"height": 16, "width": 16},
        ),
        "PAG": (
            lambda parts: PixArtSigmaPAGPipeline(**parts, pag_applied_layers=["transformer_blocks.0"]),
            lambda: PIXART | {"pag_scale": 2.0},
        ),
        "without guidance": (lambda parts: PixArtSigmaPipeline(**parts), lambda: PIXART | {"guidance_scale": 1.0}),
        "several of each prompt": (
            lambda parts: PixArtSigmaPipeline(**parts),
            lambda: (
                PIXART
                | {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
            ),
        ),
    },
    "Sana": {
        "text to image": (lambda parts: SanaPipeline(**parts), lambda: SANA),
        "PAG": (
            lambda parts: SanaPAGPipeline(**parts, pag_applied_layers=["transformer_blocks.0"]),
            lambda: SANA | {"pag_scale": 2.0},
        ),
        "no instruction": (
            lambda parts: SanaPipeline(**parts),
            lambda: SANA | {"complex_human_instruction": None},
        ),
        "without guidance": (lambda parts: SanaPipeline(**parts), lambda: SANA | {"guidance_scale": 1.0}),
    },
    "Cosmos": {
        "text to image": (lambda parts: Cosmos2TextToImagePipeline(**parts), lambda: COSMOS),
        "without guidance": (
            lambda parts: Cosmos2TextToImagePipeline(**parts),
            lambda: COSMOS | {"guidance_scale": 1.0},
        ),
    },
    "Flux": {
        "text to image": (lambda parts: FluxPipeline(**parts), lambda: FLUX),
        "distilled guidance": (lambda parts: FluxPipeline(**parts | {"transformer": make_flux(True)}), lambda: FLUX),
        "true guidance": (
            lambda parts: FluxPipeline(**parts),
            lambda: FLUX | {"true_cfg_scale": 3.0, "negative_prompt": ["a dog", ""]},
        ),
        "two prompts": (lambda parts: FluxPipeline(**parts), lambda: FLUX | {"prompt_2": [*PROMPTS[:1], "a dog"]}),
        "image to image": (
            lambda parts: FluxImg2ImgPipeline(**parts),
            lambda: FLUX | {"image": image(), "strength": 0.9},
        ),
        "inpainting": (
            lambda parts: FluxInpaintPipeline(**parts),
            lambda: FLUX | {"image": image(), "mask_image": mask(), "strength": 0.9},
        ),
        "Kontext": (
            lambda parts: FluxKontextPipeline(**parts),
            lambda: FLUX | {"image": image(), "max_area": 256, "_auto_resize": False},
        ),
        "ControlNet": (
            lambda parts: FluxControlNetPipeline(**flux_controlnet(parts)),
            lambda: FLUX | {"control_image": image()},
        ),
        "several of each prompt": (
            lambda parts: FluxPipeline(**parts),
            lambda: (
                FLUX | {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
            ),
        ),
    },
    "Stable Diffusion 3": {
        "text to image": (lambda parts: StableDiffusion3Pipeline(**parts), lambda: SD3),
        "Stable Diffusion 3.0": (
            lambda parts: StableDiffusion3Pipeline(**parts | {"transformer": make_sd3()}),
            lambda: SD3,
        ),
        "without T5": (
            lambda parts: StableDiffusion3Pipeline(**parts | {"text_encoder_3": None, "tokenizer_3": None}),
            lambda: SD3,
        ),
        "without guidance": (lambda parts: StableDiffusion3Pipeline(**parts), lambda: SD3 | {"guidance_scale": 1.0}),
        "clip skip": (lambda parts: StableDiffusion3Pipeline(**parts), lambda: SD3 | {"clip_skip": 1}),
        "skip layer guidance": (
            lambda parts: StableDiffusion3Pipeline(**parts),
            lambda: SD3 | {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0},
        ),
        "three prompts": (
            lambda parts: StableDiffusion3Pipeline(**parts),
            lambda: SD3 | {"prompt_2": ["a dog"] * 2, "prompt_3": ["a photo"] * 2, "negative_prompt": ["a dog", ""]},
        ),
        "image to image": (
            lambda parts: StableDiffusion3Img2ImgPipeline(**parts),
            lambda: SD3 | {"image": image(), "strength": 0.9},
        ),
        "inpainting": (
            lambda parts: StableDiffusion3InpaintPipeline(**parts),
            lambda: SD3 | {"image": image(), "mask_image": mask(), "strength": 0.9},
        ),
        "PAG": (
            lambda parts: StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"]),
            lambda: SD3 | {"pag_scale": 2.0},
        ),
        "PAG image to image without guidance": (
            lambda parts: StableDiffusion3PAGImg2ImgPipeline(**parts, pag_applied_layers=["blocks.1"]),
            lambda: SD3 | {"image": image(), "strength": 0.9, "pag_scale": 2.0, "guidance_scale": 1.0},
        ),
        "ControlNet": (
            lambda parts: StableDiffusion3ControlNetPipeline(**sd3_controlnet(parts)),
            lambda: controlled() | {"control_image": image()},
        ),
        "ControlNet inpainting": (
            lambda parts: StableDiffusion3ControlNetInpaintingPipeline(**sd3_controlnet(parts, inpainting=True)),
            lambda: controlled() | {"control_image": image(), "control_mask": mask()},
        ),
        "several of each prompt": (
            lambda parts: StableDiffusion3Pipeline(**parts),
            lambda: (
                SD3 | {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
            ),
        ),
    },
    "Chroma": {
        "text to image": (lambda parts: ChromaPipeline(**parts), lambda: FLUX),
        "without guidance": (lambda parts: ChromaPipeline(**parts), lambda: FLUX | {"guidance_scale": 1.0}),
        "image to image": (
            lambda parts: ChromaImg2ImgPipeline(**parts),
            lambda: FLUX | {"image": image(), "strength": 0.9},
        ),
    },
    "Qwen-Image": {
        "text to image": (lambda parts: QwenImagePipeline(**parts), lambda: QWEN),
        "true guidance": (
            lambda parts: QwenImagePipeline(**parts),
            lambda: QWEN | {"true_cfg_scale": 3.0, "negative_prompt": ["a dog", ""]},
        ),
        "image to image": (
            lambda parts: QwenImageImg2ImgPipeline(**parts),
            lambda: QWEN | {"image": image(), "strength": 0.9},
        ),
        "inpainting": (
            lambda parts: QwenImageInpaintPipeline(**parts),
            lambda: QWEN | {"image": image(), "mask_image": mask(), "strength": 0.9},
        ),
    },
    "Z-Image": {
        "text to image": (lambda parts: ZImagePipeline(**parts), lambda: CHAT),
        "without guidance": (lambda parts: ZImagePipeline(**parts), lambda: CHAT | {"guidance_scale": 0.0}),
        "image to image": (
            lambda parts: ZImageImg2ImgPipeline(**parts),
            lambda: CHAT | {"image": image(), "strength": 0.9},
        ),
        "inpainting": (
            lambda parts: ZImageInpaintPipeline(**parts),
            lambda: CHAT | {"image": image(), "mask_image": mask(), "strength": 0.9},
        ),
        "several of each prompt": (
            lambda parts: ZImagePipeline(**parts),
            lambda: (
                CHAT | {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
            ),
        ),
    },
    "FLUX.2 dev": {
        "text to image": (lambda parts: Flux2Pipeline(**parts), lambda: CHAT),
        "reference image": (lambda parts: Flux2Pipeline(**parts), lambda: CHAT | {"image": reference_image()}),
        "several of each prompt": (
            lambda parts: Flux2Pipeline(**parts),
            lambda: (
                CHAT | {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
            ),
        ),
    },
    "FLUX.2 klein": {
        "text to image": (lambda parts: Flux2KleinPipeline(**parts), lambda: CHAT),
        "distilled": (lambda parts: Flux2KleinPipeline(**parts, is_distilled=True), lambda: CHAT),
        "reference image": (lambda parts: Flux2KleinPipeline(**parts), lambda: CHAT | {"image": reference_image()}),
        "reference image with KV cache": (
            lambda parts: Flux2KleinKVPipeline(**parts),
            lambda: CHAT | {"image": reference_image()},
        ),
        "inpainting": (
            lambda parts: Flux2KleinInpaintPipeline(**parts),
            lambda: CHAT | {"image": image(), "mask_image": mask(), "strength": 0.9},
        ),
        "several of each prompt": (
            lambda parts: Flux2KleinPipeline(**parts),
            lambda: (
                CHAT | {"num_images_per_prompt": 2, "generator": [torch.Generator().manual_seed(n) for n in range(4)]}
            ),
        ),
    },
}
COMPONENTS = {
    "Stable Diffusion": "components",
    "Stable Diffusion XL": "xl_components",
    "PixArt": "pixart_components",
    "Sana": "sana_components",
    "Cosmos": "cosmos_components",
    "Flux": "flux_components",
    "Chroma": "chroma_components",
    "Stable Diffusion 3": "sd3_components",
    "FLUX.2 dev": "dev_components",
    "FLUX.2 klein": "klein_components",
    "Z-Image": "z_image_components",
    "Qwen-Image": "qwen_image_components",
}

# How keys are locked. In joint attention they are where values alone are learned.
JOINT = "Stable Diffusion 3", "Flux", "Chroma", "FLUX.2 dev", "FLUX.2 klein", "Z-Image", "Qwen-Image"
LOCKINGS = dict.fromkeys(PIPELINES, ("local", "global")) | dict.fromkeys(JOINT, ("local", "values alone"))


def concept_for(pipe, locking):
    concept = random_concept(pipe)
    if locking == "values alone":
        concept.target_input = concept.superclass_input
    return concept


def load(pipe, concept, locking):
    pipe.load_perfusion(concept)
    if locking == "global":
        pipe.set_perfusion(locking=locking)


@pytest.fixture
def parts(family, request):
    return request.getfixturevalue(COMPONENTS[family])


@pytest.mark.parametrize(
    ("family", "name", "locking"),
    [
        (family, name, locking)
        for family, kinds in PIPELINES.items()
        for name, locking in itertools.product(kinds, LOCKINGS[family])
    ],
)
def test_a_concept_in_a_pipeline(parts, family, generate, name, locking):
    make, arguments = PIPELINES[family][name]
    pipe = make(parts)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return generate(PROMPTS, pipe, **arguments())

    processors = {name: layer.processor for name, layer in family_of(pipe).layers.items()}
    before = run()
    with_text, plain = before.chunk(2)
    load(add_perfusion(pipe), concept_for(pipe, locking), locking)
    edited = run()
    assert torch.equal(edited.chunk(2)[1], plain)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(edited.chunk(2)[0], with_text, strict=True))
    with pipe.set_perfusion(bias=0.1, temperature=1.0):  # the edit, and not the token alone
        assert all((one - other).abs().max() > 1e-4 for one, other in zip(run(), edited.chunk(2)[0], strict=False))
    pipe.disable_perfusion()
    assert torch.equal(run(), before)
    pipe.enable_perfusion()
    assert torch.equal(run(), edited)
    pipe.unload_perfusion()
    assert torch.equal(run(), before)
    layers = family_of(pipe).layers
    assert all(layers[name].processor is processor for name, processor in processors.items())


# Beside other adapters and settings


def lora(pipe, name="default", seed=0):
    from peft import LoraConfig

    torch.manual_seed(seed)
    targets = ["to_k", "to_v", "to_q", "to_out.0", "add_v_proj", "to_qkv_mlp_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    edited_model(pipe).add_adapter(config, adapter_name=name)


def two_loras(pipe):
    lora(pipe, "one", 1)
    lora(pipe, "two", 2)
    pipe.set_adapters(["one", "two"], [0.7, 0.4])


def fused_lora(pipe):
    lora(pipe)
    pipe.fuse_lora(components=["unet" if hasattr(pipe, "unet") else "transformer"], lora_scale=0.5)


def textual_inversion(pipe):
    family = family_of(pipe)
    for tokenizer, model in zip(family.tokenizers, family.text_encoders, strict=True):
        vector = torch.randn(model.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(0))
        pipe.load_textual_inversion({"<style>": vector}, tokenizer=tokenizer, text_encoder=model)


def no_textual_inversion(pipe):
    family = family_of(pipe)
    for tokenizer, model in zip(family.tokenizers, family.text_encoders, strict=True):
        pipe.unload_textual_inversion(tokenizer=tokenizer, text_encoder=model)


def model_offload(pipe):
    for model in (*family_of(pipe).text_encoders, edited_model(pipe), pipe.vae):
        cpu_offload_with_hook(model, execution_device="cpu")


def sequential_offload(pipe):
    for model in (*family_of(pipe).text_encoders, edited_model(pipe), pipe.vae):
        cpu_offload(model, execution_device=torch.device("cpu"))


def group_offload(pipe):
    cpu = torch.device("cpu")
    # Before 0.40 diffusers asks for an accelerator also when it is told to do without.
    with patch("torch.accelerator.current_accelerator", return_value=cpu):
        edited_model(pipe).enable_group_offload(cpu, cpu, offload_type="leaf_level")


def layerwise(pipe):
    edited_model(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def int8(pipe):
    quantize_(edited_model(pipe), Int8WeightOnlyConfig())


def fused_transformer(pipe):
    pipe.transformer.fuse_qkv_projections()


def first_block_cache(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def ip_adapter(pipe):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    widths = [layer.inner_kv_dim for layer in cross_attention_layers(pipe.unet).values()]
    text = pipe.unet.config.cross_attention_dim
    weights = {
        "image_proj": {
            "proj.weight": random(4 * text, 12),
            "proj.bias": random(4 * text),
            "norm.weight": random(text),
            "norm.bias": random(text),
        },
        "ip_adapter": {
            f"{1 + 2 * number}.to_{letter}_ip.weight": random(width, text)
            for number, width in enumerate(widths)
            for letter in "kv"
        },
    }
    pipe.load_ip_adapter(weights, subfolder=None, weight_name=None, image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.6)


EMBEDS = [torch.stack([torch.zeros(2, 12), torch.ones(2, 12)]).flatten(0, 1).unsqueeze(1)]

# What is done to a pipeline, what takes it back, and what the pipeline is called with.
FEATURES = {
    "LoRA": (lora, lambda pipe: pipe.delete_adapters("default"), {}),
    "two LoRAs with weights": (two_loras, lambda pipe: pipe.delete_adapters(["one", "two"]), {}),
    "fused LoRA": (fused_lora, None, {}),
    "Textual Inversion": (textual_inversion, no_textual_inversion, {}),
    "IP-Adapter": (ip_adapter, lambda pipe: pipe.unload_ip_adapter(), {"ip_adapter_image_embeds": EMBEDS}),
    "attention slicing": (
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.disable_attention_slicing(),
        {},
    ),
    "fused projections": (
        lambda pipe: pipe.fuse_qkv_projections(vae=False),
        lambda pipe: pipe.unfuse_qkv_projections(vae=False),
        {},
    ),
    "fused transformer": (fused_transformer, None, {}),
    "attention backend": (lambda pipe: pipe.transformer.set_attention_backend("native"), None, {}),
    "first block cache": (first_block_cache, None, {}),
    "FreeU": (
        lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        lambda pipe: pipe.disable_freeu(),
        {},
    ),
    "channels last": (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), None, {}),
    "bfloat16": (lambda pipe: pipe.to(torch.bfloat16), lambda pipe: pipe.to(torch.float32), {}),
    "model offload": (model_offload, None, {}),
    "sequential offload": (sequential_offload, None, {}),
    "group offload": (group_offload, None, {}),
    "layerwise casting": (layerwise, None, {}),
    "int8 weights": (int8, None, {}),
}


# What their pipelines do not have is left out.
TRANSFORMERS = "bfloat16", "model offload", "sequential offload", "group offload", "layerwise casting", "int8 weights"
OF_FLUX = "fused transformer", "attention backend", "first block cache"
UNETS = tuple(name for name in FEATURES if name not in OF_FLUX)
BESIDE = {
    "Stable Diffusion": UNETS,
    "Stable Diffusion XL": UNETS,
    "PixArt": TRANSFORMERS,
    "Sana": ("LoRA", *TRANSFORMERS),
    "Cosmos": TRANSFORMERS,
    "Chroma": ("LoRA", "fused transformer", "attention backend", "bfloat16", "group offload"),
    "Qwen-Image": ("LoRA", "attention backend", "first block cache", *TRANSFORMERS),
    "Z-Image": ("LoRA", "attention backend", *TRANSFORMERS),
    "FLUX.2 dev": ("LoRA", "fused transformer", "attention backend", *TRANSFORMERS),
    "FLUX.2 klein": ("LoRA", "fused transformer", "attention backend", *TRANSFORMERS),
    "Flux": ("LoRA", "two LoRAs with weights", "fused LoRA", "Textual Inversion", *OF_FLUX, *TRANSFORMERS),
    "Stable Diffusion 3": ("LoRA", "two LoRAs with weights", "fused LoRA", *TRANSFORMERS),
}


def test_the_documentation_says_what_is_tested():
    text = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    said = {row[1]: set(row[2].split(", ")) for row in rows}
    for family, kinds in PIPELINES.items():
        assert said[family] == {*kinds, *(["AnimateDiff"] if family == "Stable Diffusion" else [])}
        assert said[f"beside, in {family}"] == {*BESIDE[family]}


@pytest.fixture
def pipe(parts, family):
    """An ordinary pipeline of a family that can load concepts."""
    pipe = PIPELINES[family]["text to image"][0](parts)
    pipe.set_progress_bar_config(disable=True)
    return add_perfusion(pipe)


def effect(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    ("family", "locking", "first", "name"),
    [
        (family, *order, name)
        for family, names in BESIDE.items()
        for order in zip(LOCKINGS[family], ("other", "concept"), strict=True)
        for name in names
    ],
)
def test_a_concept_beside(pipe, family, generate, name, locking, first):
    concept, (add, _, arguments) = concept_for(pipe, locking), FEATURES[name]
    arguments = PIPELINES[family]["text to image"][1]() | arguments
    if first == "concept":
        load(pipe, concept, locking)
        add(pipe)
        pipe.disable_perfusion()
    else:
        add(pipe)
    off = generate(PROMPTS, pipe, **arguments)
    if first == "concept":
        pipe.enable_perfusion()
    else:
        load(pipe, concept, locking)
    edited = generate(PROMPTS, pipe, **arguments)
    assert torch.equal(edited[1], off[1])
    assert effect(edited[0], off[0]) > 1e-3
    with pipe.set_perfusion(bias=0.1, temperature=1.0):  # the edit, and not the token alone
        assert effect(generate(PROMPTS, pipe, **arguments)[0], edited[0]) > 1e-4
    pipe.disable_perfusion()
    assert torch.equal(generate(PROMPTS, pipe, **arguments), off)
    pipe.enable_perfusion()
    assert torch.equal(generate(PROMPTS, pipe, **arguments), edited)
    pipe.unload_perfusion()
    assert torch.equal(generate(PROMPTS, pipe, **arguments), off)


@pytest.mark.parametrize("family", ["PixArt", "Sana"])
def test_a_projection_is_used_within_the_model_alone_where_offloading_has_brought_it(pipe, family, generate):
    pipe.load_perfusion(random_concept(pipe))
    model = edited_model(pipe)
    forward, inside, seen = model.forward, [], []

    def watched(*args, **kwargs):
        inside.append(True)
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    model.forward = watched
    for part in family_of(pipe).projection:
        for module in part.modules():
            module.register_forward_pre_hook(lambda *_: seen.append(bool(inside)))
    arguments = PIPELINES[family]["text to image"][1]()
    edited = generate(PROMPTS, pipe, **arguments)
    with pipe.set_perfusion(bias=0.1, temperature=1.0):
        assert effect(generate(PROMPTS, pipe, **arguments), edited) > 1e-4
    assert seen and all(seen)


@pytest.mark.parametrize("name", [name for name, (_, remove, _) in FEATURES.items() if remove])
@pytest.mark.parametrize("first", ["concept", "other"])
@pytest.mark.parametrize("family", ["Stable Diffusion", "Stable Diffusion XL"])
def test_the_other_has_an_effect_and_may_leave_first(pipe, generate, name, first):
    add, remove, arguments = FEATURES[name]
    before, concept = generate(PROMPTS, pipe), random_concept(pipe)
    pipe.load_perfusion(concept)
    alone = generate(PROMPTS, pipe)
    if first == "other":
        pipe.unload_perfusion()
        add(pipe)
        pipe.load_perfusion(concept)
    else:
        add(pipe)
    both = generate(PROMPTS, pipe, **arguments)
    if name not in (
        "Textual Inversion",
        "attention slicing",
        "fused projections",
    ):  # not in these prompts, and the same but for rounding
        assert effect(both, alone) > 1e-3
    remove(pipe)
    tolerance = 0.1 if name == "bfloat16" else 1e-4  # the weights have been rounded
    assert effect(generate(PROMPTS, pipe), alone) < tolerance
    pipe.unload_perfusion()
    assert effect(generate(PROMPTS, pipe), before) < tolerance


def test_a_learned_token_and_a_concept_in_one_prompt(plain_pipeline, make_concept, generate):
    prompts = ["a <my-cat> on the <style>", "a cat on the <style>"]
    pipe = add_perfusion(plain_pipeline)
    textual_inversion(pipe)
    pipe.load_perfusion(make_concept())
    expected = generate(prompts, pipe)
    pipe.unload_perfusion()
    style = generate(prompts, pipe)
    pipe.unload_textual_inversion()
    pipe.load_perfusion(make_concept())
    textual_inversion(pipe)
    assert torch.equal(generate(prompts, pipe), expected)
    pipe.load_perfusion(make_concept("<my-dog>", "dog", 1))
    assert torch.equal(generate(prompts, pipe), expected)
    pipe.unload_perfusion()
    assert torch.equal(generate(prompts, pipe), style)


def test_an_image_prompt_stays_where_the_unet_moves_and_saves_it(plain_pipeline, make_concept, generate):
    pipe = add_perfusion(plain_pipeline)
    ip_adapter(pipe)
    saved = pipe.unet.state_dict()
    strong = generate(PROMPTS, pipe, ip_adapter_image_embeds=EMBEDS)
    pipe.load_perfusion(make_concept())
    assert pipe.unet.state_dict().keys() == saved.keys()
    pipe.unet.double()
    assert all(value.dtype == torch.float64 for name, value in pipe.unet.state_dict().items() if "_ip" in name)
    pipe.unet.float()
    edited = generate(PROMPTS, pipe, ip_adapter_image_embeds=EMBEDS)
    pipe.set_ip_adapter_scale(0.1)
    assert effect(generate(PROMPTS, pipe, ip_adapter_image_embeds=EMBEDS), edited) > 1e-3
    pipe.set_ip_adapter_scale(0.6)
    assert torch.equal(generate(PROMPTS, pipe, ip_adapter_image_embeds=EMBEDS), edited)
    pipe.unload_perfusion()
    assert torch.equal(generate(PROMPTS, pipe, ip_adapter_image_embeds=EMBEDS), strong)


def test_a_compiled_unet_is_compiled_once(plain_pipeline, make_concept, generate):
    """Neither another bias nor another concept of the same layers compiles anew; images are as without."""
    pipe, one, other = add_perfusion(plain_pipeline), make_concept(), make_concept(seed=1)
    counter = CompileCounter()

    def change(number):
        if number == 2:
            pipe.delete_perfusion("my-cat")
            pipe.load_perfusion(other)
        pipe.set_perfusion(bias=(0.3, 0.6, 0.6)[number])
        return generate(PROMPTS, pipe)

    def changes():
        # With a second one, so that the processors stay: some releases of torch compile anew for others.
        pipe.load_perfusion([one, make_concept("<my-dog>", "dog", 2)])
        images = [(change(number), counter.frame_count) for number in range(3)]
        pipe.unload_perfusion()
        return zip(*images, strict=True)

    eager, _ = changes()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.unet.compile(backend=counter)
    compiled, counts = changes()
    assert all(effect(*pair) < 1e-5 for pair in zip(eager, compiled, strict=True))
    assert counts[0] > 0 and len(set(counts)) == 1
    assert "blake2" not in str(torch._dynamo.utils.counters["graph_break"])  # rows are looked up outside of graphs


@pytest.mark.parametrize("family", ["Stable Diffusion", "Stable Diffusion XL"])
@pytest.mark.parametrize("first", ["concept", "other"])
def test_xformers(pipe, generate, monkeypatch, first):
    """Its attention needs a GPU: here it is torch's, put in where diffusers does."""

    def attention(query, key, value, attn_bias=None, scale=None, **options):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)

    def use(layer, use, attention_op=None):
        layer.set_processor(XFormersAttnProcessor() if use else AttnProcessor2_0())

    library = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr("diffusers.models.attention_processor.xformers", library, raising=False)
    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", use)
    before, concept = generate(PROMPTS, pipe), random_concept(pipe)
    pipe.load_perfusion(concept)
    alone = generate(PROMPTS, pipe)
    if first == "other":
        pipe.unload_perfusion()
        pipe.enable_xformers_memory_efficient_attention()
        pipe.load_perfusion(concept)
    else:
        pipe.enable_xformers_memory_efficient_attention()
    kinds = {type(layer.processor.processor) for layer in cross_attention_layers(pipe.unet).values()}
    assert kinds == {XFormersAttnProcessor}
    assert 0 < effect(generate(PROMPTS, pipe), alone) < 1e-4
    pipe.disable_xformers_memory_efficient_attention()
    assert torch.equal(generate(PROMPTS, pipe), alone)
    pipe.unload_perfusion()
    assert torch.equal(generate(PROMPTS, pipe), before)


def test_frames_of_a_video(components, make_concept):
    torch.manual_seed(0)
    motion = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_mid_block_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    concept = make_concept()
    parts = {name: part for name, part in components.items() if "safety" not in name}
    pipe = AnimateDiffPipeline(**parts | {"vae": make_vae(AutoencoderKL)}, motion_adapter=motion)
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        settings = {"num_frames": 3, "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        return torch.cat([pipe(prompt, generator=generator, **settings).frames for prompt in PROMPTS])

    before = run()
    add_perfusion(pipe).load_perfusion(concept)
    edited = run()
    assert torch.equal(edited[1], before[1])
    assert all(effect(*frames) > 1e-3 for frames in zip(edited[0], before[0], strict=True))
    pipe.unload_perfusion()
    assert torch.equal(run(), before)


def test_the_text_encoder_may_go_once_prompts_are_encoded(plain_pipeline, make_concept, generate):
    pipe = add_perfusion(plain_pipeline)
    pipe.load_perfusion(make_concept())
    positive, negative = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    arguments = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    ip_adapter(pipe)
    expected = generate(PROMPTS, pipe, **arguments, ip_adapter_image_embeds=EMBEDS)
    pipe.unload_ip_adapter()
    pipe.text_encoder = None
    ip_adapter(pipe)
    assert torch.equal(generate(PROMPTS, pipe, **arguments, ip_adapter_image_embeds=EMBEDS), expected)
    pipe.set_perfusion(bias=0.1)
    assert effect(generate(PROMPTS, pipe, **arguments, ip_adapter_image_embeds=EMBEDS), expected) > 1e-3


@pytest.mark.parametrize("family", ["Stable Diffusion", "Stable Diffusion XL"])
@pytest.mark.parametrize("locking", ["local", "global"])
def test_guidance_that_ends_midway(pipe, family, generate, locking):
    """The second half gets other hidden states, of the prompts alone."""
    halved = ["prompt_embeds"] + (["add_text_embeds", "add_time_ids"] if family == "Stable Diffusion XL" else [])

    def end(pipe, step, timestep, tensors):
        if step == 0:
            pipe._guidance_scale = 0.0
            return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        return tensors

    arguments = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": halved}
    before, guided = generate(PROMPTS, pipe, **arguments), generate(PROMPTS, pipe)
    pipe.load_perfusion(random_concept(pipe))
    pipe.set_perfusion(locking=locking)
    edited = generate(PROMPTS, pipe, **arguments)
    assert torch.equal(edited[1], before[1])
    assert effect(edited[0], before[0]) > 1e-3
    assert effect(edited[0], generate(PROMPTS, pipe)[0]) > 1e-3 and effect(before, guided) > 1e-3
    pipe.unload_perfusion()
    assert torch.equal(generate(PROMPTS, pipe, **arguments), before)


def test_pipelines_of_another_task_made_by_diffusers(components, generate):
    pipe = add_perfusion(StableDiffusionPipeline(**components | {"vae": make_vae(AutoencoderKL)}))
    pipe.load_perfusion(random_concept(pipe))
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert add_perfusion(other).list_perfusion() == ["my-cat"]
    arguments = {"image": image(), "strength": 0.9}
    edited = generate(PROMPTS, other, **arguments)
    back = AutoPipelineForText2Image.from_pipe(other)
    back.set_progress_bar_config(disable=True)
    add_perfusion(back).unload_perfusion()
    plain = generate(PROMPTS, other, **arguments)
    assert torch.equal(edited[1], plain[1])
    assert effect(edited[0], plain[0]) > 1e-3


def test_weighted_prompts(pipeline, generate):
    """What compel makes of a prompt is its own, so somebody has to say which concepts are in it."""
    pipe, compel = pipeline, Compel(tokenizer=pipeline.tokenizer, text_encoder=pipeline.text_encoder)
    pipe.load_perfusion(random_concept(pipe))

    @torch.no_grad()
    def run(*prompts, registered):
        encoded, negative = (torch.cat([compel(prompt) for prompt in batch]) for batch in (prompts, ["", ""]))
        if registered:
            pipe.mark_perfusion(encoded[:1])
        return generate(PROMPTS, pipe, prompt=None, prompt_embeds=encoded, negative_prompt_embeds=negative)

    torch.testing.assert_close(run(*PROMPTS, registered=True), generate(PROMPTS, pipe))
    prompts = [prompt.replace("beach", "(beach)1.3") for prompt in PROMPTS]
    unregistered, weighted = (run(*prompts, registered=registered) for registered in (False, True))
    assert torch.equal(weighted[1], unregistered[1])
    assert all(effect(weighted[0], other[0]) > 1e-3 for other in (unregistered, generate(PROMPTS, pipe)))
