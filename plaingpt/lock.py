"""A lock with which one process at a time owns a folder and writes to it: it locks a file there, and the lock ends with
the process, however that ends. If the file system has no locks, the owner touches the file every few seconds."""
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
STALE = 60.0  # seconds without a touch after which an owner is taken for dead
SETTLE = 2.0  # seconds in which other processes that saw the same stale file replace it, too: the last one owns it
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def owned(folder: Path, patience: float = 0.0, while_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Own the folder until the block ends; make it if it is missing. If another process owns it for longer than
    `patience` seconds, raise UserError."""
    is_new, path, token = not folder.exists(), folder / NAME, secrets.token_hex(8)
    file, ended = wait_for(path, token, patience, while_waiting), threading.Event()
    threading.Thread(target=beat, args=(file, path, token, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if sys.platform == 'win32':
            file.close()  # or else Windows would not remove it
        with suppress(OSError):
            if token_in(path) == token:
                path.unlink()
        with suppress(OSError):
            if is_new:
                folder.rmdir()  # if nothing was written
        file.close()


def beat(file: FileIO, path: Path, token: str, ended: threading.Event) -> None:
    """Give signs of life, in a thread of the owner. If this process was halted for long, or the folder was deleted,
    another process may own it by now: then end this one, as they must not both write."""
    while not ended.wait(BEAT):
        with suppress(OSError, ValueError):  # the network may fail for a moment; the file is closed at the end
            if token_in(path) not in ('', token):
                break
            os.utime(path if sys.platform == 'win32' else file.fileno())
    if not ended.is_set():
        console.last_words(f'{path.parent} has been taken over by {owner_of(path)}')
        os._exit(PEER_LOST)


def wait_for(path: Path, token: str, patience: float, while_waiting: Callable[[], None]) -> FileIO:
    """Block until this process owns the folder, and return the file that says so. Raise UserError after `patience`
    seconds."""
    end, has_said = time.monotonic() + patience, False
    while not (file := take(path, token)):
        owner = owner_of(path)
        if time.monotonic() >= end:
            raise UserError(f'{path.parent} belongs to {owner}\n'
                            'run the same command again when that has ended, or give another folder', PEER_LOST)
        if not has_said:
            console.say(f'{path.parent} belongs to {owner}: waiting up to {patience:.0f} s for it to end')
            has_said = True
        while_waiting()
        time.sleep(POLL)
    return file


def take(path: Path, token: str) -> FileIO | None:
    """Return the file if this process can own it now, and sign it."""
    path.parent.mkdir(parents=True, exist_ok=True)  # an owner that has written nothing removes it
    file = open(path, 'a+b', buffering=0)  # not inherited by programs that this one starts
    try:
        lock(file)
    except OSError as error:
        file.close()
        return claim(path, token) if error.errno in NO_LOCKS else None
    file.truncate(0)
    sign(file, token)
    if token_in(path) != token:  # its owner has just ended and removed it: the path is another file's, or free
        file.close()
        return None
    if sys.platform != 'win32':
        os.register_at_fork(after_in_child=file.close)  # a child must not keep the lock when the owner has ended
    return file


def lock(file: FileIO) -> None:
    """Lock the file. Raise OSError if another process holds the lock."""
    if sys.platform == 'win32':
        import msvcrt

        file.seek(1 << 20)  # far behind the content, which other processes can then still read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def claim(path: Path, token: str) -> FileIO | None:
    """Own the folder without locks: replace a file that is empty or was not touched for long. A new file tells the time
    by the file system's own clock."""
    new = path.with_name(f'{NAME}.{secrets.token_hex(4)}')
    file = open(new, 'x+b', buffering=0)
    sign(file, token)
    with suppress(FileNotFoundError):
        old = path.stat()
        if old.st_size and os.fstat(file.fileno()).st_mtime - old.st_mtime < STALE:
            file.close()
            new.unlink()
            return None
    new.replace(path)
    time.sleep(SETTLE)
    if token_in(path) == token:
        return file
    file.close()
    return None


def sign(file: FileIO, token: str) -> None:
    owner = {'host': socket.gethostname(), 'pid': os.getpid(), 'start': time.time(), 'token': token}
    file.write(json.dumps(owner).encode())


def token_in(path: Path) -> str:
    """Return the token that tells the owner from all others; '' if there is none. Raise OSError if the file cannot be
    read."""
    found = files.read_json(path)
    return str(found.get('token', '')) if isinstance(found, dict) else ''


def owner_of(path: Path) -> str:
    """Return which process owns the folder, and since when, as far as the file tells."""
    match files.read_json(path):
        case {'host': str(host), 'pid': int(pid), 'start': int() | float() as start}:
            return f'process {pid} on {host}, which began {console.duration(max(0.0, time.time() - start))} ago'
    return 'another process'
