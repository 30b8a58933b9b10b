"""What the commands share."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..families import text_encoders
from ..loaders import add_perfusion


def unchecked(base: str, **options: Any) -> Any:
    """The pipeline of a base model, of whichever family, without the safety checker that some have."""
    if "safety_checker" in DiffusionPipeline.load_config(base, revision=options.get("revision")):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return add_perfusion(DiffusionPipeline.from_pretrained(base, **options))


def place(pipeline: Any, device: torch.device) -> None:
    """Put a pipeline on its device: in half precision, but in full precision on a CPU."""
    if device.type == "cpu":
        # Some releases of transformers keep the half precision that a text encoder was stored in; a CPU cannot use it.
        for model in text_encoders(pipeline).models:
            model.float()
    else:
        pipeline.to(device, torch.float16)


def printable(value: Any) -> str:
    """A stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def describe(path: Path) -> str:
    """A file that a command has written, in a line."""
    return f"{path} ({path.stat().st_size:,} bytes)"
