"""
Shards: a corpus of any length, made from documents by a command that may be killed at any moment and run again.

    files, one after the other  ->  batches  ->  tokens, by several processes  ->  val_000000.bin, train_000001.bin, ...

All documents in their order are one sequence of tokens, cut into files of equal size in llm.c's format; the first file
is for validation, and the last may be shorter. A shard appears under its name when it is complete and on the disk. Then
meta.json notes at which document and token the next one begins: the same command continues from there, and what was
tokenised beyond that is tokenised again. Memory holds a few batches for each process, and a list of one file's pieces.
"""
import hashlib
import itertools
import os
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from plaingpt import console, files, schema
from plaingpt.corpus import checksums, documents, tokenise
from plaingpt.corpus.folder import META, check_file
from plaingpt.corpus.token_files import HEADER, Ids, TokenFile, ends_of, make_header
from plaingpt.errors import COMMAND, DATA, UserError
from plaingpt.schema import COUNT

NAME = re.compile(rf'(val_000000|train_\d{{6}})\.bin({re.escape(files.UNFINISHED)})?')  # of files that are written here
NONE = np.array([], dtype=np.int64)  # no documents are for validation: the first shard is


class Place(NamedTuple):
    """A place in the sequence of all tokens: that of the first token that is not in a finished shard."""

    file: int  # its number
    before: int  # documents in the files before that one
    document: int  # its number among the documents of all files
    tokens: int  # between the beginning of that document and the place


START = Place(0, 0, 0, 0)
FINISHED = META | {'made_with': {str: schema.PLAIN}, 'documents': COUNT, 'bytes': COUNT, 'unfinished?': ()}
NOTE = (FINISHED, FINISHED | {'unfinished?': bool, 'next': dict.fromkeys(Place._fields, COUNT)})  # what is read


# ------------------------------------------------------------------------------------------------
# Reading from a place on


class Source:
    """The documents of files, one file after the other; the next file is fetched while this one is read."""

    def __init__(self, files: Sequence[str], fetch: Callable[[str], str], column: str) -> None:
        self.files, self.fetch, self.column = files, fetch, column
        self.starts: list[int] = []  # each opened file's first document, by its number; and the next file's

    def parts_from(self, place: Place) -> Iterator[tokenise.Part]:
        """Yield all documents from that of `place` on."""
        self.starts = [place.before] * (place.file + 1)  # where the files before start does not matter
        for path in fetched_ahead(self.fetch, self.files[place.file:]):
            start, pieces = self.starts[-1], list(documents.find_pieces(path, self.column))
            self.starts.append(start + tokenise.count_documents(pieces))
            yield from without_first(pieces, place.document - start)

    def place_of(self, document: int, tokens: int) -> Place:
        number = bisect_right(self.starts, document) - 1
        return Place(number, self.starts[number], document, tokens)

    def files_before(self, document: int) -> float:
        """Return how many files come before this document, with a fraction for the part of its own file that does."""
        return float(np.interp(document, self.starts, range(len(self.starts))))


def fetched_ahead(fetch: Callable[[str], str], names: Iterable[str]) -> Iterator[str]:
    """Yield what `fetch` returns for each name; meanwhile another thread fetches the next one. It does not keep the
    process from ending."""
    with ThreadPool(1) as pool:
        fetched = (pool.apply_async(fetch, [name]) for name in names)
        coming = next(fetched, None)
        while coming:
            path = coming.get()
            coming = next(fetched, None)  # begun before the caller reads this one
            yield path


def without_first(pieces: Iterable[documents.Piece], n_documents: int) -> Iterator[tokenise.Part]:
    """Yield the documents without the first n_documents. A piece of which none is left is not even read."""
    for piece in pieces:
        if n_documents <= 0:
            yield piece
        elif n_documents < piece.n_documents:
            texts = itertools.islice(tokenise.read_texts([piece]), n_documents, None)
            yield from tokenise.group(map(documents.Passage, texts), documents.PIECE)
        n_documents -= piece.n_documents


# ------------------------------------------------------------------------------------------------
# Writing


def write_shards(folder: Path, packer: tokenise.Packer, source: Source, shard_size: int, name: str, num_proc: int = 0,
                 overwrite: bool = False) -> None:
    """Tokenise a corpus into folder/val_000000.bin, train_000001.bin, ... with `num_proc` processes (0: one for each
    core), and continue an interrupted run of the same command. Raise UserError if the folder holds anything else,
    unless `overwrite` is given, and if another run is at work there."""
    if not 0 < shard_size < 2**31:
        raise UserError(f'--shard_size={shard_size} must be at least 1 and less than 2**31', COMMAND)
    marks = hashlib.sha256('\n'.join(map(mark_of, source.files)).encode()).hexdigest()[:16]
    made_with = {'tokenizer': packer.tokenizer.name, 'column': source.column, 'shard_size': shard_size, 'files': marks}
    meta = tokenise.describe(packer, name) | {
        'unfinished': True, 'next': START._asdict(), 'made_with': made_with, 'documents': 0, 'bytes': 0, 'splits': {}}
    with tokenise.alone_in(folder, 'the same command continues after the last complete shard'):
        try:
            meta = find_note(folder, made_with) or meta
        except UserError:
            if not overwrite:
                raise
        if 'unfinished' in meta:
            fill_shards(folder, packer, source, shard_size, meta, num_proc)
    for split in tokenise.SPLITS:
        shards = [made['tokens'] for name, made in meta['splits'].items() if name.startswith(split)]
        console.say(f'{split + ":":6} {sum(shards):,} tokens, shards: {len(shards):,}')
    console.say(f'vocabulary: {meta["tokenizer"]["name"]}, {meta["vocab_size"]:,} ids, stored as {meta["dtype"]}; '
                f'documents: {meta["documents"]:,}, bytes: {meta["bytes"]:,}')
    console.say(f'{folder} holds the shards and meta.json')


def mark_of(name: str) -> str:
    """Return what tells a file from another: its name and size, wherever it is, or its URL, with the revision."""
    return f'{PurePath(name).name} {os.path.getsize(name)}' if os.path.isfile(name) else console.shown(name)


def find_note(folder: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an earlier run of the same command has noted about its shards, which are still as they were made;
    None if there was none. Raise UserError if the folder holds anything else."""
    remedy = 'start over with --overwrite=True, which deletes the shards'
    note = files.read_json(folder / 'meta.json')
    found = [path.name for path in folder.iterdir() if NAME.fullmatch(path.name)]
    if not (note or found):
        return None
    if not schema.fits(note, NOTE):
        raise UserError(f'{folder} holds files that this command has not made, such as '
                        f'{min(found, default="meta.json")}\nmove them away, or {remedy}', DATA)
    other = [f'{name} {value} (now {made_with.get(name)})' for name, value in note['made_with'].items()
             if made_with.get(name) != value]
    if other:
        raise UserError(f'{folder} was begun with other settings or files: {", ".join(other)}\n'
                        f'continue with those, or {remedy}', COMMAND)
    for name, made in note['splits'].items():
        path = folder / f'{name}.bin'
        try:
            check_file(TokenFile(path), made, sys.maxsize, folder)
        except UserError:
            raise UserError(f'{path} is missing or damaged\n{remedy}', DATA) from None
    return note


def fill_shards(folder: Path, packer: tokenise.Packer, source: Source, shard_size: int, meta: dict[str, Any],
                num_proc: int) -> None:
    """Tokenise from the place that `meta` notes to the end of the text, and keep meta.json up to date: after each shard
    it is a note from which to continue, and in the end the description of the corpus."""
    splits = meta['splits']
    sums = checksums.read(folder, 'start over with --overwrite=True') if splits else {}
    tokenise.write_meta(folder, meta)
    for path in folder.iterdir():  # of a run that was killed before it could note them, or of another corpus
        if NAME.fullmatch(path.name) and path.stem not in splits:
            path.unlink()
    if splits:
        console.say(f'continuing after {len(splits)} shards, {n_tokens_in(splits):,} tokens')
    batches = tokenise.make_batches(source.parts_from(Place(**meta['next'])), NONE)
    with (closing(tokenise.tokenise(batches, packer, num_proc)) as results,
          closing(cut(results, source, packer.dtype, shard_size, meta)) as cuts):
        for first in cuts:  # write_shard takes the others that the shard has room for
            path = folder / f'{"train" if splits else "val"}_{len(splits):06d}.bin'
            splits[path.stem] = write_shard(path, itertools.chain([first], cuts), packer.dtype, shard_size, sums)
            checksums.write(folder, sums)
            tokenise.write_meta(folder, meta)
    if len(splits) < 2:
        n_tokens = n_tokens_in(splits)
        raise UserError(f'{meta["source"]} has {n_tokens:,} tokens, and the first {shard_size:,} are for validation: '
                        f'none are left to train on\ngive --shard_size={max(1, n_tokens // 10)} --overwrite=True, or '
                        'more text', DATA)
    del meta['unfinished'], meta['next']
    tokenise.write_meta(folder, meta)


def n_tokens_in(splits: dict[str, dict[str, Any]]) -> int:
    return sum(made['tokens'] for made in splits.values())


def cut(results: Iterable[tokenise.Done], source: Source, dtype: np.dtype[Any], shard_size: int,
        meta: dict[str, Any]) -> Generator[Ids, None, None]:
    """Yield the tokens, beginning at the place that `meta` notes, a few at a time and never beyond the end of a shard.
    Each time `meta` gets the place after them; the documents of a batch are counted when all its tokens are taken."""
    place = Place(**meta['next'])
    skip, room = place.tokens, shard_size  # tokens that are in a shard already, and that the next one still takes
    before = n_tokens = n_tokens_in(meta['splits'])
    began = time.monotonic()
    with console.Progress(len(source.files), 'tokenising', 'files') as progress:
        for done in results:
            ids, document = np.frombuffer(done.train.tokens, dtype), place.document + done.first
            speed = (n_tokens - before) / max(time.monotonic() - began, 1e-9)
            progress.update(source.files_before(document), f'{n_tokens:,} tokens, {speed:,.0f} tokens/s')
            start = min(skip, len(ids))
            skip -= start
            n_tokens += len(ids) - start
            while start < len(ids):
                stop = min(start + room, len(ids))
                room = room - (stop - start) or shard_size  # if none is left, the next shard begins
                meta['next'] = source.place_of(document, stop)._asdict()
                yield ids[start:stop]
                start = stop
            meta['documents'] += done.train.n_documents
            meta['bytes'] += done.train.n_bytes


def write_shard(path: Path, cuts: Iterable[Ids], dtype: np.dtype[Any], size: int,
                sums: dict[str, checksums.Sums]) -> dict[str, Any]:
    """Fill a file to the end of the shard or of the text. Return what meta.json says about the file, and add to the
    checksums."""
    n_tokens = largest_id = 0
    with files.written_whole(path) as file:
        file.seek(HEADER)
        for ids in cuts:
            file.write(ids.data)
            n_tokens += len(ids)
            largest_id = max(largest_id, int(ids.max()))
            if n_tokens == size:
                break
        file.seek(0)
        file.write(make_header(dtype, n_tokens))
        sha256 = checksums.add(sums, file)
    return {'tokens': n_tokens, 'largest_id': largest_id, 'sha256': sha256, **ends_of(path)}
