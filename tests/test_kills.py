"""Killed trainings end in the same bytes, and leave no part of a file."""

import subprocess
import sys
from pathlib import Path


def test_trainings_that_are_killed_at_their_calls_end_in_the_same_bytes(model_folder, environment):
    script = Path(__file__).with_name("kills.py")
    command = [sys.executable, script, "--cases", "10", "--moments", "calls"]
    command += ["--pretrained_model_name_or_path", model_folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == "10 resumed to the same bytes".split()
