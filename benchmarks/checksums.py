"""
What does it cost to compare a corpus with its checksums while it is read? The first steps of config/train_gpt2.py, from
a file as large as OpenWebText's and without content (a sparse one, which takes no room on the disk), with and without;
and then the same steps again, when every block has been compared.

    python benchmarks/checksums.py

With and without take turns, each on a file of its own; one thread. Medians over the steps; bytes as the system counts
them, whether they come from a disk or from its cache.
"""
import platform
import sys
import tempfile
import time
import zlib
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import configurator
import train
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.checksums import BLOCK, Comparison
from plaingpt.corpus.order import Integers, Order
from plaingpt.corpus.token_files import TokenFile
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
steps: int = 100
n_tokens: int = 9_035_582_198  # OpenWebText's, for training
folder: str = ''  # for the two files, on a file system with sparse files; '' is the system's for temporary files
# ------------------------------------------------------------------------------------------------

COUNTER = Path('/proc/self/io')  # Linux's, of this process


def bytes_read() -> int:
    """Return the bytes that this process has read from the system so far; 0 if the system does not say."""
    return int(COUNTER.read_text(encoding='utf-8').split()[1]) if COUNTER.exists() else 0


def sparse(path: Path) -> TokenFile:
    with open(path, 'wb') as file:
        file.truncate(2 * n_tokens)
    return TokenFile(path, 'uint16')


def with_checksums(tokens: TokenFile) -> TokenFile:
    """Give a file of zeros the checksums of zeros."""
    size = 2 * n_tokens
    sums = np.full(-(-size // BLOCK), zlib.crc32(bytes(BLOCK)), dtype=np.uint32)
    sums[-1] = zlib.crc32(bytes(size - (len(sums) - 1) * BLOCK))
    tokens.comparison = Comparison(tokens.path, sums, '')
    return tokens


def measure(tokens: TokenFile, starts: Integers) -> tuple[float, int]:
    """Read the windows of a step. Return the ms and the bytes that it takes."""
    before, began = bytes_read(), time.perf_counter()
    read_batch(tokens, starts, train.block_size, len(starts), 50257)
    return 1000 * (time.perf_counter() - began), bytes_read() - before


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    n_windows = train.batch_size * train.gradient_accumulation_steps  # train.py's defaults are those of train_gpt2.py
    order = Order(n_tokens, train.block_size, train.seed)
    with tempfile.TemporaryDirectory(dir=folder or None) as name:
        plain, compared = sparse(Path(name, 'plain.bin')), with_checksums(sparse(Path(name, 'compared.bin')))
        print(f'{platform.machine()} CPU, one thread; a step: {n_windows} windows of {train.block_size} tokens; '
              f'{2 * n_tokens / 1e9:.1f} GB; medians of {steps} steps')
        for label in ('read for the first time', 'read again'):
            each = {tokens: list[tuple[float, int]]() for tokens in (plain, compared)}
            for step in range(steps):
                for tokens in (plain, compared) if step % 2 else (compared, plain):
                    each[tokens].append(measure(tokens, order.starts(step * n_windows, n_windows)))
            (ms, size), (checked_ms, checked_size) = ([median(values) for values in zip(*measured, strict=True)]
                                                      for measured in each.values())
            print(f'{label:24} without {ms:6.1f} ms, {size / 1e6:5.2f} MB; with {checked_ms:6.1f} ms, '
                  f'{checked_size / 1e6:5.2f} MB; with / without {checked_ms / ms:.2f}', flush=True)


if __name__ == '__main__':
    run(main)
