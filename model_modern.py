"""
model.py, with what was learned since. All that is not defined here is model.py's; `gain:` marks each difference, with
its effect and source, and docs/modern.md says what it gains here. "-18 % (record 5)": a model of 124M needs 18 % fewer
tokens for GPT-2's loss on FineWeb, in the fifth record of modded-nanogpt (Jordan et al. 2024). Shapes as in model.py.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import model
from model import Cache, GPTConfig


# gain: RMSNorm without a gain (Zhang and Sennrich 2019) for LayerNorm: nothing to learn, and a part of -18 % (record 5)
def norm(x: Tensor) -> Tensor:
    """Scale the last dimension to a mean square of 1."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


# gain: rotary positions (Su et al. 2021) for a table of them: only the distance of two tokens counts. Half the tokens,
# with a linear decay and three times the learning rate (record 2)
def turns_of(first: int | Tensor, T: int, D: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, D/2) of the angles of T positions from `first` on, as precise as `like`, or as float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    speeds = 10_000 ** (torch.arange(0, D, 2, device=like.device, dtype=dtype) / -D)  # (D/2,), radians a token
    angles = (first + torch.arange(T, device=like.device, dtype=dtype))[:, None] * speeds  # (T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channels i and i + D/2 of x (B, H, T, D), as a pair, by the angle of their position."""
    (cos, sin), (one, two) = turns, x.chunk(2, dim=-1)  # gain: rotary positions, half the tokens (record 2)
    return torch.cat([one * cos + two * sin, two * cos - one * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Each token gathers information from itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:  # gain: value residual, -0.021 nats (record 9)
        super().__init__()
        self.n_head, self.block_size = config.n_head, config.block_size
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # gain: no bias: faster (nanoGPT)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # gain: value residual (Zhou et al. 2024), a share of the first layer's values: -0.021 nats (record 9)
        self.mix = nn.Parameter(torch.empty(1)) if config.shortcuts and layer > 0 else None

    # gain: the turns (record 2), and the first layer's values (B, H, T, D); it returns its own, too (record 9)
    def heads(self, x: Tensor, turns: tuple[Tensor, Tensor], first_v: Tensor | None) -> tuple[Tensor, ...]:
        """x (B, T, C) -> q, k, v of all heads and, for the layers above, v before the mix, each (B, H, T, D)"""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        # gain: QK-norm (Henry et al. 2020) keeps scores small, so that rates may be high: a part of -18 % (record 5)
        q, k = rotate(norm(q), turns), rotate(norm(k), turns)
        mixed = v if self.mix is None or first_v is None else v + self.mix.to(v.dtype) * (first_v - v)
        return q, k, mixed, v

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor], first_v: Tensor | None,
                cache: Cache | None = None) -> tuple[Tensor, Tensor]:  # gain: what heads takes (records 2 and 9)
        q, k, mixed, v = self.heads(x, turns, first_v)  # each (B, H, T, D)
        B, T, C = x.shape
        if cache is not None:
            k, mixed = cache.extend(k, mixed)  # each (B, H, <= length, D)
        # gain: in a text that is longer than the block, a token sees the last block_size tokens (Su et al. 2021)
        band = None if self.block_size >= T else x.new_ones(T, T).bool().tril().triu(1 - self.block_size)
        mask = band if cache is None else cache.mask
        y = F.scaled_dot_product_attention(q, k, mixed, mask, is_causal=T > 1 and band is None)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y), v  # gain: value residual, -0.021 nats (record 9)


class MLP(model.MLP):
    """Each token is transformed on its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.relu(x).square()  # gain: ReLU squared (So et al. 2021) for GELU: a part of -18 % (record 5)
        return self.c_proj(x)


class Block(nn.Module):
    """One layer: attention, then the MLP, each of which adds its result to the residual stream x."""

    def __init__(self, config: GPTConfig, layer: int) -> None:  # gain: value residual, -0.021 nats (record 9)
        super().__init__()
        self.attn = Attention(config, layer)  # gain: see norm, -18 % (record 5)
        self.mlp = MLP(config)
        # gain: each layer is given the tokens' embeddings once more (modded-nanogpt): -0.009 nats (record 9)
        self.mix = nn.Parameter(torch.empty(2)) if config.shortcuts else None

    # gain: the embeddings (B, T, C), and what attention takes and returns (records 2 and 9)
    def forward(self, x: Tensor, embedded: Tensor, turns: tuple[Tensor, Tensor], first_v: Tensor | None,
                cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * embedded
        y, v = self.attn(norm(x), turns, first_v, cache)
        x = x + y
        x = x + self.mlp(norm(x))
        return x, v


class Transformer(model.Transformer):
    """Tokens -> what the model makes of each of them, given those before it."""

    def __init__(self, config: GPTConfig) -> None:
        nn.Module.__init__(self)  # gain: no table of positions (Su et al. 2021), no dropout
        self.head_size = config.n_embd // config.n_head
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))  # gain: norm, -18 % (record 5)
        self.recomputes = False

    def forward(self, idx: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """idx (B, T) -> (B, T, C)"""
        x = embedded = norm(self.wte(idx))  # (B, T, C)  # gain: a norm here, too: with the untied head -10 % (record 8)
        turns, first_v = turns_of(caches[0].length if caches else 0, idx.size(1), self.head_size, x), None
        for layer, block in enumerate(self.h):
            if self.recomputes and self.training:
                x, v = checkpoint(block, x, embedded, turns, first_v, use_reentrant=False)
            else:  # gain: shortcuts, -0.030 nats (record 9)
                x, v = block(x, embedded, turns, first_v, caches[layer] if caches else None)
            first_v = v if layer == 0 else first_v
        return norm(x)


class GPT(model.GPT):
    """The language model: from a sequence of tokens to a prediction of each next one."""

    body = Transformer  # gain: with a head that is not tied to the table, so that each has its own rate (record 8)
    cap = 15.0  # gain: logits z become 15 tanh(z / 15) (Gemma team 2024): -7 % against 30 (record 18)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero the head, and all that is added to the residual stream, so that at first each token is as likely as any
        other. Draw embeddings from Normal(0, 1), and the rest smaller in wider models, whose sums are longer."""
        for name, p in self.named_parameters():
            if name.endswith('mix'):
                p.copy_(torch.tensor([0.5] if name.endswith('attn.mix') else [1.0, 0.0]))
            elif name.endswith(('c_proj.weight', 'lm_head.weight')):
                p.zero_()  # gain: zeros (Yang et al. 2022): a part of -18 % (record 5)
            else:  # gain: a standard deviation of sqrt(1/3) / sqrt(fan-in) (modded-nanogpt)
                p.normal_(0.0, 1.0 if name.endswith('wte.weight') else math.sqrt(1 / 3 / self.config.n_embd))

    def go_beyond_the_block(self, idx: Tensor, caches: list[Cache] | None) -> tuple[Tensor, list[Cache] | None]:
        # gain: only distances count (Su et al. 2021), so nothing is read anew: each cache drops its oldest token. Those
        # that stay have seen it, as in a text that is read in one piece, and not as in its last window alone
        return idx, caches
