"""Soft masks of the subject in training images, from one of several sources."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from ..image_files import read_image
from ..model_families import family_of
from .images import TrainingImage, is_constant, to_tensor
from .noise_schedule import noise_schedule
from .superclass import superclass_positions

logger = logging.get_logger(__name__)

CLIPSEG = "CIDAS/clipseg-rd64-refined"

# Attention shows the subject's place best where noise still hides its details: fractions of all timesteps.
_NOISE_LEVELS = (0.3, 0.4, 0.5, 0.6)
_NOISES = 4
# Attention is never zero in the background and never uniform over the subject, so these quantiles of each map become
# zero and one.
_QUANTILES = (0.05, 0.95)


def subject_masks(
    source: str,
    images: Sequence[TrainingImage],
    folder: str | os.PathLike,
    superclass: str,
    pipeline: Any,
    seed: int = 0,
) -> tuple[Tensor | None, str]:
    """Return masks of the subject in images, and the kind of source they come from.

    Args:
        source: `alpha`, `clipseg`, `attention`, `none`, a folder, the id or folder of a CLIPSeg model, or `auto`: the
            first there is of alpha channels, a folder `masks` in `folder`, a CLIPSeg model in the Hugging Face cache,
            and attention.
        images: of the subject.
        folder: of the images.
        superclass: of the subject.
        pipeline: of the base model, for `attention`.
        seed: of the noise, for `attention`.

    Returns:
        The masks, `(N, 1, height, width)` in [0, 1] or None, and `alpha`, `folder`, `clipseg`, `attention` or `none`.

    Raises:
        ValueError: if the source has no mask for an image.
    """
    masks, kind = masks_without_base_model(source, images, folder, superclass)
    if kind == "attention":
        family = family_of(pipeline)
        latents = family.encode_latents(pipeline.vae, to_tensor([image.image for image in images]))
        masks = attention_masks(pipeline, noise_schedule(family, pipeline.scheduler), latents, superclass, seed)
    return masks, kind


def masks_without_base_model(
    source: str,
    images: Sequence[TrainingImage],
    folder: str | os.PathLike,
    superclass: str,
    attention: bool = True,
) -> tuple[Tensor | None, str]:
    """Return what `subject_masks` returns, but for `attention` no masks: they take long.

    Args:
        source: as `subject_masks` takes it.
        images: likewise.
        folder: likewise.
        superclass: likewise.
        attention: whether the base model has cross-attention; if not, `auto` ends with no masks.

    Raises:
        ValueError: as `subject_masks`, or if the source is the cross-attention of a base model that has none.
    """
    masks: Tensor | None = None
    if source == "attention" and not attention:
        raise ValueError(
            "mask is 'attention', but text and image attend to each other in this base model, so that there is no "
            "cross-attention; expected 'alpha', a folder of masks, 'clipseg', 'none' or 'auto'"
        )
    if source in ("none", "attention"):
        return None, source
    if source in ("alpha", "auto") and (masks := alpha_masks(images)) is not None:
        return masks, "alpha"
    if source == "alpha":
        without = next(image.path.name for image in images if image.alpha is None)
        raise ValueError(f"{without} has no alpha channel that shows the subject; choose another source of masks")
    if source == "auto" and (Path(folder) / "masks").is_dir():
        return folder_masks(images, Path(folder) / "masks"), "folder"
    if source == "auto":
        try:
            return clipseg_masks(images, superclass, local_files_only=True), "clipseg"
        except (OSError, SafetensorError):  # not in the cache, or damaged there
            if attention:
                return None, "attention"
            logger.warning(
                "There are no masks of the subject, so that its surroundings are learned too: cut it out (alpha "
                "channel), give a folder of masks, or download a CLIPSeg model."
            )
            return None, "none"
    if source != "clipseg" and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return folder_masks(images, source), "folder"
    try:
        return clipseg_masks(images, superclass, CLIPSEG if source == "clipseg" else source), "clipseg"
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"mask is {source!r}; expected a folder of masks, or a CLIPSeg model that can be loaded ({error})"
        ) from error


def alpha_masks(images: Sequence[TrainingImage]) -> Tensor | None:
    """Return the images' alpha channels as masks, `(N, 1, H, W)` in [0, 1]; None unless all have one."""
    channels = [image.alpha for image in images if image.alpha is not None]
    return to_tensor(channels) if len(channels) == len(images) else None


def folder_masks(images: Sequence[TrainingImage], folder: str | os.PathLike) -> Tensor:
    """Read masks from a folder of greyscale files or cut-outs named like the images, `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: if an image has no mask, or one that is empty or turned by a quarter.
    """
    files = sorted(Path(folder).iterdir())
    names = {image.path.name for image in images}
    masks = []
    for image in images:
        # Of another suffix, if it has not the name of another image.
        stem = [path for path in files if path.stem == image.path.stem and path.name not in names]
        path, mask = _read_mask(image, [path for path in files if path.name == image.path.name] + stem, folder)
        left, top, right, bottom = image.box
        ratio = (bottom - top) / (right - left)
        if math.isclose(mask.height / mask.width, ratio, rel_tol=0.02) and not 0.95 < ratio < 1.05:
            raise ValueError(
                f"{path} is turned by a quarter from {image.path.name}; expected it upright like the image"
            )
        alpha = mask.getchannel("A") if mask.mode == "RGBA" else None
        mask = image.crop_like(mask.convert("L") if alpha is None or is_constant(alpha) else alpha)
        if mask.getextrema()[1] == 0:
            raise ValueError(f"{path} is black where {image.path.name} was cropped; expected the subject in white")
        masks.append(mask)
    return to_tensor(masks)


def _read_mask(image: TrainingImage, paths: Sequence[Path], folder: str | os.PathLike) -> tuple[Path, Image.Image]:
    """Return the first of some files that is an image, or raise ValueError if none is."""
    for path in paths:
        try:
            return path, read_image(path)
        except ValueError as error:
            logger.warning(f"{error}; it is skipped.")
    raise ValueError(f"{folder} has no mask for {image.path.name}; expected an image of the same name")


@torch.no_grad()
def clipseg_masks(
    images: Sequence[TrainingImage], superclass: str, model: str = CLIPSEG, local_files_only: bool = False
) -> Tensor:
    """Segment the super-class with a CLIPSeg model, `(N, 1, H, W)` in [0, 1] (paper Appendix A).

    Args:
        images: of the subject.
        superclass: of the subject.
        model: Hub id or folder of a `transformers` CLIPSeg model.
        local_files_only: read only what is in the Hugging Face cache.
    """
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    processor = CLIPSegProcessor.from_pretrained(model, local_files_only=local_files_only)
    network = CLIPSegForImageSegmentation.from_pretrained(model, local_files_only=local_files_only).eval()
    inputs = processor(
        text=[superclass] * len(images),
        images=[image.image for image in images],
        padding=True,
        return_tensors="pt",
    )
    logits = network(**inputs).logits
    return torch.sigmoid(logits.reshape(len(images), 1, *logits.shape[-2:]))


@torch.no_grad()
def attention_masks(
    pipeline: Any,
    schedule: Any,
    latents: Tensor,
    superclass: str,
    seed: int = 0,
) -> Tensor:
    """Compute masks from the base model's own cross-attention to the super-class, `(N, 1, h, w)` in [0, 1].

    Noisy latents are denoised once with the prompt "a photo of a <super-class>". The attention to its tokens in the
    layers of the two finest resolutions is averaged over heads, layers, noises and noise levels.

    Args:
        pipeline: of the base model.
        schedule: as `noise_schedule` returns it for the base model.
        latents: of the images, `(N, channels, h, w)`.
        superclass: of the subject.
        seed: of the noise.
    """
    family = family_of(pipeline)
    ids = family.tokenize([f"a photo of a {superclass}"] * len(latents))
    positions = superclass_positions(family.tokenizers[0], superclass, ids[0][:1])[0]
    recorded: dict[int, list[Tensor]] = {}
    encoding = family.encode(ids)
    encoding = encoding.map(lambda part: part.to(latents))
    resolution = latents.shape[-1] * family.vae_scale_factor
    generator = torch.Generator().manual_seed(seed)
    layers = family.layers
    processors = {name: layer.processor for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.set_processor(_RecordingProcessor(layer.processor, positions, recorded))
        for level in _NOISE_LEVELS:
            timestep = torch.full(
                (len(latents),), int(level * schedule.config.num_train_timesteps), device=latents.device
            )
            for _ in range(_NOISES):
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                noisy = schedule.add_noise(latents, noise, timestep)
                family.predict(family.model, noisy, timestep, encoding, resolution)
    finally:
        for name, layer in layers.items():
            layer.set_processor(processors[name])
    finest = sorted(recorded, reverse=True)[:2]
    maps = [F.interpolate(torch.stack(recorded[size]).mean(0), latents.shape[-2:], mode="bicubic") for size in finest]
    mean = torch.stack([attention / attention.mean((1, 2, 3), keepdim=True) for attention in maps]).mean(0)
    low, high = torch.quantile(mean.flatten(1), torch.tensor(_QUANTILES).to(mean), dim=1).view(2, -1, 1, 1, 1)
    # A uniform map shows no subject, so nothing is masked out.
    return torch.where(high > low, (mean - low) / (high - low), 1.0).clamp(0, 1)


class _RecordingProcessor:
    """Attention processor that calls another one and records the attention to some tokens.

    Args:
        processor: the processor to call.
        positions: of the tokens, whose attention is added up.
        maps: gets the recorded maps `(batch, 1, h, w)`, in a list for each `h`.
    """

    def __init__(self, processor: Any, positions: Tensor, maps: dict[int, list[Tensor]]):
        self.processor, self.positions, self.maps = processor, positions, maps

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Tensor:
        side = round(hidden_states.shape[1] ** 0.5)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key)[..., self.positions].sum(-1)
        maps = scores.reshape(len(hidden_states), -1, side, side).mean(1, keepdim=True)
        self.maps.setdefault(side, []).append(maps.float())
        return self.processor(attn, hidden_states, encoder_hidden_states, **kwargs)
