"""The timed scripts run and write what they say; how long anything takes is not asserted."""

import json

import fit as fit_benchmark
import inference
import load
import pytest
import timing


def read(path):
    data = json.loads(path.read_text())
    assert data["machine"]["threads"] >= 1
    return data, {row["name"]: row for row in data["rows"]}


def test_inference(tmp_path, capsys):
    inference.main(["--num_inference_steps", "2", "--repeats", "1", "--output", str(tmp_path / "new" / "out.json")])
    data, rows = read(tmp_path / "new" / "out.json")
    assert rows["stock"]["ratio"] == 1.0 and len(rows) == 5
    assert data["bytes_held"] > 0
    assert "| one concept |" in capsys.readouterr().out


def test_load(tmp_path):
    load.main(["--model", "pocket", "--repeats", "2", "--output", str(tmp_path / "out.json")])
    _, rows = read(tmp_path / "out.json")
    assert all(len(row["seconds"]) == 2 for row in rows.values())


def test_fit(tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setattr(fit_benchmark, "RIVALS", {"LoRA, rank 4": ("lora", {"rank": 4})})
    monkeypatch.setattr(fit_benchmark, "peak_bytes", lambda name, bench: 1)  # takes a process each
    monkeypatch.setattr(fit_benchmark, "matrix_rate", lambda device: 1e9)
    fit_benchmark.main(["--steps", "1", "--repeats", "1", "--output", str(tmp_path / "out.json")])
    _, rows = read(tmp_path / "out.json")
    assert rows["Perfusion"]["ratio"] == 1.0
    assert rows["LoRA, rank 4, as its script"]["floor_ms"] > rows["LoRA, rank 4"]["floor_ms"] > 0


def test_turns_alternate_and_ratios_are_of_the_same_turn(monkeypatch):
    order = []
    taken = timing.alternate({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert [len(times) for times in taken.values()] == [2, 2]
    rows = timing.rows_of({"a": [1.0, 4.0, 2.0], "b": [2.0, 2.0, 2.0]}, "a")
    assert rows[1]["ratio"] == pytest.approx(1.0) and rows[1]["median_ms"] == 2000
