"""Measure how long it takes to load a concept, to switch to it and to set its bias.

    python examples/benchmarks/load.py --output examples/benchmarks/results/load.json

On random weights with the shapes of Stable Diffusion 1.5 and a vocabulary as large as CLIP's.
"""

import argparse
import tempfile
from pathlib import Path

from models import load, random_concept
from timing import machine, rows_of, seconds, show, write

from diffusers_perfusion import PerfusionConcept, add_perfusion


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15"), default="sd15")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(args)

    pipeline = add_perfusion(load(arguments.model, arguments.device))
    with tempfile.TemporaryDirectory() as folder:
        paths = [random_concept(pipeline, number).save(Path(folder) / f"{number}.safetensors") for number in range(3)]
        # In this order, since one undoes another.
        functions = {
            "read a file": lambda: PerfusionConcept.load(paths[2]),
            "load a first concept": lambda: pipeline.load_perfusion(paths[0], "first"),
            "load another": lambda: pipeline.load_perfusion(paths[1], "second"),
            "forget one": lambda: pipeline.delete_perfusion("second"),
            "load it again": lambda: pipeline.load_perfusion(paths[1], "second"),
            "switch to one": lambda: pipeline.set_perfusion("first"),
            "switch to the other": lambda: pipeline.set_perfusion("second"),
            "set the bias": lambda: pipeline.set_perfusion(bias=1.1),
            "disable": pipeline.disable_perfusion,
            "enable": pipeline.enable_perfusion,
            "unload all": pipeline.unload_perfusion,
        }
        taken = {name: [] for name in functions}
        for _ in range(arguments.repeats):
            for name, function in functions.items():
                taken[name].append(seconds(function, arguments.device))
        rows = rows_of(taken, "read a file")
    show(rows)
    write(arguments.output, {"model": arguments.model, "machine": machine(arguments.device), "rows": rows})


if __name__ == "__main__":
    main()
