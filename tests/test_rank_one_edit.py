"""The edit against the paper's formulas written out with a dense metric, over random concepts and hidden states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_perfusion.rank_one_edit import ParallelConceptsError, edit, gates, relative_gram

WIDTH, OUT = 12, 7
examples = settings(deadline=None, max_examples=25, derandomize=True)


class Case:
    """Random hidden states and concepts in float64, with the whole `C⁻¹`."""

    def __init__(self, seed, concepts, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        root = random(WIDTH, WIDTH)
        self.metric = root @ root.T / WIDTH + 0.2 * torch.eye(WIDTH, dtype=dtype)
        self.w = random(OUT, WIDTH)
        self.e = random(2, 5, WIDTH)
        self.i = random(concepts, WIDTH)
        self.o = random(concepts, OUT)
        self.bias = 0.3 + 0.3 * torch.rand(concepts, generator=generator).to(dtype)
        self.temperature = 0.1 + 0.2 * torch.rand(concepts, generator=generator).to(dtype)

    @property
    def c_inv_i(self):
        return self.i @ self.metric

    def gates(self, order=slice(None), scale=1.0):
        return gates(self.e, self.i[order], self.c_inv_i[order] * scale, self.bias[order], self.temperature[order])

    def edited(self, order=slice(None), scale=1.0):
        coef, gate = self.gates(order, scale)
        none = torch.zeros_like(self.o[order])
        return edit(self.e @ self.w.T, coef, gate, self.i[order] @ self.w.T, self.o[order], none)


def cases(concepts):
    """Random cases whose concepts are far from parallel."""

    def far_apart(case):
        return torch.linalg.svdvals(relative_gram(case.i, case.c_inv_i))[-1] > 0.05

    return st.builds(Case, st.integers(0, 2**31), st.integers(*concepts)).filter(far_apart)


@examples
@given(cases((1, 1)))
def test_one_concept_is_equation_3(case):
    i, o = case.i[0], case.o[0]
    for e, h in zip(case.e.flatten(0, 1), case.edited().flatten(0, 1), strict=True):
        sim = i @ case.metric @ e / (i @ case.metric @ i)
        expected = case.w @ (e - i * sim) + torch.sigmoid((sim - case.bias[0]) / case.temperature[0]) * o
        torch.testing.assert_close(h, expected)


@examples
@given(cases((1, 4)))
def test_several_concepts_are_equation_4_with_a_dense_projection(case):
    onto = case.i.T @ torch.linalg.inv(case.i @ case.metric @ case.i.T) @ case.i @ case.metric
    e_perp = case.e @ (torch.eye(WIDTH, dtype=torch.float64) - onto).T
    sim = torch.einsum("bld,de,je->blj", case.e, case.metric, case.i)
    sim = sim / torch.einsum("jd,de,je->j", case.i, case.metric, case.i)
    gate = torch.sigmoid((sim - case.bias) / case.temperature)
    torch.testing.assert_close(case.edited(), e_perp @ case.w.T + gate @ case.o)


@examples
@given(cases((1, 4)))
def test_what_remains_of_hidden_states_is_orthogonal_to_every_concept(case):
    coef, _ = case.gates()
    e_perp = case.e - coef @ case.i
    torch.testing.assert_close(e_perp @ case.c_inv_i.T, torch.zeros_like(coef), atol=1e-9, rtol=0)


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


@examples
@given(cases((1, 4)))
def test_what_the_gates_leave_closed_goes_to_the_super_categories(case):
    coef, gate = case.gates()
    h, w_i, w_super = case.e @ case.w.T, case.i @ case.w.T, case.o.flip(-1)
    moved = edit(h, coef, gate, w_i, case.o, w_super) - case.edited()
    torch.testing.assert_close(moved, torch.relu(coef - gate) @ w_super)
    # A target output that is the super-class's own makes the bias matter no more where it is below.
    same = edit(h, coef, gate, w_i, w_super, w_super)
    torch.testing.assert_close(same, h - coef @ w_i + torch.maximum(coef, gate) @ w_super)


@examples
@given(cases((1, 4)))
def test_infinite_bias_leaves_only_what_is_orthogonal(case):
    case.bias = torch.full_like(case.bias, 1e9)
    coef, gate = case.gates()
    assert not gate.any()
    torch.testing.assert_close(case.edited(), (case.e - coef @ case.i) @ case.w.T)


def test_summed_removals_of_single_concepts_are_wrong_for_correlated_concepts():
    """The shortcut of other implementations; right only for concepts that are orthogonal in the metric."""
    case = Case(0, 2)
    case.i[1] = case.i[0] + 0.5 * case.i[1]
    joint, _ = case.gates()
    summed = torch.cat([case.gates([0])[0], case.gates([1])[0]], dim=-1)
    assert ((summed - joint) @ case.i).norm() > 0.3 * (joint @ case.i).norm()

    case.i[1] -= case.i[0] * (case.i[1] @ case.metric @ case.i[0]) / (case.i[0] @ case.metric @ case.i[0])
    joint, _ = case.gates()
    summed = torch.cat([case.gates([0])[0], case.gates([1])[0]], dim=-1)
    torch.testing.assert_close(summed, joint)


@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_concepts_are_refused_by_the_right_pair(sign):
    case = Case(1, 4)
    case.i[3] = sign * 2 * case.i[1] + 1e-3 * case.i[0]
    with pytest.raises(ParallelConceptsError, match="concepts 1 and 3 have nearly parallel") as caught:
        case.gates()
    assert caught.value.pair == (1, 3)
    assert caught.value.cosine == pytest.approx(1, abs=1e-3)


def test_dependent_concepts_are_refused_although_no_two_are_parallel():
    case = Case(2, 3)
    case.i[2] = case.i[0] - case.i[1]
    with pytest.raises(ParallelConceptsError) as caught:
        case.gates()
    assert caught.value.cosine < 0.99


def test_concepts_that_are_merely_alike_are_taken():
    """Two cats have target inputs of cosine 0.95, say, and must work together."""
    case = Case(3, 2)
    case.i[1] = case.i[0] + 0.25 * case.i[1]
    gram = relative_gram(case.i, case.c_inv_i)
    assert (gram[0, 1] * gram[1, 0]).sqrt() > 0.9
    case.gates()


@pytest.mark.parametrize(
    ("bias", "temperature", "at_target", "at_zero"), [(0.75, 0.1, 0.924, 6e-4), (0.70, 0.15, 0.881, 9e-3)]
)
def test_gate_is_open_at_the_target_and_closed_away_from_it(bias, temperature, at_target, at_zero):
    case = Case(4, 1)
    case.bias[:], case.temperature[:] = bias, temperature
    away = case.e[0, 0] - case.gates()[0][0, 0] @ case.i
    case.e = torch.stack([case.i[0], away])
    coef, gate = case.gates()
    assert coef[0] == pytest.approx(1)
    assert coef[1] == pytest.approx(0, abs=1e-9)
    assert gate[0].item() == pytest.approx(at_target, abs=5e-4)
    assert gate[1].item() == pytest.approx(at_zero, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metric_stays_in_float32_for_half_precision_hidden_states(dtype):
    """In half precision a C of condition number 4e3 loses the gate."""
    case = Case(5, 2, torch.float32)
    case.metric = torch.diag(torch.logspace(0, 3.6, WIDTH))
    half = [tensor.to(dtype) for tensor in (case.e, case.i, case.i @ case.metric, case.bias, case.temperature)]
    expected = gates(*(tensor.float() for tensor in half))
    for got in (gates(*half), _under_autocast(half), _under_autocast([tensor.float() for tensor in half])):
        for tensor, wanted in zip(got, expected, strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, wanted)


def _under_autocast(arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return gates(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_positions_without_a_concept_keep_their_bits(dtype):
    case = Case(6, 2, torch.float32)
    h = (case.e @ case.w.T).to(dtype)
    coef, gate = case.gates()
    coef[1], gate[1] = 0, 0
    edited = edit(h, coef, gate, case.i @ case.w.T, case.o, case.o)
    assert edited.dtype == dtype
    assert torch.equal(edited[1], h[1])
    assert not torch.isclose(edited[0], h[0]).all(-1).any()


@pytest.mark.parametrize("concepts", [1, 2])
def test_gradients_flow_to_the_hidden_states_and_the_target_outputs(concepts):
    """The token embedding is trained through `e`, the values through `o`."""
    case = Case(7, concepts)

    def run(e, o):
        case.e, case.o = e, o
        return case.edited()

    e, o = case.e[:1, :2].clone().requires_grad_(), case.o.clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (e, o))
