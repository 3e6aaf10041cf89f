"""
Measure how good a model is: loss, perplexity, accuracy and bits per byte on a corpus, HellaSwag, LAMBADA.

    python evaluate.py --out_dir=out-stdlib                          the newest checkpoint of a run, on its own corpus
    python evaluate.py --init_from='out/ckpt*.pt' --tasks=hellaswag  several, one below the other
    python evaluate.py --out_dir=out-stdlib --dataset=book.txt       a text, in the tokens that the model has learned
    python evaluate.py --init_from=gpt2 --tasks=val,hellaswag,lambada --dataset=openwebtext     GPT-2's weights
"""
import glob
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import configurator  # before PyTorch, which reads a variable that plaingpt/__init__.py sets

# isort: split

import torch

from model import refuse_not_finite
from plaingpt import console, errors, files, metrics
from plaingpt.corpus.folder import fingerprint, open_split, read_meta
from plaingpt.corpus.unprepared import is_unprepared, open_text
from plaingpt.errors import UserError
from plaingpt.init_from import corpus_of, learned_reference, learned_tokenizer, open_model, shared_tokenizer
from plaingpt.machines import processes
from plaingpt.machines.device import Compute, choose, gpu_name, name_of
from plaingpt.machines.int8 import quantise
from plaingpt.machines.processes import Process
from plaingpt.machines.watch import Watch, explained
from plaingpt.metrics import Predictor
from plaingpt.paths import is_url, matching
from plaingpt.published import PUBLISHED, TITLES
from plaingpt.run import report as run_report
from plaingpt.run.checkpoint import State
from plaingpt.tasks import Row, is_raw, load, measure_hellaswag, measure_lambada

# ------------------------------------------------------------------------------------------------
# Settings
init_from: str = ''  # a checkpoint file, a run's folder, a glob of these, a Hugging Face folder, 'gpt2*'; '' is out_dir
out_dir: str = 'out'  # of the run
tasks: str = 'val'  # any of 'val', 'hellaswag' and 'lambada', such as 'val,hellaswag'
dataset: str = ''  # a folder in data/, any folder, or text (.txt, .jsonl, .parquet); '' is what the model has read
split: Literal['train', 'val'] = 'val'  # of the dataset, unless that is text
column: str = 'text'  # of the text in .jsonl and .parquet files, if the dataset consists of these
hellaswag: str = ''  # its validation set, a .jsonl file; '' downloads the original
lambada: str = ''  # its test set, a .jsonl file; '' downloads OpenAI's
eval_iters: int = 0  # batches of the dataset to evaluate on; 0 is the whole split
limit: int = 0  # examples of hellaswag and lambada, from the first on; 0 is all
batch_size: int = 8  # windows at a time, or as many tokens of questions; lower it when memory runs out
json: str = ''  # a file for all figures; '' is evaluation.json beside the checkpoint, replaced each time
device: str = 'auto'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'  # of the matrix products
backend: str = 'auto'
# ------------------------------------------------------------------------------------------------

# Each process may have its own values of these, which say where things are: the things themselves are compared.
PLACE = ('init_from', 'out_dir', 'dataset', 'hellaswag', 'lambada', 'json', 'device')
MEASURES = {'hellaswag': measure_hellaswag, 'lambada': measure_lambada}  # the tasks beside 'val'
SAME = '{} must be the same on all machines'


class Measured(NamedTuple):
    """The figures of one checkpoint."""

    checkpoint: str
    step: int | None  # None if the weights do not come from a run
    dataset: str  # that of the split, '' if no split was read
    figures: dict[str, dict[str, float]]  # of the split, and of each scoring


def find_tasks(names: str) -> list[str]:
    """Return ['val', 'lambada'] for 'val,lambada'. Raise UserError for a task that does not exist."""
    found, known = [name.strip() for name in names.split(',')], ['val', *MEASURES]
    if unknown := [name for name in found if name not in known]:
        raise UserError(f"--tasks={names}: there is no task '{unknown[0]}'; give some of {','.join(known)}")
    return list(dict.fromkeys(found))


def find_checkpoints(where: str) -> list[str]:
    """Return `where` itself, if that is a file, a folder, a URL or a name on the hub; if not, all that it matches."""
    if is_url(where) or Path(where).exists() or not glob.has_magic(where):
        return [where]
    found = [str(path) for path in matching(Path(where))]
    if not found:
        raise UserError(f'--init_from={where} matches no file and no folder', errors.CHECKPOINT)
    return found


def measure(where: str, names: Sequence[str], questions: dict[str, list[Row]], process: Process,
            compute: Compute) -> Measured:
    """Do all tasks with one checkpoint. Every process must call it."""
    model, state = open_model(where)
    model.to(process.device)
    if compute.dtype == torch.int8:
        quantise(model)
    predict = Predictor(model, model.config, process, compute, batch_size)
    is_text = is_unprepared(dataset)
    corpus = '' if is_text else dataset
    folder, n_vocab = corpus_of(state, corpus), model.config.vocab_size
    figures: dict[str, dict[str, float]] = {}
    if 'val' in names:
        figures = measure_text(state, predict) if is_text else measure_split(folder, state, predict)
        refuse_not_finite(all(math.isfinite(row['loss']) for row in figures.values()))
    for name, rows in questions.items():
        figures |= MEASURES[name](rows, learned_tokenizer(state, n_vocab, folder, bool(corpus)), predict)
    read = Path(dataset).name if is_text else folder.name
    return Measured(console.shown(where), state.get('iter_num'), read if 'val' in names else '', figures)


def measure_split(folder: Path, state: State, predict: Predictor) -> dict[str, dict[str, float]]:
    """Measure a model on a corpus, which must have the model's tokenizer."""
    n_vocab = predict.config.vocab_size
    corpus = open_split(folder, split, predict.config.block_size, n_vocab)
    processes.refuse_difference(predict.process, {split: fingerprint(corpus, read_meta(folder))}, SAME.format(folder))
    learned = shared_tokenizer(learned_reference(state, n_vocab, folder, bool(dataset)), folder)
    sizes = learned.token_sizes() if learned else None
    return {split: metrics.evaluate(predict, corpus, eval_iters * batch_size, sizes)}


def measure_text(state: State, predict: Predictor) -> dict[str, dict[str, float]]:
    """Measure a model on text, in the tokens that it has learned."""
    if split != 'val':
        raise UserError(f'--split={split}: {dataset} is text, which has no splits: leave it out')
    learned = learned_tokenizer(state, predict.config.vocab_size, corpus_of(state))
    with tempfile.TemporaryDirectory() as folder:
        text = open_text(dataset, column, learned, predict.config.block_size, Path(folder))
        processes.refuse_difference(predict.process, {'text': fingerprint(text)}, SAME.format(dataset))
        return {'text': metrics.evaluate(predict, text, eval_iters * batch_size, learned.token_sizes())}


def report(all_measured: Sequence[Measured], notes: dict[str, str]) -> str:
    """Return a table for the split, and one for each scoring, with published figures below the measured ones."""
    tables = []
    datasets = ', '.join(dict.fromkeys(measured.dataset for measured in all_measured))
    for name in all_measured[0].figures:
        rows = {measured.checkpoint if measured.step is None else f'{measured.checkpoint}, step {measured.step}':
                measured.figures[name] for measured in all_measured}
        corpus = f'{name} of {datasets}'
        table = metrics.table(rows | PUBLISHED.get(corpus, PUBLISHED.get(name, {})), {})
        tables.append('\n'.join(filter(None, (TITLES.get(name, corpus), notes.get(name), table))))
    return '\n\n'.join(tables)


def notes_on(rows: dict[str, list[Row]]) -> dict[str, str]:
    """Return what a reader must know about each scoring to compare its figures."""
    notes, gpt3 = {}, '; GPT-3 as OpenAI scored it'
    if 'hellaswag' in rows:
        text = '' if is_raw(rows['hellaswag']) else ' of cleaned text: not comparable with the published figures'
        examples = f'{len(rows["hellaswag"]):,} examples{text}'
        notes = {'hellaswag_completion': examples + gpt3, 'hellaswag_lm_eval': examples}
    if 'lambada' in rows:
        notes['lambada_openai'] = f'{len(rows["lambada"]):,} examples{gpt3}'
    return notes


def json_file(where: str, found: Sequence[str]) -> str:
    """Return the path of evaluation.json in the folder that holds the checkpoints; for weights from the hub, or from a
    URL, a path in the current folder, with their name in it."""
    if not os.path.exists(found[0]):
        return f'evaluation-{Path(where.partition("?")[0]).stem}.json'
    common = os.path.commonpath(found)
    return os.path.join(common if os.path.isdir(common) else os.path.dirname(common), 'evaluation.json')


def as_json(all_measured: Sequence[Measured], about: dict[str, Any]) -> bytes:
    """Return the figures of the tables, and `about`, as JSON, which has null for infinity and NaN."""
    rows = []
    for checkpoint, step, corpus, figures in all_measured:
        finite = {name: {metric: x if math.isfinite(x) else None for metric, x in row.items()}
                  for name, row in figures.items()}
        rows.append({'checkpoint': checkpoint, 'step': step, 'dataset': corpus, **finite})
    return dumps({'measured': rows, 'published': PUBLISHED, **about}, indent=2, allow_nan=False).encode() + b'\n'


def write_json(path: Path, content: bytes) -> None:
    with files.written_whole(path) as file:
        file.write(content)
    console.say(f'\nall figures are in {path}')


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    configurator.check_range(sys.modules[__name__], 'batch_size', 1, below=configurator.MANY)
    configurator.check_range(sys.modules[__name__], 'eval_iters limit', 0, below=configurator.MANY)
    if json and Path(json).is_dir():
        raise UserError(f'--json={json} is a folder: give the name of a file')
    names, where = find_tasks(tasks), init_from or out_dir
    found = find_checkpoints(where)
    # An evaluation may take as long as it takes: the watch is for a process that ends.
    with (processes.joined(device, backend) as process, Watch(process, math.inf, math.inf) as watch,
          explained(watch, 'a smaller --batch_size')):
        settings = processes.agree_on_settings(process, sys.modules[__name__], args, PLACE)
        processes.refuse_difference(process, {'checkpoints': found}, 'all machines must see the same files')
        compute = choose(process.device, dtype, compile=False)
        console.say(f'{processes.describe(process)}; {compute.line}')
        paths = {'hellaswag': hellaswag, 'lambada': lambada}
        questions = {name: load(name, path, limit, process) for name, path in paths.items() if name in names}
        all_measured = [measure(one, names, questions, process, compute) for one in found]
        all_measured.sort(key=lambda measured: -1 if measured.step is None else measured.step)
        if not process.is_main:
            return
        notes = notes_on(questions)
        console.say(report(all_measured, notes))
        path = Path(json or json_file(where, found))
        write_json(path, as_json(all_measured, {
            'settings': settings,
            'dtype': name_of(compute.dtype),
            'device': gpu_name(process.device) or process.device.type,
            'notes': notes,
            'python': platform.python_version(),
            'torch': str(torch.__version__),
        }))
        if path.name == 'evaluation.json' and (path.parent / 'metrics.jsonl').is_file():  # of a run
            run_report.write(path.parent)
            console.say(f'{path.parent / "report.html"} shows them beside the run')


if __name__ == '__main__':
    errors.run(main)
