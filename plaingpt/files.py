"""Files that are whole or not there: the one place that writes under a temporary name and renames; and a small one that
is overwritten in place."""
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

UNFINISHED = '.tmp'  # how the name of a file ends that is not whole yet


@contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Raise what the system refuses in here as an OSError that names the file, whatever a library makes of it."""
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
    """Yield a file to write, and to read back, which takes the place of `path` in one moment at the end: then its bytes
    and its name are on the disk. If anything goes wrong before that, the old file stays. A killed process leaves the
    temporary file for the next one to write over. With is_shared, machines that share the folder may write at once."""
    path = Path(path)
    suffix = f'.{secrets.token_hex(4)}{UNFINISHED}' if is_shared else UNFINISHED
    temporary = path.with_name(path.name + suffix)
    try:
        with about(path):
            with open(temporary, 'w+b') as file:
                yield file
                put_on_disk(file)
            temporary.replace(path)
        put_names_on_disk(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def overwrite(path: Path, content: bytes, room: int) -> None:
    """Write the content, and spaces up to `room` bytes, over those of the file in one write: after the first time it
    succeeds on a full disk, too, which has no room for a new file. Readers skip the spaces, as JSON's do."""
    with about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with about(path), open(path, 'r+b', buffering=0) as file:
        file.write(content[:room - 1].ljust(room - 1) + b'\n')
        file.truncate()  # an older file may have been longer
        os.fsync(file.fileno())


@contextmanager
def appended(path: Path) -> Iterator[BufferedWriter]:
    """Yield the file, and its folder if that is gone, to write at its end."""
    with about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'ab') as file:
            yield file


def left_by_kills(folder: Path, names: str, suffix: str = UNFINISHED) -> list[Path]:
    """Return what is left of files that were not whole yet, if their names match the regular expression `names`."""
    pattern = re.compile(rf'({names})(\.[0-9a-f]{{8}})?{re.escape(suffix)}')
    return [path for path in folder.glob('*') if pattern.fullmatch(path.name)]


def put_on_disk(file: BufferedRandom) -> None:
    """Wait until what was written to the file so far would outlive a loss of power."""
    file.flush()
    os.fsync(file.fileno())


def put_names_on_disk(folder: Path) -> None:
    """Wait until the names that the folder gives its files would, too, where the system can say so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link(path: Path, name: Path) -> None:
    """Give the file at `path` a second name, in place of the file that had it; copy it where the file system knows no
    links. Raise OSError and change nothing if neither works."""
    temporary = name.with_name(name.name + UNFINISHED)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        with open(path, 'rb') as file, written_whole(name) as copy:
            shutil.copyfileobj(file, copy)
        return
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # rename(2) does nothing where both are names of one file


def read_json(path: Path) -> Any:
    """Return what the file holds: None if there is no such file, or it is no JSON. Raise OSError if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # the last: of endless brackets
        return None
