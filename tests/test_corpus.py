"""Reading texts of any kind, splitting, tokenising in several processes, and writing token files."""
import hashlib
import http.server
import json
import lzma
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import corpus
import tokenizer as tokenizers
import tokens
from errors import COMMAND, DATA, UserError

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
    """All documents at `path`, of which there are as many as were counted."""
    files = corpus.find_files(str(path), folder)
    texts = list(corpus.read_documents(files, column))
    assert len(texts) == sum(map(corpus.count_documents, files))
    return texts


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
    (lambda folder: write_parquet(folder / 'a.parquet', TEXTS, 'body'), "'text'; its columns: id, body\n.*--column="),
    (write_bytes('a.parquet', b'no such thing'), r'a\.parquet is not a parquet file'),
    (write_bytes('a.txt.xz', b'no such thing'), r'a\.txt\.xz cannot be read'),
])
def test_a_text_that_cannot_be_read_is_one_clear_message(
        tmp_path: Path, make: Callable[[Path], Path | str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(make(tmp_path), tmp_path)
    assert caught.value.code == DATA
    assert len(str(caught.value).splitlines()) <= 3


def test_a_column_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    for path in (write_jsonl(tmp_path / 'a.jsonl', TEXTS), write_parquet(tmp_path / 'a.parquet', TEXTS)):
        with pytest.raises(UserError, match="no text in a column 'id'"):
            read(path, tmp_path, column='id')


# ------------------------------------------------------------------------------------------------
# Downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server: its address, and the paths that it was asked for. /short promises more than it sends."""
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
            corpus.download(url + name, path, sha256)
        assert caught.value.code == DATA
        assert list(path.parent.iterdir()) == []

    assert corpus.download(f'{url}/a.txt', path, right).read_bytes() == b'hello there'
    corpus.download(f'{url}/a.txt', path, right)
    assert asked.count('/a.txt') == 2  # once with the wrong hash, once with the right one, and not again
    path.write_bytes(b'damaged')
    assert corpus.download(f'{url}/a.txt', path, right).read_bytes() == b'hello there'
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
    assert corpus.choose_validation(n_documents, fraction, 2357).tolist() == list(reference)


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, float('nan')])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match='between 0 and 1') as caught:
        corpus.choose_validation(10, fraction, 0)
    assert caught.value.code == COMMAND


# ------------------------------------------------------------------------------------------------
# Tokenising and writing


def numbered(n_documents: int) -> list[tuple[str, str]]:
    """Documents of different lengths, every fourth of them for validation."""
    return [('val' if i % 4 == 3 else 'train', f'document {i} ' + 'é' * (i % 7)) for i in range(n_documents)]


def write(folder: Path, documents: corpus.Documents, spec: str = 'byte', num_proc: int = 1, eot: bool = True) -> None:
    tokenizer = corpus.build_tokenizer(spec, lambda: documents, eot)
    corpus.write_corpus(folder, tokenizer, documents, 100, 'these', tokenizer.eot, num_proc)


def test_token_files_hold_each_document_and_an_end_of_text(tmp_path: Path) -> None:
    write(tmp_path, numbered(40))
    for split in corpus.SPLITS:
        ids = np.fromfile(tmp_path / f'{split}.bin', dtype='<u2').tolist()
        assert ids == [i for s, text in numbered(40) if s == split for i in [*text.encode('utf-8'), 256]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta.json', 'train.bin', 'val.bin']


def test_meta_json_describes_the_files(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, 'BATCH', 2000)  # the file's first and last 4096 bytes come in several batches
    documents = [*[('train', 'abc' * 100)] * 50, ('train', 'd'), ('val', 'é')]
    write(tmp_path, documents)
    meta = json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))
    assert meta['format'] == 1 and meta['dtype'] == 'uint16' and meta['vocab_size'] == 257
    assert meta['source'] == 'these' and meta['created_by'].startswith('python ')
    assert tokenizers.from_state(meta['tokenizer']).encode('é') == [195, 169]
    packed = (tmp_path / 'train.bin').read_bytes()
    assert meta['splits']['train'] == {
        'tokens': 15052, 'documents': 51, 'bytes': 15001, 'largest_id': 256,
        'sha256': hashlib.sha256(packed).hexdigest(), 'head': hashlib.sha256(packed[:4096]).hexdigest(),
        'tail': hashlib.sha256(packed[-4096:]).hexdigest()}
    assert meta['splits']['val']['tokens'] == 3 and meta['splits']['val']['bytes'] == 2
    assert '15,052 tokens' in capsys.readouterr().out
    assert len(tokens.open_split(tmp_path, 'train', 8, 257)) == 15052  # training takes them


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    many = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    write(tmp_path, [('train', many), ('val', many[-3:])], 'char', eot=False)
    assert np.fromfile(tmp_path / 'train.bin', dtype='<u4').tolist() == list(range(70_000))
    assert json.loads((tmp_path / 'meta.json').read_text(encoding='utf-8'))['dtype'] == 'uint32'
    assert tokens.open_split(tmp_path, 'val', 2, 70_000).read(0, 3).tolist() == [69_997, 69_998, 69_999]


def test_several_processes_write_what_one_writes(
        tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, 'BATCH', 500)
    documents = [*numbered(400), *(('train', line) for line in tiny_text.splitlines(keepends=True))]
    for num_proc in (1, 2):
        write(tmp_path / str(num_proc), documents, 'bpe:300', num_proc)
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '2' / name).read_bytes()
    assert not multiprocessing.active_children()


def test_reading_never_runs_far_ahead_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory: the executor's own queue would take the whole corpus."""
    monkeypatch.setattr(corpus, 'BATCH', 10)
    n_read = 0

    def count() -> Iterator[tuple[str, str]]:
        nonlocal n_read
        for split, text in numbered(2000):
            n_read += 1
            yield split, text

    tokenizer = tokenizers.build('byte', list, True)
    packed = corpus.tokenise(corpus.make_batches(count()), corpus.Packer(tokenizer, tokenizer.eot), num_proc=2)
    ahead = [n_read - n_written for n_written, _ in enumerate(packed, start=1)]
    assert len(ahead) == 2000
    assert max(ahead) <= corpus.SMALL


def test_a_failure_on_the_way_leaves_the_old_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, 'BATCH', 100)
    write(tmp_path, numbered(40))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail() -> Iterator[tuple[str, str]]:
        yield from numbered(400)
        raise UserError('the text ends in the middle', DATA)

    for num_proc in (1, 2):
        tokenizer = tokenizers.build('byte', list, True)
        with pytest.raises(UserError, match='in the middle'):
            corpus.write_corpus(tmp_path, tokenizer, fail(), 400, 'these', tokenizer.eot, num_proc)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('stop_at', ['train.bin', 'val.bin', 'meta.json'])
def test_files_of_two_runs_are_never_taken_for_one(
        tmp_path: Path, stop_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine stops between the renames: what is there must not open, whether or not a corpus was there before."""
    real, calls = Path.replace, []

    def replace(path: Path, target: Path) -> Path:
        calls.append(Path(target).name)
        if Path(target).name == stop_at and ('train.bin' in calls):
            raise KeyboardInterrupt
        return real(path, target)

    write(tmp_path / 'old', numbered(40))
    for folder in (tmp_path / 'old', tmp_path / 'new'):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, 'replace', replace)
            with pytest.raises(KeyboardInterrupt):
                write(folder, numbered(80), 'bpe:300')
        with pytest.raises(UserError) as caught:
            tokens.open_split(folder, 'train', 8, 50257)
        assert caught.value.code == DATA


def test_a_text_that_leaves_a_split_empty_is_refused(tmp_path: Path) -> None:
    for documents, split in [([], 'train'), ([('train', 'a')], 'val'), ([('train', ''), ('val', 'b')], 'train')]:
        with pytest.raises(UserError, match=rf'these holds no text for {split}\.bin') as caught:
            write(tmp_path, documents)
        assert caught.value.code == DATA
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('', encoding='utf-8')
    with pytest.raises(UserError, match=r'file/corpus cannot be written'):
        write(tmp_path / 'file/corpus', numbered(4))


def test_ctrl_c_is_left_to_the_process_that_started_the_workers() -> None:
    before = signal.getsignal(signal.SIGINT)
    with corpus.start_workers(corpus.Packer(tokenizers.build('byte', list, False), None), 1) as workers:
        assert signal.getsignal(signal.SIGINT) is before
        assert workers.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_a_killed_worker_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, 'BATCH', 10)

    def kill_on_the_way() -> Iterator[tuple[str, str]]:
        for i, document in enumerate(numbered(2000)):
            if i == 200:
                multiprocessing.active_children()[0].kill()
            yield document

    tokenizer = tokenizers.build('byte', list, True)
    with pytest.raises(UserError, match=r'killed while it tokenised.*\n.*--num_proc=1'):
        corpus.write_corpus(tmp_path, tokenizer, kill_on_the_way(), 2000, 'these', tokenizer.eot, 2)
    assert list(tmp_path.iterdir()) == []
