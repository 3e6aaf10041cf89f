"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): only the directions of a matrix's momentum count.
U S V^T, its singular value decomposition, becomes U V^T, so that all directions are learned at the same rate, and not
only the few that dominate a gradient.
"""
import math
from collections import defaultdict
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import AdamW, Optimizer

from plaingpt.machines import strategies

STEPS = 5  # of the iteration: singular values then lie between about 0.7 and 1.2, which is near enough to 1
A, B, C = 3.4445, -4.7750, 2.0315  # its polynomial, a x + b x^3 + c x^5: a small x grows fast, and none gets too large
RISE = 300  # steps in which the momentum rises from FIRST to LAST
FIRST, LAST = 0.85, 0.95


def momentum_at(step: int) -> float:
    """Return the share of the mean gradient that is kept from one step to the next."""
    return FIRST + (LAST - FIRST) * min(1.0, step / RISE)


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about the nearest orthogonal matrix to each of these (K, m, n): singular values go to 1, directions stay.
    This is a Newton-Schulz iteration, which needs nothing but matrix products, here in `dtype`."""
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if is_tall else matrices  # x @ x.mT is then the smaller of the two squares
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)  # no singular value is above 1
    for _ in range(STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon for the groups that have `parts`, the number of matrices that are stacked in each weight; AdamW for the
    others. Products are in `dtype`, or as precise as the weights."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float],
                 dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.adamw = AdamW([group for group in groups if 'parts' not in group], lr, betas, eps=1e-10, fused=True)
        super().__init__(groups, {'lr': lr})  # the same dicts, so that a rate is set for both
        self.state = self.adamw.state

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:
        """Update all weights: those of AdamW's groups by AdamW, the others by Muon."""
        self.adamw.step()
        # by shape: all matrices of one shape are orthogonalised at once
        alike = defaultdict[torch.Size, list[tuple[nn.Parameter, dict[str, Any]]]](list)
        for group in self.param_groups:
            for p in group['params'] if 'parts' in group else ():
                if p.grad is not None:  # a weight that the loss does not depend on stays, as with AdamW
                    alike[torch.Size((len(p) // group['parts'], p.size(1)))].append((p, group))
        for (rows, columns), weights in alike.items():
            directions = [self.direction(p, group['momentum']).view(-1, rows, columns) for p, group in weights]
            new = orthogonalise(torch.cat(directions), self.dtype or directions[0].dtype)
            for (p, group), update in zip(weights, new.split([len(part) for part in directions]), strict=True):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                # a tall matrix spreads a vector of the same length over more channels: longer steps make up for it
                rate = group['lr'] * math.sqrt(max(1, rows / columns))
                p.sub_(strategies.shard_like(update.reshape(p.shape), p), alpha=rate)

    def direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Return the direction in which to move a whole weight: its mean gradient, and a part of the next one (Nesterov
        1983)."""
        if 'momentum_buffer' not in self.state[p]:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        mean = self.state[p]['momentum_buffer']
        assert p.grad is not None, 'step leaves such weights out'
        mean.lerp_(p.grad, 1 - momentum)
        return strategies.complete(p.grad.lerp(mean, momentum))
