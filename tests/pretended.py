"""A pretended accelerator, so that what goes wrong on one goes wrong on any machine.

    python tests/pretended.py REPORT train --pretrained_model_name_or_path ...

runs the command line on it. It computes on the CPU, but its tensors do not mix with those of the CPU. How many it had
goes to the file REPORT, and what each training step would have waited for: a list for each step. It has no memory to
run out of, and no kernels of its own.
"""

import json
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import diffusers_perfusion
from diffusers_perfusion.cli import main
from diffusers_perfusion.training.trainer import PerfusionTrainer

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# What cannot go on before it knows the numbers in a tensor.
READING = {aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.masked_select, aten.equal}

waits = []
counts = {"tensors": 0}


class Backend(_DummyBackendModule):
    """What torch asks of a kind of device."""

    def get_amp_supported_dtype(self):
        """For autocast."""
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", Backend())
DEVICE = torch.device("pretended", 0)


GeneratorOfCpu = torch.Generator


class Generator(torch.Generator):
    """Of random numbers on the pretended accelerator."""

    device = DEVICE

    def __new__(cls, device="cpu"):
        """A generator there, or one of the CPU."""
        return super().__new__(cls) if on_it(device) else GeneratorOfCpu(device)


class Pretended(torch.Tensor):
    """A tensor on the pretended accelerator; it holds one of the CPU."""

    @staticmethod
    def __new__(cls, held):
        """A tensor that looks like the one it holds, but for its device."""
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **layout)

    def __init__(self, held):
        self.held = held
        counts["tensors"] += 1

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """As `compute`."""
        return compute(function, args, kwargs or {})


class Computing(TorchDispatchMode):
    """Meanwhile tensors can be made there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """As `compute`."""
        return compute(function, args, kwargs or {})


class Calling(TorchFunctionMode):
    """For the functions that make tensors, or read them, where `Computing` does not see it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """The same by functions that it sees."""
        kwargs = kwargs or {}
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if generator is not None and isinstance(generator, Generator) != (device is not None and on_it(device)):
            raise RuntimeError(f"{function} has a generator of another device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            return function(*args, **kwargs | {"device": "cpu"}).to(device)
        if function is torch.Tensor.pin_memory:
            copy = args[0].clone()
            copy.pinned = True
            return copy
        if args and isinstance(args[0], Pretended):
            if function is torch.Tensor.tolist:
                return args[0].cpu().tolist()
            if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
                return function(args[0], index, *args[2:])
        return function(*args, **kwargs)


def compute(function, args, kwargs):
    """What a function of torch gives, on the device that it is asked for or that its tensors are on."""
    kind = function.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, Pretended) for tensor in tensors)
    others = [tensor for tensor in tensors if tensor.ndim and not isinstance(tensor, Pretended)]
    if kind is aten.copy_:
        target, source, *queued = args
        here = isinstance(target, Pretended)
        see_copy(source, here, any(queued))
    elif kind is aten._to_copy:
        here = on_it(kwargs["device"]) if kwargs.get("device") else here
        see_copy(args[0], here, kwargs.get("non_blocking"))
    elif here and others:
        if kind not in INDEXING or not isinstance(args[0], Pretended):
            raise RuntimeError(f"{function} has tensors on two devices: {[(t.device.type, t.shape) for t in tensors]}")
        wait(f"{function} for its indices")
    elif here and kind in READING:
        wait(function)
    elif kwargs.get("device"):
        here = on_it(kwargs["device"])
    if kwargs.get("device") and on_it(kwargs["device"]):
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = function(*tree_map_only(Pretended, held_by, args), **tree_map_only(Pretended, held_by, kwargs))
    if not here:
        return result
    result = tree_map_only(torch.Tensor, Pretended, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def held_by(tensor):
    """The tensor of the CPU."""
    return tensor.held


def on_it(device):
    """Whether a device is the pretended one."""
    return torch.device(device).type == DEVICE.type


def see_copy(source, here, queued):
    """A copy between devices is waited for, unless it is from pinned memory and can stand in the queue."""
    if isinstance(source, Pretended) != here and not (queued and hasattr(source, "pinned")):
        wait(f"a copy {'to' if here else 'from'} it")


def wait(what):
    """Write down what is waited for, and where."""
    folders = [Path(package.__file__).parent for package in (diffusers_perfusion, transformers)]
    frames = [f for f in traceback.extract_stack() if any(folder in Path(f.filename).parents for folder in folders)]
    waits.append(f"{frames[-1].filename}:{frames[-1].lineno}: {what}")


def bytes_there(trainer):
    """Of the weights of a training's model and its text encoders, those that are on the pretended accelerator."""
    models = {"model": [trainer.model], "text_encoders": trainer.family.text_encoders}
    return {
        name: sum(weight.nbytes for part in parts for weight in part.parameters() if weight.device == DEVICE)
        for name, parts in models.items()
    }


def run(report, *argv):
    """The command line on the pretended accelerator; its exit status."""
    steps, step, encode = [], PerfusionTrainer.step, PerfusionTrainer._encode_superclass_prompts
    held, trainers = {}, []

    def encoding(self, prompt_ids):
        held["encoding"] = bytes_there(self)
        return encode(self, prompt_ids)

    def watched(self, index):
        if index == 0:
            trainers.append(self)
            waits.clear()
            held["step"] = bytes_there(self)
        loss = step(self, index)
        steps.append(list(waits))  # with what was waited for since the step before
        waits.clear()
        return loss

    with (
        patch.object(PerfusionTrainer, "step", watched),
        patch.object(PerfusionTrainer, "_encode_superclass_prompts", encoding),
        patch.object(Accelerator, "device", DEVICE),
        patch.object(torch, "Generator", Generator),
        Computing(),
        Calling(),
    ):
        status = main(argv)
    for trainer in trainers:
        held["afterwards"] = bytes_there(trainer)
    Path(report).write_text(json.dumps({"steps": steps, "tensors": counts["tensors"], "held": held}))
    return status


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
