"""Generate with a concept in an ordinary Stable Diffusion pipeline: two standard calls, no Perfusion pipeline.

    python examples/attention_processor.py --pretrained_model_name_or_path examples/pocket \
        --concept examples/hub/my-bear --prompt "a <my-bear> on the beach" --output bear.png
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from diffusers_perfusion import PerfusionConcept


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    parser.add_argument("--concept", required=True, help="Hub id, folder or file of the concept.")
    parser.add_argument("--prompt", required=True, help="With the concept's placeholder token.")
    parser.add_argument("--bias", type=float, help="Low is like the images, high like the prompt.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("image.png"))
    arguments = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.pretrained_model_name_or_path, safety_checker=None)
    concept = PerfusionConcept.from_pretrained(arguments.concept)
    pipeline.load_textual_inversion({concept.placeholder_token: concept.token_embeddings[0]})
    pipeline.unet.set_attn_processor(concept.attn_processors(pipeline.unet, bias=arguments.bias))
    image = pipeline(
        arguments.prompt,
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        generator=torch.Generator().manual_seed(arguments.seed),
    ).images[0]
    image.save(arguments.output)
    print(f"{arguments.output} ({arguments.output.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
