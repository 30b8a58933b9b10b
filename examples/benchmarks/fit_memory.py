"""Most memory that a step of a Perfusion fit takes besides the models, by precision, batch size and checkpointing.

    python examples/benchmarks/fit_memory.py --side 512 --mixed_precision bf16 --batch_size 1 2 4 \\
        --output examples/benchmarks/results/fit-memory-sd15.json

The latents are encoded by then. Each setting is measured over two steps in a process of its own; on a CPU that holds
what libraries take for themselves.
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
from fit import PICTURES
from memory import forget_most, most, now
from models import POCKET, load
from safetensors.torch import save_file
from timing import machine, write
from tqdm import tqdm

from diffusers_perfusion.training import FitConfig, fit
from diffusers_perfusion.training.learner import Learner


@dataclass(frozen=True)
class Setting:
    """Of a fit, as in `FitConfig`."""

    mixed_precision: str
    gradient_checkpointing: bool
    train_batch_size: int


def measure(model, device, side, setting):
    """Bytes of the models while there are steps, and the most that these take besides."""
    pipeline, step, found = load(model, device), Learner.step, {}

    def watched(learner, index):
        if index == 0:
            models = (pipeline.vae, pipeline.text_encoder, pipeline.unet)
            found["models"] = sum(p.numel() * p.element_size() for part in models for p in part.parameters())
            forget_most(device)
            found["before"] = now(device)
        loss = step(learner, index)
        found["most"] = most(device)
        return loss

    with tempfile.TemporaryDirectory() as folder, patch.object(Learner, "step", watched):
        # Which metric it is makes no difference to what it takes.
        save_file({"covariance": torch.eye(pipeline.text_encoder.config.hidden_size)}, f"{folder}/c.safetensors")
        config = FitConfig(
            str(POCKET),
            str(PICTURES),
            "<my-bear>",
            "teddy bear",
            covariance=f"{folder}/c.safetensors",
            output_dir=f"{folder}/fit",
            resolution=side,
            random_flip=False,  # fewer pictures to encode
            mask="none",
            max_train_steps=2,
            **asdict(setting),
        )
        fit(pipeline, config, Accelerator(cpu=device == "cpu", mixed_precision=setting.mixed_precision))
    return found["models"], found["most"] - found["before"]


def measure_alone(*args):
    """`measure` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="sd15")
    parser.add_argument("--side", type=int, help="Of the pictures in pixels. Default: the model's.")
    parser.add_argument("--mixed_precision", nargs="+", choices=("no", "fp16", "bf16"), default=["no", "bf16"])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    rows = []
    print("| precision | checkpointing | pictures | GB of the models | GB besides |\n|---|---|---|---|---|")
    settings = product(arguments.mixed_precision, (False, True), arguments.batch_size)
    for setting in tqdm([Setting(*values) for values in settings]):
        models, besides = measure_alone(arguments.model, arguments.device, arguments.side, setting)
        rows.append(asdict(setting) | {"model_bytes": models, "peak_bytes": besides})
        tqdm.write(f"| {' | '.join(map(str, asdict(setting).values()))} | {models / 1e9:.2f} | {besides / 1e9:.2f} |")
    how = {"model": arguments.model, "side": arguments.side}
    write(arguments.output, {"machine": machine(arguments.device), **how, "rows": rows})


if __name__ == "__main__":
    main()
