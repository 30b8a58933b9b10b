"""Measure the largest change of any pixel of plain super-class prompts while a concept is loaded, which must be 0.

    python examples/benchmarks/quality/plain_prompts.py --output_dir outputs/quality --report_dir results

Uses what `compare.py --panel main` or `--panel flux` has trained, and generates in float32.
"""

import argparse
import json
from pathlib import Path

import torch
from compare import GUIDANCE_SCALE, load_base
from icons import NOUNS
from subjects import POCKET, PROMPTS, TEST

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.evaluation import drift
from diffusers_perfusion.model_families import family_of


def generate(pipeline, superclass, side):
    """Return an image of each prompt, `side × side`, as numbers in [0, 1]."""
    settings = {"num_inference_steps": 25, "height": side, "width": side}
    settings |= family_of(pipeline).call_arguments(GUIDANCE_SCALE)
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    prompts = [prompt.text.format(superclass) for prompt in PROMPTS]
    return pipeline(prompts, generator=generator, output_type="pt", **settings).images


def main(args=None):
    """Generate from each super-class's prompts before a concept is loaded and while it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(POCKET))
    parser.add_argument("--side", type=int, default=64, help="Of the images, in pixels: 64 or 128.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    report = {}
    for icon in TEST:
        pipeline = add_perfusion(load_base(arguments.base))
        base = generate(pipeline, NOUNS[icon], arguments.side)
        pipeline.load_perfusion(
            arguments.output_dir / "runs" / "perfusion" / icon / "training" / "perfusion.safetensors"
        )
        report[NOUNS[icon]] = drift(generate(pipeline, NOUNS[icon], arguments.side), base)
        print(NOUNS[icon], report[NOUNS[icon]], flush=True)
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    (arguments.report_dir / "plain_prompts.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
