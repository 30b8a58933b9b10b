"""Functions that several commands use."""

import os
from pathlib import Path
from typing import Any


def folder(text: str) -> Path:
    """Return the folder that a flag names; the shell leaves the `~` in `--output_dir=~/images` as it is."""
    return Path(os.path.expanduser(text))


def from_pretrained(base: str, **options: Any) -> Any:
    """Load the pipeline of a base model with Perfusion's methods and without progress bars.

    Args:
        base: Hub id or folder.
        options: more for `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from diffusers import DiffusionPipeline

    from ..loaders import add_perfusion

    try:
        pipeline = add_perfusion(DiffusionPipeline.from_pretrained(base, **options))
    except Exception as error:  # each library has errors of its own for a broken file
        told = isinstance(error, (ImportError, ValueError, OSError, RuntimeError))
        raise ValueError(f"{base} cannot be loaded: {error if told else repr(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(base: str, **options: Any) -> Any:
    """Load the pipeline of a base model as `from_pretrained`, and without a safety checker."""
    from diffusers import DiffusionPipeline

    if "safety_checker" in DiffusionPipeline.load_config(base, revision=options.get("revision")):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    return from_pretrained(base, **options)


def place(pipeline: Any, device: Any) -> None:
    """Move a pipeline to a device: in its family's half precision, or on a CPU in full precision."""
    from ..model_families import family_of

    if device.type == "cpu":
        # Some releases of transformers keep the half precision of a text encoder's file, which a CPU cannot use.
        for model in family_of(pipeline).text_encoders:
            model.float()
    else:
        pipeline.to(device, family_of(pipeline).half_precision)


def describe(path: Path) -> str:
    """Return the name and size of a file that a command has written."""
    return f"{path} ({path.stat().st_size:,} bytes)"
