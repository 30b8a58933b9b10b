import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.optimization import SchedulerType

from diffusers_perfusion.training import TrainingConfig
from diffusers_perfusion.training.config import GROUPS, LR_SCHEDULERS

REQUIRED = {
    "pretrained_model_name_or_path": "someone/model",
    "instance_data_dir": "images",
    "placeholder_token": "<my-cat>",
    "superclass": "cat",
}


def test_every_setting_is_described():
    for field in dataclasses.fields(TrainingConfig):
        assert len(field.metadata["help"]) > 10, field.name
        assert field.metadata["help"].endswith("."), field.name
        assert field.metadata["group"] in GROUPS, field.name


def test_what_must_be_given():
    TrainingConfig(**REQUIRED)
    for name in REQUIRED:
        with pytest.raises(TypeError, match=name):
            TrainingConfig(**{key: value for key, value in REQUIRED.items() if key != name})


def test_defaults_are_what_was_measured_to_be_best():
    config = TrainingConfig(**REQUIRED)
    assert (config.value_learning_rate, config.embedding_learning_rate) == (0.03, 0.006)
    assert (config.max_train_steps, config.lr_scheduler) == (100, "cosine")
    assert (config.train_bias, config.train_temperature, config.train_batch_size) == (0.75, 0.1, 16)
    assert config.random_flip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_batch_size", 0),
        ("max_train_steps", 0),
        ("gradient_accumulation_steps", -1),
        ("num_validation_images", 0),
        ("validation_steps", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("resolution", 0),
        ("embedding_learning_rate", -0.1),
        ("value_learning_rate", float("nan")),
        ("snr_gamma", -1),
        ("lr_warmup_steps", -1),
        ("seed", -1),
        ("seed", 2**32),
        ("lr_scheduler", "piecewise_constant"),
        ("lr_scheduler", "zigzag"),
        ("train_bias", 2.5),
        ("train_bias", float("nan")),
        ("train_temperature", 0),
        ("placeholder_token", ""),
        ("placeholder_token", "my cat"),
        ("superclass", " "),
        ("validation_prompt", ["a <my-cat>", "a cat"]),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    told = {
        "train_bias": "bias",
        "train_temperature": "temperature",
        "validation_prompt": "validation prompt 'a cat'",
    }
    with pytest.raises(ValueError, match=told.get(name, name)):
        TrainingConfig(**REQUIRED | {name: value})


def test_the_home_folder_is_that_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = TrainingConfig(**REQUIRED | {"instance_data_dir": "~/images", "output_dir": "~/out", "mask": "~/masks"})
    assert (config.instance_data_dir, config.output_dir, config.mask) == (
        "/home/me/images",
        "/home/me/out",
        "/home/me/masks",
    )


def test_learning_rate_sets_both():
    config = TrainingConfig(**REQUIRED, learning_rate=0.01)
    assert config.value_learning_rate == 0.01
    assert config.embedding_learning_rate == pytest.approx(0.001)


def test_learning_rate_schedules_are_those_of_diffusers():
    assert {*LR_SCHEDULERS, "piecewise_constant"} == {kind.value for kind in SchedulerType}


def test_settings_are_known_without_torch():
    code = "import sys; from diffusers_perfusion.training import TrainingConfig; print({'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_base_model_is_an_id_or_the_last_part_of_a_folder(tmp_path, monkeypatch):
    assert TrainingConfig(**REQUIRED).base_model == "someone/model"
    (tmp_path / "pocket").mkdir()
    folder = REQUIRED | {"pretrained_model_name_or_path": str(tmp_path / "pocket")}
    assert TrainingConfig(**folder).base_model == "pocket"
    monkeypatch.chdir(tmp_path / "pocket")
    assert TrainingConfig(**REQUIRED | {"pretrained_model_name_or_path": "."}).base_model == "pocket"


def test_the_file_for_the_covariance_is_the_given_one_or_the_base_model_s(tmp_path):
    folder = REQUIRED | {"pretrained_model_name_or_path": str(tmp_path)}
    assert TrainingConfig(**folder).covariance_file is None
    (tmp_path / "captions.txt").touch()
    assert TrainingConfig(**folder).covariance_file == tmp_path / "captions.txt"
    assert TrainingConfig(**folder, covariance="c.npy").covariance_file == Path("c.npy")


def test_the_recipe_is_what_decides_the_result():
    where_and_how_long = {
        "pretrained_model_name_or_path",
        "instance_data_dir",
        "mask",
        "covariance",
        "initial_embedding",
        "output_dir",
        "max_train_steps",
        "validation_prompt",
        "num_validation_images",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "logging_dir",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_private",
        "hub_license",
    }
    recipe = TrainingConfig(**REQUIRED, seed=7, lr_scheduler="constant").recipe()
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert recipe.keys() == names - where_and_how_long
    assert json.loads(json.dumps(recipe)) == recipe
    assert (recipe["seed"], recipe["superclass"]) == (7, "cat")
