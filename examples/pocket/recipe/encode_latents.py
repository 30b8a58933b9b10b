"""Encode the scenes with the VAE, once for all steps of a base model.

    python examples/pocket/recipe/encode_latents.py --data_dir data --vae pocket/vae

Writes `latents.npy`, `(count, channels, 16, 16)` scaled, in fp16, into the data folder.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from files import save_array
from tqdm import trange
from train_vae import to_input

BATCH = 100


@torch.no_grad()
def main(args=None):
    """Encode them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What scenes.py wrote.")
    parser.add_argument("--vae", required=True)
    arguments = parser.parse_args(args)

    images = np.load(arguments.data_dir / "scenes.npy", mmap_mode="r")
    vae = AutoencoderTiny.from_pretrained(arguments.vae).float().to(memory_format=torch.channels_last)
    latents = []
    for start in trange(0, len(images), BATCH, mininterval=10):
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(to_input(images[start : start + BATCH])).latents
        latents.append((encoded.float() * vae.config.scaling_factor).half().numpy())
    save_array(arguments.data_dir / "latents.npy", np.concatenate(latents))


if __name__ == "__main__":
    main()
