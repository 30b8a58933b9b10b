"""Put the parts together: an ordinary diffusers folder, in fp16 but for the text encoders.

    python examples/pocket/recipe/export.py --tokenizer pocket/tokenizer --vae pocket/vae --trained training \
        --output_dir pocket
"""

import argparse
from pathlib import Path

import torch
from bases import BASES
from diffusers import AutoencoderTiny
from files import finished


def main(args=None):
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--trained", required=True, help="What train_base.py wrote.")
    parser.add_argument("--base", choices=BASES, default="pocket", help="Its shape.")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(args)

    base = BASES[arguments.base]
    classes = {base.component: base.model_class, **base.text_encoder_classes}
    pipeline = base.pipeline(
        vae=AutoencoderTiny.from_pretrained(arguments.vae),
        **base.tokenizers(arguments.tokenizer),
        **{name: kind.from_pretrained(arguments.trained, subfolder=name) for name, kind in classes.items()},
    ).to(torch.float16)
    for name in base.text_encoder_classes:
        getattr(pipeline, name).float()  # transformers loads the type that is stored, and a CPU cannot use halves
    with finished(arguments.output_dir) as folder:
        pipeline.save_pretrained(folder)


if __name__ == "__main__":
    main()
