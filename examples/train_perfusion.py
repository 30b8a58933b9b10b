"""Fit a Perfusion concept, on one process or many.

    accelerate launch examples/train_perfusion.py \
        --pretrained_model_name_or_path examples/pocket \
        --instance_data_dir examples/data/teddy_bear \
        --placeholder_token "<my-bear>" --superclass "teddy bear" \
        --output_dir my-bear

The flags are those of `perfusion fit`; `--help` lists them. What a fit does is in `diffusers_perfusion.training`.
"""

import argparse

from diffusers_perfusion.cli import add_fit_arguments, fit

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_fit_arguments(parser)
    fit(**vars(parser.parse_args()))
