"""
16. ReLU squared. GELU computes a tanh for each number. max(0, x) squared was found by a search over formulas (So et al.
2021): it is cheap, and exactly 0 for half of the numbers. Whether it helps depends on the model: below, it gains a
little with one layer, and costs a little with four.

Question: for a large x, gelu(x) is x, and this is x squared. What keeps the residual stream from growing?
"""
import rung
import torch.nn.functional as F
from torch import Tensor

import model_trivialised

PARTS = ('MLP',)
IN_MODERN = ('ReLU squared for GELU',)  # rows of docs/modern.md


class MLP(model_trivialised.MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.relu(x).square()  # (B, T, 4C)
        return self.c_proj(x)  # (B, T, C)


if __name__ == '__main__':
    rung.main(__file__)
