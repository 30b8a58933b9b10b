"""How the models are trained: Muon for the matrices, AdamW for the rest, a warm-up and a decay of both rates."""

import math

import torch


def split_parameters(*models):
    """The matrices inside models, which are for Muon, and the rest: ends, embeddings and vectors."""
    matrices, rest = [], []
    for model in models:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            outer = name.startswith(("conv_in", "conv_out", "time_", "shared", "proj_out")) or any(
                part in name for part in ("embed", "table", "relative_attention_bias")
            )
            (rest if outer or parameter.ndim < 2 else matrices).append(parameter)
    return matrices, rest


def orthogonalise(matrices):
    """The nearest orthogonal matrices, roughly, by five Newton-Schulz steps in bfloat16: `(batch, rows, columns)`."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).contiguous()
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): Nesterov momentum, made orthogonal.

    Steps are as large as those of Adam (Liu et al. 2025, arXiv 2502.16982). Filters of convolutions count as matrices
    with a row for each output channel.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Take a step. Matrices of one shape are made orthogonal together, which is much faster than one by one."""
        for group in self.param_groups:
            alike = {}
            for parameter in group["params"]:
                alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for shape, parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters]
                for parameter in parameters:
                    self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momenta = [self.state[parameter]["momentum"] for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonalise(torch.stack([update.reshape(shape) for update in updates]))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.sub_(update.reshape(parameter.shape), alpha=0.2 * max(shape) ** 0.5 * group["lr"])


def cosine(progress):
    """Decay from 1 to 0.01 along a cosine."""
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


class Optimiser:
    """Both optimisers as one.

    Args:
        models: whose parameters are trained.
        steps: how many there will be.
        lr: rate of AdamW.
        muon_lr: rate of Muon.
        warmup: steps in which the rates rise to these.
        decay: factor of the rates by the share of steps done.
    """

    def __init__(self, *models, steps, lr=1e-3, muon_lr=2e-3, warmup=100, decay=cosine):
        matrices, self.rest = split_parameters(*models)
        self.optimisers = [
            Muon(matrices, muon_lr),
            torch.optim.AdamW(self.rest, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimiser, lambda step: min(1, (step + 1) / warmup) * decay(step / steps)
            )
            for optimiser in self.optimisers
        ]

    def step(self, loss):
        """Take a step down the gradient of `loss`."""
        loss.backward()
        # Muon's steps have one length whatever the gradient's.
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for optimiser, schedule in zip(self.optimisers, self.schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()

    def state_dict(self):
        """What is needed to go on later."""
        return [part.state_dict() for part in (*self.optimisers, *self.schedules)]

    def load_state_dict(self, state):
        """Go on from what `state_dict` gave."""
        for part, values in zip((*self.optimisers, *self.schedules), state, strict=True):
            part.load_state_dict(values)
