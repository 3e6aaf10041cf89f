"""Files that are either whole or absent: the one place that writes under a temporary name and renames. A small file may
also be overwritten in place."""
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedWriter
from pathlib import Path
from typing import Any

from plaingpt.errors import of_system

UNFINISHED = '.tmp'  # how the name of a file ends until it is whole


@contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Raise what the system refuses in this block as an OSError that names the file, whatever a library makes of it."""
    try:
        yield
    except BrokenPipeError:  # of the console
        raise
    except Exception as error:
        refused = of_system(error)
        if not refused:
            raise
        if refused.errno and str(refused.filename or path).startswith(str(path)):  # its temporary name, too
            refused.filename = str(path)
        raise refused from None


@contextmanager
def written_whole(path: str | Path, is_shared: bool = False) -> Iterator[BufferedRandom]:
    """Yield a file to write, and to read back. At the end it takes the place of `path` in one moment: its bytes and its
    name are then on the disk. If anything goes wrong before that, the old file stays. If the process is killed, its
    temporary file stays for the next one to overwrite. With is_shared, machines that share the folder may write at
    once."""
    path = Path(path)
    suffix = f'.{secrets.token_hex(4)}{UNFINISHED}' if is_shared else UNFINISHED
    temporary = path.with_name(path.name + suffix)
    try:
        with about(path):
            with open(temporary, 'w+b') as file:
                yield file
                put_on_disk(file)
            temporary.replace(path)
        put_names_on_disk(path.parent)  # or else a power cut could undo the renaming
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def overwrite(path: Path, content: bytes, room: int) -> None:
    """Write the content, and spaces up to `room` bytes, over those of the file in one write. After the first time this
    succeeds even on a full disk, which has no room for a new file. Readers skip the spaces, as JSON's do."""
    with about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with about(path), open(path, 'r+b', buffering=0) as file:
        file.write(content[:room - 1].ljust(room - 1) + b'\n')
        file.truncate()  # an older file may have been longer
        os.fsync(file.fileno())


@contextmanager
def appended(path: Path) -> Iterator[BufferedWriter]:
    """Yield the file to append to; make its folder if that is missing."""
    with about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'ab') as file:
            yield file


def left_by_kills(folder: Path, names: str, suffix: str = UNFINISHED) -> list[Path]:
    """Return the temporary files that killed processes have left, if the names meant for them match the regular
    expression `names`."""
    pattern = re.compile(rf'({names})(\.[0-9a-f]{{8}})?{re.escape(suffix)}')
    return [path for path in folder.glob('*') if pattern.fullmatch(path.name)]


def put_on_disk(file: BufferedRandom) -> None:
    """Block until what was written to the file so far would outlive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def put_names_on_disk(folder: Path) -> None:
    """Block until the names of the files in a folder would outlive a power cut, too, if the system can tell."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link(path: Path, name: Path) -> None:
    """Give the file at `path` a second name, in place of any file that had it; copy it if the file system has no
    links. If neither works, raise OSError and change nothing."""
    temporary = name.with_name(name.name + UNFINISHED)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        with open(path, 'rb') as file, written_whole(name) as copy:
            shutil.copyfileobj(file, copy)
        return
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # rename(2) does nothing if both are names of one file


def read_json(path: Path) -> Any:
    """Return what the file holds: None if there is no such file, or it is not JSON. Raise OSError if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # the last one: for endless brackets
        return None
