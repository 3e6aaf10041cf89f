"""
Corpora, and the order in which training reads them.

A corpus is a folder, or a glob, of token files: train.bin and val.bin, or shards, of which those with `val` in their
name validate. meta.json says which tokenizer made them and what they looked like when they were made. Training reads
windows of block_size tokens, in an order that is a pure function of the seed and the number of the window: nothing to
save, nothing to restore, the same for any number of processes.
"""
import glob
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

import parallel
from errors import DATA, UserError, python
from model import GPTConfig
from token_files import VOCABULARIES, Ids, ends_of, open_files
from token_files import TokenFile as TokenFile  # others know it as tokens.TokenFile

Integers = npt.NDArray[np.int64]
DATA_ROOT = Path(__file__).parent / 'data'
SUFFIXES = ('.bin', '.npy')  # of token files, among all that a folder or glob may hold


class Encoder(Protocol):
    """All that a window asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


def data_folder(dataset: str) -> Path:
    """Where a corpus is: data/<dataset> beside this file, or any other folder or glob of token files."""
    return DATA_ROOT / dataset if glob.glob(str(DATA_ROOT / dataset)) or not glob.glob(dataset) else Path(dataset)


def fingerprint(tokens: TokenFile, meta: dict[str, Any]) -> dict[str, Any]:
    """What tells these tokens from others, without reading all of them: how many, the ends of each file, and the hashes
    of whole files that their maker left in `meta`."""
    marks = [ends_of(file.path) | {'sha256': meta['splits'].get(file.path.stem, {}).get('sha256', '')}
             for file in tokens.files]
    if len(marks) > 1:
        joined = {name: ' '.join(mark[name] for mark in marks) for name in marks[0]}
        marks = [{name: hashlib.sha256(text.encode()).hexdigest() for name, text in joined.items()}]
    return {'tokens': len(tokens), **marks[0]}


def is_for(split: str, name: str) -> bool:
    """Files with `val` in their name validate; all others are for training."""
    return ('val' in name) == (split == 'val')


def files_of(folder: Path, split: str) -> list[Path]:
    """The token files of a split, in the order of their names. `folder` may be a glob, too."""
    if (folder / 'train.bin').exists():
        return [path for path in (folder / f'{split}.bin',) if path.exists()]
    found = folder.iterdir() if folder.is_dir() else map(Path, glob.glob(str(folder), recursive=True))
    return sorted(path for path in found
                  if path.suffix in SUFFIXES and is_for(split, path.name) and not path.name.startswith('.'))


def read_meta(folder: Path) -> dict[str, Any]:
    """What a corpus's maker wrote into meta.json. Other projects' corpora have none: they hold GPT-2's tokens, unless
    their files say otherwise."""
    paths, path = files_of(folder, 'train'), (folder if folder.is_dir() else folder.parent) / 'meta.json'
    meta = load_json(path)
    if isinstance(meta, dict) and meta.get('unfinished'):
        raise UserError(f'{folder} is not complete: a preparation was interrupted, or is at work\n'
                        f'go on with: {meta.get("created_by") or how_to_prepare(folder)}', DATA)
    if not paths:
        raise UserError(f'{folder} holds no prepared corpus\nfirst run: {how_to_prepare(folder)}', DATA)
    if path.exists():
        if not is_meta(meta):
            raise UserError(f'{path} is damaged\nrebuild the corpus: {how_to_prepare(folder)}', DATA)
        return meta
    if path.with_suffix('.pkl').exists():
        raise UserError(f'{path.with_suffix(".pkl")} is a pickle, which could run any code: it is not read\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    name = TokenFile(paths[0]).tokenizer
    return {'tokenizer': {'name': name}, 'vocab_size': VOCABULARIES[name], 'dtype': '', 'splits': {}}


def load_json(path: Path) -> object:
    """What a file holds, or None."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None


def is_meta(meta: object) -> TypeGuard[dict[str, Any]]:
    """Whether it has all that is read of a meta.json, in the right types. `splits` has an entry for each file, by its
    name without suffix."""
    match meta:
        case {'tokenizer': {'name': str()}, 'vocab_size': int(), 'dtype': 'uint16' | 'uint32', 'splits': dict(splits)}:
            return all(isinstance(made, dict) and isinstance(made.get('tokens'), int)
                       and isinstance(made.get('largest_id'), int) and {'head', 'tail'} <= made.keys()
                       for made in splits.values())
    return False


def how_to_prepare(folder: Path) -> str:
    """The command that makes this corpus."""
    name = folder.parent.name if folder.suffix in SUFFIXES else folder.name
    if (DATA_ROOT / name / 'prepare.py').exists():
        return f'{python()} data/{name}/prepare.py'
    return f'{python()} data/text/prepare.py --input=YOUR_TEXT --name={name}'


def open_split(folder: Path, split: str, block_size: int, vocab_size: int) -> TokenFile:
    """The tokens of 'train' or 'val', checked: they are what their maker wrote, enough for one window, and known to a
    model of vocab_size tokens. Raises UserError that names the file and the sizes."""
    meta, paths = read_meta(folder), files_of(folder, split)
    listed = {name for name in meta['splits'] if is_for(split, name)}
    missing = listed - {path.stem for path in paths} if folder.is_dir() else set()
    if missing or not paths:
        lost = folder / f'{min(missing)}.bin' if missing else folder / f'{split}.bin' if folder.is_dir() else folder
        what = 'is not there' if missing or folder.is_dir() else f'has no file to {split}: val in a name decides'
        raise UserError(f'{lost} {what}\nfirst run: {how_to_prepare(folder)}', DATA)
    tokens = open_files(paths, (folder if folder.is_dir() else folder.parent) / split, meta['dtype'])
    for file in tokens.files:
        if meta['splits'] and file.path.stem not in meta['splits']:
            raise UserError(f'{file.path} is not in the meta.json beside it: it belongs to another corpus\n'
                            f'move it away, or rebuild the corpus: {how_to_prepare(folder)}', DATA)
        check_file(file, meta['splits'].get(file.path.stem, {}), vocab_size, folder)
    if len(tokens) <= block_size:
        raise UserError(f'{tokens.path} has {len(tokens)} tokens: too few for a window of block_size + 1 = '
                        f'{block_size + 1}\ngive --block_size={max(1, len(tokens) - 1)} or less, or prepare more text',
                        DATA)
    return tokens


def check_file(file: TokenFile, made: dict[str, Any], vocab_size: int, folder: Path) -> None:
    """Refuse a file that is not as it was `made`, where that is known."""
    if len(file) != made.get('tokens', len(file)):
        raise UserError(f'{file.path} has {len(file)} tokens, and meta.json says {made["tokens"]}: it is damaged\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    if made and ends_of(file.path) != {name: made[name] for name in ('head', 'tail')}:
        raise UserError(f'{file.path} is not the file that meta.json describes: its first or last bytes differ\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    if made.get('largest_id', 0) >= vocab_size:
        raise UserError(f'{file.path} holds token {made["largest_id"]}, and the model knows only 0 to {vocab_size - 1}'
                        f'\ngive --vocab_size={made["largest_id"] + 1}, or prepare the text with another tokenizer',
                        DATA)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows that do not overlap, in their order: item i is x (T,) and y (T,), where y is x shifted by one token. For
    anybody's DataLoader. `source` is a token file, a glob of some, ids, or, with a tokenizer, text."""

    def __init__(self, source: TokenFile | str | Path | Sequence[int] | Ids, block_size: int,
                 tokenizer: Encoder | None = None) -> None:
        if isinstance(source, str) and tokenizer is not None:
            source = tokenizer.encode(source)
        if isinstance(source, str | Path):
            path = Path(source)
            dtype = read_meta(path.parent)['dtype'] if path.with_name('meta.json').exists() else ''
            found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
            source = open_files(found or [path], path, dtype)
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


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Each 64-bit number -> one that looks unrelated to it (splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(*key: int) -> int:
    """A 63-bit number that depends on nothing but the key."""
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        state = mix(state + np.uint64(number % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return int(state[0]) >> 1


def shuffle(index: Integers, n: int, key: int) -> Integers:
    """Where a random order of 0 .. n - 1 puts each index: a keyed permutation that is computed, not stored. Six rounds
    of a Feistel network permute the next power of four; what falls outside 0 .. n - 1 is permuted again (Black and
    Rogaway 2002)."""
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
    block_size tokens at the ends sit out."""

    n_tokens: int
    block_size: int
    seed: int

    @property
    def epoch(self) -> int:
        """Windows in an epoch."""
        return max(1, self.n_tokens // self.block_size - 1)

    def starts(self, first: int, count: int) -> Integers:
        """Where windows number first .. first + count - 1 of the sequence start in the corpus."""
        numbers = np.arange(first, first + count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(numbers // self.epoch).tolist():
            here = numbers // self.epoch == epoch
            spare = min(self.block_size, self.n_tokens - self.epoch * self.block_size)  # offsets to choose from
            offset = draw(self.seed, epoch, 0) % spare
            windows = shuffle(numbers[here] % self.epoch, self.epoch, key=draw(self.seed, epoch, 1))
            starts[here] = offset + self.block_size * windows
        return starts


def fixed_starts(n_tokens: int, block_size: int, count: int) -> Integers:
    """Where the same `count` windows, or all where there are fewer, start each time: evenly spread over a split, to
    evaluate on."""
    total = (n_tokens - 1) // block_size
    return np.arange(min(count, total)) * total // min(count, total) * block_size


def read_batch(tokens: TokenFile, starts: Integers, block_size: int, batch_size: int,
               vocab_size: int) -> tuple[Tensor, Tensor]:
    """x and y (batch_size, T): the windows at `starts`. Rows for which there is no start have targets -1, which do not
    count."""
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
    """One micro-batch of a step: what is computed at once."""

    number: int  # among the step's micro-batches, over all processes
    share: float  # of the step's windows
    x: Tensor  # (B, T)
    y: Tensor  # (B, T), -1 where there is no target


def parts_of(corpus: TokenFile, starts: Integers, batch_size: int, config: GPTConfig,
             process: parallel.Process) -> Iterator[Part]:
    """This process's micro-batches of the windows of one step. Every process gets the same number of them, of the same
    shape; where windows are missing, targets are -1."""
    rounds = math.ceil(len(starts) / (batch_size * process.world_size))
    for number in range(process.rank, rounds * process.world_size, process.world_size):
        mine = starts[number * batch_size:(number + 1) * batch_size]
        x, y = read_batch(corpus, mine, config.block_size, batch_size, config.vocab_size)
        x, y = parallel.to_device(x, process.device), parallel.to_device(y, process.device)
        yield Part(number, len(mine) / len(starts), x, y)
