"""What all long work says about its progress: to a terminal, to a file, and to nobody where another process speaks."""
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from model import GPT, GPTConfig
from plaingpt import console, metrics
from plaingpt.corpus import shards, tokenise, tokenizer
from plaingpt.corpus.token_files import TokenFile
from tests.comparing import predictor_of

LINE = re.compile(r'(evaluating on val|tokenising): ([\d,.]+)/([\d,]+) (batches|documents|files), '
                  r'(?:[\d,]+ tokens, [\d,]+ tokens/s, )?\d\d:\d\d so far, (?:about \d\d:\d\d|unknown time) to go')


class SlowPacker(tokenise.Packer):
    """A packer that takes so long that a bar is drawn several times."""

    def pack(self, texts: Iterable[str]) -> tokenise.Packed:
        time.sleep(0.01)
        return super().pack(texts)


def evaluate(folder: Path) -> None:
    """As the trained model of the tests is evaluated, one window at a time, slowly."""
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
def test_all_long_work_tells_its_progress_in_the_same_words(
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


def test_hours_are_told_as_hours_and_what_is_left_is_judged_by_this_run_alone(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
    with console.Progress(1000, 'counting', 'sheep') as progress:
        progress.update(500)
        progress.begun = (time.monotonic() - 7384, 500)  # two hours ago
        progress.update(600.123, 'all white')
    assert capsys.readouterr().out == ('counting: 500/1,000 sheep, 00:00 so far, unknown time to go\n'
                                       'counting: 600.12/1,000 sheep, all white, 2:03:04 so far, about 8:11:30 to go\n')


@pytest.mark.parametrize('has_terminal', [False, True])
def test_what_is_over_before_the_delay_says_nothing(
        has_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, 'PLAIN_SECONDS', 0.0)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: has_terminal)
    assert list(console.progress('abc', 3, 'step 1', 'micro-batches', delay=60)) == ['a', 'b', 'c']
    assert capsys.readouterr() == ('', '')
    assert list(console.progress('abc', 3, 'step 1', 'micro-batches')) == ['a', 'b', 'c']
    assert any(capsys.readouterr())
