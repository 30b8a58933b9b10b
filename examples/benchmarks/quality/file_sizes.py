"""Measure the bytes of a concept file and of LoRAs in float16, with the shapes of the pocket model and of SD 1.5.

python examples/benchmarks/quality/file_sizes.py --report_dir examples/benchmarks/quality/results
"""

import argparse
import json
from pathlib import Path

import torch
from baselines import PROJECTIONS
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from subjects import POCKET

from diffusers_perfusion.concept import PerfusionConcept
from diffusers_perfusion.concept_file import HEADER_KEY, VECTORS
from diffusers_perfusion.model_families import cross_attention_layers

RANKS = (4, 16)
# Of runwayml/stable-diffusion-v1-5; everything else is the default of the class.
SD_1_5 = {"sample_size": 64, "cross_attention_dim": 768}


def concept_bytes(unet, width):
    """Return the bytes of a concept with random numbers."""
    vectors = {name: torch.rand(width) for name in VECTORS}
    outputs = {name: torch.rand(layer.inner_kv_dim) for name, layer in cross_attention_layers(unet).items()}
    concept = PerfusionConcept(
        "<my-bear>", "teddy bear", [torch.rand(width)], **vectors, target_outputs=outputs, base_model="base"
    )
    tensors = concept.state_dict()
    return len(save(tensors, {HEADER_KEY: tensors.pop(HEADER_KEY)}))


def lora_bytes(unet, rank):
    """Return the bytes of a LoRA on all projections of all attention layers, as `baselines.lora` saves it."""
    unet.add_adapter(LoraConfig(r=rank, target_modules=PROJECTIONS), "sized")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name="sized"))
    unet.delete_adapters("sized")
    return len(save({f"unet.{name}": torch.zeros(t.shape, dtype=torch.float16) for name, t in layers.items()}))


def main(args=None):
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    configs = {"pocket": UNet2DConditionModel.load_config(POCKET / "unet"), "SD 1.5": SD_1_5}
    report = {}
    for name, config in configs.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        sizes = {"concept": concept_bytes(unet, unet.config.cross_attention_dim)}
        sizes |= {f"LoRA of rank {rank}": lora_bytes(unet, rank) for rank in RANKS}
        report[name] = sizes
        print(name, {key: f"{size:,} ({size / sizes['concept']:.1f})" for key, size in sizes.items()})
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    (arguments.report_dir / "file_sizes.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
