"""
Climb README's ladder: run what each rung says to run, and keep the numbers for docs/ladder.md, with machine and date.

    python course/ladder.py                 an hour of one core (make ladder)
    python course/ladder.py --only=depth    some of the runs, those whose names hold this word; the others are kept
"""
import io
import os
import re
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import measured
import rung
import torch

import configurator
from plaingpt import console
from plaingpt.errors import CHECK_FAILED, UserError, run

# ------------------------------------------------------------------------------------------------
# Settings
only: str = ''  # part of the names of the runs to make; '' makes all
# ------------------------------------------------------------------------------------------------

PLAIN = 'train_trivialised.py'
VAL = r'^val loss (\S+)'


def depth(n_layer: int, total: int, *steps: int) -> tuple[str, dict[str, str]]:
    """Return a command that makes the first steps of `total`, and where its bits per byte after each of these are."""
    command = (f'train.py config/train_stdlib.py --n_layer={n_layer} --max_iters={steps[-1]} --lr_decay_iters={total} '
               f'--eval_interval={steps[0]} --eval_iters=100 --sample_interval=0')
    return command, {f'depth {n_layer}, {step} of {total}': rf'^step {step}: (?s:.*?)^val .* (\S+)$' for step in steps}


RUNS = {  # the command, without `python`, and what stands before and after each number in its output
    f'{PLAIN} --max_iters=1': {'guess': r'^step 0, loss (\S+),'},
    'course/01_counting.py': {'tokens': r'^counting tokens +(\S+)', 'pairs': r'^counting pairs  +(\S+)',
                              'few pairs': r'^counting pairs in .* (\S+)$'},
    f'{PLAIN} --n_layer=0': {'no layer': VAL},
    'course/02_itself.py': {'itself': VAL},
    'course/03_average.py': {'average': VAL},
    f'{PLAIN} --n_layer=1': {'attention': VAL},
    f'{PLAIN} --n_layer=1 --seed=1': {'attention, another seed': VAL},
    PLAIN: {'two layers': VAL},
    f'{PLAIN} --learning_rate=4e-4': {'a low rate': VAL},
    **dict(depth(n_layer, 2000, 1000, 2000) for n_layer in (1, 2, 4)),
    **dict(depth(n_layer, 8000, 4000) for n_layer in (1, 2, 4)),
}

# The plain model with a mistake in it: what stands there, and what is written in its place
MISTAKES = {
    'mask': ('.tril()  # (T, T), row t is True at 0..t', '.tril(1)'),
    'zeros': ('masked_fill(~may_look, -math.inf)', 'masked_fill(~may_look, 0.0)'),
    'no root': ('scores / math.sqrt(D)', 'scores'),
    'epsilon': ('torch.sqrt(variance + 1e-5)', '(torch.sqrt(variance) + 1e-5)'),
    'stream': ('x = x + self.attn', 'x = self.attn'),
}
NUMBERS = RUNS | {name: {name: VAL} for name in MISTAKES}


def train_with_a_mistake(old: str, new: str) -> str:
    """Return what training says of the plain model with a text in the place of another."""
    source = (rung.ROOT / 'model_trivialised.py').read_text(encoding='utf-8')
    assert source.count(old) == 1, old
    said = io.StringIO()
    with TemporaryDirectory() as folder, redirect_stdout(said):
        path = Path(folder, 'mistaken.py')
        path.write_text(source.replace(old, new), encoding='utf-8')
        rung.climb(rung.plain_model([], path), [], [])
    return said.getvalue()


def output(command: list[str]) -> str:
    """Return what a Python program prints, in the root of the project."""
    result = subprocess.run([sys.executable, *command], cwd=rung.ROOT, capture_output=True, text=True,
                            encoding='utf-8', env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if result.returncode:
        raise UserError(f'python {" ".join(command)} ended with {result.returncode}: {result.stderr}', CHECK_FAILED)
    return result.stdout


def measure(command: str) -> tuple[str, float]:
    """Return what a run, or a training with one of the mistakes, prints, and its seconds."""
    started = time.perf_counter()
    if command in MISTAKES:
        text = train_with_a_mistake(*MISTAKES[command])
    else:
        with TemporaryDirectory() as folder:
            text = output([*command.split(), *([f'--out_dir={folder}'] if command.startswith('train.py') else [])])
    return text, round(time.perf_counter() - started, 1)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    torch.set_num_threads(1)
    for command, patterns in NUMBERS.items():
        wanted = [name for name in patterns if only in name]
        text, seconds = measure(command) if wanted else ('', 0.0)
        for name in wanted:
            value = float(re.findall(patterns[name], text, re.MULTILINE)[-1])
            console.say(f'{name:26} {value:8.4f} {seconds:8.1f} s')
            measured.keep('ladder', name, {'value': value, 'seconds': seconds})


if __name__ == '__main__':
    run(main)
