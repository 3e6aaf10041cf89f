"""Properties of every text on its way from files to tokens and back. hypothesis looks for a text that is lost, doubled
or changed, above all among those that fail most easily. Its examples are the same each time.
"""
import gzip
import importlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tiktoken import registry

from plaingpt.corpus import folder as corpora
from plaingpt.corpus import tokenizer
from plaingpt.corpus.folder import open_split, read_meta
from plaingpt.errors import DATA, UserError

prepare = importlib.import_module('data.text.prepare')
SHARED = Path(__file__).parents[2] / 'shared/data/tiktoken'  # see shared_data in conftest.py
SPECS = ['byte', 'char', 'bpe:300', 'gpt2']
END = '<|endoftext|>'
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])  # all examples may share a vocabulary
FEW = settings(EXAMPLES, max_examples=10, phases=[Phase.generate])  # each takes long: failing examples are not shrunk

# ------------------------------------------------------------------------------------------------
# Texts, and files that hold them

PIECES = [
    'a', 'word', ' word', 'Word', "'s", "'S", "n't", "'\u017f", '1', '1234', '.', '---', '"', '\\n', '{"text": 1}',
    ' ', '  ', '\t', '\xa0', '\u2003', '\u3000', '\u200b', ' \n ',  # spaces, and what looks like one
    '\n', '\n\n', '\r', '\r\n', '\v', '\f', '\x1c', '\x1f', '\x85', '\u2028', '\u2029',  # ends of lines, for some
    '\0', '\x7f', '\xad', '\u200d', '\ufeff', '\ufffd', '\ufffe', '\ue000', '\U0010ffff',  # invisible characters
    '\xe9', 'e\u0301', '\u0301', '\u0345', '\u01c6', '\u0130', '½', '²', 'Ⅷ', '日本', 'हिन्दी', 'العربية', 'ไทย', '한국',
    '🙂', '👩\u200d👩\u200d👧', '🇩🇪', '☀\ufe0f', '👍🏽',
    END, END[:-1], END[5:], '<|fim_prefix|>',
]
pieces = st.sampled_from(PIECES) | st.sampled_from([' ', '\r\n', 'word', END])  # the likeliest to fail, more often
runs = st.builds(str.__mul__, pieces, st.sampled_from([2, 3, 10, 200]))
parts = pieces | runs | st.text(max_size=4)
few, many = st.lists(parts, min_size=1, max_size=3), st.lists(parts, min_size=8, max_size=24)
some_text = (few | many).map(''.join).filter(bool)
texts = st.sampled_from(['', ' ', '\n']) | some_text | some_text
halves = st.lists(pieces | st.sampled_from(['\ud83d', '\ude42', '\udfff']), min_size=1, max_size=6).map(''.join)
fractions = st.floats(0.001, 0.999)


@st.composite
def long_texts(draw: st.DrawFn) -> str:
    """Draw some hundred thousand characters, more than are tokenised at once: texts, each repeated many times, and
    often with a space before a word, at which a long text may be cut."""
    unit = st.builds(str.__add__, some_text, st.sampled_from([' word', ' 1', '']))
    units = draw(st.lists(st.tuples(unit, st.sampled_from([1000, 150_000, 160_000])), min_size=3, max_size=4))
    return ''.join(text * (size // len(text) + 1) for text, size in units)


class File(NamedTuple):
    """A file that holds some documents."""

    suffix: str
    documents: list[str]
    is_plain: bool  # without a byte order mark, blank lines, escapes, or rows in several groups
    padding: int = 0  # characters in another column; with many of them a .jsonl file is read in several pieces

    def write(self, folder: Path, number: int) -> None:
        kind = self.suffix.removesuffix('.gz')
        if kind == '.txt':
            text, = self.documents
            content = text.encode('utf-8' if self.is_plain and text[:1] != '\ufeff' else 'utf-8-sig')
        elif kind == '.jsonl':
            rows = [json.dumps({'id': '-' * self.padding, 'text': text}, ensure_ascii=not self.is_plain)
                    for text in self.documents]
            content = ('\n' if self.is_plain else '\r\n\n').join(rows).encode()
        else:
            sink = pyarrow.BufferOutputStream()
            table = pyarrow.table({'text': pyarrow.array([text or None for text in self.documents], pyarrow.string())})
            pyarrow.parquet.write_table(table, sink, row_group_size=None if self.is_plain else 2)
            content = sink.getvalue().to_pybytes()
        packed = gzip.compress(content) if self.suffix.endswith('.gz') else content
        (folder / f'{number}{self.suffix}').write_bytes(packed)


@st.composite
def files(draw: st.DrawFn, contents: st.SearchStrategy[str] = texts, at_most: int = 5,
          suffixes: Sequence[str] = ('.txt', '.jsonl', '.parquet', '.txt.gz', '.jsonl.gz', '.parquet.gz')) -> File:
    """Draw a file of at most so many documents."""
    suffix = draw(st.sampled_from(suffixes))
    number = 1 if suffix.startswith('.txt') else draw(st.integers(1, at_most))
    padding = draw(st.sampled_from([0, 0, 0, 1_500_000])) if suffix == '.jsonl' else 0
    return File(suffix, [draw(contents) for _ in range(number)], draw(st.booleans()), padding)


def texts_of(some: Sequence[File]) -> list[str]:
    """Return the documents in their order, without those that are empty."""
    return [text for file in some for text in file.documents if text]


@cache
def vocabulary_of(spec: str, documents: tuple[str, ...]) -> tokenizer.Tokenizer:
    return tokenizer.build(spec, lambda: documents, eot=True)


# ------------------------------------------------------------------------------------------------
# Corpora


class Corpus(NamedTuple):
    """A corpus as prepare.py makes it: the ids of each document in either split, without the end."""

    train: list[list[int]]
    val: list[list[int]]
    vocabulary: tokenizer.Tokenizer
    meta: dict[str, Any]

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """Return the documents of train and of val."""
        train, val = ([self.vocabulary.decode_bytes(ids).decode() for ids in split] for split in self[:2])
        return train, val


@pytest.fixture(scope='module', autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have corpora written to another folder than data/; there are hundreds, so none waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('os.fsync', lambda _: None)
        patch.setattr(corpora, 'CORPORA', tmp_path_factory.mktemp('data'))
        yield


def prepared(some: Sequence[File], *arguments: str, num_proc: int = 1) -> Path:
    """Return the folder of the corpus that data/text/prepare.py makes of these files."""
    with tempfile.TemporaryDirectory() as source:
        for number, file in enumerate(some):
            file.write(Path(source), number)
        prepare.main([f'--input={source}', '--name=it', f'--num_proc={num_proc}', *arguments])
    return corpora.data_folder('it')


def read(folder: Path) -> Corpus:
    """Open a corpus as training does."""
    meta = read_meta(folder)
    vocabulary, splits = tokenizer.from_state(meta['tokenizer']), []
    for split in ('train', 'val'):
        if meta['splits'][split]['tokens'] == 1:  # too few tokens for a window
            ids = np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])
        else:
            file = open_split(folder, split, 1, vocabulary.n_vocab)
            ids = file.read(0, len(file))
        splits.append(parted(ids.tolist(), vocabulary.eot))
    return Corpus(splits[0], splits[1], vocabulary, meta)


def parted(ids: list[int], end: int | None) -> list[list[int]]:
    """Return the ids of each document: all of them have an end, or the only one has none."""
    if end not in ids:
        return [ids]
    assert ids[-1] == end, 'the last document has its end'
    documents: list[list[int]] = [[]]
    for i in ids:
        if i == end:
            documents.append([])
        else:
            documents[-1].append(i)
    return documents[:-1]


# ------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.usefixtures('gpt2_stand_in')
@settings(EXAMPLES, max_examples=80)
@given(some=st.lists(files(), min_size=1, max_size=4), spec=st.sampled_from(SPECS))
def test_every_document_comes_back_once(some: list[File], spec: str) -> None:
    documents = texts_of(some)
    assume(len(documents) > 1)  # a single one has a test of its own below
    corpus = read(prepared(some, f'--tokenizer={spec}', '--val_fraction=0.3'))
    assert Counter(chain(*corpus.texts)) == Counter(documents)
    for split, found in zip(('train', 'val'), corpus.texts, strict=True):
        counts = corpus.meta['splits'][split]
        assert (counts['documents'], counts['bytes']) == (len(found), len(''.join(found).encode()))


@EXAMPLES
@given(documents=st.lists(halves, min_size=2, max_size=5))
def test_half_a_character_in_json_becomes_a_replacement(documents: list[str]) -> None:
    """Two halves that meet form a whole character, as JSON writes it."""
    whole = [json.loads(json.dumps(text)) for text in documents]
    corpus = read(prepared([File('.jsonl', documents, False)], '--tokenizer=byte'))
    assert Counter(chain(*corpus.texts)) == Counter(re.sub('[\ud800-\udfff]', '\ufffd', text) for text in whole)


@pytest.mark.usefixtures('gpt2_stand_in')
@EXAMPLES
@given(file=files(some_text, at_most=1), spec=st.sampled_from(SPECS), fraction=fractions)
def test_a_single_document_is_cut_in_two(file: File, spec: str, fraction: float) -> None:
    text, = file.documents
    command = (f'--tokenizer={spec}', f'--val_fraction={fraction}')
    if min(fraction, 1 - fraction) * len(text) < 1:
        assume(not is_refused([file], *command))  # one part would be empty
    corpus = read(prepared([file], *command))
    assert ''.join(chain(*corpus.texts)) == text
    assert len(corpus.texts[1][0]) == pytest.approx(fraction * len(text), abs=1)


@EXAMPLES
@given(n=st.integers(2, 40), fraction=fractions, seed=st.integers(0, 2**40))
def test_every_document_is_in_one_split_whatever_the_fraction_and_the_seed(n: int, fraction: float, seed: int) -> None:
    some = [File('.jsonl', [f'{i}' for i in range(n)], True)]
    command = ('--tokenizer=byte', f'--val_fraction={fraction}', f'--seed={seed}')
    if math.ceil(fraction * n) == n:
        assert is_refused(some, *command), 'nothing would be left to learn from'
        return
    corpus = read(prepared(some, *command))
    train, val = corpus.texts
    assert sorted(map(int, [*train, *val])) == list(range(n))
    assert len(val) == math.ceil(fraction * n)
    assert train == sorted(train, key=int), 'documents stay in their order'
    assert read(prepared(some, *command)).texts == corpus.texts, 'drawn again in the same way'


def is_refused(some: Sequence[File], *arguments: str) -> bool:
    try:
        prepared(some, *arguments)
    except UserError as error:
        return error.code == DATA
    return False


@settings(FEW, max_examples=3)
@given(first=st.lists(files(some_text, suffixes=['.jsonl', '.parquet']), min_size=4, max_size=4),
       more=st.lists(files(), max_size=2), spec=st.sampled_from(['byte', 'bpe:300']))
def test_several_processes_make_the_files_of_one(first: list[File], more: list[File], spec: str) -> None:
    """Each of the first four files is work for a process of its own; with fewer, none would be started."""
    some = [*first, *more]
    made = []
    for num_proc in (1, 2):
        folder = prepared(some, f'--tokenizer={spec}', num_proc=num_proc)
        contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'meta.json'}
        made.append((contents, read_meta(folder) | {'source': 'elsewhere'}))
    assert made[0] == made[1]
    assert made[0][0].keys() == {'train.bin', 'val.bin', 'checksums.npz'}


# ------------------------------------------------------------------------------------------------
# Ids


@pytest.fixture(params=['gpt2', 'cl100k_base', 'gpt2 in small', 'cl100k_base in small', 'o200k_base in small'])
def encoding(request: pytest.FixtureRequest, small_encoding: tiktoken.Encoding,
             monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """Return a published vocabulary, or the published pattern of one, under its name, with the tokens of the small
    vocabulary. Nothing is downloaded."""
    name, _, is_small = request.param.partition(' in ')
    if not is_small:
        monkeypatch.setattr('tiktoken.load.read_file', refuse_download)
        if SHARED.is_dir() and 'TIKTOKEN_CACHE_DIR' not in os.environ:
            monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(SHARED))
        try:
            return tiktoken.get_encoding(name)
        except OSError:
            pytest.skip(f'the files of {name} are not in TIKTOKEN_CACHE_DIR')
    published = importlib.import_module('tiktoken_ext.openai_public')
    for load in ('load_tiktoken_bpe', 'data_gym_to_mergeable_bpe_ranks'):
        monkeypatch.setattr(published, load, lambda *_, **__: small_encoding._mergeable_ranks)
    small = tiktoken.Encoding(**getattr(published, name)())
    monkeypatch.setitem(registry.ENCODINGS, name, small)
    return small


def refuse_download(address: str) -> bytes:
    raise OSError(f'{address} is not downloaded for a test')


@EXAMPLES
@given(documents=st.lists(some_text, min_size=2, max_size=6), file=files())
def test_ids_are_tiktokens_own(documents: list[str], file: File, encoding: tiktoken.Encoding) -> None:
    some = [File('.jsonl', documents, True), file]
    corpus = read(prepared(some, f'--tokenizer={encoding.name}'))
    assert corpus.vocabulary.eot == encoding.eot_token
    expected = Counter(tuple(encoding.encode_ordinary(text)) for text in texts_of(some))
    assert Counter(map(tuple, chain(corpus.train, corpus.val))) == expected
    assert Counter(chain(*corpus.texts)) == Counter(texts_of(some))


@FEW
@given(document=long_texts(), file=files())
def test_ids_of_long_documents_are_tiktokens_own(document: str, file: File, encoding: tiktoken.Encoding) -> None:
    """The document is one of several at first, and then the only one, which is cut in two."""
    some = [File('.jsonl', [document, 'Another one.'], False), file]
    corpus = read(prepared(some, f'--tokenizer={encoding.name}'))
    ids = {text: tuple(encoding.encode_ordinary(text)) for text in {*texts_of(some)}}
    assert Counter(map(tuple, chain(corpus.train, corpus.val))) == Counter(ids[text] for text in texts_of(some))
    corpus = read(prepared([File('.txt', [document], True)], f'--tokenizer={encoding.name}', '--val_fraction=0.25'))
    (train,), (val,) = corpus.texts
    assert train + val == document
    assert (corpus.train, corpus.val) == ([encoding.encode_ordinary(train)], [encoding.encode_ordinary(val)])


@settings(EXAMPLES, max_examples=100)
@given(prompt=texts)
def test_a_prompt_has_tiktokens_ids_with_each_end_of_text_as_one_id(prompt: str, encoding: tiktoken.Encoding) -> None:
    vocabulary = tokenizer.load_tiktoken(encoding.name)
    ids = vocabulary.encode_prompt(prompt)
    assert ids == encoding.encode(prompt, allowed_special={END}, disallowed_special=())
    assert vocabulary.decode(ids) == prompt


@pytest.mark.parametrize('spec', ['byte', 'bpe:300', 'gpt2'])
@pytest.mark.usefixtures('gpt2_stand_in')
@settings(EXAMPLES, max_examples=100)
@given(prompt=texts)
def test_a_prompt_comes_back_from_its_ids(prompt: str, spec: str, documents: list[str]) -> None:
    vocabulary = vocabulary_of(spec, tuple(documents))
    ids = vocabulary.encode_prompt(prompt)
    assert vocabulary.decode(ids) == prompt
    assert sum(i == vocabulary.eot for i in ids) == prompt.count(END)
