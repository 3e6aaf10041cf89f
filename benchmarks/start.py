"""
How long until something happens? train.py --help, and the first token of sample.py, against `import torch`, without
which neither can do; and the first step of the default run against nanoGPT's, with the same shape, text and settings.

    python benchmarks/start.py
    python benchmarks/start.py --nanogpt=FOLDER     a clone of https://github.com/karpathy/nanoGPT

Each run is a process of its own with one thread, on one core if the system allows that. The rivals take turns, so
that a busy moment of the machine hits all of them; a first round, which fills the disk's cache, does not count. Numbers
are medians: seconds of the CPU, which a busy machine hardly changes, and seconds of the clock.
"""
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from plaingpt.corpus.folder import read_meta
from plaingpt.errors import UserError, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
repeats: int = 9
nanogpt: str = ''  # the folder of its clone; '' leaves it out
# ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'config/train_stdlib.py'  # nanoGPT reads it as well: its names are nanoGPT's
CORPUS = ROOT / 'data/stdlib'
EQUAL = ('--device=cpu', '--dtype=float32', '--compile=False', '--eval_iters=1')  # both evaluate before the first step
LIKE_NANOGPT = ('--gelu=exact', '--sample_interval=0')
TRAIN = [sys.executable, str(ROOT / 'train.py'), str(CONFIG), *EQUAL, *LIKE_NANOGPT]
FIRST_STEP = 'iter 0:'


class Start(NamedTuple):
    """A command, and the beginning of the line of its output that ends the measurement; '' is its end."""

    command: list[str]
    folder: Path
    until: str = ''


def measure(start: Start) -> tuple[float, float]:
    """Return the seconds that a command takes, by the CPU and by the clock."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(start.command, cwd=start.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, encoding='utf-8')
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if start.until and line.startswith(start.until):
            process.kill()
            break
    else:
        if process.wait() or start.until:
            raise UserError(f'{" ".join(start.command)} failed: {"".join(lines[-2:])}')
    seconds = time.perf_counter() - began
    process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds


def take_turns(rivals: dict[str, Start]) -> dict[str, tuple[float, float]]:
    """Return the medians of each rival, in `repeats` rounds after one that does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for _ in range(repeats + 1):
        for name, start in rivals.items():
            seconds[name].append(measure(start))
    return {name: (median(cpu for cpu, _ in each[1:]), median(clock for _, clock in each[1:]))
            for name, each in seconds.items()}


def copy_nanogpt(clone: Path, folder: Path) -> Path:
    """Copy nanoGPT's scripts, and the corpus to where they look for it; nothing is written to the clone."""
    if not (clone / 'train.py').is_file():
        raise UserError(f'--nanogpt={clone}: it has no train.py')
    corpus = folder / 'data' / CORPUS.name
    corpus.mkdir(parents=True)
    for file in clone.glob('*.py'):
        shutil.copy(file, folder)
    for split in ('train.bin', 'val.bin'):
        shutil.copy(CORPUS / split, corpus)
    meta = read_meta(CORPUS)
    assert meta['dtype'] == 'uint16', 'nanoGPT reads nothing else'
    (corpus / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': meta['vocab_size']}))
    return folder


def first_steps(folder: Path, nanogpt: str) -> dict[str, Start]:
    """Return the starts of the default run, up to its first step, and of nanoGPT's with the same settings if there is a
    clone of it."""
    if not (CORPUS / 'meta.json').is_file():
        subprocess.run([sys.executable, str(CORPUS / 'prepare.py')], check=True)
    ours = [*TRAIN, f'--out_dir={folder}/new', '--overwrite=True']
    starts = {'train.py, first step': Start(ours, folder, FIRST_STEP)}
    if nanogpt:
        clone = copy_nanogpt(Path(nanogpt), folder / 'nanogpt')
        starts['nanoGPT, first step'] = Start([sys.executable, 'train.py', str(CONFIG), *EQUAL], clone, FIRST_STEP)
    return starts


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    os.environ.update(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    core = 'any core'
    if sys.platform == 'linux':
        core = f'core {max(os.sched_getaffinity(0))}'
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = first_steps(folder, nanogpt)
        subprocess.run([*TRAIN, '--max_iters=1', f'--out_dir={folder}/small'], check=True, stdout=subprocess.DEVNULL)
        rivals = {
            'import torch': Start([sys.executable, '-c', 'import torch'], folder),
            'train.py --help': Start([sys.executable, str(ROOT / 'train.py'), '--help'], folder),
            'sample.py, first token': Start([sys.executable, str(ROOT / 'sample.py'), f'--out_dir={folder}/small',
                                             '--device=cpu', '--num_samples=1', '--max_new_tokens=1'], folder),
            **trained,
        }
        seconds = take_turns(rivals)

    print(f'{platform.machine()} CPU, {core}, one thread; Python {platform.python_version()}; medians of {repeats}')
    print(f'{"seconds":44} {"CPU":>6} {"clock":>6}')
    for name, (cpu, clock) in seconds.items():
        print(f'{name:44} {cpu:6.2f} {clock:6.2f}')
    print('ratios')
    pairs = [('train.py --help', 'import torch'), ('sample.py, first token', 'import torch')]
    pairs += [('train.py, first step', 'nanoGPT, first step')] if nanogpt else []
    for name, other in pairs:
        cpu, clock = (a / b for a, b in zip(seconds[name], seconds[other], strict=True))
        print(f'{f"{name} / {other}":44} {cpu:6.2f} {clock:6.2f}')
    if not nanogpt:
        print('nanoGPT is left out: --nanogpt=FOLDER, a clone of https://github.com/karpathy/nanoGPT, measures it, too')


if __name__ == '__main__':
    run(main)
