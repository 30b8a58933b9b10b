"""Fit a concept to five pictures on the pocket model, then load it in a new process and draw a contact sheet of it.

python examples/demo.py --concept teddy_bear --output_dir demo
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(*command):
    """Run a Python program in a process of its own, and show how a person would type it."""
    print("\n$", shlex.join(["python", *command]), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", choices=("teddy_bear", "robot", "chair", "mug"), default="teddy_bear")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=250)
    parser.add_argument("--quick", action="store_true", help="Draw the sheet in few denoising steps.")
    arguments = parser.parse_args()

    base = str(HERE / "pocket")
    pictures = str(HERE / "data" / arguments.concept)
    folder = str(arguments.output_dir / arguments.concept)
    run(
        *("-m", "diffusers_perfusion.cli", "fit"),
        *("--pretrained_model_name_or_path", base),
        *("--instance_data_dir", pictures),
        *("--placeholder_token", f"<my-{arguments.concept.split('_')[-1]}>"),
        *("--superclass", arguments.concept.replace("_", " ")),
        *("--mask", "attention"),
        *("--max_train_steps", str(arguments.max_train_steps)),
        *("--output_dir", folder),
    )
    run(
        str(HERE / "contact_sheet.py"),
        *("--pretrained_model_name_or_path", base),
        *("--concept", folder),
        *("--instance_data_dir", pictures),
        *("--num_inference_steps", "4" if arguments.quick else "25"),
        *("--output", f"{folder}/sheet.png"),
    )


if __name__ == "__main__":
    main()
