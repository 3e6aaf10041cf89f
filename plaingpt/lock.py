"""One process at a time owns a folder and writes to it: it locks a file there, and the lock ends with the process,
however that ends. If the file system knows no locks, the file counts that its owner touches every few seconds."""
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from plaingpt import console, files
from plaingpt.errors import PEER_LOST, UserError

NAME = '.lock'
POLL = 0.5  # seconds between two attempts to become the owner
BEAT = 5.0  # seconds between two touches
STALE = 60.0  # seconds without one after which an owner is taken for dead
SETTLE = 2.0  # seconds in which others who have seen the same stale file replace it, too: the last of them owns it
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def owned(folder: Path, patience: float = 0.0, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Own the folder, which is made if there is none, until the block ends. Wait at most `patience` seconds for another
    owner to end, and then raise UserError."""
    is_new, path, token = not folder.exists(), folder / NAME, secrets.token_hex(8)
    file, ended = wait_for(path, token, patience, while_waiting), threading.Event()
    threading.Thread(target=beat, args=(file, path, token, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if sys.platform == 'win32':
            file.close()  # or else it cannot be removed
        with suppress(OSError):
            if token_in(path) == token:
                path.unlink()
        with suppress(OSError):
            if is_new:
                folder.rmdir()  # if nothing was written
        file.close()


def beat(file: FileIO, path: Path, token: str, ended: threading.Event) -> None:
    """Give signs of life, in a thread of the owner. If another process owns the folder by now, as this one was halted
    for long or the folder deleted, end this one: they must not both write."""
    while not ended.wait(BEAT):
        with suppress(OSError, ValueError):  # a network that fails for a moment; a file that is closed at the end
            if token_in(path) not in ('', token):
                break
            os.utime(path if sys.platform == 'win32' else file.fileno())
    if not ended.is_set():
        console.last_words(f'{path.parent} has been taken over by {owner_of(path)}')
        os._exit(PEER_LOST)


def wait_for(path: Path, token: str, patience: float, while_waiting: Callable[[], None]) -> FileIO:
    """Return the file of the owner, which this process has become."""
    end, has_said = time.monotonic() + patience, False
    while not (file := take(path, token)):
        owner = owner_of(path)
        if time.monotonic() >= end:
            raise UserError(f'{path.parent} belongs to {owner}\n'
                            'run the same command again when that has ended, or give another folder', PEER_LOST)
        if not has_said:
            console.say(f'{path.parent} belongs to {owner}: waiting up to {patience:.0f} s for its end')
            has_said = True
        while_waiting()
        time.sleep(POLL)
    return file


def take(path: Path, token: str) -> FileIO | None:
    """Return the file if this process owns it now. What it holds says who that is."""
    path.parent.mkdir(parents=True, exist_ok=True)  # an owner that has written nothing removes it
    file = open(path, 'a+b', buffering=0)  # not inherited by programs that this one starts
    try:
        lock(file)
    except OSError as error:
        file.close()
        return claim(path, token) if error.errno in NO_LOCKS else None
    file.truncate(0)
    sign(file, token)
    if token_in(path) != token:  # its owner has ended, and removed it: this is another file
        file.close()
        return None
    if sys.platform != 'win32':
        os.register_at_fork(after_in_child=file.close)
    return file


def lock(file: FileIO) -> None:
    """Lock the file. Raise OSError if another process has."""
    if sys.platform == 'win32':
        import msvcrt

        file.seek(1 << 20)  # others can read what is before that
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def claim(path: Path, token: str) -> FileIO | None:
    """Own it without locks: put another file in place of one that is empty or was not touched for long, as the file
    system's own clock tells."""
    mine = path.with_name(f'{NAME}.{secrets.token_hex(4)}')
    file = open(mine, 'x+b', buffering=0)
    sign(file, token)
    with suppress(FileNotFoundError):
        there = path.stat()
        if there.st_size and os.fstat(file.fileno()).st_mtime - there.st_mtime < STALE:
            file.close()
            mine.unlink()
            return None
    mine.replace(path)
    time.sleep(SETTLE)
    if token_in(path) == token:
        return file
    file.close()
    return None


def sign(file: FileIO, token: str) -> None:
    owner = {'host': socket.gethostname(), 'pid': os.getpid(), 'start': time.time(), 'token': token}
    file.write(json.dumps(owner).encode())


def token_in(path: Path) -> str:
    """Return what tells the owner from all others; '' if there is none. Raise OSError if the file cannot be read."""
    found = files.read_json(path)
    return str(found.get('token', '')) if isinstance(found, dict) else ''


def owner_of(path: Path) -> str:
    """Return who owns the folder, and since when, as far as the file tells."""
    match files.read_json(path):
        case {'host': str(host), 'pid': int(pid), 'start': int() | float() as start}:
            return f'process {pid} on {host}, which began {console.duration(max(0.0, time.time() - start))} ago'
    return 'another process'
