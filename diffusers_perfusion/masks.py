"""Soft masks of where the subject is in a picture, from whatever there is to tell it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging
from PIL import Image, ImageOps
from torch import Tensor

from .attention import cross_attention_layers
from .families import edited_model, family_of, text_encoders
from .noise import noise_schedule
from .pictures import Picture, eight_bits, encode_latents, to_tensor
from .text import superclass_positions

logger = logging.get_logger(__name__)

CLIPSEG = "CIDAS/clipseg-rd64-refined"

# Attention tells most about the subject's place where noise still hides its details: fractions of all timesteps.
_NOISE_LEVELS = (0.3, 0.4, 0.5, 0.6)
_NOISES = 4
# Attention never falls to nothing in the background, nor is it even over the subject: of the spread between a
# picture's quantiles, this much counts as background, and above it the mask rises to one.
_QUANTILES = (0.05, 0.95)


def subject_masks(
    source: str, pictures: Sequence[Picture], folder: str | os.PathLike, superclass: str, pipeline: Any, seed: int = 0
) -> tuple[Tensor | None, str]:
    """Masks of the subject in some pictures, and what they came from.

    Args:
        source: `alpha`, `clipseg`, `attention`, `none`, a folder, the id or folder of a CLIPSeg model, or `auto`: the
            first there is of alpha channels, a folder `masks` in `folder`, a CLIPSeg model in the Hugging Face cache,
            and attention.
        pictures: of the subject.
        folder: where the pictures are.
        superclass: what the subject is.
        pipeline: of the base model, for `attention`.
        seed: of the noise, for `attention`.

    Returns:
        The masks, `(N, 1, height, width)` in [0, 1] or None, and `alpha`, `folder`, `clipseg`, `attention` or `none`.

    Raises:
        ValueError: if the source does not give a mask for every picture.
    """
    masks: Tensor | None = None
    if source == "none":
        return None, source
    if source in ("alpha", "auto") and (masks := alpha_masks(pictures)) is not None:
        return masks, "alpha"
    if source == "alpha":
        without = next(picture.path.name for picture in pictures if picture.alpha is None)
        raise ValueError(f"{without} has no alpha channel that tells the subject; choose another source of masks")
    if source == "auto" and (Path(folder) / "masks").is_dir():
        return folder_masks(pictures, Path(folder) / "masks"), "folder"
    if source == "auto":
        try:
            return clipseg_masks(pictures, superclass, local_files_only=True), "clipseg"
        except OSError:
            source = "attention"
    if source == "attention":
        latents = encode_latents(pipeline.vae, to_tensor([picture.image for picture in pictures]))
        scheduler = noise_schedule(pipeline.scheduler)
        return attention_masks(pipeline, scheduler, latents, superclass, seed), source
    if source == "clipseg":
        return clipseg_masks(pictures, superclass), source
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        return folder_masks(pictures, source), "folder"
    return clipseg_masks(pictures, superclass, source), "clipseg"


def alpha_masks(pictures: Sequence[Picture]) -> Tensor | None:
    """Masks from the pictures' alpha channels, `(N, 1, H, W)` in [0, 1]; None unless all have one."""
    channels = [picture.alpha for picture in pictures if picture.alpha is not None]
    return to_tensor(channels) if len(channels) == len(pictures) else None


def folder_masks(pictures: Sequence[Picture], folder: str | os.PathLike) -> Tensor:
    """Masks from a folder with a greyscale picture for each picture, named like it, `(N, 1, H, W)` in [0, 1].

    Raises:
        ValueError: if a picture has no mask, or an empty one.
    """
    masks = []
    for picture in pictures:
        found = sorted(path for path in Path(folder).glob("*") if path.stem == picture.path.stem)
        if not found:
            raise ValueError(f"{folder} holds no mask for {picture.path.name}; expected one of the same name")
        with Image.open(found[0]) as file:
            mask = picture.crop_like(eight_bits(ImageOps.exif_transpose(file)).convert("L"))
        if mask.getextrema()[1] == 0:
            raise ValueError(
                f"{found[0]} is black where {picture.path.name} was cropped; expected the subject in white"
            )
        masks.append(mask)
    return to_tensor(masks)


@torch.no_grad()
def clipseg_masks(
    pictures: Sequence[Picture], superclass: str, model: str = CLIPSEG, local_files_only: bool = False
) -> Tensor:
    """Masks from a CLIPSeg model asked for the super-category, `(N, 1, H, W)` in [0, 1] (paper Appendix A).

    Args:
        pictures: of the subject.
        superclass: what to look for.
        model: id or folder of any `transformers` CLIPSeg model.
        local_files_only: never ask the Hub.
    """
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    processor = CLIPSegProcessor.from_pretrained(model, local_files_only=local_files_only)
    network = CLIPSegForImageSegmentation.from_pretrained(model, local_files_only=local_files_only).eval()
    inputs = processor(
        text=[superclass] * len(pictures),
        images=[picture.image for picture in pictures],
        padding=True,
        return_tensors="pt",
    )
    logits = network(**inputs).logits
    return torch.sigmoid(logits.reshape(len(pictures), 1, *logits.shape[-2:]))


@torch.no_grad()
def attention_masks(
    pipeline: Any,
    scheduler: Any,
    latents: Tensor,
    superclass: str,
    seed: int = 0,
) -> Tensor:
    """Masks from the base model's own cross-attention to the super-category, `(N, 1, h, w)` in [0, 1].

    The latents are noised, denoised once under "a photo of a <super-category>", and what the layers of the finest two
    resolutions attend to at its tokens is averaged over heads, layers, noises and noise levels.

    Args:
        pipeline: of the base model.
        scheduler: as `noise_schedule` of the base model.
        latents: of the pictures, `(N, channels, h, w)`.
        superclass: what to look for.
        seed: of the noise.
    """
    model, texts = edited_model(pipeline), text_encoders(pipeline)
    ids = texts.tokenize([f"a photo of a {superclass}"] * len(latents))
    tokens = superclass_positions(texts.tokenizers[0], superclass, ids[0][:1])[0]
    recorded: dict[int, list[Tensor]] = {}
    encoding = texts.encode(ids)
    states = encoding.states.to(latents)
    conditions = family_of(pipeline).conditions(model, encoding, latents.shape[-1] * pipeline.vae_scale_factor)
    generator = torch.Generator().manual_seed(seed)
    layers = cross_attention_layers(model)
    processors = {name: layer.processor for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.set_processor(_RecordingProcessor(layer.processor, tokens, recorded))  # type: ignore[arg-type]
        for level in _NOISE_LEVELS:
            timestep = torch.full(
                (len(latents),), int(level * scheduler.config.num_train_timesteps), device=latents.device
            )
            for _ in range(_NOISES):
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                noisy = scheduler.add_noise(latents, noise, timestep)
                model(noisy, timestep=timestep, encoder_hidden_states=states, **conditions)
    finally:
        for name, layer in layers.items():
            layer.set_processor(processors[name])
    finest = sorted(recorded, reverse=True)[:2]
    maps = [F.interpolate(torch.stack(recorded[size]).mean(0), latents.shape[-2:], mode="bicubic") for size in finest]
    mean = torch.stack([attention / attention.mean((1, 2, 3), keepdim=True) for attention in maps]).mean(0)
    low, high = torch.quantile(mean.flatten(1), torch.tensor(_QUANTILES).to(mean), dim=1).view(2, -1, 1, 1, 1)
    # A map with no contrast tells nothing, so nothing is masked out.
    return torch.where(high > low, (mean - low) / (high - low), 1.0).clamp(0, 1)


class _RecordingProcessor:
    """Does what another processor does, and keeps what the layer attends to at some tokens on the way.

    Args:
        processor: the other one.
        tokens: positions whose attention is added up.
        maps: where it is kept: maps `(batch, 1, h, w)` by the side of the map.
    """

    def __init__(self, processor: Any, tokens: Tensor, maps: dict[int, list[Tensor]]):
        self.processor, self.tokens, self.maps = processor, tokens, maps

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Tensor:
        side = round(hidden_states.shape[1] ** 0.5)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        scores = attn.get_attention_scores(query, key)[..., self.tokens].sum(-1)
        maps = scores.reshape(len(hidden_states), -1, side, side).mean(1, keepdim=True)
        self.maps.setdefault(side, []).append(maps.float())
        return self.processor(attn, hidden_states, encoder_hidden_states, **kwargs)
