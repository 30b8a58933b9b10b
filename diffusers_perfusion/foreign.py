"""Concepts from the files of other implementations of Perfusion, which are of Stable Diffusion 1 and 2."""

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from .attention import check_concept_fits, cross_attention_layers
from .concept import MAX_FILE_BYTES, PerfusionConcept
from .families import edited_model, family_of, text_encoders
from .text import superclass_input

logger = logging.get_logger(__name__)

CHENDARYEN = "ChenDarYen/Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization"
LUCIDRAINS = "lucidrains/perfusion-pytorch"

# At which text positions the prompts that ChenDarYen trains with have the word, and how many of the nine prompts.
_TRAINED_AT = {2: 1, 4: 4, 5: 2, 6: 2}

# How names of layers begin in diffusers and in the original, from the input of a UNet to its output.
_STAGES = (("down_", "input_"), ("mid_", "middle_"), ("up_", "output_"))

# What both generate with, and what the paper finds worth trying.
_SETTINGS: dict[str, Any] = {"bias": 0.7, "temperature": 0.15, "bias_range": (0.5, 0.9)}


class _Learned(NamedTuple):
    """What a file holds.

    Attributes:
        source: whose it is.
        superclass: the super-category, if it says.
        word_embedding: `v*`, `(1, d_word)`.
        target_input: `i*`, `(d,)`.
        c_inv: `C⁻¹`, `(d, d)`.
        outputs: `o*_V`, `(d_out,)` for each layer by its module name.
        lost: what else it holds that a concept does not.
    """

    source: str
    superclass: str | None
    word_embedding: Tensor
    target_input: Tensor
    c_inv: Tensor
    outputs: dict[str, Tensor]
    lost: str


def read_ckpt(path: Path, pipeline: Any, placeholder_token: str, superclass: str | None) -> PerfusionConcept:
    """As `PerfusionConcept.from_ckpt`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a checkpoint of {CHENDARYEN} or {LUCIDRAINS}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; such a checkpoint has at most {MAX_FILE_BYTES}")
    if (family := family_of(pipeline).name) != "Stable Diffusion":
        raise ValueError(f"checkpoints of {CHENDARYEN} and {LUCIDRAINS} are of Stable Diffusion 1 and 2, not {family}")
    model, texts = edited_model(pipeline), text_encoders(pipeline)
    widths = {name: layer.inner_kv_dim for name, layer in cross_attention_layers(model).items()}
    try:
        with torch.serialization.safe_globals([nn.ParameterDict]):
            held = torch.load(path, map_location="cpu", weights_only=True)
        learned = _chendaryen(held, widths) if "target_output" in held else _lucidrains(held, widths)
        (word_embedding,) = learned.word_embedding.detach().float()
        inverse = (learned.c_inv.double() @ learned.target_input.double()).float()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is broken, or holds more than tensors, which could run code; not read") from error
    except Exception as error:  # each kind of damage has an error of its own
        raise ValueError(f"{path} is no whole checkpoint of one concept by a known author: {error!r:.300}") from error
    if (superclass := superclass or learned.superclass) is None:
        raise ValueError(f"a checkpoint of {learned.source} does not say its super-category; name it with superclass=")
    concept = PerfusionConcept(
        placeholder_token=placeholder_token,
        superclass=superclass,
        word_embedding=word_embedding,
        target_input=learned.target_input.float(),
        inverse_target_input=inverse,
        superclass_input=superclass_input(texts, superclass).float().cpu(),
        target_outputs={name: output.detach().float() for name, output in learned.outputs.items()},
        base_model=getattr(model, "name_or_path", "") or "",
        training={"converted_from": learned.source},
        **_SETTINGS,
    )
    check_concept_fits(concept, model)
    logger.warning(f"{path} is of {learned.source}: {learned.lost}.")
    return concept


def _chendaryen(held: Mapping[str, Any], widths: Mapping[str, int]) -> _Learned:
    """A `.ckpt` with an output for each text position, under the names of the original Stable Diffusion."""
    values = {name: output for name, output in held["target_output"].items() if "attn2.to_v" in name}
    weights = torch.tensor([float(count) for count in _TRAINED_AT.values()])
    weights /= weights.sum()
    outputs, spread = {}, []
    for name, original in zip(_in_order(widths), _in_order(values), strict=True):
        rows = values[original][list(_TRAINED_AT)].float()
        outputs[name] = weights @ rows
        spread.append((rows - outputs[name]).norm(dim=-1) @ weights / outputs[name].norm())
    embedding = held["embedding"]
    vectors = embedding["string_to_param"]
    (word_embedding,) = (vars(vectors)["_parameters"] if isinstance(vectors, nn.Module) else vectors).values()
    return _Learned(
        CHENDARYEN,
        (embedding["initializer_words"] or [None])[0],
        word_embedding,
        held["target_input"],
        held["C_inv"],
        outputs,
        f"its values differ by {torch.stack(spread).mean():.0%} between the text positions that it was trained at, of "
        "which the mean is taken, and its keys are locked to the super-category anew",
    )


def _lucidrains(held: Mapping[str, Any], widths: Mapping[str, int]) -> _Learned:
    """Inputs and outputs of every edited projection, in the order of the modules and without their names."""
    inputs, outputs = zip(*held["key_value_params"], strict=True)
    if len(outputs) != 2 * len(widths):
        raise ValueError(f"{len(outputs)} projections for the keys and values of {len(widths)} layers")
    values = [output for (output,) in outputs[1::2]]
    # Stable Diffusion's own module has its layers in another order than that of diffusers.
    for order in (_in_order(widths), list(widths)):
        if [len(value) for value in values] == [widths[name] for name in order]:
            return _Learned(
                LUCIDRAINS,
                None,
                held["embed_params"],
                inputs[0][0],
                held["C_inv"],
                dict(zip(order, values, strict=True)),
                "its keys are locked to the super-category anew",
            )
    raise ValueError(f"values of widths {[len(value) for value in values]} are not of layers {widths}")


def _in_order(names: Iterable[str]) -> list[str]:
    """Names of layers from the input of a UNet to its output, as diffusers or the original has them."""

    def place(name: str) -> tuple[int, list[int]]:
        (stage,) = (number for number, starts in enumerate(_STAGES) if name.startswith(starts))
        return stage, [int(number) for number in re.findall(r"\d+", name)]

    return sorted(names, key=place)
