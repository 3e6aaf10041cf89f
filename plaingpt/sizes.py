"""
The size of a model: its parameters, and the bytes that a process holds while it trains it. A weight, its gradient and
AdamW's two moments, or Muon's one, are float32, 4 bytes each; the rest depends on the batch.
"""
from typing import Any, NamedTuple, Self

from model import CHUNK, GPT, MOST_LOGITS, GPTConfig
from plaingpt.machines import strategies
from plaingpt.machines.zero import deal, names_of

GPT2 = {  # Radford et al. 2019, table 2; their vocabulary is 50257 tokens, their windows 1024
    'gpt2': GPTConfig(vocab_size=50257), 'gpt2-medium': GPTConfig(vocab_size=50257, n_layer=24, n_head=16, n_embd=1024),
    'gpt2-large': GPTConfig(vocab_size=50257, n_layer=36, n_head=20, n_embd=1280),
    'gpt2-xl': GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600)}
FLOAT = 4  # bytes
RECORD = 350  # bytes that a checkpoint takes for each tensor beside its numbers: a name, a shape, a checksum
REST = 4000  # bytes that a checkpoint takes for settings and the like


def parts_of(model: GPT) -> dict[str, int]:
    """Return the number of parameters in each part; they add up to the model's."""
    labels = {'wte': 'token table', 'wpe': 'position table', '.mix': 'shortcuts', '.attn.': 'attention',
              '.mlp.': 'MLPs', 'ln_': 'LayerNorms', 'lm_head': 'head'}
    sizes = dict.fromkeys(labels.values(), 0)
    for name, p in model.named_parameters():  # tied weights come once, under their first name
        sizes[next(label for word, label in labels.items() if word in name)] += p.numel()
    return sizes


def n_parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


class Group(NamedTuple):
    """The parameters that an optimizer treats alike."""

    sizes: list[int]  # numbers in each parameter
    n_moments: int  # numbers that the optimizer keeps for each of those

    @classmethod
    def of(cls, group: dict[str, Any]) -> Self:
        """Return the sizes of an optimizer's group."""
        return cls([p.numel() for p in group['params']], sum(name != 'step' for name in names_of(group)))


def moments(groups: list[Group]) -> int:
    """Return the bytes that an optimizer keeps for all parameters."""
    return sum(FLOAT * group.n_moments * sum(group.sizes) for group in groups)


def tensor_bytes(model: GPT, groups: list[Group]) -> int:
    """Return the bytes of all weights and their moments."""
    return FLOAT * n_parameters(model) + moments(groups)


def checkpoint_bytes(model: GPT, groups: list[Group], tokenizer_bytes: int) -> int:
    """Return the bytes of a file with each weight and its moments, all float32, and the tokenizer."""
    tensors = sum((1 + group.n_moments) * len(group.sizes) for group in groups)
    return tensor_bytes(model, groups) + RECORD * tensors + REST + tokenizer_bytes


class Held(NamedTuple):
    """Bytes that a process holds from one step to the next (the gradients, from the first one on), and those of other
    processes' weights and gradients that it holds for a moment."""

    weights: int
    gradients: int
    moments: int  # of AdamW and Muon
    gathered: int = 0


def held(model: GPT, groups: list[Group], strategy: strategies.Strategy, n: int, width: int,
         keeps_blocks: bool = False) -> Held:
    """Return what the fullest of `n` processes holds. The optimizer has these `groups` of parameters. Weights travel in
    `width` bytes; `keeps_blocks` is fsdp without reshard_after_forward."""
    whole = FLOAT * n_parameters(model)
    if n == 1:
        return Held(whole, whole, moments(groups))
    if strategy != 'fsdp':  # machines/zero.py deals out whole tensors: with zero1 all, with ddp those of Muon
        divided = [(size, group.n_moments) for group in groups if strategy == 'zero1' or group.n_moments == 1
                   for size in group.sizes]
        shares = [0] * n
        for (size, count), owner in zip(divided, deal([size for size, _ in divided], n), strict=True):
            shares[owner] += FLOAT * count * size
        return Held(whole, whole, moments(groups) - sum(shares) + max(shares))
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    blocks = block * len(model.transformer.h)
    tables = n_parameters(model) - blocks  # complete, with their gradient, from the forward pass to the end
    at_once = width * (blocks if keeps_blocks else 2 * block) + FLOAT * block  # this block, the next, a gradient
    return Held(whole // n, whole // n, moments(groups) // n, 2 * FLOAT * tables + at_once)


class Activations(NamedTuple):
    """Bytes that one micro-batch needs beside the weights: what the forward pass keeps for the backward pass, and
    more."""

    block: int  # kept by one block
    blocks: int  # kept by all of them
    inputs: int  # kept by all of them with activation checkpointing: what goes into each
    around: int  # kept before and after the blocks
    kept: int  # from the loss on: its log-probabilities, or the gradients of the head and of the head's input
    loss: int  # all there is at the loss: also the gradient of logits and log-probabilities; or a part of the logits
    within: int  # made and dropped in the backward pass of a block

    def most(self, recomputes: bool) -> int:
        """Return the most bytes that there are at once: at the loss, or in the last block as the backward pass begins.
        With activation checkpointing one block at a time `recomputes` what it keeps."""
        kept = self.inputs if recomputes else self.blocks
        return kept + max(self.around + self.loss, self.block * recomputes + self.within)


def kept_of_token(config: GPTConfig, width: int) -> int:
    """Return the bytes that a block keeps for each token."""
    C, H = config.n_embd, config.n_head
    # The first norm keeps x and the second x + attention: 2 C of the residual stream. Each product keeps what it
    # multiplies: c_attn C, attention's c_proj C, c_fc C, the MLP's c_proj 4 C. Attention keeps q, k and v, 3 C, and
    # GELU, or ReLU squared, its input, 4 C.
    token = 2 * C * FLOAT + 14 * C * width
    if config.arch == 'gpt2':  # the softmaxes' denominators; mean and 1/std of each LayerNorm; a mark for each dropped
        return token + (H + 4) * FLOAT + 2 * C * (config.dropout > 0)
    # The product that gives v also gives q and k, which are kept before they are turned, and under autocast in float32.
    token += 3 * C * width + 2 * C * FLOAT * (width < FLOAT) + (3 * H + 2) * FLOAT
    # Shortcuts keep x before it is mixed, and what is mixed into v; v's own need not be kept.
    return token + config.shortcuts * C * (FLOAT + 2 * width - 3 * width * (width < FLOAT))


def activations(config: GPTConfig, batch_size: int, width: int, compiles: bool = False) -> Activations:
    """Return the bytes of the tensors that a model's forward pass keeps. Numbers in matrix products have `width` bytes:
    4, or 2 under autocast, which leaves the residual stream, statistics and the loss in float32. `compiles` is for the
    loss alone, as on cuda: what a compiler saves in a block is not known. With dropout a GPU keeps a byte for each
    number that may be dropped; a CPU keeps 4, and attention's (T, T) tables, which are not counted here."""
    n, C, V, is_modern = batch_size * config.block_size, config.n_embd, config.vocab_size, config.arch == 'modern'
    casts = 12 * C * C * width * (width < FLOAT)  # the weights of the products, as bfloat16
    block = n * kept_of_token(config, width) + casts
    within = n * C * (2 * FLOAT + (4 + 8 * is_modern) * width)  # gradients: of the residual stream, of GELU or ReLU^2
    # the norm at the end, and the modern model's at the beginning, keep their input; x, y and which targets count are
    # int64
    around = n * ((1 + is_modern) * C * FLOAT + 2 * FLOAT + 3 * 8)
    half = width * (width < FLOAT)  # bytes of each number that autocast copies
    if compiles or n * V <= MOST_LOGITS:
        around += n * C * width + V * C * half  # lm_head keeps what it multiplies
    if compiles:  # the logits and their gradient, as the head writes and reads them; what is float32 is never stored
        kept, loss = width * n * V, 2 * width * n * V
    elif n * V <= MOST_LOGITS:
        kept, loss = ((1 + is_modern) * FLOAT * n * V, (3 + is_modern) * FLOAT * n * V)  # the cap keeps them once more
    else:  # ChunkedNats keeps gradients; it holds its input, a part of the logits, and with autocast head and gradient
        kept = FLOAT * (n + V) * C
        loss = kept + n * C * FLOAT + min(CHUNK, n * V) * ((1 + is_modern) * FLOAT + half) + 2 * V * C * half
    return Activations(block, config.n_layer * block, config.n_layer * n * C * FLOAT, around, kept, loss, within)


def peak(config: GPTConfig, held: Held, needs: Activations, accumulates: bool, recomputes: bool) -> int:
    """Return the most bytes of tensors that a process holds in a step: at the loss, in the last block as the backward
    pass begins, or at the end, before and in the update. A step that `accumulates` holds its gradients all the time,
    and so does one of several processes; else they come as activations go."""
    base = held.weights + held.moments + held.gathered + held.gradients * accumulates
    at_end = held.weights + held.moments + held.gathered + held.gradients
    # The last gradient is that of the token table. A new one is added to the old one; that of a tied table is the sum
    # of two, since it is the head as well, and for a moment all three exist.
    at_table = at_end + FLOAT * config.vocab_size * config.n_embd * (accumulates + 2 * config.tie_weights)
    # Muon holds all matrices of one shape, a third of those of the blocks, in six forms at once; several processes
    # share them, and each holds less.
    at_update = at_end + 6 * FLOAT * 4 * config.n_layer * config.n_embd**2 * (config.arch == 'modern')
    return max(base + needs.most(recomputes), at_table, at_update)
