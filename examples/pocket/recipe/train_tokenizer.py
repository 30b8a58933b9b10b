"""Train the pocket tokenizer on the captions: byte-level BPE in CLIP's format.

python examples/pocket/recipe/train_tokenizer.py --data_dir data --output_dir pocket/tokenizer
"""

import argparse
import json
from pathlib import Path

from files import finished
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

LENGTH = 32


def train(captions):
    """A `CLIPTokenizer` that knows the words of some captions, and every byte, so that it can encode any string."""
    clip = CLIPTokenizer().backend_tokenizer
    suffix = "</w>"
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=suffix))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1500,
            min_frequency=2,
            initial_alphabet=alphabet,
            end_of_word_suffix=suffix,
            special_tokens=[],
            show_progress=False,
        ),
    )
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary = learnt["vocab"]
    ends = [byte + end for byte in sorted(alphabet) for end in ("", suffix)]
    for token in (*ends, "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=LENGTH)


def main(args=None):
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What scenes.py wrote.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    tokenizer = train((arguments.data_dir / "captions.txt").read_text().splitlines())
    with finished(arguments.output_dir) as folder:
        tokenizer.save_pretrained(folder)
    print(f"{arguments.output_dir}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
