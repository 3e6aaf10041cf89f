"""A small GPT that learns with one part exchanged: the text is that of a plain file, so nothing has to be prepared."""
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import model_trivialised
import train_trivialised
from model import GPTConfig

LEARNS = ('model_trivialised', 'train_trivialised')  # the files whose parts take part in it
T, N = 16, 8  # tokens in a window, windows in a step


class Learned(NamedTuple):
    losses: list[float]  # of each step, nats per byte
    val_loss: float  # on text that was not trained on


def windows(text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, (N, T) each, from random places of a text, always the same ones."""
    generator = torch.Generator().manual_seed(7)
    while True:
        starts = torch.randint(len(text) - T, (N, 1), generator=generator)
        place = starts + torch.arange(T)  # (N, T)
        yield text[place], text[place + 1]


@contextmanager
def in_float64() -> Iterator[None]:
    """Make tensors in float64 until the block ends, so that rounding explains no difference."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def learned(exchanged: ModuleType, steps: int) -> Learned:
    """Train a GPT by plain parts, of which those of one file come from `exchanged`, on the bytes of the plain file."""
    parts = {name: exchanged if exchanged.__name__ == name else module
             for name, module in zip(LEARNS, (model_trivialised, train_trivialised), strict=True)}
    with open(str(model_trivialised.__file__), 'rb') as file:
        text = torch.tensor(list(file.read()))
    torch.manual_seed(1)
    with in_float64():
        model = parts['model_trivialised'].GPT(GPTConfig(T, 256, n_layer=2, n_head=2, n_embd=16, bias=True))
        losses = list(train(model, parts['train_trivialised'], windows(text[:-1000]), steps))
        with torch.no_grad():
            unseen = [model(x, y)[1].item() for _, (x, y) in zip(range(8), windows(text[-1000:]), strict=False)]
    return Learned(losses, sum(unseen) / len(unseen))


def train(model: Any, rules: ModuleType, batches: Iterator[tuple[Tensor, Tensor]], steps: int) -> Iterator[float]:
    """Update the model by the rules of train_trivialised.py, and yield the loss of each step."""
    parameters = list(model.parameters())
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for step, (x, y) in zip(range(steps), batches, strict=False):
        _, loss = model(x, y)
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)  # 0 if a part leaves a parameter out
        gradients, _ = rules.clip(list(found), 1.0)
        lr = rules.lr_at(step, 1e-2, 1e-3, steps // 10, steps)
        with torch.no_grad():
            for p, g, m_p, v_p in zip(parameters, gradients, m, v, strict=True):
                rules.adamw(p, g, m_p, v_p, step, lr, 0.1 if p.dim() >= 2 else 0.0)
        yield loss.item()
