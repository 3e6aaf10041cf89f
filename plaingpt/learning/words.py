"""Tokens as people can read them: their bytes may be a part of a character, or nothing that is seen."""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from plaingpt.corpus.tokenizer import Tokenizer

SIGNS = str.maketrans({' ': '·', '\n': '⏎', '\t': '⇥', '\r': '␍'})


class Word(NamedTuple):
    """A token of a text."""

    text: str  # what it adds
    whole: str = ''  # the characters of which it holds a part of the bytes
    is_start: bool = False  # it begins the document, and adds nothing

    @property
    def name(self) -> str:
        """Return what a list shows."""
        return self.text if self.is_start else name_of(self.text)

    @property
    def running(self) -> str:
        """Return what the text shows, in which the end of a line is seen, and is one."""
        return self.text.replace('\r', '␍').replace('\n', '⏎\n')


def name_of(text: str) -> str:
    """Return a text with signs for what would not be seen in it."""
    return text.translate(SIGNS)


def text_of(piece: bytes) -> str:
    """Return the text of a token, or its bytes in hexadecimal if they are no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return f'⟨{piece.hex(" ")}⟩'


def words(ids: Sequence[int], vocabulary: Tokenizer) -> Iterator[Word]:
    """Yield how to show each token of a text."""
    pieces = [vocabulary.decode_bytes([i]) for i in ids]
    data, end = b''.join(pieces), 0
    for i, piece in enumerate(pieces):
        start, end = end, end + len(piece)
        text = text_of(piece)
        if i == 0 and ids[0] == vocabulary.bos:
            yield Word('start of the document', is_start=True)
        else:
            yield Word(text, '' if text.encode() == piece else around(data, start, end))


def around(data: bytes, start: int, end: int) -> str:
    """Return the characters of a text in UTF-8 of which some of its bytes are a part."""
    while start > 0 and data[start] & 0xC0 == 0x80:  # a byte that continues a character
        start -= 1
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end += 1
    return data[start:end].decode(errors='replace')
