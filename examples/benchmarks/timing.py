"""Timing of several functions in turns in one process, and a description of the machine."""

import itertools
import json
import os
import platform
import statistics
from time import perf_counter

import diffusers
import torch
from tqdm import tqdm

from diffusers_perfusion.files import write_atomically


def seconds(function, device="cpu"):
    """Return how long a function takes, including the work it has queued on an accelerator."""
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
    """Return a timestamp for `seconds_between`: on an accelerator an event in its queue, without waiting."""
    if torch.device(device).type == "cpu":
        return perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def seconds_between(moments):
    """Return the seconds from each timestamp to the next."""
    if moments and not isinstance(moments[0], float):
        torch.accelerator.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(moments)]
    return [after - before for before, after in itertools.pairwise(moments)]


def alternate(functions, repeats, device="cpu"):
    """Return the seconds of each function by name: after a warm-up, in turns, so that drift affects all alike."""
    for function in functions.values():
        function()
    taken = {name: [] for name in functions}
    for repeat in tqdm(range(repeats), desc="repeats"):
        names = list(functions)
        for name in names if repeat % 2 == 0 else reversed(names):
            taken[name].append(seconds(functions[name], device))
    return taken


def rows_of(taken, base):
    """Return a row for each function: median, median ratio to `base` turn by turn, and ratio of the fastest."""
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
    """Return what figures depend on, without the name of the machine."""
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
    """Write measurements as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(data, indent=1)}\n".encode())


def show(rows):
    """Print rows as a table."""
    print("| | median ms | ratio | ratio of the fastest |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | {row['median_ms']:.2f} | {row['ratio']:.3f} | {row['ratio_of_fastest']:.3f} |")
