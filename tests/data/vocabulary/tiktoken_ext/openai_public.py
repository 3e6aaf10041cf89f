"""A vocabulary with GPT-2's size and pattern and other tokens, in place of the one that tiktoken downloads.

tiktoken asks every module of the namespace package tiktoken_ext for its encodings. If PYTHONPATH names the folder
above, this module hides tiktoken's own of the same name, and `tiktoken.get_encoding('gpt2')` needs no network.
"""
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEARNED = Path(__file__).parents[1] / 'small.tiktoken'  # see ../../README.md
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's
N_VOCAB = 50257  # as GPT-2, with the end of text


def more_tokens() -> Iterator[bytes]:
    """Yield the characters of Unicode beyond ASCII, each after its first two bytes, if it has three."""
    for character in map(chr, (*range(0x80, 0xD800), *range(0xE000, 0x10000))):
        data = character.encode('utf-8')
        if len(data) == 3:
            yield data[:2]
        yield data


def gpt2() -> dict[str, Any]:
    lines = LEARNED.read_text(encoding='utf-8').splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    for token in more_tokens():
        if len(ranks) < N_VOCAB - 1:
            ranks.setdefault(token, len(ranks))
    return {'name': 'gpt2', 'explicit_n_vocab': N_VOCAB, 'pat_str': PATTERN, 'mergeable_ranks': ranks,
            'special_tokens': {'<|endoftext|>': N_VOCAB - 1}}


ENCODING_CONSTRUCTORS = {'gpt2': gpt2}
