"""Measure what concepts add to generation: time the denoising loop with them, in turns with the stock pipeline's.

    python examples/benchmarks/inference.py --model pocket --output examples/benchmarks/results/inference-pocket.json

Prompts are encoded before the timing starts.
"""

import argparse
from pathlib import Path

import torch
from models import load, random_concept
from timing import alternate, machine, rows_of, show, write

from diffusers_perfusion import add_perfusion

RESIDENT = 100


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--side", type=int, help="Side of the images in pixels; by default the model's.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    model = arguments.model, arguments.device, getattr(torch, arguments.dtype)
    stock, pipeline = load(*model), add_perfusion(load(*model))
    concepts = [random_concept(pipeline, number) for number in range(RESIDENT)]
    pipeline.load_perfusion(concepts)
    tokens = [concept.placeholder_token for concept in concepts]

    def loop(pipe, prompt, active=0):
        """Return a function that generates from an encoded prompt with the first `active` concepts."""
        with torch.no_grad():
            positive, negative = pipe.encode_prompt(prompt, arguments.device, 1, True)

        def run():
            if active:
                pipe.set_perfusion(pipe.list_perfusion()[:active])
            return pipe(
                prompt_embeds=positive,
                negative_prompt_embeds=negative,
                generator=torch.Generator(arguments.device).manual_seed(0),
                num_inference_steps=arguments.num_inference_steps,
                height=arguments.side,
                width=arguments.side,
                output_type="latent",
            ).images

        return run

    pipeline.set_perfusion(pipeline.list_perfusion()[:1])
    one = loop(pipeline, f"a {tokens[0]}")
    edited = one()
    pipeline.disable_perfusion()
    if torch.equal(one(), edited):
        raise RuntimeError("the concept has no effect on the image, so its time means nothing")
    pipeline.enable_perfusion()
    functions = {
        "stock": loop(stock, "a cat on the beach"),
        "a hundred concepts, none in the prompt": loop(pipeline, "a cat on the beach", RESIDENT),
        "one concept": loop(pipeline, f"a {tokens[0]}", 1),
        "ten concepts": loop(pipeline, " ".join(tokens[:10]), 10),
    }
    rows = rows_of(alternate(functions, arguments.repeats, arguments.device), "stock")
    show(rows)
    write(
        arguments.output,
        {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "side": arguments.side,
            "num_inference_steps": arguments.num_inference_steps,
            "machine": machine(arguments.device),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
