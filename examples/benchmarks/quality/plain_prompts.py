"""Measure the largest change of any pixel of plain super-class prompts while a concept is loaded, which must be 0.

    python examples/benchmarks/quality/plain_prompts.py --output_dir outputs/quality --report_dir results

Uses what `compare.py --panel main` has trained, and generates in float32.
"""

import argparse
import json
from pathlib import Path

import torch
from compare import load_base
from icons import NOUNS
from subjects import POCKET, PROMPTS, TEST

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.evaluation import drift


def generate(pipeline, superclass):
    """Return an image of each prompt, as numbers in [0, 1]."""
    generator = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    prompts = [prompt.text.format(superclass) for prompt in PROMPTS]
    return pipeline(prompts, num_inference_steps=25, guidance_scale=5.0, generator=generator, output_type="pt").images


def main(args=None):
    """Generate from each super-class's prompts before a concept is loaded and while it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(POCKET))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    report = {}
    for icon in TEST:
        pipeline = add_perfusion(load_base(arguments.base))
        base = generate(pipeline, NOUNS[icon])
        pipeline.load_perfusion(
            arguments.output_dir / "runs" / "perfusion" / icon / "training" / "perfusion.safetensors"
        )
        report[NOUNS[icon]] = drift(generate(pipeline, NOUNS[icon]), base)
        print(NOUNS[icon], report[NOUNS[icon]], flush=True)
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    (arguments.report_dir / "plain_prompts.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
