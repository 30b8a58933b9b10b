"""The gated rank-one edit of Perfusion (Tewel et al., SIGGRAPH 2023, arXiv 2305.01644).

Eq. 3 edits the output `h = W e` of a frozen projection, at each text position, with one concept:

    h = W (e − i* sim(i*, e)/‖i*‖²) + σ((sim(i*, e)/‖i*‖² − β)/τ) · o*

where `sim(a, b) = aᵀ C⁻¹ b` and `‖i‖² = sim(i, i)`. Of `C⁻¹` only the vector `C⁻¹ i*` is needed; its scale cancels.

Four things differ from the paper:
- What is removed is the part of the hidden state, before it fades, along the super-class input `i_super`, which stays
  where it is. The paper removes that along `i*`, which follows the hidden state at the placeholder token.
- The gate is `σ((1 − β)/τ)` at the placeholder token and 0 elsewhere: its similarity is relative to the token's own.
  The paper's depends on the words before the token, so that a bias which suits one prompt switches the concept off in
  another, and it opens at words like the token, such as the plain super-class.
- The gate also scales what is removed: at a shut gate a position stays as the text encoder gives it. The paper removes
  it anyway, so that with a higher bias the token loses its effect, and a prompt is followed no better.
- The hidden states themselves fade: at a gate `g` they are `e_super + g (e − e_super)`, with those of the super-class
  prompt, "a cat" for "a <my-cat>". The token's embedding gives much of a subject to the words around it, which no gate
  in a layer would take back. A training leaves this out: its gate is nearly open, and the text encoder would run twice
  in every step.

So an edit of several concepts is the sum of theirs (Eq. 4 where no token is another's). `i*` only finds tokens whose
positions are unknown.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the highest similarity in a prompt, from which on a position may be the token.
NEAR = 0.6


def similarities(e: Tensor, i: Tensor, c_inv_i: Tensor) -> Tensor:
    """Return `sim(i_j, e)/‖i_j‖²` of hidden states and vectors, `(..., J)`, in float32 at least.

    It is computed in float32 whatever the dtype of the hidden states and outside any autocast: with a `C` of condition
    number 4e3 half precision loses it.

    Args:
        e: encoder hidden states, `(..., d)`.
        i: vectors `i_j` of `J` concepts, `(J, d)`.
        c_inv_i: `C⁻¹ i_j` up to a positive factor per concept, `(J, d)`.
    """
    dtype = torch.promote_types(e.dtype, torch.float32)
    with torch.autocast(e.device.type, enabled=False):
        e, i, c_inv_i = e.to(dtype), i.to(dtype), c_inv_i.to(dtype)
        return e @ c_inv_i.T / (i * c_inv_i).sum(-1)


def find_tokens(similarity: Tensor) -> Tensor:
    """Return where the placeholder tokens of prompts most likely are.

    A concept's token is where its similarity is far above that of all others, so that the tokens of two concepts of
    one super-class are told apart; of several such positions the first, because the word after a token often takes its
    hidden state over.

    Args:
        similarity: to the target inputs `i*_j`, from `similarities`, `(..., length, J)`.

    Returns:
        Bool, `(..., length, J)`, with one position for each concept.
    """
    count = similarity.shape[-1]
    if count > 1:
        others = similarity.unsqueeze(-2).expand(*similarity.shape, count)
        itself = torch.eye(count, dtype=torch.bool, device=similarity.device)
        similarity = similarity - others.masked_fill(itself, -torch.inf).amax(-1).clamp(min=0)
    highest = similarity.amax(-2, keepdim=True)
    first = (similarity >= torch.minimum(NEAR * highest, highest)).int().argmax(-2)
    return F.one_hot(first, similarity.shape[-2]).transpose(-1, -2).bool()


def gates(tokens: Tensor, bias: Tensor, temperature: Tensor) -> Tensor:
    """Return the gate of each concept at every text position: `σ((1 − β_j)/τ_j)` at its tokens, 0 elsewhere.

    At a token it is never quite 0, so that the tokens can be told from it.

    Args:
        tokens: where the placeholder token of each concept is, bool, `(..., length, J)`.
        bias: `β_j`, `(J,)`.
        temperature: `τ_j`, `(J,)`.
    """
    gate = torch.sigmoid((1 - bias) / temperature)
    return tokens * gate.clamp(min=torch.finfo(gate.dtype).tiny)


def fade(e: Tensor, e_super: Tensor, gate: Tensor) -> Tensor:
    """Return hidden states between those of the super-class prompt and of the prompt: `e_super + g (e − e_super)`.

    `g` is the gate of the concept whose token a position holds, and at other positions the highest gate of the prompt.
    Rows that are their own super-class prompt stay what they are.

    Args:
        e: hidden states of prompts, `(..., length, d)`.
        e_super: of their super-class prompts, position by position, `(..., length, d)`.
        gate: from `gates`, `(..., length, J)`.
    """
    gate = gate.amax(-1, keepdim=True)
    g = torch.where(gate > 0, gate, gate.amax(-2, keepdim=True))
    return (e_super + g * (e.float() - e_super.float())).to(e.dtype)


def moved(e_super: Tensor, gate: Tensor, learned: Tensor) -> Tensor:
    """Return hidden states of super-class prompts with what concepts learned added at their tokens: `e_super + g δ`.

    Args:
        e_super: hidden states of super-class prompts, `(..., length, d)`.
        gate: from `gates`, `(..., length, J)`.
        learned: `δ = i* − i_super` of each concept, `(J, d)`.
    """
    return (e_super.float() + gate.float() @ learned.float()).to(e_super.dtype)


def edit(h: Tensor, coef: Tensor, gate: Tensor, w_i: Tensor, o: Tensor) -> Tensor:
    """Edit the output of one projection: `W e + Σ_j gate_j (o_j − coef_j W i_j)`.

    It is Eq. 3 where a gate is 1. Positions where all gates are 0 keep the very bits of `h`.

    Args:
        h: `W e`, of hidden states from `fade` where the super-class prompt is known, `(..., d_out)`.
        coef: of `similarities` of hidden states, before they fade, to the super-class inputs, `(..., J)`.
        gate: from `gates`, `(..., J)`.
        w_i: `W i_super` of each concept without the bias of the projection, `(J, d_out)`.
        o: target outputs `o_j`, `(J, d_out)`.
    """
    removed = (gate * coef).to(h.dtype)
    return h + (gate.to(h.dtype) @ o.to(h.dtype) - removed @ w_i.to(h.dtype))
