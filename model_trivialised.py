"""
GPT-2, plainly: the same names, weights and numbers as model.py, and no speed. tests/test_twins.py proves them equal.

Shapes: B sequences, T tokens in each, C channels for each token, H heads of D = C // H channels, V tokens in all.
"""
import math

import torch
import torch.nn as nn
from torch import Tensor

from model import GPTConfig
from plaingpt.chance import draw


def softmax(x: Tensor) -> Tensor:
    """Numbers -> probabilities, along the last dimension: all above 0, their sum 1, and the order kept."""
    x = torch.exp(x - x.max(dim=-1, keepdim=True).values)  # the largest becomes 1, so that nothing overflows
    return x / x.sum(dim=-1, keepdim=True)


def gelu(x: Tensor) -> Tensor:
    """Let large numbers pass and hold negative ones back: GPT-2's approximation of x * P(N(0, 1) < x)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, q, k and v (B, T, D) -> (B, T, D): each token gets a mixture of the values of the tokens up to it."""
    _, T, D = q.shape
    may_look = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()  # (T, T), row t is True at 0..t
    scores = q @ k.transpose(1, 2)  # (B, T, T), row t, column s: how much t cares about s
    scores = scores / math.sqrt(D)  # a sum of D products grows as the root of D, and softmax would see one winner only
    scores = scores.masked_fill(~may_look, -math.inf)  # (B, T, T), the future is hidden
    return softmax(scores) @ v  # (B, T, T) @ (B, T, D) -> (B, T, D)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V) and targets (B, T) -> the mean of -log softmax(logits)[target], in nats per token."""
    highest = logits.max(dim=-1).values  # (B, T)
    log_sum = highest + torch.log(torch.exp(logits - highest[..., None]).sum(dim=-1))  # (B, T)
    chosen = logits.gather(-1, targets[..., None])[..., 0]  # (B, T), the logit of what really came next
    return (log_sum - chosen).mean()


class LayerNorm(nn.Module):
    """Shift and scale the channels of each token to mean 0 and variance 1, then apply a learned gain and bias."""

    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)  # (B, T, 1)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)  # (B, T, 1)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * self.weight  # (B, T, C); 1e-5: never / 0
        return x if self.bias is None else x + self.bias


class Attention(nn.Module):
    """Each token gathers information from itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (z.chunk(self.n_head, dim=-1) for z in (q, k, v))  # each H times (B, T, D)
        heads = [attend(q[h], k[h], v[h]) for h in range(self.n_head)]  # H times (B, T, D)
        y = torch.cat(heads, dim=-1)  # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Each token is transformed on its own, in a space four times as wide, which has proved a good ratio (Vaswani et
    al. 2017)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = gelu(x)  # (B, T, 4C)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """One layer: attention, then the MLP, each of which adds its result to the residual stream x. It adds, so that what
    is there stays, and each weight is one sum away from the loss: even deep models can be trained (He et al. 2015)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Tokens -> what the model makes of each of them, given those before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) -> (B, T, C)"""
        T = idx.size(1)
        x = self.wte.weight[idx] + self.wpe.weight[:T]  # (B, T, C), what the token is + where it stands
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    """The language model: from a sequence of tokens to a prediction of each next one."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if (config.arch, config.gelu, config.tie_weights) != ('gpt2', 'tanh', True):
            raise ValueError(f'GPT-2 as OpenAI made it is all that this file computes, and {config} is another model')
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one table embeds a token and predicts it, learned once
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw from Normal(0, 0.02); smaller where a layer adds to the residual stream, whose sum keeps its size."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)  # LayerNorm gains
            elif name.endswith('c_proj.weight'):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(0.0, 0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) -> logits (B, T, V); and, given targets (B, T), the mean cross-entropy in nats per token."""
        x = self.transformer(idx)  # (B, T, C)
        logits = self.lm_head(x)  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, seed: int = 1337) -> Tensor:
        """Continue idx (B, T), one token at a time -> (B, T + max_new_tokens)."""
        for number in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])  # (B, T, V)
            sums = softmax(logits[:, -1]).cumsum(dim=-1)  # (B, V), the last of them 1
            drawn = torch.tensor([[draw(seed, row, number) / 2**63] for row in range(len(idx))])  # (B, 1), 0 to 1
            token = (sums < drawn * sums[:, -1:]).sum(dim=-1, keepdim=True)  # (B, 1), the first whose sum reaches that
            idx = torch.cat([idx, token], dim=1)  # (B, T + 1)
        return idx
