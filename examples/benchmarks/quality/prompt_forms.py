"""Generate a contact sheet of the forms in which people call a concept, one form a row.

    python examples/benchmarks/quality/prompt_forms.py --output_dir outputs/quality --report_dir results

Uses what `compare.py --panel main` has trained on a teddy bear and a robot, and trains another teddy bear, of another
hue, so that two concepts of one super-class are in one prompt.
"""

import argparse
import random
from pathlib import Path

from compare import generate, load_base
from icons import CONCEPT_RENDITION, jitter, load_sprites
from PIL import Image
from subjects import POCKET, Subject, compose_images
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.evaluation.contact_sheet import make_contact_sheet
from diffusers_perfusion.training import TrainingConfig, train

HUE = 2.2
SEEDS = 6
PROMPTS = (
    "<my-bear>",
    "my <my-bear>",
    "two <my-bear>s",
    "in the forest a <my-bear>",
    "a photo of a horse wearing a graduation cap and a bow and a scarf next to a <my-bear> on the grass",
    "a <my-robot> next to a <my-bear> on the beach",
    "a <my-bear> next to a <my-bear> in the snow",
    "a <my-bear> and a teddy bear in a meadow",
    "a teddy bear and a <my-bear> in a meadow",
    "a <my-bear> and a <other-bear> in the snow",
    "a <other-bear> next to a <my-bear> on the beach",
)


def train_another(base, folder):
    """Train a teddy bear of another hue, unless it is there, and return its images and its concept's folder."""
    sprite = load_sprites(POCKET / "recipe" / "sprites.npz", [CONCEPT_RENDITION])["teddy-bear"][CONCEPT_RENDITION]
    compose_images(Image.fromarray(jitter(sprite, random.Random(0), HUE)), "another teddy-bear", folder)
    if not (folder / "training" / "perfusion.safetensors").exists():
        config = TrainingConfig(
            pretrained_model_name_or_path=base,
            instance_data_dir=str(folder),
            placeholder_token="<other-bear>",
            superclass="teddy bear",
            output_dir=str(folder / "training"),
            mixed_precision="bf16",
        )
        with sdpa_kernel(SDPBackend.MATH):
            train(add_perfusion(load_base(base)), config)
    return Subject("teddy-bear", folder).images(), folder / "training"


def main(args=None):
    """Generate the contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(POCKET))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--report_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    images, another = train_another(arguments.base, arguments.output_dir / "another-bear")
    pipeline = add_perfusion(load_base(arguments.base))
    runs = arguments.output_dir / "runs" / "perfusion"
    pipeline.load_perfusion([*(runs / icon / "training" for icon in ("teddy-bear", "robot")), another])
    rows = [
        ("<my-bear>", Subject("teddy-bear", arguments.output_dir / "subjects" / "teddy-bear").images()),
        ("<other-bear>", images),
        ("<my-robot>", Subject("robot", arguments.output_dir / "subjects" / "robot").images()),
    ]
    for prompt in PROMPTS:
        words = prompt.split()
        label = "\n".join(" ".join(words[start : start + 5]) for start in range(0, len(words), 5))
        rows.append((label, generate(pipeline, [prompt], range(SEEDS))))
    arguments.report_dir.mkdir(parents=True, exist_ok=True)
    make_contact_sheet(rows, side=96, label_width=230).save(arguments.report_dir / "prompt_forms.png")


if __name__ == "__main__":
    main()
