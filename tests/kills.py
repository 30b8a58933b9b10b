"""Kill trainings, resume them to their end, and compare every file with those of a training that was left alone.

    python tests/kills.py --cases 1000

Each training is killed one to three times by SIGKILL: at a random moment, or before one of the calls that make, rename
and delete files. Its processes are forked from this one, which has loaded the base model.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from diffusers_perfusion.cli.quiet import silence_libraries
from diffusers_perfusion.training import TrainingConfig, covariance, train, validation

POCKET = Path(__file__).parents[1] / "examples" / "pocket"
STEPS = 4
CALLS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

UNHURT = "ended before it could be killed"
RESUMED = "resumed to the same bytes"


class Training:
    """A short training with checkpoints and validation images, in a folder of its own."""

    def __init__(self, pipeline, base, folder, total_limit):
        self.pipeline, self.folder, self.output = pipeline, folder, folder / "output"
        (folder / "images").mkdir(parents=True)
        Image.linear_gradient("L").resize((64, 64)).save(folder / "images" / "1.png")
        (folder / "captions.txt").write_text("a cat on the beach\na good photo of a dog\n")
        self.config = TrainingConfig(
            pretrained_model_name_or_path=str(base),
            instance_data_dir=str(folder / "images"),
            placeholder_token="<my-cat>",
            superclass="cat",
            output_dir=str(self.output),
            covariance=str(folder / "captions.txt"),
            mask="none",
            lr_scheduler="constant",
            train_batch_size=1,
            max_train_steps=STEPS,
            checkpointing_steps=1,
            checkpoints_total_limit=total_limit,
            validation_prompt=["a <my-cat>"],
            validation_steps=2,
            num_validation_images=1,
            resume_from_checkpoint="latest",
        )

    def start(self, kill_before=None):
        """Train in a new process, which kills itself before one of its calls, and return the process's number."""
        if process := os.fork():
            return process
        status = 1
        try:
            with (self.folder / "log").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            tqdm.set_lock(threading.RLock())  # the first one is shared, and a killed process may hold it for ever
            calls = CallCounter(kill_before)
            sys.addaudithook(calls)
            covariance.HF_HOME, validation.INFERENCE_STEPS = str(self.folder / "cache"), 1
            train(self.pipeline, self.config)
            (self.folder / "calls").write_text(str(calls.count))
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)

    def files(self):
        """The files of the output folder, but for hidden ones."""
        paths = [path.relative_to(self.output) for path in self.output.rglob("*") if path.is_file()]
        hidden = [path for path in paths if any(part.startswith(".") for part in path.parts)]
        return {str(path): (self.output / path).read_bytes() for path in paths if path not in hidden}

    def left_over(self):
        """Hidden files in all folders, but for locks."""
        paths = [*self.output.rglob(".*"), *(self.folder / "cache").rglob(".*")]
        return [path.name for path in paths if path.name != ".lock"]


class CallCounter:
    """An audit hook that counts the calls that make, rename and delete files, and kills the process before one."""

    def __init__(self, kill_before):
        self.count, self.kill_before = 0, kill_before

    def __call__(self, event, arguments):
        if event in CALLS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if self.count == self.kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1


def kill_and_resume(training, case, expected, calls, seconds, moments):
    """Kill a training once or more, let it end, and return what became of it.

    Args:
        training: to be killed.
        case: its number, from which all moments follow; a first kill before a call is before the call of this number.
        expected: files of a training that was left alone.
        calls: that such a training makes.
        seconds: that it takes.
        moments: `calls`, `times` or both.
    """
    choose, kills = random.Random(case), 0
    for number in range(choose.randint(1, 3)):
        if choose.choice(moments) == "calls":
            process = training.start(kill_before=choose.randrange(calls) if number else case % calls)
        else:
            process = training.start()
            time.sleep(choose.uniform(0, seconds))
            os.kill(process, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        if wrong := wrong_files(training, expected):
            return f"after a kill: {wrong}"
    if os.waitpid(training.start(), 0)[1]:
        return f"not resumed: {(training.folder / 'log').read_text().splitlines()[-1]}"
    found = training.files()
    last = [name for name in expected if not name.startswith("checkpoint-") or f"-{STEPS}/" in name]
    if wrong := wrong_files(training, expected) or [name for name in last if name not in found]:
        return f"resumed to other files: {wrong}"
    if left := training.left_over():
        return f"left over: {left}"
    return RESUMED if kills else UNHURT


def wrong_files(training, expected):
    """Names of files that a training which was left alone has not, or has otherwise, and that checkpoints lack."""
    found = training.files()
    folders = {path.name for path in training.output.glob("checkpoint-*")}
    missing = [name for name in expected if name.partition("/")[0] in folders and name not in found]
    return [name for name, data in found.items() if expected.get(name) != data] + missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100, help="Trainings to kill.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first.")
    parser.add_argument("--moments", nargs="+", choices=("calls", "times"), default=["calls", "times"])
    parser.add_argument("--pretrained_model_name_or_path", default=POCKET, help="Folder of the base model.")
    arguments = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)  # a process with threads must not be forked
    tqdm.monitor_interval = 0
    base = arguments.pretrained_model_name_or_path
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        # The first keeps all checkpoints, and the second makes all calls.
        alone = [Training(pipeline, base, Path(folder) / f"alone-{limit}", limit) for limit in (None, 1)]
        for training in alone:
            start = time.monotonic()
            if os.waitpid(training.start(), 0)[1]:
                sys.exit((training.folder / "log").read_text())
            seconds = time.monotonic() - start
        expected, calls = alone[0].files(), int((alone[1].folder / "calls").read_text())
        outcomes = Counter()
        for case in tqdm(range(arguments.first, arguments.first + arguments.cases), desc="Kills"):
            training = Training(pipeline, base, Path(folder) / str(case), 1)
            outcome = kill_and_resume(training, case, expected, calls, seconds, arguments.moments)
            if outcome not in (RESUMED, UNHURT):
                tqdm.write(f"case {case}: {outcome}")
            outcomes[outcome.partition(":")[0]] += 1
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    sys.exit(bool(outcomes.keys() - {RESUMED, UNHURT}))


if __name__ == "__main__":
    main()
