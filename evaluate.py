"""
How good is a model: loss, perplexity, accuracy and bits per byte on a corpus, HellaSwag, LAMBADA.

    python evaluate.py --out_dir=out-stdlib                          the newest checkpoint of a run, on its own corpus
    python evaluate.py --init_from='out/ckpt*.pt' --tasks=hellaswag  several, one below the other
    python evaluate.py --init_from=gpt2 --tasks=val,hellaswag,lambada --dataset=openwebtext     GPT-2's weights
"""
import glob
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import checkpoint
import configurator
import console
import errors
import logger
import parallel
import remote
import tokenizer
import tokens
from errors import UserError
from model import GPTConfig
from tasks import PUBLISHED, Progress, Row, exp, is_raw, load, measure_hellaswag, measure_lambada, score

# ------------------------------------------------------------------------------------------------
# Settings
init_from: str = ''  # a checkpoint file, a run's folder, a glob of these, a Hugging Face folder, 'gpt2*'; '' is out_dir
out_dir: str = 'out'  # of the run
tasks: str = 'val'  # of 'val', 'hellaswag' and 'lambada', those to do: 'val,hellaswag'
dataset: str = ''  # a folder in data/, or any folder; '' is the one that the model was trained on
split: Literal['train', 'val'] = 'val'  # of the dataset
hellaswag: str = ''  # its validation set, a .jsonl file; '' downloads the original
lambada: str = ''  # its test set, a .jsonl file; '' downloads OpenAI's
eval_iters: int = 0  # batches of the dataset to evaluate on; 0 is the whole split
limit: int = 0  # examples of hellaswag and lambada, from the first on; 0 is all
batch_size: int = 8  # sequences at a time; lower it when memory runs out
json: str = ''  # a file for all figures; '' is evaluation.json beside the checkpoint, written anew each time
device: str = 'auto'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the matrix products
backend: str = 'auto'
# ------------------------------------------------------------------------------------------------

TITLES = {
    'hellaswag_completion': 'HellaSwag in completion style, as build-nanogpt and llm.c score it',
    'hellaswag_lm_eval': 'HellaSwag as lm-eval scores it',
    'lambada_openai': "LAMBADA as lm-eval's lambada_openai scores it",
}


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


def evaluate(model: nn.Module, config: GPTConfig, corpus: tokens.TokenFile, n_windows: int, batch_size: int,
             token_sizes: list[int] | None, process: parallel.Process, autocast: AbstractContextManager[None],
             progress: Progress) -> dict[str, float]:
    """Every metric over the same n_windows windows (or all, where there are fewer), and the standard error of the loss,
    with the windows as its independent samples. Every process must call it, and reads its part. Without token_sizes,
    the UTF-8 bytes of each id, there are no bits per byte."""
    starts = tokens.fixed_starts(len(corpus), config.block_size, n_windows)
    sizes = torch.tensor(token_sizes or [0], dtype=torch.float32, device=process.device)
    n_batches = math.ceil(len(starts) / batch_size)
    rounds = math.ceil(n_batches / process.world_size)  # the same on every process
    of_batches = torch.zeros(rounds * process.world_size, 2 * len(METRICS) + 2, dtype=torch.float64)
    model.eval()
    for number in progress(range(rounds), rounds, f'evaluating on {corpus.path.stem}', 'batches'):
        batch = number * process.world_size + process.rank
        mine = starts[batch * batch_size:(batch + 1) * batch_size]
        x, y = tokens.read_batch(corpus, mine, config.block_size, batch_size, config.vocab_size)
        x, y = parallel.to_device(x, process.device), parallel.to_device(y, process.device)
        with torch.no_grad(), autocast:
            logits, _ = model(x)  # (B, T, V)
        of_batches[batch] = sums_of(logits, y, sizes)
    model.train()
    if process.world_size > 1:
        of_batches = parallel.total(of_batches.to(process.device)).cpu()  # each row is 0 on all processes but one
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


class Measured(NamedTuple):
    """What was found out about one checkpoint."""

    checkpoint: str
    step: int | None  # None where the weights do not come from a run
    dataset: str  # that of the split, '' where none was read
    figures: dict[str, dict[str, float]]  # of the split, and of each scoring


def find_tasks(names: str) -> list[str]:
    """'val,lambada' -> ['val', 'lambada']"""
    found, known = [name.strip() for name in names.split(',')], ('val', 'hellaswag', 'lambada')
    for name in found:
        if name not in known:
            raise UserError(f"--tasks={names}: there is no task '{name}'; give some of {','.join(known)}")
    return list(dict.fromkeys(found))


def find_checkpoints(where: str) -> list[str]:
    """What a glob matches; or `where` itself, which may also be a URL or a name of the hub."""
    if remote.is_url(where) or Path(where).exists() or not glob.has_magic(where):
        return [where]
    found = sorted(glob.glob(where))
    if not found:
        raise UserError(f'--init_from={where} matches no file and no folder', errors.CHECKPOINT)
    return found


def step_of(measured: Measured) -> int:
    return -1 if measured.step is None else measured.step


def folder_of(state: checkpoint.State, dataset: str) -> Path:
    """The corpus that was asked for, or that of the run."""
    return tokens.data_folder(dataset or state.get('config', {}).get('dataset', 'openwebtext'))


def vocabulary_for(state: checkpoint.State, config: GPTConfig, folder: Path) -> tokenizer.Tokenizer:
    """The tokenizer that a model has learned: that of its checkpoint, else GPT-2's, where it has as many ids, else that
    of the corpus."""
    learned = state.get('tokenizer')
    if not learned and config.vocab_size not in (50257, tokenizer.model_vocab_size(50257)):
        learned = tokens.read_meta(folder)['tokenizer']
    vocabulary = tokenizer.from_state(learned or {'name': 'gpt2'})
    if vocabulary.n_vocab > config.vocab_size:
        raise UserError(f'the tokenizer of {folder} has {vocabulary.n_vocab} ids, the model only {config.vocab_size}:\n'
                        'name the corpus that the model was trained on with --dataset=', errors.DATA)
    return vocabulary


def measure(where: str, names: Sequence[str], rows: dict[str, list[Row]], dataset: str, split: str, n_batches: int,
            batch_size: int, process: parallel.Process, autocast: AbstractContextManager[None],
            progress: Progress) -> Measured:
    """All tasks with one checkpoint. Every process must call it."""
    model, state = checkpoint.open_model(where)
    model.to(process.device)
    config, folder, figures = model.config, folder_of(state, dataset), {}
    if 'val' in names:
        corpus = tokens.open_split(folder, split, config.block_size, config.vocab_size)
        learned = checkpoint.vocabulary_of(tokens.read_meta(folder), state, where)
        sizes, n_windows = learned.token_sizes() if learned else None, n_batches * batch_size or len(corpus)
        figures[split] = evaluate(model, config, corpus, n_windows, batch_size, sizes, process, autocast, progress)
    scorer = partial(score, model, config, batch_size, process, autocast, progress)
    if 'hellaswag' in names:
        figures |= measure_hellaswag(rows['hellaswag'], vocabulary_for(state, config, folder), scorer)
    if 'lambada' in names:
        figures |= measure_lambada(rows['lambada'], vocabulary_for(state, config, folder), scorer)
    return Measured(where, state.get('iter_num'), folder.name if 'val' in names else '', figures)


def report(all_measured: Sequence[Measured], notes: dict[str, str]) -> str:
    """A table for each of the split and the scorings, with the published figures below ours."""
    tables = []
    datasets = ', '.join(dict.fromkeys(measured.dataset for measured in all_measured))
    for name in all_measured[0].figures:
        ours = {measured.checkpoint if measured.step is None else f'{measured.checkpoint}, step {measured.step}':
                measured.figures[name] for measured in all_measured}
        theirs = PUBLISHED.get(f'{name} of {datasets}', PUBLISHED.get(name, {}))
        title = TITLES.get(name, f'{name} of {datasets}')
        tables.append('\n'.join(filter(None, (title, notes.get(name), table(ours | theirs, {})))))
    return '\n\n'.join(tables)


def notes_on(rows: dict[str, list[Row]]) -> dict[str, str]:
    """What must be known of each scoring to compare its figures."""
    notes, theirs = {}, '; GPT-3 as OpenAI scored it'
    if 'hellaswag' in rows:
        text = '' if is_raw(rows['hellaswag']) else ' of cleaned text: not comparable with the published figures'
        examples = f'{len(rows["hellaswag"]):,} examples{text}'
        notes = {'hellaswag_completion': examples + theirs, 'hellaswag_lm_eval': examples}
    if 'lambada' in rows:
        notes['lambada_openai'] = f'{len(rows["lambada"]):,} examples{theirs}'
    return notes


def json_file(where: str, found: Sequence[str]) -> str:
    """evaluation.json in the folder that holds what was found; for the weights of the hub, or of a URL, in this one,
    under their name."""
    if not os.path.exists(found[0]):
        return f'evaluation-{Path(where).stem}.json'
    common = os.path.commonpath(found)
    return os.path.join(common if os.path.isdir(common) else os.path.dirname(common), 'evaluation.json')


def as_json(all_measured: Sequence[Measured], about: dict[str, Any]) -> bytes:
    """What the tables say, and what else was given, as JSON, which has no infinity and no NaN: null."""
    rows = []
    for measured in all_measured:
        figures = {name: {metric: x if math.isfinite(x) else None for metric, x in row.items()}
                   for name, row in measured.figures.items()}
        rows.append({'checkpoint': measured.checkpoint, 'step': measured.step, 'dataset': measured.dataset, **figures})
    return dumps({'measured': rows, 'published': PUBLISHED, **about}, indent=2, allow_nan=False).encode() + b'\n'


def main(args: list[str]) -> None:
    settings, _ = configurator.configure(sys.modules[__name__], args)
    configurator.check_range(settings, 'batch_size', 1)
    configurator.check_range(settings, 'eval_iters limit', 0)
    names, where = find_tasks(tasks), init_from or out_dir
    found = find_checkpoints(where)
    with parallel.joined(device, backend) as process:
        parallel.refuse_difference(process, 'checkpoints', found, 'all machines must see the same files')
        precision, _ = parallel.pick_dtype(dtype, process.device.type)
        autocast = parallel.autocast(process.device, precision)
        progress = logger.Logger('', process.is_main, 0, 0).progress
        paths = {'hellaswag': hellaswag, 'lambada': lambada}
        rows = {name: load(name, path, limit, process) for name, path in paths.items() if name in names}
        all_measured = [measure(one, names, rows, dataset, split, eval_iters, batch_size, process, autocast, progress)
                        for one in found]
        all_measured.sort(key=step_of)
        if not process.is_main:
            return
        console.say(report(all_measured, notes_on(rows)))
        file = json or json_file(where, found)
        try:
            with logger.replacing(file) as opened:
                opened.write(as_json(all_measured, {
                    'settings': settings, 'dtype': parallel.name_of(precision),
                    'device': parallel.card(process) or process.device.type,
                    'notes': notes_on(rows), 'python': platform.python_version(), 'torch': str(torch.__version__)}))
        except OSError as error:
            raise UserError(f'{file} cannot be written: {error.strerror}\ngive another file with --json=') from None
        print(f'\nall figures are in {file}')


if __name__ == '__main__':
    errors.run(main)
