"""Compare choices of the tokens that enter C: print the paper's mean gate at each kind of token in 50 prompts.

    python examples/benchmarks/covariance_tokens.py --pretrained_model_name_or_path examples/pocket \
        --captions examples/pocket/captions.txt --superclass "teddy bear" robot chair mug

The target input is the super-class input, where every training starts. A good C opens the gate at the concept and
nowhere else.
"""

import argparse

import torch
from diffusers import StableDiffusionPipeline

from diffusers_perfusion.model_families import family_of
from diffusers_perfusion.training.covariance import invert, read_captions
from diffusers_perfusion.training.superclass import superclass_ids, superclass_input

PROMPTS = (
    "a {} on the beach",
    "a photo of a {} in space",
    "a {} wearing a top hat in the city",
    "a picture of a blue {} in the desert",
    "a {} and a cat in the snow",
    "a dog next to a {} in a room",
    "a {} on top of a car in a meadow",
    "a black and white photo of a {} at night",
    "a {}",
    "pixel art of a {} under water",
    "a red {} at sunset",
    "an image of a {} in the forest",
    "a cat on top of a {} in the woods",
)
KINDS = ("BOS", "before", "colour before", "concept", "next token", "later", "EOS", "padding", "no concept")
BIAS, TEMPERATURE = 0.6, 0.15


def kinds_of(ids, superclass_tokens, tokenizer):
    """Return an index into `KINDS` for each position of a tokenized prompt."""
    row = ids.tolist()
    end = row.index(tokenizer.eos_token_id)
    starts = [i for i in range(end) if row[i : i + len(superclass_tokens)] == superclass_tokens]
    if not starts:
        return [KINDS.index("no concept")] * len(row)
    colours = {token for name in ("blue", "red") for token in superclass_ids(tokenizer, name)}
    last = starts[0] + len(superclass_tokens) - 1
    kinds = []
    for i, token in enumerate(row):
        if i == 0:
            kind = "BOS"
        elif i < starts[0]:
            kind = "colour before" if token in colours else "before"
        elif i <= last:
            kind = "concept"
        elif i < end:
            kind = "next token" if i == last + 1 else "later"
        else:
            kind = "EOS" if i == end else "padding"
        kinds.append(KINDS.index(kind))
    return kinds


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--superclass", nargs="+", required=True)
    parser.add_argument("--max_captions", type=int, default=3000)
    arguments = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.pretrained_model_name_or_path, safety_checker=None)
    pipeline.text_encoder.float()
    tokenizer, family = pipeline.tokenizer, family_of(pipeline)
    (ids,) = family.tokenize(read_captions(arguments.captions)[: arguments.max_captions])
    inputs = torch.cat([family.encode([part]).inputs for part in ids.split(250)])
    bos, eos = ids == tokenizer.bos_token_id, (ids == tokenizer.eos_token_id).cumsum(-1) == 1
    eos &= ids == tokenizer.eos_token_id
    padding = ((ids == tokenizer.eos_token_id).cumsum(-1) > 0) & ~eos
    choices = {
        "prompt tokens": ~bos & ~eos & ~padding,
        "prompt tokens, EOS": ~bos & ~padding,
        "prompt tokens, BOS, EOS": ~padding,
        "all, padding too": torch.ones_like(bos),
    }

    print(f"mean gate at bias {BIAS}, temperature {TEMPERATURE}\n")
    print("| tokens in C | condition number | " + " | ".join(KINDS) + " |")
    print("|---|---|" + "---|" * len(KINDS))
    prompts = [p.format(s) for s in arguments.superclass for p in PROMPTS][:50]
    for choice, chosen in choices.items():
        tokens = inputs[chosen].double()
        covariance = tokens.T @ tokens / len(tokens)
        inverse = invert(covariance)
        gates, kinds = [], []
        for superclass in arguments.superclass:
            i_super = superclass_input(family, superclass).double()
            (prompt_ids,) = family.tokenize(prompts)
            e = family.encode([prompt_ids]).inputs.double()
            similarity = e @ inverse @ i_super / (i_super @ inverse @ i_super)
            gates.append(torch.sigmoid((similarity - BIAS) / TEMPERATURE))
            superclass_tokens = superclass_ids(tokenizer, superclass)
            kinds.append(torch.tensor([kinds_of(row, superclass_tokens, tokenizer) for row in prompt_ids]))
        gate, kind = torch.cat(gates), torch.cat(kinds)
        means = " | ".join(f"{gate[kind == k].mean():.3f}" for k in range(len(KINDS)))
        print(f"| {choice} | {torch.linalg.cond(covariance):.0e} | {means} |")


if __name__ == "__main__":
    main()
