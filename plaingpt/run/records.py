"""The files of a run, read back: the rows of metrics.jsonl, the texts of samples.txt."""
import mmap
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plaingpt import schema

SAMPLE_HEADER = re.compile(r'^=== step (\d{1,18}) ===\n', re.MULTILINE)
ROW_BYTES = 250  # about, in metrics.jsonl
EVALUATED = (b'"val_loss"', b'"hellaswag_')  # in the rows of evaluations


def row_of(line: bytes) -> dict[str, Any] | None:
    """Return the row that a line of metrics.jsonl holds; None for one that was torn by a kill or a full disk."""
    try:
        row = schema.parse(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get('step')) is int and row['step'] >= 0 else None


def number(value: object) -> float | None:
    """Return what numpy takes for a float, or None for anything else."""
    return value if isinstance(value, float | int) and abs(value) <= sys.float_info.max else None


def read_columns(path: Path, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the columns of metrics.jsonl as arrays of the same length, NaN where a row has no such value."""
    with open(path, 'rb') as file:
        return columns_of(filter(None, map(row_of, file)), names)


def columns_of(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    values = ([number(row.get(name)) for name in names] for row in rows)
    table = np.fromiter(values, np.dtype((np.float64, len(names))))  # None is NaN
    return dict(zip(names, table.T, strict=True))


def read_some(path: Path, most: int) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl. Of many more than `most` rows, take about that many, evenly, with the last one
    and all in which the model was evaluated, so that a long file takes no longer."""
    with open(path, 'rb') as file:
        size = path.stat().st_size
        if size <= most * ROW_BYTES:
            return [*filter(None, map(row_of, file))]
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            inside = {(size - 1) * i // most for i in range(most + 1)}
            inside |= {place for mark in EVALUATED for place in places_of(mark, text)}
            starts = sorted({text.rfind(b'\n', 0, place) + 1 for place in inside})
            return [*filter(None, (row_of(text[start:text.find(b'\n', start)]) for start in starts))]


def places_of(mark: bytes, text: mmap.mmap) -> Iterator[int]:
    place = text.find(mark)
    while place >= 0:
        yield place
        place = text.find(mark, place + 1)


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Return the texts that the model wrote, each with its step; none if there is no such file."""
    if not path.exists():
        return []
    _, *parts = SAMPLE_HEADER.split(path.read_bytes().decode('utf-8', errors='replace'))
    return [(int(step), text.strip('\n')) for step, text in zip(parts[::2], parts[1::2], strict=True)]
