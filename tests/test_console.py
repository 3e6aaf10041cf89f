"""The console: the progress of all long work reaches it, and nothing by which a file or a server could steer it."""
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from model import GPT, GPTConfig
from plaingpt import console, metrics
from plaingpt.corpus import shards, tokenise, tokenizer
from plaingpt.corpus.documents import Passage
from plaingpt.corpus.token_files import TokenFile
from plaingpt.errors import UserError
from tests.comparing import predictor_of

ROOT = Path(__file__).parents[1]
PREPARE = 'data/text/prepare.py'
STEERING = '\x1b]52;c;ZXZpbA==\x07\x9b2J\x7f\u202e\u2028\b'  # sets the clipboard, clears the screen, reverses a line
LINE = re.compile(r'(evaluating on val|tokenising): ([\d,.]+)/([\d,]+) (batches|documents|files), '
                  r'(?:[\d,]+ tokens, [\d,]+ tokens/s, |[\d,.]+ [kM]?B of text, )?'
                  r'\d\d:\d\d so far, (?:about \d\d:\d\d|unknown time) to go')


class SlowPacker(tokenise.Packer):
    """A packer that takes so long that a bar is drawn several times."""

    def pack(self, passages: Iterable[Passage]) -> tokenise.Packed:
        time.sleep(0.01)
        return super().pack(passages)


def evaluate(folder: Path) -> None:
    """Evaluate the trained model of the tests, one window at a time, slowly."""
    np.arange(500, dtype='<u2').tofile(folder / 'val.bin')
    predict = predictor_of(GPT(GPTConfig(8, 512, 1, 1, 8)), 1)
    predict.model.register_forward_hook(lambda *_: time.sleep(0.01))
    metrics.evaluate(predict, TokenFile(folder / 'val.bin', 'uint16'), 50, None)


def write_corpus(folder: Path) -> None:
    byte = tokenizer.build('byte', list, eot=True)
    texts: list[tokenise.Part] = [[f'document {i}'] for i in range(50)]
    tokenise.write_corpus(folder / 'corpus', SlowPacker(byte, byte.eot), texts, np.array([3]), 'these', 1)


def write_shards(folder: Path) -> None:
    byte = tokenizer.build('byte', list, eot=True)
    for number in range(50):
        line = json.dumps({'text': f'document {number}'})
        (folder / f'{number:02}.jsonl').write_text(line, encoding='utf-8')
    source = shards.Source(sorted(map(str, folder.glob('*.jsonl'))), str, 'text')
    shards.write_shards(folder / 'shards', SlowPacker(byte, byte.eot), source, 100, 'these', 1)


@pytest.mark.parametrize('work', [evaluate, write_corpus, write_shards])
@pytest.mark.parametrize('where', ['terminal', 'file', 'second process'])
def test_all_long_work_reports_its_progress_in_the_same_words(
        work: Callable[[Path], None], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
    monkeypatch.setattr(tokenise, 'PIECE', 10)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: where != 'file')
    monkeypatch.setenv('RANK', str(int(where == 'second process')))
    work(tmp_path)
    out, bar = capsys.readouterr()
    lines = [line for line in out.splitlines() if 'to go' in line]
    shown = [text for text in bar.split('\r') if '%' in text]
    assert bool(lines) == (where == 'file')
    assert (len(shown) > 2) == (where == 'terminal')
    for line in lines:
        assert LINE.fullmatch(line)
    assert all(LINE.search(text) for text in shown[1:])
    numbers = [float(line.split(': ')[1].split('/')[0]) for line in lines]
    assert numbers == sorted(numbers) and (not numbers or numbers[-1] == 49)


def test_hours_are_shown_as_hours_and_the_time_left_is_estimated_from_this_run_alone(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
    with console.Progress(1000, 'counting', 'sheep') as progress:
        progress.update(500)
        progress.begun = (time.monotonic() - 7384, 500)  # two hours ago
        progress.update(600.123, 'all white')
    assert capsys.readouterr().out == ('counting: 500/1,000 sheep, 00:00 so far, unknown time to go\n'
                                       'counting: 600.12/1,000 sheep, all white, 2:03:04 so far, about 8:11:30 to go\n')


@pytest.mark.parametrize('has_terminal', [False, True])
def test_work_that_ends_before_the_delay_says_nothing(
        has_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: has_terminal)
    assert list(console.progress('abc', 3, 'step 1', 'micro-batches', delay=60)) == ['a', 'b', 'c']
    assert capsys.readouterr() == ('', '')
    assert list(console.progress('abc', 3, 'step 1', 'micro-batches')) == ['a', 'b', 'c']
    assert any(capsys.readouterr())


# ------------------------------------------------------------------------------------------------
# Text that may not reach a terminal


def on_terminal(command: list[str], folder: Path) -> tuple[int, str]:
    """Return the exit code of a command, and all that it writes to a terminal, which is real."""
    pty = pytest.importorskip('pty', reason='this system has no pseudo-terminals')
    controller, terminal = pty.openpty()
    with subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=folder, stdin=subprocess.DEVNULL,
                          stdout=terminal, stderr=terminal, env={**os.environ, 'PYTHONUTF8': '1'}) as process:
        os.close(terminal)
        written = b''
        while True:
            try:
                written += (more := os.read(controller, 1 << 16))
            except OSError:  # the end, on Linux
                more = b''
            if not more:
                break
        os.close(controller)
    return process.returncode, written.decode()


def answer_with(reason: str) -> str:
    """Return the URL of a server on this machine that answers one request with a status and this reason."""
    server = socket.create_server(('127.0.0.1', 0))

    def answer() -> None:
        with server, server.accept()[0] as caller:
            caller.recv(1 << 16)
            caller.sendall(f'HTTP/1.1 404 {reason}\r\nContent-Length: 0\r\n\r\n'.encode('latin-1', 'ignore'))

    Thread(target=answer, daemon=True).start()
    return f'http://127.0.0.1:{server.getsockname()[1]}/a.txt'


def column(folder: Path) -> list[str]:
    (folder / 'a.jsonl').write_text(json.dumps({STEERING: 'text'}), encoding='utf-8')
    return [PREPARE, '--input=a.jsonl', '--tokenizer=char', '--name=never']


def file_name(folder: Path) -> list[str]:
    (folder / f'{STEERING}.jsonl').write_text('no JSON', encoding='utf-8')
    return [PREPARE, '--input=*.jsonl', '--tokenizer=char', '--name=never']


def argument(folder: Path) -> list[str]:
    return [PREPARE, f'--input={STEERING}']


def option(folder: Path) -> list[str]:
    return [PREPARE, f'--{STEERING.replace("=", "")}=1']


def comment(folder: Path) -> list[str]:
    (folder / 'a.py').write_text(f'# {STEERING.replace(chr(0x2028), "")}\nseed = 1', encoding='utf-8')
    return [PREPARE, 'a.py']


def reason(folder: Path) -> list[str]:
    return [PREPARE, f'--input={answer_with(STEERING)}', '--name=never']


def model_type(folder: Path) -> list[str]:
    (folder / 'config.json').write_text(json.dumps({'model_type': STEERING}), encoding='utf-8')
    return ['sample.py', '--init_from=.']


def hellaswag(folder: Path) -> list[str]:
    (folder / 'a.jsonl').write_text(f'{STEERING}\n', encoding='utf-8')
    return ['evaluate.py', '--tasks=hellaswag', '--hellaswag=a.jsonl']


def prompt(folder: Path) -> list[str]:
    return ['sample.py', f'--start=FILE:{STEERING}']


@pytest.mark.parametrize('door', [
    column, file_name, argument, option, comment, reason,
    *(pytest.param(door, marks=pytest.mark.slow) for door in (model_type, hellaswag, prompt))])
def test_nothing_that_a_file_a_server_or_an_argument_holds_reaches_a_terminal_raw(
        door: Callable[[Path], list[str]], tmp_path: Path) -> None:
    code, written = on_terminal(door(tmp_path), tmp_path)
    assert code in (2, 3, 4)
    assert not set('\x1b\x07\x9b\x7f\u202e\u2028\b') & set(written)
    assert '\\x1b]52;c;ZXZpbA' in written, 'the escape is shown as text'
    assert 'Traceback' not in written


@pytest.mark.parametrize(('encoding', 'what_is_shown'), [('cp1252', 'é\\u65e5'), ('ascii', '\\xe9\\u65e5')])
def test_a_console_that_lacks_a_character_shows_its_escape(encoding: str, what_is_shown: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / PREPARE), '--column=é日', '--input=é日'], cwd=tmp_path, text=True,
                          capture_output=True, encoding=encoding, env={**os.environ, 'PYTHONIOENCODING': encoding})
    assert (done.returncode, done.stderr) == (3, f'--input={what_is_shown} matches no file and no folder\n')
    assert done.stdout == f'Overriding: column = {what_is_shown}\nOverriding: input = {what_is_shown}\n'


def test_a_command_whose_output_is_closed_does_its_work(tmp_path: Path) -> None:
    command = f'exec {sys.executable} {ROOT / PREPARE} --input=none >&- 2>&-'
    assert subprocess.run(['bash', '-c', command], cwd=tmp_path).returncode == 3


def test_an_error_that_no_code_expected_is_shown_without_steering_and_secrets(tmp_path: Path) -> None:
    raising = f'def main(args): raise KeyError({STEERING!r} + "s3://me:secret@host/a?b=secret")'
    program = f'from plaingpt import errors\n{raising}\nerrors.run(main)'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 1 and 'Traceback' in done.stderr
    assert 's3://***@host/a?***' in done.stderr
    assert not {'\x1b', '\u202e'} & set(done.stderr.splitlines()[-1])


def test_a_message_has_three_short_lines_whatever_is_quoted_in_it() -> None:
    message = str(UserError('a\nb\nc\nd\n' + 'x' * 9999 + 'do this'))
    assert message.split('\n')[:2] == ['a', 'b'] and message.count('\n') == 2
    assert message.endswith('x ... ' + 'x' * (console.LONGEST // 2 - len('do this')) + 'do this')


@pytest.mark.parametrize(('text', 'shown'), [
    ('ftp://me:p@ss@host/run', 'ftp://***@host/run'),
    ("'https://h/a.pt?Signature=abc' is not there", "'https://h/a.pt?***' is not there"),
    ('simplecache::https://me@h/a?b=c', 'simplecache::https://***@h/a?***'),
    ('zip://a.txt::https://me:p@h/a.zip and "s3://b/c?d".', 'zip://a.txt::https://***@h/a.zip and "s3://b/c?***".'),
    ("https://it's:me@h/a?b='c'&d", 'https://***@h/a?***'),
    ('s3://bucket/run', 's3://bucket/run'),
    ('://' * 100_000, '://' * 100_000),
    ('me@host is no URL? no', 'me@host is no URL? no'),
])
def test_urls_are_shown_without_credentials(text: str, shown: str) -> None:
    assert console.shown(text) == shown
