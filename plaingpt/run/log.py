"""What a run leaves for people and their scripts: console, metrics.jsonl, samples.txt, status.json, loss.png, sinks."""
import json
import math
import os
import re
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from plaingpt import console, files
from plaingpt.errors import DONE, STOPPED, code_of, drop_output, is_missing_package, missing_package
from plaingpt.run.upload import Uploader

NO_ROW = sys.maxsize  # where a row begins in the file that is not in it yet
UPLOAD_SECONDS = 60.0  # that the end of a run waits for what is still on its way elsewhere
SAMPLE_HEADER = re.compile(r'^=== step (\d+) ===\n', re.MULTILINE)


# ------------------------------------------------------------------------------------------------
# Files


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line of metrics.jsonl holds; None for one that was torn by a kill or a full disk."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get('step'), int) else None


def drop_rows(path: Path, first_step: int) -> int:
    """Leave in metrics.jsonl (there may be none yet) the whole rows of steps before `first_step`, each step once.
    Return the last of these steps, or -1."""
    last = -1
    with files.written_whole(path) as new, open(path, 'a+b') as old:
        old.seek(0)
        for line in old:
            row = row_of(line)
            if row is not None and last < row['step'] < first_step:
                new.write(line.rstrip(b'\n') + b'\n')
                last = row['step']
    return last


def drop_samples(path: Path, first_step: int) -> None:
    """Leave in samples.txt the samples of steps before `first_step`."""
    if not path.exists():
        return
    text = path.read_bytes().decode('utf-8', errors='replace')
    later = (match.start() for match in SAMPLE_HEADER.finditer(text) if int(match[1]) >= first_step)
    with files.written_whole(path) as new:
        new.write(text[:next(later, len(text))].encode())


def json_row(step: int, values: dict[str, float]) -> bytes:
    """One line of metrics.jsonl. JSON has no NaN and no infinity: null."""
    numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return json.dumps({'step': step, **finite}, allow_nan=False).encode() + b'\n'


def read_columns(path: Path, names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """The columns of metrics.jsonl as arrays of the same length, NaN where a row has no such value."""
    columns = {name: array('d') for name in names}
    with open(path, 'rb') as file:
        for row in filter(None, map(row_of, file)):
            for name, column in columns.items():
                value = row.get(name)
                column.append(math.nan if value is None else value)
    return {name: np.array(column) for name, column in columns.items()}


# ------------------------------------------------------------------------------------------------
# The log


class Pace:
    """How fast a training is. A token takes `flops`; the devices promise `peak` of them in a second, if that is
    known."""

    def __init__(self, tokens_per_step: int, flops: int, peak: float | None) -> None:
        self.tokens_per_step, self.flops, self.peak = tokens_per_step, flops, peak
        self.seconds, self.steps, self.started = 0.0, 0, 0.0

    def begin(self) -> None:
        """A step begins: what came before it, such as an evaluation, was not learning."""
        self.started = time.perf_counter()

    def end(self) -> None:
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def lap(self) -> dict[str, float]:
        """The mean of the steps since the last lap: ms of a step, tokens per second and, where it is known, the
        utilisation of the devices (Chowdhery et al. 2022: MFU)."""
        seconds = self.seconds / self.steps
        self.seconds, self.steps = 0.0, 0
        speed = self.tokens_per_step / seconds
        lap = {'ms': 1000 * seconds, 'tokens_per_second': speed}
        return lap | {'mfu': speed * self.flops / self.peak} if self.peak else lap


class Sink(Protocol):
    """Another place for a run's numbers and samples, such as wandb."""

    def row(self, step: int, values: dict[str, float]) -> None: ...

    def sample(self, step: int, text: str) -> None: ...

    def close(self, exit_code: int) -> None: ...


class Expendable:
    """What a run can do without: an error in there becomes one line, and the run goes on."""

    def __init__(self, say: Callable[[str], None], loss: str) -> None:
        self.say, self.loss = say, loss

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        shown = missing_package(error) if is_missing_package(error) else error
        reason = (str(shown).splitlines() or [type(error).__name__])[0]
        self.say(f'{self.loss}: {reason}; the run goes on')
        return True


class Log:
    """Called alike by every process; only the main one writes. Rows and samples of steps from `first_step` on, which an
    interrupted run left in `out_dir`, are dropped, so that each step stands there once. Without an out_dir it writes
    to the console only."""

    def __init__(self, out_dir: Path | None, is_main: bool, first_step: int, total_steps: int,
                 uploader: Uploader | None = None) -> None:
        self.is_main, self.first_step, self.total_steps = is_main, first_step, total_steps
        self.folder = out_dir if is_main else None  # that of the files, if this process writes any
        self.sinks: dict[str, Sink] = {}
        self.bar: tqdm[Any] | None = None
        self.step, self.values, self.last_kept, self.row_start = -1, dict[str, float](), -1, NO_ROW
        self.exit_code = DONE
        self.uploader = uploader
        self.on_closed: Callable[[str], None] | None = None  # who is told that nobody reads the console any more
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.last_kept = drop_rows(self.folder / 'metrics.jsonl', first_step)
            drop_samples(self.folder / 'samples.txt', first_step)

    def __enter__(self) -> Self:
        self.status('running', self.first_step, DONE)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """status.json says how the run ended, and what was not uploaded."""
        code = code_of(error) if error else DONE
        message = (str(error) or type(error).__name__) if error else ''
        self.end(code, message)
        if self.uploader:
            self.uploader.close(UPLOAD_SECONDS)
            self.end(code, message)
        self.close()

    # The sinks

    def add(self, name: str, start: Callable[[], Sink]) -> None:
        """One more of them, if it can be started."""
        if self.is_main:
            with Expendable(self.line, f'{name} is off'):
                self.sinks[name] = start()

    def tell(self, how: Callable[[Sink], None]) -> None:
        """Call each of them. One that fails stays off."""
        for name in list(self.sinks):
            sink = self.sinks.pop(name)
            with Expendable(self.line, f'{name} is off'):
                how(sink)
                self.sinks[name] = sink

    # The console

    def line(self, text: str) -> None:
        if not self.is_main:
            return
        try:
            console.say(text)
        except BrokenPipeError:
            if self.on_closed is None:
                raise
            drop_output()
            self.on_closed('a closed output')

    def update(self, step: int, **shown: str) -> None:
        """The bar of the training: `step` steps are done."""
        if not (self.is_main and sys.stderr.isatty()):
            return
        if self.bar is None:
            self.bar = tqdm(total=self.total_steps, initial=self.first_step, unit=' steps', dynamic_ncols=True)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    # Numbers and samples

    def iteration(self, step: int, row: dict[str, float], lap: dict[str, float]) -> None:
        """A step of the training: its row, its line, and the bar. `lap` is Pace's."""
        speed, mfu = lap['tokens_per_second'], lap.get('mfu')
        self.row(step, **row, **{name: value for name, value in lap.items() if name != 'ms'})
        self.line(console.iter_line(step, row['loss'], lap['ms'], mfu, row['lr'], row['grad_norm'], speed))
        self.update(step + 1, loss=f'{row["loss"]:.3f}', speed=f'{speed:,.0f} tok/s')

    def row(self, step: int, **values: float) -> None:
        """Add values to the row of `step`, which is written when a later one begins, at flush() and at close(). What an
        earlier run left stays: to look at a finished run again does not write its last step twice."""
        if not self.is_main:
            return
        assert step >= self.step, f'the row of step {step} comes after that of step {self.step}'
        if step > self.step:
            self.end_row()
        self.step = step
        self.values.update(values)

    def flush(self) -> None:
        """Write the row of the current step as far as it is known (it can still grow): before a checkpoint is saved, so
        that no row is missing when a run goes on from there."""
        if self.folder and self.values and self.step > self.last_kept:
            with open(self.folder / 'metrics.jsonl', 'ab') as file:
                if self.row_start < file.tell():
                    file.truncate(self.row_start)
                self.row_start = os.fstat(file.fileno()).st_size
                file.write(json_row(self.step, self.values))

    def end_row(self) -> None:
        """Write the row of the current step for good."""
        if self.values:
            self.flush()
            step, values = self.step, self.values
            self.tell(lambda sink: sink.row(step, values))
            self.row_start, self.values = NO_ROW, {}

    def sample(self, step: int, text: str) -> None:
        """A text that the model wrote, to console, samples.txt and the sinks."""
        if not self.folder:
            return
        header = f'=== step {step} ===\n'
        self.line(header + text)
        body = re.sub('^(?==== step )', ' ', text, flags=re.MULTILINE)  # no sample can look like a header
        with open(self.folder / 'samples.txt', 'a', encoding='utf-8', errors='replace', newline='') as file:
            file.write(f'{header}{body}\n\n')
        self.tell(lambda sink: sink.sample(step, text))

    def plot(self) -> None:
        """Draw loss.png from all rows of metrics.jsonl, of which a curve takes two: so the first step of a run does not
        wait for matplotlib. A picture that fails does not end a run."""
        if not self.folder:
            return
        self.flush()
        rows, path = self.folder / 'metrics.jsonl', self.folder / 'loss.png'
        if rows.read_bytes().count(b'\n') < 2:
            return
        with Expendable(self.line, f'{path} is not drawn'):
            from plaingpt.run import plot

            columns = read_columns(rows, plot.COLUMNS)
            if np.isfinite([columns['loss'], columns['val_loss']]).any():
                picture = plot.draw(columns, os.path.basename(os.path.abspath(self.folder)))
                with files.written_whole(path) as file:
                    file.write(picture)

    # The end

    def status(self, state: str, step: int, exit_code: int, message: str = '') -> None:
        """status.json: what a scheduler asks. A full disk does not hide the error that is being reported."""
        self.exit_code = exit_code
        if not self.folder:
            return
        now = datetime.now(UTC).isoformat(timespec='seconds')
        fields = {'state': state, 'step': step, 'exit_code': exit_code, 'message': message, 'time': now,
                  'not_uploaded': self.uploader.missing if self.uploader else []}
        path = self.folder / 'status.json'
        with Expendable(self.line, f'{path} is not written'), files.written_whole(path) as file:
            file.write(json.dumps(fields).encode() + b'\n')

    def end(self, code: int, message: str) -> None:
        state = {DONE: 'done', STOPPED: 'stopped'}.get(code, 'failed')
        self.status(state, max(self.step, self.first_step), code, message)

    def close(self) -> None:
        """The last row, the bar's last state, the sinks' end. A second call does nothing."""
        try:
            if self.bar is not None:
                self.bar.close()
            self.end_row()
        finally:
            self.tell(lambda sink: sink.close(self.exit_code))
            self.sinks.clear()
