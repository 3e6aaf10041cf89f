"""
6. FlashAttention. The table of who looks at whom has T x T numbers for each head: at T = 1024 it is larger than all
else, and it is written and read several times. One kernel makes it tile by tile, and keeps for each row the largest
score so far, the sum of the exponentials, and the mixture of values; if a larger score comes, it scales down what it
has. No table is ever stored, neither here nor on the way back, where its tiles are computed again (Dao et al. 2022).

Question: with T = 64, as here, the table is small. What would you expect at T = 1024, and how could you try?
"""
import rung
import torch.nn.functional as F
from torch import Tensor

import model_trivialised

PARTS = ('Attention',)


class Attention(model_trivialised.Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


if __name__ == '__main__':
    rung.main(__file__)
