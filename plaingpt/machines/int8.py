"""
Matrix products in 8 bits, to write text on a CPU: each token reads all weights, and they take a quarter of the bytes.

A weight is a whole number from -127 to 127 times a scale, one for each output channel. So is an input, with a scale for
each row: a text does not depend on the texts beside it. Products are summed up in whole numbers, exactly.
"""
import torch
import torch.nn as nn
from torch import Tensor

MOST = 127  # the largest whole number; -128 is left out, so that the range is the same on both sides
TINY = 1e-30  # the least scale, for rows that are all 0


class Int8Linear(nn.Module):
    """An nn.Linear that multiplies in 8 bits."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = to_int8(linear.weight.detach().float())  # (out, in), (out, 1)
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale[:, 0])
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        rows, scale = to_int8(x.flatten(0, -2))  # (n, in), (n, 1)
        y = torch._int_mm(rows, self.weight.t()) * scale * self.scale  # (n, out)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (n, k) as whole numbers, and the scale of each row (n, 1)."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / MOST
    return (rows / scale).round().to(torch.int8), scale


def quantise(model: nn.Module) -> None:
    """Replace every Linear of a model by one of 8 bits, in place. A table that embeds tokens keeps its own numbers,
    even if it is the head as well."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def why_not(device: str) -> str:
    """Return why a device of that type cannot multiply in 8 bits; '' if it can."""
    if device != 'cpu':
        return f'int8 is for a CPU, and this is {device}'
    try:
        torch._int_mm(torch.ones(1, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8))
    except (AttributeError, RuntimeError):
        return f'torch {torch.__version__} has no _int_mm for this CPU'
    return ''
