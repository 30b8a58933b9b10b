"""Train a Perfusion concept: the training loop, to read and to change.

    accelerate launch examples/train_perfusion.py \
        --pretrained_model_name_or_path examples/pocket \
        --instance_data_dir examples/data/teddy_bear \
        --placeholder_token "<my-bear>" --superclass "teddy bear" \
        --output_dir my-bear

In full precision `perfusion train` gives the same concept, with checkpoints, validation, sharing and more settings.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_perfusion import add_perfusion
from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training import PerfusionTrainer, TrainingConfig
from diffusers_perfusion.training.covariance import cached_covariance, invert
from diffusers_perfusion.training.image_captions import training_prompt
from diffusers_perfusion.training.images import read_images, to_tensor
from diffusers_perfusion.training.masks import subject_masks
from diffusers_perfusion.training.output_folder import check_output_folder
from diffusers_perfusion.training.training_data import make_training_data


def parse_config():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True, help="Hub id or folder of the base model.")
    parser.add_argument("--instance_data_dir", required=True, help="Folder with about five images of the subject.")
    parser.add_argument("--placeholder_token", required=True, help="Token that calls the concept in a prompt.")
    parser.add_argument("--superclass", required=True, help="Super-class of the subject, such as 'teddy bear'.")
    parser.add_argument("--output_dir", default="perfusion-concept", help="Folder for the concept file.")
    parser.add_argument("--resolution", type=int, help="Side of the images in pixels; by default the base model's.")
    parser.add_argument("--mask", default="auto", help="Source of masks: auto, alpha, attention, clipseg or none.")
    parser.add_argument("--covariance", help="File with one caption per line; by default the base model's.")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--max_train_steps", type=int, default=100)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=5)
    parser.add_argument("--value_learning_rate", type=float, default=0.03)
    parser.add_argument("--embedding_learning_rate", type=float, default=0.006)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--seed", type=int, default=0)
    return TrainingConfig(**vars(parser.parse_args()))


def main():
    config = parse_config()
    check_output_folder(config)  # which may hold another concept
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision)

    # The base model is frozen: only the concept is trained.
    pipeline = add_perfusion(DiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path))
    family = family_of(pipeline)
    model = family.model
    for part in (pipeline.vae, *family.text_encoders, model):
        part.to(accelerator.device, torch.float32).requires_grad_(False).eval()

    # Images of the subject become latents, masks say where the subject is in them, and captions what else is.
    resolution = config.resolution or family.default_resolution
    images = read_images(config.instance_data_dir, resolution, seed=config.seed)
    masks, mask_source = subject_masks(
        config.mask, images, config.instance_data_dir, config.superclass, pipeline, config.seed
    )
    pixels = to_tensor([image.image for image in images])
    prompts = [
        image.caption and training_prompt(image.caption, config.placeholder_token, config.superclass)
        for image in images
    ]
    data = make_training_data(family, pipeline.vae, pixels, masks, config.random_flip, prompts)

    # The inverse of C, the second moment of encoder hidden states, is the metric of the gate's similarity. Concepts in
    # joint attention are known by the token's position alone.
    captions = Path(config.covariance or Path(config.pretrained_model_name_or_path) / "captions.txt")
    c_inv = None if family.joint else invert(cached_covariance(family, captions if captions.is_file() else None))

    # The text encoders stay in float32, because the metric depends on the last digits.
    if accelerator.mixed_precision != "no":
        model.to(torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16)

    # A step takes a batch by its number, adds noise, predicts with the concept edited in, and updates the concept.
    trainer = PerfusionTrainer(pipeline, config, accelerator, data, c_inv)
    progress = tqdm(range(config.max_train_steps), desc="Training", disable=not accelerator.is_local_main_process)
    for step in progress:
        loss = trainer.step(step)
        if step % 10 == 0:  # reading a loss waits for the accelerator
            progress.set_postfix(loss=f"{loss.item():.4f}")

    if accelerator.is_main_process:
        concept = trainer.trained_concept(
            config.max_train_steps,
            images=len(images),
            captions=len(images) - prompts.count(None),
            mask=mask_source,
            resolution=resolution,
        )
        path = concept.save(Path(config.output_dir) / "perfusion.safetensors")
        print(f"{path} ({path.stat().st_size:,} bytes): {concept.placeholder_token}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
