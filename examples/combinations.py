"""Generate with one concept in several pipelines: the super-class in the upper row, the concept in the lower one.

python examples/combinations.py --output combinations.png
"""

import argparse
from pathlib import Path

import torch
from compel import Compel
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from PIL import Image, ImageDraw
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.evaluation.contact_sheet import make_contact_sheet

EXAMPLES = Path(__file__).parent


def make(kind=StableDiffusionPipeline, **settings):
    pipe = kind.from_pretrained(EXAMPLES / "pocket", **settings)
    pipe.set_progress_bar_config(disable=True)
    return add_perfusion(pipe)


def generate(pipe, prompt, **settings):
    settings = {"num_inference_steps": 25, "guidance_scale": 5.0} | settings
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]


def few_steps():
    pipe = make()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe


def from_image(pipe, prompt):
    return generate(pipe, prompt, image=generate(make(), "a mug in space"), strength=0.8)


def inside(pipe, prompt):
    image = generate(make(), "a mug on a car")
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).rectangle((8, 8, 56, 56), fill=255)
    return generate(pipe, prompt, image=image, mask_image=mask, height=64, width=64, strength=1.0)


def weighted(pipe, prompt):
    compel = Compel(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    with torch.no_grad():
        encoded, empty = compel(prompt), compel("")
    for name in pipe.list_perfusion():
        pipe.mark_perfusion(encoded, {name: 2})  # after the token that begins a prompt and "a"
    return generate(pipe, None, prompt_embeds=encoded, negative_prompt_embeds=empty)


def int8():
    pipe = make()
    quantize_(pipe.unet, Int8WeightOnlyConfig())
    return pipe


# A function that makes a pipeline, one that generates with it, and a prompt.
CASES = {
    "text to image": (make, generate, "a {} on the beach"),
    "DPM-Solver++, ten steps": (
        few_steps,
        lambda pipe, prompt: generate(pipe, prompt, num_inference_steps=10),
        "a {} on the beach",
    ),
    "image to image, from a mug": (lambda: make(StableDiffusionImg2ImgPipeline), from_image, "a {} in space"),
    "inpainting, in place of a mug": (lambda: make(StableDiffusionInpaintPipeline), inside, "a {} on a car"),
    "perturbed attention guidance": (
        lambda: make(StableDiffusionPAGPipeline, pag_applied_layers=["mid"]),
        lambda pipe, prompt: generate(pipe, prompt, pag_scale=1.0),
        "a {} in the snow",
    ),
    "weighted prompt (compel)": (make, weighted, "a {} with a (top hat)1.4"),
    "bfloat16": (lambda: make(torch_dtype=torch.bfloat16), generate, "a {} under water"),
    "int8 weights (torchao)": (int8, generate, "a {} under water"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", type=Path, default=EXAMPLES / "hub" / "my-bear")
    parser.add_argument("--superclass", default="teddy bear")
    parser.add_argument("--placeholder_token", default="<my-bear>")
    parser.add_argument("--output", type=Path, default=Path("combinations.png"))
    arguments = parser.parse_args()
    rows = []
    for words in (arguments.superclass, arguments.placeholder_token):
        images = []
        for make_pipe, generate_with, prompt in CASES.values():
            pipe = make_pipe()
            if words == arguments.placeholder_token:
                pipe.load_perfusion(arguments.concept)
            images.append(generate_with(pipe, prompt.format(words)))
        rows.append((words, images))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    make_contact_sheet(rows, list(CASES), label_width=90).save(arguments.output)
    print(f"{arguments.output} ({arguments.output.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
