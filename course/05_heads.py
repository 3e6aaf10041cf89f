"""
5. All heads at once. A loop over heads gives the machine H small products, one after the other. If heads are one more
dimension of the batch, one call does them all. Why `view` and then `transpose`? Channels 0 to D - 1 of a token are its
head 0, the next D are head 1: view(B, T, H, D) only says so, and moves nothing. transpose(1, 2) then puts H beside B,
as products of batches want it. view(B, H, T, D) would have that shape at once, and would mix tokens with heads.

Question: a GPU has thousands of units, and a CPU core a few. Which of them has more to gain from this?
"""
import math

import rung
import torch
from torch import Tensor

import model_trivialised
from model_trivialised import softmax

PARTS = ('Attention',)


class Attention(model_trivialised.Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        may_look = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()  # (T, T)
        scores = q @ k.transpose(2, 3) / math.sqrt(C // self.n_head)  # (B, H, T, T)
        y = softmax(scores.masked_fill(~may_look, -math.inf)) @ v  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


if __name__ == '__main__':
    rung.main(__file__)
