"""Requests to save and leave, by a signal or by the end of max_hours."""
import math
import os
import signal
import threading
import time
from typing import Any, Self

from plaingpt import console, errors

# They come from Kubernetes and torchrun; Slurm; LSF and SGE; a limit of CPU time; Ctrl-C and Ctrl-\; a terminal that is
# closed. A system need not have them all.
SIGNALS = {number: name for name, number in vars(signal).items() if name in (
    'SIGTERM', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGINT', 'SIGQUIT', 'SIGHUP')}
AGAIN = 1.0  # seconds: a second Ctrl-C sooner than that is the first one, passed on by torchrun


class StopAsked(Exception):
    """The reason why a run is to save and end before its last step."""


class Stop:
    """A request to a run to save and end: after a signal, or after `max_hours` (0 sets no end). A second Ctrl-C ends it
    at once, and so does a signal that comes before the run has begun, since there is nothing to save then.

    Python runs handlers between two operations of the main thread, which may wait in C++ for other processes. So the
    handlers do nothing; a thread reads the number of each signal from the pipe into which the interpreter writes it."""

    def __init__(self, max_hours: float) -> None:
        self.end = time.monotonic() + 3600 * max_hours if max_hours else math.inf
        self.reason, self.since = '', 0.0
        self.has_begun = False  # there is something to save
        self.before: dict[int, Any] = {}  # the handlers of signals

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():  # in a notebook's or a server's thread
            return self  # only the main thread may say what a signal does
        reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.pipe_before = signal.set_wakeup_fd(self.writer)
        threading.Thread(target=self.read, args=(reader,), daemon=True).start()
        # Without a handler there would be nothing to read. What was ignored at the start, as with nohup, stays ignored.
        self.before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS
                       if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *error: object) -> None:
        if not self.before:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.pipe_before)
        os.close(self.writer)  # this ends the thread

    def read(self, reader: int) -> None:
        """Ask for an end at each signal that comes through the pipe: this is what the thread does."""
        while number := os.read(reader, 1):
            if number[0] in SIGNALS:
                self.ask(SIGNALS[number[0]])
        os.close(reader)

    def ask(self, reason: str) -> None:
        now, is_interrupt = time.monotonic(), reason == 'SIGINT'
        if not self.has_begun or (is_interrupt and self.reason and now - self.since > AGAIN):
            os._exit(errors.INTERRUPTED if is_interrupt else errors.STOPPED)
        if not self.reason:
            self.reason, self.since = reason, now
            console.last_words(f'{reason}: saving after this step')

    def is_asked(self) -> bool:
        if not self.reason and time.monotonic() > self.end:
            self.reason = 'the end of max_hours'
        return self.has_begun and self.reason != ''
