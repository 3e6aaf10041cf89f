"""
The order in which training reads a corpus: windows of block_size tokens, as a pure function of the seed and the number
of the window. There is nothing to save or restore, and it is the same for any number of processes.
"""
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from plaingpt.chance import draw, mix

Integers = npt.NDArray[np.int64]


def shuffle(index: Integers, n: int, key: int) -> Integers:
    """Return the place of each index in a random order of 0 .. n - 1: a keyed permutation that is computed, not stored.
    Six rounds of a Feistel network permute the next power of four; what falls outside 0 .. n - 1 is permuted again
    (Black and Rogaway 2002)."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of each of the two halves
    mask = np.uint64((1 << int(half)) - 1)
    x, outside = index.astype(np.uint64), np.ones(len(index), dtype=bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & mask
        for number in range(6):
            left, right = right, left ^ (mix(right + np.uint64(draw(key, number))) & mask)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """The endless sequence of windows that training reads, epoch after epoch. Each epoch cuts the corpus into windows
    that do not overlap, from an offset of its own below block_size, shuffles them, and reads each once. Fewer than 2
    block_size tokens at the ends are left out."""

    n_tokens: int
    block_size: int
    seed: int

    @property
    def epoch(self) -> int:
        """Return how many windows an epoch has."""
        return max(1, self.n_tokens // self.block_size - 1)

    def starts(self, first: int, count: int) -> Integers:
        """Return the starts, in the corpus, of windows number first .. first + count - 1 of the sequence."""
        numbers = np.arange(first, first + count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(numbers // self.epoch).tolist():
            in_epoch = numbers // self.epoch == epoch
            spare = min(self.block_size, self.n_tokens - self.epoch * self.block_size)  # offsets to choose from
            offset = draw(self.seed, epoch, 0) % spare
            windows = shuffle(numbers[in_epoch] % self.epoch, self.epoch, key=draw(self.seed, epoch, 1))
            starts[in_epoch] = offset + self.block_size * windows
        return starts


def fixed_starts(n_tokens: int, block_size: int, count: int) -> Integers:
    """Return the starts of the windows to evaluate on: the same `count` each time, or all if there are fewer, evenly
    spread over a split."""
    total = (n_tokens - 1) // block_size
    return np.arange(min(count, total)) * total // min(count, total) * block_size
