"""
What a model takes: parameters, and the bytes that a process which trains it holds, and when. A weight, its gradient and
AdamW's two moments are float32, 4 bytes each; the rest depends on the batch.
"""
from typing import NamedTuple

from model import CHUNK, GPT, MOST_LOGITS, GPTConfig
from plaingpt.machines import strategies

GPT2 = {  # Radford et al. 2019, table 2; their vocabulary is 50257 tokens, their windows 1024
    'gpt2': GPTConfig(vocab_size=50257), 'gpt2-medium': GPTConfig(vocab_size=50257, n_layer=24, n_head=16, n_embd=1024),
    'gpt2-large': GPTConfig(vocab_size=50257, n_layer=36, n_head=20, n_embd=1280),
    'gpt2-xl': GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600)}
FLOAT = 4  # bytes
RECORD = 350  # bytes that a checkpoint takes for each tensor beside its numbers: a name, a shape, a checksum
REST = 4000  # bytes that it takes for settings and the like


def parts_of(model: GPT) -> dict[str, int]:
    """The parameters of each part; they add up to those of the model."""
    labels = {'wte': 'token table', 'wpe': 'position table', '.attn.': 'attention', '.mlp.': 'MLPs',
              'ln_': 'LayerNorms', 'lm_head': 'head'}
    sizes = dict.fromkeys(labels.values(), 0)
    for name, p in model.named_parameters():  # tied weights are one, and have the first name
        sizes[next(label for word, label in labels.items() if word in name)] += p.numel()
    return sizes


def n_parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


def checkpoint_bytes(model: GPT, tokenizer_bytes: int) -> int:
    """A file with each weight and AdamW's two moments of it, all float32, and the tokenizer."""
    return 3 * FLOAT * n_parameters(model) + 3 * RECORD * len(list(model.parameters())) + REST + tokenizer_bytes


class Held(NamedTuple):
    """Bytes that a process holds from one step to the next (gradients: once there is one), and those of other
    processes' weights and gradients that it holds for a moment."""

    weights: int
    gradients: int
    moments: int  # AdamW's two
    gathered: int = 0


def held(model: GPT, groups: list[list[int]], strategy: strategies.Strategy, n: int, width: int,
         keeps_blocks: bool = False) -> Held:
    """What the fullest of `n` processes holds. The optimizer has `groups` of parameters of these sizes. Weights travel
    in `width` bytes; `keeps_blocks` is fsdp without reshard_after_forward."""
    whole = FLOAT * n_parameters(model)
    if n == 1 or strategy == 'ddp':
        return Held(whole, whole, 2 * whole)
    if strategy == 'zero1':  # whole tensors are dealt out, the largest first, each to who has least
        shares = [0] * n
        for group in groups:
            for size in sorted(group, reverse=True):
                shares[shares.index(min(shares))] += size
        return Held(whole, whole, 2 * FLOAT * max(shares))
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    blocks = block * len(model.transformer.h)
    tables = n_parameters(model) - blocks  # complete, with their gradient, from the forward pass to the end
    at_once = width * (blocks if keeps_blocks else 2 * block) + FLOAT * block  # this block, the next, a gradient
    return Held(whole // n, whole // n, 2 * whole // n, 2 * FLOAT * tables + at_once)


class Activations(NamedTuple):
    """Bytes that one micro-batch needs beside weights: what the forward pass keeps for the backward pass, and more."""

    block: int  # kept by one block
    blocks: int  # kept by all of them
    inputs: int  # kept by all of them with activation checkpointing: what goes into each
    around: int  # kept before and after the blocks
    kept: int  # of the loss, from there on: its log-probabilities, or the gradients of the head and of what it is given
    loss: int  # all there is at the loss: also the gradient of logits and log-probabilities; or a part of the logits
    within: int  # made and dropped while a block goes back


def activations(config: GPTConfig, batch_size: int, width: int) -> Activations:
    """The tensors that model.py's forward keeps, where matrix products have numbers of `width` bytes: 4, or 2 under
    autocast, which leaves the residual stream, statistics and the loss in float32. With dropout a card keeps a byte for
    each number that may be dropped; a CPU keeps 4, and attention's (T, T) tables, which are not counted here."""
    n, C, H, V = batch_size * config.block_size, config.n_embd, config.n_head, config.vocab_size
    # For each token, ln_1 keeps x and ln_2 keeps x + attention: 2 C of the residual stream. Each product keeps what it
    # multiplies: c_attn C, attention's c_proj C, c_fc C, the MLP's c_proj 4 C. Attention keeps q, k and v, 3 C, and
    # GELU its input, 4 C.
    token = 2 * C * FLOAT + 14 * C * width
    token += (H + 4) * FLOAT  # the softmaxes' denominators; mean and 1/std of each LayerNorm
    token += 2 * C * (config.dropout > 0)
    casts = 12 * C * C * width * (width < FLOAT)  # the weights of the products, as bfloat16
    block = n * token + casts
    within = n * C * (2 * FLOAT + 4 * width)  # gradients: of the residual stream, of GELU
    around = n * (C * FLOAT + 2 * FLOAT + 3 * 8)  # ln_f keeps its input; x, y and which targets count are int64
    half = width * (width < FLOAT)  # of what autocast makes in addition
    if n * V <= MOST_LOGITS:
        around += n * C * width + V * C * half  # lm_head keeps what it multiplies
        kept, loss = FLOAT * n * V, 3 * FLOAT * n * V
    else:  # ChunkedNats keeps gradients; it holds its input, a part of the logits, and with autocast head and gradient
        kept = FLOAT * (n + V) * C
        loss = kept + n * C * FLOAT + min(CHUNK, n * V) * (FLOAT + half) + 2 * V * C * half
    return Activations(block, config.n_layer * block, config.n_layer * n * C * FLOAT, around, kept, loss, within)


def peak(config: GPTConfig, held: Held, needs: Activations, accumulates: bool, recomputes: bool) -> int:
    """The most bytes of tensors that a process holds in a step: at the loss, in the last block on the way back, or at
    the end. The gradients of a step that `accumulates` are there all the time, and so are those of several processes;
    others come as activations go. With activation checkpointing one block at a time `recomputes` what it keeps."""
    base = held.weights + held.moments + held.gathered + held.gradients * accumulates
    base += needs.inputs if recomputes else needs.blocks
    at_loss = base + needs.around + needs.loss
    in_block = base + needs.block * recomputes + needs.within
    at_end = held.weights + held.moments + held.gathered + held.gradients
    # The last gradient is that of the token table. A new one is added to what is there; that of a tied table is the sum
    # of two, since it is the head as well, and for a moment all three are there.
    at_end += FLOAT * config.vocab_size * config.n_embd * (accumulates + 2 * config.tie_weights)
    return max(at_loss, in_block, at_end)
