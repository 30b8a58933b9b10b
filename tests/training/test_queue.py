"""Tables of fits, and processes that share them."""

import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import random_concept
from filelock import FileLock

from diffusers_perfusion.training import FitConfig, fit, fit_many
from diffusers_perfusion.training.queue import LOCK, _leave_the_others, read_queue

FILE = "perfusion.safetensors"


@pytest.fixture
def table(tmp_path):
    """Write a table."""

    def write(*lines):
        path = tmp_path / "concepts.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


# The table


def test_cells_are_the_settings_in_which_fits_differ(table):
    path = table(
        "placeholder_token, superclass, instance_data_dir, seed, value_learning_rate, random_flip, select_by",
        '<my-cat>, cat, "cats, mine", 3, 0.5, False, text',
        "<My dog's>, big dog, dogs,,,,".replace("My dog's", "My-dog"),
    )
    common = {"pretrained_model_name_or_path": "tiny", "output_dir": "out", "seed": 1, "max_train_steps": 7}
    first, second = read_queue(path, common)
    assert asdict(first) == asdict(
        FitConfig(
            "tiny",
            "cats, mine",
            "<my-cat>",
            "cat",
            output_dir=str(Path("out/my-cat")),
            max_train_steps=7,
            seed=3,
            value_learning_rate=0.5,
            random_flip=False,
            select_by="text",
        )
    )
    assert (second.superclass, second.seed, second.random_flip, second.select_by) == ("big dog", 1, True, None)
    assert second.output_dir == str(Path("out/My-dog"))


def test_columns_may_name_folders_and_prompts(table):
    path = table("instance_data_dir,output_dir,validation_prompt", "one,a/b,a <my-cat>", "two,c,")
    common = {"pretrained_model_name_or_path": "tiny", "placeholder_token": "<my-cat>", "superclass": "cat"}
    first, second = read_queue(path, common)
    assert first.output_dir == str(Path("perfusion-concept/a/b")) and first.validation_prompt == ["a <my-cat>"]
    assert second.output_dir == str(Path("perfusion-concept/c")) and second.validation_prompt == []


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["placeholder_token,colour", "<a>,red"], r"column 'colour'; expected settings"),
        (["placeholder_token,mixed_precision", "<a>,bf16"], r"column 'mixed_precision'; .* but for .*mixed_precision"),
        (["placeholder_token,instance_data_dir", "<a>,x", "<b>,"], r"line 3 of .*: no instance_data_dir"),
        (["placeholder_token,instance_data_dir", "<a>,x", "<b>"], r"line 3 of .*: expected 2 cells"),
        (["placeholder_token,instance_data_dir", "<a>,x,y"], r"line 2 of .*: expected 2 cells"),
        (
            ["placeholder_token,instance_data_dir", "<a>,x", "a,x"],
            r"line 3 .* another concept goes to .*a already",
        ),
        (["placeholder_token,instance_data_dir,seed", "<a>,x,one"], r"line 2 of .*: seed is 'one'; expected int"),
        (
            ["placeholder_token,instance_data_dir,random_flip", "<a>,x,1"],
            r"line 2 of .*: random_flip is '1'; expected true",
        ),
        (["placeholder_token,instance_data_dir,seed", "<a>,x,-1"], r"line 2 of .*: seed is -1"),
        (["placeholder_token,instance_data_dir", "<*>,x"], r"line 2 of .*: <\*> gives no name of a folder"),
        (
            ["placeholder_token,output_dir,instance_data_dir", "<a>,a,x", "<b>,b/../a,x"],
            r"line 3 .* goes to .*a already",
        ),
        (["placeholder_token,hub_model_id,instance_data_dir", "<a>,m,x", "<b>,m,x"], r"line 3 .* goes to m already"),
        (["placeholder_token,resume_from_checkpoint", "<a>,latest"], r"resume_from_checkpoint is not for a queue"),
        (["placeholder_token"], r"has no line below its first one"),
        ([""], r"has no line below its first one"),
    ],
)
def test_tables_that_cannot_be_read(table, lines, match):
    with pytest.raises(ValueError, match=match):
        read_queue(table(*lines), {"pretrained_model_name_or_path": "tiny", "superclass": "cat"})


# The queue


@pytest.fixture
def configs(fit_settings, tmp_path):
    """Two short fits."""
    return [
        FitConfig(
            **fit_settings
            | {"placeholder_token": word, "output_dir": str(tmp_path / "queue" / word[1:-1]), "checkpointing_steps": 2}
        )
        for word in ("<my-cat>", "<my-dog>")
    ]


def files(configs):
    return [Path(config.output_dir) / FILE for config in configs]


def test_fits_of_a_queue_are_those_done_alone_even_if_it_is_killed(pipeline, configs, fit_settings, stop, tmp_path):
    alone = []
    for config in configs:
        settings = asdict(config) | {"output_dir": str(tmp_path / "alone")}
        fit(pipeline, FitConfig(**settings))
        alone.append((tmp_path / "alone" / FILE).read_bytes())
    stop(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fit_many(pipeline, configs)
    assert [path.exists() for path in files(configs)] == [False, False]
    assert (Path(configs[0].output_dir) / "checkpoint-2").exists()
    fit_many(pipeline, configs)
    assert [path.read_bytes() for path in files(configs)] == alone
    times = [path.stat().st_mtime_ns for path in files(configs)]
    fit_many(pipeline, configs)
    assert [path.stat().st_mtime_ns for path in files(configs)] == times


def test_a_model_that_an_earlier_fit_has_rounded_learns_the_same(pipeline, configs):
    config = replace(configs[0], mask="attention", mixed_precision="bf16")
    written = []
    for _ in range(2):
        fit(pipeline, config)
        written.append(files([config])[0].read_bytes())
    assert written[0] == written[1]


def test_one_that_fails_does_not_keep_the_others(pipeline, configs, stop, caplog):
    stop(1, RuntimeError("the loss of step 2 is nan"))
    with pytest.raises(
        RuntimeError, match=r"1 of 2 concepts could not be fitted or shared: .*my-cat \(the loss of step 2 is"
    ):
        fit_many(pipeline, configs)
    assert [path.exists() for path in files(configs)] == [False, True]
    assert "the loss of step 2 is nan" in caplog.text
    fit_many(pipeline, configs)
    assert all(path.exists() for path in files(configs))


@pytest.mark.parametrize("succeeds", [True, False])
def test_what_another_process_is_at_is_left_to_it_and_waited_for(pipeline, configs, monkeypatch, succeeds):
    fitted, errors, second = [], [], threading.Event()
    concept = random_concept(pipeline)

    def quick(pipeline, config):
        fitted.append(config.placeholder_token)
        concept.save(Path(config.output_dir) / FILE)
        second.set()

    def work():
        try:
            fit_many(pipeline, configs)
        except RuntimeError as error:
            errors.append(str(error))

    monkeypatch.setattr("diffusers_perfusion.training.queue.fit", quick)
    first, _ = files(configs)
    first.parent.mkdir(parents=True)
    worker = threading.Thread(target=work)
    with FileLock(first.parent / LOCK):
        worker.start()
        assert second.wait(60)
        if succeeds:
            concept.save(first)
        assert worker.is_alive()
    worker.join(60)
    assert fitted == ["<my-dog>"]
    assert errors == [] if succeeds else "failed in another process" in errors[0]


def test_a_launched_process_stands_alone(monkeypatch, fresh_accelerate):
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8", "HOME": "here"})
    _leave_the_others()
    assert os.environ == {"HOME": "here"}
    PartialState(cpu=True).num_processes = 8  # which all its instances share
    with pytest.raises(RuntimeError, match="accelerate has joined the processes already"):
        _leave_the_others()


def test_processes_share_a_queue(pipeline, configs, table, fit_settings, model_folder, environment, tmp_path):
    for config in configs:
        config.pretrained_model_name_or_path = str(model_folder)
    fit_many(pipeline, configs)
    queue = table("placeholder_token", "<my-cat>", "<my-dog>")
    common = fit_settings | {
        "pretrained_model_name_or_path": str(model_folder),
        "output_dir": str(tmp_path / "together"),
        "checkpointing_steps": 2,
    }
    del common["placeholder_token"]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    command = [sys.executable, *launch.split(), "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["-m", "diffusers_perfusion.cli", "fit-many", str(queue)]
    command += [text for name, value in common.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perfusion.safetensors") == 2  # one process speaks
    together = [tmp_path / "together" / name / FILE for name in ("my-cat", "my-dog")]
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in files(configs)]
