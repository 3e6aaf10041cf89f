"""
Checkpoints: one file of whole, unwrapped tensors on the CPU and plain Python values, with all that is needed to sample,
to evaluate and to continue the training. It is a superset of nanoGPT's, and nanoGPT's load here.

It is written under a temporary name and renamed, so a kill at any moment leaves the previous one; the zip's checksums
are compared on loading, so that damage is never taken for weights.
"""
import platform
import shutil
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from model import GPT, GPTConfig
from plaingpt import console, files
from plaingpt.errors import CHECKPOINT, DATA, DISK_FULL, FULL, SYSTEM, UserError
from plaingpt.formats import others
from plaingpt.formats.weights import KINDS, fitting, gpt_class
from plaingpt.machines import strategies
from plaingpt.machines.zero import names_of
from plaingpt.run import upload

State = dict[str, Any]
MODEL_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')  # nanoGPT's seven
CHOICES = ('gelu', 'tie_weights', 'arch', 'shortcuts')  # the other settings that change what weights compute
SHAPE = (*(name for name in MODEL_ARGS if name != 'dropout'), *CHOICES)  # settings that the weights decide
WRITTEN = (  # files that a run writes under a temporary name first
    rf'\.?({upload.CHECKPOINTS.pattern})(\.[0-9a-f]{{8}}{upload.UPLOADING})?|'
    r'metrics\.jsonl|samples\.txt|loss\.png|report\.html|run\.json')


class Saver:
    """The writer of a run's checkpoints, while training continues: it waits for the disk only if the previous
    checkpoint is not written yet, and at the end. Each new file goes to the uploader, too."""

    def __init__(self, out_dir: Path, keep: int, uploader: upload.Uploader, while_waiting: Callable[[], None]) -> None:
        self.out_dir, self.keep, self.uploader, self.while_waiting = out_dir, keep, uploader, while_waiting
        self.executor = futures.ThreadPoolExecutor(max_workers=1)
        self.last: futures.Future[None] | None = None  # the checkpoint that was begun last

    def __enter__(self) -> Self:
        """Upload the files of a resumed run: the uploads may have been cut off with it."""
        for path in filter(Path.exists, (self.out_dir / 'ckpt.pt', self.out_dir / 'best.pt')):
            self.uploader.put(path)
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def save(self, is_best: bool, state: State) -> None:
        """Begin to write `state`, which the caller must no longer change."""
        self.wait()
        self.last = self.executor.submit(self.write, state, is_best)

    def write(self, state: State, is_best: bool) -> None:
        write(self.out_dir, state, self.keep, is_best)
        for name in ('ckpt.pt', 'best.pt') if is_best else ('ckpt.pt',):
            self.uploader.put(self.out_dir / name)

    def wait(self) -> None:
        """Block until the last checkpoint is on the disk. Raise what went wrong with it."""
        while self.last and not self.last.done():
            self.while_waiting()  # tells the other processes that this one does not hang
            futures.wait([self.last], timeout=1.0)
        self.complain()

    def complain(self) -> None:
        """Raise what went wrong with the last checkpoint, if it is known by now."""
        if self.last and self.last.done():
            self.last.result()


def model_args(config: GPTConfig) -> dict[str, Any]:
    """Return the shape of a model under nanoGPT's names, and no others, so that nanoGPT's sample.py loads the file."""
    return {name: getattr(config, name) for name in MODEL_ARGS}


def shape_of(config: GPTConfig) -> dict[str, Any]:
    """Return the settings that the weights decide, as a checkpoint's `config` keeps them."""
    return {name: getattr(config, name) for name in SHAPE}


def write(out_dir: Path, state: State, keep: int, is_best: bool) -> None:
    """Put `state` into out_dir/ckpt.pt; the checkpoints before it become ckpt.1.pt and so on, `keep` in all; the best
    so far is best.pt as well. If there was a ckpt.pt before, there is a whole one at every moment."""
    newest = out_dir / 'ckpt.pt'
    state['versions'] = {'python': platform.python_version(), 'torch': str(torch.__version__)}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)  # it may have been deleted
        with files.written_whole(newest) as file:
            torch.save(state, file)
            files.put_on_disk(file)  # rotate only now: if the disk is full, the older ones keep their names
            rotate(out_dir, keep)
        if is_best:
            files.link(newest, out_dir / 'best.pt')
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f'the next {newest} cannot be written: {SYSTEM[error.errno][0]}\n'
                        f'it needs {n_bytes(state):,} bytes, and {shutil.disk_usage(out_dir).free:,} are free\n'
                        f'{newest}, if it exists, is whole: make room, and resume', DISK_FULL) from None


def rotate(out_dir: Path, keep: int) -> None:
    """Give each checkpoint the name of the next older one; the newest has two names for a moment, so that ckpt.pt never
    disappears."""
    for age in range(keep - 1, 1, -1):
        if (younger := out_dir / f'ckpt.{age - 1}.pt').exists():
            younger.replace(out_dir / f'ckpt.{age}.pt')
    if (out_dir / 'ckpt.pt').exists():
        files.link(out_dir / 'ckpt.pt', out_dir / 'ckpt.1.pt')


def n_bytes(tree: Any) -> int:
    """Return the bytes of the tensors in a tree of dicts."""
    if isinstance(tree, dict):
        return sum(map(n_bytes, tree.values()))
    return tree.nbytes if isinstance(tree, Tensor) else 0


def make_ready(out_dir: Path, is_new: bool, is_best: bool, n_bytes: int, keep: int) -> None:
    """Make the folder of a run ready before it begins: delete what a kill left half written and, if the run is new, the
    checkpoints of another; link best.pt if the newest is the best. Raise UserError if there is no room for `keep`
    checkpoints of n_bytes each, the best and a new one."""
    out_dir.mkdir(parents=True, exist_ok=True)
    of_another = [path for path in out_dir.iterdir() if is_new and upload.CHECKPOINTS.fullmatch(path.name)]
    of_older_versions = out_dir / 'ckpt.new.pt'
    for path in (*files.left_by_kills(out_dir, WRITTEN), *upload.snapshots(out_dir), *of_another, of_older_versions):
        path.unlink(missing_ok=True)
    if is_best and (out_dir / 'ckpt.pt').exists():
        files.link(out_dir / 'ckpt.pt', out_dir / 'best.pt')  # a kill may have come between the two
    need = bytes_needed(n_bytes, keep)
    # by inode, as two names may be links to one file
    used = {path.stat().st_ino: path.stat().st_size for path in [*out_dir.glob('ckpt*.pt'), *out_dir.glob('best.pt')]}
    room = shutil.disk_usage(out_dir).free + sum(used.values())
    if need > room:
        raise UserError(f'{out_dir} needs {need:,} bytes for {keep + 2} checkpoints, and there is room for {room:,}\n'
                        'make room, or give another --out_dir', DISK_FULL)


def bytes_needed(n_bytes: int, keep: int) -> int:
    """Return the bytes of `keep` checkpoints, the best and a new one, each with tensors of n_bytes."""
    return (keep + 2) * n_bytes


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the paths of a run's checkpoints, from the newest to the oldest; ckpt.pt need not exist."""
    older = folder.glob('ckpt.[0-9]*.pt')
    return [folder / 'ckpt.pt', *sorted(older, key=lambda path: int(path.name.split('.')[1]))]


def load(path: Path, answers: dict[str, Any] | None = None) -> State:
    """Return what a file holds, in this project's form, even if another project wrote it: `answers` gives the n_head
    and gelu that it may not say. The weights are in memory; the moments, which only a resumed run needs, are read from
    the file when they are used. Raise UserError for a file that is missing, damaged, or of another model."""
    if not path.is_file():
        raise UserError(f'no checkpoint at {path}', CHECKPOINT)
    state = others.adopt(others.read(path, is_mapped=True), path, answers or {})
    try:
        config = config_of(state)
    except UserError as error:  # the sizes contradict each other
        raise UserError(f'{path} is damaged: {error}', CHECKPOINT) from None
    weights = fitting(config, state['model'], path)
    if odd := state['model'].keys() - weights.keys():
        raise UserError(f'the weights in {path} do not fit {KINDS[config.arch]}, which has no {min(odd)}', CHECKPOINT)
    copies = {id(p): p.clone() for p in weights.values()}  # out of the mapped file; a tied table stays one tensor
    return state | {'model': {name: copies[id(p)] for name, p in weights.items()}}


def load_newest(out_dir: Path) -> State:
    """Return the newest whole checkpoint of a run, and print a line for each newer one that is damaged. Raise UserError
    if none is whole."""
    complaints: list[str] = []
    for path in checkpoints_of(out_dir):
        try:
            state = load(path)
            if complaints and console.is_main():
                instead = f'{path} is used in its place, from step {state["iter_num"]}'
                console.note('\n'.join([*complaints, instead]))
            return state
        except UserError as error:
            complaints.append(str(error))
    advice = f'nothing to continue in {out_dir}: give another --out_dir, or start a run with --init_from=scratch'
    raise UserError('\n'.join([*complaints[:2], advice]), CHECKPOINT)  # a message has three lines at most


def holds_run(folder: Path) -> bool:
    """Return whether there is a checkpoint, even a damaged one. A half-written file that a kill left does not count."""
    return any(path.exists() for path in checkpoints_of(folder))


def config_of(state: State, dropout: float = 0.0) -> GPTConfig:
    """Return the shape of a checkpoint's model. Dropout is a matter of training, and given anew each time."""
    shape = {name: value for name, value in state['model_args'].items() if name in MODEL_ARGS}
    more = {name: state['config'][name] for name in CHOICES if name in state['config']}  # older files lack some
    return GPTConfig(**shape | more | {'dropout': dropout})


def model_of(state: State, dropout: float = 0.0) -> GPT:
    config = config_of(state, dropout)
    return gpt_class(config).from_weights(config, state['model'])


def is_other_data(state: State, data: dict[str, Any]) -> bool:
    """Return whether a checkpoint's run has read a different corpus from that of this fingerprint, as far as both
    tell."""
    return any(data.get(split, {}).get(name, mark) != mark
               for split, marks in state['data'].items() for name, mark in marks.items())


class Place(NamedTuple):
    """The progress of a run."""

    step: int = 0  # updates made
    windows: int = 0  # read in all
    windows_before: int = 0  # of these: before this corpus and block_size
    tokens: int = 0  # read in all


def place_of(state: State, data: dict[str, Any], block_size: int) -> Place:
    """Return the place where a run continues in a corpus with this fingerprint. If it has read another corpus, or
    windows of another size, it begins with the first window."""
    is_other = is_other_data(state, data) or state['model_args']['block_size'] != block_size
    before = state['windows'] if is_other else state['windows_before']
    return Place(state['iter_num'], state['windows'], before, state['tokens'])


def refuse_other_data(state: State, data: dict[str, Any], folder: Path) -> None:
    """Raise UserError if a run does not continue on the corpus that it began with: other tokens would count as the same
    windows."""
    if is_other_data(state, data):
        before, now = (', '.join(
            f'{split} {mark["tokens"]:,} tokens, hash {(mark.get("sample") or mark["sha256"] or mark["head"])[:8]}'
            for split, mark in marks.items()) for marks in (state['data'], data))
        raise UserError(f'the corpus in {folder} is not the one that this run has read: {now}; it was: {before}\n'
                        'prepare that one again, or give --ignore_data_change=True to continue with this one', DATA)


def describe(state: State, settings: dict[str, Any]) -> str:
    """Return in words where a run continues, and which settings have changed. A dtype of 'auto' keeps the previous
    one."""
    changed = [f'{name}={value} (was {state["config"][name]})' for name, value in settings.items()
               if state['config'].get(name, value) != value and name not in ('init_from', 'overwrite', *SHAPE)
               and (name, value) != ('dtype', 'auto')]
    return f'resuming at step {state["iter_num"]}' + (f', with {", ".join(changed)}' if changed else '')


def fit(moments: dict[str, Tensor | float], shape: torch.Size, names: Iterable[str]) -> bool:
    """Return whether these are the moments of a weight of that shape, under these names, or its number of steps; the
    block_size may be shorter than it was."""
    shapes = [getattr(moment, 'shape', torch.Size()) for moment in moments.values()]
    return set(names) <= moments.keys() and all(not found or (found[1:] == shape[1:] and found[0] >= shape[0])
                                                for found in shapes)


def restore(optimizer: Optimizer, scaler: torch.amp.GradScaler, state: State) -> None:
    """Give the optimizer the moments of a checkpoint. Learning rate, betas and weight decay stay as this run sets
    them."""
    found = state.get('optimizer', {'param_groups': [], 'state': {}})
    sizes, saved = ([len(group['params']) for group in groups]
                    for groups in (optimizer.param_groups, found['param_groups']))
    weights = dict(enumerate((p.shape, names_of(group)) for group in optimizer.param_groups for p in group['params']))
    if sizes != saved or not all(number in weights and fit(moments, *weights[number])
                                 for number, moments in found['state'].items()):
        raise UserError('the checkpoint has no optimizer state, or that of another model: it cannot be resumed\n'
                        'start a new run from its weights: give its path as --init_from', CHECKPOINT)
    strategies.load_optimizer(optimizer, state['optimizer']['state'])
    if state['scaler']:
        scaler.load_state_dict(state['scaler'])


def fetch_run(out_dir: Path, url: str) -> None:
    """Fetch the checkpoints that another machine uploaded, if this machine has none of the run."""
    if url and not holds_run(out_dir) and upload.checkpoints(url):
        for path in upload.fetch(url, out_dir):
            console.note(f'{path} comes from {url}')
