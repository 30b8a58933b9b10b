"""`C`, the uncentred second moment of encoder hidden states; its inverse is Perfusion's metric.

All real tokens of a caption count, BOS and EOS among them, and padding does not. That was chosen by the paper's gate,
whose mean `examples/benchmarks/covariance_tokens.py` prints at each kind of token: without EOS in `C` it opens at EOS
(0.063 for 0.019, at β 0.6 and τ 0.15), and with padding at the token after the concept (0.66 for 0.62). BOS makes no
difference, since its hidden state is always the same.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm.auto import tqdm

from ..files import delete_temporaries, write_atomically
from ..model_families import ModelFamily
from .captions import generate_captions
from .tensor_files import check_extent, read_tensors

logger = logging.get_logger(__name__)

BATCH_SIZE = 256

# Fraction of the mean diagonal that is added to the diagonal before `C` is inverted. Without it the condition number
# is 2e6 on the pocket model and the gate follows rounding errors; with 1e-3 it opens on neighbouring tokens.
RIDGE = 1e-4


def read_captions(path: str | os.PathLike) -> list[str]:
    """Return the lines of a captions file that are not empty.

    Raises:
        ValueError: if there are none, or the file is no UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; expected captions, one per line, saved as UTF-8") from error
    captions = [line.strip() for line in text.splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"{path} has no captions; expected one per line")
    return captions


@torch.no_grad()
def second_moment(family: ModelFamily, captions: Iterable[str]) -> Tensor:
    """Compute `C` over all real tokens of captions, `(d, d)` in float64.

    Captions are encoded in batches, and their outer products are summed in float64.

    Raises:
        ValueError: if there are no captions, or a hidden state is not finite.
    """
    total: Tensor | None = None
    count = 0
    captions = iter(captions)
    with tqdm(desc="Covariance", unit=" captions") as progress:
        while batch := list(itertools.islice(captions, BATCH_SIZE)):
            # Padding to the longest of the batch is enough: text encoders are causal or mask padding.
            ids, real = family.tokenize(batch, "longest"), family.real_tokens(batch)
            e = family.encode(ids).inputs
            e = e[real.to(e.device)].cpu().double()  # some accelerators have no float64
            total = e.T @ e if total is None else total + e.T @ e
            count += len(e)
            progress.update(len(batch))
    if total is None:
        raise ValueError("there are no captions to compute the covariance from")
    return check_covariance(total / count)


def check_covariance(covariance: Tensor, width: int | None = None) -> Tensor:
    """Return a covariance, or raise ValueError unless it is square, symmetric, finite, positive and of `width`."""
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not covariance.is_floating_point():
        raise ValueError(
            f"the covariance is {covariance.dtype} of shape {tuple(covariance.shape)}; expected a square float matrix"
        )
    if width is not None and len(covariance) != width:
        raise ValueError(f"the covariance is of width {len(covariance)}, but the text encoder has width {width}")
    if not torch.isfinite(covariance).all():
        raise ValueError("the covariance has NaN or infinity; expected finite numbers")
    diagonal = covariance.diagonal()
    if (diagonal <= 0).any() or not torch.allclose(
        covariance, covariance.T, rtol=1e-3, atol=1e-3 * float(diagonal.mean())
    ):
        raise ValueError("the covariance is not symmetric with a positive diagonal, so it is no second moment")
    return covariance


def invert(covariance: Tensor) -> Tensor:
    """Return `C⁻¹` with a small ridge (`RIDGE`), `(d, d)` in float64."""
    covariance = covariance.double()
    ridge = RIDGE * covariance.diagonal().mean()
    return torch.linalg.inv(
        covariance + ridge * torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    )


def load_covariance(path: str | os.PathLike) -> Tensor:
    """Read `C` from a `.npy`, `.pt` or `.safetensors` file with one matrix.

    No code in them can run.

    Raises:
        ValueError: if the file is of another kind or does not hold one matrix.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            content: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix in (".pt", ".safetensors"):
            content = read_tensors(path)
        else:
            raise ValueError(f"its suffix is {path.suffix!r}; expected .npy, .pt or .safetensors")
        if isinstance(content, dict) and len(content) == 1:
            content = next(iter(content.values()))
        if not isinstance(content, Tensor):
            raise ValueError("it does not hold one matrix")
        return check_covariance(check_extent(content).float())
    except FileNotFoundError:
        raise
    except Exception as error:  # each reader has errors of its own for a broken file
        raise ValueError(f"{path} is not a covariance file: {error}") from error


def cached_covariance(family: ModelFamily, captions: str | os.PathLike | None = None) -> Tensor:
    """Return `C` over captions, `(d, d)` in float32, from the Hugging Face cache if it was computed before.

    The key is a hash of the text encoders' weights, of the tokenizers and of the captions. Where the cache cannot be
    written, `C` is computed and not kept, with a line.

    Args:
        family: of the base model.
        captions: a file with one caption per line; by default captions are generated (`generate_captions`).
    """
    lines = list(generate_captions()) if captions is None else read_captions(captions)
    key = hashlib.sha256(_fingerprint(family) + "\n".join(lines).encode()).hexdigest()[:32]
    path = Path(HF_HOME) / "perfusion" / f"covariance-{key}.safetensors"
    if (covariance := _read_cache(path)) is not None:  # first, because the cache may be read-only
        return covariance
    with ExitStack() as stack:
        try:
            # One process computes it, and the others wait.
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))
        except (OSError, NotImplementedError):
            pass  # the cache cannot be written, as is told below, or its file system has no locks
        if (covariance := _read_cache(path)) is None:
            covariance = second_moment(family, lines).float().cpu()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                delete_temporaries(path.parent, path.name)
                write_atomically(path, serialize({"covariance": covariance}))
            except OSError as error:
                logger.warning(f"The covariance is not kept for the next training ({error}).")
        return covariance


def _read_cache(path: Path) -> Tensor | None:
    """Return the matrix in a cache file; None if there is no such file, or a damaged one."""
    if not os.path.isfile(path):  # unlike Path.is_file, no error for a folder that must not be read
        return None
    try:
        return load_covariance(path)
    except ValueError as error:
        logger.warning(f"{error}. It is recomputed.")
        return None


def _fingerprint(family: ModelFamily) -> bytes:
    """Return a hash of the text encoders' weights, the vocabularies, and the token ids of an example."""
    digest = hashlib.sha256(repr(family.hidden_state_index).encode() + family.instruction.encode())
    for tokenizer in family.tokenizers:
        digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
        digest.update(repr(tokenizer("a photo of two Teddy bears, café")["input_ids"]).encode())
    for module in (*family.text_encoders, *family.projection):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
