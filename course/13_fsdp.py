"""
13. FSDP. Weights and gradients are left to divide. Each process holds an equal part of every tensor, and just
before a block computes, the others' parts are gathered; afterwards they are given back. On the way back, each process
gets its own part of the mean gradient. So 16/N bytes for a parameter are held, and the price is that weights travel in
every micro-batch. The optimizer of rung 7 is enough: it updates what each process holds. docs/training.md, "Memory by
strategy", has the bytes, measured.

Question: why are blocks the unit that is gathered, and not single matrices, or the whole model?
"""
import rung
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from model_trivialised import GPT

PARTS = ('prepare', 'gradient')
BEFORE = '11_ddp'
PROCESSES = 2

batch_size: int = 4  # windows in a micro-batch


def prepare(model: GPT) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    return model


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    rank, n = dist.get_rank(), dist.get_world_size()
    loss = torch.zeros(())
    own = [*zip(x.split(batch_size), y.split(batch_size), strict=True)][rank::n]
    for part_x, part_y in own:
        _, mean = model(part_x, part_y)  # over this part
        share = mean * (len(part_x) / len(x))  # of the mean over all
        (share * n).backward()
        loss = loss + share.detach()
    dist.all_reduce(loss)
    return loss.item()


if __name__ == '__main__':
    rung.main(__file__)
