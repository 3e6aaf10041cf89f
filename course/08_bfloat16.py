"""
8. bfloat16. Units that multiply matrices are several times as fast with numbers of 16 bits, and half as many bytes
travel. bfloat16 has float32's range and 8 bits of precision, so nothing overflows; products are summed up in float32.
autocast gives it to products alone: weights, sums and the loss stay in float32, since a step of 0.001 of a weight would
otherwise be rounded away. float16 has 11 bits, and a small range: gradients would become 0, which is why it needs a
GradScaler, and bfloat16 does not. The loss is the same within the rounding of 8 bits, which is 1 in 256.

Question: on a CPU without such units, what does this cost, and why?
"""
import rung
import torch
import torch.nn as nn
from torch import Tensor

PARTS = ('gradient',)
DTYPE, COMPARED, ROUNDING = torch.float32, ('losses',), 2**-8  # autocast leaves float64 as it is


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        _, loss = model(x, y)
    loss.backward()
    return loss.item()


if __name__ == '__main__':
    rung.main(__file__)
