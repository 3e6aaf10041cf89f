"""
GPT-2, fast. model_trivialised.py computes the same function, plainly, and `diff model_trivialised.py model.py` lists
the changes: `fast:` marks the same function computed in another way, `more:` what the plain file leaves out.

Shapes, in every file of this project:
    B  sequences in the batch        C  width of the residual stream (n_embd)
    T  tokens in a sequence          H  attention heads (n_head)
    V  tokens in the vocabulary      D  width of one head, C // H

The model is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", with OpenAI's names for
the weights.
"""
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from plaingpt.chance import draw
from plaingpt.errors import CHECKPOINT, NOT_FINITE, UserError

MOST_LAYERS, MOST_PARAMETERS = 10_000, 10**13  # more: above that it is a mistake, and would take all memory


# more: the plain file imports this
@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are GPT-2's smallest, 124M."""

    block_size: int = 1024  # the longest sequence that the model can read, in tokens
    vocab_size: int = 50304  # GPT-2 has 50257 tokens; matrices whose sides are multiples of 128 multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the Linear layers and LayerNorms, as in GPT-2
    gelu: Literal['tanh', 'exact'] = 'tanh'  # GPT-2's approximation, or the function itself, as in nanoGPT
    tie_weights: bool = True  # one table embeds a token and predicts it
    arch: Literal['gpt2', 'modern'] = 'gpt2'  # the model of this file, or of model_modern.py
    shortcuts: bool = False  # in the modern one, from the first layer to all others

    def __post_init__(self) -> None:
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise UserError(f'n_embd={self.n_embd} must be a multiple of n_head={self.n_head}: heads are equally wide')
        if self.arch == 'modern':
            if self.bias or self.tie_weights or self.dropout:
                raise UserError('the modern model has no biases, no dropout and an untied head: give --bias=False '
                                '--dropout=0 --tie_weights=False, as config/train_modern.py does')
            if self.n_embd // self.n_head % 2:
                raise UserError(f'n_embd={self.n_embd} / n_head={self.n_head} must be even: the modern model turns the '
                                'channels of a head in pairs')
        parameters = self.n_embd * (self.vocab_size + self.block_size + 12 * self.n_layer * self.n_embd)
        if self.n_layer > MOST_LAYERS or parameters > MOST_PARAMETERS:
            raise UserError(f'n_layer={self.n_layer}, n_embd={self.n_embd}, vocab_size={self.vocab_size}, block_size='
                            f'{self.block_size}: a model of {parameters:.2g} parameters, more than any machine holds')


# more: generation
class Cache:
    """The keys and values of the tokens that one layer has read, so that they need not be computed again for the next
    token. If there is no room, a new token takes the place of the oldest."""

    mask: Tensor | None = None  # (1, room), True where the next token may look; None: at all that is kept

    def __init__(self, room: int) -> None:
        self.room = room  # tokens
        self.length: int | Tensor = 0  # tokens read
        self.k = self.v = torch.empty(0)  # (B, H, room, D) from the first call on

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the k and v (B, H, T, D) of T more tokens; return those of all tokens kept, (B, H, <= length, D)."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = k.new_empty(B, H, self.room, D), v.new_empty(B, H, self.room, D)
        assert self.length == 0 or k.size(2) == 1, 'after the first tokens, the mask allows for one at a time'
        first = self.length % self.room
        new = slice(first, first + k.size(2))
        self.k[:, :, new], self.v[:, :, new] = k, v
        self.length += k.size(2)
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


# more: models without numbers
class Undrawn(TorchFunctionMode):
    """A mode in which normal_ draws nothing. A tensor without numbers has nothing to draw, but PyTorch would load its
    compiler to find that out: a second, at the start of every sample.py."""

    def __torch_function__(self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        return None if func in (nn.init.normal_, Tensor.normal_) else func(*args, **(kwargs or {}))


LayerNorm = nn.LayerNorm  # fast: one kernel for what the plain file writes out: mean, variance, gain and bias


class Attention(nn.Module):
    """Each token gathers information from itself and the tokens before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)  # more: dropout

    # more: a name for the input of the kernel, from which xray.py forms the (T, T) table
    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q, k and v of all heads, each (B, H, T, D)"""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        # fast: all heads at once, as one more dimension of the batch; the plain file loops over them
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # each (B, H, T, D)
        return q, k, v

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # more: a cache, to continue a text
        q, k, v = self.heads(x)  # each (B, H, T, D)
        B, T, C = x.shape
        if cache is not None:
            k, v = cache.extend(k, v)  # each (B, H, length, D)
        # fast: one kernel for softmax(q @ k^T / sqrt(D)) @ v that never stores the (T, T) table of the plain file;
        # a single query is the newest token, and may look at everything
        mask = None if cache is None else cache.mask
        dropout = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1, dropout_p=dropout)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token is transformed on its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = 'tanh' if config.gelu == 'tanh' else 'none'  # more: the exact GELU, and dropout
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = F.gelu(x, approximate=self.approximate)  # fast: one kernel for the formula of the plain file
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each of which adds its result to the residual stream x."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:  # more: the cache
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """Tokens -> what the model makes of each of them, given those before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)  # more: dropout
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        self.recomputes = False  # more: activation checkpointing (Chen et al. 2016)

    def forward(self, idx: Tensor, caches: list[Cache] | None = None) -> Tensor:  # more: a cache for each layer
        """idx (B, T) -> (B, T, C)"""
        T, block_size = idx.size(1), self.wpe.num_embeddings
        assert block_size >= T, f'{T} tokens do not fit in a block of {block_size}'
        # more: the positions of tokens that continue a text
        positions = caches[0].length + torch.arange(T, device=idx.device) if caches else slice(T)
        x = self.drop(self.wte(idx) + self.wpe.weight[positions])  # (B, T, C)
        for layer, block in enumerate(self.h):
            if self.recomputes and self.training:  # more: what a block computes is forgotten, and computed twice
                x = checkpoint(block, x, use_reentrant=False)
                continue
            x = block(x, caches[layer] if caches else None)
        return self.ln_f(x)


# fast: the plain file stores all logits, (B, T, V), and their gradient
MOST_LOGITS = 2**26  # in training, a larger table of them is never stored whole
CHUNK = 2**25  # logits that are stored at a time instead


class ChunkedNats(torch.autograd.Function):
    """The cross-entropy of a head, a few tokens at a time. Forward computes their gradient at once, and backward only
    scales it: so their logits need not be kept, nor computed a second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        """x (N, C), the weight of the head (V, C) and targets (N,) -> the sum of the nats of those that are not -1. A
        `cap` turns each logit z into cap * tanh(z / cap)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype  # of the products
        precise = torch.promote_types(dtype, torch.float32)
        dx, dw = torch.empty_like(x, dtype=precise), torch.zeros_like(weight, dtype=precise)
        nats = x.new_zeros((), dtype=precise)
        rows = max(1, CHUNK // len(weight))
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            for part, target, gradient in zip(x.split(rows), targets.split(rows), dx.split(rows), strict=True):
                part, is_real, target = part.to(dtype), (target != -1)[:, None], target.clamp(min=0)[:, None]  # (n, 1)
                z, slope = (part @ head.T).to(precise), None  # (n, V)
                if cap is not None:
                    z = z.div_(cap).tanh_()
                    slope = z.square().neg_().add_(1)  # of the tanh
                    z *= cap
                z -= z.amax(dim=-1, keepdim=True)
                chosen = z.gather(-1, target)
                total = z.exp_().sum(dim=-1, keepdim=True)
                nats += ((total.log() - chosen) * is_real).sum()
                # the gradient of a target's nats: the softmax, less 1 for the target itself
                z /= total
                z.scatter_add_(-1, target, torch.full_like(total, -1.0))
                z *= is_real
                if slope is not None:
                    z *= slope
                dz = z.to(dtype)
                gradient.copy_(dz @ head)
                dw.addmm_(dz.T, part) if dtype == precise else dw.add_(dz.T @ part)
                del z, dz, slope  # or they would stay in memory beside the next ones
        ctx.save_for_backward(dx, dw)
        ctx.dtype = x.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad).to(ctx.dtype), dw.mul_(grad).to(ctx.dtype), None, None


chunked_nats: Callable[[Tensor, Tensor, Tensor, float | None], Tensor] = ChunkedNats.apply


# more: a place for what the modern model does
def capped(z: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(z / cap) of each logit, which is about z if z is small; without a cap, z."""
    return z if cap is None else cap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / cap)


# fast: one kernel for the logarithm of the softmax, in float32 at least, and the choice of each target
def sum_of_nats(z: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Return the sum of the nats of those targets (B, T) that are not -1, for logits z (B, T, V), to be capped."""
    scores = capped(z, cap)
    precise = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(precise.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')


class GPT(nn.Module):
    """The language model: from a sequence of tokens to a prediction of each next one."""

    # more: places for what the modern model has
    body: type[Transformer] = Transformer
    cap: float | None = None  # no logit exceeds it
    compiled_nats: Callable[[Tensor, Tensor, float | None], Tensor] | None = None  # if blocks are compiled
    replay: Callable[[Tensor, list[Cache]], Tensor] | None = None  # the logits of one more token, at one launch

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = self.body(config)  # more: another body
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:  # more: an untied head
            self.lm_head.weight = self.transformer.wte.weight
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

    # more: targets of -1, which do not count; the choice of which logits to return; and the caches
    def forward(self, idx: Tensor, targets: Tensor | None = None, logits: Literal['all', 'last', 'none'] = 'all',
                caches: list[Cache] | None = None) -> tuple[Tensor | None, Tensor | None]:
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) for 'last', or None for 'none'; and, given targets (B, T), the
        mean cross-entropy in nats per token over the targets that are not -1 (0 if all are)."""
        x = self.transformer(idx, caches)  # (B, T, C)
        if targets is None:
            if logits == 'last':
                x = x[:, -1:]  # fast: the last position is all that is needed to continue a text
            return (None if logits == 'none' else self.score(x)), None
        count = (targets != -1).sum().clamp(min=1)
        if logits == 'none' and torch.is_grad_enabled():
            is_large = targets.numel() * self.config.vocab_size > MOST_LOGITS
            # fast: compiled, it reads logits and writes their gradient in the precision of the products, and what is
            # float32 between them never leaves the chip; that costs a GPU less time than parts do, and more memory
            if self.compiled_nats and (x.is_cuda or not is_large):
                return None, self.compiled_nats(self.lm_head(x), targets, self.cap) / count
            if is_large:
                return None, chunked_nats(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.cap) / count
        scores = self.score(x)  # (B, T, V)
        return {'all': scores, 'last': scores[:, -1:], 'none': None}[logits], sum_of_nats(scores, targets) / count

    # more: the cap
    def score(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> logits (B, T, V)"""
        return capped(self.lm_head(x), self.cap)

    # more: temperature, top-k, top-p, stop token, seed
    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float | None = None, stop: int | Sequence[int] | None = None, seed: int | None = None,
               n_vocab: int | None = None, use_cache: bool = True, first: int = 0) -> Generator[Tensor]:
        """Continue each row of idx (B, T), T > 0; yield one token for each row, (B,), at a time, until all rows have
        said `stop`, or one of several (a row that has said it repeats it). Temperature 0 takes the likeliest token. Ids
        from n_vocab on are never drawn: they pad the vocabulary to a round size. The rows are samples number `first`,
        first + 1, ...: with the same seed a sample of the same number has the same text, cached or not, whatever else
        is in the batch."""
        block_size = self.config.block_size
        # fast: each token is read once, and its keys and values kept; the plain file reads all of them every time
        idx = unread = idx[:, -block_size:]
        room = min(block_size, idx.size(1) + max_new_tokens)
        caches = [Cache(room) for _ in self.transformer.h] if use_cache else None
        stopped = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)  # (B,)
        stops = None if stop is None else torch.tensor(stop, device=idx.device).flatten()
        for number in range(max_new_tokens):
            if seed is None:
                seed = int(torch.randint(2**62, ()))
            scores = self.score_next(unread, caches)  # (B, V)
            draws = [draw(seed, first + row, number) for row in range(len(scores))]
            token = choose(scores[:, :n_vocab].float(), temperature, top_k, top_p, draws)  # (B,)
            if stops is not None:
                token = torch.where(stopped, idx[:, -1], token)
                stopped |= torch.isin(token, stops)
            yield token
            if stops is not None and stopped.all():
                return
            idx = torch.cat([idx, token[:, None]], dim=1)
            if idx.size(1) > block_size:
                idx, caches = self.go_beyond_the_block(idx, caches)
            unread = idx if caches is None else token[:, None]

    def go_beyond_the_block(self, idx: Tensor, caches: list[Cache] | None) -> tuple[Tensor, list[Cache] | None]:
        """Return the end of a text idx (B, T) that is longer than the block, and its caches, which are none: GPT-2's
        positions are absolute, so every token moves, and is read anew."""
        return idx[:, -self.config.block_size:], None

    def score_next(self, idx: Tensor, caches: list[Cache] | None) -> Tensor:
        """Return the logits (B, V) of what follows idx (B, T), without dropout. The mode is restored at once: a stream
        may be left at any token, and run beside another one or beside training."""
        if not self.training:
            if self.replay and caches and caches[0].length:
                return self.replay(idx, caches)
            return self(idx, logits='last', caches=caches)[0][:, 0]
        self.eval()
        try:
            return self.score_next(idx, caches)
        finally:
            self.train()

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, stop: int | Sequence[int] | None = None, seed: int | None = None,
                 n_vocab: int | None = None, use_cache: bool = True, first: int = 0) -> Tensor:
        """Return idx (B, T) with all that `stream` adds to it, in one tensor (B, <= T + max_new_tokens)."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, seed, n_vocab, use_cache, first)
        return torch.cat([idx, *(token[:, None] for token in new)], dim=1)

    @classmethod
    def on_meta(cls, config: GPTConfig) -> 'GPT':
        """Return a model whose parameters have shapes and no numbers: it takes no memory, and draws nothing at
        random."""
        with torch.device('meta'), Undrawn():
            return cls(config)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> 'GPT':
        """Return a model that takes these tensors as its parameters, without drawing any at random, and without a
        copy."""
        model = cls.on_meta(config)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise UserError(f'these weights do not fit {config}: {first}', CHECKPOINT) from None
        if config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight  # assigning has separated them
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder: str, dropout: float = 0.0) -> 'GPT':
        """Return a GPT-2 with its weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', any other GPT-2 of the
        Hugging Face hub, or a local folder with one. Raise UserError if it is missing or not whole, or is a different
        model."""
        from plaingpt.formats import huggingface

        return cls.from_weights(*huggingface.load(name_or_folder, dropout))

    def crop_block_size(self, block_size: int) -> 'GPT':
        """Return the same model for sequences of at most block_size tokens."""
        if block_size > self.config.block_size:
            raise UserError(f'block_size={block_size} is longer than the {self.config.block_size} positions that this '
                            f'model has learned: give --block_size={self.config.block_size} or less')
        weights = {name: p[:block_size].clone() if name.endswith('wpe.weight') else p
                   for name, p in self.state_dict().items()}
        return self.from_weights(replace(self.config, block_size=block_size), weights)

    def flops_per_token(self) -> int:
        """Return the floating-point operations to train on one token: 6 for each weight of a matrix product (2 forward
        and 4 backward), 12 T C for each layer's attention (Chowdhery et al. 2022, PaLM, appendix B)."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


# more: generation
def refuse_not_finite(is_finite: bool) -> None:
    """Raise UserError unless a model's predictions are finite: finite weights can be damaged, too."""
    if not is_finite:
        raise UserError('what the model predicts is infinite or NaN: its weights are damaged, or too large for --dtype',
                        NOT_FINITE)


ALL = 2**40  # a probability of 1 as a whole number: fine enough, and sums of such numbers stay far below 2**63
GREEDY = 1e-6  # a lower temperature would only choose among logits that differ by rounding


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, draws: Sequence[int]) -> Tensor:
    """Choose one token (B,) for each row of logits (B, V), from the top_k likeliest, or from the fewest that hold top_p
    of the probability (Holtzman et al. 2019); with both, from the fewest that hold top_p of what the top_k have. A
    number of 63 bits for each row draws its token: as a share of 2**63, it is a place in the cumulative probability."""
    if temperature < GREEDY:
        best = logits.max(dim=-1)
        refuse_not_finite(bool(best.values.isfinite().all()))
        return best.indices
    ids, V = None, logits.size(-1)
    if top_k is not None or top_p is not None:
        logits, ids = logits.topk(min(top_k or V, V))  # (B, K) each, the likeliest first
    # Whole numbers, since their sums do not depend on the order of adding, which differs between devices.
    p = ((logits / temperature).softmax(dim=-1) * ALL).long()  # (B, K)
    sums = p.cumsum(dim=-1)
    if top_p is not None:
        beyond = sums - p >= int(top_p * ALL)  # (B, K), True if the tokens before this one suffice
        beyond[:, 0] = False  # the likeliest stays, even for a top_p of 0
        sums = p.masked_fill(beyond, 0).cumsum(dim=-1)
    totals = sums[:, -1].tolist()
    refuse_not_finite(min(totals) > 0)  # if one logit is infinite or NaN, each probability of its row is NaN
    before = [number * total >> 63 for number, total in zip(draws, totals, strict=True)]
    drawn = (sums <= torch.tensor(before, device=sums.device)[:, None]).sum(dim=-1, keepdim=True)  # (B, 1)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]
