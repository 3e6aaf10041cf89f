"""Batches: windows of a corpus -> x and y, the tokens that a model reads and those that it should predict."""
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model import GPTConfig
from plaingpt.corpus.folder import open_tokens, read_meta
from plaingpt.corpus.order import Integers
from plaingpt.corpus.token_files import Ids, TokenFile
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import DATA, UserError
from plaingpt.machines.device import make_current, to_device
from plaingpt.machines.processes import Process
from plaingpt.paths import matching

AHEAD = 4  # micro-batches that are read before they are needed


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows that do not overlap, in their order, for PyTorch's DataLoader: item i is x (T,) and y (T,), where y is x
    shifted by one token. `source` is a token file, a glob of several, ids, or, with a tokenizer, text."""

    def __init__(self, source: TokenFile | str | Path | Sequence[int] | Ids, block_size: int,
                 tokenizer: Tokenizer | None = None) -> None:
        if isinstance(source, str) and tokenizer is not None:
            source = tokenizer.encode(source)
        if isinstance(source, str | Path):
            path = Path(source)
            meta = read_meta(path.parent) if path.with_name('meta.json').exists() else {'dtype': '', 'splits': {}}
            source = open_tokens(matching(path) or [path], path, meta)
        self.source = source
        self.block_size = block_size
        if len(self.source) <= block_size:
            raise UserError(f'{len(self.source)} tokens are too few for a window of {block_size} + 1', DATA)

    def __len__(self) -> int:
        return (len(self.source) - 1) // self.block_size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f'window {i} of {len(self)}')
        start, count = i * self.block_size, self.block_size + 1
        ids = self.source.read(start, count) if isinstance(self.source, TokenFile) else self.source[start:start + count]
        xy = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        return xy[:-1], xy[1:]


def read_batch(tokens: TokenFile, starts: Integers, block_size: int, batch_size: int,
               vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return x and y (batch_size, T), the windows at `starts`. If there are fewer starts than rows, the last rows have
    targets of -1, which do not count."""
    xy = np.full((batch_size, block_size + 1), -1, dtype=np.int64)
    for row, start in enumerate(starts.tolist()):
        ids = tokens.read(start, block_size + 1)
        if ids.max() >= vocab_size:
            raise UserError(f'{tokens.name_of(start + int(ids.argmax()))} holds token {ids.max()}, and the model knows '
                            f'only 0 to {vocab_size - 1}:\nit is damaged, or another tokenizer made it', DATA)
        xy[row] = ids
    x = xy[:, :-1].copy()
    x[len(starts):] = 0
    return torch.from_numpy(x), torch.from_numpy(xy[:, 1:].copy())


class Part(NamedTuple):
    """One micro-batch of a step: the windows that are computed at once."""

    number: int  # among the step's micro-batches, over all processes
    is_last: bool  # of those that this process computes
    share: float  # of the step's windows
    x: Tensor  # (B, T)
    y: Tensor  # (B, T), -1 for no target


def parts_of(corpus: TokenFile, starts: Integers, batch_size: int, config: GPTConfig,
             process: Process) -> Iterator[Part]:
    """Yield this process's micro-batches of the windows of one step. Every process gets the same number of them, of the
    same shape; rows without a window have targets of -1."""
    rounds = math.ceil(len(starts) / (batch_size * process.world_size))
    for number in range(process.rank, rounds * process.world_size, process.world_size):
        in_part = starts[number * batch_size:(number + 1) * batch_size]
        x, y = read_batch(corpus, in_part, config.block_size, batch_size, config.vocab_size)
        x, y = to_device(x, process.device), to_device(y, process.device)
        is_last = number + process.world_size >= rounds * process.world_size
        yield Part(number, is_last, len(in_part) / len(starts), x, y)


def read_ahead(parts: Iterator[Part], process: Process) -> Generator[Part]:
    """Yield the micro-batches in their order, each of which a thread has read while the ones before it were computed.
    An error in reading one is raised in its place."""
    if process.device.type == 'mps':  # PyTorch's operations there are not safe in two threads at once
        yield from parts
        return
    with ThreadPoolExecutor(1, 'reader', make_current, (process.device,)) as reader:
        read = deque(reader.submit(next, parts, None) for _ in range(AHEAD))
        try:
            while part := read.popleft().result():
                read.append(reader.submit(next, parts, None))
                yield part
        finally:
            reader.shutdown(cancel_futures=True)
