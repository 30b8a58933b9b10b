"""Train a tokenizer on the captions: byte-level BPE in CLIP's format, or words and characters in T5's.

python examples/pocket/recipe/train_tokenizer.py --data_dir data --output_dir pocket/tokenizer
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

from files import finished
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

LENGTH = 32  # of the pocket model
END_OF_WORD = "</w>"
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_clip(captions):
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


def train_t5(captions):
    """Count words: a unigram model with a piece for each word of the captions, and for each character."""
    counts = Counter(word for caption in captions for word in caption.lower().split())
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"\u2581{word}", math.log(count / counts.total())) for word, count in sorted(counts.items())]
    # Less likely than any word, so that a word is split only if it is unknown.
    pieces += [(character, -20.0) for character in ("\u2581", *map(chr, range(33, 127)))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def main(args=None):
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="What scenes.py wrote.")
    parser.add_argument("--format", choices=["clip", "t5"], default="clip")
    parser.add_argument("--length", type=int, default=LENGTH, help="Positions of the text encoder.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    captions = (arguments.data_dir / "captions.txt").read_text().splitlines()
    with finished(arguments.output_dir) as folder:
        folder.mkdir()
        if arguments.format == "t5":
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=train_t5(captions),
                model_max_length=arguments.length,
                pad_token="<pad>",
                eos_token="</s>",
                unk_token="<unk>",
            )
        else:
            vocabulary, merges = train_clip(captions)
            (folder / "vocab.json").write_text(json.dumps(vocabulary))
            lines = ("#version: 0.2", *map(" ".join, merges))
            (folder / "merges.txt").write_text("".join(f"{line}\n" for line in lines))
            (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": arguments.length}))
            tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{arguments.output_dir}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
