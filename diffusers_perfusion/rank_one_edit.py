"""The gated rank-one edit of Perfusion (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644).

Eq. 4 (Appendix B) edits the output `h = W e` of a frozen projection with `J` concepts:

    h = W e_⊥J + Σ_j σ((sim(i_j, e)/‖i_j‖² − β_j)/τ_j) · o_j

where `sim(a, b) = aᵀ C⁻¹ b`, `‖i‖² = sim(i, i)` and `e_⊥J` is `e` less its projection, in that metric, on
`span{i_1 … i_J}`. Eq. 3 is the case `J = 1`. The projection needs only a `J × J` solve, and of `C⁻¹` only the vectors
`C⁻¹ i_j`; their scale cancels, so each concept may carry its own. Nothing here depends on the layer except `W i_j` and
`o_j`, so `coef` and `gate` are computed once for hidden states and serve every layer and denoising step.

`edit` adds one thing to Eq. 4: the part of a concept that its gate does not let through is replaced by its
super-class.
"""

import torch
from torch import Tensor

# Smallest singular value of the unit-diagonal Gram matrix below which concepts count as parallel. For two concepts it
# is 1 − cos(i_1, i_2) in the C⁻¹ metric, and the projection amplifies rounding by up to its inverse.
MIN_SINGULAR_VALUE = 0.01


class ParallelConceptsError(ValueError):
    """Says that two concepts have nearly parallel target inputs, so that they cannot be edited in together.

    Attributes:
        pair: indices of the two concepts that are closest to each other.
        cosine: their cosine in the `C⁻¹` metric.
    """

    def __init__(self, pair: tuple[int, int], cosine: float):
        self.pair, self.cosine = pair, cosine
        super().__init__(
            f"concepts {pair[0]} and {pair[1]} have nearly parallel target inputs (cosine {cosine:.4f}), so they "
            "cannot be told apart in one prompt"
        )


def relative_gram(i_star: Tensor, c_inv_i_star: Tensor) -> Tensor:
    """Return the Gram matrix of target inputs, each row divided by `‖i_j‖²`: `(J, J)` with ones on the diagonal.

    Args:
        i_star: target inputs `i_j`, `(J, d)`.
        c_inv_i_star: `C⁻¹ i_j` up to a positive factor per concept, `(J, d)`.
    """
    gram = c_inv_i_star @ i_star.T
    return gram / gram.diagonal()[:, None]


def check_independent(gram: Tensor) -> None:
    """Raise `ParallelConceptsError` if the target inputs behind a `relative_gram` are nearly dependent."""
    if torch.linalg.svdvals(gram)[-1] >= MIN_SINGULAR_VALUE:
        return
    cosines = (gram * gram.T).clamp(min=0).sqrt().fill_diagonal_(0)
    j, k = divmod(int(cosines.argmax()), len(gram))
    raise ParallelConceptsError((j, k), float(cosines[j, k]))


def gates(e: Tensor, i_star: Tensor, c_inv_i_star: Tensor, bias: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the projection and the gates of Eq. 4 at every text position.

    The metric is computed in float32 at least, whatever the dtype of the hidden states and outside any autocast: with
    a `C` of condition number 4e3 half precision loses the gate.

    Args:
        e: encoder hidden states, `(..., d)`.
        i_star: target inputs `i_j`, `(J, d)`.
        c_inv_i_star: `C⁻¹ i_j` up to a positive factor per concept, `(J, d)`.
        bias: `β_j`, `(J,)`.
        temperature: `τ_j`, `(J,)`.

    Returns:
        `coef`, `(..., J)`: coordinates of the projection of `e` on the `i_j`, so `e_⊥J = e − Σ coef_j i_j`.
        `gate`, `(..., J)`: `σ((sim(i_j, e)/‖i_j‖² − β_j)/τ_j)`.

    Raises:
        ParallelConceptsError: if the `i_j` are too close to being linearly dependent.
    """
    dtype = torch.promote_types(e.dtype, torch.float32)
    with torch.autocast(e.device.type, enabled=False):
        e, i_star, c_inv_i_star = e.to(dtype), i_star.to(dtype), c_inv_i_star.to(dtype)
        similarity = e @ c_inv_i_star.T / (i_star * c_inv_i_star).sum(-1)
        gate = torch.sigmoid((similarity - bias.to(dtype)) / temperature.to(dtype))
        if len(i_star) == 1:
            return similarity, gate
        gram = relative_gram(i_star, c_inv_i_star)
        check_independent(gram)
        return torch.linalg.solve(gram, similarity.unsqueeze(-1)).squeeze(-1), gate


def edit(h: Tensor, coef: Tensor, gate: Tensor, w_i: Tensor, o: Tensor, w_super: Tensor) -> Tensor:
    """Apply Eq. 4 to the output of one projection: `W e_⊥J + Σ_j gate_j o_j + rest_j W s_j`.

    `rest_j = max(coef_j − gate_j, 0)` is the part of a concept that was removed and not put in again. Eq. 4 drops it:
    with a higher bias the token loses its effect, and a prompt is followed no better. Here the super-class `s_j` gets
    it, so that the bias leads from the subject to a plain one. Positions where `coef` and `gate` are zero keep the
    very bits of `h`.

    Args:
        h: `W e`, `(..., d_out)`.
        coef: from `gates`, `(..., J)`.
        gate: from `gates`, `(..., J)`.
        w_i: `W i_j` without the bias of the projection, `(J, d_out)`.
        o: target outputs `o_j`, `(J, d_out)`.
        w_super: `W s_j` without the bias of the projection, `(J, d_out)`; zeros make it Eq. 4 itself.
    """
    rest = (coef - gate).clamp(min=0)
    coef, gate, rest = coef.to(h.dtype), gate.to(h.dtype), rest.to(h.dtype)
    return h - (coef @ w_i.to(h.dtype) - gate @ o.to(h.dtype) - rest @ w_super.to(h.dtype))
