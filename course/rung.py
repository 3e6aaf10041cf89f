"""
The work that the rungs of the course share. Each puts parts of its own in the place of those of the plain files, proves
that the numbers are the same, and measures its gain.

A file of the course says in PARTS which functions and classes it has in the place of model_trivialised.py's, and of
train_trivialised.py's `train`. What it says nothing of is as in the rung before it, BEFORE, which is the one with the
number before its own unless it names another, and so on down to the plain files.
"""
import inspect
import io
import re
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import configurator
import model_trivialised
from model import GPTConfig
from plaingpt import console, errors
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.folder import data_folder, open_split, read_meta
from plaingpt.corpus.token_files import TokenFile
from plaingpt.machines import strategies

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
FIRST, LAST = 4, 14  # rungs that are the same function as the plain files; those after them learn more from a token
NAMES = sorted(path.stem for path in FOLDER.glob('[0-9]*.py'))
COPIES = count(1)

SHAPE = GPTConfig(block_size=64, vocab_size=1024, n_layer=4, n_head=4, n_embd=128, bias=False)  # of the default run
N_WINDOWS = 16  # in a step
STEPS = 10  # of a training that is compared, and of one that is timed
SEEDS = (1337, 1, 2)  # of a rung that learns more, which is trained on the default text
TURNS = 7  # after two that warm up; their median counts
ROUNDING = 1e-9  # in float64, relative to the largest number: more than a thousand roundings, and less than any mistake
Outcome = dict[str, list[Tensor]]


# ------------------------------------------------------------------------------------------------
# Parts


def load(path: Path) -> ModuleType:
    """Return a file as a module of its own: whatever is exchanged in it is exchanged in no other."""
    name = f'{path.stem}_copy_{next(COPIES)}'
    spec = spec_from_file_location(name, path)
    assert spec and spec.loader, path
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find(name: str) -> ModuleType:
    """Return a rung of the course."""
    return load(FOLDER / f'{name}.py')


def before(name: str) -> str:
    """Return the rung that this one changes; '' is the plain files."""
    place = NAMES.index(name) - 1
    return str(getattr(find(name), 'BEFORE', NAMES[place] if int(name[:2]) > FIRST else ''))


def way_to(name: str) -> list[str]:
    """Return the rungs whose parts make up this one, from the plain files on."""
    return [*way_to(before(name)), name] if name else []


def exchange(plain: ModuleType, name: str, part: Any) -> None:
    """Put a part in the place of a plain one. A class that extends the plain one brings only its methods: all else is
    as it was in `plain`, which may hold parts of other rungs."""
    old = getattr(plain, name)
    if inspect.isclass(part) and issubclass(part, getattr(model_trivialised, name)):
        part = type(name, (old,), {key: method for key, method in vars(part).items() if inspect.isfunction(method)})
    setattr(plain, name, part)


def plain_model(way: Iterable[str], path: Path = ROOT / 'model_trivialised.py') -> ModuleType:
    """Return model_trivialised.py with the parts of these rungs in the place of its own."""
    plain = load(path)
    for rung in map(find, way):
        for name in rung.PARTS:
            if name in vars(plain):
                exchange(plain, name, getattr(rung, name))
    return plain


def plain_training(way: Iterable[str], **settings: Any) -> ModuleType:
    """Return train_trivialised.py with these settings and with the parts of these rungs in the place of its own. A
    rung that has another `train` takes its place as a whole."""
    plain = module = load(ROOT / 'train_trivialised.py')
    vars(plain).update(settings)
    for rung in map(find, way):
        vars(rung).update(settings=plain, **settings)
        module = rung if 'train' in rung.PARTS else module
        for name in rung.PARTS:
            if name in vars(module):
                setattr(module, name, getattr(rung, name))
    return module


# ------------------------------------------------------------------------------------------------
# Runs of a model that is made of parts


class Run(NamedTuple):
    """One thing to do with the parts of some rungs: differentiate a loss, train, or write a text."""

    way: list[str]
    kind: str  # 'model', 'training' or 'text'
    config: GPTConfig = SHAPE
    dtype: torch.dtype = torch.float64
    batch_size: int = 4  # windows in a micro-batch, for rungs that have some

    def go(self, folder: str) -> tuple[Outcome, float]:
        """Return what comes of it, and the seconds that one step, or a text, takes."""
        torch.set_num_threads(1)
        torch.manual_seed(1)
        model = plain_model(self.way).GPT(self.config).to(self.dtype)
        with redirect_stdout(io.StringIO()):
            return {'model': self.differentiate, 'training': self.train, 'text': self.write}[self.kind](model, folder)

    def differentiate(self, model: Any, folder: str) -> tuple[Outcome, float]:
        x, y = self.batch()
        started = time.process_time()
        logits, loss = model(x, y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        seconds = time.process_time() - started
        return {'logits': [logits.detach()], 'loss': [loss.detach()], 'gradients': list(gradients)}, seconds

    def train(self, model: Any, folder: str) -> tuple[Outcome, float]:
        T = self.config.block_size
        module = plain_training(self.way, block_size=T, total_batch_size=N_WINDOWS * T, batch_size=self.batch_size,
                                max_iters=STEPS, warmup_iters=2, lr_decay_iters=STEPS)
        began = []  # each step, by reading its windows

        def read(*arguments: Any) -> tuple[Tensor, Tensor]:
            began.append(time.process_time())
            return read_batch(*arguments)

        vars(module).update(read_batch=read)
        losses = module.train(model, TokenFile(Path(folder, 'train.bin'), 'uint16'))
        seconds = statistics.median(end - start for start, end in pairwise(began[1:]))  # the first one may compile
        weights = [strategies.complete(p.detach()) for p in model.parameters()]
        return {'losses': [torch.tensor(losses, dtype=torch.float64)], 'weights': weights}, seconds

    def write(self, model: Any, folder: str) -> tuple[Outcome, float]:
        started = time.process_time()
        tokens = model.generate(self.batch()[0][:1, :4], self.config.block_size)
        return {'tokens': [tokens.double()]}, time.process_time() - started

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return x and y, each (B, T)."""
        shape = (N_WINDOWS, self.config.block_size + 1)
        ids = torch.randint(self.config.vocab_size, shape, generator=torch.Generator().manual_seed(2))
        return ids[:, :-1], ids[:, 1:]


def perform(runs: list[Run], turns: int = 1) -> list[tuple[Outcome, float]]:
    """Return what comes of each run, and its median seconds. They take turns, so that all meet the same disturbances.
    Those of rungs that are for several processes are done by as many, after the others."""
    with TemporaryDirectory() as folder:
        write_corpus(Path(folder, 'train.bin'), runs[0].config)
        alone = [run for run in runs if processes_of(run.way) == 1]
        together = [run for run in runs if run not in alone]
        results = take_turns(alone, turns, folder)
        if together:
            n = max(processes_of(run.way) for run in together)
            mp.spawn(work, (n, together, turns, folder), nprocs=n)
            results += torch.load(Path(folder, 'results.pt'), weights_only=True)
    of_run = dict(zip(map(id, alone + together), results, strict=True))
    return [of_run[id(run)] for run in runs]


def take_turns(runs: list[Run], turns: int, folder: str) -> list[tuple[Outcome, float]]:
    """Return what comes of each run, and its median seconds."""
    results = [[run.go(folder) for run in runs] for _ in range(turns)]  # [turn][run]
    warm = results[2:] or results
    return [(of_run[0][0], statistics.median(seconds for _, seconds in of_run)) for of_run in zip(*warm, strict=True)]


def work(rank: int, n: int, runs: list[Run], turns: int, folder: str) -> None:
    """Be one of n processes that do these runs together."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=n)
    results = take_turns(runs, turns, folder)
    if rank == 0:
        torch.save(results, Path(folder, 'results.pt'))
    dist.destroy_process_group()


def processes_of(way: list[str]) -> int:
    """Return how many processes the last of these rungs is for."""
    return int(getattr(find(way[-1]), 'PROCESSES', 1)) if way else 1


def write_corpus(path: Path, config: GPTConfig) -> None:
    """Write ids that are not equally likely, so that there is something to learn, in any order."""
    ids = np.random.default_rng(3).random(2 * STEPS * N_WINDOWS * config.block_size) ** 4 * config.vocab_size
    path.write_bytes(ids.astype('<u2').tobytes())


# ------------------------------------------------------------------------------------------------
# Proof and gain


def kind_of(rung: ModuleType) -> str:
    """Return what shows the work of a rung: one step of a model, ten steps of training, or a text."""
    of_model = [name for name in rung.PARTS if name in vars(model_trivialised)]
    return 'text' if 'GPT' in rung.PARTS else 'model' if of_model else 'training'


def difference(one: Outcome, other: Outcome) -> dict[str, float]:
    """Return how far two outcomes are apart, relative to the largest number of each kind."""
    apart = {}
    for kind, tensors in one.items():
        largest = max(float(t.abs().max()) for t in tensors)
        pairs = zip(tensors, other[kind], strict=True)
        apart[kind] = max(float((a.double() - b.double()).abs().max()) for a, b in pairs) / largest
    return apart


def prove(name: str, config: GPTConfig = SHAPE, batch_size: int = 4) -> dict[str, dict[str, float]]:
    """Return how far a rung is from the one before it, and from the plain files. Raise AssertionError if that is more
    than rounding explains."""
    rung = find(name)
    dtype, limit = getattr(rung, 'DTYPE', torch.float64), getattr(rung, 'ROUNDING', ROUNDING)
    make = partial(Run, kind=kind_of(rung), config=config, dtype=dtype, batch_size=batch_size)
    new, old, plain = (outcome for outcome, _ in perform([make(way_to(name)), make(way_to(before(name))), make([])]))
    compared = getattr(rung, 'COMPARED', tuple(new))
    found = {against: {kind: apart for kind, apart in difference(other, new).items() if kind in compared}
             for against, other in (('before', old), ('plain', plain))}
    for against, kinds in found.items():
        assert max(kinds.values()) <= limit, f'{name} is another function than {against}: {kinds}'
    return found


def gain(name: str) -> dict[str, float]:
    """Return the seconds of a step (a text, in rungs that generate) of the plain files, the rung before, and this one,
    in float32: those that a process computes. Its waiting, for other programs or another process, does not count."""
    make = partial(Run, kind=kind_of(find(name)), dtype=torch.float32)
    ways: dict[str, list[str]] = {'plain': [], 'before': way_to(before(name)), 'this': way_to(name)}
    if not before(name):
        del ways['before']
    seconds = [median for _, median in perform([make(way) for way in ways.values()], TURNS + 2)]
    found = dict(zip(ways, seconds, strict=True))
    return {'before': found['plain'], **found}


def is_same_function(name: str) -> bool:
    return FIRST <= int(name[:2]) <= LAST


def examine(name: str) -> dict[str, Any]:
    """Prove and time a rung; of one that is another function, measure what it learns, which takes minutes."""
    if is_same_function(name):
        return {'apart': prove(name), 'seconds': gain(name)}
    return {'losses': [val_loss((*way_to(name),), seed) for seed in SEEDS],
            'before': [val_loss((*way_to(before(name)),), seed) for seed in SEEDS]}


def described(name: str, found: dict[str, Any]) -> str:
    """Return what was found out about a rung, for people."""
    lines = [title(name)]
    if 'losses' in found:
        old = f'{label(name, "before")}: {spread(found["before"])}'
        return f'{lines[0]}\n    val loss {spread(found["losses"])}, {old}'
    for other, against in {label(name, against): against for against in ('before', 'plain')}.items():
        apart = ', '.join(f'{kind} {most:.0e}' for kind, most in found['apart'][against].items())
        times = found['seconds'][against] / found['seconds']['this']
        lines.append(f'    {times:.2f} times as fast as {other}, and apart from it by: {apart}')
    return '\n'.join(lines)


def spread(losses: list[float], sign: str = '') -> str:
    """Return a mean, whose sign is shown if that is '+', and a standard deviation."""
    return f'{statistics.mean(losses):{sign}.3f} ± {statistics.stdev(losses):.3f}'


def label(name: str, against: str) -> str:
    """Return what a rung is compared with, in words."""
    return f'rung {int(before(name)[:2])}' if against == 'before' and before(name) else 'the plain files'


def text_of(name: str) -> str:
    """Return what the file of a rung says of it."""
    return inspect.cleandoc(find(name).__doc__ or '')


def title(name: str) -> str:
    """Return the number and the name of a rung, with which its text begins."""
    return '. '.join(text_of(name).split('. ')[:2])


def corpus() -> tuple[TokenFile, TokenFile, int]:
    """Return the default text, for training and for validation, and how many ids it has."""
    folder = data_folder('stdlib')
    V = read_meta(folder)['vocab_size']
    return open_split(folder, 'train', SHAPE.block_size, V), open_split(folder, 'val', SHAPE.block_size, V), V


def climb(plain: ModuleType, way: Iterable[str], args: list[str]) -> None:
    """Train a model of one layer, which may have parts of another kind, as train_trivialised.py does, or as the last of
    these rungs does that has a training of its own."""
    module = load(ROOT / 'train_trivialised.py')

    def train(model: Any, tokens: TokenFile) -> list[float]:
        names = configurator.find_settings(module)
        return list(plain_training(way, **{name: getattr(module, name) for name in names}).train(model, tokens))

    vars(module).update(GPT=plain.GPT, train=train)
    module.main(['--n_layer=1', *args])


@cache
def val_loss(way: tuple[str, ...], seed: int) -> float:
    """Return what a training with the parts of these rungs ends at, in nats per token."""
    torch.set_num_threads(1)
    said = io.StringIO()
    with redirect_stdout(said):
        climb(plain_model(way), way, [f'--seed={seed}'])
    return float(re.findall(r'^val loss (\S+)$', said.getvalue(), re.MULTILINE)[-1])


def main(path: str) -> None:
    """Do what a file of the course is for: count, train with parts that are another function, or prove and time a rung
    that is the same."""
    errors.run(partial(carry_out, Path(path).stem))


def carry_out(name: str, args: list[str]) -> None:
    """Do it, with settings of train_trivialised.py if it trains."""
    module = find(name)
    is_trained = 'PARTS' in vars(module) and not is_same_function(name)
    if args and not is_trained:
        raise errors.UserError(f'{name}.py has no settings: leave out {" ".join(args)}', errors.COMMAND)
    if is_trained:
        way = way_to(name) if int(name[:2]) > LAST else [name]
        climb(plain_model(way), way, args)
    elif 'PARTS' in vars(module):
        console.say(described(name, examine(name)))
    else:
        module.show()
