"""What concepts cost while a picture is drawn: the denoising loop with them, in turns with the stock pipeline's.

    python examples/benchmarks/inference.py --model pocket --output examples/benchmarks/results/inference-pocket.json

Prompts are encoded before. With a concept its keys and values are made at the first step and given again at the
others, where the stock loop makes them anew; `made at every step` is the same concept without that.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from models import load, random_concept
from timing import alternate, machine, rows_of, show, write

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.attention import get_state

RESIDENT = 100


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--side", type=int, help="Of the pictures in pixels. Default: the model's.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    model = arguments.model, arguments.device, getattr(torch, arguments.dtype)
    stock, pipeline = load(*model), add_perfusion(load(*model))
    concepts = [random_concept(pipeline, number) for number in range(RESIDENT)]
    pipeline.load_perfusion(concepts)
    words = [concept.placeholder_token for concept in concepts]

    def loop(pipe, prompt, active=0):
        """A function that draws a prompt that is encoded already, with the first concepts active."""
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

    one = loop(pipeline, f"a {words[0]}", 1)

    def one_at_every_step():
        with patch("diffusers_perfusion.attention._is_repeatable", lambda projection: False):
            return one()

    functions = {
        "stock": loop(stock, "a cat on the beach"),
        "a hundred concepts, none in the prompt": loop(pipeline, "a cat on the beach", RESIDENT),
        "one concept": one,
        "ten concepts": loop(pipeline, " ".join(words[:10]), 10),
        "one concept, made at every step": one_at_every_step,
    }
    if not torch.equal(one(), one_at_every_step()) or torch.equal(one(), functions["stock"]()):
        raise RuntimeError("the concept does not draw what it draws without keys and values that are made once")
    rows = rows_of(alternate(functions, arguments.repeats, arguments.device), "stock")
    one()
    held = sum(made.output.nbytes for made in get_state(pipeline.unet).edit.made.values())
    show(rows)
    print(f"keys and values that are held: {held / 1e6:.1f} MB")
    write(
        arguments.output,
        {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "side": arguments.side,
            "num_inference_steps": arguments.num_inference_steps,
            "machine": machine(arguments.device),
            "bytes_held": held,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
