"""
15. Rotary positions and QK-norm. From here on each rung is another function, which learns more from the same tokens. A
table of positions learns place 700 apart from place 701. Instead, pairs of channels of q and k are turned by an angle
that grows with the place: in their product only the difference of the two angles is left, so what counts is how far two
tokens are apart (Su et al. 2021). And q and k are scaled to one length first, so that scores stay small however long
one trains (Henry et al. 2020). The table `wpe` is still there, and nothing reads it.

Question: why are v and the residual stream not turned?
"""
import rung
import torch
import torch.nn.functional as F
from torch import Tensor

import model_trivialised

PARTS = ('Attention', 'Transformer')
BEFORE = '07_adamw'
IN_MODERN = ('rotary positions for a table of them', 'QK-norm')  # rows of docs/modern.md


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor) -> Tensor:
    T, D = x.shape[-2:]
    speeds = 10_000 ** (torch.arange(0, D, 2, device=x.device, dtype=x.dtype) / -D)  # (D/2,), radians a token
    angles = torch.arange(T, device=x.device, dtype=x.dtype)[:, None] * speeds  # (T, D/2)
    one, two = x.chunk(2, dim=-1)  # channels i and i + D/2 are a pair
    return torch.cat([one * angles.cos() + two * angles.sin(), two * angles.cos() - one * angles.sin()], dim=-1)


class Attention(model_trivialised.Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        q, k = rotate(norm(q)), rotate(norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)


class Transformer(model_trivialised.Transformer):
    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte.weight[idx]  # (B, T, C), what the token is
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


if __name__ == '__main__':
    rung.main(__file__)
