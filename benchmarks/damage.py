"""
What happens if a file is damaged? One of each kind that this project reads is damaged, at random, again and again.

    python benchmarks/damage.py                        each kind 200 times
    python benchmarks/damage.py --times=20 --seed=7    less often, and in other ways
    python benchmarks/damage.py --kinds=parquet        the kinds whose names have that in them

Bytes are changed, left out, repeated or cut off; and of names and values (marked {}), some are left out, or changed to
values of other types and sizes. The file must then be refused in at most three lines, with the right exit code, or read
with the same results; other results are allowed only if it has no checksum. Exit code 1 says what broke these rules.
"""
import bz2
import copy
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import configurator
import sample
from model import GPT, GPTConfig
from plaingpt import tasks
from plaingpt.corpus import documents, shards, tokenise, tokenizer
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.folder import open_split, read_meta
from plaingpt.corpus.token_files import make_header
from plaingpt.errors import CHECK_FAILED, CHECKPOINT, COMMAND, DATA, NOT_FINITE, UserError, run
from plaingpt.formats import huggingface, llmc, others
from plaingpt.formats.exported import Exported
from plaingpt.init_from import learned_tokenizer, open_model, shared_tokenizer
from plaingpt.run import checkpoint, log, plot, records
from tests.comparing import leaves

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
times: int = 200  # that a file of each kind is damaged
kinds: str = ''  # part of the names of the kinds to try; '' tries all
seed: int = 1
# ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
T = 16  # tokens in a window
PATIENCE = 60  # seconds for what takes milliseconds
DEEP, LONG = '<deep>', '<long>'  # in place of what json.dumps cannot write
ODD: list[Any] = [None, True, False, -1, 0, 3, 0.5, 10**9, 10**20, 1e308, float('nan'), '', 'x', '../x', '\udfff',
                  '\x1b[31m', '\n' * 9, [], {}, [1], {'a': 1}, DEEP, LONG]
ODD_TENSORS = [torch.ones(2), torch.ones(()), torch.tensor(float('nan')), torch.eye(2).to_sparse(),
               torch.ones(3, dtype=torch.int8), torch.ones(2, device='meta'), torch.ones(2, dtype=torch.complex64)]


class Kind(NamedTuple):
    """A kind of file: an example of it, and how it is used."""

    name: str
    path: Path
    read: Callable[[Path], Any]  # returns all that is read from the file
    codes: set[int]  # with which it may be refused
    has_checksum: bool = False  # so that it never gives other results
    load: Callable[[bytes], Any] | None = None  # returns its names and values
    dump: Callable[[Any], bytes] | None = None


class Hangs(BaseException):
    """The error of a read that takes too long. No handler of ordinary errors may take it for damage."""


# ------------------------------------------------------------------------------------------------
# Damage


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return other bytes: most often a bit is flipped, else some bytes are changed, left out or repeated, or it ends
    early."""
    at, length = chance.randrange(len(data)), chance.randint(1, max(1, len(data) // 8))
    part, rest = data[at:at + length], data[at + length:]
    return chance.choice([
        *[data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1:]] * 4,
        data[:at],
        data[:at] + bytes(len(part)) + rest,
        data[:at] + chance.randbytes(len(part)) + rest,
        data[:at] + rest,
        data[:at] + part + part + rest])


def changed(tree: Any, chance: random.Random) -> Any:
    """Return the same names and values, but for one that is left out, renamed, or replaced by an odd one."""
    if not (isinstance(tree, dict | list) and tree) or chance.random() < 0.1:
        return chance.choice(ODD if not isinstance(tree, Tensor) else [*ODD, *ODD_TENSORS * 4, -tree / 0])
    new = copy.copy(tree)
    key = chance.choice(list(tree)) if isinstance(tree, dict) else chance.randrange(len(tree))
    if chance.random() < 0.8:
        new[key] = changed(tree[key], chance)
    elif isinstance(new, dict) and chance.random() < 0.5:
        new[chance.choice(['x', 3, ''])] = new.pop(key)
    else:
        del new[key]
    return new


def as_json(tree: Any) -> bytes:
    text = json.dumps(tree, skipkeys=True)
    return text.replace(json.dumps(DEEP), '[' * 100_000).replace(json.dumps(LONG), '1' * 5000).encode()


def of_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def as_lines(rows: list[Any]) -> bytes:
    return b'\n'.join(as_json(row) for row in rows) if isinstance(rows, list) else as_json(rows)


def of_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def as_torch(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------
# Use


def of_model(path: Path, **answers: Any) -> Any:
    """Return all that the stages get from a model: its shape, weights, tokenizer, the facts of its run, and a text."""
    model, state = open_model(str(path), answers=answers)
    known = [state.get(name) for name in ('iter_num', 'best', 'config', 'data')]
    if state.get('tokenizer'):
        vocabulary = learned_tokenizer(state, model.config.vocab_size, Path('nowhere'))
        vocabulary.encode(vocabulary.decode(range(vocabulary.n_vocab)))
        known += [vocabulary.pieces, vocabulary.state()]
    idx = torch.arange(min(T, model.config.vocab_size, model.config.block_size))[None]
    return [vars(model.config), model.state_dict(), known, model.generate(idx, 3, seed=1)]


def of_corpus(path: Path, folder: Path | None = None) -> Any:
    """Return all tokens and windows, and the tokenizer."""
    folder = folder or path.parent
    meta = read_meta(folder)
    found: list[Any] = [meta['vocab_size']]
    for split in ('train', 'val'):
        corpus = open_split(folder, split, T, meta['vocab_size'])
        starts = np.arange(0, len(corpus) - T, T)
        found += [corpus.read(0, len(corpus)).tobytes(), read_batch(corpus, starts, T, len(starts), meta['vocab_size'])]
    if meta['splits']:
        vocabulary = shared_tokenizer(meta['tokenizer'], folder)
        found += [vocabulary and vocabulary.state()]
    return found


def of_note(path: Path) -> Any:
    note = shards.find_note(path.parent, {})
    return note and [note['splits'], note['bytes'], note['documents'], *(shards.Place(**note['next'])
                                                                         if 'unfinished' in note else ())]


def of_texts(path: Path) -> list[str]:
    return list(documents.read_documents(list(documents.find_pieces(str(path)))))


def of_questions(path: Path) -> Any:
    return list(tasks.read(path.stem, str(path)))


def of_log(path: Path) -> Any:
    log.drop_rows(path, 1000)
    return records.read_columns(path, plot.COLUMNS)


def of_samples(path: Path) -> bytes:
    log.drop_samples(path, 10)
    return path.read_bytes()


def of_config(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location('train_again', ROOT / 'train.py')
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[script.__name__] = script
    spec.loader.exec_module(script)
    return configurator.configure(script, [str(path)])[0]


# ------------------------------------------------------------------------------------------------
# One file of each kind


def write_models(folder: Path, vocabulary: tokenizer.Tokenizer) -> Iterator[Kind]:
    """Write checkpoints of this project and of nanoGPT, and the files of other projects."""
    model, codes = GPT(GPTConfig(T, vocabulary.n_vocab, 2, 2, 16)), {CHECKPOINT, NOT_FINITE}
    optimizer = torch.optim.AdamW(model.parameters())
    model.lm_head.weight.sum().backward()
    optimizer.step()
    nanogpts = {
        'model': model.state_dict(), 'model_args': checkpoint.model_args(model.config), 'iter_num': 7,
        'optimizer': optimizer.state_dict(), 'best_val_loss': torch.tensor(2.5), 'config': {'dataset': 'novels'}}
    mark = {'tokens': 9, 'sha256': '', 'head': '', 'tail': ''}
    state = others.complete(nanogpts | {
        'config': {'dataset': 'novels', 'batch_size': 4, **checkpoint.shape_of(model.config)},
        'best': {'loss': [2.5, 7], 'accuracy': [0.5, 6]}, 'best_val_loss': 2.5, 'tokenizer': vocabulary.state(),
        'data': {'train': mark, 'val': mark}})
    checkpoint.write(folder, state, 2, False)
    own = Kind('ckpt.pt', folder / 'ckpt.pt', of_model, codes, True)
    yield own
    for name, tree in (('ckpt.pt', state), ("nanoGPT's ckpt.pt", nanogpts)):
        path = folder / f'{name.split()[-1]}.{len(name)}.pt'
        path.write_bytes(as_torch(tree))
        yield Kind(f'{name} {{}}', path, of_model, codes, load=of_torch, dump=as_torch)
    torch.save(model.state_dict(), folder / 'bare.pth')
    yield Kind('bare weights {}', folder / 'bare.pth', of_bare, codes, load=of_torch, dump=as_torch)

    exported = Exported('x', model.config, model.state_dict(), vocabulary, 'float32', state).complete()
    (folder / 'hf').mkdir()
    (folder / 'llmc').mkdir()
    huggingface.write(folder / 'hf', exported)
    files = ('config.json', 'model.safetensors', 'tokenizer.json')
    for name in files:
        yield Kind(f'hf/{name}', folder / 'hf' / name, of_folder, codes)
    for name in ('config.json', 'tokenizer.json'):
        yield Kind(f'hf/{name} {{}}', folder / 'hf' / name, of_folder, codes, load=json.loads, dump=as_json)
    shutil.copytree(folder / 'hf', folder / 'export')
    huggingface.write_origin(folder / 'export', exported, 'hf')
    for name in files:
        yield Kind(f'export/{name}', folder / 'export' / name, of_folder, codes, has_checksum=True)
    llmc.write(folder / 'llmc', exported)
    yield Kind("llm.c's model.bin", Path(shutil.copy(folder / 'llmc/model.bin', folder / 'alone.bin')), of_model, codes)
    huggingface.write_origin(folder / 'llmc', exported, 'llmc')
    yield Kind('export/model.bin', folder / 'llmc/model.bin', of_model, codes, has_checksum=True)
    origin = Kind('plaingpt.json', folder / 'llmc/plaingpt.json', of_neighbour, codes, has_checksum=True)
    yield from (origin, origin._replace(name='plaingpt.json {}', load=json.loads, dump=as_json))
    yield from write_old_folder(folder / 'old', folder / 'hf', codes)


def of_bare(path: Path) -> Any:
    return of_model(path, n_head=2, gelu='tanh')


def of_folder(path: Path) -> Any:
    return of_model(path.parent)


def of_neighbour(path: Path) -> Any:
    return of_model(path.parent / 'model.bin')


def write_old_folder(folder: Path, new: Path, codes: set[int]) -> Iterator[Kind]:
    """Write the same model into two of PyTorch's files, with an index; and its tokenizer into two files."""
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copy(new / 'config.json', folder)
    weights = load_file(new / 'model.safetensors')
    files = {name: f'pytorch_model-{1 + number % 2}-of-2.bin' for number, name in enumerate(weights)}
    for number, file in enumerate(sorted(set(files.values()))):
        parts = {name: weights[name] for name in weights if files[name] == file}
        torch.save(parts, folder / file, _use_new_zipfile_serialization=number == 0)
    (folder / 'pytorch_model.bin.index.json').write_bytes(as_json({'metadata': {}, 'weight_map': files}))
    says = json.loads((new / 'tokenizer.json').read_bytes())['model']
    (folder / 'vocab.json').write_bytes(as_json(says['vocab']))
    merges = [' '.join(pair) for pair in says['merges']]
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]), encoding='utf-8')
    for name in sorted(path.name for path in folder.iterdir()):
        yield Kind(f'old hf/{name}', folder / name, of_folder, codes)
    index = folder / 'pytorch_model.bin.index.json'
    yield Kind(f'old hf/{index.name} {{}}', index, of_folder, codes, load=json.loads, dump=as_json)


def write_corpora(folder: Path, vocabulary: tokenizer.Tokenizer, texts: list[str]) -> Iterator[Kind]:
    """Write a corpus of this project, and the token files of others."""
    parts: list[tokenise.Part] = [texts]
    packer = tokenise.Packer(vocabulary, vocabulary.eot)
    tokenise.write_corpus(folder / 'corpus', packer, parts, tokenise.choose_validation(len(texts), 0.2, 1), 'x', 1)
    own = Kind('meta.json', folder / 'corpus/meta.json', of_corpus, {DATA})
    yield from (own, own._replace(name='meta.json {}', load=json.loads, dump=as_json))
    yield Kind('train.bin', folder / 'corpus/train.bin', of_corpus, {DATA}, has_checksum=True)
    note = Path(shutil.copytree(folder / 'corpus', folder / 'shards')) / 'meta.json'
    note.write_bytes(as_json(json.loads(note.read_bytes()) | {
        'unfinished': True, 'made_with': {}, 'next': shards.START._asdict(), 'documents': 9, 'bytes': 99}))
    yield Kind('meta.json of shards {}', note, of_note, {DATA, COMMAND}, load=json.loads, dump=as_json)
    ids = np.fromfile(folder / 'corpus/train.bin', np.uint16)
    for name, suffix in (('bare', 'bin'), ("llm.c's", 'bin'), ('numpy', 'npy')):
        (folder / name).mkdir()
        for split in ('train', 'val'):
            path = folder / name / f'{split}.{suffix}'
            if suffix == 'npy':
                np.save(path, ids)
            else:
                path.write_bytes((make_header(ids.dtype, len(ids)) if name == "llm.c's" else b'') + ids.tobytes())
        yield Kind(f'{name} tokens', folder / name / f'train.{suffix}', of_corpus, {DATA})


def write_texts(folder: Path, texts: list[str]) -> Iterator[Kind]:
    """Write texts, packed and not, and questions."""
    import pyarrow.parquet

    rows = as_lines([{'id': number, 'text': text} for number, text in enumerate(texts)])
    for suffix, pack in (('.jsonl', bytes), ('.txt', bytes), ('.jsonl.gz', gzip.compress), ('.jsonl.xz', lzma.compress),
                         ('.jsonl.bz2', bz2.compress)):
        path = folder / f'a{suffix}'
        path.write_bytes(pack(rows))
        yield Kind(suffix, path, of_texts, {DATA}, has_checksum=pack is not bytes)
    yield Kind('.jsonl {}', folder / 'a.jsonl', of_texts, {DATA}, load=of_lines, dump=as_lines)
    yield Kind('--start=FILE:', folder / 'a.txt', lambda path: sample.read_prompt(f'FILE:{path}'), {DATA})
    for packing in ('none', 'snappy', 'zstd'):
        for has_checksum in (False, True):
            path = folder / f'{packing}{has_checksum}.parquet'
            pyarrow.parquet.write_table(pyarrow.table({'id': list(range(len(texts))), 'text': texts}), path,
                                        row_group_size=9, compression=packing, write_page_checksum=has_checksum)
            yield Kind(f'.parquet, {packing}{", checksums" if has_checksum else ""}', path, of_texts, {DATA})
    for task in tasks.TASKS:
        path = Path(shutil.copy(ROOT / f'tests/data/{task}.jsonl', folder))
        questions = Kind(f'{task}.jsonl', path, of_questions, {DATA})
        yield from (questions, questions._replace(name=f'{task}.jsonl {{}}', load=of_lines, dump=as_lines))


def write_rest(folder: Path) -> Iterator[Kind]:
    """Write the files that a run leaves, and a config file, which its user writes."""
    rows = as_lines([{'step': step, 'loss': 1 / (1 + step), 'val_loss': None} for step in range(20)])
    (folder / 'metrics.jsonl').write_bytes(rows + b'\n')
    (folder / 'samples.txt').write_text(''.join(f'=== step {step} ===\nx\n' for step in range(20)), encoding='utf-8')
    yield Kind('metrics.jsonl', folder / 'metrics.jsonl', of_log, set())
    yield Kind('metrics.jsonl {}', folder / 'metrics.jsonl', of_log, set(), load=of_lines, dump=as_lines)
    yield Kind('samples.txt', folder / 'samples.txt', of_samples, set())
    shutil.copy(ROOT / 'config/train_stdlib.py', folder / 'config.py')
    yield Kind('config.py', folder / 'config.py', of_config, {COMMAND})


def all_kinds(folder: Path) -> Iterator[Kind]:
    """Write a file of each kind to the folder. Files of the same model or corpus stand beside each other."""
    torch.manual_seed(0)
    texts = [json.loads(line)['text'].replace('\ud83d', '?')[:300]
             for line in (ROOT / 'tests/data/documents.jsonl').read_bytes().splitlines() if line]
    vocabulary = tokenizer.build('bpe:300', lambda: texts, eot=True)
    yield from write_models(folder, vocabulary)
    yield from write_corpora(folder, vocabulary, texts)
    yield from write_texts(folder, texts)
    yield from write_rest(folder)


# ------------------------------------------------------------------------------------------------
# Counting


def mark_of(result: Any) -> str:
    """Return a hash that tells a result from another."""
    mark = hashlib.sha256()
    for name, leaf in leaves(result):
        value = leaf.numpy().tobytes() if isinstance(leaf, Tensor) else leaf
        mark.update(f'{name} {value!r}'.encode('utf-8', 'backslashreplace'))
    return mark.hexdigest()


def hang(signum: int, frame: FrameType | None) -> None:
    raise Hangs


def outcome(kind: Kind, right: str) -> str:
    """Return 'refused', 'same', 'other', or a description of what must not happen."""
    signal.alarm(PATIENCE)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            result = mark_of(kind.read(kind.path))
    except UserError as error:
        is_fine = error.code in kind.codes and str(error).count('\n') < 3
        return 'refused' if is_fine else f'code {error.code}: {error}'
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f'{type(error).__name__}: {str(error)[:300]}'
    finally:
        signal.alarm(0)
    return 'same' if result == right else 'other'


def try_kind(kind: Kind, times: int, seed: int) -> Counter[str]:
    """Return how often each outcome occurred."""
    data, chance = kind.path.read_bytes(), random.Random(seed)
    with redirect_stdout(io.StringIO()):
        right = mark_of(kind.read(kind.path))
    kind.path.write_bytes(data)
    found = Counter[str]()
    for _ in range(times):
        if kind.load and kind.dump:
            kind.path.write_bytes(kind.dump(changed(kind.load(data), chance)))
        else:
            kind.path.write_bytes(damaged(data, chance))
        found[outcome(kind, right)] += 1
    kind.path.write_bytes(data)
    return found


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    signal.signal(signal.SIGALRM, hang)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        print(f'{"kind":36}{"refused":>9}{"same":>9}{"other":>9}')
        with redirect_stdout(io.StringIO()):
            wanted = [kind for kind in all_kinds(Path(folder)) if kinds in kind.name]
        for kind in wanted:
            found = try_kind(kind, times, seed)
            fine = ['refused', 'same', *([] if kind.has_checksum else ['other'])]
            wrong += [f'{kind.name}, {number} times: {what}' for what, number in found.items() if what not in fine]
            print(f'{kind.name:36}{found["refused"]:9}{found["same"]:9}{found["other"]:9}', flush=True)
    if wrong:
        print(*wrong, sep='\n')
        raise UserError(f'{len(wrong)} were neither refused as they should be nor read as before', CHECK_FAILED)


if __name__ == '__main__':
    run(main)
