"""What can befall a run from outside: a signal, the end of its time, a process that dies or hangs, scarce memory."""
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self, TypeVar

import torch.distributed as dist
import torch.nn as nn

from plaingpt import errors
from plaingpt.errors import UserError
from plaingpt.machines.processes import Process

T = TypeVar('T')

BEAT = 1.0  # seconds between two signs of life
LISTEN = 4  # beats in which a living process gives a sign
PATIENCE = 5.0  # seconds in which a living store answers


class News(NamedTuple):
    """What a process hears of the others."""

    reason: str = ''  # who is lost, and why; '' where nobody is known to be
    code: int = errors.PEER_LOST  # the exit code for it
    is_moving: bool = False  # somebody gets on


class Watch:
    """Each process tells the others, through their common store, that it lives and how far it is. Where one has died or
    hangs, the others end within `timeout` seconds (`start_timeout` before the first step is done), and say which."""

    def __init__(self, process: Process, start_timeout: float, timeout: float) -> None:
        self.process, self.limit, self.timeout = process, start_timeout, timeout
        self.on_end: Callable[[int, str], None] | None = None  # what is done with an exit code and last words
        self.work, self.step, self.beats, self.ended = 0, 0, 0, threading.Event()
        self.store = process.store
        self.me = f'process {process.rank} (pid {os.getpid()} on {socket.gethostname()})'
        self.parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Self:
        if self.store:
            self.tell()
            self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.rest()
        if error and errors.code_of(error) not in (errors.STOPPED, errors.PEER_LOST):
            is_expected = isinstance(error, UserError) or errors.code_of(error) != errors.CHECK_FAILED
            self.say_last(errors.code_of(error) if is_expected else errors.PEER_LOST, f'{self.me}: {error}')

    def beat(self, step: int | None = None) -> None:
        """Called wherever the main thread gets on: it is at work on `step`, or waits with good reason."""
        self.work, self.step = self.work + 1, self.step if step is None else step

    def follow(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Beat wherever the forward and the backward pass leave a block, and at their ends: a process that hangs in
        between falls behind those that wait for it in the next exchange."""
        if self.store is None:
            return
        for block in blocks:
            block.register_forward_hook(lambda *_: self.beat())
            block.register_full_backward_hook(lambda *_: self.beat())
        model.register_forward_hook(lambda *_: self.beat())
        next(model.parameters()).register_post_accumulate_grad_hook(lambda _: self.beat())

    def tighten(self) -> None:
        """The first step is done, nearly everything is compiled and connected: from here on `timeout` counts."""
        self.limit = self.timeout

    def rest(self) -> None:
        """The work is done: from here on each process may take its time."""
        self.ended.set()

    def tell(self) -> None:
        assert self.store is not None, 'only several processes watch each other'
        self.beats += 1
        self.store.set(str(self.process.rank), json.dumps({'beat': self.beats, 'work': self.work, 'step': self.step,
                                                           'name': self.me}))

    def run(self) -> None:
        """The thread: tell, and see whether the main thread gets on."""
        work, since = -1, time.monotonic()
        while not self.ended.wait(BEAT):
            try:
                self.tell()
            except RuntimeError:  # the store went down with its process
                since -= self.limit
            if work != self.work:
                work, since = self.work, time.monotonic()
            if self.parent not in (None, os.getppid()):
                self.end(News(f'torchrun, which started {self.me}, has died'))
            if time.monotonic() - since > self.limit:
                news = self.listen(slowest=True)
                if news.is_moving:  # somebody waits for a slow disk, say, and all others for him
                    since = time.monotonic()
                elif not self.ended.is_set():
                    self.end(news if news.reason else News(f'nothing has moved for {self.limit:.0f} s, in any process'))

    def end(self, news: News) -> None:
        """The main thread waits for somebody who will not come, so this one ends the process."""
        message = f'{news.reason}\nwhat was saved is whole: run the same command again'
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f'{message}\n'.encode())
        if self.on_end:
            self.on_end(news.code, message)
        self.say_last(news.code, news.reason)
        os._exit(news.code)

    def say_last(self, code: int, reason: str) -> None:
        """Leave word in the store, so that the others need not find out for themselves."""
        store, word = self.store, json.dumps({'code': code, 'reason': reason})
        if store:
            answer(lambda: store.set('end', word))

    def listen(self, slowest: bool = False) -> News:
        """Who has died, or, asked for the slowest, who hangs. It takes LISTEN beats to hear."""
        before = answer(self.records)
        for _ in range(LISTEN):
            time.sleep(BEAT)
            answer(self.tell)
        after = answer(self.records)
        if before is None or after is None:
            keeper = 'process 0' if self.parent is None else 'torchrun, or the machine of process 0'
            return News(f'{keeper}, at {os.environ["MASTER_ADDR"]}, is silent: it has died, or was halted')
        if -1 in after:
            return News(after[-1]['reason'], after[-1]['code'])
        silent = [rank for rank, record in after.items() if record['beat'] == before[rank]['beat']]
        least, most = (pick(record['work'] for record in after.values()) for pick in (min, max))
        behind = [rank for rank, record in after.items() if record['work'] == least < most] if slowest else []
        fault = 'is silent: it has died, or was halted' if silent else f'hangs: {self.limit:.0f} s without progress'
        names = '; '.join(f'{after[rank]["name"]}, at step {after[rank]["step"]}' for rank in silent or behind)
        is_moving = not silent and any(record['work'] != before[rank]['work'] for rank, record in after.items())
        return News(f'{names}, {fault}' if names else '', is_moving=is_moving)

    def records(self) -> dict[int, dict[str, Any]]:
        """What each process has told last; as number -1 the last words of one that has failed, if there are any."""
        assert self.store is not None, 'only several processes watch each other'
        keys = [str(rank) for rank in range(self.process.world_size)]
        found = dict(enumerate(map(json.loads, self.store.multi_get(keys))))
        return found | ({-1: json.loads(self.store.get('end'))} if self.store.check(['end']) else {})


def answer(question: Callable[[], T]) -> T | None:
    """What it gives, or None where that takes longer than PATIENCE: a store whose keeper was halted would be waited for
    without end."""
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
    """An error of another process becomes one that says so; one of the memory gives the `remedy`: settings that need
    less of it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if errors.is_out_of_memory(error):
            reason = (str(error).splitlines() or ['main memory'])[0]
            raise UserError(f'out of memory: {reason}\ntry {remedy}', errors.OUT_OF_MEMORY) from None
        if watch.store is None or not is_of_a_peer(error):
            raise
        news = watch.listen()
        reason = news.reason or f'the connection to another process broke: {str(error).splitlines()[0]}'
        raise UserError(f'{reason}\nwhat was saved is whole: run the same command again', news.code) from None


def is_of_a_peer(error: BaseException) -> bool:
    """gloo's errors are plain RuntimeErrors; NCCL's have a class of their own."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ('gloo', 'NCCL', 'Connection '))
