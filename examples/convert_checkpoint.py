"""Convert a checkpoint of another implementation of Perfusion into a concept file.

    python examples/convert_checkpoint.py last.ckpt \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --placeholder_token "<my-cat>" --superclass cat --output my-cat/perfusion.safetensors

The checkpoints of ChenDarYen (`.ckpt`) and of `perfusion-pytorch` are known, both for Stable Diffusion 1 and 2. They
are pickles, read with `weights_only=True`, so no code in them can run. What the conversion loses is printed.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.attention_processor import check_concept_fits
from diffusers_perfusion.concept_file import check_token_and_superclass
from diffusers_perfusion.model_families import edited_model, family_of
from diffusers_perfusion.training.superclass import superclass_input
from diffusers_perfusion.training.tensor_files import read_tensors

CHENDARYEN = "ChenDarYen/Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization"
LUCIDRAINS = "lucidrains/perfusion-pytorch"

# A checkpoint with nothing but one concept is far smaller.
MAX_BYTES = 64 * 2**20

# The token positions of the placeholder token in the prompts that ChenDarYen trains with, and how many of the nine
# prompts have it there.
TRAINED_AT = {2: 1, 4: 4, 5: 2, 6: 2}

# How the names of attention layers begin in diffusers and in the original, from the input of a UNet to its output.
STAGES = (("down_", "input_"), ("mid_", "middle_"), ("up_", "output_"))

# The settings that both implementations generate with.
SETTINGS: dict[str, Any] = {"bias": 0.7, "temperature": 0.15}


class Contents(NamedTuple):
    """Contents of a checkpoint: author, super-class if any, v*, i*, C⁻¹, o*_V by layer, and what a concept loses.

    All tensors are float32 and have the shapes that the model expects.
    """

    author: str
    superclass: str | None
    token_embedding: Tensor
    target_input: Tensor
    c_inv: Tensor
    outputs: dict[str, Tensor]
    lost: str


def convert(path: Path, pipeline: Any, placeholder_token: str, superclass: str | None) -> tuple[PerfusionConcept, str]:
    """Return the concept in a checkpoint, and a sentence on what of the checkpoint is lost.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of one concept by a known author, belongs to another model, or neither it
            nor the caller names the super-class.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a checkpoint of {CHENDARYEN} or {LUCIDRAINS}")
    model, family = edited_model(pipeline), family_of(pipeline)
    if family.name != "Stable Diffusion":
        raise ValueError(f"{path} is converted for Stable Diffusion 1 or 2; the model given is {family.name}")
    (width,) = family.widths
    layers = {name: layer.inner_kv_dim for name, layer in family.layers.items()}
    try:
        with torch.serialization.safe_globals([nn.ParameterDict]):
            state = read_tensors(path, MAX_BYTES)
        read = read_chendaryen if "target_output" in state else read_lucidrains
        contents = read(state, width, layers)
    except Exception as error:  # each kind of damage has an error of its own
        raise ValueError(
            f"{path} is not a whole checkpoint of one concept by a known author for such a model: {error!r:.300}"
        ) from error
    if (superclass := superclass or contents.superclass) is None:
        raise ValueError(f"{path} of {contents.author} does not name its super-class; give it with --superclass")
    check_token_and_superclass(placeholder_token, superclass)
    i_star, i_super = contents.target_input, superclass_input(family, superclass).float().cpu()
    concept = PerfusionConcept(
        placeholder_token=placeholder_token,
        superclass=superclass,
        token_embeddings=[contents.token_embedding],
        target_input=i_star,
        inverse_target_input=(contents.c_inv.double() @ i_star.double()).float(),
        superclass_input=i_super,
        inverse_superclass_input=(contents.c_inv.double() @ i_super.double()).float(),
        target_outputs=contents.outputs,
        base_model=getattr(model, "name_or_path", "") or "",
        training={"converted_from": contents.author},
        **SETTINGS,
    )
    check_concept_fits(concept, model, family.layer_widths)
    return concept, f"{path} is of {contents.author}: {contents.lost}."


def read_chendaryen(state: Mapping[str, Any], width: int, layers: Mapping[str, int]) -> Contents:
    """Read a `.ckpt` with an output for each token position, under the names of the original Stable Diffusion."""
    values = {name: output for name, output in state["target_output"].items() if "attn2.to_v" in name}
    weights = torch.tensor([float(count) for count in TRAINED_AT.values()])
    weights /= weights.sum()
    outputs, spread = {}, []
    for name, original in zip(in_order(layers), in_order(values), strict=True):
        rows = checked(values[original][list(TRAINED_AT)], len(TRAINED_AT), layers[name])
        outputs[name] = weights @ rows
        spread.append((rows - outputs[name]).norm(dim=-1) @ weights / outputs[name].norm())
    embedding = state["embedding"]
    vectors = embedding["string_to_param"]
    (token_embedding,) = (vars(vectors)["_parameters"] if isinstance(vectors, nn.Module) else vectors).values()
    superclass = (embedding["initializer_words"] or [None])[0]
    return Contents(
        CHENDARYEN,
        superclass if isinstance(superclass, str) else None,
        checked(token_embedding, 1, width)[0],
        checked(state["target_input"], width),
        checked(state["C_inv"], width, width),
        outputs,
        f"its values differ by {torch.stack(spread).mean():.0%} between the token positions that it was trained at, "
        "of which the mean is taken; its keys are locked, and its gate is set, to the super-class anew",
    )


def read_lucidrains(state: Mapping[str, Any], width: int, layers: Mapping[str, int]) -> Contents:
    """Read the inputs and outputs of every edited projection, in the order of the modules and without their names."""
    inputs, outputs = zip(*state["key_value_params"], strict=True)
    if len(outputs) != 2 * len(layers):
        raise ValueError(f"{len(outputs)} projections for the keys and values of {len(layers)} layers")
    values = outputs[1::2]
    # The UNet of the original Stable Diffusion has its layers in another order than that of diffusers.
    for order in (in_order(layers), list(layers)):
        if [value.shape[-1] for value in values] == [layers[name] for name in order]:
            return Contents(
                LUCIDRAINS,
                None,
                checked(state["embed_params"], 1, width)[0],
                checked(inputs[0], 1, width)[0],
                checked(state["C_inv"], width, width),
                {name: checked(value, 1, layers[name])[0] for name, value in zip(order, values, strict=True)},
                "its keys are locked, and its gate is set, to the super-class anew",
            )
    raise ValueError(f"values of widths {[value.shape[-1] for value in values]} do not fit layers {layers}")


def checked(value: Any, *shape: int) -> Tensor:
    """Return a tensor of a checkpoint in float32, if it has the shape that is expected.

    Only then is it copied: a stranger's tensor of a few bytes may have any shape.
    """
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        found = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{found} where numbers of the shape {shape} are expected")
    return value.detach().float()


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of attention layers, in diffusers or in the original, from the input of a UNet to its output."""

    def place(name: str) -> tuple[int, list[int]]:
        (stage,) = (number for number, starts in enumerate(STAGES) if name.startswith(starts))
        return stage, [int(number) for number in re.findall(r"\d+", name)]

    return sorted(names, key=place)


def main(args: list[str] | None = None) -> None:
    """Convert a checkpoint, and print what is lost and where the concept file is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="The checkpoint to convert.")
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="The base model that it was trained on."
    )
    parser.add_argument("--placeholder_token", required=True, help="The token that is to stand for the concept.")
    parser.add_argument("--superclass", help="The super-class in plain words; by default what the checkpoint names.")
    parser.add_argument("--output", type=Path, required=True, help="The concept file to write.")
    arguments = parser.parse_args(args)
    pipeline = DiffusionPipeline.from_pretrained(arguments.pretrained_model_name_or_path)
    try:
        concept, lost = convert(arguments.checkpoint, pipeline, arguments.placeholder_token, arguments.superclass)
        path = concept.save(arguments.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(lost)
    print(path)


if __name__ == "__main__":
    main()
