"""What a run says on the console: numbers as lines that people, and their scripts, read."""
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

CONTROL = re.compile(r'\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')  # what may steer a terminal


def iter_line(
    step: int, loss: float, ms: float, mfu: float | None, lr: float, norm: float | None, tokens_per_second: float
) -> str:
    """nanoGPT's line, which people parse, and what it lacks after that. mfu is a fraction; None leaves it out."""
    parts = [f'iter {step}: loss {loss:.4f}', f'time {ms:.2f}ms']
    if mfu is not None:
        parts.append(f'mfu {100 * mfu:.2f}%')
    parts.append(f'lr {lr:.2e}')
    if norm is not None:
        parts.append(f'norm {norm:.4f}')
    return ', '.join([*parts, f'tok/s {tokens_per_second:.0f}'])


def parameter_lines(groups: Iterable[dict[str, Any]]) -> str:
    """nanoGPT's lines on the two groups of weights that an optimizer has."""
    counts = [(len(group['params']), sum(p.numel() for p in group['params'])) for group in groups]
    lines = [f'num {kind} parameter tensors: {tensors}, with {numbers:,} parameters'
             for (tensors, numbers), kind in zip(counts, ('decayed', 'non-decayed'), strict=True)]
    total = sum(numbers for _, numbers in counts)
    return '\n'.join([f'number of parameters: {total / 1e6:.2f}M', *lines, 'using fused AdamW: True'])


def step_line(step: int, train_loss: float, val_loss: float) -> str:
    """nanoGPT's line of an evaluation."""
    return f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}'


def short(number: float) -> str:
    """1234567 as 1.23M: three digits, so that it fits into a bar and under an axis."""
    for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(number) >= 0.9995 * size:
            return f'{number / size:.3g}{letter}'
    return f'{number:.3g}'


class Pace:
    """How fast a training is. A token takes `flops`; the cards promise `peak` of them in a second, if that is known."""

    def __init__(self, tokens_per_step: int, flops: int, peak: float | None, step: int) -> None:
        self.tokens_per_step, self.flops, self.peak = tokens_per_step, flops, peak
        self.start(step)

    def start(self, step: int) -> None:
        """The clock runs from here, before `step`."""
        self.clock, self.step = time.perf_counter(), step

    def lap(self, step: int) -> dict[str, float]:
        """The mean since the clock started, which starts anew: ms of a step, tokens per second and, where it is known,
        the utilisation of the cards (Chowdhery et al. 2022: MFU)."""
        seconds = (time.perf_counter() - self.clock) / (step - self.step)
        self.start(step)
        speed = self.tokens_per_step / seconds
        lap = {'ms': 1000 * seconds, 'tokens_per_second': speed}
        return lap | {'mfu': speed * self.flops / self.peak} if self.peak else lap


def say(text: str) -> None:
    """One line on the console, above the bars."""
    tqdm.write(printable(text), file=sys.stdout)
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` as this console can show it: nothing that steers a terminal, nothing that its encoding lacks."""
    encoding = sys.stdout.encoding or 'utf-8'
    return CONTROL.sub('\ufffd', text).encode(encoding, 'replace').decode(encoding)
