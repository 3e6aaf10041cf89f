"""
Documents -> shards: a corpus of any length, by a run that may be killed at any moment and is then run again.

    files, one after the other  ->  batches  ->  tokens, by several processes  ->  val_000000.bin, train_000001.bin, ...

All documents in their order are one sequence of tokens, cut into files of equal size in llm.c's format; the first file
is for validation, and the last may be shorter. A shard appears under its name when it is complete and on the disk. Then
meta.json notes at which document and token the next one begins: the same command goes on from there, and what was
tokenised beyond that is tokenised again. Memory holds a few batches for each process, and a list of one file's pieces.
"""
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from plaingpt import console, files
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.token_files import HEADER, Ids, ends_of, make_header
from plaingpt.errors import COMMAND, DATA, UserError

NAME = re.compile(rf'(val_000000|train_\d{{6}})\.bin({re.escape(files.UNFINISHED)})?')  # of what is written here
NONE = np.array([], dtype=np.int64)  # documents are for validation: the first shard is


class Place(NamedTuple):
    """In the sequence of all tokens, the first that is not in a finished shard."""

    file: int  # number of a file
    before: int  # documents in the files before that
    document: int  # number of a document of that file, among all
    tokens: int  # between the beginning of that document and the place


START = Place(0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------
# Reading on from a place


class Source:
    """The documents of files, one file after the other; the next is fetched while this one is read."""

    def __init__(self, files: Sequence[str], fetch: Callable[[str], str], column: str) -> None:
        self.files, self.fetch, self.column = files, fetch, column
        self.first = 0  # number of the file that is read first
        self.starts: list[int] = []  # of the files from that one on, as far as they were looked at: document numbers

    def parts_from(self, place: Place) -> Iterator[tokenise.Part]:
        """All documents from that of `place` on."""
        self.first, self.starts = place.file, [place.before]
        waiting = self.files[place.file:]
        coming = [started(self.fetch, name) for name in waiting[:1]]
        for number in range(len(waiting)):
            path = coming.pop().result()
            coming += [started(self.fetch, name) for name in waiting[number + 1:number + 2]]
            pieces = list(documents.find_pieces(path, self.column))
            self.starts.append(self.starts[-1] + tokenise.count_documents(pieces))
            yield from without_first(pieces, max(0, place.document - self.starts[-2]))

    def place_of(self, document: int, tokens: int) -> Place:
        number = bisect_right(self.starts, document) - 1
        return Place(self.first + number, self.starts[number], document, tokens)

    def files_before(self, document: int) -> float:
        """Return how many files lie before this document, with the part of its own that does."""
        return float(np.interp(document, self.starts, range(self.first, self.first + len(self.starts))))


def started(fetch: Callable[[str], str], name: str) -> Future[str]:
    """What another thread will have fetched. It does not keep the process from ending."""
    future = Future[str]()

    def work() -> None:
        try:
            future.set_result(fetch(name))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def without_first(pieces: list[documents.Piece], n_documents: int) -> Iterator[tokenise.Part]:
    """The documents of a file without the first few, which are not even read where a whole piece of them is left out.
    """
    for piece in pieces:
        if n_documents == 0:
            yield piece
        elif n_documents < piece.n_documents:
            texts = itertools.islice(tokenise.read_texts([piece]), n_documents, None)
            yield from tokenise.group(texts, documents.PIECE)
        n_documents = max(0, n_documents - piece.n_documents)


# ------------------------------------------------------------------------------------------------
# Writing


class Run(NamedTuple):
    """What decides about every byte of the shards: the same run goes on, and another does not."""

    folder: Path
    packer: tokenise.Packer
    source: Source
    shard_size: int  # tokens
    made_with: dict[str, Any]  # in words


def write_shards(folder: Path, packer: tokenise.Packer, source: Source, shard_size: int, name: str, num_proc: int = 0,
                 overwrite: bool = False) -> None:
    """Tokenise a corpus into folder/val_000000.bin, train_000001.bin, ... by `num_proc` processes (0: one for each
    core), from where an interrupted run of the same command has come to. UserError where the folder holds
    anything else, unless that is to be overwritten, and where another run is at work there."""
    if not 0 < shard_size < 2**31:
        raise UserError(f'--shard_size={shard_size} must be at least 1 and less than 2**31', COMMAND)
    run = Run(folder, packer, source, shard_size, {
        'tokenizer': packer.tokenizer.name, 'column': source.column, 'shard_size': shard_size,
        'files': hashlib.sha256('\n'.join(map(mark_of, source.files)).encode()).hexdigest()[:16]})
    with tokenise.alone_in(folder, '\nthe same command goes on after the last complete shard'):
        meta = find_note(run, overwrite) or {
            'format': 1, 'unfinished': True, 'next': START._asdict(), 'tokenizer': packer.tokenizer.reference(),
            'vocab_size': packer.tokenizer.n_vocab, 'dtype': packer.dtype.name, 'source': name,
            'created_by': shlex.join(['python', *sys.argv]), 'made_with': run.made_with, 'documents': 0, 'bytes': 0,
            'splits': {}}
        if meta.get('unfinished'):
            tokenise.write_meta(folder, meta)
            remove_others(folder, meta)
            fill_shards(run, meta, num_proc if num_proc > 0 else os.cpu_count() or 1)
            finish(run, meta)
    report(folder, meta)


def read_note(path: Path) -> dict[str, Any]:
    """What a meta.json holds; nothing where there is none, or a damaged one."""
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def mark_of(name: str) -> str:
    """What tells a file from another: its name and size, wherever it is; or its address, with the revision."""
    return f'{PurePath(name).name} {os.path.getsize(name)}' if os.path.isfile(name) else name


def find_note(run: Run, overwrite: bool) -> dict[str, Any] | None:
    """What an earlier run of the same command has noted, or None where the run is to start. The same command thus goes
    on with overwrite=True, too: only what is not its own is overwritten."""
    meta = read_note(run.folder / 'meta.json')
    there = [path.name for path in run.folder.iterdir() if NAME.fullmatch(path.name)]
    if not (meta or there):
        return None
    try:
        check_note(run, meta, there)
    except UserError:
        if overwrite:
            return None
        raise
    return meta


def check_note(run: Run, meta: dict[str, Any], there: list[str]) -> None:
    """UserError where the folder holds anything but shards of the same command, as they were made."""
    remedy = 'start over with --overwrite=True, which deletes what is there'
    before = meta.get('made_with', {})
    if not before:
        raise UserError(f'{run.folder} holds files that this command has not made, such as '
                        f'{min(there, default="meta.json")}\nmove them away, or {remedy}', DATA)
    other = [f'{name} {value} (now {run.made_with[name]})' for name, value in before.items()
             if run.made_with[name] != value]
    if other:
        raise UserError(f'{run.folder} was begun with other settings or files: {", ".join(other)}\n'
                        f'go on with those, or {remedy}', COMMAND)
    for name, made in meta['splits'].items():
        path = run.folder / f'{name}.bin'
        size = HEADER + made['tokens'] * run.packer.dtype.itemsize
        is_whole = path.is_file() and path.stat().st_size == size
        if not is_whole or ends_of(path) != {end: made[end] for end in ('head', 'tail')}:
            raise UserError(f'{path} is missing or damaged\n{remedy}', DATA)


def remove_others(folder: Path, meta: dict[str, Any]) -> None:
    """Shards that the note does not know: of a run that was killed before it could write it, or of another corpus."""
    for path in folder.iterdir():
        if NAME.fullmatch(path.name) and path.stem not in meta['splits']:
            path.unlink()


def fill_shards(run: Run, meta: dict[str, Any], num_proc: int) -> None:
    """Tokenise from the place that `meta` notes to the end of the text; note each shard there when it is complete."""
    splits = meta['splits']
    if splits:
        n_before = sum(made['tokens'] for made in splits.values())
        print(f'going on after {len(splits)} shards, {n_before:,} tokens', flush=True)
    batches = tokenise.make_batches(run.source.parts_from(Place(**meta['next'])), NONE)
    with closing(tokenise.tokenise(batches, run.packer, num_proc)) as results, closing(cut(run, meta, results)) as cuts:
        for first in cuts:  # the others that this shard has room for are taken on the way
            path = run.folder / f'{"train" if splits else "val"}_{len(splits):06d}.bin'
            splits[path.stem] = write_shard(path, itertools.chain([first], cuts), run)
            tokenise.write_meta(run.folder, meta)


def cut(run: Run, meta: dict[str, Any],
        results: Iterator[tuple[tokenise.Batch, tokenise.Done]]) -> Generator[Ids, None, None]:
    """The tokens from the place that `meta` notes on, a few at a time and never beyond the end of a shard. With each,
    `meta` gets the place after it; the documents of a batch are counted when all its tokens are taken."""
    place = Place(**meta['next'])
    skip, room = place.tokens, run.shard_size  # tokens: those that are in a shard already, those that one still takes
    before = n_tokens = sum(made['tokens'] for made in meta['splits'].values())
    began = time.monotonic()
    with console.Progress(len(run.source.files), 'tokenising', 'files') as progress:
        for batch, done in results:
            ids, document = np.frombuffer(done.train.tokens, run.packer.dtype), place.document + batch.first
            speed = (n_tokens - before) / max(time.monotonic() - began, 1e-9)
            progress.update(run.source.files_before(document), f'{n_tokens:,} tokens, {speed:,.0f} tokens/s')
            start = min(skip, len(ids))
            skip -= start
            n_tokens += len(ids) - start
            while start < len(ids):
                stop = min(start + room, len(ids))
                room = room - (stop - start) or run.shard_size
                meta['next'] = run.source.place_of(document, stop)._asdict()
                yield ids[start:stop]
                start = stop
            meta['documents'] += done.train.n_documents
            meta['bytes'] += done.train.n_bytes


def write_shard(path: Path, cuts: Iterator[Ids], run: Run) -> dict[str, Any]:
    """Fill a file with what comes, to the end of the shard or of the text. Return what meta.json says about the file.
    """
    n_tokens = largest_id = 0
    with files.written_whole(path) as file:
        file.seek(HEADER)
        for ids in cuts:
            file.write(ids.data)
            n_tokens += len(ids)
            largest_id = max(largest_id, int(ids.max()))
            if n_tokens == run.shard_size:
                break
        file.seek(0)
        file.write(make_header(run.packer.dtype, n_tokens))
        file.seek(0)
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'tokens': n_tokens, 'largest_id': largest_id, 'sha256': sha256, **ends_of(path)}


def finish(run: Run, meta: dict[str, Any]) -> None:
    """All shards are there: what was a note becomes the description of the corpus."""
    n_tokens = sum(made['tokens'] for made in meta['splits'].values())
    if len(meta['splits']) < 2:
        raise UserError(f'{meta["source"]} has {n_tokens:,} tokens, and the first {run.shard_size:,} are for '
                        f'validation: none are left to train on\ngive --shard_size={max(1, n_tokens // 10)} '
                        '--overwrite=True, or more text', DATA)
    for word in ('unfinished', 'next'):
        meta.pop(word)
    tokenise.write_meta(run.folder, meta)


def report(folder: Path, meta: dict[str, Any]) -> None:
    for split in tokenise.SPLITS:
        shards = [made['tokens'] for name, made in meta['splits'].items() if name.startswith(split)]
        print(f'{split + ":":6} {sum(shards):,} tokens, shards: {len(shards):,}')
    print(f'vocabulary: {meta["tokenizer"]["name"]}, {meta["vocab_size"]:,} ids, stored as {meta["dtype"]}; '
          f'documents: {meta["documents"]:,}, bytes: {meta["bytes"]:,}')
    print(f'{folder} holds the shards and meta.json')
