"""
Is anything lost when a run is killed, again and again?

    python benchmarks/kills.py                              200 times, a run of one process and then one of two
    python benchmarks/kills.py --kills=20 --processes=2     20 times, one of two
    python benchmarks/kills.py --torchrun=True              torchrun, a process that it started, or all of them
    python benchmarks/kills.py --writers=2                  while the next try waits for the folder
    python benchmarks/kills.py --upload_to=file:///tmp/x    while checkpoints are copied there, which stay whole
    python benchmarks/kills.py --seed=7                     the moments of an earlier try

A small run with dropout, which saves every few steps, is killed (SIGKILL) at random moments, while it loads, learns,
saves or evaluates, and started again with the same command. In the end its weights, its optimizer's state and its rows
of metrics.jsonl must equal those of a run that was never killed, bit for bit. Exit code 1 says what differs.
"""
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import configurator
from plaingpt import lock
from plaingpt.errors import CHECK_FAILED, DONE, PEER_LOST, UserError, run
from plaingpt.run import checkpoint, upload
from tests.comparing import differences

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
kills: int = 200
processes: int = 0  # that train together; 0: one, and then two
strategy: str = 'ddp'  # or 'zero1', 'fsdp'
dataset: str = 'stdlib'
torchrun: bool = False  # starts the processes
writers: int = 1  # 2: the next life begins before the kill, and waits for its turn
upload_to: str = ''  # an empty folder, as a URL
seed: int = 0  # decides when to kill; 0 takes another one each time
# ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
STEPS_PER_LIFE = 25  # on average
LATEST = 0.02  # seconds after the step that decides: in the middle of another one, of a save, of an evaluation
TRAIN = ('import train; from plaingpt import errors; from plaingpt.run import log; '
         'log.Log.plot = lambda log: None; errors.run(train.main)')  # no pictures
COMPARED = ('step', 'loss', 'val_loss', 'lr', 'grad_norm')


def arguments(out_dir: Path, dataset: str, steps: int) -> list[str]:
    settings = {
        'out_dir': out_dir, 'dataset': dataset, 'init_from': 'auto', 'device': 'cpu', 'strategy': strategy,
        'dropout': 0.1,
        'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'batch_size': 2, 'gradient_accumulation_steps': 4,
        'max_iters': steps, 'lr_decay_iters': steps, 'warmup_iters': 2, 'learning_rate': 1e-2, 'min_lr': 1e-3,
        'eval_interval': 3, 'eval_iters': 2, 'sample_interval': 0, 'timeout': 60, 'start_timeout': 600,
        'upload_to': upload_to if out_dir.name == 'killed' else '',
    }
    return [f'--{name}={value}' for name, value in settings.items()]


def start(world_size: int, train_arguments: list[str], log: Path) -> list[subprocess.Popen[bytes]]:
    """Start a life of the run, in `world_size` processes, or torchrun, which then starts them."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    lives = []
    for rank in range(1 if torchrun else world_size):
        command = ['-c', TRAIN]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
        if torchrun:
            script = log.with_name('train_here.py')
            script.write_text(TRAIN, encoding='utf-8')
            command = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world_size}', str(script)]
        elif world_size > 1:
            environment |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(world_size),
                            'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        with open(log if rank == 0 else os.devnull, 'wb') as output:
            lives.append(subprocess.Popen([sys.executable, *command, *train_arguments], env=environment,
                                          stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT))
    return lives


def those_of(lives: list[subprocess.Popen[bytes]]) -> list[int]:
    """Return the processes of a life, with those that torchrun has started."""
    own = [life.pid for life in lives if life.poll() is None]
    return own + [int(pid) for parent in own
                  for pid in Path(f'/proc/{parent}/task/{parent}/children').read_text(encoding='ascii').split()]


def finish(lives: list[subprocess.Popen[bytes]], log: Path) -> None:
    codes = [life.wait() for life in lives]
    if any(codes):
        printed = log.read_text(encoding='utf-8', errors='replace')
        raise UserError(f'the run ended with {codes}:\n{printed[-2000:]}', CHECK_FAILED)


def last_step(log: Path) -> int:
    return max((int(step) for step in re.findall(rb'iter (\d+)', log.read_bytes())), default=-1)


def live_and_die(lives: list[subprocess.Popen[bytes]], log: Path, random_moment: random.Random, fate: int) -> bool:
    """Kill a life around step `fate`, however fast the machine: now and then before its first step, and now and then,
    later, one process of several, so that the others must end by themselves. Return False if the run was over
    before."""
    limit = 4 * random_moment.random() if random_moment.random() < 0.1 else math.inf  # seconds
    end = time.monotonic() + limit
    while last_step(log) < fate and time.monotonic() < end and all(life.poll() is None for life in lives):
        time.sleep(0.002)
    time.sleep(LATEST * random_moment.random())
    victims = those_of(lives)
    if victims and random_moment.random() < (0.6 if torchrun else 0.1) and last_step(log) >= 0:
        victims = [random_moment.choice(victims)]
    for victim in victims:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    codes = [life.wait() for life in lives]
    if not {*codes} <= {DONE, -signal.SIGKILL, CHECK_FAILED if torchrun else PEER_LOST}:
        printed = log.read_text(encoding='utf-8', errors='replace')
        raise UserError(f'a life ended with {codes}:\n{printed[-2000:]}', CHECK_FAILED)
    return any(codes)


def check_copies(folder: Path) -> Path:
    """Fetch the uploaded checkpoints, which must be whole at any time, and return the path of the newest."""
    if upload_to and upload.checkpoints(upload_to):
        for path in upload.fetch(upload_to, folder):
            checkpoint.load(path)
    return folder / 'ckpt.pt'


def rows(out_dir: Path) -> list[dict[str, Any]]:
    lines = (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: row.get(name) for name in COMPARED} for row in map(json.loads, lines)]


def check(world_size: int, folder: Path, seed: int) -> str:
    """Return a line about a run that survived. Raise UserError for one that did not."""
    whole, killed, logs = folder / 'whole', folder / 'killed', (folder / 'log 0', folder / 'log 1')
    steps = (kills + 16) * STEPS_PER_LIFE  # so many that the last one, too, is killed, even if some live on for longer
    finish(start(world_size, arguments(whole, dataset, steps), logs[0]), logs[0])
    random_moment, done = random.Random(seed), 0
    lives = start(world_size, arguments(killed, dataset, steps), logs[0])
    for number in range(kills):
        begin = partial(start, world_size, arguments(killed, dataset, steps), logs[1 - number % 2])
        while writers == 2 and not (killed / lock.NAME).exists() and lives[0].poll() is None:
            time.sleep(0.01)
        heirs = begin() if writers == 2 else []
        fate = int(STEPS_PER_LIFE * (number + random_moment.random()))
        done += live_and_die(lives, logs[number % 2], random_moment, fate)
        check_copies(folder / 'copies')
        lives = heirs or begin()
    finish(lives, logs[kills % 2])
    survivor, reference = checkpoint.load(killed / 'ckpt.pt'), checkpoint.load(whole / 'ckpt.pt')
    wrong = [what for part in ('model', 'optimizer', 'iter_num', 'best')
             for what in [part + path for path in differences(survivor[part], reference[part])]]
    wrong += [f'row {row["step"]}' for row, other in zip(rows(killed), rows(whole), strict=False) if row != other]
    if upload_to and check_copies(folder / 'copies').read_bytes() != (killed / 'ckpt.pt').read_bytes():
        wrong.append('the uploaded checkpoint')
    if len(rows(killed)) != len(rows(whole)):
        wrong.append(f'{len(rows(killed))} rows, not {len(rows(whole))}')
    if wrong:
        raise UserError(f'seed {seed}: after {done} kills of {world_size} processes {", ".join(wrong[:9])} differ: see '
                        f'{folder}', CHECK_FAILED)
    return (f'{world_size} processes, seed {seed}: killed {done} times in {steps} steps; {len(survivor["model"])} '
            f'weights, the optimizer and {len(rows(killed))} rows are equal to those of a run that was not')


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    number = seed or time.time_ns() % 1_000_000
    for world_size in [processes] if processes else [1, 2]:
        folder = Path(tempfile.mkdtemp())
        print(f'{world_size} processes, {kills} kills, --seed={number}', flush=True)
        print(check(world_size, folder, number), flush=True)
        shutil.rmtree(folder)


if __name__ == '__main__':
    run(main)
