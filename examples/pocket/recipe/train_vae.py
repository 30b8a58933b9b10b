"""Train a VAE on the scenes, an `AutoencoderTiny`: with f = 4 and 4 channels, or with f = 8 and 16 channels.

python examples/pocket/recipe/train_vae.py --data_dir data --output_dir pocket/vae
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from files import finished
from optimiser import cosine
from tqdm import trange

CROP = 64  # what is trained on of an image: it need not see all of it, and sees more images in the same time
LATENT_NOISE = 0.08  # in training, so that the decoder forgives a diffusion model its errors


def new_model(factor):
    """An autoencoder with no norms, which trains four times as fast as an `AutoencoderKL` of its quality.

    Args:
        factor: pixels to a latent, in each direction: 4 or 8.
    """
    if factor == 4:
        channels, width, encoder_blocks, decoder_blocks = 4, (32, 48), (1, 2, 3), (3, 2, 1)
    else:  # the blocks that see all pixels would take most of the time
        channels, width, encoder_blocks, decoder_blocks = 16, (64, 64), (0, 1, 2, 3), (3, 2, 1, 0)
    return AutoencoderTiny(
        encoder_block_out_channels=(width[0],) * len(encoder_blocks),
        decoder_block_out_channels=(width[1],) * len(decoder_blocks),
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
        latent_channels=channels,
        upsampling_scaling_factor=2,
    ).to(memory_format=torch.channels_last)


def to_input(images):
    """Images as bytes, `(batch, side, side, 3)`, to `(batch, 3, side, side)` in [-1, 1]."""
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def pyramid_loss(drawn, images):
    """Absolute error of pixels and of their differences to the neighbours, at three scales."""
    loss = torch.zeros(())
    for _ in range(3):
        error = drawn - images
        loss = loss + error.abs().mean() + (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
        drawn, images = F.avg_pool2d(drawn, 2), F.avg_pool2d(images, 2)
    return loss


def latent_penalty(latents):
    """Keeps each latent channel at mean 0 and deviation 1, and outliers small."""
    moments = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
    return 0.01 * moments + 0.002 * F.relu(latents.abs() - 2.5).square().mean()


def crops(images, batch):
    """Squares of random images, each at a random place: `(batch, CROP, CROP, 3)`."""
    rows = torch.randint(len(images), (batch,)).tolist()
    corners = torch.randint(images.shape[1] - CROP + 1, (batch, 2)).tolist()
    return np.stack([images[row, y : y + CROP, x : x + CROP] for row, (y, x) in zip(rows, corners, strict=True)])


def train(model, images, steps, batch, lr=2e-3):
    """Train on random crops of the scenes, every second batch mirrored.

    In every fourth batch, latents of half the size must give images of half the size: smoother latents are easier for
    a diffusion model (Skorokhodov et al. 2025, arXiv 2502.14831).
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1, (n + 1) / 200) * cosine(n / steps))
    progress = trange(steps, mininterval=10)
    for step in progress:
        x = to_input(crops(images, batch))
        if step % 2:
            x = x.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(x).latents
            given = latents
            if step % 4 == 3:
                given, x = F.avg_pool2d(latents, 2), F.avg_pool2d(x, 2)
            drawn = model.decode(given + LATENT_NOISE * torch.randn_like(given)).sample
        drawn, latents = drawn.float(), latents.float()
        loss = pyramid_loss(drawn, x) + F.mse_loss(drawn, x) + latent_penalty(latents)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def main(args=None):
    """Train, measure the scale of the latents, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What scenes.py wrote.")
    parser.add_argument("--factor", type=int, choices=[4, 8], default=4, help="Pixels to a latent, in each direction.")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    torch.manual_seed(arguments.seed)
    images = np.load(arguments.data_dir / "scenes.npy", mmap_mode="r")
    model = new_model(arguments.factor)
    train(model, images, arguments.steps, arguments.batch)
    with torch.no_grad():
        x = to_input(images[:256])
        latents = model.encode(x).latents
        error = (model.decode(latents).sample - x).square().mean((1, 2, 3))
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    print(f"PSNR {(10 * torch.log10(4 / error)).mean():.1f} dB, scaling factor {model.config.scaling_factor:.3f}")
    with finished(arguments.output_dir) as folder:
        model.save_pretrained(folder)


if __name__ == "__main__":
    main()
