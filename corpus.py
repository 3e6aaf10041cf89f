"""
Text of any kind -> token files: what every data/<name>/prepare.py shares.

    documents (split, text)  ->  batches  ->  tokenised by several processes  ->  train.bin, val.bin, and meta.json last

Everything streams: memory holds a few batches for each process, however long the corpus is. Files appear under their
names only when both splits are complete, so that an interrupted run leaves what was there before.
"""
import errno
import hashlib
import http.client
import itertools
import json
import lzma
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from errors import COMMAND, DATA, DISK_FULL, OUT_OF_MEMORY, UserError
from tokenizer import Tokenizer, build, from_state

Documents = Iterable[tuple[str, str]]  # (split, text): where each document goes, and what it says

SPLITS = ('train', 'val')
KINDS = ('.txt', '.jsonl', '.parquet')
BATCH = 1 << 20  # characters of text that a process tokenises at a time; bytes of a file that are read at a time
SMALL = 8  # batches that one process has done before others would have started
ENDS = 4096  # bytes at both ends of a token file whose hashes meta.json keeps, for a quick check at the start of a run
TIMEOUT = 30  # seconds that a download may stand still
TINY_SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
TINY_SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


# ------------------------------------------------------------------------------------------------
# Reading and splitting: a path -> files -> documents


def find_files(path: str, folder: Path, option: str = '--input') -> list[str]:
    """The files that `path` names, in a fixed order: one file, the .txt, .jsonl and .parquet files of a folder (packed
    or not), a glob, or a URL that fsspec opens. What http has is fetched into `folder` first: it is read twice."""
    import fsspec

    if path.startswith(('http://', 'https://')):
        name = PurePosixPath(path.partition('?')[0]).name
        return [str(download(path, folder / f'{option.removeprefix("--")}-{name}'))]
    try:
        files, root = fsspec.url_to_fs(path)
        is_folder = files.isdir(root)
        if is_folder:
            found = [name for name in files.find(root) if kind_of(name) in KINDS]
        else:
            found = [root] if files.exists(root) else [name for name in files.glob(root) if not files.isdir(name)]
    except (ImportError, OSError, ValueError) as error:  # a protocol that is unknown or not installed; no permission
        raise UserError(f'{option}={path} cannot be opened: {error}', DATA) from error
    if not found:
        what = 'is a folder without .txt, .jsonl or .parquet files' if is_folder else 'matches no file and no folder'
        raise UserError(f'{option}={path} {what}', DATA)
    return sorted(files.unstrip_protocol(name) if '://' in path else name for name in found)


def kind_of(name: str) -> str:
    """The suffix that says how a file is to be read, without that of the compression, which fsspec sees to."""
    path = PurePosixPath(name)
    return PurePosixPath(path.stem if path.suffix in ('.gz', '.xz', '.bz2') else path).suffix.lower()


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """The bytes of a file anywhere, unpacked."""
    import fsspec

    try:
        with fsspec.open(name, 'rb', compression='infer') as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f'{name} cannot be read: {error}', DATA) from error


def count_documents(name: str) -> int:
    """How many documents `read_documents` will find in a file."""
    if kind_of(name) not in ('.jsonl', '.parquet'):
        return 1
    with opened(name) as file:
        if kind_of(name) == '.jsonl':
            return sum(not line.isspace() for line in file)
        return int(open_parquet(name, file).metadata.num_rows)


def read_documents(names: list[str], column: str = 'text') -> Iterator[str]:
    """The documents of all files in order: the rows of .jsonl and .parquet files, and any other file as a whole."""
    for name in names:
        with opened(name) as file:
            if kind_of(name) == '.jsonl':
                yield from read_jsonl(name, file, column)
            elif kind_of(name) == '.parquet':
                yield from read_parquet(name, file, column)
            else:
                yield decode(name, file.read(), 0)


def decode(name: str, text: bytes, offset: int) -> str:
    """UTF-8 -> str. `offset` is where `text` starts in its file."""
    try:
        return text.decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{name} is not UTF-8: byte {offset + error.start} is 0x{text[error.start]:02x}\n'
                        'save it as UTF-8, for example: iconv -f latin1 -t utf-8 OLD > NEW', DATA) from None


def read_jsonl(name: str, file: BinaryIO, column: str) -> Iterator[str]:
    """The field `column` of every line that is not blank. Raises UserError that names the file and the line or byte."""
    offset = 0
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            try:
                row = json.loads(decode(name, line, offset))
            except json.JSONDecodeError as error:
                raise UserError(f'{name}, line {number} is not JSON: {error}', DATA) from None
            fields = list(row) if isinstance(row, dict) else []
            if column not in fields or not isinstance(row[column], str):
                raise missing_column(f'{name}, line {number}', column, fields)
            text = row[column]
            if b'\\ud' in line or b'\\uD' in line:  # perhaps half a surrogate pair: replaced, as tiktoken does
                text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
            yield text
        offset += len(line)


def open_parquet(name: str, file: BinaryIO) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file, buffer_size=BATCH, pre_buffer=False)  # by pages, not by row groups
    except ValueError as error:
        raise UserError(f'{name} is not a parquet file: {error}', DATA) from None


def read_parquet(name: str, file: BinaryIO, column: str) -> Iterator[str]:
    table = open_parquet(name, file)
    types = {field.name: str(field.type) for field in table.schema_arrow}
    if types.get(column) not in ('string', 'large_string'):
        raise missing_column(name, column, list(types))
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        yield from (text or '' for text in batch.column(0).to_pylist())


def missing_column(where: str, column: str, there_are: list[str]) -> UserError:
    return UserError(f"{where} has no text in a column '{column}'; its columns: {', '.join(there_are) or 'none'}\n"
                     'name the one to read with --column=', DATA)


def download(url: str, path: Path, sha256: str = '') -> Path:
    """`path`, fetched from `url` unless it is there with that sha256. It never appears with wrong or missing bytes."""
    if sha256 and path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    temporary, digest = path.with_name(path.name + '.tmp'), hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(temporary, 'wb') as file:
            while block := answer.read(BATCH):
                digest.update(block)
                file.write(block)
            if answer.length:  # still to come; urlopen itself raises where the server's status is an error
                raise OSError(f'it broke off {answer.length} bytes early')
        if sha256 and digest.hexdigest() != sha256:
            raise OSError(f'its sha256 is {digest.hexdigest()}, and {sha256} is expected')
        temporary.replace(path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f'{url} cannot be used: {error}\n'
                        'get the file in another way, and name it with --input=PATH', DATA) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


def read_tiny_shakespeare(path: str, folder: Path) -> str:
    """The text at `path`, or, where that is '', the download in `folder`/input.txt."""
    if not path:
        path = str(download(TINY_SHAKESPEARE, folder / 'input.txt', TINY_SHAKESPEARE_SHA256))
    return next(read_documents(find_files(path, folder)))


def choose_validation(n_documents: int, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """The numbers of the validation documents, as Hugging Face's train_test_split(test_size=fraction, seed=seed) lists
    them. While it draws, it needs 8 bytes for each document of the corpus."""
    if not 0 < fraction < 1:
        raise UserError(f'val_fraction={fraction} must lie between 0 and 1', COMMAND)
    return np.random.default_rng(seed).permutation(n_documents)[:math.ceil(fraction * n_documents)].copy()


def split_text(text: str, fraction: float) -> list[tuple[str, str]]:
    """One document by position: the last part of its characters is for validation."""
    cut = int(len(text) * (1 - fraction))
    return [('train', text[:cut]), ('val', text[cut:])]


# ------------------------------------------------------------------------------------------------
# Tokenising, in several processes


def build_tokenizer(spec: str, documents: Callable[[], Documents], eot: bool) -> Tokenizer:
    """The tokenizer that `spec` names, for these documents. Every character must be known, wherever it stands; a BPE
    learns its merges from the training documents alone."""
    return build(spec, lambda: (text for split, text in documents() if split == 'train' or spec == 'char'), eot)


class Packed(NamedTuple):
    """Some documents of one split as token files have them. Bytes: a list of Python integers costs more to hand over
    from process to process than its tokens cost to find."""

    tokens: bytes
    largest_id: int
    n_documents: int
    n_bytes: int  # of the text in UTF-8


class Packer:
    """Documents -> Packed. `eot` follows each document, unless it is None."""

    def __init__(self, tokenizer: Tokenizer, eot: int | None) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype('<u2' if tokenizer.n_vocab <= 1 << 16 else '<u4')  # nanoGPT's, where it holds all ids
        self.end = np.array([] if eot is None else [eot], dtype=np.uint32)

    def __call__(self, texts: list[str]) -> Packed:
        ids = np.concatenate([part for text in self.tokenizer.encode_batch(texts) for part in (text, self.end)])
        n_bytes = sum(len(text.encode('utf-8')) for text in texts)
        return Packed(ids.astype(self.dtype).tobytes(), int(ids.max(initial=0)), len(texts), n_bytes)


def make_batches(documents: Documents) -> Iterator[tuple[str, list[str]]]:
    """Documents of one split in their order, BATCH characters or a little more at a time."""
    waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text in documents:
        waiting[split].append(text)
        sizes[split] += len(text)
        if sizes[split] >= BATCH:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    yield from ((split, texts) for split, texts in waiting.items() if texts)


def tokenise(batches: Iterable[tuple[str, list[str]]], packer: Packer, num_proc: int) -> Iterator[tuple[str, Packed]]:
    """Every batch packed, in order."""
    batches = iter(batches)
    first = list(itertools.islice(batches, SMALL))
    if num_proc == 1 or len(first) < SMALL:
        yield from ((split, packer(texts)) for split, texts in itertools.chain(first, batches))
        return
    workers = start_workers(packer, num_proc)
    waiting: deque[tuple[str, Future[Packed]]] = deque()
    try:
        for split, texts in itertools.chain(first, batches):
            waiting.append((split, workers.submit(pack_in_worker, texts)))
            if len(waiting) > 2 * num_proc:  # never more: an executor's own queue has no limit
                yield waiting[0][0], waiting.popleft()[1].result()
        yield from ((split, future.result()) for split, future in waiting)
    except BrokenProcessPool:
        raise UserError('a process was killed while it tokenised, most likely for want of memory\n'
                        f'give --num_proc={max(1, num_proc // 2)}', OUT_OF_MEMORY) from None
    finally:
        workers.shutdown(cancel_futures=True)


WORKER: dict[str, Packer] = {}  # in a worker process: what it packs with


def start_workers(packer: Packer, num_proc: int) -> ProcessPoolExecutor:
    """Processes that start afresh on every system (spawn), leave Ctrl-C to this one, and end when it is killed."""
    eot = int(packer.end[0]) if len(packer.end) else None
    workers = ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), set_up_worker,
                                  (packer.tokenizer.state(), eot))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which new processes inherit
    try:
        for _ in range(num_proc):
            workers.submit(os.getpid)  # starts one process, as there is none that is idle
    finally:
        signal.signal(signal.SIGINT, before)
    return workers


def set_up_worker(state: dict[str, Any], eot: int | None) -> None:
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # there is a process for each core already
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKER['packer'] = Packer(from_state(state), eot)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, 'a worker has a parent'
    parent.join()
    os._exit(1)


def pack_in_worker(texts: list[str]) -> Packed:
    return WORKER['packer'](texts)


# ------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """One token file, and what meta.json will say about it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.head, self.tail = file, hashlib.sha256(), b'', b''
        self.n_documents = self.n_bytes = self.size = self.largest_id = 0

    def write(self, packed: Packed) -> None:
        self.file.write(packed.tokens)
        self.sha256.update(packed.tokens)
        self.head += packed.tokens[:ENDS - len(self.head)]
        self.tail = (self.tail + packed.tokens[-ENDS:])[-ENDS:]
        self.size += len(packed.tokens)
        self.n_documents += packed.n_documents
        self.n_bytes += packed.n_bytes
        self.largest_id = max(self.largest_id, packed.largest_id)

    def finish(self, dtype: np.dtype[Any]) -> dict[str, Any]:
        """Put everything on the disk; return the numbers for meta.json."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {'tokens': self.size // dtype.itemsize, 'documents': self.n_documents, 'bytes': self.n_bytes,
                'largest_id': self.largest_id, 'sha256': self.sha256.hexdigest(),
                'head': hashlib.sha256(self.head).hexdigest(), 'tail': hashlib.sha256(self.tail).hexdigest()}


def write_corpus(folder: Path, tokenizer: Tokenizer, documents: Documents, n_documents: int, source: str,
                 eot: int | None, num_proc: int = 0) -> None:
    """Tokenise `documents` into folder/train.bin and val.bin, with `eot` after each unless it is None, by `num_proc`
    processes (0: one for each core), and print what came of it. UserError where a split is empty or the disk full."""
    from tqdm import tqdm

    packer, num_proc = Packer(tokenizer, eot), num_proc if num_proc > 0 else os.cpu_count() or 1
    temporary = {split: folder / f'{split}.bin.tmp' for split in SPLITS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as files, tqdm(total=n_documents, unit=' texts', disable=not sys.stderr.isatty()) as bar:
            writers = {split: Writer(files.enter_context(open(temporary[split], 'wb'))) for split in SPLITS}
            for split, packed in tokenise(make_batches(documents), packer, num_proc):
                writers[split].write(packed)
                bar.update(packed.n_documents)
            splits = {split: writer.finish(packer.dtype) for split, writer in writers.items()}
        empty = [split for split in SPLITS if splits[split]['bytes'] == 0]
        if empty:
            raise UserError(f'{source} holds no text for {empty[0]}.bin', DATA)
        meta = {'format': 1, 'tokenizer': tokenizer.reference(), 'vocab_size': tokenizer.n_vocab,
                'dtype': packer.dtype.name, 'source': source, 'created_by': shlex.join(['python', *sys.argv]),
                'splits': splits}
        write_meta(folder, {'format': 1, 'unfinished': True})  # so that half of it is not taken for the whole
        for split in SPLITS:
            temporary[split].replace(folder / f'{split}.bin')
        write_meta(folder, meta)
    except OSError as error:
        code = DISK_FULL if error.errno == errno.ENOSPC else DATA
        raise UserError(f'{folder} cannot be written: {error.strerror}', code) from error
    finally:
        for path in temporary.values():
            with suppress(OSError):
                path.unlink()
    report(folder, meta)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    temporary = folder / 'meta.json.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / 'meta.json')


def report(folder: Path, meta: dict[str, Any]) -> None:
    for split, made in meta['splits'].items():
        print(f'{split + ":":6} {made["tokens"]:,} tokens, {made["bytes"] / made["tokens"]:.2f} bytes of text each '
              f'({made["bytes"]:,} in all; documents: {made["documents"]:,})')
    print(f'vocabulary: {meta["tokenizer"]["name"]}, {meta["vocab_size"]:,} ids, stored as {meta["dtype"]}')
    print(f'wrote train.bin, val.bin and meta.json to {folder}')
