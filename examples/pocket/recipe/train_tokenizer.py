"""Train the pocket tokenizer on the captions: byte-level BPE in CLIP's format.

python examples/pocket/recipe/train_tokenizer.py --data_dir data --output_dir pocket/tokenizer
"""

import argparse
import json
from pathlib import Path

from files import finished
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

LENGTH = 32
END_OF_WORD = "</w>"
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train(captions):
    """Learn byte-level BPE on words as CLIP splits them.

    Returns:
        The vocabulary, from tokens to ids, in which every byte is, so that any string can be encoded; and the merges.
    """
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=END_OF_WORD,
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary = learnt["vocab"]
    ends = [byte + end for byte in alphabet for end in ("", END_OF_WORD)]
    for token in (*ends, "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(token, len(vocabulary))
    return vocabulary, learnt["merges"]


def main(args=None):
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What scenes.py wrote.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    vocabulary, merges = train((arguments.data_dir / "captions.txt").read_text().splitlines())
    with finished(arguments.output_dir) as folder:
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, merges))))
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH}))
        CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    print(f"{arguments.output_dir}: {len(vocabulary)} tokens")


if __name__ == "__main__":
    main()
