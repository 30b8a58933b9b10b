"""Tables of concepts, and processes that share them."""

import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors import SafetensorError
from test_validation import Album, Numbers

from diffusers_perfusion.training import (
    PerfusionTrainer,
    TrainingConfig,
    concepts_table,
    make_accelerator,
    train,
    train_concepts,
)
from diffusers_perfusion.training.concepts_table import SingleProcess, read_concepts_table

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


def test_cells_are_the_settings_in_which_concepts_differ(table):
    path = table(
        "placeholder_token, superclass, instance_data_dir, seed, value_learning_rate, random_flip",
        '<my-cat>, cat, "cats, mine", 3, 0.5, False',
        "<My-dog>, big dog, dogs,,,",
    )
    common = {"pretrained_model_name_or_path": "tiny", "output_dir": "out", "seed": 1, "max_train_steps": 7}
    first, second = read_concepts_table(path, common)
    assert asdict(first) == asdict(
        TrainingConfig(
            "tiny",
            "cats, mine",
            "<my-cat>",
            "cat",
            output_dir=str(Path("out/my-cat")),
            max_train_steps=7,
            seed=3,
            value_learning_rate=0.5,
            random_flip=False,
        )
    )
    assert (second.superclass, second.seed, second.random_flip) == ("big dog", 1, True)
    assert second.output_dir == str(Path("out/My-dog"))


def test_columns_may_name_folders_and_prompts(table):
    path = table("instance_data_dir,output_dir,validation_prompt", "one,a/b,a <my-cat>", "two,c,")
    common = {"pretrained_model_name_or_path": "tiny", "placeholder_token": "<my-cat>", "superclass": "cat"}
    first, second = read_concepts_table(path, common)
    assert first.output_dir == str(Path("perfusion-concept/a/b")) and first.validation_prompt == ["a <my-cat>"]
    assert second.output_dir == str(Path("perfusion-concept/c")) and second.validation_prompt == []


def test_the_home_folder_in_a_table_is_that_of_the_user(table, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = table("placeholder_token,instance_data_dir,output_dir", "<a>,~/a,~/out/a", "<b>,~/b,")
    common = {"pretrained_model_name_or_path": "tiny", "superclass": "cat", "output_dir": "~/out"}
    first, second = read_concepts_table(path, common)
    assert (first.instance_data_dir, first.output_dir) == ("/home/me/a", "/home/me/out/a")
    assert (second.instance_data_dir, second.output_dir) == ("/home/me/b", "/home/me/out/b")


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["placeholder_token,colour", "<a>,red"], r"column 'colour'; expected settings"),
        (
            ["placeholder_token,mixed_precision", "<a>,bf16"],
            r"column 'mixed_precision'; .* other than .*mixed_precision",
        ),
        (["placeholder_token,instance_data_dir", "<a>,x", "<b>,"], r"line 3 of .*: it has no instance_data_dir"),
        (["placeholder_token,instance_data_dir", "<a>,x", "<b>"], r"line 3 of .*: its number of cells is not 2"),
        (["placeholder_token,instance_data_dir", "<a>,x,y"], r"line 2 of .*: its number of cells is not 2"),
        (
            ["placeholder_token,instance_data_dir", "<a>,x", "a,x"],
            r"line 3 .* an earlier line has .*a too",
        ),
        (["placeholder_token,instance_data_dir,seed", "<a>,x,one"], r"line 2 of .*: seed is 'one'; expected int"),
        (
            ["placeholder_token,instance_data_dir,random_flip", "<a>,x,1"],
            r"line 2 of .*: random_flip is '1'; expected true",
        ),
        (["placeholder_token,instance_data_dir,seed", "<a>,x,-1"], r"line 2 of .*: seed is -1"),
        (["placeholder_token,instance_data_dir", "<*>,x"], r"line 2 of .*: '<\*>' has no letters to name a folder by"),
        (
            ["placeholder_token,output_dir,instance_data_dir", "<a>,a,x", "<b>,b/../a,x"],
            r"line 3 .* has .*a too",
        ),
        (["placeholder_token,hub_model_id,instance_data_dir", "<a>,m,x", "<b>,m,x"], r"line 3 .* has m too"),
        (
            ["placeholder_token,resume_from_checkpoint", "<a>,latest"],
            r"resume_from_checkpoint cannot be given with a table",
        ),
        (["placeholder_token"], r"has no concepts"),
        ([""], r"has no concepts"),
    ],
)
def test_tables_that_cannot_be_read(table, lines, match):
    with pytest.raises(ValueError, match=match):
        read_concepts_table(table(*lines), {"pretrained_model_name_or_path": "tiny", "superclass": "cat"})


@pytest.mark.parametrize("data", ["placeholder_token\n<é>\n".encode("latin-1"), b"PK\x03\x04\xff", b"a" * 200_000])
def test_files_that_are_no_tables_are_named(tmp_path, data):
    (tmp_path / "concepts.csv").write_bytes(data)
    with pytest.raises(ValueError, match=r"concepts\.csv is not a CSV file in UTF-8 \(.*; save the table as one"):
        read_concepts_table(tmp_path / "concepts.csv", {})


def test_a_table_may_come_from_other_systems(tmp_path):
    (tmp_path / "concepts.csv").write_bytes(
        b"\xef\xbb\xbfplaceholder_token,instance_data_dir\r\n<my-cat>,cats\r\n\r\n"
    )
    (config,) = read_concepts_table(
        tmp_path / "concepts.csv", {"pretrained_model_name_or_path": "tiny", "superclass": "cat"}
    )
    assert (config.placeholder_token, config.instance_data_dir) == ("<my-cat>", "cats")


# Trainings of a table


@pytest.fixture
def configs(training_settings, tmp_path):
    """Two short trainings."""
    return [
        TrainingConfig(
            **training_settings
            | {
                "placeholder_token": token,
                "output_dir": str(tmp_path / "table" / token[1:-1]),
                "checkpointing_steps": 2,
            }
        )
        for token in ("<my-cat>", "<my-dog>")
    ]


def files(configs):
    return [Path(config.output_dir) / FILE for config in configs]


def test_concepts_of_a_table_equal_those_trained_alone_even_if_it_is_killed(pipeline, configs, stop, tmp_path, caplog):
    alone = []
    for config in configs:
        folder = tmp_path / "alone" / config.placeholder_token[1:-1]
        train(pipeline, replace(config, output_dir=str(folder)))
        alone.append((folder / FILE).read_bytes())
    stop(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train_concepts(pipeline, configs)
    assert [path.exists() for path in files(configs)] == [False, False]
    assert (Path(configs[0].output_dir) / "checkpoint-2").exists()
    train_concepts(pipeline, configs)
    assert [path.read_bytes() for path in files(configs)] == alone
    times = [path.stat().st_mtime_ns for path in files(configs)]
    train_concepts(pipeline, configs)
    assert [path.stat().st_mtime_ns for path in files(configs)] == times
    for path in files(configs):
        assert f"{path} exists, so it is skipped" in caplog.text


def test_a_model_that_an_earlier_training_has_rounded_gives_the_same_concept(pipeline, configs):
    config = replace(configs[0], mask="attention", mixed_precision="bf16")
    written = []
    for _ in range(2):
        train(pipeline, config)
        written.append(files([config])[0].read_bytes())
    assert written[0] == written[1]


def test_an_error_in_one_concept_does_not_stop_the_others(pipeline, configs, stop, caplog):
    stop(1, RuntimeError("the loss of step 2 is nan"))
    with pytest.raises(
        RuntimeError, match=r"1 of 2 concepts could not be trained or shared: .*my-cat \(the loss of step 2 is"
    ):
        train_concepts(pipeline, configs)
    assert [path.exists() for path in files(configs)] == [False, True]
    assert "the loss of step 2 is nan" in caplog.text
    train_concepts(pipeline, configs)
    assert all(path.exists() for path in files(configs))


@pytest.mark.parametrize("error", [SafetensorError("no space"), SyntaxError("not a TIFF file"), KeyError("mode")])
def test_no_error_in_one_concept_stops_the_others(pipeline, configs, stop, caplog, error):
    """With its traceback, if it is not one that says enough."""
    stop(1, error)
    with pytest.raises(RuntimeError, match=rf"1 of 2 concepts .*my-cat \({re.escape(repr(error))}\)$"):
        train_concepts(pipeline, configs)
    assert [path.exists() for path in files(configs)] == [False, True]
    assert "Traceback" in caplog.text


def test_a_tracker_that_cannot_end_stops_no_other_concept(pipeline, configs, monkeypatch):
    """As one that writes its last lines to a full disk."""

    def fail(self):
        if not files(configs)[1].exists():
            raise OSError("no space left")

    monkeypatch.setattr(Numbers, "finish", fail)
    monkeypatch.setattr(concepts_table, "make_accelerator", lambda config: Accelerator(log_with=Numbers()))
    with pytest.raises(RuntimeError, match=r"1 of 2 concepts .*my-cat \(no space left\)$"):
        train_concepts(pipeline, configs)
    assert all(path.exists() for path in files(configs))


def test_a_full_disk_at_one_concept_does_not_stop_the_others(pipeline, configs, monkeypatch, full_disk, caplog):
    step, disk = PerfusionTrainer.step, ExitStack()

    def fill(self, index):
        if index == 2 and self.config.placeholder_token == "<my-cat>":
            disk.enter_context(full_disk())
        return step(self, index)

    def empty(config):
        disk.close()
        return make_accelerator(config)

    monkeypatch.setattr(PerfusionTrainer, "step", fill)
    monkeypatch.setattr(concepts_table, "make_accelerator", empty)
    with pytest.raises(RuntimeError, match=r"1 of 2 concepts .*checkpoint-4'; resume .*checkpoint-2 with"):
        train_concepts(pipeline, configs)
    disk.close()
    assert "Traceback" not in caplog.text
    monkeypatch.setattr(PerfusionTrainer, "step", step)
    train_concepts(pipeline, configs)
    assert all(path.exists() for path in files(configs))


def test_a_file_that_is_not_the_concept_of_its_line_is_not_skipped(pipeline, configs, make_concept):
    other, damaged = files(configs)
    make_concept("<my-dog>").save(other)
    make_concept("<my-dog>").save(damaged).write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=rf"2 of 2 concepts .* \({other} is of <my-dog>, .* \({damaged} .* truncated .*; delete it"
    ):
        train_concepts(pipeline, configs)


def test_a_single_process_shares_nothing_and_logs_everywhere(monkeypatch, fresh_accelerate):
    album = Album()
    process = SingleProcess(Accelerator(log_with=album))
    monkeypatch.setattr(PartialState, "is_main_process", False)
    assert (process.num_processes, process.process_index, process.is_main_process) == (1, 0, True)
    monkeypatch.setattr(Accelerator, "reduce", None)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", None)
    assert torch.equal(process.reduce(torch.ones(2), "mean"), torch.ones(2))
    process.wait_for_everyone()
    process.init_trackers("perfusion", {})
    process.log({"loss": 1.0}, step=3)
    assert album.numbers == [(3, {"loss": 1.0})]
    assert not album.main_process_only


def test_processes_share_a_table(pipeline, configs, table, training_settings, model_folder, environment, tmp_path):
    """One process fails at its concept; the other trains its own to the end, and both exit with an error."""
    for config in configs:
        config.pretrained_model_name_or_path = str(model_folder)
    train_concepts(pipeline, configs[1:])
    path = table("placeholder_token,instance_data_dir", "<my-cat>,nowhere", f"<my-dog>,{configs[1].instance_data_dir}")
    common = training_settings | {
        "pretrained_model_name_or_path": str(model_folder),
        "output_dir": str(tmp_path / "together"),
        "checkpointing_steps": 2,
    }
    del common["placeholder_token"], common["instance_data_dir"]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    command = [sys.executable, *launch.split(), "--mixed_precision=no", "--dynamo_backend=no"]
    command += ["-m", "diffusers_perfusion.cli", "train", "--concepts", str(path)]
    command += [text for name, value in common.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    folder = tmp_path / "together" / "my-cat"
    message = f"perfusion: 1 of 2 concepts could not be trained or shared: {folder} (nowhere is not a folder"
    assert done.stderr.count(message) == 2  # each process has the errors of all
    assert (tmp_path / "together" / "my-dog" / FILE).read_bytes() == files(configs)[1].read_bytes()
