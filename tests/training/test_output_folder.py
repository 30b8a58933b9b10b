"""The output folder is fit for a training before any long work, and for one at a time."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from diffusers_perfusion.files import temporary_beside
from diffusers_perfusion.training import TrainingConfig, output_folder
from diffusers_perfusion.training.output_folder import check_output_folder, claim_output_folder


@pytest.fixture
def config(training_settings):
    return TrainingConfig(**training_settings)


@pytest.fixture
def folder(config):
    folder = Path(config.output_dir)
    folder.mkdir()
    return folder


def test_checking_writes_nothing(config):
    check_output_folder(config)
    assert not Path(config.output_dir).exists()


def test_a_folder_that_cannot_be_written_is_told(config, folder, full_disk):
    with full_disk(), pytest.raises(OSError, match=f"'{folder}'"):
        check_output_folder(config)


def test_what_is_in_the_way_of_a_later_file_is_told(config, folder):
    (folder / "validation").touch()
    (folder / "logs").touch()
    check_output_folder(config)
    for settings in ({"validation_prompt": ["a <my-cat>"]}, {"report_to": "tensorboard"}):
        with pytest.raises(NotADirectoryError, match=rf"'{folder}/(validation|logs)'$"):
            check_output_folder(replace(config, **settings))
    (folder / "perfusion.safetensors").mkdir()
    with pytest.raises(ValueError, match=rf"^{folder}/perfusion\.safetensors is a folder, .*; choose another"):
        check_output_folder(config)


def test_a_concept_of_the_same_token_may_be_replaced(config, folder, make_concept):
    make_concept("<my-cat>").save(folder / "perfusion.safetensors")
    make_concept("<my-cat>").save(folder / "checkpoint-5" / "perfusion.safetensors")
    check_output_folder(config)


@pytest.mark.parametrize("place", [".", "checkpoint-5"])
def test_the_concept_of_another_token_is_refused(config, folder, make_concept, place):
    path = make_concept("<my-dog>").save(folder / place / "perfusion.safetensors")
    with pytest.raises(
        ValueError, match=rf"^{path} is of <my-dog>, and this .* of <my-cat>; choose another output_dir"
    ):
        check_output_folder(config)


def test_a_concept_that_cannot_be_read_is_refused(config, folder, make_concept):
    path = folder / "perfusion.safetensors"
    path.write_bytes(make_concept("<my-dog>").save(path).read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"^{path} .* is truncated .*; delete it, or choose another output_dir"):
        check_output_folder(config)
    path.rename(folder / "other.safetensors")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "perfusion.safetensors").touch()  # `latest` skips it
    check_output_folder(config)


def test_one_training_has_a_folder_at_a_time(config, folder):
    with claim_output_folder(config):
        with (
            pytest.raises(ValueError, match=rf"another training is writing into {folder}; choose another output_dir"),
            claim_output_folder(config),
        ):
            pass
        with claim_output_folder(replace(config, output_dir=str(folder / "other"))):
            assert (folder / "other").is_dir()
    with claim_output_folder(config):
        pass


def test_a_folder_is_checked_again_when_no_other_training_has_it(config, folder, make_concept):
    make_concept("<my-dog>").save(folder / "perfusion.safetensors")
    with pytest.raises(ValueError, match="is of <my-dog>"), claim_output_folder(config):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_a_file_system_without_locks_will_do(config, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(output_folder, "FileLock", refuse)
    with claim_output_folder(config):
        assert Path(config.output_dir).is_dir()


def test_what_killed_trainings_left_is_deleted(config, folder, make_concept):
    kept = [folder / "perfusion.safetensors", folder / "validation" / "step-000005.png", folder / "checkpoint-5" / "a"]
    make_concept("<my-cat>").save(kept[0])
    for path in kept[1:]:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in (kept[0], kept[1]):
        temporary_beside(path).touch()
    temporary_beside(kept[2].parent).mkdir()
    with claim_output_folder(config):
        pass
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted([folder / ".lock", *kept])
