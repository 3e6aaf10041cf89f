"""
17. Muon. AdamW sees a matrix as a list of numbers, each with a size of its own. But a matrix maps a stream to a stream,
along directions, and in a gradient a few directions drown all others. Muon takes the mean gradient, and makes all its
singular values about 1, by five products, so that every direction is learned at the same rate (Jordan et al. 2024). It
is for matrices between streams, one for each of q, k and v; the table of tokens, the positions and the gains stay
AdamW's. `scale` is the rate of a group, as a multiple of the schedule's.

Question: why is the table of tokens none of Muon's, though it is a matrix?
"""
import rung
import torch
import torch.nn as nn

import train_trivialised as settings
from plaingpt.muon import LAST, Muon

PARTS = ('make_optimizer',)
IN_MODERN = ('Muon for the matrices, its rates and its schedule',)  # rows of docs/modern.md
RATE = 0.025  # the highest of Muon; AdamW's is that of the schedule


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    inner = {name: p for name, p in named.items() if p.dim() >= 2 and '.h.' in name}
    others = [p for name, p in named.items() if name not in inner and p.dim() >= 2]
    vectors = [p for p in named.values() if p.dim() < 2]
    by_muon = {'weight_decay': settings.weight_decay, 'scale': RATE / settings.learning_rate, 'momentum': LAST}
    groups = [
        {'params': [p for name, p in inner.items() if 'c_attn' in name], 'parts': 3, **by_muon},
        {'params': [p for name, p in inner.items() if 'c_attn' not in name], 'parts': 1, **by_muon},
        {'params': others, 'weight_decay': settings.weight_decay, 'scale': 1.0},
        {'params': vectors, 'weight_decay': 0.0, 'scale': 1.0}]
    return Muon(groups, settings.learning_rate, (settings.beta1, settings.beta2))


if __name__ == '__main__':
    rung.main(__file__)
