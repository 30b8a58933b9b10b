"""Killed trainings end in the same bytes, and leave no part of a file."""

import subprocess
import sys
from pathlib import Path


def test_trainings_that_are_killed_at_their_calls_end_in_the_same_bytes(model_folder, environment):
    script = Path(__file__).with_name("kills.py")
    # Around the first time that an old checkpoint is deleted.
    command = [sys.executable, script, "--first", "25", "--cases", "8", "--moments", "calls"]
    command += ["--pretrained_model_name_or_path", model_folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == "8 resumed to the same bytes".split()
