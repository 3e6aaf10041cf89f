"""
7. Fused AdamW. The plain rule is ten small operations for each weight. One kernel updates all that are treated alike, a
`group`, in one sweep. The loop takes train.py's form: backward leaves gradients in `p.grad`, where the optimizer finds
them, and what the next rungs change are functions. (Question: which rung will change which of them?)
"""
import rung
import torch
import torch.nn as nn
from torch import Tensor

import train_trivialised as settings
from model_trivialised import GPT
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.order import Order
from plaingpt.corpus.token_files import TokenFile

PARTS = ('train', 'prepare', 'make_optimizer', 'gradient')


def prepare(model: GPT) -> nn.Module:
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': settings.weight_decay,
               'scale': 1.0},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0, 'scale': 1.0}]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    _, loss = model(x, y)
    loss.backward()  # adds to p.grad of each weight p
    return loss.item()


def train(model: GPT, corpus: TokenFile) -> list[float]:
    n_windows = settings.total_batch_size // settings.block_size
    order = Order(len(corpus), settings.block_size, settings.seed)
    prepared = prepare(model)
    optimizer = make_optimizer(prepared)
    losses = []
    for step in range(settings.max_iters):
        starts = order.starts(step * n_windows, n_windows)
        losses.append(gradient(prepared, *read_batch(
            corpus, starts, settings.block_size, n_windows, model.config.vocab_size)))
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        for group in optimizer.param_groups:
            group['lr'] = group['scale'] * settings.lr_at(step, settings.learning_rate, settings.min_lr,
                                                          settings.warmup_iters, settings.lr_decay_iters)
        optimizer.step()
        model.zero_grad()
    return losses


if __name__ == '__main__':
    rung.main(__file__)
