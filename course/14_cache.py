"""
14. The KV cache. To write one more token, the plain file reads the whole text again. What it makes of earlier tokens
is the same each time: their keys and values are kept, and the new one alone is read. Beyond block_size all tokens move.

Question: the queries of earlier tokens are not kept. Why not?
"""
import rung
import torch
from torch import Tensor

import model_trivialised
from model import Cache
from plaingpt.chance import draw

PARTS = ('Attention', 'Block', 'Transformer', 'GPT')
BEFORE = '06_flash'


class Attention(model_trivialised.Attention):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        k, v = cache.extend(k, v) if cache else (k, v)  # each (B, H, length, D)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(model_trivialised.Block):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(model_trivialised.Transformer):
    def forward(self, idx: Tensor, caches: list[Cache] | None = None) -> Tensor:
        first = caches[0].length if caches else 0
        x = self.wte.weight[idx] + self.wpe.weight[first:first + idx.size(1)]  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, caches[layer] if caches else None)
        return self.ln_f(x)


class GPT(model_trivialised.GPT):
    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, seed: int = 1337) -> Tensor:
        room = self.config.block_size
        caches, unread = [Cache(room) for _ in self.transformer.h], idx[:, -room:]
        for number in range(max_new_tokens):
            x = self.transformer(unread, caches)  # (B, T, C)
            sums = model_trivialised.softmax(self.lm_head(x[:, -1])).cumsum(dim=-1)  # (B, V)
            drawn = torch.tensor([[draw(seed, row, number) / 2**63] for row in range(len(idx))])  # (B, 1), 0 to 1
            token = (sums < drawn * sums[:, -1:]).sum(dim=-1, keepdim=True)  # (B, 1)
            idx = torch.cat([idx, token], dim=1)  # (B, T + 1)
            caches, unread = (caches, token) if idx.size(1) <= room else ([], idx[:, -room:])
        return idx


if __name__ == '__main__':
    rung.main(__file__)
