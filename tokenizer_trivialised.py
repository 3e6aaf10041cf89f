"""
Byte-pair encoding, plainly: the ids of `--tokenizer=bpe:N`, and no speed. tests/test_tokenizer_twins.py proves them
equal.

A text is cut into words, and a word into bytes. Then the pair of neighbours that is most frequent in the whole text
becomes one new token, again and again. What is frequent gets short: that is all (Sennrich et al. 2016).

    >>> merges = train('low lower lowest', 260)
    >>> [decode([i], merges) for i in encode('slower', merges)]
    ['s', 'low', 'e', 'r']
"""
from collections import Counter
from itertools import pairwise

import regex

# GPT-2's words: letters, or digits, or other signs, each with the space before them; and what is left of spaces
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that are visible as Latin letters and signs
BYTES = [bytes([byte]) for byte in sorted(range(256), key=lambda byte: (byte not in PRINTED, byte))]  # ids 0 to 255
Pair = tuple[int, int]


def cut(text: str) -> list[list[int]]:
    """Return the words of a text, each as the ids of its bytes."""
    return [[BYTES.index(bytes([byte])) for byte in word.encode()] for word in WORD.findall(text)]


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Return the ids with `new` in place of each `pair` of neighbours, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def most_frequent_pair(words: Counter[tuple[int, ...]]) -> Pair | None:
    """Return the pair of neighbours that a text has most often, of equally frequent ones the smallest; None if it has
    none. The text comes as its words, and how often it has each."""
    counts: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] += count
    return min(counts, key=lambda pair: (-counts[pair], pair), default=None)


def train(text: str, n_vocab: int) -> list[Pair]:
    """Return the pairs to merge, in the order in which they were learned: pair i becomes token 256 + i."""
    words = Counter(tuple(word) for word in cut(text))
    merges: list[Pair] = []
    while 256 + len(merges) < n_vocab and (pair := most_frequent_pair(words)) is not None:
        merged: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            merged[tuple(merge(list(word), pair, 256 + len(merges)))] += count
        words = merged
        merges.append(pair)
    return merges


def encode(text: str, merges: list[Pair]) -> list[int]:
    """Do to a text what was learned, in the order in which it was learned: later tokens are made of earlier ones."""
    ids: list[int] = []
    for word in cut(text):
        for i, pair in enumerate(merges):
            word = merge(word, pair, 256 + i)
        ids += word
    return ids


def decode(ids: list[int], merges: list[Pair]) -> str:
    """Return the text of ids: that of a merged token is the texts of its two parts."""
    pieces = list(BYTES)
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    return b''.join(pieces[i] for i in ids).decode(errors='replace')
