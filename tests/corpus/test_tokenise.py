"""Reading texts of any kind, splitting, tokenising in several processes, and writing token files."""
import bz2
import codecs
import errno
import gzip
import hashlib
import http.server
import itertools
import json
import lzma
import multiprocessing
import re
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from plaingpt.corpus import documents, tokenise, tokenizer
from plaingpt.corpus.download import download
from plaingpt.corpus.folder import open_split
from plaingpt.errors import COMMAND, DATA, DISK_FULL, OUT_OF_MEMORY, PEER_LOST, UserError

TEXTS = ['The first.\n', 'Zweites Stück: "ö"\n', '', '三番目 🙂', 'last\r\n']


def write_jsonl(path: Path, texts: list[str], column: str = 'text') -> Path:
    lines = [json.dumps({'id': i, column: text}) for i, text in enumerate(texts)]
    path.write_text('\n\n'.join(lines) + '\n', encoding='utf-8')
    return path


def write_parquet(path: Path, texts: list[str], column: str = 'text') -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({'id': list(range(len(texts))), column: texts}), path, row_group_size=2)
    return path


def read(path: Path | str, folder: Path, column: str = 'text') -> list[str]:
    """Return all documents at `path`; there are as many as were counted."""
    pieces = find_pieces(path, folder, column)
    texts = list(documents.read_documents(pieces))
    assert len(texts) == tokenise.count_documents(pieces)
    return texts


def find_pieces(path: Path | str, folder: Path, column: str = 'text') -> list[documents.Piece]:
    files = documents.find_files(str(path), folder)
    return [piece for file in files for piece in documents.find_pieces(file, column)]


# ------------------------------------------------------------------------------------------------
# Reading


def test_jsonl_parquet_and_packed_files_hold_the_same_documents(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / 'a.jsonl', TEXTS)
    parquet = write_parquet(tmp_path / 'b.parquet', TEXTS)
    packed = tmp_path / 'c.jsonl.xz'
    packed.write_bytes(lzma.compress(jsonl.read_bytes()))
    assert read(jsonl, tmp_path) == read(parquet, tmp_path) == read(packed, tmp_path) == TEXTS


def test_a_text_file_is_one_document_and_keeps_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / 'a.txt').write_bytes(b'one\r\n\ntwo')
    (tmp_path / 'README').write_bytes(b'any name will do')
    assert read(tmp_path / 'a.txt', tmp_path) == ['one\r\n\ntwo']
    assert read(tmp_path / 'README', tmp_path) == ['any name will do']


def write_many(folder: Path) -> tuple[list[Path], list[str]]:
    """Write files of all kinds, of several pieces each if PIECE is small; return them and their documents."""
    import pyarrow
    import pyarrow.parquet

    texts = [f'document {i} ' + 'é' * (i % 7) * (i % 5) for i in range(400)]
    texts[::50] = [''] * 8
    folder.mkdir(exist_ok=True)
    files = [folder / name for name in ('a.jsonl', 'b.parquet', 'c.jsonl.xz', 'd.txt', 'e.txt')]
    lines = [json.dumps({'text': text}) for text in texts]
    files[0].write_text('\n' + '\r\n \n'.join(lines[:150]), encoding='utf-8')
    with pyarrow.parquet.ParquetWriter(files[1], schema := pyarrow.schema([('text', 'string')])) as writer:
        for start, stop in [*itertools.pairwise(range(150, 291, 10)), (290, 290), (290, 300)]:  # row groups
            writer.write_table(pyarrow.table({'text': texts[start:stop]}, schema))
    files[2].write_bytes(lzma.compress('\n'.join(lines[300:398]).encode()))
    for path, text in zip(files[3:], texts[398:], strict=True):
        path.write_text(text, encoding='utf-8')
    return files, texts


def test_pieces_are_read_apart_and_hold_each_document_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, 'PIECE', 500)
    files, texts = write_many(tmp_path / 'in')
    pieces = find_pieces(tmp_path / 'in', tmp_path)
    apart = [list(documents.read_documents([piece])) for piece in reversed(pieces)]
    assert list(itertools.chain.from_iterable(reversed(apart))) == texts
    assert [len(some) for some in reversed(apart)] == [piece.n_documents for piece in pieces]

    of_file = Counter(piece.name for piece in pieces)
    assert [of_file[str(path)] > 4 for path in files] == [True, True, False, False, False]
    assert max(piece.stop - piece.start for piece in pieces if piece.name == str(files[0])) < 700  # length in bytes
    assert {piece.name for piece in pieces if piece.is_apart} == {str(path) for path in files[:2]}


def test_small_row_groups_are_read_together_and_a_large_one_by_the_process_that_can_stop_midway(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, 'PIECE', 1000)
    path = write_parquet(tmp_path / 'a.parquet', ['x' * 10] * 100)  # two rows in each group
    n_pieces = len(find_pieces(path, tmp_path))
    assert 5 < n_pieces < 25
    monkeypatch.setattr(documents, 'LARGEST', 100)
    assert not [piece for piece in find_pieces(path, tmp_path) if piece.is_apart]
    assert len(find_pieces(path, tmp_path)) == n_pieces


def test_an_error_in_a_later_piece_names_the_line_and_byte_of_the_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, 'PIECE', 30)
    good = b'{"text": "fine"}\n\n' * 10
    for bad, message in [(b'{"text": ', 'line 21 is not JSON'), (b'{"body": ""}', 'line 21 has no text in a column'),
                         (b'{"text": "caf\xe9"}', 'is not UTF-8: byte 193 is 0xe9')]:
        (tmp_path / 'a.jsonl').write_bytes(good + bad + b'\n' + good)
        pieces = find_pieces(tmp_path / 'a.jsonl', tmp_path)
        with pytest.raises(UserError, match=rf'a\.jsonl,? {message}'):
            list(documents.read_documents(pieces[5:]))


def test_folders_globs_and_urls_give_the_same_documents_in_the_same_order(tmp_path: Path) -> None:
    import fsspec

    inputs = tmp_path / 'in'
    (inputs / 'deeper').mkdir(parents=True)
    memory = fsspec.filesystem('memory')
    for name in ('b.txt', 'a.txt', 'deeper/c.txt'):
        (inputs / name).write_text(name, encoding='utf-8')
        memory.pipe(f'/in/{name}', name.encode())
    (inputs / 'picture.png').write_bytes(b'\x89PNG')
    (inputs / 'brackets[1].txt').write_text('brackets', encoding='utf-8')

    assert read(inputs, tmp_path) == ['a.txt', 'b.txt', 'brackets', 'deeper/c.txt']
    assert read(f'{inputs}/?.txt', tmp_path) == ['a.txt', 'b.txt']
    assert read(f'{inputs}/**/c.txt', tmp_path) == ['deeper/c.txt']
    assert read(f'{inputs}/brackets[1].txt', tmp_path) == ['brackets']
    assert read(f'file://{inputs}/a.txt', tmp_path) == ['a.txt']
    assert read('memory://in', tmp_path) == ['a.txt', 'b.txt', 'deeper/c.txt']
    assert read('memory://in/*.txt', tmp_path) == ['a.txt', 'b.txt']


def test_lines_of_json_may_be_utf16(tmp_path: Path) -> None:
    """PowerShell writes them so; a line separator within a text ends no line."""
    texts = [*TEXTS, 'a\u2028b\x85c 🙂']
    lines = '\r\n'.join(json.dumps({'text': text}, ensure_ascii=False) for text in texts)
    for encoding in ('utf-16', 'utf-8-sig'):
        (tmp_path / 'a.jsonl').write_bytes(lines.encode(encoding))
        assert read(tmp_path / 'a.jsonl', tmp_path) == texts
    (tmp_path / 'a.jsonl').write_bytes(lines.encode('utf-16')[:-1])
    with pytest.raises(UserError, match=r'is not UTF-16-LE: byte \d+ .*\n.*iconv -f UTF-16-LE'):
        read(tmp_path / 'a.jsonl', tmp_path)


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.parquet'])
def test_a_row_that_memory_might_not_hold_is_refused_with_the_way_in(
        suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, 'LONGEST_ROW', 8000)
    for length in (900, 9000):
        path = tmp_path / f'a{suffix}'
        if suffix == '.parquet':
            write_parquet(path, [''.join(map(chr, range(40, 40 + length)))])  # which does not compress
        else:
            line = json.dumps({'text': 'x' * length}).encode()
            path.write_bytes(gzip.compress(line) if suffix.endswith('.gz') else line)
        if length == 900:
            assert len(read(path, tmp_path)) == 1
            continue
        with pytest.raises(UserError, match=r'more than 8 kB in one line or row.*\nsave that text as a \.txt file'):
            read(path, tmp_path)


def test_half_a_surrogate_pair_is_replaced_as_tiktoken_replaces_it(tmp_path: Path) -> None:
    (tmp_path / 'a.jsonl').write_text(r'{"text": "a\ud83db \ud83d\ude42 \uD83D"}', encoding='utf-8')
    assert read(tmp_path / 'a.jsonl', tmp_path) == ['a\ufffdb 🙂 \ufffd']


def break_utf8(folder: Path) -> Path:
    path = write_jsonl(folder / 'bad.jsonl', ['fine', 'more'])
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    return path


def write_bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name
    return write


def damage(suffix: str, cut: bool) -> Callable[[Path], Path]:
    """Damage a packed file, or a parquet file with checksums: cut it off in its middle, or overwrite bytes there."""
    def write(folder: Path) -> Path:
        path, texts = folder / f'a{suffix}', [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
        if suffix == '.parquet':
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({'text': texts}), path, write_page_checksum=True)
        else:
            pack = {'.gz': gzip, '.bz2': bz2, '.xz': lzma}[Path(suffix).suffix]
            path.write_bytes(pack.compress('\n'.join(texts).encode()))
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] if cut else whole[:middle] + b'\xff' * 20 + whole[middle + 20:])
        return path

    return write


@pytest.mark.parametrize(('make', 'message'), [
    (lambda folder: folder / 'nowhere.txt', r'--input=.*nowhere\.txt matches no file'),
    (lambda folder: folder / '*.md', r'matches no file'),
    (lambda folder: folder, r'is a folder without \.txt, \.jsonl or \.parquet files'),
    (lambda folder: 'nothing://x', r'--input=nothing://x cannot be opened'),
    (write_bytes('latin.txt', b'caf\xe9'), r'latin\.txt is not UTF-8: byte 3 is 0xe9\n.*iconv'),
    (break_utf8, r'bad\.jsonl is not UTF-8: byte 66 is 0xe9'),
    (write_bytes('a.jsonl', b'{"text": "a"}\n{"text": '), r'a\.jsonl, line 2 is not JSON'),
    (write_bytes('a.jsonl', b'["a"]'), r"a\.jsonl, line 1 has no text in a column 'text'; its columns: none"),
    (lambda folder: write_jsonl(folder / 'a.jsonl', TEXTS, 'body'), "'text'; its columns: id, body\n.*--column="),
    (lambda folder: write_parquet(folder / 'a.parquet', TEXTS, 'body'),
     r"'text'; its columns: id \(\w+\), body \(string\)\n.*--column="),
    (write_bytes('a.jsonl', b'{"text": "a"}\n' + b'[' * 200_000), r'a\.jsonl, line 2 is not JSON: its brackets'),
    (write_bytes('a.jsonl', b'{"text": "a", "id": ' + b'1' * 5000 + b'}'), r'a\.jsonl, line 1 is not JSON: .*digits'),
    (write_bytes('a.jsonl', json.dumps(dict.fromkeys(map(str, range(10**5)), 0)).encode()), r'its columns: 0, 1, 2,'),
    *((damage(f'.txt{suffix}', cut), fr'a\.txt\{suffix} cannot be read')
      for suffix in ('.gz', '.bz2', '.xz') for cut in (True, False)),
    (damage('.parquet', False), r'a\.parquet cannot be read'),
    (damage('.parquet', True), r'a\.parquet is not a parquet file'),
    (write_bytes('a.parquet', b'no such thing'), r'a\.parquet is not a parquet file'),
    (write_bytes('a.txt.xz', b'no such thing'), r'a\.txt\.xz cannot be read'),
])
def test_a_text_that_cannot_be_read_is_one_clear_message(
        tmp_path: Path, make: Callable[[Path], Path | str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(make(tmp_path), tmp_path)
    assert caught.value.code == DATA
    assert len(str(caught.value).splitlines()) <= 3 and len(str(caught.value)) < 600


def test_a_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    for path in (write_jsonl(tmp_path / 'a.jsonl', TEXTS), write_parquet(tmp_path / 'a.parquet', TEXTS)):
        with pytest.raises(UserError, match="no text in a column 'id'"):
            read(path, tmp_path, column='id')


# ------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a web server: its address, and the paths that it was asked for. /short promises more than it sends."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if self.path == '/missing.txt' else 200)
            self.send_header('Content-Length', '100' if self.path == '/short.txt' else '11')
            self.end_headers()
            self.wfile.write(b'hello there')

        def log_request(self, code: int | str = '-', size: int | str = '-') -> None:
            """Print nothing."""

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{running.server_port}', asked
        running.shutdown()


def test_a_download_appears_only_with_the_right_bytes(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    path, right = tmp_path / 'new/input.txt', hashlib.sha256(b'hello there').hexdigest()
    for name, sha256, message in [('/missing.txt', right, '404'), ('/short.txt', '', 'broke off 89 bytes early'),
                                  ('/a.txt', '0' * 64, f'sha256 is {right}')]:
        with pytest.raises(UserError, match=f'{url}{name} cannot be used.*{message}.*\n.*--input=') as caught:
            download(url + name, path, sha256)
        assert caught.value.code == DATA
        assert not list(path.parent.glob('*'))

    assert download(f'{url}/a.txt', path, right).read_bytes() == b'hello there'
    download(f'{url}/a.txt', path, right)
    assert asked.count('/a.txt') == 2  # once with the wrong hash, once with the right one, and not again
    path.write_bytes(b'damaged')
    assert download(f'{url}/a.txt', path, right).read_bytes() == b'hello there'
    assert [file.name for file in path.parent.iterdir()] == ['input.txt']


def test_a_web_page_is_fetched_once_and_read_twice(server: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = server
    assert read(f'{url}/a.txt?download=true', tmp_path) == ['hello there']
    assert asked == ['/a.txt?download=true']
    with pytest.raises(UserError, match='404'):
        read(f'{url}/missing.txt', tmp_path)


# ------------------------------------------------------------------------------------------------
# Splitting


@pytest.mark.parametrize(('n_documents', 'fraction'), [(1000, 0.0005), (12345, 0.0005), (7, 0.5), (2, 0.1)])
def test_the_validation_documents_are_those_of_hugging_faces_split(n_documents: int, fraction: float) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({'number': list(range(n_documents))})
    reference = rows.train_test_split(test_size=fraction, seed=2357, shuffle=True)['test']['number']
    assert tokenise.choose_validation(n_documents, fraction, 2357).tolist() == list(reference)


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, float('nan')])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match='between 0 and 1') as caught:
        tokenise.choose_validation(10, fraction, 0)
    assert caught.value.code == COMMAND


# ------------------------------------------------------------------------------------------------
# Tokenising and writing


EVERY_FOURTH = np.arange(3, 2000, 4)


def numbered(n_documents: int) -> list[str]:
    """Return documents of different lengths."""
    return [f'document {i} ' + 'é' * (i % 7) for i in range(n_documents)]


def write(folder: Path, parts: Sequence[tokenise.Part], validation: tokenise.Numbers = EVERY_FOURTH, spec: str = 'byte',
          num_proc: int = 1, eot: bool = True, keep_empty: bool = True) -> None:
    tokenizer = tokenise.build_tokenizer(spec, parts, validation, eot)
    packer = tokenise.Packer(tokenizer, tokenizer.eot, keep_empty)
    tokenise.write_corpus(folder, packer, parts, validation, 'these', num_proc)


def read_bytes(folder: Path, split: str) -> list[int]:
    return [int(i) for i in np.fromfile(folder / f'{split}.bin', dtype='<u2')]


def ids_of(texts: Iterable[str]) -> list[int]:
    return [i for text in texts for i in [*text.encode('utf-8'), 256]]


def test_token_files_hold_each_document_and_an_end_of_text(tmp_path: Path) -> None:
    write(tmp_path, [numbered(40)])
    assert read_bytes(tmp_path, 'train') == ids_of(text for i, text in enumerate(numbered(40)) if i % 4 != 3)
    assert read_bytes(tmp_path, 'val') == ids_of(numbered(40)[3::4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['checksums.npz', 'meta.json', 'train.bin', 'val.bin']


def test_meta_json_describes_the_files(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, 'PIECE', 2000)  # the file's first and last 4096 bytes span several batches
    texts = ['abc' * 100] * 50 + ['d', 'é']
    write(tmp_path, [texts], np.array([51]))
    meta = json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))
    assert meta['format'] == 1 and meta['dtype'] == 'uint16' and meta['vocab_size'] == 257
    assert meta['source'] == 'these' and meta['created_by'].startswith('python ')
    assert tokenizer.from_state(meta['tokenizer']).encode('é') == [195, 169]
    packed = (tmp_path / 'train.bin').read_bytes()
    assert meta['splits']['train'] == {
        'tokens': 15052, 'documents': 51, 'bytes': 15001, 'largest_id': 256,
        'sha256': hashlib.sha256(packed).hexdigest(), 'head': hashlib.sha256(packed[:4096]).hexdigest(),
        'tail': hashlib.sha256(packed[-4096:]).hexdigest()}
    assert meta['splits']['val']['tokens'] == 3 and meta['splits']['val']['bytes'] == 2
    with np.load(tmp_path / 'checksums.npz') as sums:
        assert {name: sums[made['sha256']].tolist() for name, made in meta['splits'].items()} == {
            name: [zlib.crc32((tmp_path / f'{name}.bin').read_bytes())] for name in ('train', 'val')}, 'one block each'
    assert '15,052 tokens' in capsys.readouterr().out
    assert len(open_split(tmp_path, 'train', 8, 257)) == 15052  # training accepts them


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    many = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    write(tmp_path, [[many, many[-3:]]], np.array([1]), 'char', eot=False)
    assert np.fromfile(tmp_path / 'train.bin', dtype='<u4').tolist() == list(range(70_000))
    assert json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))['dtype'] == 'uint32'
    assert open_split(tmp_path, 'val', 2, 70_000).read(0, 3).tolist() == [69_997, 69_998, 69_999]


@pytest.mark.parametrize('spec', ['byte', 'bpe:300'])
@pytest.mark.parametrize('keep_empty', [True, False])
def test_any_number_of_processes_writes_the_documents_in_the_order_of_the_files_and_of_the_draw(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, keep_empty: bool) -> None:
    monkeypatch.setattr(documents, 'PIECE', 500)
    monkeypatch.setattr(tokenise, 'PIECE', 500)
    _, texts = write_many(tmp_path / 'in')
    validation = np.random.default_rng(1).permutation(len(texts))[:60]
    parts: list[tokenise.Part] = [numbered(30), *find_pieces(tmp_path / 'in', tmp_path)]
    for num_proc in (1, 2, 3):
        write(tmp_path / str(num_proc), parts, validation, spec, num_proc, keep_empty=keep_empty)
        for name in ('train.bin', 'val.bin', 'meta.json', 'checksums.npz'):
            assert (tmp_path / '1' / name).read_bytes() == (tmp_path / str(num_proc) / name).read_bytes()
    assert not multiprocessing.active_children()

    everything = [*numbered(30), *texts]
    assert spec != 'byte' or read_bytes(tmp_path / '1', 'val') == ids_of(
        everything[i] for i in validation if everything[i] or keep_empty)
    assert spec != 'byte' or read_bytes(tmp_path / '1', 'train') == ids_of(
        text for i, text in enumerate(everything) if i not in validation and (text or keep_empty))


def test_no_text_is_sent_to_a_process_that_can_read_it_itself(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / 'a.jsonl', ['long ' * 10_000] * 100),
             write_parquet(tmp_path / 'a.parquet', ['long ' * 10_000] * 100)]
    for path in paths:
        batches = list(tokenise.make_batches(find_pieces(path, tmp_path), EVERY_FOURTH))
        assert len(batches) > 1
        assert [i for batch in batches for i in batch.validation] == list(range(3, 100, 4))
        assert max(len(ForkingPickler.dumps(batch)) for batch in batches) < 1000


def test_reading_never_runs_far_ahead_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """This bounds the memory: the executor's own queue would take the whole corpus."""
    monkeypatch.setattr(tokenise, 'PIECE', 10)
    n_read = 0

    def count() -> Iterator[tokenise.Part]:
        nonlocal n_read
        for text in numbered(2000):
            n_read += 1
            yield [text]

    packer = tokenise.Packer(tokenizer.build('byte', list, True), 256)
    results = tokenise.tokenise(tokenise.make_batches(count(), EVERY_FOURTH), packer, num_proc=2)
    ahead = [n_read - n_written for n_written, _ in enumerate(results, start=1)]
    assert len(ahead) == 2000
    assert max(ahead) <= 2 * 2 + 1  # two for each process, and one that groupby holds


# ------------------------------------------------------------------------------------------------
# Long documents, which no process holds as a whole


ENCODINGS = {'.txt': 'utf-8', '.marked.txt': 'utf-8-sig', '.windows.txt': 'utf-16', '.txt.gz': 'utf-8'}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have texts of more than a few hundred characters count as long."""
    monkeypatch.setattr(documents, 'PIECE', 300)
    monkeypatch.setattr(documents, 'BLOCK', 101)  # not a multiple of any character's size
    monkeypatch.setattr(tokenise, 'PIECE', 300)
    monkeypatch.setattr(tokenizer, 'PART', 20)


def write_text(folder: Path, suffix: str, text: str) -> Path:
    path = folder / f'long{suffix}'
    content = text.encode(ENCODINGS[suffix])
    path.write_bytes(gzip.compress(content) if suffix.endswith('.gz') else content)
    return path


def long_text(documents: list[str]) -> str:
    return '\n'.join(documents) + ' é\u3000日本 🙂\r\n' * 100


@pytest.mark.parametrize('suffix', ENCODINGS)
@pytest.mark.parametrize('spec', ['byte', 'char', 'bpe:300', 'small'])
@pytest.mark.usefixtures('small_parts')
def test_a_long_text_file_gives_the_same_files_as_its_text_at_once(
        suffix: str, spec: str, tmp_path: Path, documents: list[str], small_encoding: tiktoken.Encoding) -> None:
    """It is a document for training or for validation, between others or at the end."""
    text = long_text(documents)
    path = write_text(tmp_path, suffix, text)
    [piece] = find_pieces(path, tmp_path)
    cut: list[tokenise.Part] = [['first', ''], piece, ['', 'middle'], piece]
    whole: list[tokenise.Part] = [['first', '', text, '', 'middle', text]]
    assert tokenise.count_documents(cut) == tokenise.count_documents(whole) == 6
    learned = tokenizer.Tiktoken(small_encoding) if spec == 'small' else tokenise.build_tokenizer(
        spec, whole, np.array([5]), True)
    assert spec == 'small' or tokenise.build_tokenizer(spec, cut, np.array([5]), True).state() == learned.state()
    assert len(list(tokenise.make_batches(cut, np.array([5]), may_cut=True))) > 10
    for number, validation in enumerate(([5], [2, 0], [5, 4, 2, 1])):
        for keep_empty, num_proc in ((True, 1), (False, 2 if number == 1 else 1)):
            made: list[dict[str, bytes]] = []
            for parts in (whole, cut):
                packer = tokenise.Packer(learned, learned.eot, keep_empty)
                folder = tmp_path / f'{number}-{keep_empty}-{len(made)}'
                tokenise.write_corpus(folder, packer, parts, np.array(validation), 'these', num_proc)
                made.append({file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != '.npz'})
            assert made[0] == made[1]


@pytest.mark.parametrize('suffix', ENCODINGS)
@pytest.mark.usefixtures('small_parts')
def test_a_long_text_file_is_split_by_position_as_its_text_is(
        suffix: str, tmp_path: Path, documents: list[str]) -> None:
    text = long_text(documents)
    pieces = find_pieces(write_text(tmp_path, suffix, text), tmp_path)
    for fraction in (0.1, 0.5, 0.123, 1e-9, 1 - 1e-9):
        texts = list(tokenise.read_texts(tokenise.split_text(text, fraction)[0]))
        parts, validation = tokenise.split_document([['', ''], *pieces], 2, fraction)
        assert list(tokenise.read_texts(parts)) == texts
        passages = tokenise.numbered(tokenise.read_passages(parts, may_cut=True))
        assert [''.join(passage.text for _, passage in some)
                for _, some in itertools.groupby(passages, lambda item: item[0])] == texts
        assert validation.tolist() == [1]


@pytest.mark.usefixtures('small_parts')
def test_a_long_text_is_sent_to_no_process_and_is_known_on_both_sides_of_the_split(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [*find_pieces(write_text(tmp_path, '.txt', 'one two ' * 500), tmp_path)] * 2
    batches = list(tokenise.make_batches(pieces, np.array([1]), may_cut=True))
    assert len(batches) == 28
    assert max(len(ForkingPickler.dumps(batch)) for batch in batches) < 1000
    write(tmp_path / 'out', [['other'], *pieces], np.array([2]))
    assert 'of the documents in val.bin, 1 are in train.bin, too' in capsys.readouterr().out


@pytest.mark.usefixtures('small_parts')
def test_an_error_in_a_long_text_names_the_byte_of_the_file(tmp_path: Path) -> None:
    good = 'é one '.encode() * 500
    for name, content, byte in [('a.txt', good + b'\xe9 ' + good, len(good)),
                                ('a.txt', codecs.BOM_UTF8 + good + b'\xe9 ' + good, 3 + len(good)),
                                ('a.txt', good + b'\xc3', len(good)),
                                ('a.txt.gz', good + b'\xe2\x82', len(good))]:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
        with pytest.raises(UserError, match=f'is not UTF-8: byte {byte} is 0x{content[byte]:02x}'):
            write(tmp_path / 'out', find_pieces(tmp_path / name, tmp_path))


def test_a_text_that_can_only_be_cut_in_its_words_says_so_once(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters = 'word ' * 10 + 'x' * 2_500_000  # cut twice
    path = write_text(tmp_path, '.txt', letters)
    lines = 'word ' * 60_000 + 'x' * 900_000 + ' end'  # a run that fits into a part that begins with it
    cases: list[tuple[str, list[tokenise.Part], int]] = [
        ('bpe:300', [[lines]], 0),
        ('bpe:300', [*find_pieces(path, tmp_path)], 2), ('bpe:300', [[letters]], 2),
        ('bpe:300', [['word ' * 500_000]], 0), ('byte', [[letters]], 0)]
    for number, (spec, parts, n_cuts) in enumerate(cases):
        write(tmp_path / str(number), [['short'], *parts], np.array([0]), spec)
        said = [line for line in capsys.readouterr().out.splitlines() if 'white space, of more than' in line]
        assert [line.rpartition(' ')[2] for line in said] == [str(n_cuts)] * (n_cuts > 0)
    assert (tmp_path / '1/train.bin').read_bytes() == (tmp_path / '2/train.bin').read_bytes()


# ------------------------------------------------------------------------------------------------
# Failures


def test_a_failure_midway_leaves_the_old_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tokenise, documents):
        monkeypatch.setattr(module, 'PIECE', 100)
    (tmp_path / 'out').mkdir()
    write(tmp_path / 'out', [numbered(40)])
    before = {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    lines = write_jsonl(tmp_path / 'a.jsonl', numbered(400)).read_bytes()
    (tmp_path / 'a.jsonl').write_bytes(lines + b'broken')

    for num_proc in (1, 2):
        with pytest.raises(UserError, match=r'a\.jsonl, line 800 is not JSON') as caught:
            write(tmp_path / 'out', find_pieces(tmp_path / 'a.jsonl', tmp_path), num_proc=num_proc)
        assert caught.value.code == DATA
        assert {path.name: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == before
        assert not multiprocessing.active_children()


def test_a_corpus_that_was_interrupted_between_its_files_names_the_command_that_was_typed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['data/text/prepare.py', '--input=mytext.txt', '--tokenizer', 'byte'])
    monkeypatch.setattr('plaingpt.corpus.checksums.write', lambda *_: sys.exit('killed'))
    with pytest.raises(SystemExit):
        write(tmp_path / 'out', [numbered(40)])
    with pytest.raises(UserError, match='is not complete') as caught:
        open_split(tmp_path / 'out', 'train', 16, 257)
    command = f'data/text/prepare.py --input=mytext.txt --tokenizer=byte --to_dir={tmp_path}/out'
    assert str(caught.value).endswith(command) and 'continue with: ' in str(caught.value)


def test_a_disk_that_is_full_ends_the_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, 'PIECE', 10)

    def fail(writer: tokenise.Writer, packed: tokenise.Packed) -> None:
        assert multiprocessing.active_children()
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(tokenise.Writer, 'write', fail)
    with pytest.raises(UserError, match='cannot be written: the disk is full') as caught:
        write(tmp_path, [numbered(2000)], num_proc=2)
    assert caught.value.code == DISK_FULL
    assert not multiprocessing.active_children()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('stop_at', ['train.bin', 'val.bin', 'meta.json'])
def test_files_of_two_runs_are_never_taken_for_one(
        tmp_path: Path, stop_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine stops between the renames: what is left must not open, whether or not a corpus existed before."""
    real, calls = Path.replace, list[str]()

    def replace(path: Path, target: Path) -> Path:
        if target.name == stop_at and calls:  # the first call is a note in meta.json
            raise KeyboardInterrupt
        calls.append(target.name)
        return real(path, target)

    write(tmp_path / 'old', [numbered(40)])
    for folder in (tmp_path / 'old', tmp_path / 'new'):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, 'replace', replace)
            with pytest.raises(KeyboardInterrupt):
                write(folder, [numbered(80)], spec='bpe:300')
        with pytest.raises(UserError) as caught:
            open_split(folder, 'train', 8, 50257)
        assert caught.value.code == DATA


def test_a_text_that_leaves_a_split_empty_is_refused(tmp_path: Path) -> None:
    for texts, split in [([], 'train'), (['a'], 'val'), (['', '', '', 'b'], 'train')]:
        with pytest.raises(UserError, match=rf'these holds no text for {split}\.bin') as caught:
            write(tmp_path, [texts])
        assert caught.value.code == DATA
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('', encoding='utf-8')
    with pytest.raises(UserError, match=r'file/corpus cannot be written'):
        write(tmp_path / 'file/corpus', [numbered(4)])


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing_of_the_first(tmp_path: Path) -> None:
    (tmp_path / 'train.bin.tmp').write_bytes(b'what the first has written')
    with tokenise.alone_in(tmp_path), pytest.raises(UserError, match='belongs to process') as caught:
        write(tmp_path, [numbered(4)])
    assert caught.value.code == PEER_LOST
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        'train.bin.tmp': b'what the first has written'}
    write(tmp_path, [numbered(4)])


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """Heed Ctrl-C as in a terminal: a process that a shell starts with & ignores it, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PACKER = tokenise.Packer(tokenizer.build('byte', list, False), None)


@pytest.mark.usefixtures('_heeds_ctrl_c')
def test_ctrl_c_is_left_to_the_process_that_started_the_workers() -> None:
    with tokenise.started_workers(PACKER, 1) as workers:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert workers.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == 'win32', reason='signals cannot be held back there')
@pytest.mark.usefixtures('_heeds_ctrl_c')
def test_ctrl_c_while_the_workers_start_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = ProcessPoolExecutor.submit, []

    def submit(workers: ProcessPoolExecutor, task: Callable[[], int]) -> Future[int]:
        signal.raise_signal(signal.SIGINT)
        started.append(real(workers, task))
        return started[-1]

    monkeypatch.setattr(ProcessPoolExecutor, 'submit', submit)
    with pytest.raises(KeyboardInterrupt), tokenise.started_workers(PACKER, 2):
        pytest.fail('it was lost')
    assert len(started) == 2, 'it arrived once both had started'
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, 'PIECE', 10)

    def kill_on_the_way() -> Iterator[tokenise.Part]:
        for i, text in enumerate(numbered(2000)):
            if i == 200:
                multiprocessing.active_children()[0].kill()
            yield [text]

    with pytest.raises(UserError, match=r'killed while it tokenised.*\n.*--num_proc=1') as caught:
        for _ in tokenise.tokenise(tokenise.make_batches(kill_on_the_way(), EVERY_FOURTH), PACKER, 2):
            pass
    assert caught.value.code == OUT_OF_MEMORY


@pytest.mark.parametrize('has_terminal', [False, True])
def test_progress_can_be_read_with_and_without_a_terminal(
        tmp_path: Path, has_terminal: bool, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tokenise, 'PIECE', 100)
    monkeypatch.setattr('plaingpt.console.PLAIN_SECONDS', 0.0)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: has_terminal)
    write(tmp_path, [numbered(2000)])
    out, bar = capsys.readouterr()
    lines = re.findall(r'^tokenising: ([\d,]+)/2,000 documents, [\d.]+ k?B of text, \d\d:\d\d so far, .* to go$', out,
                       re.MULTILINE)
    done = [int(number.replace(',', '')) for number in lines]
    assert out.count('tokenising') == len(done)
    if has_terminal:
        assert not done
        assert '| tokenising' in bar
    else:
        assert not bar
        assert done == sorted(set(done))
        assert len(done) > 100
        assert done[-1] < 2000
