"""Compare methods, or settings of one, on the same base, pictures, prompts, seeds and judges.

    python examples/benchmarks/quality/compare.py --panel main --output_dir outputs/quality

Each fit is a job of its own, in a process of one thread; a comparison that was stopped goes on where it was.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from subjects import POCKET, PROMPTS, draw_subject
from tqdm import tqdm
from variants import ICONS, PANELS

from diffusers_perfusion.concept import write_atomically

BATCH = 16


def load_base(source):
    """The base model, quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(pipeline, prompts, seeds, num_inference_steps=25, **options):
    """A picture for each prompt and seed, prompt by prompt; the text encoder in float32, the rest in bfloat16."""
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    pictures = []
    for start in range(0, len(wanted), BATCH):
        batch, seeds = zip(*wanted[start : start + BATCH], strict=True)
        positive, negative = pipeline.encode_prompt(list(batch), pipeline.device, 1, True)
        with torch.autocast("cpu", torch.bfloat16):
            pictures += pipeline(
                prompt_embeds=positive,
                negative_prompt_embeds=negative,
                num_inference_steps=num_inference_steps,
                guidance_scale=5.0,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **options,
            ).images
    return pictures


def job(name, icon, options):
    """Fit one variant to one thing and draw with it: a row a point, each prompt with all seeds, as one PNG."""
    torch.set_num_threads(1)
    variant = next(variant for variant in PANELS[options.panel] if variant.name == name)
    folder = options.output_dir / "runs" / name / icon
    folder.mkdir(parents=True, exist_ok=True)
    subject = draw_subject(icon, options.output_dir / "subjects")
    prompts = [prompt.format(variant.phrase(subject)) for prompt in PROMPTS]
    rows, points = [], []
    with variant.changes():
        start = time.perf_counter()
        fitted = variant.fit(load_base(options.base), options.base, subject, folder)
        seconds = time.perf_counter() - start
        for step, file in fitted.items():
            pipeline = load_base(options.base)
            for knob, settings in variant.load(pipeline, subject, file):
                rows.append(draw(pipeline, prompts, range(options.seeds), options.num_inference_steps, **settings))
                points.append({"steps": step, "knob": knob})
    size = max(variant.bytes(file) for file in fitted.values())
    paste(rows).save(folder / "pictures.png")
    run = {"seconds": seconds, "bytes": size, "seeds": options.seeds, "points": points}
    write_atomically(folder / "run.json", json.dumps(run).encode())


def paste(rows):
    """Rows of pictures as one."""
    width, height = rows[0][0].size
    image = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            image.paste(picture, (x * width, y * height))
    return image


def main(args=None):
    """Run the jobs of a panel that have not been done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=PANELS, default="main")
    parser.add_argument("--only", action="append", help="Name of a variant; by default all of the panel; repeatable.")
    parser.add_argument("--base", default=str(POCKET))
    parser.add_argument("--seeds", type=int, default=4, help="Pictures for each prompt.")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Denoising steps of a picture.")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="0 runs all jobs in this one.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    arguments = parser.parse_args(args)

    variants = [v for v in PANELS[arguments.panel] if arguments.only is None or v.name in arguments.only]
    jobs = [
        (variant.name, icon, arguments)
        for variant in variants
        for icon in ICONS[arguments.panel]
        if not (arguments.output_dir / "runs" / variant.name / icon / "run.json").exists()
    ]
    if arguments.processes == 0:
        for one in tqdm(jobs, desc=arguments.panel):
            job(*one)
        return
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for future in tqdm([pool.submit(job, *one) for one in jobs], desc=arguments.panel):
            future.result()


if __name__ == "__main__":
    main()
