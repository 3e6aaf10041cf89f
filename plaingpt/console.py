"""The console: the only place that prints. Its lines are for people and their scripts, and steer no terminal."""
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar('T')

RANKS = ('RANK', 'OMPI_COMM_WORLD_RANK', 'SLURM_PROCID')  # in which torchrun, mpirun and srun number processes
PLAIN_SECONDS = 10.0  # between two lines of progress if there is no terminal
# Characters that may steer a terminal, or show those of a line in another order
CONTROL = re.compile(r'\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')
LONGEST = 1000  # characters in a line of a message: it may be a command with long paths


def iter_line(
    step: int, loss: float, ms: float, mfu: float | None, lr: float, norm: float | None, tokens_per_second: float
) -> str:
    """Return nanoGPT's line, which people's scripts parse, and after it what nanoGPT's lacks. mfu is a fraction; None
    leaves it out."""
    parts = [f'iter {step}: loss {loss:.4f}', f'time {ms:.2f}ms']
    if mfu is not None:
        parts.append(f'mfu {100 * mfu:.2f}%')
    parts.append(f'lr {lr:.2e}')
    if norm is not None:
        parts.append(f'norm {norm:.4f}')
    return ', '.join([*parts, f'tok/s {tokens_per_second:.0f}'])


def parameter_lines(groups: Iterable[dict[str, Any]]) -> str:
    """Return nanoGPT's lines on the weights that an optimizer updates, in any number of groups."""
    sizes: dict[bool, list[int]] = {True: [], False: []}  # of parameters that decay, and of others
    by_muon = 0
    for group in groups:
        sizes[group['weight_decay'] > 0] += [p.numel() for p in group['params']]
        by_muon += len(group['params']) if 'parts' in group else 0
    lines = [f'number of parameters: {sum(map(sum, sizes.values())) / 1e6:.2f}M']
    for decays, kind in ((True, 'decayed'), (False, 'non-decayed')):
        lines.append(f'num {kind} parameter tensors: {len(sizes[decays])}, with {sum(sizes[decays]):,} parameters')
    muon = [f'using Muon: True, for {by_muon} of these tensors'] if by_muon else []
    return '\n'.join([*lines, *muon, 'using fused AdamW: True'])


def step_line(step: int, train_loss: float, val_loss: float) -> str:
    """Return nanoGPT's line for an evaluation."""
    return f'step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}'


def short(number: float) -> str:
    """Return 1234567 as 1.23M: three digits, so that it fits into a bar and under an axis."""
    for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(number) >= 0.9995 * size:
            return f'{number / size:.3g}{letter}'
    return f'{number:.3g}'


def size(n: float) -> str:
    """Return a number of bytes in units that are powers of ten."""
    for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
        if n >= unit:
            return f'{n / unit:.3g} {name}' if n < 999.5 * unit else f'{n / unit:,.0f} {name}'
    return f'{n:.0f} B'


def duration(seconds: float) -> str:
    """Return a time in minutes or hours, rounded as an estimate may be."""
    if seconds < 3600:
        return f'{seconds / 60:.0f} min' if seconds >= 60 else '< 1 min'
    return f'{seconds / 3600:,.1f} h' if seconds < 360_000 else f'{seconds / 3600:,.0f} h'


def is_main() -> bool:
    """Return whether this is the first of the processes that a launcher started, which speaks for all."""
    return next((os.environ[name] for name in RANKS if name in os.environ), '0') == '0'


def say(text: str) -> None:
    """Print a line above the bars, in the main process only."""
    if is_main():
        with tqdm.external_write_mode(sys.stdout):
            write(f'{shown(text)}\n', sys.stdout)


def note(text: str) -> None:
    """Print a line to stderr, in every process."""
    with tqdm.external_write_mode(sys.stderr):
        write(f'{shown(text)}\n', sys.stderr)


def note_traceback(*error: Any) -> None:
    """Print an error that no code expected, in place of sys.excepthook: it may quote a file, and that may steer the
    terminal."""
    note(''.join(traceback.format_exception(*error)).rstrip())


def last_words(text: str) -> None:
    """Write a line to stderr from a thread, past locks and buffers that the main thread may hold."""
    with suppress(OSError):  # its reader may have got the same signal
        os.write(sys.stderr.fileno(), printable(f'{text}\n').encode())


def write(text: str, to: TextIO | None) -> None:
    """Write what this console can show; nothing if it is closed. Raise BrokenPipeError if it no longer has a reader."""
    if to is not None:
        put(printable(text, to.encoding or 'utf-8'), to)


def put(text: str, to: TextIO) -> None:
    """Write a text that may steer the terminal on purpose."""
    try:
        to.write(text)
        to.flush()
    except OSError as error:
        raise BrokenPipeError(*error.args) if error.errno == errno.EIO else error from None  # a closed terminal


def say_shaded(parts: Iterable[tuple[str, int | None]]) -> None:
    """Print texts one after the other in black, each on the background that has its number among a terminal's 256
    colours; in plain letters if stdout is not a terminal, or the user wants no colours (no-color.org)."""
    has_colours = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
    for text, colour in (*parts, ('\n', None)):
        text = printable(text, sys.stdout.encoding)
        if has_colours and colour is not None:
            before, after = f'\x1b[38;5;16;48;5;{colour}m', '\x1b[0m'
            # each line ends its own colour, which would otherwise reach to the edge of the terminal
            text = before + text.replace('\n', f'{after}\n{before}') + after
        put(text, sys.stdout)


def printable(text: str, encoding: str = 'utf-8') -> str:
    """Return `text` with escapes, such as \\x1b, for what may steer a terminal, and for what the encoding lacks."""
    text = CONTROL.sub(escaped, text)
    return text.encode(encoding, 'backslashreplace').decode(encoding)


def escaped(match: re.Match[str]) -> str:
    return match[0].encode('unicode_escape').decode()


def shown(text: str) -> str:
    """Return `text` with *** for what is secret in its URLs: user:password@, and signatures in a query."""
    return re.sub(r'\S+', shown_word, text)


def shown_word(match: re.Match[str]) -> str:
    """Return what `shown` makes of one word; it works word by word, so that no text takes long."""
    scheme, colon, rest = match[0].partition('://')
    rest, mark, query = rest.partition('?')
    urls = [re.sub(r'^[^/]*@', '***@', url) for url in rest.split('://')]  # of several that are chained with ::
    end = query[len(query.rstrip('\'").,:;')):]
    return scheme + colon + '://'.join(urls) + (f'?***{end}' if mark else '')


def message(text: str) -> str:
    """Return `text` in the form of a message, whatever a file or a name brought into it: at most three lines, none of
    them long, and nothing secret."""
    lines = shown(text).split('\n')
    kept = lines if len(lines) <= 3 else [*lines[:2], lines[-1]]
    return '\n'.join(line if len(line) <= LONGEST else f'{line[:LONGEST // 2]} ... {line[-LONGEST // 2:]}'
                     for line in kept)


class Progress(AbstractContextManager['Progress']):
    """The progress of long work, shown by the main process: a bar on a terminal, elsewhere a line every PLAIN_SECONDS,
    and the first of either after `delay` seconds. The time left is estimated from the work since the first update."""

    def __init__(self, total: int, label: str, unit: str, delay: float = 0.0, say: Callable[[str], None] = say) -> None:
        self.total, self.label, self.unit, self.say = total, label, unit, say
        self.bar = tqdm(total=total, desc=label, bar_format='{percentage:3.0f}%|{bar}| {desc}', leave=False,
                        dynamic_ncols=True, delay=delay, disable=not (is_main() and sys.stderr.isatty()))
        self.due = time.monotonic() + max(delay, PLAIN_SECONDS)
        self.begun: tuple[float, float] | None = None  # when the first update came, and how much was done by then

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, done: float, note: str = '') -> None:
        """Say, if a line is due, how much of the total is done, and the note."""
        now = time.monotonic()
        self.begun = self.begun or (now, done)
        seconds, new = now - self.begun[0], done - self.begun[1]
        left = f'about {tqdm.format_interval(seconds / new * (self.total - done))}' if new else 'unknown time'
        time_spent = f'{tqdm.format_interval(seconds)} so far, {left} to go'
        parts = [f'{self.label}: {round(done, 2):,}/{self.total:,} {self.unit}', note, time_spent]
        text = ', '.join(part for part in parts if part)
        if not self.bar.disable:
            self.bar.set_description_str(printable(text), refresh=False)
            self.bar.update(done - self.bar.n)
        elif now >= self.due:
            self.due = now + PLAIN_SECONDS
            self.say(text)


def progress(items: Iterable[T], total: int, label: str, unit: str, delay: float = 0.0,
             say: Callable[[str], None] = say) -> Iterator[T]:
    """Yield all `total` of the `items`, and show the progress."""
    with Progress(total, label, unit, delay, say) as shown:
        for done, item in enumerate(items):
            shown.update(done)
            yield item
