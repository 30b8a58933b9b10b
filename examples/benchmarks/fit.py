"""Seconds and memory of a training step: Perfusion, and the inner loops of diffusers' scripts in turns with it.

    python examples/benchmarks/fit.py --output examples/benchmarks/results/fit-pocket.json
    python examples/benchmarks/fit.py --model sd15 --side 128 --batch_size 2 --steps 3 --repeats 3 \\
        --output examples/benchmarks/results/fit-sd15.json

In float32. The rivals (`quality/baselines.py`) come twice: as their scripts are, which encode each picture by the VAE
and each prompt by the text encoder at every step, and spared that, with latents that were encoded before and each
template encoded once a step, as a Perfusion fit does it. The floor is what the step's matrix products would take at
the rate that the machine reaches in a large one.
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
from memory import most, now
from models import POCKET, load
from safetensors.torch import save_file
from timing import machine, moment, seconds, seconds_between, write
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusers_perfusion.pictures import encode_latents, read_pictures, to_tensor
from diffusers_perfusion.training import FitConfig, fit
from diffusers_perfusion.training.data import Subject, make_subject

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "quality"))

from baselines import METHODS  # noqa: E402

PICTURES = HERE.parent / "data" / "teddy_bear"
WARMUP = 3
RIVALS = {
    "LoRA, rank 4": ("lora", {"rank": 4}),
    "Textual Inversion": ("textual_inversion", {}),
    "Custom Diffusion": ("custom_diffusion", {}),
}
AS_SCRIPT = ", as its script"


@dataclass(frozen=True)
class Bench:
    """What is trained, how and where.

    Attributes:
        model: `pocket` or `sd15`.
        side: of the pictures in pixels; None for the model's.
        batch_size: pictures in a step.
        device: of the models.
        folder: for what is written.
    """

    model: str
    side: int | None
    batch_size: int
    device: str
    folder: Path


class EncodedWhenAsked:
    """Latents of pictures, of which those asked for are encoded every time."""

    def __init__(self, vae, images):
        self.vae, self.images = vae, images
        self.shape = (len(images), *encode_latents(vae, images[:1]).shape[1:])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, pictures):
        return encode_latents(self.vae, self.images[pictures])


def train(name, bench, steps):
    """Some steps of a method on a fresh model."""
    pipeline = load(bench.model, bench.device)
    side = bench.side or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if name == "Perfusion":
        config = FitConfig(
            str(POCKET),
            str(PICTURES),
            "<my-bear>",
            "teddy bear",
            covariance=str(bench.folder / "covariance.safetensors"),
            output_dir=str(bench.folder / "fit"),
            resolution=side,
            train_batch_size=bench.batch_size,
            mask="none",
            max_train_steps=steps,
            checkpointing_steps=10**6,
        )
        fit(pipeline, config, Accelerator(cpu=bench.device == "cpu"))
        return
    method, options = RIVALS[name.removesuffix(AS_SCRIPT)]
    images = to_tensor([picture.image for picture in read_pictures(PICTURES, side)]).to(bench.device)
    subject = make_subject(pipeline.vae, images, None, flip=True)
    if name.endswith(AS_SCRIPT):
        subject = Subject(EncodedWhenAsked(pipeline.vae, torch.cat([images, images.flip(-1)])), subject.masks)
        options = options | {"each_prompt": True}
    METHODS[method].fit(
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
    """The seconds of each step but the first ones: from one `add_noise` to the next."""
    moments, add_noise = [], DDPMScheduler.add_noise

    def stamping(*args):
        moments.append(moment(bench.device))
        return add_noise(*args)

    with patch.object(DDPMScheduler, "add_noise", stamping):
        train(name, bench, steps + WARMUP + 1)
    return seconds_between(moments)[WARMUP:]


def peak_bytes(name, bench):
    """Most memory that some steps take over what the model takes, in a process of their own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, bench))


def _peak(name, bench):
    model = load(bench.model, bench.device)
    before = now(bench.device)
    del model  # training loads another
    train(name, bench, 3)
    return most(bench.device) - before


def flops_of_a_step(name, bench):
    """Of a second step, the first being taken off."""
    counts = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            train(name, bench, steps)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def matrix_rate(device, size=3000, repeats=7):
    """FLOPs a second of a large product."""
    a, b = torch.randn(2, size, size, device=device)
    product = functools.partial(torch.matmul, a, b)
    return 2 * size**3 / min(seconds(product, device) for _ in range(repeats))


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="pocket")
    parser.add_argument("--side", type=int, help="Of the pictures in pixels. Default: the model's.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    names = ["Perfusion", *RIVALS, *(name + AS_SCRIPT for name in RIVALS)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.model, arguments.side, arguments.batch_size, arguments.device, Path(folder))
        # Which metric it is makes no difference to how long it takes.
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
