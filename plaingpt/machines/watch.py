"""The watch over a run of several processes, one of which may die or hang; and messages for errors of memory."""
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar

import torch.distributed as dist
import torch.nn as nn

from plaingpt import console
from plaingpt.errors import CHECK_FAILED, OUT_OF_MEMORY, PEER_LOST, STOPPED, UserError, code_of, is_out_of_memory
from plaingpt.machines import processes
from plaingpt.machines.processes import Process

T = TypeVar('T')

BEAT = 1.0  # seconds between two signs of life
LISTEN = 4  # beats within which a living process gives a sign
PATIENCE = 5.0  # seconds within which a living store answers


def lost(reason: str, code: int = PEER_LOST) -> UserError:
    """Return the error with which a run ends when it has lost a process."""
    return UserError(reason + '\nwhat was saved is whole: run the same command again' * (code == PEER_LOST), code)


class Watch:
    """The watch of a process over the others: each tells all, through their common store, that it lives and how far it
    is. If one has died or hangs, the others end within `timeout` seconds (`start_timeout` before the first step is
    done), and say which one."""

    def __init__(self, process: Process, start_timeout: float, timeout: float) -> None:
        self.process, self.limit, self.timeout, self.start_timeout = process, start_timeout, timeout, start_timeout
        self.on_end: Callable[[int, str], None] | None = None  # called with an exit code and last words
        self.work, self.step, self.since = 0, 0, time.monotonic()  # how far the main thread is, and since when
        self.beats, self.ended, self.is_done = 0, threading.Event(), False
        self.is_tight = False  # the first step is done
        # Compiled code keeps Python's lock while it launches a kernel; with fsdp so many of them wait for a lost
        # process that a launch waits, too, and then no other thread can run.
        self.may_starve = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.me = f'process {process.rank} (pid {os.getpid()} on {socket.gethostname()})'
        self.parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None

    def __enter__(self) -> Self:
        if self.process.world_size > 1:
            self.tell()
            self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.is_done = self.is_done or error is None
        self.ended.set()
        if error and code_of(error) not in (STOPPED, PEER_LOST):
            is_expected = isinstance(error, UserError) or code_of(error) != CHECK_FAILED
            self.say_last(lost(f'{self.me}: {error}', code_of(error) if is_expected else PEER_LOST))
        if self.thread.is_alive():  # the interpreter must not end while the thread waits in C++ for the store
            self.thread.join(PATIENCE)

    def beat(self, step: int | None = None) -> None:
        """Note that the main thread makes progress: it is at work on `step`, or waits with good reason."""
        self.work, self.since = self.work + 1, time.monotonic()
        self.step = self.step if step is None else step

    def follow(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Beat whenever the forward or the backward pass leaves a block, and at their ends: a process that hangs in
        between falls behind those that wait for it in the next exchange."""
        if self.process.world_size > 1:
            for block in blocks:
                block.register_forward_hook(lambda *_: self.beat())
                block.register_full_backward_hook(lambda *_: self.beat())
            model.register_forward_hook(lambda *_: self.beat())
            next(model.parameters()).register_post_accumulate_grad_hook(lambda _: self.beat())

    def tighten(self) -> None:
        """Let `timeout` count from now on: the first step is done, and nearly everything is compiled and connected. If
        the watch `may_starve`, PyTorch ends the process after twice that time."""
        if self.may_starve and not self.is_tight:
            processes.limit_exchanges(2 * self.timeout)
        self.limit, self.is_tight = self.timeout, True

    def rest(self) -> None:
        """End the watch, as the work is done: each process may now take its time, and those that still work do not miss
        it."""
        if self.may_starve and self.is_tight:  # the last checkpoint may take long
            processes.limit_exchanges(2 * self.start_timeout)
        self.is_done = True
        self.ended.set()

    def tell(self) -> None:
        self.beats += 1
        record = {'beat': self.beats, 'work': self.work, 'step': self.step, 'name': self.me, 'is_done': self.is_done}
        self.process.store.set(str(self.process.rank), json.dumps(record))

    def run(self) -> None:
        """Tell the others that this process lives, and see whether its main thread makes progress: this is what the
        thread does."""
        while not self.ended.wait(BEAT):
            patience = self.limit
            try:
                self.tell()
            except RuntimeError:  # the store went down with its process
                patience = BEAT
            if self.parent not in (None, os.getppid()):
                self.end(lost(f'torchrun, which started {self.me}, has died'))
            if time.monotonic() - self.since > patience:
                loss = self.listen(is_late=True)
                if loss is None:  # a process waits for a slow disk, say, and all others for it
                    self.since = time.monotonic()
                elif not self.ended.is_set():
                    self.end(loss)
        with suppress(RuntimeError):
            self.tell()  # the last time

    def end(self, loss: UserError) -> None:
        """End the process from this thread: the main thread waits for a process that will not come."""
        console.last_words(str(loss))
        if self.on_end:
            self.on_end(loss.code, str(loss))
        self.say_last(loss)
        os._exit(loss.code)

    def say_last(self, loss: UserError) -> None:
        """Leave a message in the store, so that the others need not find out for themselves."""
        answer(lambda: self.process.store.set('end', json.dumps([str(loss), loss.code])))

    def listen(self, is_late: bool = False) -> UserError | None:
        """Return an error that names the processes that have died; or, if it `is_late` and no process moves, those that
        are behind; or else None. It takes LISTEN beats to hear."""
        before = answer(self.records)
        for _ in range(LISTEN if before else 0):
            time.sleep(BEAT)
            answer(self.tell)
        after = answer(self.records)
        if before is None or after is None:
            keeper = 'process 0' if self.parent is None else 'torchrun, or the machine of process 0'
            return lost(f'{keeper}, at {os.environ["MASTER_ADDR"]}, is silent: it has died, or was halted')
        if -1 in after:
            return UserError(*after[-1])
        after = {rank: record for rank, record in after.items() if not record['is_done']}
        silent = [rank for rank, record in after.items() if record['beat'] == before[rank]['beat']]
        is_moving = any(record['work'] != before[rank]['work'] for rank, record in after.items())
        if not silent and (is_moving or not is_late or len(after) <= 1):  # the others wait for it or have finished
            return None
        least, most = (pick(record['work'] for record in after.values()) for pick in (min, max))
        behind = [rank for rank, record in after.items() if record['work'] == least < most]
        names = '; '.join(f'{after[rank]["name"]}, at step {after[rank]["step"]}' for rank in silent or behind)
        fault = 'is silent: it has died, or was halted' if silent else f'hangs: {self.limit:.0f} s without progress'
        return lost(f'{names}, {fault}' if names else f'nothing has moved for {self.limit:.0f} s, in any process')

    def records(self) -> dict[int, Any]:
        """Return what each process told last, and as number -1 the last words of one that has failed, if there are
        any."""
        keys = [str(rank) for rank in range(self.process.world_size)]
        found = dict(enumerate(map(json.loads, self.process.store.multi_get(keys))))
        return found | ({-1: json.loads(self.process.store.get('end'))} if self.process.store.check(['end']) else {})


def answer(question: Callable[[], T]) -> T | None:
    """Return the answer to a question, or None if that takes longer than PATIENCE: a store whose keeper was halted
    never answers."""
    answers: list[T] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the keeper has died
            answers.append(question())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers[0] if answers else None


@contextmanager
def explained(watch: Watch, remedy: str) -> Iterator[None]:
    """Raise UserError in place of an error that comes from another process, and name that process; and in place of one
    of memory, with the `remedy`: settings that need less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or ['main memory'])[0]
        if is_out_of_memory(error):
            raise UserError(f'out of memory: {reason}\ntry {remedy}', OUT_OF_MEMORY) from None
        # gloo's errors are plain RuntimeErrors; NCCL's have a class of their own.
        is_of_a_peer = isinstance(error, dist.DistError) or any(
            word in str(error) for word in ('gloo', 'NCCL', 'Connection '))
        if watch.process.world_size == 1 or not is_of_a_peer:
            raise
        raise watch.listen() or lost(f'the connection to another process broke: {reason}') from None
