"""The first cases of the fuzzer; `make fuzz` runs as many as one likes."""

import fuzz
import pytest

from diffusers_perfusion import PerfusionConcept

CASES = 2000


@pytest.fixture(scope="module")
def report():
    return fuzz.run(CASES)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_what_is_damaged_is_read_or_refused_in_one_sentence(report, kind):
    assert [failure for failure in report.failures if f"({kind})" in failure] == []
    assert report.outcomes[kind, "valid"] > 20 and report.outcomes[kind, "refused"] > 200


@pytest.mark.parametrize(
    "error",
    [
        KeyError("bias"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a kind of ValueError"),
        ValueError("two\nlines"),
        ValueError("no name of the file"),
    ],
    ids=repr,
)
def test_another_outcome_is_found_and_made_again_by_its_number(monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(PerfusionConcept, "load", fail)
    failures = fuzz.run(6).failures
    assert [failure.split()[1] for failure in failures] == ["0", "1", "3", "4"]  # of two kinds
    assert str(error) in failures[0]
    assert fuzz.run(1, first=3).failures == failures[2:3]


def test_cases_follow_from_the_seed_and_their_numbers():
    reports = [fuzz.run(30), fuzz.run(30), fuzz.run(30, seed=1)]
    halves = fuzz.run(15).outcomes + fuzz.run(15, first=15).outcomes
    assert reports[0] == reports[1] != reports[2]
    assert halves == reports[0].outcomes
