"""
11. DDP. Two processes have the same weights; each takes half of the micro-batches. What one process adds up, several
add up together: DistributedDataParallel does so with the gradients, while backward still computes those of earlier
layers. Then all make the same update, and have the same weights again. It is enough to do so once in a step, after the
last micro-batch. DDP takes the mean over processes; the shares are of the whole step, and their sum is wanted, hence `*
n`. parallel_trivialised.py has the same on machines that are a list.

Question: what would happen if one process had a micro-batch more than the other?
"""
import rung
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model_trivialised import GPT
from plaingpt.machines.strategies import set_gradient_sync

PARTS = ('prepare', 'gradient')
PROCESSES = 2

batch_size: int = 4  # windows in a micro-batch


def prepare(model: GPT) -> nn.Module:
    return DistributedDataParallel(model)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    rank, n = dist.get_rank(), dist.get_world_size()
    loss = torch.zeros(())
    own = [*zip(x.split(batch_size), y.split(batch_size), strict=True)][rank::n]
    for number, (part_x, part_y) in enumerate(own, 1):
        set_gradient_sync(model, on=number == len(own))
        _, mean = model(part_x, part_y)  # over this part
        share = mean * (len(part_x) / len(x))  # of the mean over all
        (share * n).backward()
        loss = loss + share.detach()
    dist.all_reduce(loss)
    return loss.item()


if __name__ == '__main__':
    rung.main(__file__)
