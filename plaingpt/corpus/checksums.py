"""
Checksums of token files, which show damage in the middle that their ends do not show.

Beside meta.json, checksums.npz holds the CRC-32 of each block of each file, under the sha256 that meta.json gives for
that file. A block is compared when it is read for the first time.
"""
import hashlib
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from plaingpt import files
from plaingpt.errors import DATA, UserError, refusal

BLOCK = 1 << 16  # bytes; the last one of a file may be shorter
NAME = 'checksums.npz'

Sums = npt.NDArray[np.uint32]  # one for each block


def add(sums: dict[str, Sums], file: BinaryIO) -> str:
    """Add the CRC-32 of each block of a file to `sums`. Return the file's sha256."""
    file.seek(0)
    sha256, of_blocks = hashlib.sha256(), []
    while block := file.read(BLOCK):
        sha256.update(block)
        of_blocks.append(zlib.crc32(block))
    sums[sha256.hexdigest()] = np.array(of_blocks, dtype=np.uint32)
    return sha256.hexdigest()


def write(folder: Path, sums: dict[str, Any]) -> None:
    with files.written_whole(folder / NAME) as file:
        np.savez(file, **sums)


def read(folder: Path, remedy: str) -> dict[str, Sums]:
    """Return the checksums of a corpus, under the sha256 of the file that each belongs to; {} if there are none."""
    try:
        with np.load(folder / NAME) as archive:
            return dict(archive)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise refusal(error, f'{folder / NAME} cannot be read', DATA) from None
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f'{folder / NAME} is damaged: {error}\n{remedy}', DATA) from None


class Comparison:
    """The blocks of one file that were compared already, and the checksums that all must have."""

    def __init__(self, path: Path, sums: Sums, remedy: str) -> None:
        self.path, self.sums, self.remedy = path, sums, remedy
        self.is_done = bytearray(path.stat().st_size // BLOCK + 2)  # with one that begins at the end

    def widen(self, begin: int, end: int) -> tuple[int, int]:
        """Return which bytes to read in place of these: with the rest of each block that is not compared yet."""
        first, last = begin // BLOCK, end // BLOCK
        return (begin if self.is_done[first] else first * BLOCK,
                end if self.is_done[last] or end == last * BLOCK else (last + 1) * BLOCK)

    def compare(self, data: npt.NDArray[np.uint8], begin: int) -> None:
        """Compare the blocks that were read, from the byte `begin` on, unless they were compared before."""
        for number in range(begin // BLOCK, -(-(begin + len(data)) // BLOCK)):
            if not self.is_done[number]:
                start = number * BLOCK
                block = data[start - begin:start - begin + BLOCK]
                if zlib.crc32(block.data) not in self.sums[number:number + 1]:
                    raise UserError(f'{self.path} is damaged: bytes {start:,} to {start + len(block) - 1:,} are not '
                                    f'what its maker wrote\n{self.remedy}', DATA)
                self.is_done[number] = 1
