"""Which rows of which batch are edited, and that the edit is made once."""

import logging

import pytest
import torch

from diffusers_perfusion.editing import gates
from diffusers_perfusion.state import LoadedConcept, PerfusionState
from diffusers_perfusion.text import TextEncoders
from diffusers_perfusion.vocabulary import Vocabulary

LENGTH, WIDTH = 24, 32


@pytest.fixture
def state(components):
    return PerfusionState(Vocabulary(TextEncoders([components["tokenizer"]], [components["text_encoder"]])))


@pytest.fixture
def load(state, make_concept):
    """Load a random concept into `state` and activate it."""

    def run(name, seed=0, **fields):
        concept = make_concept(f"<{name}>", seed=seed, **fields)
        state.loaded[name] = LoadedConcept(concept, torch.tensor(concept.bias), torch.tensor(concept.temperature))
        state.active.append(name)
        return concept

    return run


def encoding(seed):
    return torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def expected(encodings, *concepts):
    """`coef` and `gate` of concepts by the function that does know no state."""
    return gates(
        encodings,
        torch.stack([concept.target_input for concept in concepts]),
        torch.stack([concept.inverse_target_input for concept in concepts]),
        torch.tensor([concept.bias for concept in concepts]),
        torch.tensor([concept.temperature for concept in concepts]),
    )


def rows(edit):
    """Indices of the edited rows."""
    edited = edit.coef.flatten(1).any(1)
    assert torch.equal(edited, edit.gate.flatten(1).any(1))
    return edited.nonzero()[:, 0].tolist()


# Recognising encodings


CHANGES = {
    "as it is": lambda e: e[None],
    "repeated for several pictures": lambda e: e[None].repeat(1, 3, 1).view(3, LENGTH, WIDTH),
    "after the negative prompt": lambda e: torch.cat([encoding(9)[None], e[None]]),
    "as a view": lambda e: torch.stack([encoding(9), e])[1:],
    "not contiguous": lambda e: e.T.contiguous().T[None],
    "requiring a gradient": lambda e: e[None].clone().requires_grad_(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_encoding_is_known_again_after_what_a_pipeline_does_to_it(state, load, change, dtype):
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    encodings = change(encoding(0)).to(dtype)
    state.prepare(encodings)
    assert rows(state.edit) == [n for n, row in enumerate(encodings) if not torch.equal(row, encoding(9).to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoding_made_in_half_precision_is_known_again_in_float32(state, load, dtype):
    load("my-cat")
    made = encoding(0).to(dtype)
    state.mark(made, ("<my-cat>",), None)
    for encodings in (made[None], made[None].float()):
        state.prepare(encodings)
        assert rows(state.edit) == [0]


def test_other_encodings_are_not_edited(state, load):
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    state.prepare(encoding(1)[None])
    assert state.edit is None
    state.mark(encoding(2), ("<not-loaded>",), None)
    state.prepare(encoding(2)[None])
    assert state.edit is None


def test_no_edit_while_disabled_or_inactive(state, load):
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    state.enabled = False
    state.prepare(encoding(0)[None])
    assert state.edit is None
    state.enabled, state.active = True, []
    state.prepare(encoding(0)[None])
    assert state.edit is None


def test_a_caller_may_say_which_words_are_where(state, load):
    """As a fit does, whose encodings change in each step."""
    concept = load("my-cat")
    encodings = torch.stack([encoding(0), encoding(1)])
    state.prepare(encodings, words=[(), ("<my-cat>",)])
    assert rows(state.edit) == [1]
    assert state.edit.concepts == (concept,)


def test_a_warning_says_that_an_encoding_did_not_arrive_as_made(state, load, caplog, monkeypatch):
    """Weighted prompts and clip_skip: the concept would be lost without a word."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    load("my-cat")

    def warnings():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    state.mark(encoding(0), ("<my-cat>",), None)
    state.prepare(encoding(0)[None] * 1.1)
    (message,) = warnings()
    assert "<my-cat> was encoded" in message and "not reached the model" in message
    state.prepare(encoding(1)[None])
    assert not warnings()  # once is enough
    state.mark(encoding(0), ("<my-cat>",), None)
    state.prepare(encoding(0)[None])
    state.prepare(encoding(1)[None])
    assert not warnings()  # it arrived


@pytest.mark.parametrize("limit", ["_MAX_MARKS", "_MAX_TWINS"])
def test_only_the_last_encodings_are_remembered(state, load, monkeypatch, limit):
    """A server draws for days; those that come again stay."""
    monkeypatch.setattr(f"diffusers_perfusion.state.{limit}", 3 * 4)
    load("my-cat")
    state.locking = "global"
    for seed in (0, 1, 2, 3, 0, 4, 5):
        state.mark(encoding(seed), ("<my-cat>",), encoding(9))
    known = []
    for seed in range(6):
        try:
            state.prepare(encoding(seed)[None])
            known.append(state.edit is not None)
        except ValueError:  # the twin is gone
            known.append(False)
    assert known == [True, False, False, True, True, True]


# What the edit holds


def test_rows_without_words_have_zero_coef_and_gate(state, load):
    concept = load("my-cat")
    state.mark(encoding(1), ("<my-cat>",), None)
    encodings = torch.stack([encoding(0), encoding(1), encoding(0)])
    state.prepare(encodings)
    assert rows(state.edit) == [1]
    coef, gate = expected(encodings[1], concept)
    assert torch.equal(state.edit.coef[1], coef)
    assert torch.equal(state.edit.gate[1], gate)
    assert state.edit.gate[1].min() > 0


def test_each_row_is_edited_by_its_own_concepts(state, load):
    """Two concepts in one row share a projection, which they must not with one in another row."""
    cat, dog, bear = (load(name, seed, bias=0.5 + 0.1 * seed) for seed, name in enumerate(["cat", "dog", "bear"]))
    words = [("<cat>", "<dog>"), ("<dog>",), (), ("<bear>",), ("<dog>", "<bear>"), ("<dog>",)]
    encodings = torch.stack([encoding(n) for n in range(len(words))])
    for row, held in zip(encodings, words, strict=True):
        if held:
            state.mark(row, held, None)
    state.prepare(encodings)
    assert state.edit.concepts == (bear, cat, dog)
    for row, concepts in enumerate([(cat, dog), (dog,), (), (bear,), (dog, bear), (dog,)]):
        columns = [state.edit.concepts.index(concept) for concept in concepts]
        others = [n for n in range(3) if n not in columns]
        assert not state.edit.coef[row][:, others].any()
        assert not state.edit.gate[row][:, others].any()
        if concepts:
            coef, gate = expected(encodings[row], *concepts)
            torch.testing.assert_close(state.edit.coef[row][:, columns], coef)
            torch.testing.assert_close(state.edit.gate[row][:, columns], gate)
    for n, concept in enumerate((bear, cat, dog)):
        assert torch.equal(state.edit.target_input[n], concept.target_input)
        assert torch.equal(state.edit.superclass_input[n], concept.superclass_input)


def test_only_active_concepts_edit(state, load):
    cat, dog = load("cat", 0), load("dog", 1)
    state.mark(encoding(0), ("<cat>", "<dog>"), None)
    for active, concepts in ((["dog"], (dog,)), (["dog", "cat"], (cat, dog)), (["cat", "dog"], (cat, dog))):
        state.active = active
        state.refresh()
        state.prepare(encoding(0)[None])
        assert state.edit.concepts == concepts
        torch.testing.assert_close(state.edit.coef[0], expected(encoding(0), *concepts)[0])


def test_nearly_parallel_concepts_are_named(state, load):
    cat = load("cat", 0)
    load("dog", 1)
    load("twin", 2, target_input=2 * cat.target_input, inverse_target_input=cat.inverse_target_input)
    state.mark(encoding(0), ("<dog>", "<twin>", "<cat>"), None)
    with pytest.raises(ValueError, match=r"'(cat|twin)' and '(cat|twin)' have nearly parallel .*cosine 1\.0"):
        state.prepare(encoding(0)[None])
    # In one prompt; each in its own is fine.
    state.mark(encoding(1), ("<twin>",), None)
    state.mark(encoding(2), ("<cat>",), None)
    state.prepare(torch.stack([encoding(1), encoding(2)]))
    assert rows(state.edit) == [0, 1]


def test_half_precision_concepts_and_encodings_are_edited_in_float32(state, load):
    concept = load("my-cat").to(torch.float16)
    state.loaded["my-cat"].concept = concept
    made = encoding(0).half()
    state.mark(made, ("<my-cat>",), None)
    state.prepare(made[None])
    assert state.edit.coef.dtype == state.edit.gate.dtype == state.edit.target_input.dtype == torch.float32
    coef, _ = expected(made.float(), concept.to(torch.float32))
    assert torch.equal(state.edit.coef[0], coef)


# Once for all layers and steps


def test_an_edit_is_made_once_for_each_batch(state, load):
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    encodings = encoding(0)[None]
    state.prepare(encodings)
    first = state.edit
    for _ in range(3):
        state.prepare(encodings)
    assert state.edit is first
    state.prepare(encodings.clone())
    assert state.edit is not first


def test_an_edit_is_made_anew_when_a_setting_changes(state, load):
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), encoding(1))
    encodings = encoding(0)[None]
    state.prepare(encodings)
    before = state.edit.gate
    assert state.edit.keys is None
    state.loaded["my-cat"].bias = torch.tensor(0.1)
    state.refresh()
    state.prepare(encodings)
    assert (state.edit.gate > before).all()
    before = state.edit.gate
    state.loaded["my-cat"].temperature = torch.tensor(1.0)
    state.refresh()
    state.prepare(encodings)
    assert not torch.isclose(state.edit.gate, before).any()
    state.locking = "global"
    state.refresh()
    state.prepare(encodings)
    assert state.edit.keys is not None


def test_an_edit_is_made_anew_when_the_encodings_change_in_place(state, load):
    """A callback may write into `prompt_embeds` between two steps."""
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    encodings = torch.stack([encoding(1), encoding(0)])
    state.prepare(encodings)
    assert rows(state.edit) == [1]
    encodings[0] = encoding(0)
    state.prepare(encodings)
    assert rows(state.edit) == [0, 1]
    encodings.zero_()
    state.prepare(encodings)
    assert state.edit is None


def test_encodings_of_inference_mode_work_and_are_edited_once(state, load):
    load("my-cat")
    with torch.inference_mode():
        made = encoding(0) + 0
        state.mark(made, ("<my-cat>",), None)
        encodings = made[None].clone()
        state.prepare(encodings)
        first = state.edit
        state.prepare(encodings)
    assert rows(first) == [0]
    assert state.edit is first


def test_an_edit_of_encodings_that_are_gone_is_not_taken_for_others(state, load):
    """A new batch may lie at the address of an old one."""
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    for _ in range(20):
        encodings = encoding(0)[None]
        state.prepare(encodings)
        assert state.edit is not None
        del encodings
        encodings = encoding(1)[None]
        state.prepare(encodings)
        assert state.edit is None


# Global key-locking


def test_global_locking_gives_the_twins_as_keys(state, load):
    load("my-cat")
    state.locking = "global"
    assert state.words.twins
    state.mark(encoding(1), ("<my-cat>",), encoding(2))
    encodings = torch.stack([encoding(0), encoding(1)])
    state.prepare(encodings)
    assert torch.equal(state.edit.keys, torch.stack([encoding(0), encoding(2)]))
    state.prepare(encodings.half())
    assert torch.equal(state.edit.keys, torch.stack([encoding(0), encoding(2)]).half())


def test_global_locking_needs_the_twin(state, load):
    load("my-cat")
    state.mark(encoding(0), ("<my-cat>",), None)
    state.locking = "global"
    with pytest.raises(ValueError, match=r"encode the prompt after set_perfusion\(locking='global'\)"):
        state.prepare(encoding(0)[None])
