"""Damage in the middle of a corpus: noticed when it is read, never taken for tokens, and looked for once."""
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from plaingpt.corpus import folder, shards, tokenise, tokenizer
from plaingpt.corpus.batches import Windows, read_batch
from plaingpt.corpus.checksums import BLOCK
from plaingpt.corpus.folder import open_split
from plaingpt.errors import DATA, UserError
from tests import comparing

refused = partial(comparing.refused, code=DATA)
BYTE = tokenizer.build('byte', list, eot=True)
TEXT = random.Random(1).randbytes(200_000).hex()  # 400,000 tokens, 800,000 bytes of a file, 13 blocks


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of twelve blocks, the last of them short, and one block to validate on."""
    where = tmp_path_factory.mktemp('prepared')
    parts, validation = tokenise.split_text(TEXT, 0.05)
    tokenise.write_corpus(where, tokenise.Packer(BYTE, None), parts, validation, 'these')
    return where


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / 'corpus'))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Return the same tokens in shards of 60,000, which begin 1024 bytes into their files."""
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    source = shards.Source([str(tmp_path / 'text.txt')], str, 'text')
    shards.write_shards(tmp_path / 'sharded', tokenise.Packer(BYTE, None), source, 60_000, 'these')
    return tmp_path / 'sharded'


def flip(path: Path, position: int) -> None:
    """Flip one bit, and leave the size and the time as they were."""
    with open(path, 'r+b') as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_damaged_block_is_refused_with_its_bytes_and_the_others_are_read(corpus: Path) -> None:
    path, size = corpus / 'train.bin', (corpus / 'train.bin').stat().st_size
    assert size // BLOCK == 11 and size % BLOCK
    flip(path, 5 * BLOCK + 17)
    tokens = open_split(corpus, 'train', 16, 257)
    edge = 5 * BLOCK // 2
    for start, count in ((0, edge), (edge - 17, 17), (edge + BLOCK // 2, 1), (len(tokens) - 1, 1)):
        assert tokens.read(start, count).tolist() == list(TEXT.encode()[start:start + count])
    for start, count in ((edge - 1, 2), (edge + BLOCK // 2 - 1, 1), (edge + 100, 17), (0, len(tokens))):
        assert refused(tokens.read, start, count) == (
            f'{path} is damaged: bytes 327,680 to 393,215 are not what its maker wrote\n'
            f'rebuild the corpus: {folder.how_to_prepare(corpus)}')
    assert 'bytes 327,680 to 393,215' in refused(read_batch, tokens, np.array([0, edge - 3]), 16, 2, 257)
    assert 'bytes 327,680 to 393,215' in refused(Windows(path, 16).__getitem__, (edge + 40) // 16)
    flip(path, 5 * BLOCK + 17)
    flip(path, size - 5000)
    meta = json.loads((corpus / 'meta.json').read_text(encoding='utf-8'))
    command = f'data/text/prepare.py --input=mytext.txt --to_dir={corpus}'
    (corpus / 'meta.json').write_text(json.dumps(meta | {'created_by': f'python {command}'}), encoding='utf-8')
    tokens = open_split(corpus, 'train', 16, 257)
    message = refused(tokens.read, len(tokens) - 1, 1)
    assert f'bytes 720,896 to {size - 1:,} are' in message, 'the last one is short'
    assert message.endswith(command), 'the command that made it'


def test_most_of_a_file_reversed_is_seen_at_the_first_window(corpus: Path) -> None:
    data = bytearray((corpus / 'train.bin').read_bytes())
    data[4096:-4096] = data[4096:-4096][::-1]
    (corpus / 'train.bin').write_bytes(data)
    tokens = open_split(corpus, 'train', 16, 257)
    for start in range(0, len(tokens) - 16, 9999):
        assert 'is damaged: bytes ' in refused(tokens.read, start, 17)


def test_a_shard_is_compared_from_its_header_on_and_the_command_that_makes_it_anew_is_named(sharded: Path) -> None:
    tokens = open_split(sharded, 'train', 16, 257)
    assert tokens.read(0, len(tokens)).tolist() == list(TEXT.encode()[60_000:])
    flip(sharded / 'train_000002.bin', 70_000)
    assert tokens.read(0, len(tokens)).size, 'no block is compared twice'
    meta = json.loads((sharded / 'meta.json').read_text(encoding='utf-8'))
    made = {'created_by': 'python data/fineweb_edu/prepare.py --input=mytext.txt'}
    (sharded / 'meta.json').write_text(json.dumps(meta | made), encoding='utf-8')
    tokens = open_split(sharded, 'train', 16, 257)
    tokens.read(59_990, 20)  # across two files
    message = refused(tokens.read, 60_000 + (BLOCK - 1024) // 2, 1)
    assert f'{sharded}/train_000002.bin is damaged: bytes 65,536 to 121,023' in message
    assert message.endswith(f' data/fineweb_edu/prepare.py --input=mytext.txt --to_dir={sharded} --overwrite=True')


def test_each_block_is_read_whole_once_and_then_no_byte_is_read_beside_those_asked_for(
        corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, pread = list[int](), os.pread

    def counting(file: int, count: int, offset: int) -> bytes:
        data = pread(file, count, offset)
        read.append(len(data))
        return data

    tokens = open_split(corpus, 'train', 16, 257)
    monkeypatch.setattr(os, 'pread', counting)
    half = BLOCK // 2  # tokens
    for start, count, expected in ((10, 17, BLOCK), (500, 17, 34), (half - 1, 17, 2 + BLOCK), (half - 1, 17, 34),
                                   (3 * half - 16, 17, 2 * BLOCK), (2 * half, half, BLOCK), (4 * half - 1, 1, 2),
                                   (4 * half, 17, BLOCK), (4 * half, 0, 0)):
        tokens.read(start, count)
        assert read.pop() == expected, (start, count)


@pytest.mark.parametrize('name', ['train.bin', 'checksums.npz', 'train_000003.bin'])
def test_none_of_200_random_damages_gives_other_tokens(
        name: str, prepared: Path, sharded: Path, tmp_path: Path) -> None:
    whole = open_split(sharded if name.startswith('train_') else prepared, 'train', 16, 257)
    ids, refusals = whole.read(0, len(whole)), list[UserError]()
    corpus = Path(shutil.copytree(whole.path.parent, tmp_path / 'copy'))
    data = (corpus / name).read_bytes()
    for number in range(200):
        (corpus / name).write_bytes(comparing.damaged(data, number))
        try:
            tokens = open_split(corpus, 'train', 16, 257)
            assert np.array_equal(tokens.read(0, len(tokens)), ids), number
        except UserError as error:
            refusals.append(error)
    for refusal in refusals:
        assert refusal.code == DATA and str(refusal).count('\n') < 3 and name in str(refusal)
    assert len(refusals) > (150 if name.endswith('.bin') else 20)
