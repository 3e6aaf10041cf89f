"""The ownership of a folder: real processes, which are killed, halted and continued."""
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from plaingpt import lock
from plaingpt.errors import PEER_LOST, UserError
from tests.comparing import refused
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
OWN = """
import errno, os, subprocess, sys, time
from pathlib import Path
from plaingpt.errors import run
from plaingpt import lock

def refuse(file):
    raise OSError(errno.ENOLCK, 'this file system knows no locks')

def main(args):
    if args[0] == 'no locks':
        lock.lock, lock.BEAT, lock.STALE, lock.SETTLE = refuse, 0.05, 3.0, 0.2
    with lock.owned(Path(args[1]), float(args[2])):
        if args[0] == 'children':
            other = subprocess.Popen(['sleep', '1000'], stdout=subprocess.DEVNULL)
            print(other.pid, os.fork() or time.sleep(1000), flush=True)
        print('owner', flush=True)
        sys.stdin.read()

run(main)
"""
Own = Callable[..., 'subprocess.Popen[str]']


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Own]:
    """Start a process that wants to own tmp_path/run: own('locks', 5) waits for 5 seconds; so does own('no locks', 5),
    on a file system that refuses to lock; own('children', 0) starts two processes that outlive it."""
    started: list[subprocess.Popen[str]] = []

    def own(how: str, patience: float) -> 'subprocess.Popen[str]':
        started.append(subprocess.Popen(
            [sys.executable, '-c', OWN, how, str(tmp_path / 'run'), str(patience)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8', start_new_session=True))
        return started[-1]

    yield own
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def becomes_owner(process: 'subprocess.Popen[str]') -> bool:
    """Return whether a process becomes the owner; this takes as long as the process waits."""
    assert process.stdout is not None, 'stdout is a pipe'
    return any(line == 'owner\n' for line in process.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='sends POSIX signals')
@pytest.mark.parametrize('how', ['locks', 'no locks'])
def test_a_folder_has_one_owner_whose_end_frees_it_however_it_ends(own: Own, how: str, tmp_path: Path) -> None:
    first = own(how, 0)
    assert becomes_owner(first)
    second = own(how, 1)
    printed, said = second.communicate()
    owner = f'{tmp_path}/run belongs to process {first.pid} on '
    assert (second.returncode, len(said.splitlines())) == (PEER_LOST, 2), said
    assert printed.startswith(owner) and len(printed.splitlines()) == 1 and said.startswith(owner)

    third = own(how, 1000)
    first.kill()
    assert becomes_owner(third)
    third.communicate('')  # it ends when its input ends
    assert third.returncode == 0
    assert list((tmp_path / 'run').iterdir()) == []
    (tmp_path / 'run').rmdir()
    fourth = own(how, 0)
    assert becomes_owner(fourth)
    fourth.communicate('')
    assert not (tmp_path / 'run').exists(), 'a waiting process writes nothing'


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='sends POSIX signals')
def test_an_owner_that_was_halted_for_long_ends_when_another_has_taken_its_place(own: Own, tmp_path: Path) -> None:
    first = own('no locks', 0)
    assert becomes_owner(first)
    first.send_signal(signal.SIGSTOP)
    second = own('no locks', 1000)
    assert becomes_owner(second)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == PEER_LOST
    assert first.stderr and f'taken over by process {second.pid} on ' in first.stderr.read()
    assert second.poll() is None


@pytest.mark.skipif(sys.platform == 'win32', reason='forks')
def test_children_that_outlive_the_owner_do_not_own(own: Own, tmp_path: Path) -> None:
    first = own('children', 0)
    assert first.stdout is not None, 'stdout is a pipe'
    children = list(map(int, first.stdout.readline().split()))
    assert refused(lambda args: lock.owned(tmp_path / 'run').__enter__(), [], code=PEER_LOST)
    first.kill()
    first.wait()
    with lock.owned(tmp_path / 'run', 60):  # seconds, in which the child gets to run
        for child in children:
            os.kill(child, 0)  # fails if the child is dead


def test_of_many_that_begin_at_once_without_locks_one_becomes_the_owner(own: Own) -> None:
    several = [own('no locks', 2) for _ in range(4)]
    wait_until(lambda: sum(process.poll() == PEER_LOST for process in several) == 3)
    assert sum(process.poll() is None for process in several) == 1


def test_a_folder_that_its_owner_removes_passes_to_the_one_that_waits(own: Own, tmp_path: Path) -> None:
    first = own('locks', 0)
    assert becomes_owner(first)
    second = own('locks', 1000)
    assert second.stdout is not None and 'waiting' in second.stdout.readline()
    assert first.stdin is not None
    first.stdin.close()  # the owner ends, and has written nothing
    first.stdin = None
    assert becomes_owner(second)
    assert (tmp_path / 'run/.lock').exists()


def test_a_copy_of_the_lock_in_its_place_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a backup was restored, for instance, the owner would end its whole process."""
    monkeypatch.setattr(lock, 'BEAT', 0.01)
    with lock.owned(tmp_path / 'run'):
        content = (tmp_path / 'run/.lock').read_bytes()
        (tmp_path / 'run/.lock').unlink()
        time.sleep(0.1)
        (tmp_path / 'run/.lock').write_bytes(content)
        time.sleep(0.1)
    assert not (tmp_path / 'run').exists()


def test_a_folder_that_cannot_be_made_or_locked_is_not_owned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'file').touch()
    for where in ('file', 'file/run'):
        with pytest.raises(OSError, match=f"'{tmp_path}/{where}'"), lock.owned(tmp_path / where):
            pass

    def refuse(file: object) -> None:
        raise OSError(errno.EIO, 'a disk that fails')

    monkeypatch.setattr(lock, 'lock', refuse)
    with pytest.raises(UserError, match='belongs to another process'), lock.owned(tmp_path / 'run'):
        pass
