"""Put the parts together: an ordinary diffusers folder, in fp16 but for the text encoder.

    python examples/pocket/recipe/export.py --tokenizer pocket/tokenizer --vae pocket/vae --trained training \
        --output_dir pocket
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from files import finished
from train_unet import SCHEDULER
from transformers import CLIPTextModel, CLIPTokenizer


def main(args=None):
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--trained", required=True, help="What train_unet.py wrote.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(arguments.vae),
        text_encoder=CLIPTextModel.from_pretrained(arguments.trained, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(arguments.tokenizer),
        unet=UNet2DConditionModel.from_pretrained(arguments.trained, subfolder="unet"),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    pipeline.text_encoder.float()  # transformers loads the type that is stored, and a CPU cannot use halves
    with finished(arguments.output_dir) as folder:
        pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main()
