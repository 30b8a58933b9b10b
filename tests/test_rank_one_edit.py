"""The edit against the paper's formulas written out with a dense metric, over random concepts and hidden states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_perfusion.rank_one_edit import edit, fade, find_tokens, gates, similarities

WIDTH, LENGTH, OUT = 12, 5, 7
examples = settings(deadline=None, max_examples=25, derandomize=True)


class Case:
    """Random hidden states and concepts in float64, with the whole `C⁻¹`; the n-th concept's token is the n-th."""

    def __init__(self, seed, concepts, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        root = random(WIDTH, WIDTH)
        self.metric = root @ root.T / WIDTH + 0.2 * torch.eye(WIDTH, dtype=dtype)
        self.w = random(OUT, WIDTH)
        self.e = random(2, LENGTH, WIDTH)
        self.i = random(concepts, WIDTH)
        self.o = random(concepts, OUT)
        self.bias = 0.3 + 0.3 * torch.rand(concepts, generator=generator).to(dtype)
        self.temperature = 0.1 + 0.2 * torch.rand(concepts, generator=generator).to(dtype)
        self.tokens = torch.eye(LENGTH, dtype=torch.bool)[:, :concepts].expand(2, -1, -1)

    def edited(self, order=slice(None), scale=1.0):
        coef = similarities(self.e, self.i[order], (self.i @ self.metric)[order] * scale)
        gate = gates(self.tokens[..., order], self.bias[order], self.temperature[order])
        return edit(self.e @ self.w.T, coef, gate, self.i[order] @ self.w.T, self.o[order])


def cases(concepts):
    return st.builds(Case, st.integers(0, 2**31), st.integers(*concepts))


@examples
@given(cases((1, 4)))
def test_a_token_is_between_the_projection_and_equation_3_of_its_concept(case):
    expected = case.e @ case.w.T
    for n, (i, o) in enumerate(zip(case.i, case.o, strict=True)):
        gate = torch.sigmoid((1 - case.bias[n]) / case.temperature[n])
        for row, e in enumerate(case.e[:, n]):
            sim = i @ case.metric @ e / (i @ case.metric @ i)
            equation_3 = case.w @ (e - i * sim) + o
            expected[row, n] = (1 - gate) * (case.w @ e) + gate * equation_3
    torch.testing.assert_close(case.edited(), expected)
    assert torch.equal(case.edited()[:, len(case.i) :], (case.e @ case.w.T)[:, len(case.i) :])


@examples
@given(cases((1, 1)))
def test_at_an_open_gate_what_remains_is_orthogonal_to_the_super_class(case):
    coef = similarities(case.e, case.i, case.i @ case.metric)
    remaining = (case.e - coef @ case.i) @ (case.i @ case.metric).T
    torch.testing.assert_close(remaining, torch.zeros_like(remaining), atol=1e-9, rtol=0)


@examples
@given(cases((2, 4)), st.randoms(use_true_random=False))
def test_order_of_concepts_does_not_matter(case, random):
    order = list(range(len(case.i)))
    random.shuffle(order)
    torch.testing.assert_close(case.edited(order), case.edited())


@examples
@given(cases((1, 4)), st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4))
def test_scale_of_c_does_not_matter_even_per_concept(case, scales):
    scale = torch.tensor(scales, dtype=torch.float64)[: len(case.i), None]
    torch.testing.assert_close(case.edited(scale=scale), case.edited())


def test_each_of_several_occurrences_is_open_and_nothing_else():
    tokens = torch.tensor([[True, False, False, True], [False, True, False, False]]).T
    gate = gates(tokens, torch.tensor([0.75, 0.9]), torch.tensor([0.1, 0.15]))
    expected = torch.tensor([[0.924, 0, 0, 0.924], [0, 0.661, 0, 0]]).T
    torch.testing.assert_close(gate, expected, atol=5e-4, rtol=0)


def test_tokens_are_found_where_a_concept_is_first_far_above_the_others():
    one = torch.tensor([[[0.1], [0.7], [0.3]], [[-0.2], [-0.1], [-0.3]], [[0.5], [0.9], [1.0]]])
    assert find_tokens(one).nonzero().tolist() == [[0, 1, 0], [1, 1, 0], [2, 1, 0]]
    # Of one super-class: the second is the most similar to both tokens, of which the first is the first concept's.
    two = torch.tensor([[0.9, 0.8], [1.0, 1.1], [0.0, 0.0]])
    assert find_tokens(two).nonzero().tolist() == [[0, 0], [1, 1]]
    # Not where another concept is only dissimilar.
    two = torch.tensor([[0.1, -0.95], [0.9, 0.5], [0.4, 0.95]])
    assert find_tokens(two).nonzero().tolist() == [[1, 0], [2, 1]]


@examples
@given(cases((1, 4)))
def test_at_an_infinite_bias_nothing_is_edited(case):
    case.bias = torch.full_like(case.bias, 1e9)
    assert torch.equal(case.edited(), case.e @ case.w.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metric_stays_in_float32_for_half_precision_hidden_states(dtype):
    """In half precision a C of condition number 4e3 loses the gate."""
    case = Case(5, 2, torch.float32)
    case.metric = torch.diag(torch.logspace(0, 3.6, WIDTH))
    half = [tensor.to(dtype) for tensor in (case.e, case.i, case.i @ case.metric)]
    expected = similarities(*(tensor.float() for tensor in half))
    for got in (similarities(*half), _under_autocast(half), _under_autocast([tensor.float() for tensor in half])):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


@examples
@given(cases((1, 3)), st.floats(0, 1))
def test_hidden_states_fade_with_the_gate_of_their_token_or_else_the_widest_one(case, bias):
    e_super = case.e.flip(0)
    faded = fade(case.e, e_super, gates(case.tokens, case.bias + bias, case.temperature))
    gate = torch.sigmoid((1 - case.bias - bias) / case.temperature)
    for position in range(LENGTH):
        g = gate[position] if position < len(gate) else gate.max()
        expected = (1 - g) * e_super[:, position] + g * case.e[:, position]
        torch.testing.assert_close(faded[:, position].float(), expected.float())


def test_a_shut_token_beside_an_open_one_is_faded():
    """Also where its gate is below the smallest number."""
    e, e_super = torch.randn(2, 3, 4).unbind()
    tokens = torch.tensor([[True, False], [False, True], [False, False]])
    faded = fade(e, e_super, gates(tokens, torch.tensor([-1e3, 1e3]), torch.tensor([0.1, 0.1])))
    torch.testing.assert_close(faded, torch.stack([e[0], e_super[1], e[2]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_that_are_their_own_superclass_prompt_keep_their_bits(dtype):
    e = torch.randn(2, 3, 4).to(dtype)
    gate = torch.zeros(2, 3, 1)
    gate[1, 1] = 0.7
    faded = fade(e, torch.stack([e[0], e[0]]), gate)
    assert faded.dtype == dtype
    assert torch.equal(faded[0], e[0])
    assert not torch.equal(faded[1], e[1])


def _under_autocast(arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return similarities(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_without_a_concept_keep_their_bits(dtype):
    case = Case(6, 2, torch.float32)
    h = (case.e @ case.w.T).to(dtype)
    coef = similarities(case.e, case.i, case.i @ case.metric)
    edited = edit(h, coef, gates(case.tokens, case.bias, case.temperature), case.i @ case.w.T, case.o)
    assert edited.dtype == dtype
    assert torch.equal(edited[:, 2:], h[:, 2:])
    assert not torch.isclose(edited[:, :2], h[:, :2]).all(-1).any()


@pytest.mark.parametrize("concepts", [1, 2])
def test_gradients_flow_to_the_hidden_states_and_the_target_outputs(concepts):
    """The token embedding is trained through `e`, the values through `o`."""
    case = Case(7, concepts)

    def run(e, o):
        case.e, case.o = e, o
        return case.edited()

    e, o = case.e.clone().requires_grad_(), case.o.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (e, o))
