"""The prepare scripts, from text to token files that training opens."""
import codecs
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken

import configurator
import export
import train
from plaingpt.corpus import tokenizer
from plaingpt.corpus.folder import open_split, read_meta
from plaingpt.errors import COMMAND, DATA, UserError
from tests.comparing import copy_script
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / 'tests/data'


def load(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return data/<name>/prepare.py, which writes below `folder` instead of data/."""
    monkeypatch.setattr('plaingpt.corpus.folder.CORPORA', folder)
    return importlib.import_module(f'data.{name}.prepare')


def read_split(folder: Path, split: str) -> list[int]:
    """Return the ids of one split, opened as training opens them."""
    file = open_split(folder, split, 1, 1 << 20)
    return [int(i) for i in file.read(0, len(file))]


def tokenizer_of(folder: Path) -> tokenizer.Tokenizer:
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    return tokenizer.from_state(meta['tokenizer'])


def documents_of(folder: Path, split: str) -> list[str]:
    """Return the texts between the end-of-text tokens."""
    tokenizer, ids = tokenizer_of(folder), read_split(folder, split)
    assert ids[-1] == tokenizer.eot, 'the last document ends'
    return tokenizer.decode(ids).split('<|endoftext|>')[:-1]


# ------------------------------------------------------------------------------------------------
# stdlib


@pytest.mark.slow
def test_the_default_text_is_pythons_library_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    prepare = load('stdlib', tmp_path, monkeypatch)
    prepare.main([])
    assert 'python train.py config/train_stdlib.py' in capsys.readouterr().out
    folder = tmp_path / 'stdlib'
    train, val = documents_of(folder, 'train'), documents_of(folder, 'val')

    library = Path(json.__file__).parents[1]
    assert (library / 'json/decoder.py').read_text(encoding='utf-8') in train
    assert (library / 'copy.py').read_text(encoding='utf-8') in val  # the hash of its name decides so, on every machine
    together = ''.join(train + val)
    assert 8e6 < len(together) < 14e6
    assert 0.02 < len(''.join(val)) / len(together) < 0.08
    assert not set(train) & set(val) - {''}
    names = prepare.find_sources(library)
    assert names == sorted(names)
    for part in ('test/', 'tests/', 'site-packages/', 'encodings/'):
        assert not [name for name in names if part in f'/{name}' and f'/{part}' in f'/{name}']
    assert tokenizer_of(folder).n_vocab == 1024

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prepare.main([])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, 'the same text gives the same files'


# ------------------------------------------------------------------------------------------------
# Shakespeare


@pytest.fixture
def play(tmp_path: Path) -> Path:
    """Return speeches in the form of tiny Shakespeare's, and more than the 32,768 tokens that llm.c validates on."""
    text = (TEXTS / 'play.txt').read_text(encoding='utf-8')
    (tmp_path / 'play.txt').write_text('\n'.join([text] * 80), encoding='utf-8', newline='')
    return tmp_path / 'play.txt'


def test_shakespeare_by_characters_is_nanogpts_byte_for_byte(
        tmp_path: Path, play: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load('shakespeare_char', tmp_path, monkeypatch).main([f'--input={play}'])
    text = play.read_text(encoding='utf-8')
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([number[character] for character in text], dtype=np.uint16)
    cut = int(len(text) * 0.9)
    folder = tmp_path / 'shakespeare_char'
    assert (folder / 'train.bin').read_bytes() == ids[:cut].tobytes()
    assert (folder / 'val.bin').read_bytes() == ids[cut:].tobytes()
    assert read_split(folder, 'train') + read_split(folder, 'val') == ids.tolist()
    assert (tokenizer_of(folder).n_vocab, tokenizer_of(folder).eot) == (len(number), None)


def test_shakespeare_in_gpt2s_tokens_is_split_as_nanogpt_splits_it(
        tmp_path: Path, play: Path, monkeypatch: pytest.MonkeyPatch, gpt2_stand_in: tiktoken.Encoding) -> None:
    load('shakespeare', tmp_path, monkeypatch).main([f'--input={play}'])
    folder, text = tmp_path / 'shakespeare', play.read_text(encoding='utf-8')
    cut = int(len(text) * 0.9)
    assert read_split(folder, 'train') == gpt2_stand_in.encode_ordinary(text[:cut])
    assert read_split(folder, 'val') == gpt2_stand_in.encode_ordinary(text[cut:])


def test_tiny_shakespeare_is_split_as_llm_c_splits_it(
        tmp_path: Path, play: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        gpt2_stand_in: tiktoken.Encoding) -> None:
    load('tinyshakespeare', tmp_path, monkeypatch).main([f'--input={play}'])
    assert capsys.readouterr().out.endswith(' train.py config/overfit_tinyshakespeare.py\n')
    folder, text = tmp_path / 'tinyshakespeare', play.read_text(encoding='utf-8')
    train, val = read_split(folder, 'train'), read_split(folder, 'val')
    assert len(val) == 32_768
    marked = '<|endoftext|>' + text.replace('\n\n', '\n\n<|endoftext|>')
    assert val + train == gpt2_stand_in.encode(marked, allowed_special='all')
    splits = read_meta(folder)['splits']
    assert sum(split['bytes'] for split in splits.values()) == len(text.encode())
    assert sum(split['documents'] for split in splits.values()) == 1 + text.count('\n\n')


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char', 'tinyshakespeare'])
def test_shakespeare_may_have_any_tokenizer(
        name: str, tmp_path: Path, play: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer may be a new one, or that of another corpus."""
    text = play.read_text(encoding='utf-8')
    load('text', tmp_path, monkeypatch).main([f'--input={play}', '--tokenizer=byte', '--name=other'])
    for spec, n_vocab in (('bpe:300', 300), ('byte', 256), (str(tmp_path / 'other'), 256)):
        load(name, tmp_path, monkeypatch).main([f'--input={play}', f'--tokenizer={spec}'])
        vocabulary = tokenizer_of(tmp_path / name)
        assert vocabulary.n_vocab == n_vocab + (name == 'tinyshakespeare' and spec == 'byte')
        splits = [read_split(tmp_path / name, split) for split in ('train', 'val')]
        ids = [i for split in (splits[::-1] if name == 'tinyshakespeare' else splits) for i in split]
        assert vocabulary.decode(ids).replace('<|endoftext|>', '') == text


@pytest.mark.usefixtures('tiktoken_cache')
def test_the_real_shakespeare_has_the_published_counts(
        tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts are nanoGPT's, in characters and in GPT-2's tokens, and llm.c's."""
    for name, n_train, n_val in [('shakespeare_char', 1_003_854, 111_540), ('shakespeare', 301_966, 36_059),
                                 ('tinyshakespeare', 305_260, 32_768)]:
        load(name, tmp_path, monkeypatch).main([f'--input={shared_data}/tinyshakespeare/input.txt'])
        assert [len(read_split(tmp_path / name, split)) for split in ('train', 'val')] == [n_train, n_val]
    assert tokenizer_of(tmp_path / 'shakespeare_char').n_vocab == 65
    begin = read_split(tmp_path / 'tinyshakespeare', 'val')[:6]
    assert begin == [50256, 5962, 22307, 25, 198, 8421], 'the end of text, then: First Citizen:, new line, Before'
    assert sum(split['documents'] for split in read_meta(tmp_path / 'tinyshakespeare')['splits'].values()) == 7222


def test_every_prepare_py_may_be_given_a_tokenizer() -> None:
    for path in (ROOT / 'data').glob('*/prepare.py'):
        script = importlib.import_module(f'data.{path.parent.name}.prepare')
        assert 'tokenizer' in configurator.find_settings(script), path


# ------------------------------------------------------------------------------------------------
# tinystories


@pytest.mark.parametrize('is_local', [True, False])
def test_tiny_stories_keep_their_own_validation_and_learn_nothing_from_it(
        is_local: bool, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """The stories come from local files, and through `datasets` from a folder that is laid out as the dataset is."""
    import pyarrow
    import pyarrow.parquet

    stories = {'train': [text for text in tiny_text.split('\n\n') if text], 'validation': ['qqqqzzzz' * 500, 'The end']}
    (tmp_path / 'hub/data').mkdir(parents=True)
    for split, texts in stories.items():
        path = tmp_path / f'hub/data/{split}-00000-of-00001.parquet'
        pyarrow.parquet.write_table(pyarrow.table({'text': texts}), path)
    arguments = [f'--source={tmp_path}/hub']
    if is_local:
        arguments = [f'--{name}={tmp_path}/hub/data/{split}-*.parquet' for name, split in
                     [('input', 'train'), ('val_input', 'validation')]]
    prepare, folder = load('tinystories', tmp_path, monkeypatch), tmp_path / 'tinystories'
    prepare.main([*arguments, '--tokenizer=bpe:400'])
    assert documents_of(folder, 'train') == stories['train']
    assert documents_of(folder, 'val') == stories['validation']
    tokenizer = tokenizer_of(folder)
    assert tokenizer.n_vocab == 400 and b'zz' not in tokenizer.pieces
    assert 'train.py config/train_tinystories.py' in capsys.readouterr().out
    if is_local:
        with pytest.raises(UserError, match='--input=PATH and --val_input=PATH together') as caught:
            prepare.main(arguments[:1])
        assert caught.value.code == COMMAND


def test_without_network_shakespeare_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match=r'tinyshakespeare/input\.txt cannot be used.*\n.*--input=PATH') as caught:
        load('shakespeare_char', tmp_path, monkeypatch).main([])
    assert caught.value.code == DATA
    assert not (tmp_path / 'shakespeare_char').exists()


# ------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize('spec', ['char', 'byte', 'bpe:300', 'gpt2'])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_the_users_own_documents_become_a_corpus(
        spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f'Document {i}: ' + 'naïve 🙂\r\n' * (i % 5) for i in range(50)]
    rows = [json.dumps({'body': text}) for text in [*texts[:20], '', *texts[20:]]]
    (tmp_path / 'own.jsonl').write_text('\n'.join(rows), encoding='utf-8')
    load('text', tmp_path, monkeypatch).main(
        [f'--input={tmp_path}/own.jsonl', '--column=body', f'--tokenizer={spec}', '--name=own', '--val_fraction=0.2'])

    train, val = documents_of(tmp_path / 'own', 'train'), documents_of(tmp_path / 'own', 'val')
    assert Counter(train + val) == Counter(texts)  # each once, and the empty one not at all
    assert len(val) == 10, 'a fifth of those that are not empty'
    assert train == [text for text in texts if text in train], 'the order of the file'
    assert max(map(texts.index, val)) > 30 > min(map(texts.index, val)), 'drawn from the whole file'
    out = capsys.readouterr().out
    for line in ('found: files 1, documents 50', f'vocabulary: {spec}, {tokenizer_of(tmp_path / "own").n_vocab:,} ids',
                 'python train.py config/train_stdlib.py --dataset=own --out_dir=out-own',
                 'python sample.py --out_dir=out-own'):
        assert line in out


@pytest.mark.parametrize('spec', ['char', 'byte', 'bpe:300', 'gpt2'])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_single_document_is_split_by_position_and_has_no_end(
        spec: str, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'book.txt').write_text(tiny_text, encoding='utf-8')
    load('text', tmp_path, monkeypatch).main([f'--input={tmp_path}/book.txt', f'--tokenizer={spec}', '--name=book'])
    folder = tmp_path / 'book'
    tokenizer = tokenizer_of(folder)
    train, val = read_split(folder, 'train'), read_split(folder, 'val')
    cut = int(len(tiny_text) * 0.9)
    assert (tokenizer.decode(train), tokenizer.decode(val)) == (tiny_text[:cut], tiny_text[cut:])
    assert tokenizer.eot is None or tokenizer.eot not in train + val
    assert spec not in ('char', 'byte') or tokenizer.eot is None
    assert 'a single document: the last 10% of its characters are for validation\n' in capsys.readouterr().out


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Counter[str]:
    """Return the documents of a corpus that `data/text/prepare.py arguments...` makes."""
    load('text', folder, monkeypatch).main([*arguments, '--tokenizer=byte', '--name=it'])
    return Counter(documents_of(folder / 'it', 'train') + documents_of(folder / 'it', 'val'))


def test_hidden_files_are_no_documents_unless_they_are_named(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('notes.txt', 'more/notes.txt', '.ipynb_checkpoints/notes-checkpoint.txt', '._notes.txt', '.x/a.txt'):
        (tmp_path / '.book' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / '.book' / name).write_text(f'This is {name}', encoding='utf-8')
    folder, seen = tmp_path / '.book', Counter(['This is notes.txt', 'This is more/notes.txt'])
    for pattern in ('', '/**', '/**/*.txt'):
        assert prepared(tmp_path, monkeypatch, f'--input={folder}{pattern}') == seen
        assert 'hidden files, whose names begin with a dot, are left out: 3\n' in capsys.readouterr().out
    load('text', tmp_path, monkeypatch).main([f'--input={folder}/._notes.txt', '--tokenizer=byte', '--name=it'])
    assert 'left out' not in capsys.readouterr().out
    (folder / 'notes.txt').unlink()
    (folder / 'more/notes.txt').unlink()
    with pytest.raises(UserError, match=r'without .* files'):
        prepared(tmp_path, monkeypatch, f'--input={folder}')


def test_documents_on_both_sides_of_the_split_are_counted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write = partial(Path.write_text, encoding='utf-8')
    for name, text in (('a', 'one'), ('b', 'two'), ('c', 'three')):
        write(tmp_path / f'{name}.txt', text)
    (tmp_path / 'val').mkdir()
    for name, text in (('a', 'two'), ('b', 'four'), ('c', 'three')):
        write(tmp_path / f'val/{name}.txt', text)
    prepared(tmp_path, monkeypatch, f'--input={tmp_path}/*.txt', f'--val_input={tmp_path}/val')
    assert 'of the documents in val.bin, 2 are in train.bin, too' in capsys.readouterr().out
    prepared(tmp_path, monkeypatch, f'--input={tmp_path}/*.txt', '--val_fraction=0.3')
    assert 'train.bin, too' not in capsys.readouterr().out


@pytest.mark.parametrize('empty', ['{"text": ""}', '{"text": null}', ''])
def test_empty_documents_leave_before_the_split(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({'text': 'The only text that there is. ' * 9}), *[empty] * 5]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines), encoding='utf-8')
    load('text', tmp_path, monkeypatch).main([f'--input={tmp_path}/a.jsonl', '--tokenizer=byte', '--name=it'])
    assert 'a single document' in capsys.readouterr().out
    texts = [json.dumps({'text': f'Text {i}'}) for i in range(6)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(f'{text}\n{empty}' for text in texts), encoding='utf-8')
    rows = [None, 'Text 0', '', *(f'Text {i}' for i in range(1, 6)), None]
    pyarrow.parquet.write_table(pyarrow.table({'text': rows}), tmp_path / 'b.parquet')
    for name in ('a.jsonl', 'b.parquet'):
        found = prepared(tmp_path, monkeypatch, f'--input={tmp_path}/{name}', '--val_fraction=0.5')
        assert found == Counter(f'Text {i}' for i in range(6))
        assert len(documents_of(tmp_path / 'it', 'val')) == 3
        assert 'documents 6\n' in capsys.readouterr().out


def test_a_byte_order_mark_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a.txt').write_bytes(codecs.BOM_UTF8 + 'naïve\r\n'.encode())
    (tmp_path / 'b.txt').write_text('naïve 16', encoding='utf-16')  # with the mark, as PowerShell's > writes it
    (tmp_path / 'c.txt').write_bytes(codecs.BOM_UTF16_BE + 'naïve 16 BE'.encode('utf-16-be'))
    (tmp_path / 'd.jsonl').write_bytes(codecs.BOM_UTF8 + b'{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / 'e.ndjson').write_bytes(b'{"text": "third"}\n')
    found = prepared(tmp_path, monkeypatch, f'--input={tmp_path}', '--val_fraction=0.3')
    assert found == Counter(['naïve\r\n', 'naïve 16', 'naïve 16 BE', 'first', 'second', 'third'])


def test_a_parquet_file_may_have_text_of_any_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ['one', 'two', 'one', 'four']
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
                 pyarrow.string_view()):
        pyarrow.parquet.write_table(pyarrow.table({'text': pyarrow.array(texts).cast(kind)}), tmp_path / 'a.parquet')
        found = prepared(tmp_path, monkeypatch, f'--input={tmp_path}/a.parquet', '--val_fraction=0.5')
        assert found == Counter(texts), kind
    pyarrow.parquet.write_table(pyarrow.table({'text': [1, 2, 3]}), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=r"no text in a column 'text'; its columns: text \(int64\)"):
        prepared(tmp_path, monkeypatch, f'--input={tmp_path}/a.parquet')


def test_a_text_is_prepared_with_the_tokenizer_of_a_run_a_model_a_corpus_or_a_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a.txt').write_text('Some text, on which the vocabulary is learned. ' * 20, encoding='utf-8')
    (tmp_path / 'b.txt').write_text('Another one: quick brown foxes! ' * 9, encoding='utf-8')
    main = load('text', tmp_path, monkeypatch).main
    main([f'--input={tmp_path}/a.txt', '--tokenizer=bpe:270', '--name=a'])
    learned = tokenizer_of(tmp_path / 'a')
    settings = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--max_iters=1', '--eval_iters=1',
                '--batch_size=2', '--gradient_accumulation_steps=1', '--sample_interval=0', '--device=cpu']
    train.main([f'--dataset={tmp_path}/a', f'--out_dir={tmp_path}/run', *settings])
    export.main([f'--out_dir={tmp_path}/run', '--to=hf'])
    (tmp_path / 'run/hf/tokenizer.json').rename(tmp_path / 'my.json')
    for where in ('run', 'run/ckpt.pt', 'run/hf', 'a', 'my.json'):
        main([f'--input={tmp_path}/b.txt', f'--tokenizer={tmp_path}/{where}', '--name=b'])
        found = tokenizer_of(tmp_path / 'b')
        assert found.pieces == learned.pieces, where
        ids = read_split(tmp_path / 'b', 'train') + read_split(tmp_path / 'b', 'val')
        assert found.decode(ids) == 'Another one: quick brown foxes! ' * 9
    # for training a model further on another text
    train.main([f'--dataset={tmp_path}/b', f'--out_dir={tmp_path}/tuned', f'--init_from={tmp_path}/run/ckpt.pt',
                *settings[4:]])


@pytest.mark.parametrize('suffix', ['.json', '.csv', '.tsv'])
def test_a_table_is_not_read_as_text(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f'a{suffix}').write_text('[{"text": "one"}, {"text": "two"}]', encoding='utf-8')
    with pytest.raises(UserError, match=r'is not text: .*\n.*\.jsonl.*\.txt') as error:
        prepared(tmp_path, monkeypatch, f'--input={tmp_path}/a{suffix}')
    assert error.value.code == DATA


@pytest.mark.parametrize('spec', ['char', 'bpe:300'])
def test_the_users_own_validation_text_is_used_whole(
        spec: str, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'in').mkdir()
    for name in ('a', 'b'):
        (tmp_path / f'in/{name}.txt').write_text(name + tiny_text, encoding='utf-8')
    (tmp_path / 'val.txt').write_text('Ünseen characters, too', encoding='utf-8')
    load('text', tmp_path, monkeypatch).main(
        [f'--input={tmp_path}/in', f'--val_input={tmp_path}/val.txt', f'--tokenizer={spec}', '--name=own'])
    assert documents_of(tmp_path / 'own', 'train') == [f'a{tiny_text}', f'b{tiny_text}']
    assert documents_of(tmp_path / 'own', 'val') == ['Ünseen characters, too']


def test_the_seed_decides_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'text': str(i)}) for i in range(100)), encoding='utf-8')
    prepare, val = load('text', tmp_path, monkeypatch), {}
    for name, seed in [('a', 1), ('b', 1), ('c', 2)]:
        prepare.main([f'--input={tmp_path}/a.jsonl', '--tokenizer=byte', f'--name={name}', f'--seed={seed}'])
        val[name] = documents_of(tmp_path / name, 'val')
    assert val['a'] == val['b'] != val['c']


@pytest.mark.parametrize(('arguments', 'message', 'code'), [
    ([], 'give --input=PATH', COMMAND),
    (['--input=HERE/nowhere'], r'--input=.*/nowhere matches no file', DATA),
    (['--input=HERE/a.txt', '--val_input=HERE/nowhere'], r'--val_input=.*/nowhere matches no file', DATA),
    *((['--input=HERE/a.txt', f'--name={name}'], rf'--name={re.escape(name)} becomes the folder data/<name>: letters',
       COMMAND) for name in ('', '.', '..', '../out', '/tmp/out', 'a/b', 'a\\b', '.a', '-a', 'a b', 'a*', '[a]', '~',
                             'a\n', 'C:', 'nul', 'COM1.txt', '$HOME')),
    *((['--input=HERE/a.txt', f'--name={name}'], rf'--name={name}: that folder is for the corpus of data/{name}/',
       COMMAND) for name in ('shakespeare', 'stdlib')),
    (['--input=HERE/a.txt', '--tokenizer=gpt9'], "tokenizer 'gpt9' is unknown", COMMAND),
    (['--input=HERE/a.txt', '--val_fraction=2'], 'val_fraction=2.0 must lie between 0 and 1', COMMAND),
    (['--input=HERE/empty.txt'], r'empty\.txt holds no documents', DATA),
    (['--input=HERE/blank.jsonl'], r'blank\.jsonl holds no documents', DATA),
    (['--input=HERE/rows.jsonl', '--column=body'], "no text in a column 'body'; its columns: text", DATA),
])
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_wrong_command_is_one_clear_message(
        arguments: list[str], message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in [('a.txt', 'some text'), ('empty.txt', ''), ('blank.jsonl', '\n\n'),
                          ('rows.jsonl', '{"text": "a"}\n{"text": "b"}')]:
        (tmp_path / name).write_text(content, encoding='utf-8')
    for other in ('text', 'shakespeare', 'stdlib'):
        (tmp_path / 'out' / other).mkdir(parents=True)
        (tmp_path / 'out' / other / 'prepare.py').touch()
    with pytest.raises(UserError, match=message) as caught:
        load('text', tmp_path / 'out', monkeypatch).main([a.replace('HERE', str(tmp_path)) for a in arguments])
    assert caught.value.code == code
    assert len(str(caught.value).splitlines()) <= 3
    assert not [path for path in tmp_path.rglob('*') if path.suffix in ('.bin', '.tmp')]


# ------------------------------------------------------------------------------------------------
# openwebtext


@pytest.fixture
def as_nanogpt(documents: list[str], gpt2_stand_in: tiktoken.Encoding) -> tuple[list[list[int]], bytes]:
    """Return the train documents, and val.bin, as nanoGPT's procedure makes them with the libraries that it uses. Its
    fraction of 0.0005 is one document here; with seven documents, the order shows."""
    import datasets

    pages = datasets.Dataset.from_dict({'text': documents})
    split = pages.train_test_split(test_size=0.15, seed=2357, shuffle=True)
    train, val = ([[*gpt2_stand_in.encode_ordinary(text), gpt2_stand_in.eot_token] for text in split[name]['text']]
                  for name in ('train', 'test'))
    return train, np.array([i for document in val for i in document], dtype=np.uint16).tobytes()


@pytest.mark.usefixtures('gpt2_stand_in')
def test_openwebtext_is_split_and_written_as_nanogpt_does(
        as_nanogpt: tuple[list[list[int]], bytes], documents: list[str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents come from local files of every form, and from a folder of parquet files through `datasets`, as from
    the hub."""
    import pyarrow
    import pyarrow.parquet

    train_documents, val_bin = as_nanogpt
    (tmp_path / 'hub').mkdir()
    for number, start in enumerate(range(0, len(documents), 12)):
        table = pyarrow.table({'text': documents[start:start + 12]})
        pyarrow.parquet.write_table(table, tmp_path / f'hub/train-{number:05}-of-00004.parquet')

    prepare, folder = load('openwebtext', tmp_path, monkeypatch), tmp_path / 'openwebtext'
    for arguments in (*([f'--input={TEXTS}/documents.{form}'] for form in ('jsonl', 'jsonl.gz', 'parquet')),
                      [f'--source={tmp_path}/hub', '--revision=']):
        prepare.main([*arguments, '--val_fraction=0.15'])
        assert (folder / 'val.bin').read_bytes() == val_bin
        ids = np.array(read_split(folder, 'train'))
        found = np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]
        assert Counter(tuple(d.tolist()) for d in found) == Counter(map(tuple, train_documents))
        shutil.rmtree(folder)

    prepare.main([f'--input={tmp_path}/hub'])
    assert len(documents_of(folder, 'val')) == 1
    assert Counter(documents_of(folder, 'train') + documents_of(folder, 'val')) == Counter(
        part for text in documents for part in text.split('<|endoftext|>'))


@pytest.mark.usefixtures('gpt2_stand_in')
def test_openwebtext_that_cannot_be_downloaded_names_the_remedy(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r'nobody/nothing cannot be downloaded.*\n.*--input=PATH') as caught:
        load('openwebtext', tmp_path, monkeypatch).main(['--source=nobody/nothing'])
    assert caught.value.code == DATA


def processes_of(group: int) -> list[int]:
    """Return the processes of a group that are still alive."""
    listing = subprocess.run(['ps', '-eo', 'pid,pgid,stat'], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()[1:]]
    return [int(pid) for pid, pgid, status in rows if int(pgid) == group and not status.startswith('Z')]


def is_gone(group: int) -> bool:
    return not processes_of(group)


@pytest.fixture
def _heeds_ctrl_c() -> Iterator[None]:
    """Heed Ctrl-C as in a terminal. A process that a shell starts with & ignores Ctrl-C, and so does all that it
    starts: pytest, and the run below."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == 'win32', reason='sends POSIX signals')
@pytest.mark.usefixtures('gpt2_stand_in', '_heeds_ctrl_c')
def test_an_interrupted_run_leaves_neither_half_a_file_nor_a_process(tmp_path: Path) -> None:
    """The run is killed, and stopped by Ctrl-C, while its workers are busy; then the same command runs to the end."""
    copy_script('data/openwebtext/prepare.py', tmp_path)
    folder, short, long = tmp_path / 'data/openwebtext', tmp_path / 'short.jsonl', tmp_path / 'long'
    short.write_bytes((TEXTS / 'documents.jsonl').read_bytes() * 90)
    long.mkdir()
    for i in range(300):  # at least half a minute of work for two cores
        os.link(short, long / f'{i}.jsonl')
    command = [sys.executable, str(folder / 'prepare.py'), '--num_proc=2']
    subprocess.run([*command, f'--input={short}'], check=True, capture_output=True)
    before = {name: (folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.json')}
    temporary = folder / 'train.bin.tmp'

    for number, code in [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]:
        temporary.unlink(missing_ok=True)
        running = subprocess.Popen([*command, f'--input={long}'], start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, encoding='utf-8')
        try:
            wait_until(lambda: temporary.exists() and temporary.stat().st_size > 0)
            assert len(processes_of(running.pid)) >= 3, 'the run and two workers'
            if number == signal.SIGKILL:
                running.kill()  # the run alone: its workers must notice
            else:
                os.killpg(running.pid, number)  # the whole group, as a terminal does
            wait_until(partial(is_gone, running.pid))
        finally:
            if not is_gone(running.pid):
                os.killpg(running.pid, signal.SIGKILL)
        _, error = running.communicate()
        assert running.returncode == code
        assert {name: (folder / name).read_bytes() for name in before} == before
        if number == signal.SIGINT:
            assert error == 'interrupted\n'
            assert not temporary.exists()

    subprocess.run([*command, f'--input={short}'], check=True, capture_output=True)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in folder.iterdir() if path.suffix == '.tmp') == []


@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_script_ends_with_the_documented_codes_and_no_traceback(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / 'data/text/prepare.py')]
    for arguments, code, words in [(['--help'], 0, '--input'), ([], 2, '--input=PATH'), (['--inptu=x'], 2, 'input'),
                                   ([f'--input={tmp_path}/nowhere'], 3, 'nowhere')]:
        answer = subprocess.run([*script, *arguments], capture_output=True, encoding='utf-8', check=False)
        assert answer.returncode == code
        assert words in answer.stdout + answer.stderr
        assert 'Traceback' not in answer.stderr and len(answer.stderr.splitlines()) <= 3


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the host, with its port, of a web server for this folder."""
    monkeypatch.setattr(SimpleHTTPRequestHandler, 'log_message', lambda *_: None)  # no log of the server in the output
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'127.0.0.1:{server.server_port}'
        server.shutdown()


def test_a_secret_in_the_url_of_an_input_is_neither_printed_nor_kept(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(TEXTS / 'play.txt', tmp_path)
    prepare = load('text', tmp_path / 'data', monkeypatch)
    with serving(tmp_path, monkeypatch) as host:
        args = [f'--input=http://{host}/play.txt?signature=Hush!', '--tokenizer=byte', '--name=play']
        monkeypatch.setattr(sys, 'argv', ['data/text/prepare.py', *args])
        prepare.main(args)
        with pytest.raises(UserError, match=r'http://\*\*\*@.* was given with a password') as refused:
            prepare.main([f'--input=http://me:Hush!@{host}/play.txt', '--tokenizer=byte'])
    said = ''.join([*capsys.readouterr(), str(refused.value)])
    assert f'http://{host}/play.txt?***' in said
    assert 'created_by' in (tmp_path / 'data/play/meta.json').read_text(encoding='utf-8')
    everything = said.encode() + b''.join(path.read_bytes() for path in tmp_path.rglob('*') if path.is_file())
    assert b'Hush!' not in everything


@pytest.mark.parametrize('name', sorted(path.parent.name for path in ROOT.glob('data/*/prepare.py')))
@pytest.mark.usefixtures('gpt2_stand_in')
def test_every_corpus_is_written_where_to_dir_says_and_nothing_elsewhere(
        name: str, play: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    """Downloads from a URL are kept in the same folder."""
    prepare, folder = load(name, tmp_path / 'data', monkeypatch), tmp_path / "my [1] corpora/it's here"
    (tmp_path / 'rows.jsonl').write_text('{"text": "to be or not to be"}\n' * 3000, encoding='utf-8')
    kind = play.name if 'shakespeare' in name else 'rows.jsonl'
    given = [] if name == 'stdlib' else [f'--input=URL/{kind}']
    given += {'stdlib': ['--tokenizer=byte'], 'fineweb_edu': ['--shard_size=9999'],
              'tinystories': [f'--val_input={tmp_path}/rows.jsonl', '--tokenizer=byte']}.get(name, [])
    before = sorted(tmp_path.iterdir())
    with serving(tmp_path, monkeypatch) as host:
        prepare.main([*(argument.replace('URL', f'http://{host}') for argument in given), f'--to_dir={folder}'])
    assert sorted(tmp_path.iterdir()) == sorted([*before, folder.parent])
    assert {path.name for path in folder.iterdir()} >= {'meta.json', 'checksums.npz', *(
        [] if name == 'stdlib' else [f'input-{kind}'])}
    assert read_split(folder, 'train') and read_split(folder, 'val')
    train = next(line for line in capsys.readouterr().out.partition('next:\n')[2].splitlines())
    assert f'--dataset={folder}' in shlex.split(train)


@pytest.mark.parametrize(('argument', 'message'), [
    ('--to_dir=s3://bucket/corpus', '--to_dir=s3://bucket/corpus is not a folder on this machine'),
    ('--to_dir=data/stdlib', '--to_dir=data/stdlib: that folder is for the corpus of data/stdlib/prepare.py: give an'),
])
def test_a_folder_that_cannot_be_the_corpus_is_refused_before_any_text_is_read(
        argument: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        importlib.import_module('data.text.prepare').main(['--input=nowhere', argument])
    assert str(caught.value).startswith(message) and caught.value.code == COMMAND


def test_a_name_that_decides_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    main = load('text', tmp_path / 'data', monkeypatch).main
    given = [f'--input={TEXTS}/play.txt', '--tokenizer=byte', f'--to_dir={tmp_path}/it']
    for more, count in (([], 0), (['--name=mytext'], 1)):
        main([*given, *more])
        assert capsys.readouterr().out.count('name has no effect: to_dir decides\n') == count
    assert [path.name for path in tmp_path.iterdir()] == ['it']


@pytest.mark.parametrize('name', ['text', 'mytext', 'a.b_c-2', 'Bücher', '日本語', 'हिन्दी', 'ไทย', 'com10'])
def test_a_corpus_may_have_a_name_of_any_script(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text/prepare.py').touch()
    load('text', tmp_path, monkeypatch).main([f'--input={TEXTS}/play.txt', '--tokenizer=byte', f'--name={name}'])
    assert read_meta(tmp_path / name)['vocab_size'] == 256


@pytest.mark.parametrize('name', ['..', 'a/b', 'shakespeare'])
def test_a_corpus_of_shards_is_named_by_the_same_rules(name: str) -> None:
    with pytest.raises(UserError, match=f'--name={name}.*folder'):
        importlib.import_module('data.fineweb_edu.prepare').main([f'--name={name}', '--input=nowhere'])
