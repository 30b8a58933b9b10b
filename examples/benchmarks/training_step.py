"""Measure seconds and memory of a training step of Perfusion, in turns with the inner loops of diffusers' scripts.

    python examples/benchmarks/training_step.py --output examples/benchmarks/results/training-step-pocket.json
    python examples/benchmarks/training_step.py --model sd15 --side 128 --batch_size 2 --steps 3 --repeats 3 \\
        --output examples/benchmarks/results/training-step-sd15.json

All in float32. The baselines (`quality/baselines.py`) come twice: as in their scripts, which encode each image by the
VAE and each prompt by the text encoder at every step; and with cached latents and each template encoded once a step,
as in a Perfusion training. The floor is the time of the step's matrix products at the rate of one large product.
"""

import argparse
import functools
import multiprocessing
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from memory import in_use, peak
from models import POCKET, load
from safetensors.torch import save_file
from timing import machine, moment, seconds, seconds_between, write
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training import TrainingConfig, train
from diffusers_perfusion.training.images import read_images, to_tensor
from diffusers_perfusion.training.training_data import TrainingData, make_training_data

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "quality"))

from baselines import METHODS  # noqa: E402

IMAGES = HERE.parent / "data" / "teddy_bear"
WARMUP = 3
BASELINES = {
    "LoRA, rank 4": ("lora", {"rank": 4}),
    "Textual Inversion": ("textual_inversion", {}),
    "Custom Diffusion": ("custom_diffusion", {}),
}
AS_SCRIPT = ", as its script"


@dataclass(frozen=True)
class Bench:
    """Model, batch and device of a benchmark.

    Attributes:
        model: `pocket` or `sd15`.
        side: side of the images in pixels; None for the model's.
        batch_size: images of a step.
        device: of the models.
        folder: for what is written.
    """

    model: str
    side: int | None
    batch_size: int
    device: str
    folder: Path


class EncodedWhenAsked:
    """Latents that are encoded again at each access, as in diffusers' scripts."""

    def __init__(self, family, vae, images):
        self.family, self.vae, self.images = family, vae, images
        self.shape = (len(images), *family.encode_latents(vae, images[:1]).shape[1:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, images):
        return self.family.encode_latents(self.vae, self.images[images])


def run_steps(name, bench, steps):
    """Run some steps of a method on a fresh model."""
    pipeline = load(bench.model, bench.device)
    side = bench.side or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if name == "Perfusion":
        config = TrainingConfig(
            str(POCKET),
            str(IMAGES),
            "<my-bear>",
            "teddy bear",
            covariance=str(bench.folder / "covariance.safetensors"),
            output_dir=str(bench.folder / "training"),
            resolution=side,
            train_batch_size=bench.batch_size,
            mask="none",
            max_train_steps=steps,
            checkpointing_steps=10**6,
        )
        train(pipeline, config, Accelerator(cpu=bench.device == "cpu"))
        return
    method, options = BASELINES[name.removesuffix(AS_SCRIPT)]
    images = to_tensor([image.image for image in read_images(IMAGES, side)]).to(bench.device)
    family = family_of(pipeline)
    subject = make_training_data(family, pipeline.vae, images, None, random_flip=True)
    if name.endswith(AS_SCRIPT):
        subject = TrainingData(
            EncodedWhenAsked(family, pipeline.vae, torch.cat([images, images.flip(-1)])),
            subject.masks,
            subject.prompts,
        )
        options = options | {"each_prompt": True}
    METHODS[method].train(
        pipeline,
        subject,
        "<my-bear>",
        "teddy bear",
        learning_rate=1e-4,
        steps=steps,
        output_dir=bench.folder,
        batch_size=bench.batch_size,
        **options,
    )


def step_seconds(name, bench, steps):
    """Return the seconds of each step after the warm-up, from one `add_noise` to the next."""
    moments, add_noise = [], DDPMScheduler.add_noise

    def stamping(*args):
        moments.append(moment(bench.device))
        return add_noise(*args)

    with patch.object(DDPMScheduler, "add_noise", stamping):
        run_steps(name, bench, steps + WARMUP + 1)
    return seconds_between(moments)[WARMUP:]


def peak_bytes(name, bench):
    """Return the peak memory of some steps besides the model, in a process of their own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, bench))


def _peak(name, bench):
    model = load(bench.model, bench.device)
    before = in_use(bench.device)
    del model  # training loads another
    run_steps(name, bench, 3)
    return peak(bench.device) - before


def flops_of_a_step(name, bench):
    """Return the FLOPs of the second step: of two steps less those of one."""
    counts = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            run_steps(name, bench, steps)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def matrix_rate(device, size=3000, repeats=7):
    """Return the FLOPs a second of a large matrix product."""
    a, b = torch.randn(2, size, size, device=device)
    product = functools.partial(torch.matmul, a, b)
    return 2 * size**3 / min(seconds(product, device) for _ in range(repeats))


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="pocket")
    parser.add_argument("--side", type=int, help="Side of the images in pixels; by default the model's.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    names = ["Perfusion", *BASELINES, *(name + AS_SCRIPT for name in BASELINES)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.model, arguments.side, arguments.batch_size, arguments.device, Path(folder))
        # The values of C make no difference to the time.
        width = load(bench.model).text_encoder.config.hidden_size
        save_file({"covariance": torch.eye(width)}, bench.folder / "covariance.safetensors")
        taken = {name: [] for name in names}
        for repeat in tqdm(range(arguments.repeats), desc="repeats"):
            for name in names if repeat % 2 == 0 else reversed(names):
                taken[name].append(statistics.median(step_seconds(name, bench, arguments.steps)))
        rate = matrix_rate(bench.device)
        rows = [
            {
                "name": name,
                "median_ms": 1e3 * statistics.median(taken[name]),
                "ratio": statistics.median(a / b for a, b in zip(taken[name], taken["Perfusion"], strict=True)),
                "floor_ms": 1e3 * flops_of_a_step(name, bench) / rate,
                "peak_bytes": peak_bytes(name, bench),
                "seconds": taken[name],
            }
            for name in names
        ]
    print("| | median ms | ratio | floor ms | peak MB |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['ratio']:.2f} | {row['floor_ms']:.1f} | "
            f"{row['peak_bytes'] / 1e6:.0f} |"
        )
    how = {"model": bench.model, "side": bench.side, "batch_size": bench.batch_size}
    write(arguments.output, {"machine": machine(bench.device), **how, "matrix_gflops": rate / 1e9, "rows": rows})


if __name__ == "__main__":
    main()
