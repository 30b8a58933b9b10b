"""Measure the seconds of `perfusion train --concepts` for four concepts, in one process and in two of one thread each.

    python examples/benchmarks/train_many.py --output examples/benchmarks/results/train-many.json

It takes the pocket model, and times the whole command.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from models import POCKET
from timing import machine, seconds, write
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "examples" / "data" / "concepts.csv"


def run(processes, steps, folder):
    """Train the four concepts into a fresh folder."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        launch += ["--multi_gpu"] if processes > 1 else []
        command = [sys.executable, *launch, "-m", "diffusers_perfusion.cli", "train", "--concepts", str(TABLE)]
        command += ["--pretrained_model_name_or_path", str(POCKET), "--output_dir", output]
        command += ["--max_train_steps", str(steps), "--checkpointing_steps", str(steps)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}
        subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(1, 1, folder)  # computes C once
        taken = {1: [], 2: []}
        for repeat in tqdm(range(arguments.repeats), desc="repeats"):
            for processes in (1, 2) if repeat % 2 == 0 else (2, 1):
                taken[processes].append(seconds(lambda count=processes: run(count, arguments.steps, folder)))
    ratio = statistics.median(one / two for one, two in zip(taken[1], taken[2], strict=True))
    print("| processes | seconds for four concepts |\n|---|---|")
    for processes, times in taken.items():
        print(f"| {processes} | {statistics.median(times):.1f} |")
    print(f"two processes are {ratio:.2f} times as fast as one")
    rows = [{"processes": count, "seconds": times} for count, times in taken.items()]
    write(
        arguments.output,
        {"machine": machine() | {"threads": 1}, "steps": arguments.steps, "rows": rows, "speedup": ratio},
    )


if __name__ == "__main__":
    main()
