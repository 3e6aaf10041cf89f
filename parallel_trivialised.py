"""
A step on several machines, plainly: the machines are a list, and one after the other does its part. train.py has
processes that really run at once; tests/test_parallel_twins.py proves that the sums are the same.

x and y are the windows of a step, (N, T) each, which need not divide evenly. Lists of what machines hold are indexed
[machine].
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from model_trivialised import GPT
from train_trivialised import adamw


def gradients_of(model: GPT, parts: Iterator[tuple[Tensor, Tensor]], n_windows: int) -> Iterator[list[Tensor]]:
    """Yield what each part adds to the gradient of the mean loss over all n_windows, for each weight."""
    for part_x, part_y in parts:
        _, loss = model(part_x, part_y)  # the mean over this part
        share = len(part_x) / n_windows  # so that a window counts as much in a small part as in a large one
        yield list(torch.autograd.grad(loss * share, list(model.parameters())))


def accumulate(model: GPT, x: Tensor, y: Tensor, batch_size: int) -> list[Tensor]:
    """Return the gradient of the mean loss over all windows, for each weight, if only batch_size fit into memory."""
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for gradients in gradients_of(model, parts, len(x)):
        total = [so_far + g for so_far, g in zip(total, gradients, strict=True)]
    return total


def reduce_scatter(parts: list[Tensor]) -> list[Tensor]:
    """Machine i holds parts[i], and gets piece i of the sum of all. In a ring: each cuts its part into as many pieces
    as there are machines, and in each turn sends one of them to its neighbour, which adds it to its own."""
    n = len(parts)
    held = [list(part.flatten().tensor_split(n)) for part in parts]  # held[machine][piece]
    for turn in range(n - 1):
        for machine in range(n):
            piece, neighbour = (machine - turn - 1) % n, (machine + 1) % n
            held[neighbour][piece] = held[neighbour][piece] + held[machine][piece]
    return [held[machine][machine] for machine in range(n)]


def all_gather(pieces: list[Tensor]) -> list[Tensor]:
    """Machine i holds piece i, and gets all of them, end to end: once more round the ring."""
    n = len(pieces)
    held = [{machine: piece} for machine, piece in enumerate(pieces)]  # held[machine][piece]
    for turn in range(n - 1):
        for machine in range(n):
            piece, neighbour = (machine - turn) % n, (machine + 1) % n
            held[neighbour][piece] = held[machine][piece]
    return [torch.cat([pieces_of_one[piece] for piece in range(n)]) for pieces_of_one in held]


def all_reduce(parts: list[Tensor]) -> list[Tensor]:
    """Machine i holds parts[i], and gets the sum. Each sends less than twice the size of its part, for any n."""
    wholes = all_gather(reduce_scatter(parts))
    return [whole.view_as(part) for whole, part in zip(wholes, parts, strict=True)]


def data_parallel(model: GPT, x: Tensor, y: Tensor, n_machines: int) -> list[list[Tensor]]:
    """Each machine has all weights and a part of the windows. Return [machine][weight]: each gets the gradient of the
    mean loss over all windows."""
    parts = zip(x.tensor_split(n_machines), y.tensor_split(n_machines), strict=True)
    of_machines = list(gradients_of(model, parts, len(x)))  # [machine][weight]
    of_weights = [all_reduce(list(of_weight)) for of_weight in zip(*of_machines, strict=True)]  # [weight][machine]
    return [list(of_machine) for of_machine in zip(*of_weights, strict=True)]


def zero1(weights: list[list[Tensor]], gradients: list[list[Tensor]], moments: list[dict[int, tuple[Tensor, Tensor]]],
          step: int, lr: float, decay: float) -> None:
    """Each machine has all weights and gradients, [machine][weight], but AdamW's moments of those that it owns only: it
    updates these and sends them to the others; in place (Rajbhandari et al. 2020)."""
    n = len(weights)
    for i in range(len(weights[0])):
        owner = i % n
        m, v = moments[owner][i]  # no other machine holds them: an n-th of the memory for moments
        adamw(weights[owner][i], gradients[owner][i], m, v, step, lr, decay)
        for machine in range(n):
            weights[machine][i].copy_(weights[owner][i])


@torch.no_grad()
def gather_weights(model: GPT, pieces: list[list[Tensor]]) -> None:
    """Put each weight together from the pieces, [machine][weight], that machines hold of it."""
    for p, pieces_of_p in zip(model.parameters(), zip(*pieces, strict=True), strict=True):
        p.copy_(all_gather(list(pieces_of_p))[0].view_as(p))


def fsdp(model: GPT, pieces: list[list[Tensor]], x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """Each machine has a piece of each weight, and a part of the windows. It borrows the others' pieces to compute, and
    gets the sum of the gradients for its own piece alone. Return these, [machine][weight]."""
    n = len(pieces)
    gather_weights(model, pieces)  # the fast version gathers one block at a time, and lets go of it at once
    of_machines = list(gradients_of(model, zip(x.tensor_split(n), y.tensor_split(n), strict=True), len(x)))
    of_weights = [reduce_scatter(list(of_weight)) for of_weight in zip(*of_machines, strict=True)]  # [weight][machine]
    return [list(of_machine) for of_machine in zip(*of_weights, strict=True)]
