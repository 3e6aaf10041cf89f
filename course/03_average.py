"""
3. All equally. Each token gets the plain mean of the values of all tokens up to it. The mask is there, the softmax is
not: what a token asks for (q) and what others offer (k) makes no difference. It is a bag of words: which tokens came
before, and not which of them matters here, nor, but for the table of positions, in which order they came.

The loss is 3.98: knowing what came before, in whatever order, is worth 0.23 nats. Attention, which chooses where to
look, gets to 3.86, and so choosing is worth 0.12.

Question: at row t, what do q and k have to be for attention to compute this mean?
"""
import rung
import torch
from torch import Tensor

PARTS = ('attend',)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T = v.size(1)
    before = torch.ones(T, T, dtype=v.dtype, device=v.device).tril()  # (T, T), row t is 1 at 0..t
    return before / before.sum(dim=1, keepdim=True) @ v  # (B, T, D)


if __name__ == '__main__':
    rung.main(__file__)
