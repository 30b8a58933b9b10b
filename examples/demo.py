"""Train a concept on five images with the pocket model, then load it in a new process and make a contact sheet of it.

python examples/demo.py --concept teddy_bear --output_dir demo
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

NEXT = """
Next, in Python (`from diffusers_perfusion import PerfusionPipeline`), generate with the concept, then change its bias:
  pipe = PerfusionPipeline.from_pretrained("{base}"); pipe.load_perfusion("{folder}"); pipe("a {token}").images[0]
  pipe.set_perfusion(bias=1.0)  # higher is more like the prompt, lower more like the subject"""


def run(*command):
    """Run a Python program in a process of its own, and print it as a person would type it."""
    print("\n$", shlex.join(["python", *command]), flush=True)
    if status := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(status)  # the program has said why


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", choices=("teddy_bear", "robot", "chair", "mug"), default="teddy_bear")
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="Generate the contact sheet in few denoising steps.")
    arguments = parser.parse_args()

    base = str(HERE / "pocket")
    images = str(HERE / "data" / arguments.concept)
    folder = str(arguments.output_dir / arguments.concept)
    token = f"<my-{arguments.concept.split('_')[-1]}>"
    run(
        *("-m", "diffusers_perfusion.cli", "train"),
        *("--pretrained_model_name_or_path", base),
        *("--instance_data_dir", images),
        *("--placeholder_token", token),
        *("--superclass", arguments.concept.replace("_", " ")),
        *("--mask", "attention"),
        *("--max_train_steps", str(arguments.max_train_steps)),
        *("--output_dir", folder),
    )
    run(
        str(HERE / "contact_sheet.py"),
        *("--pretrained_model_name_or_path", base),
        *("--concept", folder),
        *("--instance_data_dir", images),
        *("--num_inference_steps", "4" if arguments.quick else "25"),
        *("--output", f"{folder}/sheet.png"),
    )
    print(NEXT.format(base=base, folder=folder, token=token))


if __name__ == "__main__":
    main()
