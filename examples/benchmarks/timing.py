"""Times of several things, taken in turns in one process, and what they were taken on."""

import itertools
import json
import os
import platform
import statistics
from time import perf_counter

import diffusers
import torch
from tqdm import tqdm

from diffusers_perfusion.concept import write_atomically


def seconds(function, device="cpu"):
    """How long a function takes, with all that it has left to an accelerator."""
    if torch.device(device).type == "cpu":
        start = perf_counter()
        function()
        return perf_counter() - start
    torch.accelerator.synchronize()
    start = perf_counter()
    function()
    torch.accelerator.synchronize()
    return perf_counter() - start


def moment(device="cpu"):
    """Now, as `seconds_between` takes it: on an accelerator when it comes to it, without waiting for it."""
    if torch.device(device).type == "cpu":
        return perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(moments):
    """The seconds from each moment to the next."""
    if moments and not isinstance(moments[0], float):
        torch.accelerator.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(moments)]
    return [after - before for before, after in itertools.pairwise(moments)]


def alternate(functions, repeats, device="cpu"):
    """The seconds of each function by its name: all once to warm up, then in turns, so that drift meets all alike."""
    for function in functions.values():
        function()
    taken = {name: [] for name in functions}
    for repeat in tqdm(range(repeats), desc="repeats"):
        names = list(functions)
        for name in names if repeat % 2 == 0 else reversed(names):
            taken[name].append(seconds(functions[name], device))
    return taken


def rows_of(taken, base):
    """A row for each: the median, the median of its ratios to `base` turn by turn, and the ratio of the fastest."""
    return [
        {
            "name": name,
            "median_ms": 1e3 * statistics.median(times),
            "ratio": statistics.median(time / other for time, other in zip(times, taken[base], strict=True)),
            "ratio_of_fastest": min(times) / min(taken[base]),
            "seconds": times,
        }
        for name, times in taken.items()
    ]


def machine(device="cpu"):
    """What figures depend on: no name of the machine."""
    kind = torch.device(device).type
    model = torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or platform.machine()
    if kind == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "device": model,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def write(path, data):
    """Write what was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(data, indent=1)}\n".encode())


def show(rows):
    """Print rows as a table."""
    print("| | median ms | ratio | ratio of the fastest |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['median_ms']:.2f} | {row['ratio']:.3f} | {row['ratio_of_fastest']:.3f} |")
