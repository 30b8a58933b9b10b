"""Seconds and memory of a training step: Perfusion, and the inner loops of diffusers' scripts in turns with it.

    python examples/benchmarks/fit.py --output examples/benchmarks/results/fit.json

On the pocket model, in batches of 16 and float32. The rivals (`quality/baselines.py`) are spared what the scripts do
at every step and Perfusion does not, the VAE; so all of them read the same latents. The floor is what the step's
matrix products would take at the rate that the machine reaches in a large one.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch
from diffusers import DDPMScheduler
from models import POCKET, load
from safetensors.torch import save_file
from timing import machine, seconds, write
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from diffusers_perfusion.covariance import read_captions, second_moment
from diffusers_perfusion.families import text_encoders
from diffusers_perfusion.training import FitConfig, fit

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "quality"))

from baselines import METHODS, read_subject  # noqa: E402

PICTURES = HERE.parent / "data" / "teddy_bear"
WARMUP = 3
RIVALS = {
    "LoRA, rank 4": ("lora", {"rank": 4}),
    "Textual Inversion": ("textual_inversion", {}),
    "Custom Diffusion": ("custom_diffusion", {}),
}


def train(name, folder, steps):
    """Some steps of a method on a fresh pocket model."""
    pipeline = load("pocket")
    if name == "Perfusion":
        settings = {"mask": "none", "max_train_steps": steps, "checkpointing_steps": 10**6}
        config = FitConfig(
            str(POCKET),
            str(PICTURES),
            "<my-bear>",
            "teddy bear",
            covariance=str(folder / "covariance.safetensors"),
            output_dir=str(folder / "fit"),
            **settings,
        )
        fit(pipeline, config)
    else:
        method, options = RIVALS[name]
        subject = read_subject(pipeline, PICTURES)
        METHODS[method].fit(
            pipeline, subject, "<my-bear>", "teddy bear", learning_rate=1e-4, steps=steps, output_dir=folder, **options
        )


def step_seconds(name, folder, steps):
    """The seconds of each step but the first ones: from one `add_noise` to the next."""
    moments, add_noise = [], DDPMScheduler.add_noise

    def stamping(*args):
        moments.append(perf_counter())
        return add_noise(*args)

    with patch.object(DDPMScheduler, "add_noise", stamping):
        train(name, folder, steps + WARMUP + 1)
    return [after - before for before, after in itertools.pairwise(moments)][WARMUP:]


def peak_bytes(name, folder):
    """Most memory of a process of its own that does some steps, over what it has without any."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, folder))


def _peak(name, folder):
    load("pocket")
    before = _resident("VmRSS")
    train(name, folder, 3)
    return _resident("VmHWM") - before


def _resident(field):
    """Bytes of this process in memory, now (`VmRSS`) or at most (`VmHWM`), as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def flops_of_a_step(name, folder):
    """Of a second step, the first being taken off."""
    counts = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            train(name, folder, steps)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def matrix_rate(size=3000, repeats=7):
    """FLOPs a second of a large product."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(repeats))


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    names = ["Perfusion", *RIVALS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = read_captions(POCKET / "captions.txt")[:1000]
        covariance = second_moment(text_encoders(load("pocket")), captions).float()
        save_file({"covariance": covariance}, folder / "covariance.safetensors")
        taken = {name: [] for name in names}
        for repeat in tqdm(range(arguments.repeats), desc="repeats"):
            for name in names if repeat % 2 == 0 else reversed(names):
                taken[name].append(statistics.median(step_seconds(name, folder, arguments.steps)))
        rate = matrix_rate()
        rows = [
            {
                "name": name,
                "median_ms": 1e3 * statistics.median(taken[name]),
                "ratio": statistics.median(a / b for a, b in zip(taken[name], taken["Perfusion"], strict=True)),
                "floor_ms": 1e3 * flops_of_a_step(name, folder) / rate,
                "peak_bytes": peak_bytes(name, folder),
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
    write(arguments.output, {"machine": machine(), "matrix_gflops": rate / 1e9, "rows": rows})


if __name__ == "__main__":
    main()
