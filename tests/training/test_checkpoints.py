import errno
import os

import pytest
import torch

from diffusers_perfusion import PerfusionConcept
from diffusers_perfusion.files import delete_temporaries
from diffusers_perfusion.training.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

RECIPE = {"seed": 0, "superclass": "cat", "learning_rate": None}
STATE = {"a": torch.arange(3.0), "b": torch.tensor(2.5, dtype=torch.float64)}


@pytest.fixture
def save(tmp_path, make_concept):
    concept = make_concept()
    return lambda step, limit=None, output_dir=tmp_path: save_checkpoint(
        output_dir, step, STATE, RECIPE, concept, limit
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(save, tmp_path, make_concept):
    path = save(25)
    assert path == tmp_path / "checkpoint-25"
    step, state = load_checkpoint(path, RECIPE)
    assert step == 25
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) and state[name].dtype == STATE[name].dtype for name in STATE)
    assert PerfusionConcept.load(path / "perfusion.safetensors").placeholder_token == "<my-cat>"
    assert all(file.suffix == ".safetensors" for file in path.iterdir())


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(save):
    path = save(25)
    (path / "left-over").touch()
    assert save(25) == path
    assert not (path / "left-over").exists()


def test_oldest_checkpoints_go(save, tmp_path):
    for step in (5, 10, 100):
        save(step, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    save(200)
    assert len(names(tmp_path)) == 3
    save(300, 1)
    assert names(tmp_path) == ["checkpoint-300"]


def test_checkpoints_are_listed_by_when_they_were_written(tmp_path):
    for name in ("100", "25", "5", "1000", "30", "7", "best"):
        (tmp_path / f"checkpoint-{name}").mkdir()
        os.utime(tmp_path / f"checkpoint-{name}", ns=(0, 1000 if name == "1000" else 2000))
    (tmp_path / ".checkpoint-9").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"checkpoint-{step}" for step in (1000, 5, 7, 25, 30, 100)
    ]


def test_later_checkpoints_of_an_earlier_training_go_first(save, tmp_path):
    save(100)
    for step in (5, 10):
        save(step, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-5"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"


def test_a_checkpoint_does_not_delete_itself_when_the_clock_was_set_back(save, tmp_path):
    for step in (5, 10):
        os.utime(save(step), (2e9, 2e9 + step))
    save(15, 2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-15"]


@pytest.mark.parametrize("moment", ["concept", "move"])
def test_a_crash_while_writing_leaves_no_part_of_a_checkpoint(save, tmp_path, monkeypatch, moment):
    save(25)

    def crash(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PerfusionConcept, "save", crash) if moment == "concept" else monkeypatch.setattr(
        "pathlib.Path.rename", crash
    )
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/checkpoint-50'$"):
        save(50, 1)
    assert names(tmp_path) == ["checkpoint-25"]
    assert load_checkpoint(tmp_path / "checkpoint-25", RECIPE)[0] == 25


def test_a_full_disk_leaves_no_part_of_a_checkpoint(save, tmp_path, full_disk):
    save(25)
    for size in (0, 100, 1000):  # in the first file, and in the second
        with full_disk(size), pytest.raises(OSError, match=rf"File too large: '{tmp_path}/checkpoint-50'$"):
            save(50)
        assert names(tmp_path) == ["checkpoint-25"]


def test_an_output_folder_that_is_gone_is_made_again(save, tmp_path):
    assert save(25, output_dir=tmp_path / "gone") == tmp_path / "gone" / "checkpoint-25"


@pytest.mark.parametrize("files_left", [0, 1, 2])
@pytest.mark.parametrize("step", [25, 50])
def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_part_of_one(save, tmp_path, monkeypatch, step, files_left):
    """Of the oldest, and of an earlier one of the same step."""
    save(25)

    def killed(path, **_):
        for file in sorted(path.iterdir())[files_left:]:
            file.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(step, 1)
    monkeypatch.undo()
    for path in list_checkpoints(tmp_path):
        load_checkpoint(path, RECIPE)
    if step == 50:
        assert find_checkpoint(tmp_path, "latest").name == "checkpoint-50"
    delete_temporaries(tmp_path)
    assert all(name.startswith("checkpoint-") for name in names(tmp_path))


def test_finding_a_checkpoint(save, tmp_path):
    for step in (5, 25):
        save(step)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-25"
    assert find_checkpoint(tmp_path, "checkpoint-5") == tmp_path / "checkpoint-5"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-5")) == tmp_path / "checkpoint-5"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'checkpoint-7'; .* has checkpoint-5, checkpoint-25"):
        find_checkpoint(tmp_path, "checkpoint-7")


def test_the_latest_of_no_checkpoints_is_none_with_a_line(tmp_path, caplog):
    assert find_checkpoint(tmp_path / "empty", "latest") is None
    assert f"{tmp_path}/empty has no checkpoint to resume from, so the training begins anew." in caplog.text


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign", "concept"])
def test_the_latest_checkpoint_is_the_last_whole_one(save, tmp_path, caplog, make_concept, damage):
    save(25)
    damaged(save(50), damage, make_concept)
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-25"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}/checkpoint-50 is not a complete checkpoint")
    assert line.endswith("it is skipped.")


def test_a_checkpoint_of_another_recipe_is_refused(save):
    path = save(25)
    with pytest.raises(ValueError, match=r"checkpoint-25 was written with seed 0, and this training has 1"):
        load_checkpoint(path, RECIPE | {"seed": 1})
    with pytest.raises(ValueError, match=r"with new_setting None, and this training has 3"):
        load_checkpoint(path, RECIPE | {"new_setting": 3})


def damaged(path, damage, make_concept):
    """Damage a checkpoint."""
    file = path / "training_state.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "missing":
        file.unlink()
    elif damage == "foreign":
        make_concept().save(file)
    else:
        (path / "perfusion.safetensors").write_bytes(b"")
    return path


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign", "concept"])
def test_a_damaged_checkpoint_is_refused(save, make_concept, damage):
    path = damaged(save(25), damage, make_concept)
    with pytest.raises(ValueError, match="checkpoint-25 is not a complete checkpoint"):
        load_checkpoint(path, RECIPE)


def test_a_loaded_state_is_no_map_of_its_file(save):
    path = save(25)
    _, state = load_checkpoint(path, RECIPE)
    (path / "training_state.safetensors").write_bytes(bytes(1000))
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)
