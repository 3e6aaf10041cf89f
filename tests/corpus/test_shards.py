"""Corpora of any length: shards that other projects read, and runs that are killed at any moment and resume."""
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from plaingpt.corpus import documents, shards, tokenise, tokenizer
from plaingpt.corpus.folder import open_split
from plaingpt.corpus.token_files import make_header
from plaingpt.errors import COMMAND, DATA, DISK_FULL, PEER_LOST, UserError
from plaingpt.files import put_on_disk
from tests.comparing import copy_script
from tests.waiting import PATIENT, wait_until

ROOT = Path(__file__).parents[2]
DOCUMENTS = ROOT / 'tests/data/documents.jsonl'
TEXTS = [f'document {i} ' + 'é' * (i % 7) * (i % 5) for i in range(400)]
TEXTS[::50] = [''] * 8


def write_inputs(folder: Path) -> list[str]:
    """Write the same documents as .jsonl, .parquet and packed files, and a file without any."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    lines = [json.dumps({'text': text}) for text in TEXTS]
    (folder / 'a.jsonl').write_text('\n'.join(lines[:150]), encoding='utf-8')
    (folder / 'b.jsonl').write_text('\n', encoding='utf-8')
    pyarrow.parquet.write_table(pyarrow.table({'text': TEXTS[150:300]}), folder / 'c.parquet', row_group_size=10)
    (folder / 'd.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines[300:]).encode()))
    return documents.find_files(str(folder), folder)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write files of several pieces each."""
    for module in (tokenise, documents):
        monkeypatch.setattr(module, 'PIECE', 500)
    return write_inputs(tmp_path / 'in')


def write(folder: Path, files: list[str], shard_size: int = 1000, num_proc: int = 1, overwrite: bool = False,
          column: str = 'text') -> None:
    byte = tokenizer.build('byte', list, eot=True)
    packer = tokenise.Packer(byte, byte.eot, eot_first=True)
    shards.write_shards(folder, packer, shards.Source(files, str, column), shard_size, 'these', num_proc, overwrite)


def expected() -> list[int]:
    return [i for text in TEXTS for i in [256, *text.encode('utf-8')]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('shard_size', [1000, 61, 1 << 20])
@pytest.mark.parametrize('num_proc', [1, 2])
def test_shards_hold_every_token_once_in_the_order_of_the_documents(
        shard_size: int, num_proc: int, files: list[str], tmp_path: Path) -> None:
    """The shards are in llm.c's format, taken apart here as a reader of llm.c's takes it apart."""
    ids, folder = expected(), tmp_path / 'out'
    if shard_size > len(ids):
        with pytest.raises(UserError, match=rf'has {len(ids):,} tokens.*none.*\n.*--shard_size={len(ids) // 10} '):
            write(folder, files, shard_size, num_proc)
        return
    write(folder, files, shard_size, num_proc)
    n_shards = -(-len(ids) // shard_size)
    names = ['val_000000.bin', *(f'train_{i:06d}.bin' for i in range(1, n_shards))]
    assert sorted(contents(folder)) == sorted([*names, 'meta.json', 'checksums.npz'])
    read: list[int] = []
    for name in names:
        data = (folder / name).read_bytes()
        header = np.frombuffer(data[:1024], '<i4').tolist()
        part = np.frombuffer(data[1024:], '<u2').tolist()
        assert header == [20240520, 1, len(part)] + [0] * 253
        assert len(part) == shard_size or name == names[-1]
        read += part
    assert read == ids

    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    assert (meta['documents'], meta['bytes']) == (len(TEXTS), len(ids) - len(TEXTS))
    assert meta['dtype'] == 'uint16' and meta['vocab_size'] == 257 and meta['source'] == 'these'
    for name in names:
        data = (folder / name).read_bytes()
        assert meta['splits'][name[:-4]] == {
            'tokens': len(data) // 2 - 512, 'largest_id': int(np.frombuffer(data[1024:], '<u2').max()),
            'sha256': hashlib.sha256(data).hexdigest(), 'head': hashlib.sha256(data[:4096]).hexdigest(),
            'tail': hashlib.sha256(data[-4096:]).hexdigest()}
    train = open_split(folder, 'train', 8, 257)
    assert train.read(0, len(train)).tolist() == ids[shard_size:]


def test_a_vocabulary_beyond_16_bits_is_written_as_llama_3s_is(tmp_path: Path) -> None:
    many = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / 'a.txt').write_text(many, encoding='utf-8')
    packer = tokenise.Packer(tokenizer.build('char', lambda: [many], eot=False), None)
    shards.write_shards(tmp_path / 'out', packer, shards.Source([str(tmp_path / 'a.txt')], str, 'text'), 60_000, 'it')
    data = (tmp_path / 'out/train_000001.bin').read_bytes()
    assert np.frombuffer(data[:12], '<i4').tolist() == [20240801, 7, 10_000]
    assert np.frombuffer(data[1024:], '<u4').tolist() == list(range(60_000, 70_000))
    assert open_split(tmp_path / 'out', 'train', 8, 70_000).read(9999, 1).tolist() == [69_999]


def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
        files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops before or after each moment that changes a name on the disk, and is always run again."""
    write(tmp_path / 'whole', files)
    real, stops = Path.replace, list[str]()

    def replace(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0 and len(stops) % 2:
            raise KeyboardInterrupt
        real(path, target)
        if left[0] == 0:
            raise KeyboardInterrupt
        return target

    monkeypatch.setattr(Path, 'replace', replace)
    for attempt in range(100):
        left = [attempt % 7 + 1]  # moments until this attempt stops
        for module in (tokenise, documents):
            monkeypatch.setattr(module, 'PIECE', (500, 60, 2000)[attempt % 3])  # batches may differ between attempts
        try:
            write(tmp_path / 'parts', files)
            break
        except KeyboardInterrupt:
            stops.append('stopped')
    assert 10 < len(stops) < 99
    assert contents(tmp_path / 'parts') == contents(tmp_path / 'whole')


def test_a_resumed_run_reads_only_the_documents_that_are_left(
        files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / 'out', files, 500)
    meta = json.loads((tmp_path / 'out/meta.json').read_text(encoding='utf-8'))
    source = shards.Source(files, str, 'text')
    list(source.parts_from(shards.START))
    for document in (0, 1, 149, 150, 155, 299, 300, 350, 399):
        place = source.place_of(document, 7)
        assert place.document == document and place.tokens == 7
        assert files[place.file].endswith(('a.jsonl', 'c.parquet', 'd.jsonl.gz')[(document >= 150) + (document >= 300)])
        rest = shards.Source(files, str, 'text')
        assert list(tokenise.read_texts(rest.parts_from(place))) == TEXTS[document:]
        assert rest.place_of(399, 0) == source.place_of(399, 0)
    before = [source.files_before(document) for document in range(1, 401)]
    assert before == sorted(before) and before[-1] == len(files) and 0 < before[0] < 0.01
    assert source.files_before(75) == 0.5, 'half of the first file'
    assert len(meta['splits']) > 5


def test_files_are_fetched_one_ahead_and_no_further(files: list[str]) -> None:
    fetched: list[str] = []

    def fetch(name: str) -> str:
        fetched.append(name)
        return name

    for part in shards.Source(files, fetch, 'text').parts_from(shards.START):
        assert isinstance(part, documents.Piece)
        assert len(fetched) <= files.index(part.name) + 2
    assert fetched == files

    def fail(name: str) -> str:
        raise UserError('no network', DATA)

    with pytest.raises(UserError, match='no network'):
        list(shards.Source(files, fail, 'text').parts_from(shards.START))


def refused(code: int, message: str, folder: Path, files: list[str], shard_size: int = 1000,
            column: str = 'text') -> None:
    before = contents(folder)
    with pytest.raises(UserError, match=message) as caught:
        write(folder, files, shard_size, column=column)
    assert caught.value.code == code and str(caught.value).count('\n') < 3
    assert contents(folder) == before


def test_other_settings_and_other_files_are_refused_with_the_remedy(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / 'out'
    write(folder, files)
    refused(COMMAND, r'shard_size 1000 \(now 999\)\n.*--overwrite=True', folder, files, 999)
    refused(COMMAND, r'column text \(now body\)\n.*--overwrite=True', folder, files, column='body')
    refused(COMMAND, r'files \w+ \(now \w+\)\n.*--overwrite=True', folder, files[1:])
    path = folder / 'train_000002.bin'
    data = path.read_bytes()
    for damage in (data[:-1], data[:-1] + b'\7'):
        path.write_bytes(damage)
        refused(DATA, r'train_000002\.bin is missing or damaged\n.*--overwrite=True', folder, files)
    path.unlink()
    refused(DATA, r'train_000002\.bin is missing or damaged', folder, files)
    path.write_bytes(data)
    (folder / 'meta.json').unlink()
    refused(DATA, r'has not made, such as train_000001\.bin\n.*--overwrite=True', folder, files)
    with pytest.raises(UserError, match='must be at least 1 and less'):
        write(folder, files, 0)


def test_a_second_run_in_a_folder_is_refused(files: list[str], tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/val_000000.bin.tmp').write_bytes(b'what the first has written')
    with tokenise.alone_in(tmp_path / 'out'):
        refused(PEER_LOST, f'belongs to process {os.getpid()} on ', tmp_path / 'out', files)


def test_a_finished_corpus_is_left_as_it_is_and_can_be_made_anew(files: list[str], tmp_path: Path) -> None:
    folder = tmp_path / 'out'
    write(folder, files)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for overwrite in (False, True):
        write(folder, files, overwrite=overwrite)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    write(tmp_path / 'other', files, 5000)
    write(folder, files, 5000, overwrite=True)
    assert contents(folder) == contents(tmp_path / 'other')


def test_a_command_that_overwrites_resumes_when_it_is_given_again(
        files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it does not delete what it has done until then."""
    folder, real, finished = tmp_path / 'out', shards.write_shard, list[str]()
    write(folder, files, 5000)
    write(tmp_path / 'other', files)

    def write_four(path: Path, *rest: Any) -> dict[str, Any]:
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(shards, 'write_shard', write_four)
    with pytest.raises(KeyboardInterrupt):
        write(folder, files, overwrite=True)
    monkeypatch.setattr(shards, 'write_shard', real)
    before = {name: (folder / name).stat().st_mtime_ns for name in finished}
    write(folder, files, overwrite=True)
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == before
    assert contents(folder) == contents(tmp_path / 'other')


def test_a_full_disk_is_one_message_and_the_same_command_resumes(
        files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / 'whole', files)
    real, calls = put_on_disk, itertools.count()

    def fail(file: BufferedRandom) -> None:
        if next(calls) == 10:
            raise OSError(28, 'No space left on device')
        real(file)

    monkeypatch.setattr('plaingpt.files.put_on_disk', fail)
    with pytest.raises(UserError, match=r'the disk is full\nmake room, and run the same command again') as caught:
        write(tmp_path / 'out', files)
    assert caught.value.code == DISK_FULL
    assert next(calls) > 10 and not list((tmp_path / 'out').glob('*.tmp'))
    with pytest.raises(UserError, match='is not complete'):
        open_split(tmp_path / 'out', 'train', 8, 257)
    write(tmp_path / 'out', files)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


@pytest.mark.parametrize('has_terminal', [False, True])
def test_progress_shows_tokens_speed_and_what_is_left(
        has_terminal: bool, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr('plaingpt.console.PLAIN_SECONDS', 0.0)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: has_terminal)
    write(tmp_path / 'out', files)
    out, bar = capsys.readouterr()
    text = bar if has_terminal else out
    assert ('%' in bar) == has_terminal and ('tokenising: ' in out) != has_terminal
    line = (r'tokenising: ([\d.]+)/4 files, ([\d,]+) tokens, [\d,]+ tokens/s, '
            r'\d\d:\d\d so far, (?:about \d\d:\d\d|unknown time) to go')
    seen = [(float(before), int(n_tokens.replace(',', ''))) for before, n_tokens in re.findall(line, text)]
    assert seen == sorted(seen)
    if not has_terminal:
        assert seen[0] == (0, 0) and 3.5 < seen[-1][0] < 4 and 0.9 * len(expected()) < seen[-1][1] < len(expected())


@pytest.mark.slow
def test_training_takes_shards_of_several_families_as_it_takes_one_file_of_the_same_tokens(
        tiny_text: str, tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]],
        gpt2_stand_in: tiktoken.Encoding) -> None:
    ids = np.frombuffer(tiny_text.encode(), np.uint8).astype('<u2')
    (tmp_path / 'one').mkdir()
    ids[5000:].tofile(tmp_path / 'one/train.bin')
    ids[:5000].tofile(tmp_path / 'one/val.bin')
    (tmp_path / 'many').mkdir()
    (tmp_path / 'many/a_val_000000.bin').write_bytes(make_header(ids.dtype, 5000) + ids[:5000].tobytes())
    (tmp_path / 'many/a_train_000001.bin').write_bytes(make_header(ids.dtype, 7001) + ids[5000:12_001].tobytes())
    np.save(tmp_path / 'many/a_train_000002.npy', ids[12_001:20_000])
    ids[20_000:].tofile(tmp_path / 'many/a_train_000003.bin')

    settings = ['--device=cpu', '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=32', '--batch_size=2',
                '--eval_iters=2', '--gradient_accumulation_steps=1', '--max_iters=4', '--sample_interval=0']
    losses: list[list[tuple[float | None, float | None]]] = []
    for dataset in ('one', 'many', 'many/*'):
        result = run_script('train.py', f'--dataset={tmp_path}/{dataset}', f'--out_dir={tmp_path}/{len(losses)}',
                            *settings)
        assert result.returncode == 0, result.stderr
        rows = (tmp_path / f'{len(losses)}/metrics.jsonl').read_text(encoding='utf-8').splitlines()
        losses.append([(row.get('loss'), row.get('val_loss')) for row in map(json.loads, rows)])
    assert len(losses[0]) >= 4
    assert losses[0] == losses[1] == losses[2]


# ------------------------------------------------------------------------------------------------
# data/fineweb_edu/prepare.py


@pytest.fixture
def fineweb(tmp_path: Path) -> Path:
    """Copy the script, with what it imports, into a folder of its own, so that it writes there."""
    return copy_script('data/fineweb_edu/prepare.py', tmp_path)


def test_fineweb_edus_shards_are_build_nanogpts_sequence_from_local_files_and_from_a_dataset(
        fineweb: Path, documents: list[str], gpt2_stand_in: tiktoken.Encoding, tmp_path: Path) -> None:
    """build-nanogpt writes the end of text, then encode_ordinary, document after document. `datasets` gives the same,
    from the files of one configuration, and of no other."""
    import pyarrow
    import pyarrow.parquet

    ids = [i for text in documents for i in [gpt2_stand_in.eot_token, *gpt2_stand_in.encode_ordinary(text)]]
    for config, start, stop in [('10BT', 0, 25), ('10BT', 25, len(documents)), ('100BT', 0, 1)]:
        (tmp_path / f'hub/sample/{config}').mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({'text': documents[start:stop]}),
                                    tmp_path / f'hub/sample/{config}/{start:03}_00000.parquet')
    (tmp_path / 'hub/README.md').write_text('---\nconfigs:\n' + ''.join(
        f'- config_name: sample-{name}\n  data_files:\n  - split: train\n    path: sample/{name}/*\n'
        for name in ('10BT', '100BT')) + '---\n', encoding='utf-8')

    for name, arguments in [('a', [f'--input={DOCUMENTS}']), ('b', [f'--source={tmp_path}/hub'])]:
        result = subprocess.run([sys.executable, str(fineweb), f'--name={name}', '--shard_size=1_000', *arguments],
                                capture_output=True, text=True, encoding='utf-8', check=False)
        assert result.returncode == 0, result.stderr
        assert f'train.py {tmp_path}/config/train_fineweb_edu.py --dataset={name}\n' in result.stdout
        train, val = (open_split(tmp_path / f'data/{name}', split, 64, 50257) for split in ('train', 'val'))
        assert len(val) == 1000
        assert np.concatenate([val.read(0, len(val)), train.read(0, len(train))]).tolist() == ids
        assert len(list((tmp_path / f'data/{name}').glob('train_*.bin'))) == len(ids) // 1000, 'the last not full'


def test_a_tokenizer_that_would_read_everything_first_is_refused(fineweb: Path) -> None:
    for arguments, words in [(['--tokenizer=bpe:4096'], '--tokenizer=bpe:4096 would have to read'),
                             (['--name=../x'], '--name=../x becomes the folder data/<name>')]:
        result = subprocess.run([sys.executable, str(fineweb), *arguments], capture_output=True, text=True,
                                encoding='utf-8', check=False)
        assert result.returncode == COMMAND and words in result.stderr and 'Traceback' not in result.stderr


@pytest.fixture
def long_text(tmp_path: Path) -> Iterator[Path]:
    """Yield some fifteen million tokens in two files."""
    folder = tmp_path / 'long'
    folder.mkdir()
    for name in ('a', 'b'):
        (folder / f'{name}.jsonl').write_bytes(DOCUMENTS.read_bytes() * 540)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == 'win32', reason='sends POSIX signals')
@pytest.mark.usefixtures('gpt2_stand_in')
def test_kills_at_random_moments_leave_no_torn_missing_or_repeated_token(
        fineweb: Path, long_text: Path, tmp_path: Path) -> None:
    """The real command, with two processes, is killed again and again, and compared with a run that was never
    killed."""
    command = [sys.executable, str(fineweb), f'--input={long_text}', '--shard_size=300_000', '--num_proc=2']
    folder = tmp_path / 'data/fineweb_edu'
    subprocess.run(command, check=True, capture_output=True)
    whole = {name: data for name, data in contents(folder).items() if name != 'prepare.py'}
    assert len(whole) > 40
    for name in whole:
        (folder / name).unlink()

    chance, ends = random.Random(2), list[int]()
    for _ in range(100):
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        try:
            if len(ends) < 8:
                wait_for_more_shards(folder, running, chance.randint(1, 3))
                time.sleep(chance.uniform(0, 0.3))
                running.kill()  # the run alone: its workers notice
            _, error = running.communicate(timeout=PATIENT)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
        ends.append(running.returncode)
        if running.returncode == 0:
            break
        assert running.returncode == -signal.SIGKILL, error
    assert ends.count(-signal.SIGKILL) >= 5
    assert {name: data for name, data in contents(folder).items() if name != 'prepare.py'} == whole


def wait_for_more_shards(folder: Path, running: subprocess.Popen[bytes], more: int) -> None:
    """Block until the run has made so many more, or has ended."""
    before = len(list(folder.glob('*.bin')))
    wait_until(lambda: len(list(folder.glob('*.bin'))) >= before + more or running.poll() is not None, 'a shard')
