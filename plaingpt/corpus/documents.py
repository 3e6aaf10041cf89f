"""
Documents, from files anywhere, and the pieces of files that several processes read.

    path  ->  files  ->  pieces, each some documents that stand together  ->  their texts

Planning looks at every file once, and so knows how many documents there are and where they stand. Most pieces can be
read by any process without the others, so that no text has to be sent to it.
"""
import codecs
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from plaingpt import console
from plaingpt.corpus.download import BLOCK, download
from plaingpt.corpus.tokenizer import parts_of
from plaingpt.errors import DATA, UserError, missing_package, refusal
from plaingpt.paths import matching
from plaingpt.schema import parse

KINDS = ('.txt', '.jsonl', '.ndjson', '.parquet')
TABLES = ('.json', '.csv', '.tsv')  # read as text, they would teach a model their braces and commas
STRINGS = re.compile(r'(large_)?string(_view)?|dictionary<values=(large_)?string(_view)?, .*>')  # pyarrow's types
MARKS = {codecs.BOM_UTF8: 'utf-8', codecs.BOM_UTF16_LE: 'utf-16-le', codecs.BOM_UTF16_BE: 'utf-16-be'}
PACKED = ('.gz', '.xz', '.bz2')
PIECE = 1 << 21  # bytes of text that a process reads and tokenises at a time, or little more
LARGEST = 1 << 25  # bytes of a row group that a process reads at once
LONGEST_ROW = 1 << 28  # bytes of a line or row, which is read as a whole, and takes eight times as many in memory


class Piece(NamedTuple):
    """The content of one file between two row groups (.parquet) or two bytes (all others): some documents, or a part of
    one."""

    name: str
    column: str
    start: int
    stop: int
    n_documents: int  # that end in this piece
    is_apart: bool  # it can be read without what comes before it


class Passage(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends: bool = True  # the document


# ------------------------------------------------------------------------------------------------
# Finding


def find_files(path: str, folder: Path, option: str = '--input') -> list[str]:
    """Return the files that `path` names, in a fixed order: one file, the .txt, .jsonl and .parquet files of a folder
    (packed or not), those of a glob, or those of a URL that fsspec opens. A file at http:// is downloaded into `folder`
    first, since it is read twice. Hidden files, which editors and systems keep beside those of the user, count only if
    they are named."""
    is_here = is_local(path)
    if path.startswith(('http://', 'https://')) and not is_here:
        name = PurePosixPath(path.partition('?')[0]).name
        return [str(download(path, folder / f'{option.removeprefix("--")}-{name}', option=option))]
    try:
        files, root = located(path)
        is_folder = files.isdir(root)
        names = files.find(root)
        if not names:
            matched = map(str, matching(Path(root), hidden=True)) if is_here else files.glob(root)
            names = [name for name in matched if not files.isdir(name)]
        of_kind = [name for name in names if kind_of(name) in KINDS or not is_folder]
        found = [name for name in of_kind if not is_hidden(name, root)]
    except ImportError as error:
        raise missing_package(error) from None
    except Exception as error:  # each file system raises errors of its own
        raise refusal(error, f'{option}={path} cannot be opened', DATA) from error
    if not found:
        what = 'is a folder without .txt, .jsonl or .parquet files' if is_folder else 'matches no file and no folder'
        raise UserError(f'{option}={path} {what}', DATA)
    if len(found) < len(of_kind):
        console.say(f'hidden files, whose names begin with a dot, are left out: {len(of_kind) - len(found)}')
    return sorted(name if is_here else files.unstrip_protocol(name) for name in found)


def is_local(path: str) -> bool:
    """Return whether this is a path on this machine, and not a URL; a file's name may look like one."""
    return '://' not in path or os.path.exists(path)


def located(path: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path in it. In a path on this machine no characters are special,
    as :: is in a URL."""
    import fsspec

    if is_local(path):
        return fsspec.filesystem('file'), os.path.abspath(path if os.path.exists(path) else os.path.expanduser(path))
    files, root = fsspec.url_to_fs(path)
    return files, root


def is_hidden(name: str, root: str) -> bool:
    """Return whether a part of a path begins with a dot, and is not in `root`, the path or pattern that was given."""
    return any(part.startswith('.') for part in {*name.split('/')} - {*root.split('/')})


def kind_of(name: str) -> str:
    """Return the suffix that says how to read a file, without that of the compression, which fsspec handles."""
    path = PurePosixPath(name)
    return PurePosixPath(path.stem if name.endswith(PACKED) else path).suffix.lower()


def is_text(name: str) -> bool:
    """Return whether a file is one document."""
    return kind_of(name) not in ('.jsonl', '.ndjson', '.parquet')


# ------------------------------------------------------------------------------------------------
# Planning and reading


@contextmanager
def opened(name: str) -> Iterator[BinaryIO]:
    """Open the bytes of a file anywhere, unpacked."""
    from fsspec.core import OpenFile, get_compression

    with ExitStack() as stack:
        try:
            files, path = located(name)
            file = stack.enter_context(OpenFile(files, path, 'rb', get_compression(path, 'infer')))
        except Exception as error:  # each file system raises errors of its own
            raise refusal(error, f'{name} cannot be opened', DATA) from error
        try:
            yield file
        except Exception as error:  # from any of four libraries that unpack files, which may be damaged
            if isinstance(error, UserError | ModuleNotFoundError):
                raise
            raise refusal(error, f'{name} cannot be read', DATA) from error


def find_pieces(name: str, column: str = 'text') -> Iterator[Piece]:
    """Yield all documents of a file, in pieces, in order."""
    if kind_of(name) in TABLES:
        raise UserError(f'{name} is not text: a model would learn its braces and commas\nsave its texts as .jsonl, '
                        f'with a line {{"{column}": ...}} for each; or rename it to .txt, if you want that', DATA)
    with opened(name) as file:
        match kind_of(name):
            case '.jsonl' | '.ndjson':
                lines = in_utf8(name, file)
                yield from find_lines(name, column, lines, is_apart=lines is file and not name.endswith(PACKED))
            case '.parquet':
                yield from find_row_groups(name, column, file)
            case _:
                size = sys.maxsize if name.endswith(PACKED) else file.seek(0, os.SEEK_END)
                # small files make a batch together, and no packed one can be read from its middle
                yield Piece(name, column, 0, size, 1, is_apart=PIECE < size < sys.maxsize)


def in_utf8(name: str, file: BinaryIO) -> BinaryIO:
    """Return a file whose bytes are UTF-8: the file itself or, if its byte order mark says UTF-16, as Windows writes
    it, a converted copy in memory."""
    codec, start = encoding_of(file)
    file.seek(0)
    if codec == 'utf-8':
        return file
    content = file.read()[start:]
    with readable_decoding(name, start):
        return io.BytesIO(content.decode(codec).encode())


def find_lines(name: str, column: str, file: BinaryIO, is_apart: bool) -> Iterator[Piece]:
    """Yield pieces of a .jsonl file that begin and end with a line, or the whole file, if pieces could not be read
    apart. Blank lines are not documents."""
    start = stop = n_documents = 0
    for line in lines_of(name, file):
        stop += len(line)
        n_documents += not line.isspace()
        if is_apart and stop - start >= PIECE:
            yield Piece(name, column, start, stop, n_documents, is_apart)
            start, n_documents = stop, 0
    if n_documents:
        yield Piece(name, column, start, stop, n_documents, is_apart)


def lines_of(name: str, file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file. Raise UserError for one that memory might not hold."""
    while line := file.readline(LONGEST_ROW + 1):
        if len(line) > LONGEST_ROW:
            raise too_long(name)
        yield line


def too_long(name: str) -> UserError:
    return UserError(f'{name} has a text of more than {console.size(LONGEST_ROW)} in one line or row, which would be '
                     'read as a whole\nsave that text as a .txt file: it is read in pieces, whatever its length', DATA)


def find_row_groups(name: str, column: str, file: BinaryIO) -> Iterator[Piece]:
    """Yield pieces of a .parquet file: whole row groups, since none can be read from its middle."""
    groups = open_parquet(name, column, file).metadata
    start = n_documents = size = 0
    for stop in range(1, groups.num_row_groups + 1):
        group = groups.row_group(stop - 1)
        if group.total_byte_size > LONGEST_ROW * max(1, group.num_rows):
            raise too_long(name)
        n_documents += group.num_rows
        size += group.total_byte_size
        if size >= PIECE or stop == groups.num_row_groups:
            yield Piece(name, column, start, stop, n_documents, size <= LARGEST and not name.endswith(PACKED))
            start, n_documents, size = stop, 0, 0


def read_documents(pieces: Iterable[Piece]) -> Iterator[str]:
    """Yield the documents of all pieces in order, each as a whole."""
    return (passage.text for passage in read_passages(pieces, may_cut=False))


def read_passages(pieces: Iterable[Piece], may_cut: bool) -> Iterator[Passage]:
    """Yield the documents of all pieces in order: the lines of a .jsonl file, the rows of a .parquet file, and any
    other file as a whole. A long document comes in several passages if it `may_cut`: then a text file is never held in
    memory as a whole, and a line or row only while it is read. Raise UserError, which names the file, and the line or
    byte that is wrong."""
    for piece in pieces:
        with opened(piece.name) as file:
            match kind_of(piece.name):
                case '.jsonl' | '.ndjson':
                    texts = read_lines(piece, in_utf8(piece.name, file))
                case '.parquet':
                    texts = read_row_groups(piece, file)
                case _:
                    ends, blocks = piece.n_documents == 1, read_blocks(piece, file)
                    yield from passages_of(blocks, ends) if may_cut else [Passage(''.join(blocks), ends)]
                    continue
            for text in texts:
                yield from passages_of([text]) if may_cut and len(text) > PIECE else [Passage(text)]


def passages_of(blocks: Iterable[str], ends: bool = True) -> Iterator[Passage]:
    """Yield a text in passages of PIECE characters or little more, cut where a tokenizer would cut it, too. The caller
    says whether the last passage `ends` the document."""
    waiting: list[str] = []
    size = 0
    for part in parts_of(blocks):
        if size >= PIECE:
            yield Passage(''.join(waiting), ends=False)
            waiting, size = [], 0
        waiting.append(part)
        size += len(part)
    yield Passage(''.join(waiting), ends)


def cut_piece(piece: Piece) -> Iterator[Piece]:
    """Yield a long text file in pieces, one for each passage."""
    if not is_text(piece.name):
        yield piece
        return
    with opened(piece.name) as file:
        codec, start = encoding_of(file)
        start = max(start, piece.start)
        for text, ends in passages_of(read_blocks(piece, file)):
            stop = piece.stop if ends else start + len(text.encode(codec))
            yield piece._replace(start=start, stop=stop, n_documents=piece.n_documents if ends else 0)
            start = stop


def split_piece(piece: Piece, fraction: float) -> tuple[Piece, Piece]:
    """Split a text file into two pieces; the second gets this fraction of its characters."""
    with opened(piece.name) as file:
        left = int(sum(map(len, read_blocks(piece, file))) * (1 - fraction))  # characters for the first one
        codec, start = encoding_of(file)
        stop = max(start, piece.start)
        for block in read_blocks(piece, file):
            stop += len(block[:left].encode(codec))
            left -= min(left, len(block))
    return piece._replace(stop=stop), piece._replace(start=stop)


def encoding_of(file: BinaryIO) -> tuple[str, int]:
    """Return the encoding of a text file, and where its text starts: after a byte order mark, if it has one."""
    file.seek(0)
    return encoding_by(file.read(3))


def encoding_by(head: bytes) -> tuple[str, int]:
    """Return the encoding that the byte order mark at the start of a text says, and the size of the mark."""
    return next(((MARKS[mark], len(mark)) for mark in MARKS if head.startswith(mark)), ('utf-8', 0))


def read_blocks(piece: Piece, file: BinaryIO) -> Iterator[str]:
    """Yield the text of a piece, BLOCK bytes at a time."""
    codec, start = encoding_of(file)
    offset = max(start, piece.start)
    file.seek(offset)
    decoder, held = codecs.getincrementaldecoder(codec)(), 0  # bytes of a character that is not complete
    while data := file.read(min(BLOCK, piece.stop - offset)):
        with readable_decoding(piece.name, offset - held):
            yield decoder.decode(data)
        held = len(decoder.getstate()[0])
        offset += len(data)
    with readable_decoding(piece.name, offset - held):
        yield decoder.decode(b'', final=True)


@contextmanager
def readable_decoding(name: str, offset: int) -> Iterator[None]:
    """Raise UserError for bytes that cannot be decoded, and say which byte of the file is wrong. The bytes that are
    decoded start at `offset` in the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        encoding, byte = error.encoding.upper(), error.object[error.start]
        was = 'latin1' if encoding == 'UTF-8' else encoding
        raise UserError(f'{name} is not {encoding}: byte {offset + error.start} is 0x{byte:02x}\n'
                        f'save it as UTF-8, for example: iconv -f {was} -t utf-8 OLD > NEW', DATA) from None


def decode(name: str, text: bytes, offset: int) -> str:
    """Decode UTF-8, or the encoding that the byte order mark at the start of a file says. `text` starts at `offset` in
    its file."""
    codec, start = ('utf-8', 0) if offset else encoding_by(text)
    with readable_decoding(name, offset + start):
        return text[start:].decode(codec)


def read_lines(piece: Piece, file: BinaryIO) -> Iterator[str]:
    """Yield the field `column` of every line that is not blank."""
    name, column, offset, stop = piece[:4]
    file.seek(offset)
    for line in lines_of(name, file):
        if offset >= stop:
            break
        if not line.isspace():
            text = decode(name, line, offset)
            try:
                row = parse(text)
            except ValueError as error:
                raise UserError(f'{name}, line {line_number(file, offset)} is not JSON: {error}', DATA) from None
            fields = list(row) if isinstance(row, dict) else []
            if column not in fields or not isinstance(row[column], str | None):
                raise missing_column(f'{name}, line {line_number(file, offset)}', column, fields)
            yield replace_surrogates(row[column] or '')
        offset += len(line)


def replace_surrogates(text: str) -> str:
    """Replace half a surrogate pair, which JSON may have and UTF-8 cannot, by U+FFFD, as tiktoken does."""
    try:
        text.encode('utf-8')
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def line_number(file: BinaryIO, offset: int) -> int:
    """Return the number, from 1, of the line that starts at byte `offset`."""
    file.seek(0)
    ends = itertools.accumulate(map(len, file))
    return 1 + sum(1 for _ in itertools.takewhile(lambda end: end <= offset, ends))


def open_parquet(name: str, column: str, file: BinaryIO) -> Any:
    """Open the file with pyarrow. Raise UserError if that column holds no text."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False,  # by pages, not by row groups
                                            page_checksum_verification=True)
    except (ValueError, OSError) as error:
        raise UserError(f'{name} is not a parquet file: {error}', DATA) from None
    types = {field.name: str(field.type) for field in table.schema_arrow}
    if not STRINGS.fullmatch(types.get(column, '')):
        raise missing_column(name, column, [f'{field} ({kind})' for field, kind in types.items()])
    return table


def read_row_groups(piece: Piece, file: BinaryIO) -> Iterator[str]:
    table = open_parquet(piece.name, piece.column, file)
    groups = list(range(piece.start, piece.stop))
    for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=[piece.column]):
        yield from (text or '' for text in batch.column(0).to_pylist())


def missing_column(where: str, column: str, there_are: list[str]) -> UserError:
    columns = ', '.join(there_are)[:200] or 'none'
    return UserError(f"{where} has no text in a column '{column}'; its columns: {columns}\n"
                     'name the one to read with --column=', DATA)
