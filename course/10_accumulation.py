"""
10. Accumulation. The batch of a step may be larger than memory: GPT-2's half a million tokens are, on any GPU. So it
is read in parts, micro-batches, and their gradients are added up, which is what backward does with `p.grad` anyway.
Each part's loss is a mean over that part; the step's is the mean over all windows, so a part counts with its share of
them. Without the share, four parts would give a gradient four times as long.

Question: this is slower than one batch, if that fits. What would you have to count, rather than time, to see the gain?
"""
import rung
import torch.nn as nn
from torch import Tensor

PARTS = ('gradient',)
BEFORE = '07_adamw'

batch_size: int = 4  # windows in a micro-batch


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    loss = 0.0
    for part_x, part_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
        _, mean = model(part_x, part_y)  # over this part
        share = mean * (len(part_x) / len(x))  # of the mean over all
        share.backward()
        loss += share.item()
    return loss


if __name__ == '__main__':
    rung.main(__file__)
