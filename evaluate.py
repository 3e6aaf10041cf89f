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
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import configurator
from model import GPTConfig
from plaingpt import console, errors, files, metrics
from plaingpt.corpus import tokenizer
from plaingpt.corpus.folder import data_folder, open_split, read_meta
from plaingpt.errors import UserError
from plaingpt.machines import device as device_module
from plaingpt.machines import processes
from plaingpt.machines.device import card, name_of, pick_dtype
from plaingpt.published import PUBLISHED
from plaingpt.run import checkpoint, upload
from plaingpt.tasks import Progress, Row, is_raw, load, measure_hellaswag, measure_lambada, score

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
    if upload.is_url(where) or Path(where).exists() or not glob.has_magic(where):
        return [where]
    found = sorted(glob.glob(where))
    if not found:
        raise UserError(f'--init_from={where} matches no file and no folder', errors.CHECKPOINT)
    return found


def step_of(measured: Measured) -> int:
    return -1 if measured.step is None else measured.step


def folder_of(state: checkpoint.State, dataset: str) -> Path:
    """The corpus that was asked for, or that of the run."""
    return data_folder(dataset or state.get('config', {}).get('dataset', 'openwebtext'))


def vocabulary_for(state: checkpoint.State, config: GPTConfig, folder: Path) -> tokenizer.Tokenizer:
    """The tokenizer that a model has learned: that of its checkpoint, else GPT-2's, where it has as many ids, else that
    of the corpus."""
    learned = state.get('tokenizer')
    if not learned and config.vocab_size not in (50257, tokenizer.model_vocab_size(50257)):
        learned = read_meta(folder)['tokenizer']
    vocabulary = tokenizer.from_state(learned or {'name': 'gpt2'})
    if vocabulary.n_vocab > config.vocab_size:
        raise UserError(f'the tokenizer of {folder} has {vocabulary.n_vocab} ids, the model only {config.vocab_size}:\n'
                        'name the corpus that the model was trained on with --dataset=', errors.DATA)
    return vocabulary


def measure(where: str, names: Sequence[str], rows: dict[str, list[Row]], dataset: str, split: str, n_batches: int,
            batch_size: int, process: processes.Process, autocast: AbstractContextManager[None],
            progress: Progress) -> Measured:
    """All tasks with one checkpoint. Every process must call it."""
    model, state = checkpoint.open_model(where)
    model.to(process.device)
    config, folder, figures = model.config, folder_of(state, dataset), {}
    if 'val' in names:
        corpus = open_split(folder, split, config.block_size, config.vocab_size)
        learned = checkpoint.vocabulary_of(read_meta(folder), state, where)
        sizes, n_windows = learned.token_sizes() if learned else None, n_batches * batch_size or len(corpus)
        figures[split] = metrics.evaluate(model, config, corpus, n_windows, batch_size, sizes, process, autocast,
                                          progress)
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
        tables.append('\n'.join(filter(None, (title, notes.get(name), metrics.table(ours | theirs, {})))))
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
    with processes.joined(device, backend) as process:
        processes.refuse_difference(process, 'checkpoints', found, 'all machines must see the same files')
        precision, _ = pick_dtype(dtype, process.device.type)
        autocast = device_module.autocast(process.device, precision)
        paths = {'hellaswag': hellaswag, 'lambada': lambada}
        rows = {name: load(name, path, limit, process) for name, path in paths.items() if name in names}
        all_measured = [measure(one, names, rows, dataset, split, eval_iters, batch_size, process, autocast,
                                console.progress) for one in found]
        all_measured.sort(key=step_of)
        if not process.is_main:
            return
        console.say(report(all_measured, notes_on(rows)))
        file = json or json_file(where, found)
        try:
            with files.written_whole(file) as opened:
                opened.write(as_json(all_measured, {
                    'settings': settings, 'dtype': name_of(precision),
                    'device': card(process.device) or process.device.type,
                    'notes': notes_on(rows), 'python': platform.python_version(), 'torch': str(torch.__version__)}))
        except OSError as error:
            raise UserError(f'{file} cannot be written: {error.strerror}\ngive another file with --json=') from None
        print(f'\nall figures are in {file}')


if __name__ == '__main__':
    errors.run(main)
