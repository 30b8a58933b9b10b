"""What this process has in memory on a device, in bytes: all of it on a CPU (Linux), and torch's tensors on a GPU."""

import ctypes
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def now(device):
    """At this moment."""
    return torch.cuda.memory_allocated() if device != "cpu" else _status("VmRSS")


def most(device):
    """At most since the process began, or since `forget_most`."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def forget_most(device):
    """Let `most` be what there is now, without what glibc keeps of what was freed."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")


def _status(field):
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))
