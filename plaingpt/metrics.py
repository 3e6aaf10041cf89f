"""The quality of a model on a corpus: loss, perplexity, accuracy and bits per byte over a split, and their table."""
import math
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import GPTConfig
from plaingpt import console
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.order import fixed_starts
from plaingpt.corpus.token_files import TokenFile
from plaingpt.machines.device import Compute, to_device
from plaingpt.machines.processes import Process, Progress, compute_together

Best = dict[str, list[float]]  # for each metric its best value in validation, and the step that reached it


class Predictor:
    """A model's predictions of the next token, without dropout and without a gradient. Several processes may share the
    model, and each may hold a part of it: all of them must call this alike."""

    def __init__(self, model: nn.Module, config: GPTConfig, process: Process, compute: Compute,
                 batch_size: int) -> None:
        self.model, self.config, self.process, self.compute = model, config, process, compute
        self.batch_size = batch_size  # sequences that one process takes at a time

    def __call__(self, x: Tensor, is_odd: bool = False) -> Tensor:
        """x (B, T) -> logits (B, T, V) in float32 at least. A shape that `is_odd` is not worth compiling for."""
        was_training = self.model.training
        self.model.eval()
        stance: AbstractContextManager[None] = self.compute.eager() if is_odd else nullcontext()
        try:
            with torch.no_grad(), self.compute.autocast, stance:
                logits, _ = self.model(to_device(x, self.process.device))
        finally:
            self.model.train(was_training)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def evaluate(predict: Predictor, corpus: TokenFile, n_windows: int, token_sizes: list[int] | None,
             progress: Progress = console.progress) -> dict[str, float]:
    """Return every metric over the same n_windows windows each time (or all, if there are fewer), and the standard
    error of the loss, with the windows as its independent samples. With n_windows = 0, every token of the corpus but
    the first is predicted: one more window ends with the corpus, and what it shares with the window before counts once.
    Every process must call it, and reads its part. Without token_sizes, the UTF-8 bytes of each id, there are no bits
    per byte."""
    T, batch_size = predict.config.block_size, predict.batch_size
    starts = fixed_starts(len(corpus), T, n_windows or len(corpus))
    n_whole, n_left = len(starts), 0 if n_windows else (len(corpus) - 1) % T  # tokens after the last whole window
    if n_left:
        starts = np.append(starts, len(corpus) - 1 - T)
    sizes = torch.tensor(token_sizes or [0], dtype=torch.float32, device=predict.process.device)

    names = list[str]()  # of the sums

    def measure_batch(number: int) -> Tensor:
        in_batch = starts[number * batch_size:(number + 1) * batch_size]
        x, y = read_batch(corpus, in_batch, T, batch_size, predict.config.vocab_size)
        y[n_whole - number * batch_size:, :T - n_left] = -1  # what the last window repeats
        sums = sums_of(predict(x), to_device(y, predict.process.device), sizes)
        names[:] = sums
        return torch.stack(list(sums.values()))

    of_batches = compute_together(math.ceil(len(starts) / batch_size), measure_batch, predict.process, progress,
                                  f'evaluating on {corpus.path.stem}', 'batches')
    results = figures(dict(zip(names, of_batches.sum(dim=0).tolist(), strict=True)), n_whole)
    if token_sizes is None:
        del results['bits_per_byte']
    return results


def sums_of(logits: Tensor, y: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """Return what one batch, logits (B, T, V) and targets (B, T), adds to each sum that `figures` reads. Targets of -1
    do not count; `sizes` (V,) are the bytes that each token stands for."""
    logits, targets = logits.flatten(0, 1), y.flatten()  # (N, V), (N,)
    nats = F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')  # (N,), 0 without a target
    of_tokens = {  # (N,) each
        'nats': nats,
        'bits': nats / math.log(2),
        'right': logits.argmax(dim=-1) == targets,
        'bytes': sizes[targets.clamp(0, len(sizes) - 1)],  # a target of -1 must look up something, too
        'tokens': torch.ones_like(nats),
    }
    table = torch.stack([numbers.to(nats.dtype) for numbers in of_tokens.values()])  # (sums, N)
    # in float64, so that a long sum loses no small terms; on the CPU, as mps has no float64
    totals = torch.where(targets >= 0, table, 0.0).cpu().double().sum(dim=1)
    is_whole = (y >= 0).all(dim=1)  # (B,)
    windows = (nats.view(y.shape).mean(dim=1) * is_whole).cpu().double()  # (B,)
    return dict(zip(of_tokens, totals, strict=True)) | {'windows': windows.sum(), 'squares': (windows**2).sum()}


def figures(sums: dict[str, float], n_windows: int) -> dict[str, float]:
    """Return the metrics that follow from these sums. One more metric is a line here and, unless the sums suffice, one
    in `sums_of`. If higher is better, its name must end in 'accuracy'."""
    loss, mean = sums['nats'] / sums['tokens'], sums['windows'] / n_windows
    variance = max(0.0, sums['squares'] / n_windows - mean**2)
    doubt = {'loss_stderr': math.sqrt(variance / (n_windows - 1))} if n_windows > 1 else {}
    return {
        'loss': loss,  # nats per token
        'perplexity': exp(loss),
        'accuracy': sums['right'] / sums['tokens'],  # how often the likeliest token is the right one
        'bits_per_byte': sums['bits'] / sums['bytes'] if sums['bytes'] else math.nan,  # comparable between tokenizers
        **doubt,
    }


def exp(x: float) -> float:
    return math.inf if x > 709 else math.exp(x)  # beyond that it does not fit into a float


def keep_best(best: Best, results: dict[str, float], step: int) -> bool:
    """Note the step at which each metric was at its best so far. Return whether this step has the best loss."""
    for name, value in results.items():
        if not name.endswith('_stderr') and (name not in best or is_better(name, value, best[name][0])):
            best[name] = [value, step]
    return best['loss'][1] == step


def is_better(name: str, new: float, old: float) -> bool:
    return new > old if name.endswith('accuracy') else new < old


def table(results: dict[str, dict[str, float]], best: Best) -> str:
    """Return a line for each row of results, such as 'train' and 'val', and one for the best. Each metric has a column,
    with its standard error if there is one."""
    rows = results | ({'best': {name: value for name, (value, _) in best.items()}} if best else {})
    found = dict.fromkeys(name for row in rows.values() for name in row)
    names = [name for name in found if not name.endswith('_stderr')]
    blank = {name: ' ' * len(' ± 0.0000') if f'{name}_stderr' in found else '' for name in names}  # aligns decimals
    cells = {'': names} | {label: [cell(row, name, blank[name]) for name in names] for label, row in rows.items()}
    if best:
        cells['at step'] = [f'{best[name][1]:.0f}{blank[name]}' if name in best else '' for name in names]
    first = max(8, *(len(label) + 1 for label in cells))
    widths = [max(15, *(len(row[i]) + 2 for row in cells.values())) for i in range(len(names))]
    return '\n'.join(f'{label:{first}}' + ''.join(f'{text:>{width}}' for text, width in zip(row, widths, strict=True))
                     for label, row in cells.items())


def cell(row: dict[str, float], name: str, blank: str) -> str:
    """Return '3.1416 ± 0.0027', with the blank in place of an unknown standard error, or '' without a value."""
    if name not in row:
        return ''
    number = f'{row[name]:.4f}' if row[name] < 1e8 else f'{row[name]:.4e}'
    return f'{number} ± {row[f"{name}_stderr"]:.4f}' if f'{name}_stderr' in row else f'{number}{blank}'
