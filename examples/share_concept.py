"""An author trains a concept and shares it; a reader with nothing but its id generates the same image, bit for bit.

    python examples/share_concept.py --output_dir demo/share

The Hub is a server on this machine (`tests/hub_server.py`), so that no account is needed. With one, the commands below
work on the real Hub as they are printed.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def perfusion(*arguments, **environment):
    """Run `perfusion` in a process of its own, and show how a person would type it."""
    print("\n$", shlex.join(["perfusion", *arguments]), flush=True)
    command = [sys.executable, "-m", "diffusers_perfusion.cli", *arguments]
    subprocess.run(command, check=True, env={**os.environ, **environment})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo/share"))
    parser.add_argument("--max_train_steps", default="100")
    parser.add_argument("--num_inference_steps", default="25")
    parser.add_argument("--num_validation_images", default="4")
    parser.add_argument("--covariance", default=str(HERE / "pocket" / "captions.txt"))
    arguments = parser.parse_args()
    folder = arguments.output_dir
    prompt = "a <my-bear> on the beach"

    server = subprocess.Popen(
        [sys.executable, str(HERE.parent / "tests" / "hub_server.py"), f"me/pocket={HERE / 'pocket'}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        hub = {
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        # Two homes are two machines: neither sees what the other has downloaded, nor its token.
        author = hub | {"HF_HOME": str(folder / "author-home"), "HF_TOKEN": "hf_me"}
        reader = hub | {"HF_HOME": str(folder / "reader-home"), "HF_TOKEN": ""}
        perfusion(
            "train",
            *("--pretrained_model_name_or_path", "me/pocket"),
            *("--instance_data_dir", str(HERE / "data" / "teddy_bear")),
            *("--placeholder_token", "<my-bear>"),
            *("--superclass", "teddy bear"),
            *("--mask", "attention"),
            *("--covariance", arguments.covariance),
            *("--max_train_steps", arguments.max_train_steps),
            *("--validation_prompt", prompt),
            *("--validation_prompt", "a <my-bear> wearing a top hat"),
            *("--num_validation_images", arguments.num_validation_images),
            *("--output_dir", str(folder / "author")),
            "--push_to_hub",
            *("--hub_model_id", "me/my-bear"),
            **author,
        )
        generate = (
            "generate",
            *("--pretrained_model_name_or_path", "me/pocket"),
            *("--prompt", prompt),
            *("--num_inference_steps", arguments.num_inference_steps),
        )
        perfusion(*generate, "--output_dir", str(folder / "author"), "--concept", str(folder / "author"), **author)
        perfusion("search", "me/pocket", **reader)
        perfusion("info", "me/my-bear", **reader)
        # A copy of the whole repository, to look at.
        copy = "import sys, huggingface_hub as hub; hub.snapshot_download('me/my-bear', local_dir=sys.argv[1])"
        subprocess.run([sys.executable, "-c", copy, str(folder / "shared")], check=True, env={**os.environ, **reader})
        shared = ("--concept", "me/my-bear", "--output_dir")
        perfusion(*generate, *shared, str(folder / "reader"), **reader)
        perfusion(*generate, *shared, str(folder / "offline"), **reader | {"HF_HUB_OFFLINE": "1"})
    finally:
        server.communicate()

    images = [next((folder / who).glob("00-*.png")).read_bytes() for who in ("author", "reader", "offline")]
    if len(set(images)) > 1:
        sys.exit("The images differ.")
    print("\nThe author, the reader and the reader offline have generated the same image, bit for bit.")


if __name__ == "__main__":
    main()
