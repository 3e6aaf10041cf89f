"""
Tokenising: documents -> token files, for every data/<name>/prepare.py.

    pieces of files, or texts  ->  batches  ->  tokens, by several processes  ->  train.bin, val.bin; meta.json last

A corpus is a sequence of documents, numbered from 0, and the numbers of those that are for validation. A process that
tokenises reads its pieces of the files itself, and hands back packed tokens. Everything streams: memory holds a few
batches for each process, however long the corpus is. Files appear under their names only when both splits are complete,
so that an interrupted run leaves the previous ones.
"""
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from plaingpt import console, files, lock
from plaingpt.corpus import checksums, documents
from plaingpt.corpus.documents import PIECE, Passage, Piece
from plaingpt.corpus.token_files import ends_of
from plaingpt.corpus.tokenizer import LONGEST, Tokenizer, build, count_hard_cuts, from_state
from plaingpt.errors import COMMAND, DATA, OUT_OF_MEMORY, UserError, refusal

Part = Piece | Sequence[str | Passage]  # of a corpus: where some documents stand, or their texts
Numbers = npt.NDArray[np.int64]  # of documents

SPLITS = ('train', 'val')
CHUNK = 1 << 18  # characters that a tokenizer is given at once
MOST_PROCESSES = 1024
SMALL = 4  # batches that this process finishes sooner than others would start


# ------------------------------------------------------------------------------------------------
# Splitting


def choose_validation(n_documents: int, fraction: float, seed: int) -> Numbers:
    """Draw the numbers of the validation documents, in the order of Hugging Face's train_test_split(test_size=fraction,
    seed=seed). The draw needs 8 bytes for each document of the corpus."""
    check_fraction(fraction)
    if seed < 0:
        raise UserError(f'--seed={seed}: must be 0 or more', COMMAND)
    drawn = np.random.default_rng(seed).permutation(n_documents)
    return drawn[:math.ceil(fraction * n_documents)].copy()  # a view would keep all of them in memory


def split_text(text: str, fraction: float) -> tuple[list[Part], Numbers]:
    """Split one document by position into a corpus of two: the last part of its characters is for validation."""
    check_fraction(fraction)
    cut = int(len(text) * (1 - fraction))
    return [[text[:cut], text[cut:]]], np.array([1])


def split_document(parts: Sequence[Part], number: int, fraction: float) -> tuple[list[Part], Numbers]:
    """Do what `split_text` does with the document of that number. A text file is not read into memory for that."""
    check_fraction(fraction)
    for part in parts:
        n_documents = count_documents([part])
        if number < n_documents:
            if isinstance(part, Piece) and documents.is_text(part.name):
                return [*documents.split_piece(part, fraction)], np.array([1])
            return split_text(next(itertools.islice(read_texts([part]), number, None)), fraction)
        number -= n_documents
    raise AssertionError('there is no document of that number')


def check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f'val_fraction={fraction} must lie between 0 and 1', COMMAND)


def count_documents(parts: Iterable[Part]) -> int:
    """Return how many documents end in these parts."""
    return sum(part.n_documents if isinstance(part, Piece) else
               sum(passage.ends for passage in read_passages([part], True)) for part in parts)


def numbers_of_texts(parts: Iterable[Part]) -> Numbers:
    """Return the numbers of the documents that are not empty."""
    numbers = (number for number, passage in numbered(read_passages(parts, True)) if passage.text)
    return np.fromiter((number for number, _ in itertools.groupby(numbers)), dtype=np.int64)


def read_passages(parts: Iterable[Part], may_cut: bool) -> Iterator[Passage]:
    """Yield the texts of the parts. Long documents may come in several passages, if they stand in a file and
    `may_cut`."""
    for part in parts:
        if isinstance(part, Piece):
            yield from documents.read_passages([part], may_cut)
        else:
            yield from (text if isinstance(text, Passage) else Passage(text) for text in part)


def read_texts(parts: Iterable[Part]) -> Iterator[str]:
    """Yield whole documents."""
    return (passage.text for passage in read_passages(parts, may_cut=False))


def numbered(passages: Iterable[Passage], first: int = 0) -> Iterator[tuple[int, Passage]]:
    """Yield each passage with the number of its document; the first document has the number `first`."""
    number = first
    for passage in passages:
        yield number, passage
        number += passage.ends


def build_tokenizer(spec: str, parts: Sequence[Part], validation: Numbers, eot: bool) -> Tokenizer:
    """Return the tokenizer that `spec` names, for these documents. 'char' must know every character, in either split; a
    BPE learns its merges from the training documents alone."""
    left_out = set() if spec == 'char' else set(validation.tolist())
    return build(spec, lambda: (passage.text for number, passage in numbered(read_passages(parts, True))
                                if number not in left_out), eot)


# ------------------------------------------------------------------------------------------------
# Tokenising, in several processes


class Batch(NamedTuple):
    """Documents, or a part of one, that one process tokenises at a time."""

    part: Part
    first: int  # the number of its first document in the corpus
    stop: int  # the number of the first document that ends neither in it nor before
    validation: list[int]  # the numbers of its validation documents


def make_batches(parts: Iterable[Part], validation: Numbers, may_cut: bool = False) -> Iterator[Batch]:
    """Yield all documents in order; long text files in several batches, if they may be cut. Pieces that can be read
    apart are left to the workers to read."""
    in_order = np.sort(validation)
    first = 0
    for part in batched(parts, may_cut):
        stop = first + count_documents([part])
        chosen = in_order[np.searchsorted(in_order, first):np.searchsorted(in_order, stop, side='right')]
        yield Batch(part, first, stop, chosen.tolist())
        first = stop


def batched(parts: Iterable[Part], may_cut: bool) -> Iterator[Part]:
    """Yield the documents of all parts again, in parts that are as large as a batch."""
    for is_apart, some in itertools.groupby(parts, lambda part: isinstance(part, Piece) and part.is_apart):
        if is_apart:
            for part in some:
                yield from documents.cut_piece(part) if may_cut and isinstance(part, Piece) else [part]
        else:
            yield from group(read_passages(some, may_cut), PIECE)


def group(passages: Iterable[Passage], n_characters: int) -> Iterator[list[Passage]]:
    """Yield lists of passages with `n_characters` in all, or little more."""
    waiting: list[Passage] = []
    size = 0
    for passage in passages:
        waiting.append(passage)
        size += len(passage.text)
        if size >= n_characters:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


class Marks:
    """Numbers of 64 bits, one for each document, the same for the same text: they tell which documents are in both
    splits."""

    def __init__(self) -> None:
        self.numbers = array('Q')
        self.is_open = False  # the last document has not ended yet: its mark is that of its text so far

    def extend(self, numbers: Sequence[int], is_open: bool) -> None:
        """Add the marks of the text that follows; its last document does not end there if it `is_open`."""
        if self.is_open and numbers:
            self.numbers[-1] = (self.numbers[-1] + numbers[0]) % 2**64
        self.numbers.extend(numbers[self.is_open:])
        self.is_open = is_open if numbers else self.is_open


class Packed(NamedTuple):
    """Documents in the form of token files. Tokens are bytes, as a list of Python integers takes longer to send from
    process to process than to tokenise."""

    tokens: bytes
    largest_id: int
    n_documents: int  # that end here
    n_bytes: int  # of the text in UTF-8
    marks: Marks
    n_hard_cuts: int = 0  # in words that are so long that they were cut


class Done(NamedTuple):
    """The result of a batch."""

    first: int  # as in Batch
    stop: int
    train: Packed
    val: dict[int, Packed]  # each document apart, by its number, since val.bin may have them in another order


class Packer:
    """A tokenizer, and how it packs documents. `eot` follows each document, or stands before it, unless it is None.
    Empty documents may be left out."""

    def __init__(self, tokenizer: Tokenizer, eot: int | None, keep_empty: bool = True, eot_first: bool = False) -> None:
        self.tokenizer, self.eot, self.keep_empty, self.eot_first = tokenizer, eot, keep_empty, eot_first
        self.dtype = np.dtype('<u2' if tokenizer.n_vocab <= 1 << 16 else '<u4')  # nanoGPT's type, if it holds all ids
        self.end = np.array([] if eot is None else [eot], dtype=np.uint32)

    def pack(self, passages: Iterable[Passage]) -> Packed:
        """Tokenise a little at a time, so that memory never holds all of the texts. If `eot` stands before documents,
        the first passage must begin one."""
        tokens, marks = bytearray(), Marks()
        largest_id = n_documents = n_bytes = n_hard_cuts = 0
        for some in group((passage for passage in passages if passage.text or self.keep_empty), CHUNK):
            ids = np.concatenate(list(self.encode(some, marks.is_open)))
            tokens += ids.astype(self.dtype).data
            largest_id = max(largest_id, int(ids.max(initial=0)))
            for text, ends in some:
                utf8 = text.encode()
                n_bytes += len(utf8)
                n_documents += ends
                marks.extend([int.from_bytes(hashlib.blake2b(utf8, digest_size=8).digest())], is_open=not ends)
                if self.tokenizer.has_words and self.tokenizer.may_cut:
                    n_hard_cuts += count_hard_cuts(text, ends)
        return Packed(bytes(tokens), largest_id, n_documents, n_bytes, marks, n_hard_cuts)

    def encode(self, passages: Sequence[Passage], is_open: bool) -> Iterator[npt.NDArray[np.uint32]]:
        """Yield the ids of passages, and `eot` around them. The first passage continues a document if one `is_open`."""
        for passage, ids in zip(passages, self.tokenizer.encode_batch([text for text, _ in passages]), strict=True):
            if self.eot_first and not is_open:
                yield self.end
            yield ids
            if passage.ends and not self.eot_first:
                yield self.end
            is_open = not passage.ends

    def __call__(self, batch: Batch) -> Done:
        chosen = set(batch.validation)
        val: dict[int, Packed] = {}

        def training_passages() -> Iterator[Passage]:
            passages = numbered(read_passages([batch.part], self.tokenizer.may_cut), batch.first)
            for number, some in itertools.groupby(passages, lambda item: item[0]):
                of_document = (passage for _, passage in some)
                if number in chosen:
                    val[number] = self.pack(of_document)
                else:
                    yield from of_document

        return Done(batch.first, batch.stop, self.pack(training_passages()), val)


def tokenise(batches: Iterable[Batch], packer: Packer, num_proc: int) -> Generator[Done, None, None]:
    """Yield the result of each batch, in order, from `num_proc` processes; 0 is one for each core."""
    if num_proc > MOST_PROCESSES:
        raise UserError(f'--num_proc={num_proc}: must be {MOST_PROCESSES} or less', COMMAND)
    n_hard_cuts = 0
    with closing(in_processes(batches, packer, num_proc if num_proc > 0 else os.cpu_count() or 1)) as results:
        for done in results:
            n_hard_cuts += sum(packed.n_hard_cuts for packed in (done.train, *done.val.values()))
            yield done
    if n_hard_cuts:
        console.say(f'words, or white space, of more than {LONGEST:,} characters are cut, and have other tokens there; '
                    f'cuts: {n_hard_cuts:,}')


def in_processes(batches: Iterable[Batch], packer: Packer, num_proc: int) -> Generator[Done, None, None]:
    """Yield the result of each batch, in order. If there are few, this process does them alone."""
    batches = iter(batches)
    first = list(itertools.islice(batches, SMALL))
    if num_proc == 1 or len(first) < SMALL:
        yield from map(packer, itertools.chain(first, batches))
        return
    waiting: deque[Future[Done]] = deque()
    with started_workers(packer, num_proc) as workers:
        for batch in itertools.chain(first, batches):
            waiting.append(workers.submit(pack_in_worker, batch))
            if len(waiting) > 2 * num_proc:  # an executor's own queue has no limit, and would fill the memory
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


WORKER: dict[str, Packer] = {}  # in a worker process: the packer that it uses


@contextmanager
def started_workers(packer: Packer, num_proc: int) -> Iterator[ProcessPoolExecutor]:
    """Yield processes that start afresh on every system (spawn), leave Ctrl-C to this process, and end when it is
    killed. Raise UserError if one of them is killed."""
    workers = ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), set_up_worker,
                                  (packer.tokenizer.state(), packer.eot, packer.keep_empty, packer.eot_first))
    try:
        with delayed_interrupts():
            for _ in range(num_proc):
                workers.submit(os.getpid)  # this starts one process, as no other is idle
        yield workers
    except BrokenProcessPool:
        raise UserError('a process was killed while it tokenised, most likely because memory ran out\n'
                        f'give --num_proc={max(1, num_proc // 2)}', OUT_OF_MEMORY) from None
    finally:
        workers.shutdown(cancel_futures=True)


@contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block. Processes that start in it inherit that, and get none before they can
    ignore it."""
    if sys.platform == 'win32':
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def set_up_worker(state: dict[str, Any], eot: int | None, keep_empty: bool, eot_first: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # there is a process for each core already
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKER['packer'] = Packer(from_state(state), eot, keep_empty, eot_first)


def end_with_parent() -> None:
    """End this process as soon as its parent ends: one that is killed can tell its workers nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, 'a worker has a parent'
    parent.join()
    os._exit(1)


def pack_in_worker(batch: Batch) -> Done:
    return WORKER['packer'](batch)


# ------------------------------------------------------------------------------------------------
# Writing


class Writer:
    """A token file, and what meta.json will say about it."""

    def __init__(self, file: BufferedRandom) -> None:
        self.file, self.marks = file, Marks()
        self.size = self.largest_id = self.n_documents = self.n_bytes = 0

    def write(self, packed: Packed) -> None:
        self.file.write(packed.tokens)
        self.size += len(packed.tokens)
        self.largest_id = max(self.largest_id, packed.largest_id)
        self.n_documents += packed.n_documents
        self.n_bytes += packed.n_bytes
        self.marks.extend(packed.marks.numbers, packed.marks.is_open)

    def finish(self, dtype: np.dtype[Any], sums: dict[str, checksums.Sums]) -> dict[str, Any]:
        """Put everything on the disk; return the numbers for meta.json, and add to the checksums."""
        files.put_on_disk(self.file)
        return {'tokens': self.size // dtype.itemsize, 'documents': self.n_documents, 'bytes': self.n_bytes,
                'largest_id': self.largest_id, 'sha256': checksums.add(sums, self.file),
                **ends_of(Path(self.file.name))}


def write_corpus(folder: Path, packer: Packer, parts: Sequence[Part], validation: Numbers, source: str,
                 num_proc: int = 0) -> None:
    """Tokenise a corpus into folder/train.bin and val.bin, with `num_proc` processes (0: one for each core), and print
    a summary. Raise UserError if a split is empty or the disk is full."""
    with (console.Progress(count_documents(parts), 'tokenising', 'documents') as progress,
          closing(tokenise(make_batches(parts, validation, packer.tokenizer.may_cut), packer, num_proc)) as results):
        write_files(folder, packer, source, in_turn(results, validation, progress))


def in_turn(results: Iterable[Done], validation: Numbers, progress: console.Progress) -> Iterator[tuple[str, Packed]]:
    """Yield the training documents in their order, and the validation documents in that of `validation`, with the name
    of their split. Validation documents wait in memory for their turn."""
    waiting: dict[int, list[Packed]] = {}
    turn = n_bytes = 0  # how many of the validation documents are written
    for done in results:
        progress.update(done.first, f'{console.size(n_bytes)} of text')
        n_bytes += sum(packed.n_bytes for packed in (done.train, *done.val.values()))
        yield 'train', done.train
        for number, packed in done.val.items():
            waiting.setdefault(number, []).append(packed)
        while turn < len(validation):
            number = int(validation[turn])
            yield from (('val', packed) for packed in waiting.pop(number, []))
            if number >= done.stop:
                break
            turn += 1


def write_files(folder: Path, packer: Packer, source: str, packed: Iterable[tuple[str, Packed]]) -> None:
    """Write the packed documents of each split to folder/train.bin and val.bin, with their meta.json, or leave no
    trace."""
    sums: dict[str, checksums.Sums] = {}
    meta = describe(packer, source)
    with alone_in(folder):
        with ExitStack() as stack:
            writers = {split: Writer(stack.enter_context(files.written_whole(folder / f'{split}.bin')))
                       for split in SPLITS}
            for split, some in packed:
                writers[split].write(some)
            splits = {split: writer.finish(packer.dtype, sums) for split, writer in writers.items()}
            empty = [split for split in SPLITS if splits[split]['bytes'] == 0]
            if empty:
                raise UserError(f'{source} holds no text for {empty[0]}.bin\ngive more text, or set another part of it '
                                'aside for validation', DATA)
            write_meta(folder, meta | {'unfinished': True})  # a kill may come between the two files of the corpus
        checksums.write(folder, sums)
        write_meta(folder, meta | {'splits': splits})
    for split, made in splits.items():
        console.say(f'{split + ":":6} {made["tokens"]:,} tokens, {made["bytes"] / made["tokens"]:.2f} bytes of text '
                    f'each ({made["bytes"]:,} in all; documents: {made["documents"]:,})')
    train, val = (np.array(writers[split].marks.numbers) for split in SPLITS)
    if n_known := np.isin(val, train).sum():
        console.say(f'of the documents in val.bin, {n_known:,} are in train.bin, too: the loss on them says little')
    console.say(f'vocabulary: {packer.tokenizer.name}, {packer.tokenizer.n_vocab:,} ids, stored as {packer.dtype.name}')
    console.say(f'wrote train.bin, val.bin, {checksums.NAME} and meta.json to {folder}')


def describe(packer: Packer, source: str) -> dict[str, Any]:
    """Return what meta.json says about a corpus as a whole, without the secrets of a URL."""
    return {'format': 1, 'tokenizer': packer.tokenizer.reference(), 'vocab_size': packer.tokenizer.n_vocab,
            'dtype': packer.dtype.name, 'source': console.shown(source),
            'created_by': shlex.join(['python', *map(console.shown, sys.argv)]), 'created_in': os.getcwd()}


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    with files.written_whole(folder / 'meta.json') as file:
        file.write(json.dumps(meta, indent=1).encode())


@contextmanager
def alone_in(folder: Path, remedy: str = '') -> Iterator[None]:
    """Own a folder that one process at a time writes into. Raise UserError if another process owns it, and, with
    `remedy`, if it cannot be written or the disk is full."""
    try:
        with lock.owned(folder):
            yield
    except OSError as error:
        raise refusal(error, f'{folder} cannot be written', DATA, remedy) from error
