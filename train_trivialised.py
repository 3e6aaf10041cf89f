"""
Train a GPT, plainly: the same windows, losses and weights as train.py in one process and float32, and no speed.
tests/test_twins.py proves that they are equal.

    python train_trivialised.py                    about a minute on the default text
    python train_trivialised.py --n_layer=1        any setting below can be given
"""
import math
import sys

import torch
from torch import Tensor

import configurator
from model import GPTConfig
from model_trivialised import GPT
from plaingpt import console, errors
from plaingpt.corpus import token_files, tokenizer
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.folder import data_folder, open_split, read_meta
from plaingpt.corpus.order import Order, fixed_starts

# ------------------------------------------------------------------------------------------------
# Settings: as in train.py, without those that only make it faster, safer or more talkative
dataset: str = 'stdlib'
max_iters: int = 600  # steps
total_batch_size: int = 1024  # tokens in a step
block_size: int = 64  # tokens in a window
n_layer: int = 2
n_head: int = 4
n_embd: int = 128
bias: bool = False
learning_rate: float = 4e-3
min_lr: float = 4e-4
warmup_iters: int = 100
lr_decay_iters: int = 600
weight_decay: float = 0.1
beta1: float = 0.9
beta2: float = 0.99
grad_clip: float = 1.0
seed: int = 1337
# ------------------------------------------------------------------------------------------------


def lr_at(step: int, peak: float, floor: float, warmup: int, total: int) -> float:
    """Rise linearly to `peak` over `warmup` steps, in which AdamW learns how large gradients are; then fall along half
    a cosine to `floor` at step `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))  # 0 to 1
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def clip(gradients: list[Tensor], limit: float) -> tuple[list[Tensor], float]:
    """If the gradient, seen as one long vector, is longer than `limit`, shorten it to that. Also return its length."""
    length = math.sqrt(sum((g**2).sum().item() for g in gradients))
    return [g * min(1.0, limit / (length + 1e-6)) for g in gradients], length


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, decay: float) -> None:
    """Move a weight p against the running mean m of its gradient g, in units of g's typical size, which is the root of
    the running mean v of its square; and pull it towards zero. All in place."""
    m += (1 - beta1) * (g - m)  # that is: m = beta1 * m + (1 - beta1) * g
    v += (1 - beta2) * (g**2 - v)
    m_hat = m / (1 - beta1 ** (step + 1))  # m and v start at 0: this undoes the bias
    v_hat = v / (1 - beta2 ** (step + 1))
    p -= lr * decay * p
    p -= lr * m_hat / (torch.sqrt(v_hat) + 1e-8)  # 1e-8: a weight without gradients stays


def train(model: GPT, corpus: token_files.TokenFile) -> list[float]:
    """Update the model's weights max_iters times. Return the loss of each step, in nats per token."""
    n_windows = total_batch_size // block_size
    order = Order(len(corpus), block_size, seed)
    parameters: list[Tensor] = list(model.parameters())
    m = [torch.zeros_like(p) for p in parameters]  # running mean of each gradient
    v = [torch.zeros_like(p) for p in parameters]  # running mean of its square
    losses = []
    for step in range(max_iters):
        starts = order.starts(step * n_windows, n_windows)
        x, y = read_batch(corpus, starts, block_size, n_windows, model.config.vocab_size)  # both (B, T)
        _, loss = model(x, y)  # forward and backward: it reads x, and must say y, the token after each
        gradients = list(torch.autograd.grad(loss, parameters))

        gradients, length = clip(gradients, grad_clip)
        lr = lr_at(step, learning_rate, min_lr, warmup_iters, lr_decay_iters)
        with torch.no_grad():
            for p, g, m_p, v_p in zip(parameters, gradients, m, v, strict=True):
                decay = weight_decay if p.dim() >= 2 else 0.0  # not of gains: at 0 they would switch channels off
                adamw(p, g, m_p, v_p, step, lr, decay)

        losses.append(loss.item())
        if step % 20 == 0 or step == max_iters - 1:
            console.say(f'step {step}, loss {loss.item():.4f}, norm {length:.4f}, lr {lr:.2e}')
    return losses


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    configurator.check_range(sys.modules[__name__], 'max_iters total_batch_size block_size n_embd', 1)
    configurator.check_range(sys.modules[__name__], 'n_layer seed', 0)
    folder = data_folder(dataset)
    meta = read_meta(folder)
    V = tokenizer.model_vocab_size(meta['vocab_size'])
    if total_batch_size % block_size:
        raise errors.UserError(f'total_batch_size={total_batch_size} must be a multiple of block_size={block_size}')
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, V, n_layer, n_head, n_embd, bias=bias))
    train(model, open_split(folder, 'train', block_size, V))

    unseen = open_split(folder, 'val', block_size, V)  # evaluation
    starts = fixed_starts(len(unseen), block_size, 400)
    with torch.no_grad():
        _, loss = model(*read_batch(unseen, starts, block_size, len(starts), V))
    console.say(f'val loss {loss.item():.4f}')
    if not loss.isfinite():
        raise errors.UserError('nothing is finite any more: try a lower --learning_rate', errors.NOT_FINITE)

    vocabulary = tokenizer.from_state(meta['tokenizer'])
    prompt = torch.tensor([vocabulary.encode('\n')])  # (1, T)
    console.say(vocabulary.decode(model.generate(prompt, 200, seed)[0].tolist()))


if __name__ == '__main__':
    errors.run(main)
