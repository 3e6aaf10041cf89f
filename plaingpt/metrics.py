"""Loss, perplexity, accuracy and bits per byte over a split, and the table that shows them."""
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPTConfig
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.order import fixed_starts
from plaingpt.corpus.token_files import TokenFile
from plaingpt.machines import processes
from plaingpt.machines.device import to_device
from plaingpt.tasks import Progress, exp


class Predictions(NamedTuple):
    """N tokens, as the model saw them coming. Where `targets` is -1 there is none, and what a metric says of it is
    ignored."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    nats: Tensor  # (N,), -log of the probability that the model gave to the target
    sizes: Tensor  # (N,), bytes of text that the target stands for


def nats(p: Predictions) -> Tensor:
    return p.nats


def bits(p: Predictions) -> Tensor:
    return p.nats / math.log(2)


def is_first_choice(p: Predictions) -> Tensor:
    return p.logits.argmax(dim=-1) == p.targets


def one(p: Predictions) -> Tensor:
    return torch.ones_like(p.nats)


def size(p: Predictions) -> Tensor:
    return p.sizes


def unchanged(x: float) -> float:
    return x


class Metric(NamedTuple):
    """The sum of `of` over all targets, divided by the sum of `per`, then `finish`ed."""

    of: Callable[[Predictions], Tensor]  # a number (N,) for each target
    per: Callable[[Predictions], Tensor] = one
    finish: Callable[[float], float] = unchanged
    better: Callable[[float, float], float] = min
Best = dict[str, list[float]]  # for each metric its best value in validation, and the step at which it was
# To measure something else, add a line.
METRICS = {
    'loss': Metric(nats),  # nats per token
    'perplexity': Metric(nats, finish=exp),
    'accuracy': Metric(is_first_choice, better=max),  # how often the likeliest token is the right one
    'bits_per_byte': Metric(bits, per=size),  # comparable between tokenizers
}


def evaluate(model: nn.Module, config: GPTConfig, corpus: TokenFile, n_windows: int, batch_size: int,
             token_sizes: list[int] | None, process: processes.Process, autocast: AbstractContextManager[None],
             progress: Progress) -> dict[str, float]:
    """Every metric over the same n_windows windows (or all, where there are fewer), and the standard error of the loss,
    with the windows as its independent samples. Every process must call it, and reads its part. Without token_sizes,
    the UTF-8 bytes of each id, there are no bits per byte."""
    starts = fixed_starts(len(corpus), config.block_size, n_windows)
    sizes = torch.tensor(token_sizes or [0], dtype=torch.float32, device=process.device)
    n_batches = math.ceil(len(starts) / batch_size)
    rounds = math.ceil(n_batches / process.world_size)  # the same on every process
    of_batches = torch.zeros(rounds * process.world_size, 2 * len(METRICS) + 2, dtype=torch.float64)
    model.eval()
    for number in progress(range(rounds), rounds, f'evaluating on {corpus.path.stem}', 'batches'):
        batch = number * process.world_size + process.rank
        mine = starts[batch * batch_size:(batch + 1) * batch_size]
        x, y = read_batch(corpus, mine, config.block_size, batch_size, config.vocab_size)
        x, y = to_device(x, process.device), to_device(y, process.device)
        with torch.no_grad(), autocast:
            logits, _ = model(x)  # (B, T, V)
        of_batches[batch] = sums_of(logits, y, sizes)
    model.train()
    if process.world_size > 1:
        of_batches = processes.total(of_batches.to(process.device)).cpu()  # each row is 0 on all processes but one
    sums = of_batches[:n_batches].sum(dim=0)  # so that they are added in the same order by any number of processes
    ratios = (sums[:-2:2] / sums[1:-2:2]).tolist()
    results = {name: metric.finish(ratio) for (name, metric), ratio in zip(METRICS.items(), ratios, strict=True)
               if token_sizes or metric.per is not size}
    mean, mean_square = (sums[-2:] / len(starts)).tolist()
    results['loss_stderr'] = math.sqrt(max(0.0, mean_square - mean**2) / max(1, len(starts) - 1))
    return results


def sums_of(logits: Tensor, y: Tensor, sizes: Tensor) -> Tensor:
    """For one batch, logits (B, T, V) and targets (B, T): what each metric adds to its two sums, then the sum over the
    windows of their loss, and of its square."""
    flat, targets = logits.flatten(0, 1).float(), y.flatten()  # (N, V), (N,)
    real = targets >= 0
    losses = F.cross_entropy(flat, targets, ignore_index=-1, reduction='none')  # (N,), 0 where there is no target
    predictions = Predictions(flat, targets, losses, sizes[targets.clamp(0, len(sizes) - 1)])
    each = [part(predictions) for metric in METRICS.values() for part in (metric.of, metric.per)]  # (N,) each
    parts = torch.stack([torch.where(real, part.float(), 0.0) for part in each]).cpu().double()  # (2 metrics, N)
    windows = losses.view(y.shape).mean(dim=1).cpu().double()  # (B,), 0 for windows that are not there
    return torch.cat([parts.sum(dim=1), torch.stack([windows.sum(), (windows**2).sum()])])


def keep_best(best: Best, results: dict[str, float], step: int) -> bool:
    """Note the step at which each metric was at its best so far. Whether this step is that of the loss."""
    for name, metric in METRICS.items():
        if name in results and (name not in best or metric.better(results[name], best[name][0]) != best[name][0]):
            best[name] = [results[name], step]
    return best['loss'][1] == step


def table(results: dict[str, dict[str, float]], best: Best) -> str:
    """A line for each row of results, such as 'train' and 'val', one for the best, and a column for each metric, with
    its standard error where there is one."""
    rows = results | ({'best': {name: value for name, (value, _) in best.items()}} if best else {})
    there = dict.fromkeys(name for row in rows.values() for name in row)
    names = [name for name in there if not name.endswith('_stderr')]
    blank = {name: ' ' * len(' ± 0.0000') if f'{name}_stderr' in there else '' for name in names}  # aligns decimals
    cells = {'': names} | {label: [cell(row, name, blank[name]) for name in names] for label, row in rows.items()}
    if best:
        cells['at step'] = [f'{best[name][1]:.0f}{blank[name]}' if name in best else '' for name in names]
    first = max(8, *(len(label) + 1 for label in cells))
    widths = [max(15, *(len(row[i]) + 2 for row in cells.values())) for i in range(len(names))]
    return '\n'.join(f'{label:{first}}' + ''.join(f'{text:>{width}}' for text, width in zip(row, widths, strict=True))
                     for label, row in cells.items())


def cell(row: dict[str, float], name: str, blank: str) -> str:
    """'3.1416 ± 0.0027', or with a blank where the standard error is not known, or ''"""
    if name not in row:
        return ''
    number = f'{row[name]:.4f}' if row[name] < 1e8 else f'{row[name]:.4e}'
    return f'{number} ± {row[f"{name}_stderr"]:.4f}' if f'{name}_stderr' in row else f'{number}{blank}'
