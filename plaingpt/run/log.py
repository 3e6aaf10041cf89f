"""What a run leaves for people: console, metrics.jsonl, samples.txt, status.json, loss.png, wandb when asked for."""
import json
import math
import os
import re
import secrets
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from plaingpt import console, files
from plaingpt.errors import DONE, STOPPED, code_of, drop_output

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

    from plaingpt.run.upload import Uploader

T = TypeVar('T')

NO_ROW = sys.maxsize  # where a row begins in the file that is not in it yet
UPLOAD_SECONDS = 60.0  # that the end of a run waits for what is still on its way elsewhere
SAMPLE_HEADER = re.compile(r'^=== step (\d+) ===\n', re.MULTILINE)
SECRET = re.compile(r'key|secret|password|token(?!s|iz)', re.IGNORECASE)  # in the name of a setting


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line of metrics.jsonl holds; None for one that was torn by a kill or a full disk."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get('step'), int) else None


def drop_rows(path: str, first_step: int) -> int:
    """Leave in metrics.jsonl (there may be none yet) the whole rows of steps before `first_step`, each step once.
    The last of these steps, or -1."""
    last = -1
    with files.written_whole(path) as new, open(path, 'a+b') as old:
        old.seek(0)
        for line in old:
            row = row_of(line)
            if row is not None and last < row['step'] < first_step:
                new.write(line.rstrip(b'\n') + b'\n')
                last = row['step']
    return last


def drop_samples(path: str, first_step: int) -> None:
    """Leave in samples.txt the samples of steps before `first_step`."""
    if not os.path.exists(path):
        return
    with open(path, encoding='utf-8', errors='replace', newline='') as file:
        text = file.read()
    later = (match.start() for match in SAMPLE_HEADER.finditer(text) if int(match[1]) >= first_step)
    with files.written_whole(path) as new:
        new.write(text[: next(later, len(text))].encode())


def json_row(step: int, values: dict[str, float]) -> bytes:
    """One line of metrics.jsonl. JSON has no NaN and no infinity: null."""
    numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return json.dumps({'step': step, **finite}, allow_nan=False).encode() + b'\n'


def read_columns(path: str, names: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """The columns of metrics.jsonl as arrays of the same length, NaN where a row has no such value."""
    columns = {name: array('d') for name in names}
    with open(path, 'rb') as file:
        for row in filter(None, map(row_of, file)):
            for name, column in columns.items():
                value = row.get(name)
                column.append(math.nan if value is None else value)
    return {name: np.array(column) for name, column in columns.items()}


def start_wandb(project: str, name: str, run_id: str, out_dir: str, settings: dict[str, Any]) -> 'Run':
    """The wandb run `run_id`, begun or continued. Never asks for a key. Raises whatever stands in the way."""
    import wandb

    if wandb.setup().settings.mode == 'online' and not wandb.login(prompt=False):
        raise RuntimeError('there is no API key (run `wandb login`, or set WANDB_MODE=offline)')
    run = wandb.init(
        project=project,
        name=name or None,
        id=run_id,
        resume='allow',
        dir=os.environ.get('WANDB_DIR', out_dir),
        config={setting: value for setting, value in settings.items() if not SECRET.search(setting)},
        allow_val_change=True,
    )
    # Our own x axis: a resumed run repeats steps, and wandb refuses its own `step` going back.
    run.define_metric('iter')
    run.define_metric('*', step_metric='iter')
    run.define_metric('val/loss', step_metric='iter', summary='min')
    return run


def wandb_row(step: int, values: dict[str, float]) -> dict[str, float]:
    """A row under nanoGPT's names: iter, train/loss, val/loss, lr, mfu in percent; the rest likewise."""
    named: dict[str, float] = {'iter': step}
    for name, value in values.items():
        if name == 'mfu':
            named['mfu'] = 100 * value
        elif name.startswith('val_'):
            named[f'val/{name.removeprefix("val_")}'] = value
        else:
            named[{'loss': 'train/loss', 'train_loss': 'train/loss_evaluated'}.get(name, name)] = value
    return named


class Expendable:
    """What a run can do without: an error in there becomes one line, and the run goes on."""

    def __init__(self, say: Callable[[str], None], loss: str) -> None:
        self.say, self.loss = say, loss

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition('.')[0]
            reason = f'{package} is missing (pip install {package})'
        self.say(f'{self.loss}: {reason}; the run goes on')
        return True


class Logger:
    """Called alike by every process; only the main one writes. Rows and samples of steps from `first_step` on, which an
    interrupted run left in `out_dir`, are dropped, so that each step stands there once. Without an out_dir it writes
    to the console only."""

    def __init__(
        self,
        out_dir: str,
        is_main: bool,
        first_step: int,
        total_steps: int,
        wandb_project: str = '', wandb_run_name: str = '', wandb_run_id: str = '',
        settings: dict[str, Any] | None = None,
        uploader: 'Uploader | None' = None,
    ) -> None:
        self.out_dir, self.is_main, self.first_step, self.total_steps = out_dir, is_main, first_step, total_steps
        self.wandb_run_id = wandb_run_id or (secrets.token_hex(4) if wandb_project else '')
        self.wandb: Run | None = None
        self.bar: tqdm[Any] | None = None
        self.has_bars = is_main and sys.stderr.isatty()
        self.step, self.values, self.last_kept, self.row_start = -1, dict[str, float](), -1, NO_ROW
        self.exit_code, self.uploader = 0, uploader
        self.on_closed: Callable[[str], None] | None = None  # who is told that nobody reads the console any more
        self.writes = is_main and out_dir != ''
        if self.writes:
            os.makedirs(out_dir, exist_ok=True)
            self.last_kept = drop_rows(self.path('metrics.jsonl'), first_step)
            drop_samples(self.path('samples.txt'), first_step)
        if is_main and wandb_project:
            with Expendable(self.line, 'wandb is off'):
                self.wandb = start_wandb(wandb_project, wandb_run_name, self.wandb_run_id, out_dir, settings or {})

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

    def end(self, code: int, message: str) -> None:
        state = {DONE: 'done', STOPPED: 'stopped'}.get(code, 'failed')
        self.status(state, max(self.step, self.first_step), code, message)

    def path(self, name: str) -> str:
        return os.path.join(self.out_dir, name)

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
        if self.writes and self.values and self.step > self.last_kept:
            with open(self.path('metrics.jsonl'), 'ab') as file:
                if self.row_start < file.tell():
                    file.truncate(self.row_start)
                self.row_start = os.fstat(file.fileno()).st_size
                file.write(json_row(self.step, self.values))

    def end_row(self) -> None:
        """Write the row of the current step for good."""
        if self.values:
            self.flush()
            self.log_to_wandb(wandb_row(self.step, self.values))
            self.row_start, self.values = NO_ROW, {}

    def update(self, step: int, **shown: str) -> None:
        """The bar of the training: `step` steps are done."""
        if not self.has_bars:
            return
        if self.bar is None:
            self.bar = tqdm(total=self.total_steps, initial=self.first_step, unit=' steps', dynamic_ncols=True)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def progress(self, items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
        """`items`, with their progress."""
        return console.progress(items, total, label, unit, say=self.line)

    def sample(self, step: int, text: str) -> None:
        """A text that the model wrote, to console, samples.txt and wandb."""
        if not self.writes:
            return
        header = f'=== step {step} ===\n'
        self.line(header + text)
        body = re.sub('^(?==== step )', ' ', text, flags=re.MULTILINE)  # no sample can look like a header
        with open(self.path('samples.txt'), 'a', encoding='utf-8', errors='replace', newline='') as file:
            file.write(f'{header}{body}\n\n')
        self.log_to_wandb({'iter': step}, text)

    def plot(self) -> None:
        """Draw loss.png from all rows of metrics.jsonl. A picture that fails does not end a run."""
        if not self.writes:
            return
        self.flush()
        with Expendable(self.line, f'{self.path("loss.png")} is not drawn'):
            from plaingpt.run import plot

            columns = read_columns(self.path('metrics.jsonl'), plot.COLUMNS)
            if np.isfinite([columns['loss'], columns['val_loss']]).any():
                picture = plot.draw(columns, os.path.basename(os.path.abspath(self.out_dir)))
                with files.written_whole(self.path('loss.png')) as file:
                    file.write(picture)

    def status(self, state: str, step: int, exit_code: int, message: str = '') -> None:
        """status.json: what a scheduler asks. A full disk does not hide the error that is being reported."""
        self.exit_code = exit_code
        if not self.writes:
            return
        now = datetime.now(UTC).isoformat(timespec='seconds')
        fields = {'state': state, 'step': step, 'exit_code': exit_code, 'message': message, 'time': now,
                  'not_uploaded': self.uploader.missing if self.uploader else []}
        path = self.path('status.json')
        with Expendable(self.line, f'{path} is not written'), files.written_whole(path) as file:
            file.write(json.dumps(fields).encode() + b'\n')

    def log_to_wandb(self, values: dict[str, Any], sample: str | None = None) -> None:
        """Once wandb has failed it stays off."""
        run, self.wandb = self.wandb, None
        if run is None:
            return
        with Expendable(self.line, 'wandb is off'):
            if sample is not None:
                import wandb

                values['sample'] = wandb.Table(columns=['iter', 'text'], data=[[values['iter'], sample]])
            run.log(values)
            self.wandb = run

    def close(self) -> None:
        """The last row, the bar's last state, wandb's end. A second call does nothing."""
        try:
            if self.bar is not None:
                self.bar.close()
            self.end_row()
        finally:
            run, self.wandb = self.wandb, None
            if run is not None:
                with Expendable(self.line, 'wandb did not end well'):
                    run.finish(exit_code=self.exit_code)
