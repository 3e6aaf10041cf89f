"""The path from raw text to samples on the user's own machine: all that a newcomer types, on real text."""
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENT, wait_until

ROOT = Path(__file__).parents[1]
STATEMENT = re.compile(r'\s*(def \w+\(.*|class \w+.*:|if \w.*:|for \w.* in .*:|while .*:|else:|try:|except.*:'
                       r'|return\b.*|raise \w+.*|(from [\w.]+ )?import \w.*|[\w.]+ = \S.*|[\w.]+\(.*\))')


@pytest.fixture(scope='module')
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of a fresh clone, and the .venv that `make` has set up there."""
    folder = tmp_path_factory.mktemp('clone')
    for pattern in ('*.py', 'plaingpt/**/*.py', 'plaingpt/**/*.html', 'requirements-core.txt', 'Makefile',
                    'config/*.py', 'data/*/prepare.py'):
        for file in ROOT.glob(pattern):
            (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ROOT))
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', '.venv'], cwd=folder, check=True, timeout=PATIENT)
    packages = next((folder / '.venv/lib').glob('python*/site-packages'))
    (packages / 'borrowed.pth').write_text('\n'.join(site.getsitepackages()), encoding='utf-8')
    (folder / '.venv/core').touch()  # newer than the requirements: nothing to install
    return folder


def terminal() -> dict[str, str]:
    """Return the environment of a terminal that was just opened, in which nothing has been activated."""
    own_bin = str(Path(sys.executable).parent)
    path = os.pathsep.join(folder for folder in os.environ['PATH'].split(os.pathsep) if folder != own_bin)
    outside = {name: value for name, value in os.environ.items() if not re.match('MAKE|MFLAGS|VIRTUAL_ENV', name)}
    return {**outside, 'PATH': path}


def run(folder: Path, command: str) -> str:
    """Return what a command prints; it must exit with code 0."""
    result = subprocess.run(['sh', '-c', command], cwd=folder, env=terminal(), stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, encoding='utf-8', timeout=PATIENT)
    assert result.returncode == 0, f'{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}'
    return result.stdout


def rows_of(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def samples_of(run_folder: Path) -> dict[int, str]:
    """Return the samples of a run, by step."""
    text = (run_folder / 'samples.txt').read_text(encoding='utf-8')
    _, *parts = re.split(r'^=== step (\d+) ===\n', text, flags=re.MULTILINE)
    return {int(step): sample for step, sample in zip(parts[::2], parts[1::2], strict=True)}


def python_in(text: str) -> float:
    """Return the share of a text's lines that look like statements: 0.6 in the standard library, 0.05 at most in tokens
    that are drawn as often as they occur there. The first line, which continues a prompt, and empty ones do not
    count."""
    lines = [line for line in text.splitlines()[1:] if line.strip()]
    return sum(STATEMENT.fullmatch(line) is not None for line in lines) / max(1, len(lines))


@pytest.mark.slow
def test_make_train_trains_to_the_stated_loss_and_can_be_repeated(clone: Path) -> None:
    readme = ' '.join((ROOT / 'README.md').read_text(encoding='utf-8').split())
    stated = re.search(r'ends at (\S+) bits per byte.*\(± (\d\.\d+)\), from (\d\.\d+) before the first step', readme)
    assert stated, 'README states what to expect, and how exactly'

    output = run(clone, 'make train')
    out = clone / 'out-stdlib'
    first, *_, last = [row for row in rows_of(out) if 'val_bits_per_byte' in row]
    assert last['val_bits_per_byte'] == pytest.approx(float(stated[1]), abs=float(stated[2]))
    assert first['val_bits_per_byte'] == pytest.approx(float(stated[3]), abs=0.1)
    assert re.findall(r'^val .*$', output, re.MULTILINE)[-1].split()[6] == f'{last["val_bits_per_byte"]:.4f}'

    samples = samples_of(out)
    assert (min(samples), max(samples)) == (0, last['step'])
    assert samples[last['step']].rstrip() in output
    assert (out / 'loss.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    files, advice = output.splitlines()[-2:]
    assert files == f'out-stdlib holds {", ".join(sorted(path.name for path in out.iterdir()))}'
    assert {'best.pt', 'ckpt.pt', 'metrics.jsonl', 'status.json'} <= {path.name for path in out.iterdir()}

    next_command = advice.removeprefix('try next: ')
    assert next_command != advice
    written = run(clone, f'{next_command} --num_samples=8 --max_new_tokens=120')
    assert python_in(samples[0]) < 0.1 < min(python_in(samples[last['step']]), python_in(written))

    short = 'case $1 in train.py) set -- "$@" --max_iters=3 --eval_iters=1;; esac\nexec .venv/bin/python "$@"\n'
    (clone / 'short').write_text(short, encoding='utf-8')
    run(clone, 'make train PY="sh short"')
    assert [row['step'] for row in rows_of(out)] == [0, 2, 3]
    assert set(samples_of(out)) == {0, 3}


@pytest.mark.slow
def test_the_users_own_text_is_prepared_trained_on_killed_resumed_and_sampled(clone: Path) -> None:
    text = Path(sysconfig.get_paths()['stdlib'], '__future__.py').read_text(encoding='utf-8')
    (clone / 'book.txt').write_text(text, encoding='utf-8')
    run(clone, '.venv/bin/python data/text/prepare.py --input=book.txt --tokenizer=bpe:512 --name=book')

    command = ['.venv/bin/python', 'train.py', 'config/train_stdlib.py', '--dataset=book', '--out_dir=out-book',
               '--init_from=auto', '--max_iters=300', '--lr_decay_iters=300', '--warmup_iters=20', '--n_layer=2',
               '--eval_interval=100', '--eval_iters=2', '--log_interval=1', '--sample_interval=150']
    metrics = clone / 'out-book/metrics.jsonl'
    with subprocess.Popen(command, cwd=clone, env=terminal(), stdout=subprocess.DEVNULL) as process:
        # until it has saved step 100, and continued
        wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b'\n') > 120))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert json.loads((clone / 'out-book/status.json').read_text(encoding='utf-8'))['state'] == 'running'

    output = run(clone, ' '.join(command))  # the same command again
    assert re.search(r'^resuming at step [12]00$', output, re.MULTILINE)
    rows = rows_of(clone / 'out-book')
    assert [row['step'] for row in rows] == list(range(301))
    assert set(samples_of(clone / 'out-book')) == {0, 150, 300}

    (clone / 'start.txt').write_text(' '.join(text.split()[:4]), encoding='utf-8')
    sample = '.venv/bin/python sample.py --out_dir=out-book --start=FILE:start.txt --num_samples=1 --temperature=0'
    written = run(clone, f'{sample} --max_new_tokens=80')
    assert written.startswith(text[:100]), 'the model overfits so short a text'
    table = run(clone, '.venv/bin/python evaluate.py --out_dir=out-book --split=train')
    assert float(re.findall(r'^out-book, step 300 +(\S+)', table, re.MULTILINE)[0]) < 0.5
