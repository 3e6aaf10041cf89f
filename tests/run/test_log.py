"""The files and output of a run: real files, a real pseudo-terminal, a killed process, and wandb itself."""
import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from plaingpt import console
from plaingpt.errors import DATA, UserError, python
from plaingpt.machines.device import peak_flops, peak_memory
from plaingpt.run.log import Log
from plaingpt.run.wandb import Wandb
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]


def open_logger(folder: Path, first_step: int = 0) -> Log:
    return Log(folder, is_main=True, first_step=first_step, total_steps=100)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, read as strictly as any JSON reader may."""
    def refuse(name: str) -> None:
        raise AssertionError(f'{name} is no JSON')

    lines = (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_of(folder: Path) -> list[int]:
    return [row['step'] for row in rows_of(folder)]


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_rows_of_a_killed_and_resumed_run_appear_once(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from plaingpt.run.log import Log
log = Log(Path({str(tmp_path)!r}), True, 0, 10**9)
for step in range(10**9):
    log.row(step, loss=1.0)
    print(step, flush=True)
"""
    with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        while int(killed.stdout.readline()) < 50:
            pass
        os.kill(killed.pid, signal.SIGKILL)
    left = steps_of(tmp_path)
    assert left == list(range(len(left))) and len(left) >= 50

    with open_logger(tmp_path, first_step=30) as resumed:
        for step in range(30, 60):
            resumed.row(step, loss=2.0)
    assert steps_of(tmp_path) == list(range(60))
    assert [row['loss'] for row in rows_of(tmp_path)] == [1.0] * 30 + [2.0] * 30


def test_a_last_row_that_was_torn_anywhere_is_dropped(tmp_path: Path) -> None:
    whole = b'{"step": 0, "loss": 3.5}\n{"step": 1, "loss": 2.5}\n'
    row = b'{"step": 2, "loss": 1.5}'
    for cut in range(len(row)):
        (tmp_path / 'metrics.jsonl').write_bytes(whole + row[:cut])
        open_logger(tmp_path, first_step=100).close()
        assert (tmp_path / 'metrics.jsonl').read_bytes() == whole
    (tmp_path / 'metrics.jsonl').write_bytes(whole + row)
    open_logger(tmp_path, first_step=100).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes() == whole + row + b'\n'


def test_what_is_not_a_number_stays_json(tmp_path: Path) -> None:
    with open_logger(tmp_path) as log:
        log.row(0, loss=math.nan, lr=math.inf, grad_norm=-math.inf, val_loss=np.float64(0.5), tokens=10**15)
    assert rows_of(tmp_path) == [
        {'step': 0, 'loss': None, 'lr': None, 'grad_norm': None, 'val_loss': 0.5, 'tokens': 10**15},
    ]


def test_a_row_grows_until_the_next_begins_even_after_it_was_written(tmp_path: Path) -> None:
    log = open_logger(tmp_path)
    log.row(0, val_loss=3.0)
    log.flush()
    assert rows_of(tmp_path) == [{'step': 0, 'val_loss': 3.0}]
    log.row(0, loss=4.0)
    log.row(1, loss=2.0)
    assert rows_of(tmp_path) == [{'step': 0, 'val_loss': 3.0, 'loss': 4.0}]
    log.flush()
    log.row(1, lr=0.5)
    log.flush()
    log.close()
    log.close()
    assert rows_of(tmp_path) == [{'step': 0, 'val_loss': 3.0, 'loss': 4.0}, {'step': 1, 'loss': 2.0, 'lr': 0.5}]
    with pytest.raises(AssertionError, match='step 0'):
        log.row(0, loss=1.0)


def test_looking_at_a_finished_run_leaves_its_rows_as_they_are(tmp_path: Path) -> None:
    with open_logger(tmp_path) as log:
        log.row(7, loss=1.0)
    with open_logger(tmp_path, first_step=8) as log:
        log.row(7, val_loss=5.0)
    assert rows_of(tmp_path) == [{'step': 7, 'loss': 1.0}]


def test_a_process_that_is_not_the_main_one_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, False, 0, 10) as log:
        log.add('wandb', lambda: Wandb('p', '', 'abc', str(tmp_path), {}))
        log.row(1, loss=1.0)
        log.row(0, loss=1.0)
        log.flush()
        log.line('text')
        log.update(1, loss='1.0')
        log.sample(1, 'text')
        log.plot()
        log.status('running', 1, 0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ('', '')


# ------------------------------------------------------------------------------------------------ samples and status


def test_samples_of_a_resumed_run_appear_once_whatever_the_model_wrote(tmp_path: Path) -> None:
    with open_logger(tmp_path) as log:
        log.sample(0, 'noise \x00\r\x1b[2J é')
        log.sample(10, 'a\n=== step 5 ===\nb')
        log.sample(20, 'lost')
    kept = '=== step 0 ===\nnoise \x00\r\x1b[2J é\n\n=== step 10 ===\na\n === step 5 ===\nb\n\n'
    with open_logger(tmp_path, first_step=15) as log:
        assert (tmp_path / 'samples.txt').read_bytes().decode() == kept
        log.sample(20, 'new')
    assert (tmp_path / 'samples.txt').read_bytes().decode() == kept + '=== step 20 ===\nnew\n\n'


def test_no_sample_steers_the_terminal_or_breaks_a_narrow_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(console, encoding='ascii'))
    open_logger(tmp_path).sample(3, 'é\x1b[2J\x07\ttab\r\nend')
    assert console.getvalue() == b'=== step 3 ===\n\\xe9\\x1b[2J\\x07\ttab\r\nend\n'


def test_status_says_how_the_run_ended(tmp_path: Path) -> None:
    def status() -> dict[str, Any]:
        fields = json.loads((tmp_path / 'status.json').read_text(encoding='utf-8'))
        assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', fields.pop('time'))
        return dict(fields)

    with open_logger(tmp_path) as log:
        log.row(4, loss=1.0)
        log.status('running', 4, 0)
        assert status() == {'state': 'running', 'step': 4, 'exit_code': 0, 'message': '', 'not_uploaded': []}
    assert status() == {'state': 'done', 'step': 4, 'exit_code': 0, 'message': '', 'not_uploaded': []}
    with pytest.raises(UserError), open_logger(tmp_path) as log:
        raise UserError('no train.bin', DATA)
    assert status() == {'state': 'failed', 'step': 0, 'exit_code': DATA, 'message': 'no train.bin',
                        'not_uploaded': []}
    assert sorted(path.name for path in tmp_path.iterdir()) == ['metrics.jsonl', 'report.html', 'status.json']


# ------------------------------------------------------------------------------------------------ the console


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Put stdout and stderr on a pseudo-terminal of 100 columns. Yield a function that reads what was written since its
    last call."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ('pty', 'fcntl', 'termios'))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, b'\x18\x00\x64\x00\x00\x00\x00\x00')
    os.set_blocking(master, False)

    def read() -> str:
        chunks = []
        with suppress(BlockingIOError):
            while True:
                chunks.append(os.read(master, 1 << 16))
        return b''.join(chunks).decode()

    with monkeypatch.context() as patch, os.fdopen(slave, 'w', encoding='utf-8', buffering=1) as stream:
        patch.setattr(sys, 'stdout', stream)
        patch.setattr(sys, 'stderr', stream)
        yield read
    os.close(master)


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows: a carriage return, a cursor up and a new line lead from one to
    another."""
    lines, row, column = [''], 0, 0
    for part in re.findall(r'\x1b\[A|\x1b\[K|[\r\n]|[^\x1b\r\n]+', written):
        if part == '\x1b[A':
            row -= 1
        elif part == '\x1b[K':
            lines[row] = lines[row][:column]
        elif part == '\r':
            column = 0
        elif part == '\n':
            row += 1
            lines += [''] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part):]
            column += len(part)
    return [line.rstrip() for line in lines]


def test_on_a_terminal_bars_stay_below_the_lines_and_say_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, during = '', []
    with terminal(monkeypatch) as read:
        log = Log(tmp_path, True, first_step=4, total_steps=8)
        for step in (4, 5):
            log.update(step, loss=f'{step}.25', speed='12k')
            log.line(f'iter {step}')
        for window in console.progress(range(3), 3, 'evaluating val', 'windows'):
            log.line(f'window {window}')
            written += read()
            during.append(screen(written))
        log.update(8, loss='8.25', speed='12k')
        log.close()
        written += read()

    said = ['iter 4', 'iter 5', 'window 0', 'window 1', 'window 2']
    for window, shown in enumerate(during):
        assert shown[:-2] == said[:3 + window]
        assert re.match(r' 62%\|█+.? +\| 5/8 ', shown[-2])
        assert re.match(fr' *\d+%\|.*\| evaluating val: {window}/3 windows, ', shown[-1])
    last = screen(written)
    assert last[:5] == said
    assert re.fullmatch(r'100%\|█+\| 8/8 \[\d\d:\d\d<\d\d:\d\d, .* steps/s, loss=8\.25, speed=12k\]', last[5])
    assert not any(last[6:])


def test_without_a_terminal_there_are_no_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_logger(tmp_path) as log:
        log.line('one line')
        log.update(1, loss='1.0')
        assert list(console.progress(range(3), 3, 'evaluating', 'windows')) == [0, 1, 2]
    assert capsys.readouterr() == ('one line\n', '')


# The lines that users' scripts look for in nanoGPT's output.
NANOGPT_ITER = re.compile(r'^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d\d)ms, mfu (-?\d+\.\d\d)%')
NANOGPT_STEP = re.compile(r'^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$')


def test_lines_are_nanogpts() -> None:
    known = console.iter_line(12, 3.14159, 45.678, 0.4321, 6e-4, 1.5, 12345.6)
    assert known == 'iter 12: loss 3.1416, time 45.68ms, mfu 43.21%, lr 6.00e-04, norm 1.5000, tok/s 12346'
    match = NANOGPT_ITER.match(known)
    assert match and match.groups() == ('12', '3.1416', '45.68', '43.21')
    unknown = console.iter_line(12, 3.14159, 45.678, None, 6e-4, None, 12345.6)
    assert unknown == 'iter 12: loss 3.1416, time 45.68ms, lr 6.00e-04, tok/s 12346'
    match = NANOGPT_STEP.match(console.step_line(250, 1.23456, 2.0))
    assert match and match.groups() == ('250', '1.2346', '2.0000')


def test_numbers_are_short() -> None:
    numbers = (0, 0.00042, 7, 999.4, 999.6, 1234567, 9_999_999, 6.5e10, 1e13)
    assert ' '.join(map(console.short, numbers)) == '0 0.00042 7 999 1k 1.23M 10M 65B 10T'


# ------------------------------------------------------------------------------------------------ the machine


@pytest.mark.parametrize(('name', 'dtype', 'teraflops'), [
    ('NVIDIA A100-SXM4-80GB', 'bfloat16', 312),
    ('NVIDIA A100 80GB PCIe', 'float32', 156),
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989.4),
    ('NVIDIA H100 PCIe', 'float16', 756),
    ('NVIDIA H100 NVL', 'bfloat16', 835.5),
    ('NVIDIA H200', 'bfloat16', 989.4),
    ('NVIDIA B200', 'bfloat16', 2250),
    ('NVIDIA GB200', 'bfloat16', 2500),
    ('NVIDIA L4', 'bfloat16', 121),
    ('NVIDIA L40S', 'bfloat16', 362),
    ('NVIDIA A10', 'bfloat16', 125),
    ('NVIDIA A10G', 'bfloat16', 70),
    ('Tesla V100-SXM2-16GB', 'float16', 125),
    ('Tesla V100S-PCIE-32GB', 'float16', 130),
    ('Tesla T4', 'float16', 65),
    ('NVIDIA RTX A6000', 'bfloat16', 154.8),
    ('NVIDIA RTX 6000 Ada Generation', 'bfloat16', 364.2),
    ('NVIDIA GeForce RTX 3090', 'bfloat16', 71),
    ('NVIDIA GeForce RTX 3090 Ti', 'bfloat16', 80),
    ('NVIDIA GeForce RTX 4090', 'bfloat16', 165.2),
    ('NVIDIA GeForce RTX 5090', 'bfloat16', 209.5),
    # no number is better than a wrong one
    ('Tesla T4', 'bfloat16', None),
    ('Tesla V100-SXM2-16GB', 'float32', None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', 'bfloat16', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', 'bfloat16', None),
    ('NVIDIA GeForce RTX 4090 D', 'bfloat16', None),
    ('NVIDIA GeForce GTX 1080 Ti', 'float16', None),
    ('AMD EPYC 7763', 'float32', None),
])
def test_a_gpu_is_known_by_its_name(name: str, dtype: str, teraflops: float | None) -> None:
    flops = peak_flops(name, dtype)
    assert flops == (None if teraflops is None else pytest.approx(teraflops * 1e12))


@pytest.mark.skipif(sys.platform == 'win32', reason='Windows does not say')
def test_peak_memory_counts_what_was_held_once() -> None:
    before = peak_memory('cpu')
    held = np.ones(before // 8 + (1 << 23))  # as much as the peak so far, and 64 MiB
    assert peak_memory('cpu') >= held.nbytes > before
    del held
    assert peak_memory('cpu') > before


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_counts_what_was_held_once() -> None:
    torch = pytest.importorskip('torch')
    torch.cuda.reset_peak_memory_stats()
    held = torch.ones(1 << 26, device='cuda')
    del held
    assert peak_memory('cuda') >= 4 << 26


# ------------------------------------------------------------------------------------------------ loss.png

BLUE, RED = (0x3B, 0x6E, 0xA8), (0xD1, 0x49, 0x5B)


def picture(folder: Path) -> NDArray[np.int64]:
    with Image.open(folder / 'loss.png') as image:
        assert image.format == 'PNG' and image.size == (1350, 780)
        return np.asarray(image.convert('RGB')).astype(np.int64)


def heights(pixels: NDArray[np.int64], colour: tuple[int, int, int], columns: slice) -> NDArray[np.int64]:
    """Return how far from the top the pixels of a colour are that lie in these columns of the upper panel."""
    return np.nonzero(np.abs(pixels[60:520, columns] - colour).sum(axis=2) < 40)[0]


def test_the_longest_message_leaves_status_json_whole(tmp_path: Path) -> None:
    with open_logger(tmp_path) as log:
        for text in ('x', '\n', 'é', '\U0001f600'):
            log.status('failed', 10**18, 7, text * 5000)
            status = json.loads((tmp_path / 'status.json').read_text(encoding='utf-8'))
            assert (status['exit_code'], status['message'][:100]) == (7, text * 100)


def test_a_backend_that_is_not_installed_does_not_stop_the_picture(tmp_path: Path) -> None:
    program = ('import sys\nfrom pathlib import Path\nfrom plaingpt.run.log import Log\n'
               'with Log(Path(sys.argv[1]), True, 0, 2) as log:\n'
               '    log.row(0, loss=2.0)\n    log.row(1, loss=1.0)\n    log.plot()\n')
    for backend in ('module://matplotlib_inline.backend_inline', 'nonsense'):
        result = subprocess.run([sys.executable, '-c', program, str(tmp_path / backend[:6])], cwd=ROOT, text=True,
                                env={**os.environ, 'MPLBACKEND': backend}, capture_output=True, check=True)
        assert result.stdout == ''
        assert (tmp_path / backend[:6] / 'loss.png').exists()


def test_the_picture_shows_the_losses_of_all_runs_in_a_folder(tmp_path: Path) -> None:
    with open_logger(tmp_path) as log:
        for step in range(500):
            log.row(step, loss=5.0 - step / 200, lr=1e-3, grad_norm=1.0, tokens_per_second=1e4, tokens=(step + 1) * 100)
    with open_logger(tmp_path, first_step=400) as log:
        for step in range(400, 1000):
            log.row(step, loss=3.0, lr=1e-3, grad_norm=1.0, tokens_per_second=1e4, tokens=(step + 1) * 100)
        log.plot()
        falling = picture(tmp_path)
        left, middle, right = (heights(falling, BLUE, slice(x, x + 30)) for x in (100, 500, 900))
        assert left.mean() + 100 < middle.mean() < right.mean() == pytest.approx(right.min(), abs=3)
        assert not heights(falling, RED, slice(None)).size

        log.row(1000, val_loss=4.0, val_loss_stderr=0.1)
        log.row(1200, val_loss=4.5, val_loss_stderr=0.1)
        log.plot()
        both = picture(tmp_path)
        five, three = heights(both, BLUE, slice(80, 100)).min(), heights(both, BLUE, slice(900, 930)).mean()
        four = heights(both, RED, slice(1100, 1160)).max()  # at step 1000
        assert four == pytest.approx((five + three) / 2, abs=12)
    assert (tmp_path / 'loss.png').stat().st_size < 100_000


@pytest.mark.parametrize('rows', [
    [{'loss': 3.0}] * 2,
    [{'val_loss': 3.0}, {'lr': 1e-3}],
    [{'loss': math.nan, 'val_loss': 2.0, 'lr': 0.0}, {'loss': 1e9}, {'loss': math.inf}],
    [{'loss': 2.0, 'val_loss': 2.5, 'tokens': 10, 'grad_norm': 0.0}] * 3,
])
def test_a_picture_is_drawn_of_however_few_rows(rows: list[dict[str, float]], tmp_path: Path) -> None:
    with open_logger(tmp_path) as log:
        for step, row in enumerate(rows):
            log.row(step, **row)
        log.plot()
    with Image.open(tmp_path / 'loss.png') as image:
        image.load()


def test_nothing_to_draw_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_logger(tmp_path) as log:
        log.plot()
        log.row(0, loss=3.0, val_loss=3.0)  # one point is not a curve
        log.plot()
    assert not (tmp_path / 'loss.png').exists()
    with open_logger(tmp_path) as log:
        for step in range(2):
            log.row(step, loss=math.nan)
        log.plot()
    assert not (tmp_path / 'loss.png').exists()
    assert capsys.readouterr() == ('', '')


# ------------------------------------------------------------------------------------------------ wandb, matplotlib

RUN = """
import sys
from pathlib import Path
from plaingpt.run.log import Log
from plaingpt.run.wandb import Wandb
with Log(Path(sys.argv[1]), True, int(sys.argv[2]), 10) as log:
    log.add('wandb', lambda: Wandb('project', 'name', 'run1234', sys.argv[1], SETTINGS))
    for step in range(int(sys.argv[2]), int(sys.argv[3])):
        log.row(step, loss=4.0 - step, lr=0.25, mfu=0.5, grad_norm=1.5)
        log.row(step, train_loss=3.5, val_loss=3.75, val_perplexity=42.5)
    log.sample(step, 'import os')
    log.plot()
"""
SETTINGS = {'n_layer': 4, 'tokenizer': 'bpe:1024', 'sample_tokens': 256, 'hf_token': 'leak-1', 'api_key': 'leak-2',
            'Password': 'leak-3', 'client_secret_file': 'leak-4'}


def run_with_wandb(folder: Path, first: int, last: int, before: str = '', **environment: str) -> tuple[list[str], str]:
    """Log steps first..last-1 in a process that has a terminal but no user at the keys. Return what it printed."""
    pty = pytest.importorskip('pty')
    master, slave = pty.openpty()
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith('WANDB')}
    home = {'HOME': str(folder), 'NETRC': str(folder / 'netrc')}
    code = before + RUN.replace('SETTINGS', repr(SETTINGS))
    result = subprocess.run(
        [sys.executable, '-c', code, str(folder / 'out'), str(first), str(last), '--a=s3://leak-5@host/a?b=leak-6'],
        cwd=ROOT, stdin=slave,
        capture_output=True, text=True, encoding='utf-8', timeout=PATIENT, env=surroundings | home | environment,
    )
    os.close(slave)
    os.close(master)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


@pytest.mark.parametrize('of_pictures', ['matplotlib', 'PIL'])
def test_without_the_packages_the_run_continues(of_pictures: str, tmp_path: Path) -> None:
    missing = f"import sys; sys.modules['wandb'] = sys.modules['{of_pictures}'] = None\n"
    remedy = f'{python()} -m pip install -r requirements.txt; the run continues'
    lines, errors = run_with_wandb(tmp_path, 0, 3, before=missing)
    assert lines == [
        f'wandb is off: the package wandb is missing: {remedy}',
        '=== step 2 ===', 'import os',
        f'{tmp_path / "out/loss.png"} is not drawn: the package {of_pictures} is missing: {remedy}',
    ]
    assert errors == ''
    assert steps_of(tmp_path / 'out') == [0, 1, 2]


def test_without_a_key_wandb_asks_for_none_and_the_run_continues(tmp_path: Path) -> None:
    lines, errors = run_with_wandb(tmp_path, 0, 3)
    remedy = f'run `{python()} -m wandb login`, or set WANDB_MODE=offline'
    assert lines == [
        f'wandb is off: there is no API key ({remedy}); the run continues',
        '=== step 2 ===', 'import os',
    ]
    assert errors == ''
    assert steps_of(tmp_path / 'out') == [0, 1, 2]


@pytest.mark.slow
def test_wandb_offline_holds_the_run_and_what_was_resumed_but_no_secret(tmp_path: Path) -> None:
    pytest.importorskip('wandb')
    key = 'f' * 40
    run_with_wandb(tmp_path, 0, 4, WANDB_MODE='offline', WANDB_API_KEY=key)
    run_with_wandb(tmp_path, 2, 6, WANDB_MODE='offline', WANDB_API_KEY=key)
    files = sorted((tmp_path / 'out').glob('wandb/offline-run-*-run1234/run-run1234.wandb'))
    assert len(files) == 2
    for file, steps in zip(files, (range(4), range(2, 6)), strict=True):
        records = wandb_records(file)
        history = [{item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                   for record in records if record.WhichOneof('record_type') == 'history']
        assert [row['iter'] for row in history if 'sample/_type' in row] == [steps[-1]]
        for row, step in zip((row for row in history if 'train/loss' in row), steps, strict=True):
            named = {name: value for name, value in row.items() if not name.startswith('_')}
            assert named == {
                'iter': step, 'train/loss': 4.0 - step, 'lr': 0.25, 'mfu': 50.0, 'grad_norm': 1.5,
                'train/loss_evaluated': 3.5, 'val/loss': 3.75, 'val/perplexity': 42.5,
            }
        config = {item.key: item.value_json for record in records for item in record.run.config.update}
        assert {'n_layer', 'tokenizer', 'sample_tokens'} <= config.keys()
        assert any(record.run.resumed or record.run.run_id == 'run1234' for record in records)
        x_axes = {record.metric.name or record.metric.glob_name: record.metric.step_metric for record in records}
        assert x_axes['*'] == x_axes['val/loss'] == 'iter'
    everything = b''.join(path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file())
    assert b'import os' in everything
    assert not re.findall(b'leak-.|' + key.encode(), everything)


def wandb_records(file: Path) -> list[Any]:
    """Return the records of wandb's offline file: a LevelDB log (blocks of 32 KiB, a 7-byte header before each
    fragment) after 7 bytes of its own."""
    wandb_internal_pb2 = importlib.import_module('wandb.proto.wandb_internal_pb2')
    data = file.read_bytes()
    records, whole, at = [], b'', 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of a record
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b''
    return records


def test_wandb_that_fails_later_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    with open_logger(tmp_path) as log:
        sink = Wandb('project', '', 'run1234', str(tmp_path), {})
        log.add('wandb', lambda: sink)
        log.row(0, loss=1.0)
        sink.close(0)  # a finished run refuses further logging
        capsys.readouterr()
        for step in range(1, 4):
            log.row(step, loss=1.0)
    out = capsys.readouterr().out
    assert re.fullmatch(r'wandb is off: .*; the run continues\n', out)
    assert steps_of(tmp_path) == [0, 1, 2, 3]
