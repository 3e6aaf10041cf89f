"""The log of a run, for people and their scripts: console, metrics.jsonl, samples.txt, status.json, loss.png, sinks."""
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, Self

import numpy as np
from tqdm import tqdm

from plaingpt import console, files, schema
from plaingpt.errors import DONE, STOPPED, code_of, drop, is_missing_package, missing_package
from plaingpt.run import report
from plaingpt.run.records import SAMPLE_HEADER, read_columns, row_of
from plaingpt.run.reference import Reference
from plaingpt.run.upload import Uploader, reason

NO_ROW = sys.maxsize  # the start of a row that is not in the file yet: beyond any end
UPLOAD_SECONDS = 60.0  # that the end of a run waits for uploads that are still under way
STATUS_ROOM = 4096  # bytes of status.json, taken at the start, so that it can still be written when the disk is full
STATUS_MESSAGE = 300  # characters: JSON may turn each into twelve bytes


# ------------------------------------------------------------------------------------------------
# Files


def drop_rows(path: Path, first_step: int) -> int:
    """Keep in metrics.jsonl (there may be none yet) only whole rows of steps before `first_step`, each step once.
    Return the last of these steps, or -1."""
    last = -1
    with files.written_whole(path) as new, open(path, 'a+b') as old:
        old.seek(0)
        for row in filter(None, map(row_of, old)):
            if last < row['step'] < first_step:  # steps rise: a step that is not beyond the last one is a repetition
                new.write(json.dumps(row).encode() + b'\n')
                last = row['step']
    return last


def drop_samples(path: Path, first_step: int) -> None:
    """Keep in samples.txt only the samples of steps before `first_step`."""
    if path.exists():
        text = path.read_bytes().decode('utf-8', errors='replace')
        later = (match.start() for match in SAMPLE_HEADER.finditer(text) if int(match[1]) >= first_step)
        with files.written_whole(path) as new:
            new.write(text[:next(later, len(text))].encode())


# ------------------------------------------------------------------------------------------------
# The log


class Pace:
    """The speed of a training. A token takes `flops` operations; the devices promise `peak` of them in a second, if
    that is known. Evaluating, logging and saving are not learning, and not counted."""

    def __init__(self, tokens_per_step: int, flops: int, peak: float | None) -> None:
        self.tokens_per_step, self.flops, self.peak = tokens_per_step, flops, peak
        self.seconds, self.started = list[float](), 0.0

    def begin(self) -> None:
        """Begin a step: what came before it, such as an evaluation, was not learning."""
        self.started = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def lap(self) -> dict[str, float]:
        """Return the mean of the steps since the last lap: ms of a step, tokens per second and, if the peak is known,
        the utilisation of the devices (Chowdhery et al. 2022: MFU)."""
        seconds = fmean(self.seconds)
        self.seconds.clear()
        speed = self.tokens_per_step / seconds
        utilisation = {'mfu': speed * self.flops / self.peak} if self.peak else {}
        return {'ms': 1000 * seconds, 'tokens_per_second': speed} | utilisation


class Sink(Protocol):
    """Another place for a run's numbers and samples, such as wandb."""

    def row(self, step: int, values: dict[str, float]) -> None:
        """Take the values of a step, now that they are complete."""

    def sample(self, step: int, text: str) -> None:
        """Take a text that the model wrote."""

    def close(self, exit_code: int) -> None:
        """Take the end of the run."""


@contextmanager
def expendable(say: Callable[[str], None], loss: str) -> Iterator[None]:
    """Do what a run can do without: an error in the block becomes one line, and the run continues."""
    try:
        yield
    except Exception as error:
        say(f'{loss}: {reason(missing_package(error) if is_missing_package(error) else error)}; the run continues')


class Log:
    """The log of a run, which every process calls alike; only the main one writes. Rows and samples that an interrupted
    run left in `out_dir`, of steps from `first_step` on, are dropped, so that each step occurs once. Without an
    out_dir it writes to the console only."""

    def __init__(self, out_dir: Path | None, is_main: bool, first_step: int, total_steps: int,
                 uploader: Uploader | None = None) -> None:
        self.is_main, self.first_step, self.total_steps = is_main, first_step, total_steps
        self.folder = out_dir if is_main else None  # None if this process writes no files
        self.sinks: dict[str, Sink] = {}
        self.bar: tqdm[Any] | None = None
        self.step, self.values, self.last_kept, self.row_start = -1, dict[str, float](), -1, NO_ROW
        self.reached = first_step  # the step of the last update, which need not have a row
        self.reference: Reference | None = None  # the curve of another run, to be drawn beside this one's
        self.uploader = uploader or Uploader('', self.line)
        self.on_closed: Callable[[str], None] | None = None  # called once the console no longer has a reader
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.last_kept = drop_rows(self.folder / 'metrics.jsonl', first_step)
            drop_samples(self.folder / 'samples.txt', first_step)

    def __enter__(self) -> Self:
        self.status('running', self.first_step, DONE)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Say in status.json and report.html how the run ended, and in the former also what was not uploaded."""
        code = code_of(error) if error else DONE
        message = (str(error) or type(error).__name__) if error else ''
        self.end(code, message)  # before the uploads, too: a scheduler may kill the process while it waits for them
        self.uploader.close(UPLOAD_SECONDS)
        self.end(code, message)
        self.close(code)
        self.report()

    # The sinks

    def add(self, name: str, start: Callable[[], Sink]) -> None:
        """Add a sink, if it can be started."""
        if self.is_main:
            with expendable(self.line, f'{name} is off'):
                self.sinks[name] = start()

    def tell(self, how: Callable[[Sink], None]) -> None:
        """Call `how` with each sink. One that fails stays off."""
        for name in list(self.sinks):
            sink = self.sinks.pop(name)
            with expendable(self.line, f'{name} is off'):
                how(sink)
                self.sinks[name] = sink  # only if it has not failed

    # The console

    def line(self, text: str) -> None:
        try:
            if self.is_main:
                console.say(text)
        except BrokenPipeError:
            if self.on_closed is None:
                raise
            drop(sys.stdout)  # or else each further line would fail, too
            self.on_closed('a closed output')

    def update(self, step: int, **shown: str) -> None:
        """Show in the progress bar of the training that `step` steps are done."""
        if self.is_main:
            if self.bar is None:
                self.bar = tqdm(total=self.total_steps, initial=self.first_step, unit=' steps', dynamic_ncols=True,
                                disable=None)  # None shows it on a terminal only
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    # Numbers and samples

    def iteration(self, step: int, row: dict[str, float], lap: dict[str, float]) -> None:
        """Log a step of the training: its row, its line, and the bar. `lap` is Pace's."""
        speed = lap['tokens_per_second']
        self.row(step, **row, **{name: value for name, value in lap.items() if name != 'ms'})
        self.line(console.iter_line(step, row['loss'], lap['ms'], lap.get('mfu'), row['lr'], row['grad_norm'], speed))
        self.update(step + 1, loss=f'{row["loss"]:.3f}', speed=f'{speed:,.0f} tok/s')

    def row(self, step: int, **values: float) -> None:
        """Add values to the row of `step`, which is written when a later one begins, at flush() and at close(). A row
        that an earlier run left stays: to evaluate a finished run again does not write its last step twice."""
        if self.is_main:
            assert step >= self.step, f'the row of step {step} comes after that of step {self.step}'
            if step > self.step:
                self.end_row()
            self.step = step
            self.values.update(values)

    def flush(self) -> None:
        """Write the row of the current step as far as it is known (it can still grow). This happens before a checkpoint
        is saved, so that no row is missing when a run continues from there."""
        if self.folder and self.values and self.step > self.last_kept:
            # JSON has neither NaN nor infinity: null takes their place.
            finite = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
            with files.appended(self.folder / 'metrics.jsonl') as file:
                self.row_start = min(self.row_start, file.tell())  # where an earlier flush of this row began
                file.truncate(self.row_start)
                file.write(json.dumps({'step': self.step, **finite}, allow_nan=False).encode() + b'\n')

    def end_row(self) -> None:
        """Write the row of the current step for good."""
        if self.values:
            self.flush()
            self.tell(lambda sink: sink.row(self.step, self.values))
            self.row_start, self.values = NO_ROW, {}

    def sample(self, step: int, text: str) -> None:
        """Give a text that the model wrote to the console, samples.txt and the sinks."""
        if self.folder:
            header = f'=== step {step} ===\n'
            self.line(header + text)
            body = re.sub('^(?==== step )', ' ', text, flags=re.MULTILINE)  # no sample can look like a header
            with files.appended(self.folder / 'samples.txt') as file:
                file.write(f'{header}{body}\n\n'.encode(errors='replace'))
            self.tell(lambda sink: sink.sample(step, text))

    def introduce(self, about: dict[str, Any], command: str, machine: str) -> None:
        """Write run.json, which report.html shows: what the run is, and each command that began or continued it."""
        if self.folder:
            path = self.folder / 'run.json'
            with expendable(self.line, f'{path} is not written'):
                before = files.read_json(path)
                starts = before['starts'] if schema.fits(before, report.ABOUT) else []
                starts = [start for start in starts if start['step'] < self.first_step]
                now = datetime.now(UTC).isoformat(timespec='seconds')
                starts.append({'step': self.first_step, 'time': now, 'command': command, 'machine': machine})
                with files.written_whole(path) as file:
                    file.write(json.dumps({**about, 'starts': starts}, indent=2).encode() + b'\n')

    def plot(self) -> None:
        """Draw report.html and loss.png from all rows of metrics.jsonl. A curve takes two rows, so the first step of a
        run does not wait for matplotlib. A picture that fails does not end a run."""
        self.flush()
        self.report()
        if not self.folder or (self.folder / 'metrics.jsonl').read_bytes().count(b'\n') < 2:
            return
        path = self.folder / 'loss.png'
        with expendable(self.line, f'{path} is not drawn'):
            # A notebook's backend may not be installed, and the picture needs none; the notebook may want it later.
            backend = os.environ.pop('MPLBACKEND', '')
            import matplotlib

            from plaingpt.run import plot

            with suppress(ValueError):
                matplotlib.rcParams.update({'backend': backend} if backend else {})
            columns = read_columns(self.folder / 'metrics.jsonl', plot.COLUMNS)
            if np.isfinite([columns['loss'], columns['val_loss']]).any():
                with files.written_whole(path) as file:
                    file.write(plot.draw(columns, os.path.basename(os.path.abspath(self.folder)), self.reference))

    def report(self) -> None:
        """Write report.html, once there is something to report."""
        if self.folder:
            rows = self.folder / 'metrics.jsonl'
            with expendable(self.line, f'{self.folder / "report.html"} is not drawn'):
                if rows.is_file() and rows.stat().st_size:
                    report.write(self.folder)

    # The end

    def status(self, state: str, step: int, exit_code: int, message: str = '') -> None:
        """Write status.json, which schedulers read. A full disk does not hide the error that is being reported."""
        fields = {'state': state, 'step': step, 'exit_code': exit_code, 'message': message[:STATUS_MESSAGE],
                  'time': datetime.now(UTC).isoformat(timespec='seconds'), 'not_uploaded': self.uploader.missing}
        if self.folder:
            path = self.folder / 'status.json'
            with expendable(self.line, f'{path} is not written'):
                files.overwrite(path, json.dumps(fields).encode(), STATUS_ROOM)

    def end(self, code: int, message: str) -> None:
        state = {DONE: 'done', STOPPED: 'stopped'}.get(code, 'failed')
        self.status(state, max(self.step, self.reached), code, message)

    def close(self, exit_code: int = DONE) -> None:
        """Write the last row, and end the bar and the sinks. A second call does nothing."""
        try:
            if self.bar is not None:
                self.bar.close()
            self.end_row()
        finally:
            self.tell(lambda sink: sink.close(exit_code))
            self.sinks.clear()
