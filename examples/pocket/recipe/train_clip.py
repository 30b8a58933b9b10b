"""Train the pocket CLIP on scenes, against other scenes and captions with one word changed.

    python examples/pocket/recipe/train_clip.py --data_dir evaluators-data --tokenizer examples/pocket/tokenizer \
        --output_dir examples/pocket/evaluators/clip
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
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from vision import PATCH, SIDE, augment, image_processor_settings, prepare, transformer


def new_model(tokenizer):
    """A small CLIP for the images and captions of the pocket world."""
    text = {
        **transformer(width=128, layers=2),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**transformer(width=160, layers=5), "image_size": SIDE, "patch_size": PATCH}
    return prepare(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)))


class Captions:
    """The captions of a set of scenes as token ids, and those with one word changed."""

    def __init__(self, path, tokenizer):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        self.tokenizer = tokenizer
        self.true = self.tokenize([line["caption"] for line in lines])
        changed = [caption for line in lines for caption in line["changed"].values()]
        self.changed = self.tokenize(changed)
        self.count = torch.tensor([len(line["changed"]) for line in lines])
        self.first = self.count.cumsum(0) - self.count

    def tokenize(self, captions):
        """Token ids, padded to the longest that a model takes."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True).input_ids
        return torch.tensor(ids, dtype=torch.int16)

    def batch(self, rows):
        """The captions of some scenes, and behind them one of each scene with a word changed: `(2 * rows, length)`."""
        chosen = self.first[rows] + (torch.rand(len(rows)) * self.count[rows]).long()
        ids = torch.cat([self.true[rows], self.changed[chosen]]).long()
        longest = (ids != self.tokenizer.eos_token_id).sum(1).max() + 1
        return ids[:, :longest]


def contrastive_loss(logits, ids):
    """Cross-entropy of images against captions, true and changed, and of true captions against images.

    Args:
        logits: `(batch, 2 * batch)`, of images and captions; the first half of the captions are the images' own.
        ids: token ids of the captions.
    """
    batch = len(logits)
    own = torch.arange(batch)
    same = (ids[:batch, None] == ids[None]).all(-1)
    same[own, own] = False
    logits = logits.masked_fill(same, -torch.inf)  # the same words for another image are not wrong
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :batch].T, own)) / 2


def main(args=None):
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What evaluator_scenes.py wrote.")
    parser.add_argument("--tokenizer", required=True, help="Folder of the pocket tokenizer.")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--pairs", type=int, default=64, help="Pairs of scenes in a batch.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    torch.manual_seed(arguments.seed)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.tokenizer)
    images = np.load(arguments.data_dir / "clip.npy", mmap_mode="r")
    captions = Captions(arguments.data_dir / "clip.jsonl", tokenizer)
    model = new_model(tokenizer)
    optimiser = Optimiser(model, steps=arguments.steps)
    progress = trange(arguments.steps, mininterval=10)
    for _ in progress:
        pairs = torch.randint(len(images) // 2, (arguments.pairs,))
        rows = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten()
        ids = captions.batch(rows)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, augment(images[rows.numpy()])).logits_per_image
        loss = contrastive_loss(logits.float(), ids)
        optimiser.step(loss)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    with finished(arguments.output_dir) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(**image_processor_settings(), crop_size=SIDE).save_pretrained(folder)


if __name__ == "__main__":
    main()
