"""
Matrix products in 8 bits, to write text on a CPU: each token reads all weights, and they take a quarter of the bytes.

A weight is a whole number from -127 to 127 times a scale, one for each output channel. So is an input, with a scale for
each row: a text does not depend on the texts beside it. Products are summed up in whole numbers, exactly. PyTorch has
two ways to do so, with the same result. Which one is faster depends on the CPU, and speed alone decides.
"""
import math
import time
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from plaingpt.errors import UserError

MOST = 127  # the largest whole number; -128 is left out, so that the range is the same on both sides
TINY = 1e-30  # the least scale, for rows that are all 0
Product = Callable[[Tensor], Tensor]  # whole numbers (n, in) -> their product with a matrix, (n, out), in float32
Way = Callable[[Tensor, Tensor], Product]


class Int8Linear(nn.Module):
    """An nn.Linear that multiplies in 8 bits."""

    def __init__(self, product: Product, bias: Tensor | None) -> None:
        super().__init__()
        self.product = product
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        rows, scale = to_int8(x.flatten(0, -2))  # (n, in), (n, 1)
        y = self.product(rows)  # (n, out)
        y = y * scale if self.bias is None else torch.addcmul(self.bias, y, scale)
        return y.unflatten(0, x.shape[:-1])


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (n, k) as whole numbers, and the scale of each row (n, 1)."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / MOST
    return (rows / scale).round().to(torch.int8), scale


def plain_product(weight: Tensor, scale: Tensor) -> Product:
    """Return the product with a matrix of whole numbers (out, in), of which each row has a scale (out,)."""
    return lambda rows: torch._int_mm(rows, weight.t()) * scale


def packed_product(weight: Tensor, scale: Tensor) -> Product:
    """Return the same product, by oneDNN, which stores the matrix in the order in which it reads it. Inputs are given
    without a sign, as 128 more than they are: many CPUs cannot multiply two signed numbers, and oneDNN would then do it
    one at a time."""
    # oneDNN reads the memory of a matrix in order, whatever its strides are
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    zero = torch.zeros(len(weight), dtype=torch.long)
    return lambda rows: torch.ops.onednn.qlinear_pointwise(
        rows.view(torch.uint8) ^ 128, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, 'none', [], '')


WAYS: tuple[Way, ...] = (plain_product, packed_product)


def is_exact(way: Way) -> bool:
    """Return whether a way works here, and gives the very numbers that are right: a sum of the largest numbers, then
    rounded to float32, then times the scale."""
    ends = torch.tensor([[MOST], [-MOST]], dtype=torch.int8).repeat(1, 4096)
    ends[:, -1] = 1  # a sum that float32 has to round
    scale = torch.tensor([0.1, 0.3])
    sums = (ends.double() @ ends.double().t()).float() * scale
    try:
        product = way(ends, scale)
        return all(torch.equal(product(ends[:n]), sums[:n]) for n in (1, 2))
    except (AttributeError, RuntimeError):
        return False


def quantise(model: nn.Module, compiles: bool = False) -> None:
    """Replace every Linear of a model by one of 8 bits, in place. A table that embeds tokens keeps its own numbers,
    even if it is the head as well. A model that will be compiled takes the plain way: Inductor refuses oneDNN's.
    Raise UserError if there is no way, which `why_not` tells beforehand but for what is compiled."""
    ways = [way for way in WAYS if is_exact(way) and not (compiles and way is packed_product)]
    if not ways:
        raise UserError(f'torch {torch.__version__} does not multiply whole numbers on this CPU in code that is '
                        'compiled\nleave out --compile=True, or give --dtype=float32')
    linears = [(module, name, child) for module in model.modules() for name, child in module.named_children()
               if isinstance(child, nn.Linear)]
    weights = []
    for *_, child in linears:
        weights.append(to_int8(child.weight.detach().float()))
        del child.weight  # or memory would hold all of them twice
    fastest: list[Product] = []
    least = math.inf
    for way in ways:
        products = [way(weight, scale[:, 0]) for weight, scale in weights]
        seconds = time_of_token(products, weights, least)
        if seconds < least:
            fastest, least = products, seconds
    for (module, name, child), product in zip(linears, fastest, strict=True):
        setattr(module, name, Int8Linear(product, child.bias))


def time_of_token(products: list[Product], weights: list[tuple[Tensor, Tensor]], least: float) -> float:
    """Return the seconds for one row with each matrix in turn, as for a token, so that caches hold what they would
    then. Give up, with infinity, what takes far longer than `least`."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for product, (weight, _) in zip(products, weights, strict=True):
            product(weight[:1])
            if time.perf_counter() - began > 10 * least + 0.1:  # the first time may take longer than all others
                return math.inf
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def why_not(device: str) -> str:
    """Return why a device of that type cannot multiply in 8 bits; '' if it can."""
    if device != 'cpu':
        return f'int8 is for a CPU, and this is {device}'
    return '' if any(map(is_exact, WAYS)) else f'torch {torch.__version__} does not multiply whole numbers on this CPU'
