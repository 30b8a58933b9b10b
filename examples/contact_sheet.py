"""Draw a contact sheet: the pictures, the bare super-category, and the concept in eight prompts at several biases.

    python examples/contact_sheet.py --pretrained_model_name_or_path examples/pocket \
        --concept my-bear --instance_data_dir examples/data/teddy_bear --output my-bear/sheet.png
"""

import argparse
from pathlib import Path

import torch

from diffusers_perfusion import PerfusionPipeline
from diffusers_perfusion.concept import PerfusionConcept
from diffusers_perfusion.evaluation.sheets import draw_sheet
from diffusers_perfusion.evaluation.sweep import PROMPTS
from diffusers_perfusion.hub import find_concept_file
from diffusers_perfusion.pictures import read_pictures

SIDE = 128


def draw(pipeline, prompts, arguments):
    """One picture a prompt, each from the same noise whatever else is in the batch."""
    return pipeline(
        prompts,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        generator=[torch.Generator().manual_seed(arguments.seed + row) for row in range(len(prompts))],
    ).images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--concept", required=True, help="Hub id, folder or file of the concept.")
    parser.add_argument("--instance_data_dir", required=True, help="The pictures it was fitted to.")
    parser.add_argument("--output", type=Path, default=Path("sheet.png"))
    parser.add_argument("--bias", type=float, nargs="+", default=(0.8, 1.5, 1.8), help="A row of pictures for each.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pipeline = PerfusionPipeline.from_pretrained(arguments.pretrained_model_name_or_path, safety_checker=None)
    if torch.cuda.is_available():
        pipeline.to("cuda", torch.float16)
    concept = PerfusionConcept.load(find_concept_file(arguments.concept))
    pictures = [picture.image for picture in read_pictures(arguments.instance_data_dir, SIDE)]
    rows = [("its pictures", pictures)]
    plain = [prompt.format(concept.superclass) for prompt in PROMPTS]
    rows.append((f"the base model:\n{concept.superclass}", draw(pipeline, plain, arguments)))
    pipeline.load_perfusion(concept)
    prompts = [prompt.format(concept.placeholder_token) for prompt in PROMPTS]
    rows.append((f"{concept.placeholder_token}\n(bias {concept.bias})", draw(pipeline, prompts, arguments)))
    for bias in arguments.bias:
        pipeline.set_perfusion(bias=bias)
        rows.append((f"{concept.placeholder_token}\nbias {bias}", draw(pipeline, prompts, arguments)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows, [prompt.format("…") for prompt in PROMPTS], side=SIDE).save(arguments.output)
    print(f"{arguments.output} ({arguments.output.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
