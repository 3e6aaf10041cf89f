"""The plain byte-pair encoding learns the pairs that the library learns, and gives the same ids."""
import doctest
import random
from pathlib import Path

import pytest

import tokenizer_trivialised as plain
from plaingpt.corpus import tokenizer

ROOT = Path(__file__).parents[1]
# Text that cuts words in several ways, characters of several bytes, and pairs that are equally frequent.
ODD = ("it's we'll  two spaces\t\ttabs \n\n end   \u00a0x ½ ² Ⅷ 42 3.14 snake_case "
       'naïve Ωmega 日本語 🙂🙂 e\u0301 \x00\x7f')


@pytest.fixture(scope='module')
def text() -> str:
    """Return some 50 kB: Python, English, and odd text."""
    return (ROOT / 'train.py').read_text(encoding='utf-8') + (ROOT / 'tests/data/play.txt').read_text(
        encoding='utf-8') + ODD * 3


@pytest.mark.parametrize('n_vocab', [300, 400, 600])
def test_plain_byte_pairs_are_those_of_the_library(text: str, n_vocab: int) -> None:
    fast = tokenizer.build(f'bpe:{n_vocab + 1}', lambda: [text], eot=True)  # the last id is the end of a text
    merges = plain.train(text, n_vocab)
    pieces = list(plain.BYTES)
    for left, right in merges:
        pieces.append(pieces[left] + pieces[right])
    assert pieces == fast.pieces[:-1]
    unseen = (ROOT / 'sample.py').read_text(encoding='utf-8') + ODD
    for piece in (text, unseen):
        ids = plain.encode(piece, merges)
        assert ids == fast.encode(piece)
        assert plain.decode(ids, merges) == piece
    assert len(plain.encode(unseen, merges)) < 0.8 * len(unseen.encode())


def test_both_take_the_same_one_of_equally_frequent_pairs() -> None:
    rng = random.Random(1)
    for _ in range(20):
        text = ' '.join(''.join(rng.choices('abcd', k=rng.randint(1, 7))) for _ in range(30))
        fast = tokenizer.TrainedBPE.train('bpe:290', [text], 290)
        merges = plain.train(text, 289)
        assert [plain.decode([256 + i], merges).encode() for i in range(len(merges))] == fast.pieces[256:-1], text


def test_a_text_without_pairs_ends_the_learning() -> None:
    assert plain.train('a b', 300) == [(220, 65)] and plain.train('', 300) == []
    assert plain.encode('', []) == [] and plain.decode([], []) == ''
    assert plain.decode(plain.encode('日', [])[:1], []) == '\ufffd', 'a part of a character becomes a replacement'


def test_the_example_of_the_file_is_true_and_the_file_is_short() -> None:
    assert plain.WORD.pattern == tokenizer.GPT2_PATTERNS[0].replace('[\\p{L}]', '\\p{L}').replace('[\\p{N}]', '\\p{N}')
    assert doctest.testmod(plain) == (0, 2)
    assert len((ROOT / 'tokenizer_trivialised.py').read_text(encoding='utf-8').splitlines()) <= 85
