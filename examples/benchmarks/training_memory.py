"""Measure the peak memory of a training step besides the models, by precision, batch size and checkpointing.

    python examples/benchmarks/training_memory.py --side 512 --mixed_precision bf16 --batch_size 1 2 4 \\
        --output examples/benchmarks/results/training-memory-sd15.json

Latents are encoded before the measurement. Each setting is measured over two steps in a process of its own; on a CPU
the figures include what libraries allocate for themselves.
"""

import argparse
import multiprocessing
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from memory import in_use, peak, reset_peak
from models import POCKET, load
from safetensors.torch import save_file
from timing import machine, write
from tqdm import tqdm
from training_step import IMAGES

from diffusers_perfusion.training import TrainingConfig, train
from diffusers_perfusion.training.trainer import PerfusionTrainer


@dataclass(frozen=True)
class Setting:
    """Settings of a training, as in `TrainingConfig`."""

    mixed_precision: str
    gradient_checkpointing: bool
    train_batch_size: int


def measure(model, device, side, setting):
    """Return the bytes of the models during training, and the peak of a step besides."""
    pipeline, step, found = load(model, device), PerfusionTrainer.step, {}

    def watched(trainer, index):
        if index == 0:
            models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
            found["models"] = sum(p.numel() * p.element_size() for part in models for p in part.parameters())
            reset_peak(device)
            found["before"] = in_use(device)
        loss = step(trainer, index)
        found["peak"] = peak(device)
        return loss

    with tempfile.TemporaryDirectory() as folder, patch.object(PerfusionTrainer, "step", watched):
        # The values of C make no difference to the memory.
        save_file({"covariance": torch.eye(pipeline.text_encoder.config.hidden_size)}, f"{folder}/c.safetensors")
        config = TrainingConfig(
            str(POCKET),
            str(IMAGES),
            "<my-bear>",
            "teddy bear",
            covariance=f"{folder}/c.safetensors",
            output_dir=f"{folder}/training",
            resolution=side,
            random_flip=False,  # fewer images to encode
            mask="none",
            max_train_steps=2,
            **asdict(setting),
        )
        train(pipeline, config, Accelerator(cpu=device == "cpu", mixed_precision=setting.mixed_precision))
    return found["models"], found["peak"] - found["before"]


def measure_alone(*args):
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="sd15")
    parser.add_argument("--side", type=int, help="Side of the images in pixels; by default the model's.")
    parser.add_argument("--mixed_precision", nargs="+", choices=("no", "fp16", "bf16"), default=["no", "bf16"])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    rows = []
    print("| precision | checkpointing | batch | GB of the models | GB besides |\n|---|---|---|---|---|")
    settings = product(arguments.mixed_precision, (False, True), arguments.batch_size)
    for setting in tqdm([Setting(*values) for values in settings]):
        models, besides = measure_alone(arguments.model, arguments.device, arguments.side, setting)
        rows.append(asdict(setting) | {"model_bytes": models, "peak_bytes": besides})
        tqdm.write(f"| {' | '.join(map(str, asdict(setting).values()))} | {models / 1e9:.2f} | {besides / 1e9:.2f} |")
    how = {"model": arguments.model, "side": arguments.side}
    write(arguments.output, {"machine": machine(arguments.device), **how, "rows": rows})


if __name__ == "__main__":
    main()
