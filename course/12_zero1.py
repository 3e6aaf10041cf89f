"""
12. ZeRO-1. AdamW keeps two running means for each weight: with N processes, N copies of each. Instead, each weight has
an owner, which alone keeps its means, updates it, and sends it to the others (Rajbhandari et al. 2020). The numbers are
the same; a process holds 8 + 8/N bytes for a parameter instead of 16. plaingpt/machines/zero.py deals the weights out
by their size, and sends all of an owner's in one go.

Question: what is exchanged in a step now that was not before, and how many bytes is it?
"""
from typing import Any

import rung
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.optim import Optimizer

import train_trivialised as settings

PARTS = ('make_optimizer',)
PROCESSES = 2


class Zero(torch.optim.AdamW):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.all, n = parameters, dist.get_world_size()
        own = parameters[dist.get_rank()::n]
        super().__init__([{'params': [p for p in own if p.dim() >= 2], 'weight_decay': settings.weight_decay,
                           'scale': 1.0},
                          {'params': [p for p in own if p.dim() < 2], 'weight_decay': 0.0, 'scale': 1.0}],
                         betas=(settings.beta1, settings.beta2), fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        for number, p in enumerate(self.all):
            dist.broadcast(p, number % dist.get_world_size())


def make_optimizer(model: nn.Module) -> Optimizer:
    return Zero([*model.parameters()])


if __name__ == '__main__':
    rung.main(__file__)
