"""
Token files of every family, known by their content and not by their names.

    bare integers               nanoGPT's train.bin: uint16, or uint32 for a vocabulary beyond 65,536
    256 int32, then the tokens  llm.c's and modded-nanogpt's shards, and DDP-BASEMODEL-TRAIN's: magic, version, count
    .npy                        build-nanogpt's shards: numpy's format, one dimension, whole numbers

Several files are read as one sequence, in the order of their names. All numbers are little-endian, unless a .npy file
says otherwise. Nothing is mapped into memory, and nothing that a file holds is executed.
"""
import hashlib
import os
import sys
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from plaingpt.corpus.checksums import Comparison
from plaingpt.errors import DATA, UserError, refusal

Ids = npt.NDArray[np.unsignedinteger[Any]]

OPEN = 128  # files that are kept open: a process may usually open 1024
END = 4096  # bytes at the head and the tail of a token file that are compared with what its maker wrote
PIECES = 64  # of as many bytes, whose hash stands for a whole corpus
HEADER = 1024  # bytes: 256 numbers of 32 bits
NPY = b'\x93NUMPY'
SMALL_WORD = 3  # the most that the upper half of a 32-bit id holds, up to a vocabulary of 2**18


FAMILIES = {  # by the magic number at their beginning: version, type of a token, tokenizer
    20240520: (1, 'uint16', 'gpt2'),  # llm.c, modded-nanogpt
    20240801: (7, 'uint32', 'llama3'),  # llm.c
    20250211: (1, 'uint16', 'gpt2'),  # DDP-BASEMODEL-TRAIN
}
NOT_TOKENS = {20240522: 'an evaluation set', 20240326: 'a model', 20240327: 'a debug state', 20240328: 'a tokenizer',
              20250214: 'a tokenizer', 20240527: 'an optimizer state'}  # llm.c's other files
VOCABULARIES = {'gpt2': 50257, 'llama3': 128256}  # ids


def find_layout(file: BinaryIO, path: Path, dtype: str) -> tuple[np.dtype[Any], int, int, str]:
    """Return what a file says about its tokens: their type, the bytes before the first of them, how many there are, and
    which tokenizer made them, as far as it says so. `dtype` is the type of bare integers; '' finds it out. Raise
    UserError if the file is of no family."""
    head = file.read(12)
    magic, version, count = (int.from_bytes(head[i:i + 4], 'little') for i in (0, 4, 8))
    if head.startswith(NPY):
        return npy_layout(file, path)
    if magic in NOT_TOKENS and version < 256:
        raise UserError(f"{path} is {NOT_TOKENS[magic]} in llm.c's format, and holds no tokens to train on", DATA)
    if magic in FAMILIES:
        known, name, tokenizer = FAMILIES[magic]
        if version != known:
            raise UserError(f'{path}: its header says {magic}, version {version}; known is version {known}\n'
                            'it is damaged or of another format: prepare the corpus again', DATA)
        return np.dtype(name), HEADER, count, tokenizer
    size = file.seek(0, os.SEEK_END)
    kind = np.dtype(dtype or ('uint32' if is_uint32(path, size) else 'uint16')).newbyteorder('<')
    return kind, 0, size // kind.itemsize, 'gpt2'


def make_header(dtype: np.dtype[Any], n_tokens: int) -> bytes:
    """Return llm.c's header, for tokens of 16 or 32 bits."""
    magic = 20240520 if dtype.itemsize == 2 else 20240801
    return np.array([magic, FAMILIES[magic][0], n_tokens], dtype='<u4').tobytes().ljust(HEADER, b'\0')


def npy_layout(file: BinaryIO, path: Path) -> tuple[np.dtype[Any], int, int, str]:
    """Return the layout of an array that numpy saved. Negative numbers are read as unsigned ones, which are too large
    for any vocabulary."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    file.seek(0)
    try:
        shape, _, dtype = headers[np.lib.format.read_magic(file)](file)
    except Exception:  # numpy parses the header as Python, and may raise anything
        raise UserError(f'{path} begins as an .npy file, and its header cannot be read\n'
                        'it is damaged: prepare the corpus again', DATA) from None
    if dtype.kind not in 'iu' or len(shape) != 1:
        raise UserError(f'{path} is an array of {dtype.name}, shape {shape}: tokens are whole numbers, one after the '
                        'other', DATA)
    return np.dtype(f'{dtype.byteorder}u{dtype.itemsize}'), file.tell(), shape[0], 'gpt2'


def is_uint32(path: Path, size: int) -> bool:
    """Return whether bare integers have 32 bits: then every second 16-bit word is the upper half of an id, and close to
    zero. Ids of 16 bits have no such pattern."""
    if size % 4:
        return False
    places = [size * number // 16 // 4 * 4 for number in range(16)]
    words = np.concatenate([np.fromfile(path, '<u2', END // 2, offset=place) for place in places])
    lower, upper = words[::2] <= SMALL_WORD, words[1::2] <= SMALL_WORD
    return size > 0 and float(upper.mean()) > 0.99 and float(lower.mean()) < 0.5


def ends_of(path: Path) -> dict[str, str]:
    """Return the sha256 of the first and of the last 4096 bytes, which tell most files from others."""
    with open(path, 'rb') as file:
        head = file.read(END)
        file.seek(max(0, path.stat().st_size - END))
        return {'head': hashlib.sha256(head).hexdigest(), 'tail': hashlib.sha256(file.read(END)).hexdigest()}


def sample_of(path: Path, n_pieces: int = PIECES) -> str:
    """Return the sha256 of a few pieces from all over a file whose maker has left no hash of the whole."""
    size, sha256 = path.stat().st_size, hashlib.sha256()
    with open(path, 'rb') as file:
        for number in range(n_pieces):
            file.seek(size * number // n_pieces)
            sha256.update(file.read(END))
    return sha256.hexdigest()


class Descriptor:
    """A file that is open until nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


@lru_cache(OPEN)
def descriptor_of(file: 'TokenFile') -> Descriptor:
    """Return the open file. To open it for each window would take longer than to read it, on a network above all."""
    return Descriptor(file.path)


def read_bytes(file: 'TokenFile', begin: int, count: int) -> npt.NDArray[np.uint8]:
    """Return as many bytes of a file from `begin` on, or fewer if it ends before. pread leaves the file's position
    alone, so threads and processes that share an open file do not disturb each other."""
    if sys.platform == 'win32':  # which lacks pread
        return np.fromfile(file.path, np.uint8, count, offset=begin)
    opened = descriptor_of(file)  # a name for it, so that it is not closed before it is read
    return np.frombuffer(os.pread(opened.number, count, begin), np.uint8)


class TokenFile:
    """The tokens of one file. There is no memory map, which would grow with use and end the process if the file
    shrinks, and nothing in it that a copy in another process could not use."""

    def __init__(self, path: str | Path, dtype: str = '') -> None:
        """Raise UserError if the file is of no family, or its size is not what its header says."""
        self.path = Path(path)
        self.comparison: Comparison | None = None  # with its checksums, if they are known
        try:
            with open(self.path, 'rb') as file:
                self.dtype, self.offset, self.n_tokens, self.tokenizer = find_layout(file, self.path, dtype)
            size = self.path.stat().st_size
        except OSError as error:
            raise refusal(error, self.path, DATA) from None
        expected = self.offset + self.n_tokens * self.dtype.itemsize
        if size != expected or self.n_tokens == 0:
            what = (f'and its header says {self.n_tokens} {self.dtype.name} tokens, which are {expected}'
                    if self.offset else f'which is not a whole number of {self.dtype.name} tokens')
            raise UserError(f'{self.path} has {size} bytes, {what}\n'
                            'it is damaged or of another format: prepare the corpus, or fetch the file, again', DATA)

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def files(self) -> list['TokenFile']:
        return [self]

    def read(self, start: int, count: int) -> Ids:
        """Return tokens start .. start + count - 1. Raise UserError if the file no longer holds them, or holds
        others."""
        first, last = (self.offset + number * self.dtype.itemsize for number in (start, start + count))  # bytes
        begin, end = self.comparison.widen(first, last) if self.comparison else (first, last)
        try:
            data = read_bytes(self, begin, end - begin)
            if len(data) < last - begin:
                left = max(0, self.path.stat().st_size - self.offset) // self.dtype.itemsize
                raise UserError(f'{self.path} has shrunk: it had {self.n_tokens} tokens, and {left} are left', DATA)
        except OSError as error:
            raise refusal(error, f'{self.path} can no longer be read', DATA) from None
        if self.comparison:
            self.comparison.compare(data, begin)
        return data[first - begin:last - begin].view(self.dtype)

    def name_of(self, start: int) -> Path:
        """Return the file that holds this token."""
        return self.path


class Shards(TokenFile):
    """Several files as one sequence: a window may begin in one and end in the next, and no tail is lost."""

    def __init__(self, path: Path, files: Sequence[TokenFile]) -> None:
        self.path, self.shards = path, list(files)
        self.ends = np.cumsum([len(file) for file in files])  # of each file, in tokens of the sequence
        self.n_tokens = int(self.ends[-1])

    @property
    def files(self) -> list[TokenFile]:
        return self.shards

    def read(self, start: int, count: int) -> Ids:
        assert 0 <= start <= start + count <= self.n_tokens, f'{start} + {count} of {self.n_tokens} tokens'
        parts = []
        for number in range(self.number_of(start), self.number_of(start + max(0, count - 1)) + 1):
            before = int(self.ends[number]) - len(self.shards[number])
            first = max(start, before)
            parts.append(self.shards[number].read(first - before, min(start + count, int(self.ends[number])) - first))
        return np.concatenate(parts)

    def number_of(self, start: int) -> int:
        return min(int(np.searchsorted(self.ends, start, side='right')), len(self.shards) - 1)

    def name_of(self, start: int) -> Path:
        return self.shards[self.number_of(start)].path


def open_files(paths: Sequence[Path], name: Path, dtype: str = '') -> TokenFile:
    """Open the files as one sequence, which is called `name` if there are several."""
    files = [TokenFile(path, dtype) for path in paths]
    return files[0] if len(files) == 1 else Shards(name, files)
