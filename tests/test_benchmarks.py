"""The benchmark scripts run and write their results; no time is asserted."""

import json

import counted_memory
import inference
import load
import memory
import pytest
import timing
import training_memory
import training_step
from accelerate.state import AcceleratorState


def read(path):
    data = json.loads(path.read_text())
    assert data["machine"]["threads"] >= 1
    return data, {row["name"]: row for row in data["rows"]}


def test_inference(tmp_path, capsys):
    inference.main(["--num_inference_steps", "2", "--repeats", "1", "--output", str(tmp_path / "new" / "out.json")])
    _, rows = read(tmp_path / "new" / "out.json")
    assert rows["stock"]["ratio"] == 1.0 and len(rows) == 4
    assert "| one concept |" in capsys.readouterr().out


def test_load(tmp_path):
    load.main(["--model", "pocket", "--repeats", "2", "--output", str(tmp_path / "out.json")])
    _, rows = read(tmp_path / "out.json")
    assert all(len(row["seconds"]) == 2 for row in rows.values())


def test_training_step(tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setattr(training_step, "BASELINES", {"LoRA, rank 4": ("lora", {"rank": 4})})
    monkeypatch.setattr(training_step, "peak_bytes", lambda name, bench: 1)  # takes a process each
    monkeypatch.setattr(training_step, "matrix_rate", lambda device: 1e9)
    training_step.main(["--steps", "1", "--repeats", "1", "--output", str(tmp_path / "out.json")])
    _, rows = read(tmp_path / "out.json")
    assert rows["Perfusion"]["ratio"] == 1.0
    assert rows["LoRA, rank 4, as its script"]["floor_ms"] > rows["LoRA, rank 4"]["floor_ms"] > 0


def test_memory_is_what_the_system_says(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    memory.STATUS.write_text("Name:\tpython\nVmHWM:\t    34 kB\nVmRSS:\t    12 kB\n")
    assert (memory.in_use("cpu"), memory.peak("cpu")) == (12 * 1024, 34 * 1024)


def test_training_memory(tmp_path, monkeypatch, fresh_accelerate, capsys):
    def measure_here(*args):
        AcceleratorState._reset_state()
        return training_memory.measure(*args)

    monkeypatch.setattr(training_memory, "measure_alone", measure_here)
    monkeypatch.setattr(training_memory, "reset_peak", lambda device: None)  # only Linux can
    monkeypatch.setattr(training_memory, "in_use", lambda device: 1)
    monkeypatch.setattr(training_memory, "peak", lambda device: 3)
    training_memory.main(["--model", "pocket", "--batch_size", "2", "--output", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["gradient_checkpointing"] for row in rows] == [False, True, False, True]
    assert {row["peak_bytes"] for row in rows} == {2}
    assert rows[0]["model_bytes"] > rows[2]["model_bytes"]  # the UNet in half precision
    assert "| bf16 | True | 2 |" in capsys.readouterr().out


def test_counted_memory(tmp_path, monkeypatch, capsys):
    for name, value in {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}.items():
        monkeypatch.setitem(counted_memory.KLEIN, name, value)
    monkeypatch.setitem(counted_memory.QWEN, "num_hidden_layers", 1)
    counted_memory.main(["--model", "FLUX.2-klein-4B", "--output", str(tmp_path / "out.json")])
    data = json.loads((tmp_path / "out.json").read_text())
    ours, lora = data["rows"]
    assert data["counted"] and ours["trained_numbers"] == 3 * 256
    assert ours["weights"] == lora["weights"] and ours["text_encoders"] == 0
    assert ours["optimizer"] == 2 * ours["gradients"] == 2 * ours["trained"] < lora["optimizer"]
    for row in (ours, lora):
        # At least what attention saves of each layer: queries, keys, values and outputs in half precision.
        assert row["activations"] > 3 * 4 * 2 * 256 * (4096 + 512)
        assert row["activations_checkpointed"] < row["activations"]
    table = capsys.readouterr().out
    assert table.startswith("counted, not measured") and "| FLUX.2-klein-4B | LoRA, rank 4 |" in table


def test_turns_alternate_and_ratios_are_of_the_same_turn(monkeypatch):
    order = []
    taken = timing.alternate({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert [len(times) for times in taken.values()] == [2, 2]
    rows = timing.rows_of({"a": [1.0, 4.0, 2.0], "b": [2.0, 2.0, 2.0]}, "a")
    assert rows[1]["ratio"] == pytest.approx(1.0) and rows[1]["median_ms"] == 2000
