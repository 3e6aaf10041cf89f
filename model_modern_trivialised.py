"""
The modern model, plainly, and Muon, its rule of learning: the same names, weights and numbers as model_modern.py and
plaingpt/muon.py, and no speed. tests/test_modern_twins.py proves them equal. Read model_trivialised.py first.

Shapes: B sequences, T tokens in each, C channels for each token, H heads of D = C // H channels, V tokens in all.
"""
import math

import torch
import torch.nn as nn
from torch import Tensor

from model import GPTConfig
from model_trivialised import softmax


def norm(x: Tensor) -> Tensor:
    """Scale the last dimension to a mean square of 1."""
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-6)


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of channels of x (B, T, D) by angles that grow with the position, so that the product of two tokens
    depends on how far they are apart, and not on where they stand."""
    _, T, D = x.shape
    turned = x.clone()
    for i in range(D // 2):
        one, two = x[..., i], x[..., i + D // 2]  # a pair, each (B, T)
        angle = torch.arange(T, dtype=x.dtype) * 10_000 ** (-2 * i / D)  # (T,), the first pairs turn fastest
        turned[..., i] = one * torch.cos(angle) + two * torch.sin(angle)
        turned[..., i + D // 2] = two * torch.cos(angle) - one * torch.sin(angle)
    return turned


class Attention(nn.Module):
    """Each token gathers information from itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.block_size = config.n_head, config.block_size
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.mix = nn.Parameter(torch.empty(1)) if config.shortcuts and layer > 0 else None

    def forward(self, x: Tensor, first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        _, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        mixed = v if self.mix is None or first_v is None else (1 - self.mix) * v + self.mix * first_v  # (B, T, C)
        position = torch.arange(T)
        distance = position[:, None] - position  # (T, T), from row t back to column s
        may_look = (distance >= 0) & (distance < self.block_size)
        heads = []
        for q_h, k_h, v_h in zip(*(z.chunk(self.n_head, dim=-1) for z in (q, k, mixed)), strict=True):  # (B, T, D) each
            q_h, k_h = rotate(norm(q_h)), rotate(norm(k_h))
            scores = q_h @ k_h.transpose(1, 2) / math.sqrt(C // self.n_head)  # (B, T, T)
            heads.append(softmax(scores.masked_fill(~may_look, -math.inf)) @ v_h)  # (B, T, D)
        return self.c_proj(torch.cat(heads, dim=-1)), v


class MLP(nn.Module):
    """Each token is transformed on its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        return self.c_proj(torch.where(x > 0, x, 0.0) ** 2)


class Block(nn.Module):
    """One layer: attention, then the MLP, each of which adds its result to the residual stream x."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.mix = nn.Parameter(torch.empty(2)) if config.shortcuts else None

    def forward(self, x: Tensor, embedded: Tensor, first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * embedded  # (B, T, C), what the tokens are comes in once more
        y, v = self.attn(norm(x), first_v)
        x = x + y
        return x + self.mlp(norm(x)), v


class Transformer(nn.Module):
    """Tokens -> what the model makes of each of them, given those before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) -> (B, T, C)"""
        embedded = norm(self.wte.weight[idx])  # (B, T, C)
        x, first_v = embedded, None
        for block in self.h:
            x, v = block(x, embedded, first_v)
            first_v = v if first_v is None else first_v
        return norm(x)


class GPT(nn.Module):
    """The language model: from a sequence of tokens to a prediction of each next one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Zero what is added to the residual stream, and the head: at first all tokens are equally likely."""
        for name, p in self.named_parameters():
            if name.endswith(('c_proj.weight', 'lm_head.weight')):
                p.zero_()
            elif name.endswith('attn.mix'):
                p.fill_(0.5)
            elif name.endswith('mix'):
                p.copy_(torch.tensor([1.0, 0.0]))
            else:
                p.normal_(0.0, 1.0 if name.endswith('wte.weight') else math.sqrt(1 / 3 / self.config.n_embd))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) -> logits (B, T, V); and, given targets (B, T), the mean cross-entropy in nats per token."""
        logits = 15 * torch.tanh(self.lm_head(self.transformer(idx)) / 15)  # (B, T, V), none beyond 15
        if targets is None:
            return logits, None
        chosen = logits.gather(-1, targets[..., None])[..., 0]  # (B, T), the logit of what really came next
        return logits, (torch.log(torch.exp(logits).sum(dim=-1)) - chosen).mean()  # exp(15) does not overflow


def muon(p: Tensor, gradient: Tensor, mean: Tensor, lr: float, decay: float, momentum: float) -> tuple[Tensor, Tensor]:
    """Return the matrix p (m, n) after one step of Muon, and the new mean of its gradients, which was 0 at first."""
    mean = momentum * mean + (1 - momentum) * gradient
    x = (1 - momentum) * gradient + momentum * mean  # a look ahead (Nesterov)
    x = x / (torch.sqrt((x**2).sum()) + 1e-7)  # no singular value is above 1
    for _ in range(5):  # each singular value s becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5, and so comes near to 1
        square = x @ x.T  # (m, m)
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    rows, columns = p.shape
    return p - lr * decay * p - lr * math.sqrt(max(1, rows / columns)) * x, mean
