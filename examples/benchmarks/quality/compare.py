"""Compare methods, or settings of one, on the same base model, images, prompts, seeds and metrics.

    python examples/benchmarks/quality/compare.py --panel main --output_dir outputs/quality

Each training is a job of its own, in a process of one thread; the same command resumes a stopped comparison.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline, PixArtSigmaPipeline
from PIL import Image
from subjects import POCKET, PROMPTS, compose_subject
from tqdm import tqdm
from variants import ICONS, PANELS

from diffusers_perfusion.files import write_atomically

BATCH = 16
GUIDANCE_SCALE = 5.0


def load_base(source):
    """Return the base model without progress bars."""
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline, prompts):
    """Return what a pipeline is called with for prompts, encoded outside of autocast."""
    if isinstance(pipeline, PixArtSigmaPipeline):
        length = pipeline.tokenizer.model_max_length
        positive, mask, negative, negative_mask = pipeline.encode_prompt(prompts, max_sequence_length=length)
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": negative_mask}
        options = {"guidance_scale": GUIDANCE_SCALE, "negative_prompt": None, "use_resolution_binning": False} | masks
    elif isinstance(pipeline, FluxPipeline):
        length = pipeline.tokenizer_2.model_max_length
        positive, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=length)
        negative, negative_pooled, _ = pipeline.encode_prompt([""] * len(prompts), None, max_sequence_length=length)
        options = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
        options["true_cfg_scale"] = GUIDANCE_SCALE
    else:
        positive, negative = pipeline.encode_prompt(prompts, pipeline.device, 1, True)
        options = {"guidance_scale": GUIDANCE_SCALE}
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative} | options


@torch.no_grad()
def generate(pipeline, prompts, seeds, num_inference_steps=25, side=64, **options):
    """Generate an image for each prompt and seed, with the text encoders in float32 and the rest in bfloat16."""
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    for start in range(0, len(wanted), BATCH):
        batch, seeds = zip(*wanted[start : start + BATCH], strict=True)
        encoded = encode(pipeline, list(batch))
        with torch.autocast("cpu", torch.bfloat16):
            images += pipeline(
                num_inference_steps=num_inference_steps,
                height=side,
                width=side,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **encoded,
                **options,
            ).images
    return images


def job(name, icon, options):
    """Train one variant on one subject and generate with it: a row a point, each prompt with all seeds, as one PNG."""
    torch.set_num_threads(1)
    variant = next(variant for variant in PANELS[options.panel] if variant.name == name)
    folder = options.output_dir / "runs" / name / icon
    folder.mkdir(parents=True, exist_ok=True)
    subject = compose_subject(icon, options.output_dir / "subjects", options.side)
    prompts = [prompt.text.format(variant.phrase(subject)) for prompt in PROMPTS]
    rows, points = [], []
    with variant.changes():
        start = time.perf_counter()
        trained = variant.train(load_base(options.base), options.base, subject, folder)
        seconds = time.perf_counter() - start
        for step, file in trained.items():
            pipeline = load_base(options.base)
            for knob, settings in variant.load(pipeline, subject, file):
                generated = generate(
                    pipeline, prompts, range(options.seeds), options.num_inference_steps, options.side, **settings
                )
                rows.append(generated)
                points.append({"steps": step, "knob": knob})
    size = max(variant.bytes(file) for file in trained.values())
    paste(rows).save(folder / "images.png")
    run = {"seconds": seconds, "bytes": size, "seeds": options.seeds, "points": points}
    write_atomically(folder / "run.json", json.dumps(run).encode())


def paste(rows):
    """Return rows of images as one image."""
    width, height = rows[0][0].size
    pasted = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            pasted.paste(image, (x * width, y * height))
    return pasted


def main(args=None):
    """Run the jobs of a panel that have not been done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--panel", choices=PANELS, default="main")
    parser.add_argument("--only", action="append", help="Name of a variant; by default all of the panel; repeatable.")
    parser.add_argument("--base", default=str(POCKET))
    parser.add_argument("--side", type=int, default=64, help="Of the images, in pixels: 64 or 128.")
    parser.add_argument("--seeds", type=int, default=4, help="Images for each prompt.")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="Denoising steps of an image.")
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
