"""
A curve of another run to draw beside one: is my run right?

    python -m plaingpt.run.reference out-stdlib docs/curves/stdlib.csv    writes down the curve of a run
"""
import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plaingpt import console, errors, files
from plaingpt.errors import DATA, UserError
from plaingpt.paths import here_or_installed
from plaingpt.run.records import read_columns

COLUMNS = ('step', 'tokens', 'loss', 'val_loss')
MOST_ROWS = 300  # beside those of evaluations


class Reference(NamedTuple):
    """Validation losses of a run, in nats per token, and after how many tokens they were measured."""

    name: str
    tokens: NDArray[np.float64]
    val_loss: NDArray[np.float64]

    def beside(self, steps: NDArray[np.float64], tokens: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Return where this curve goes in the picture of another run, which had read `tokens` after `steps`: the steps
        at which that run had read as many tokens, as far as it has come, and the losses of this curve there."""
        reached = self.tokens <= (tokens[-1] if len(tokens) else 0)
        return np.interp(self.tokens[reached], tokens, steps), self.val_loss[reached]


def read(path: str) -> Reference:
    """Read a curve. Raise UserError if the file is missing, or is not such a curve."""
    try:
        text = here_or_installed(path).read_text(encoding='utf-8')
        head, *rows = csv.reader(io.StringIO(text))
        places = head.index('tokens'), head.index('val_loss')
        points = np.array([[float(row[place]) for place in places] for row in rows if row[places[1]]])
        tokens, losses = points[np.isfinite(points).all(axis=1)].T
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise UserError(f'--reference={path} is not the curve of a run: {errors.first_line(error)}\n'
                        'docs/curves/ has some, and plaingpt/run/reference.py says how to make one of a run',
                        DATA) from None
    order = tokens.argsort(kind='stable')
    return Reference(Path(path).stem, tokens[order], losses[order])


def curve_of(folder: Path) -> str:
    """Return the curve of a run as CSV: some steps, and all evaluations."""
    columns = read_columns(folder / 'metrics.jsonl', COLUMNS)
    steps, tokens = columns['step'], columns['tokens']
    read_before = np.isfinite(tokens)  # a row of an evaluation has none, and takes them from its neighbours
    tokens = np.where(read_before, tokens, np.interp(
        steps, np.append(0, steps[read_before] + 1), np.append(0, tokens[read_before])))
    every = math.ceil(read_before.sum() / MOST_ROWS) or 1
    kept = np.isfinite(columns['val_loss'])
    kept[np.flatnonzero(read_before)[::every]] = True
    values = np.stack([steps, tokens, columns['loss'], columns['val_loss']], axis=1)[kept]
    lines = [','.join('' if math.isnan(value) else f'{value:.6g}' if i > 1 else f'{value:.0f}'
                      for i, value in enumerate(row)) for row in values]
    return '\n'.join([','.join(COLUMNS), *lines]) + '\n'


def main(args: list[str]) -> None:
    if len(args) != 2 or args[0].startswith('-'):
        console.say((__doc__ or '').strip())
        return
    if not Path(args[0], 'metrics.jsonl').is_file():
        raise UserError(f'{args[0]} holds no metrics.jsonl: give the out_dir of a run', DATA)
    with files.written_whole(args[1]) as file:
        file.write(curve_of(Path(args[0])).encode())
    console.say(f'{args[1]} is written: --reference={args[1]} draws it beside another run')


if __name__ == '__main__':
    errors.run(main)
