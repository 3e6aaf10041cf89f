"""What can befall a run from outside: a signal, the end of its time, a process that dies or hangs, scarce memory."""
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
import torch.nn as nn

import errors
import tokens
from errors import UserError
from parallel import Process
from tokenizer import Tokenizer

SIGNALS = ('SIGTERM', 'SIGUSR1', 'SIGINT')  # Kubernetes and torchrun, Slurm, Ctrl-C; a system need not have them all
AGAIN = 1.0  # seconds: a second Ctrl-C sooner than that is the first one, passed on by torchrun
BEAT = 1.0  # seconds between two signs of life
LISTEN = 4  # beats in which a living process gives a sign


class Stop:
    """Asks for a run to save and end: after a signal, or after `max_hours` (0 sets no end). A second Ctrl-C ends it at
    once."""

    def __init__(self, max_hours: float) -> None:
        self.end = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.reason, self.since, self.before = '', 0.0, dict[int, Any]()

    def __enter__(self) -> Self:
        for number in (getattr(signal, name) for name in SIGNALS if name in vars(signal)):
            self.before[number] = signal.signal(number, self.take)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler: it runs between two operations of the main thread, and so it only takes a note."""
        now = time.monotonic()
        if self.reason and number == signal.SIGINT and now - self.since > AGAIN:
            os._exit(errors.INTERRUPTED)
        if not self.reason:
            self.reason, self.since = signal.Signals(number).name, now
            print(f'{self.reason}: saving after this step', file=sys.stderr, flush=True)

    def is_asked(self) -> bool:
        if not self.reason and time.monotonic() > self.end:
            self.reason = 'the end of max_hours'
        return self.reason != ''


class Watch:
    """Each process tells the others, through their common store, that it lives and how far it is. Where one has died or
    hangs, the others end within `timeout` seconds (`start_timeout` before the first step is done), and say which."""

    def __init__(self, process: Process, start_timeout: float, timeout: float) -> None:
        self.process, self.limit, self.timeout = process, start_timeout, timeout
        self.on_end: Callable[[int, str], None] | None = None  # what is done with an exit code and last words
        self.work, self.step, self.beats, self.ended = 0, 0, 0, threading.Event()
        self.store = process.store
        self.parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Self:
        if self.store:
            self.tell()
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join((LISTEN + 1) * BEAT)

    def beat(self, step: int | None = None) -> None:
        """Called wherever the main thread gets on: it is at work on `step`, or waits with good reason."""
        self.work, self.step = self.work + 1, self.step if step is None else step

    def is_up(self) -> None:
        """The first step is done: nothing will be compiled or connected any more."""
        self.limit = self.timeout

    def tell(self) -> None:
        assert self.store is not None, 'only several processes watch each other'
        self.beats += 1
        self.store.set(str(self.process.rank), json.dumps({'beat': self.beats, 'work': self.work, 'step': self.step,
                                                           'host': socket.gethostname(), 'pid': os.getpid()}))

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
                self.end(f'torchrun, which started process {self.process.rank} (pid {os.getpid()} on '
                         f'{socket.gethostname()}), has died')
            if time.monotonic() - since > self.limit and not self.ended.is_set():
                reason, is_moving = self.listen(slowest=True)
                if is_moving:  # somebody waits for a slow disk, say, and all others for him
                    since = time.monotonic()
                else:
                    self.end(reason or f'nothing has moved for {self.limit:.0f} s, in any process')

    def end(self, reason: str) -> None:
        """The main thread waits for somebody who will not come, so this one ends the process."""
        message = f'{reason}\nwhat was saved is whole: run the same command again'
        with suppress(RuntimeError):
            assert self.store is not None, 'only several processes watch each other'
            self.store.set('end', reason)  # the others need not find out for themselves
        print(message, file=sys.stderr, flush=True)
        if self.on_end:
            self.on_end(errors.PEER_LOST, message)
        os._exit(errors.PEER_LOST)

    def listen(self, slowest: bool = False) -> tuple[str, bool]:
        """Who has died, or, asked for the slowest, who hangs ('' if nobody has); and whether anybody gets on. It takes
        LISTEN beats to hear."""
        try:
            before = self.records()
            for _ in range(LISTEN):
                time.sleep(BEAT)
                self.tell()
            after = self.records()
            assert self.store is not None, 'only several processes watch each other'
            if self.store.check(['end']):
                return str(self.store.get('end'), 'utf-8'), False
        except RuntimeError:
            return f'the store of the processes, at {os.environ["MASTER_ADDR"]}, is gone, and whoever kept it', False
        silent = [rank for rank, record in after.items() if record['beat'] == before[rank]['beat']]
        least, most = (pick(record['work'] for record in after.values()) for pick in (min, max))
        behind = [rank for rank, record in after.items() if record['work'] == least < most] if slowest else []
        fault = 'is silent: it has died, or was halted' if silent else f'hangs: {self.limit:.0f} s without progress'
        names = [f'process {rank} (pid {after[rank]["pid"]} on {after[rank]["host"]}), at step {after[rank]["step"]}'
                 for rank in silent or behind]
        is_moving = not silent and any(record['work'] != before[rank]['work'] for rank, record in after.items())
        return f'{"; ".join(names)}, {fault}' if names else '', is_moving

    def records(self) -> dict[int, dict[str, Any]]:
        assert self.store is not None, 'only several processes watch each other'
        ranks = range(self.process.world_size)
        return dict(enumerate(map(json.loads, self.store.multi_get([str(rank) for rank in ranks]))))


def smaller_batch(batch_size: int, accumulation: int, total_batch_size: int) -> str:
    """The settings that need less memory, for the same tokens in a step."""
    if batch_size == 1:
        return '--activation_checkpointing=True, or --strategy=fsdp on several cards, or a smaller --block_size'
    smaller = next(size for size in range(batch_size // 2, 0, -1) if batch_size * accumulation % size == 0)
    if total_batch_size:
        return f'--batch_size={smaller}, for the same total_batch_size'
    more = batch_size * accumulation // smaller
    return f'--batch_size={smaller} --gradient_accumulation_steps={more}, for the same tokens in a step'


@contextmanager
def explained(watch: Watch, remedy: str) -> Iterator[None]:
    """An error of another process, or of the memory, becomes one that says so; `remedy` is for the memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if errors.is_out_of_memory(error):
            reason = (str(error).splitlines() or ['main memory'])[0]
            raise UserError(f'out of memory: {reason}\ntry {remedy}', errors.OUT_OF_MEMORY) from None
        if watch.store is None or not is_of_a_peer(error):
            raise
        reason = watch.listen()[0] or f'the connection to another process broke: {str(error).splitlines()[0]}'
        raise UserError(f'{reason}\nwhat was saved is whole: run the same command again', errors.PEER_LOST) from None


def is_of_a_peer(error: BaseException) -> bool:
    """gloo's errors are plain RuntimeErrors; NCCL's have a class of their own."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ('gloo', 'NCCL', 'Connection '))


def give_up(step: int, skipped: int, model: nn.Module, parts: Iterable[tokens.Part],
            autocast: AbstractContextManager[None], vocabulary: Tokenizer | None) -> NoReturn:
    """End a run in which nothing is finite any more, and show the first text of the step's parts whose loss is not."""
    found = []
    for part in parts:
        for x, y in zip(part.x, part.y, strict=True):  # (T,) each
            with torch.no_grad(), autocast:
                _, loss = model(x[None], y[None], logits='none')
            if not torch.isfinite(loss):
                found.append(x.tolist())
    what = f'{skipped} steps in a row were skipped, up to step {step}' if skipped else f'the loss of step {step}'
    text = vocabulary.decode(found[0]) if found and vocabulary else ''
    where = f'the first text of this process that has no finite loss: {text[:200]!r}\n' if text else ''
    raise UserError(f'nothing is finite any more: {what}; what was saved before is whole\n{where}'
                    'try a lower --learning_rate, or --dtype=float32', errors.NOT_FINITE)
