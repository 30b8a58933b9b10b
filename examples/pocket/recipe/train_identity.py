"""Train the pocket identity encoder: images of the same thing alike, of every other thing unlike.

    python examples/pocket/recipe/train_identity.py --data_dir evaluators-data \
        --output_dir examples/pocket/evaluators/identity

The loss is the cross-entropy of cosines to a learnt vector for each thing (Zhai and Wu 2019, arXiv 1811.12649), so
that the other renditions and looks of its noun are among the negatives at each step. Contrasting the images of a
batch with each other, as CLIP does, did not leave chance within 100 steps.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from files import finished
from optimiser import Optimiser
from tqdm import trange
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
from vision import PATCH, SIDE, augment, image_processor_settings, prepare, transformer

TEMPERATURE = 0.07


def new_model():
    """A small DINOv2 for the images of the pocket world."""
    settings = transformer(width=160, layers=5)
    ratio = settings.pop("intermediate_size") // settings["hidden_size"]
    return prepare(Dinov2Model(Dinov2Config(**settings, mlp_ratio=ratio, image_size=SIDE, patch_size=PATCH)))


def main(args=None):
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What evaluator_scenes.py wrote.")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    torch.manual_seed(arguments.seed)
    images = np.load(arguments.data_dir / "identity.npy", mmap_mode="r")
    things, views = images.shape[:2]
    model = new_model()
    # A thing's vector is that of its noun and one of its own: a noun's look is learnt from all its things at once.
    lines = (arguments.data_dir / "identity.jsonl").read_text().splitlines()
    icons, noun = np.unique([json.loads(line)["icon"] for line in lines], return_inverse=True)
    embeddings = {"noun_embeddings": len(icons), "own_embeddings": things}
    width = model.config.hidden_size
    proxies = torch.nn.ParameterDict({name: 0.02 * torch.randn(count, width) for name, count in embeddings.items()})
    optimiser = Optimiser(model, proxies, steps=arguments.steps)
    progress = trange(arguments.steps, mininterval=10)
    for _ in progress:
        chosen, view = torch.randint(things, (arguments.batch,)), torch.randint(views, (arguments.batch,))
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(augment(images[chosen.numpy(), view.numpy()])).last_hidden_state[:, 0]
        vectors = proxies["noun_embeddings"][noun] + proxies["own_embeddings"]
        cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(vectors, dim=-1).T
        loss = F.cross_entropy(cosines / TEMPERATURE, chosen)
        optimiser.step(loss)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    with finished(arguments.output_dir) as folder:
        model.half().save_pretrained(folder)
        BitImageProcessor(**image_processor_settings(), crop_size=SIDE).save_pretrained(folder)


if __name__ == "__main__":
    main()
