"""
How good is a model: loss, perplexity, accuracy and bits per byte, on the same windows of a corpus each time.

    python evaluate.py --out_dir=out-stdlib                         the newest checkpoint of a run, on its own corpus
    python evaluate.py --init_from=gpt2 --dataset=openwebtext       GPT-2's weights
"""
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import configurator
import errors
import logger
import parallel
import tokens
from errors import UserError
from model import GPTConfig

# ------------------------------------------------------------------------------------------------
# Settings
init_from: str = ''  # a checkpoint file, a run's folder, a Hugging Face folder or 'gpt2*'; '' is out_dir
out_dir: str = 'out'  # of the run
dataset: str = ''  # a folder in data/, or any folder; '' is the one that the model was trained on
split: Literal['train', 'val'] = 'val'
batch_size: int = 8  # sequences at a time; lower it when memory runs out
eval_iters: int = 0  # batches to evaluate on; 0 is the whole split
device: str = 'auto'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the matrix products
backend: str = 'auto'
# ------------------------------------------------------------------------------------------------


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


def exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)  # beyond that it does not fit into a float


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


class Progress(Protocol):
    """A progress bar around a loop."""

    def __call__(self, items: Iterable[int], total: int, label: str, unit: str) -> Iterator[int]: ...


def evaluate(model: nn.Module, config: GPTConfig, corpus: tokens.TokenFile, n_windows: int, batch_size: int,
             token_sizes: list[int] | None, process: parallel.Process, autocast: AbstractContextManager[None],
             progress: Progress) -> dict[str, float]:
    """Every metric over the same n_windows windows (or all, where there are fewer), and the standard error of the loss,
    with the windows as its independent samples. Every process must call it, and reads its part. Without token_sizes,
    the UTF-8 bytes of each id, there are no bits per byte."""
    starts = tokens.fixed_starts(len(corpus), config.block_size, n_windows)
    sizes = torch.tensor(token_sizes or [0], dtype=torch.float32, device=process.device)
    rounds = math.ceil(len(starts) / (batch_size * process.world_size))  # the same on every process
    sums = torch.zeros(2 * len(METRICS) + 2, dtype=torch.float64)
    model.eval()
    for number in progress(range(rounds), rounds, f'evaluating on {corpus.path.stem}', 'batches'):
        first = (number * process.world_size + process.rank) * batch_size
        mine = starts[first:first + batch_size]
        x, y = tokens.read_batch(corpus, mine, config.block_size, batch_size, config.vocab_size)
        x, y = parallel.to_device(x, process.device), parallel.to_device(y, process.device)
        with torch.no_grad(), autocast:
            logits, _ = model(x)  # (B, T, V)
        sums += sums_of(logits, y, sizes)
    model.train()
    sums = parallel.total(sums.to(process.device) if process.world_size > 1 else sums).cpu()
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
    """A line for each row of results, such as 'train' and 'val', one for the best, and a column for each metric."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = [' ' * 8 + ''.join(f'{name:>15}' for name in names)]
    for label, row in results.items():
        lines.append(f'{label:8}' + ''.join(f'{row[name]:15.4f}' if name in row else ' ' * 15 for name in names))
    if best:
        lines.append('best    ' + ''.join(f'{best[name][0]:15.4f}' if name in best else ' ' * 15 for name in names))
        lines.append('at step ' + ''.join(f'{best[name][1]:15.0f}' if name in best else ' ' * 15 for name in names))
    return '\n'.join(lines)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if batch_size < 1 or eval_iters < 0:
        raise UserError(f'--batch_size={batch_size} must be 1 or more, and --eval_iters={eval_iters} 0 or more')
    with parallel.joined(device, backend) as process:
        precision, _ = parallel.pick_dtype(dtype, process.device.type)
        model, state = checkpoint.open_model(init_from or out_dir)
        model.to(process.device)
        folder = tokens.data_folder(dataset or state.get('config', {}).get('dataset', 'openwebtext'))
        corpus = tokens.open_split(folder, split, model.config.block_size, model.config.vocab_size)
        vocabulary = checkpoint.vocabulary_of(tokens.read_meta(folder), state, init_from)
        sizes = vocabulary.token_sizes() if vocabulary else None
        n_windows = eval_iters * batch_size or len(corpus)
        results = evaluate(model, model.config, corpus, n_windows, batch_size, sizes, process,
                           parallel.autocast(process.device, precision),
                           logger.Logger('', process.is_main, 0, 0).progress)
        if process.is_main:
            print(table({split: results}, {}))


if __name__ == '__main__':
    errors.run(main)
