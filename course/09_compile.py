"""
9. compile. Between two products stand chains of small operations: a sum, a LayerNorm, a GELU. torch.compile writes one
kernel for each chain of this very model, forward and backward, as people have written those of rung 4. That takes up to
a minute, once: all blocks have the same code, so that compiling a block serves them all. train.py does it on a GPU,
where starting an operation costs about as much as a small one takes. So this rung and rung 8 are side paths: on a CPU,
the course continues from rung 7.

Question: why are the names of the weights, as a checkpoint has them, the same as before?
"""
import rung
import torch.nn as nn

from model_trivialised import GPT

PARTS = ('prepare',)
BEFORE = '07_adamw'


def prepare(model: GPT) -> nn.Module:
    for block in model.transformer.h:
        block.compile()
    return model


if __name__ == '__main__':
    rung.main(__file__)
