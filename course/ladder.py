"""
Climb README's ladder: run what each rung says to run, and keep the numbers for docs/ladder.md, with machine and date.

    python course/ladder.py                 half an hour of one core (make ladder)
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
DEPTH = 'train.py config/train_stdlib.py --eval_interval=1000 --eval_iters=100 --sample_interval=0'
VAL, BITS = r'^val loss (\S+)', r'^val .* (\S+)$'  # the last such line counts
RUNS = {  # name: the command, without `python`, and what stands before and after the number in its output
    'guess': (f'{PLAIN} --max_iters=1', r'^step 0, loss (\S+),'),
    'tokens': ('course/01_counting.py', r'^counting tokens +(\S+)'),
    'pairs': ('course/01_counting.py', r'^counting pairs  +(\S+)'),
    'few pairs': ('course/01_counting.py', r'^counting pairs in .* (\S+)$'),
    'no layer': (f'{PLAIN} --n_layer=0', VAL),
    'itself': ('course/02_itself.py', VAL),
    'average': ('course/03_average.py', VAL),
    'attention': (f'{PLAIN} --n_layer=1', VAL),
    'attention, another seed': (f'{PLAIN} --n_layer=1 --seed=1', VAL),
    'two layers': (PLAIN, VAL),
    'a low rate': (f'{PLAIN} --learning_rate=4e-4', VAL),
    # bits per byte, after so many steps of a run of so many
    **{f'depth {n}, {steps} of {total}': (f'{DEPTH} --n_layer={n} --max_iters={steps} --lr_decay_iters={total}', BITS)
       for steps, total, depths in ((1000, 2000, (1, 2, 4)), (2000, 2000, (1, 2, 4)), (4000, 8000, (1, 4)))
       for n in depths}}

# The plain model with a mistake in it: what stands there, and what is written in its place
MISTAKES = {
    'mask': ('.tril()  # (T, T), row t is True at 0..t', '.tril(1)'),
    'zeros': ('masked_fill(~may_look, -math.inf)', 'masked_fill(~may_look, 0.0)'),
    'no root': ('scores / math.sqrt(D)', 'scores'),
    'epsilon': ('torch.sqrt(variance + 1e-5)', '(torch.sqrt(variance) + 1e-5)'),
    'stream': ('x = x + self.attn', 'x = self.attn'),
}


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


def measure(name: str) -> dict[str, float]:
    """Return the number of a run, and its seconds."""
    started = time.perf_counter()
    if name in MISTAKES:
        text, pattern = train_with_a_mistake(*MISTAKES[name]), VAL
    else:
        command, pattern = RUNS[name]
        with TemporaryDirectory() as folder:
            text = output([*command.split(), *([f'--out_dir={folder}'] if name.startswith('depth') else [])])
    number = float(re.findall(pattern, text, re.MULTILINE)[-1])
    return {'value': number, 'seconds': round(time.perf_counter() - started, 1)}


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    torch.set_num_threads(1)
    for name in (name for name in (*RUNS, *MISTAKES) if only in name):
        found = measure(name)
        console.say(f'{name:26} {found["value"]:8.4f} {found["seconds"]:8.1f} s')
        measured.keep('ladder', name, found)


if __name__ == '__main__':
    run(main)
