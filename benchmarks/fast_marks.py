"""
The worth of each `fast:` mark: the plain file's time over the main file's, on the shapes of the default run.

    python benchmarks/fast_marks.py

Medians of repeated runs, taken in turns in one process, so that both sides meet the same disturbances; one thread. A
ratio of 2 means that the main file takes half the time. Forward and backward, but for the last two rows.
"""
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
from torch import Tensor

import configurator
import model
import model_trivialised
import train
from model import GPTConfig
from plaingpt.errors import run as run_script

THREADS, TURNS = 1, 15
B, CONFIG = 16, GPTConfig(block_size=64, vocab_size=1024, n_layer=4, n_head=4, n_embd=128, bias=False)
NEW_TOKENS = 64  # in the text of the last row, with its prompt


def median_ratio(plain: Callable[[], object], fast: Callable[[], object]) -> float:
    """Return how many times as long the first takes as the second."""
    seconds: dict[Callable[[], object], list[float]] = {plain: [], fast: []}
    for _ in range(TURNS + 2):
        for run, taken in seconds.items():
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return statistics.median(seconds[plain][2:]) / statistics.median(seconds[fast][2:])


def forward_and_backward(module: nn.Module, *inputs: Tensor) -> Callable[[], object]:
    """Return a function that runs a module forward and backward, from a model's loss or from the sum of a layer's
    output."""

    def run() -> None:
        result = module(*inputs)
        (result[1] if isinstance(result, tuple) else result.sum()).backward()

    return run


def plain_adamw(parameters: list[Tensor]) -> Callable[[], object]:
    """Return the update of train_trivialised.py, and only its arithmetic."""
    m, v = ([torch.zeros_like(p) for p in parameters] for _ in range(2))

    @torch.no_grad()
    def update() -> None:
        for i, p in enumerate(parameters):
            assert p.grad is not None
            m[i] = 0.9 * m[i] + 0.1 * p.grad
            v[i] = 0.95 * v[i] + 0.05 * p.grad**2
            p -= 1e-6 * 0.1 * p
            p -= 1e-6 * m[i] / (torch.sqrt(v[i]) + 1e-8)

    return update


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(f'{platform.processor() or platform.machine()}, {THREADS} threads, torch {torch.__version__}: '
          f'B={B}, T={CONFIG.block_size}, C={CONFIG.n_embd}, H={CONFIG.n_head}, V={CONFIG.vocab_size}')
    T, C, V = CONFIG.block_size, CONFIG.n_embd, CONFIG.vocab_size
    x = torch.randn(B, T, C, requires_grad=True)
    idx, targets = torch.randint(V, (2, B, T)).unbind()
    fast, plain = model.GPT(CONFIG), model_trivialised.GPT(CONFIG)
    plain.load_state_dict(fast.state_dict())

    for name in ('LayerNorm', 'Attention', 'MLP'):
        arguments = (C, False) if name == 'LayerNorm' else (CONFIG,)
        fast_layer = getattr(model, name)(C, bias=False) if name == 'LayerNorm' else getattr(model, name)(CONFIG)
        plain_layer = getattr(model_trivialised, name)(*arguments)
        ratio = median_ratio(forward_and_backward(plain_layer, x), forward_and_backward(fast_layer, x))
        print(f'{name:40} {ratio:6.2f}')
    ratio = median_ratio(forward_and_backward(plain, idx, targets), forward_and_backward(fast, idx, targets))
    print(f'{"whole model, loss included":40} {ratio:6.2f}')
    parameters: list[Tensor] = list(fast.parameters())
    update = train.make_optimizer(fast)
    print(f'{"AdamW":40} {median_ratio(plain_adamw(parameters), update.step):6.2f}')
    prompt = idx[:1, :1]
    ratio = median_ratio(lambda: plain.generate(prompt, NEW_TOKENS - 1), lambda: fast.generate(prompt, NEW_TOKENS - 1))
    print(f'{"generating a whole block":40} {ratio:6.2f}')


if __name__ == '__main__':
    run_script(main)
