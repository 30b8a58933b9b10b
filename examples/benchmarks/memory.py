"""Memory of this process on a device, in bytes: all of it on a CPU (Linux), torch's tensors on a GPU."""

import ctypes
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_use(device):
    """Return the memory in use."""
    return torch.cuda.memory_allocated() if device != "cpu" else _status("VmRSS")


def peak(device):
    """Return the peak since the process began, or since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")


def reset_peak(device):
    """Set the peak to the memory in use, after glibc has returned what was freed."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")


def _status(field):
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))
