"""Make a contact sheet: training images, the super-class alone, and the concept in eight prompts at several biases.

    python examples/contact_sheet.py --pretrained_model_name_or_path examples/pocket \
        --concept my-bear --instance_data_dir examples/data/teddy_bear --output my-bear/sheet.png
"""

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm

from diffusers_perfusion.cli.quiet import silence_libraries

SIDE = 128


def generate(pipeline, prompts, seed, settings):
    """Generate one image per prompt, each from the same noise whatever else is in the batch."""
    generator = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    return pipeline(prompt=prompts, generator=generator, **settings).images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--concept", required=True, help="Hub id, folder or file of the concept.")
    parser.add_argument("--instance_data_dir", required=True, help="Folder with its training images.")
    parser.add_argument("--output", type=Path, default=Path("sheet.png"))
    parser.add_argument("--bias", type=float, nargs="+", default=(0.85, 1.0, 1.2), help="A row of images for each.")
    parser.add_argument("--resolution", type=int, help="Side of the images in pixels; by default the base model's.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    silence_libraries()  # before the imports that log
    from diffusers_perfusion import PerfusionConcept
    from diffusers_perfusion.cli.common import load_pipeline, place
    from diffusers_perfusion.evaluation.contact_sheet import make_contact_sheet
    from diffusers_perfusion.evaluation.sweep import PROMPTS
    from diffusers_perfusion.hub import find_concept_file
    from diffusers_perfusion.model_families import family_of
    from diffusers_perfusion.training.images import read_images

    pipeline = load_pipeline(arguments.pretrained_model_name_or_path)
    place(pipeline, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    concept = PerfusionConcept.load(find_concept_file(arguments.concept))
    # Each row: its label, the text for `{}` in the prompts, and the bias; None keeps the bias that is set.
    token = concept.placeholder_token
    settings = [(f"the base model:\n{concept.superclass}", concept.superclass, None)]
    settings += [(f"{token}\n(bias {concept.bias})", token, None)]
    settings += [(f"{token}\nbias {bias}", token, bias) for bias in arguments.bias]
    generating = {"num_inference_steps": arguments.num_inference_steps}
    generating |= family_of(pipeline).call_arguments(arguments.guidance_scale)
    if arguments.resolution is not None:
        generating |= {"height": arguments.resolution, "width": arguments.resolution}
    rows = [("its pictures", [image.image for image in read_images(arguments.instance_data_dir, SIDE)])]
    for label, words, bias in tqdm(settings, desc="Contact sheet", unit="row"):
        if words == token and not pipeline.list_perfusion():
            pipeline.load_perfusion(concept)
        if bias is not None:
            pipeline.set_perfusion(bias=bias)
        rows.append(
            (label, generate(pipeline, [prompt.format(words) for prompt in PROMPTS], arguments.seed, generating))
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    make_contact_sheet(rows, [prompt.format("…") for prompt in PROMPTS], side=SIDE).save(arguments.output)
    print(f"{arguments.output} ({arguments.output.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
