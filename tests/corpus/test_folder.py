"""Token files and the order of windows: each window once in an epoch, the same for any number of processes, and no
damage that goes unnoticed."""
import hashlib
import json
import math
import pickle
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from model import GPTConfig
from plaingpt import errors
from plaingpt.chance import draw
from plaingpt.corpus import tokenizer
from plaingpt.corpus.batches import AHEAD, Part, Windows, parts_of, read_ahead, read_batch
from plaingpt.corpus.folder import data_folder, dataset_of, fingerprint, open_split, read_meta
from plaingpt.corpus.order import Order, fixed_starts, shuffle
from plaingpt.corpus.token_files import TokenFile
from plaingpt.errors import DATA, UserError
from plaingpt.machines import processes
from plaingpt.paths import CORPORA
from tests import comparing
from tests.waiting import wait_until

SMALL = GPTConfig(block_size=16, vocab_size=1 << 16, n_layer=1, n_head=1, n_embd=8)


def counted(path: Path, n: int, dtype: str = '<u2') -> TokenFile:
    """Return a file in which each token is its own position, so that a window shows which part of the file it is."""
    np.arange(n, dtype=dtype).tofile(path)
    return TokenFile(path)


def process(rank: int, world_size: int) -> processes.Process:
    return processes.Process(rank, world_size, torch.device('cpu'), '')


refused = partial(comparing.refused, code=DATA)  # an error in the data exits with 3


# ------------------------------------------------------------------------------------------------
# The order


@pytest.mark.parametrize(('n_tokens', 'T'), [(17, 16), (31, 16), (32, 16), (33, 16), (1000, 16), (1007, 16), (1008, 16),
                                             (2, 1), (97, 1), (5000, 37), (100, 99)])
def test_each_epoch_reads_each_of_its_windows_once_and_nearly_all_tokens(n_tokens: int, T: int) -> None:
    order = Order(n_tokens, T, seed=3)
    offsets = set()
    for epoch in range(20):
        starts = order.starts(epoch * order.epoch, order.epoch)
        assert sorted(starts % T) == [starts[0] % T] * order.epoch, 'all at the same offset within one epoch'
        first = starts.min()
        assert sorted(starts) == list(range(first, first + order.epoch * T, T)), 'side by side, each once'
        assert 0 <= first < T or order.epoch == 1
        assert first >= 0 and starts.max() + T + 1 <= n_tokens, 'x and y lie inside the corpus'
        assert n_tokens - (order.epoch * T + 1) < 2 * T, 'few tokens are left out'
        offsets.add(int(first))
    possible = min(T, n_tokens - order.epoch * T)
    assert len(offsets) > min(possible, 20) / 2, 'epochs differ in their offset'


def test_epochs_and_seeds_differ_in_their_order() -> None:
    order = Order(10_000, 16, seed=1)
    epochs = [tuple(order.starts(e * order.epoch, order.epoch) // 16) for e in range(4)]
    assert len(set(epochs)) == 4
    other = Order(10_000, 16, seed=2)
    assert tuple(other.starts(0, other.epoch) // 16) != epochs[0]
    assert not np.array_equal(order.starts(0, 50), np.sort(order.starts(0, 50)))


def test_what_a_step_reads_does_not_depend_on_what_was_read_before() -> None:
    order = Order(3000, 16, seed=5)
    whole = order.starts(0, 1000)  # more than five epochs
    for first, count in [(0, 1), (183, 7), (184, 5), (180, 200), (999, 1), (37, 0)]:
        assert np.array_equal(Order(3000, 16, seed=5).starts(first, count), whole[first:first + count])
    one_at_a_time = [order.starts(i, 1)[0] for i in reversed(range(1000))][::-1]
    assert np.array_equal(one_at_a_time, whole)


def test_the_order_stays_what_it_was_in_the_first_release() -> None:
    """A run that began with an older version continues with the windows that it has not read."""
    order = Order(10_000, 16, seed=1337)
    assert order.starts(order.epoch - 4, 8).tolist() == [4401, 5665, 193, 1169, 1461, 6325, 4389, 2741]


def test_windows_far_into_a_corpus_of_a_trillion_tokens_cost_no_memory() -> None:
    order = Order(10**12, 1024, seed=1)
    starts = order.starts(10**9, 1000)
    assert len(set(starts.tolist())) == 1000
    assert starts.min() >= 0 and starts.max() + 1025 <= 10**12
    assert starts.max() - starts.min() > 9 * 10**11, 'spread over all of it'


@pytest.mark.parametrize('n', [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4095, 4096, 4097, 65537])
def test_the_shuffle_is_a_permutation(n: int) -> None:
    index = np.arange(n)
    for key in (0, 1, 2**62):
        assert np.array_equal(np.sort(shuffle(index, n, key)), index)
    if n > 8:
        assert not np.array_equal(shuffle(index, n, 1), index)
        assert not np.array_equal(shuffle(index, n, 1), shuffle(index, n, 2))
    part = index[n // 3:n // 2]
    assert np.array_equal(shuffle(part, n, 1), shuffle(index, n, 1)[n // 3:n // 2])


@pytest.mark.parametrize('n', [2, 3, 5, 16, 37])
def test_over_many_keys_the_shuffle_puts_each_index_everywhere_equally_often(n: int) -> None:
    keys, index = 600, np.arange(n)
    counts, neighbours = np.zeros((n, n)), np.zeros(keys)
    for key in range(keys):
        place = shuffle(index, n, draw(key))
        counts[index, place] += 1
        neighbours[key] = np.count_nonzero(np.diff(place) == 1)
    expected = keys / n
    freedom = (n - 1) ** 2  # rows and columns each have a fixed sum
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 6 * math.sqrt(2 * freedom), 'within six standard deviations'
    expected = (n - 1) / n  # pairs that stay adjacent in a random order
    assert abs(neighbours.mean() - expected) < 6 * math.sqrt(1 / keys)


# ------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize(('n_windows', 'batch_size'), [(12, 2), (12, 4), (7, 2), (1, 4), (5, 3)])
def test_the_windows_of_one_two_and_three_processes_are_the_same_global_batch(tmp_path: Path, n_windows: int,
                                                                              batch_size: int) -> None:
    corpus, T = counted(tmp_path / 'train.bin', 5000), SMALL.block_size
    order = Order(len(corpus), T, seed=1)
    for step in (0, 3, 50):
        starts = order.starts(step * n_windows, n_windows)
        for world_size in (1, 2, 3):
            ranks = [list(parts_of(corpus, starts, batch_size, SMALL, process(rank, world_size)))
                     for rank in range(world_size)]
            rounds = {len(parts) for parts in ranks}
            assert rounds == {math.ceil(n_windows / (batch_size * world_size))}, 'equally many for each process'
            every = sorted((part for parts in ranks for part in parts), key=lambda part: part.number)
            assert [part.number for part in every] == list(range(len(every)))
            assert {tuple(z.shape) for part in every for z in (part.x, part.y)} == {(batch_size, T)}

            x, y = torch.cat([part.x for part in every]), torch.cat([part.y for part in every])
            assert x[:n_windows, 0].tolist() == starts.tolist()
            assert torch.equal(x[:n_windows] + 1, y[:n_windows]), 'y is x, one token later'
            assert (y[n_windows:] == -1).all(), 'missing windows have no targets'
            assert (x >= 0).all()
            assert sum(part.share for part in every) == pytest.approx(1)
            for part in every:
                assert part.share == pytest.approx((part.y[:, 0] >= 0).sum().item() / n_windows)


def test_micro_batches_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """Dropout is seeded by the number of the micro-batch, so the same number must hold the same windows."""
    corpus = counted(tmp_path / 'train.bin', 5000)
    starts = Order(len(corpus), 16, seed=1).starts(0, 10)
    one = {part.number: part for part in parts_of(corpus, starts, 2, SMALL, process(0, 1))}
    for world_size in (2, 3):
        for rank in range(world_size):
            for part in parts_of(corpus, starts, 2, SMALL, process(rank, world_size)):
                assert part.number >= 5 or torch.equal(part.x, one[part.number].x)


def test_a_thread_reads_ahead_a_little_in_order_and_an_error_is_raised_in_its_place() -> None:
    read: list[int] = []

    def parts() -> Iterator[Part]:
        for number in range(9):
            if number == 7:
                raise UserError('this one is damaged')
            assert threading.current_thread().name.startswith('reader')
            read.append(number)
            yield Part(number, False, 0.1, torch.empty(0), torch.empty(0))

    def has_read(count: int) -> bool:
        return len(read) == count

    ready = read_ahead(parts(), process(0, 1))
    assert read == [], 'nothing is read before a run begins'
    for number in range(7):
        assert next(ready).number == number
        wait_until(partial(has_read, min(7, number + 1 + AHEAD)), 'the reader, which is ahead')
    with pytest.raises(UserError, match='damaged'):
        next(ready)

    stopped = read_ahead(parts(), process(0, 1))
    assert next(stopped).number == 0
    stopped.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('reader')], 'the thread has ended'


@pytest.mark.parametrize(('device', 'number'), [('cuda', 0), ('cuda:2', 2)])
def test_the_thread_that_reads_ahead_uses_the_gpu_of_its_process(device: str, number: int,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: what PyTorch would be told is noted."""
    chosen: list[int] = []
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append, raising=False)
    part = Part(0, True, 1.0, torch.empty(0), torch.empty(0))
    assert list(read_ahead(iter([part]), processes.Process(0, 1, torch.device(device), ''))) == [part]
    assert chosen == [number]


def test_on_a_mac_no_second_thread_uses_its_gpu() -> None:
    def threads() -> Iterator[Part]:
        yield Part(threading.get_ident(), True, 1.0, torch.empty(0), torch.empty(0))

    [part] = read_ahead(threads(), processes.Process(0, 1, torch.device('mps'), ''))
    assert part.number == threading.get_ident()


# ------------------------------------------------------------------------------------------------
# A torch Dataset


def test_text_becomes_windows_in_which_y_is_x_one_token_later() -> None:
    text = 'I walked to the grocery store to get bread'
    byte = tokenizer.build('byte', list, eot=False)
    windows = Windows(text, 36, byte)
    x, y = windows[0]
    assert (byte.decode(x.tolist()), byte.decode(y.tolist())) == (text[:36], text[1:37])
    assert len(windows) == 1

    words = ['I', 'walked', 'to', 'the', 'grocery', 'store', 'to', 'get', 'bread']
    x, y = Windows([sorted(set(words)).index(word) for word in words], 8)[0]
    assert [sorted(set(words))[i] for i in x] == words[:8]
    assert [sorted(set(words))[i] for i in y] == words[1:]


def test_windows_over_a_file_a_list_an_array_and_text_are_equal(tmp_path: Path, tiny_text: str) -> None:
    vocabulary = tokenizer.build('char', lambda: [tiny_text], eot=False)
    ids = vocabulary.encode(tiny_text)
    path = tmp_path / 'train.bin'
    np.array(ids, dtype='<u2').tofile(path)
    sources = [Windows(tiny_text, 100, vocabulary), *(Windows(source, 100) for source in (
        ids, np.array(ids, np.uint16), path, str(path), TokenFile(path)))]
    assert {len(windows) for windows in sources} == {(len(ids) - 1) // 100}
    for i in (0, 1, len(sources[0]) - 1):
        for windows in sources:
            x, y = windows[i]
            assert x.dtype == y.dtype == torch.int64
            assert (x.tolist(), y.tolist()) == (ids[100 * i:100 * i + 100], ids[100 * i + 1:100 * i + 101])


def test_windows_end_with_the_tokens() -> None:
    windows = Windows(list(range(33)), 16)
    assert len(windows) == 2
    assert len(Windows(list(range(32)), 16)) == 1, 'the last token of x needs one more as its target'
    for i in (2, 100, -1):
        with pytest.raises(IndexError):
            windows[i]
    assert '16 tokens are too few' in refused(Windows, list(range(16)), 16)


def test_a_dataloader_with_workers_reads_each_window_once(tmp_path: Path) -> None:
    windows = Windows(counted(tmp_path / 'train.bin', 10_001), 100)
    seen = []
    for x, y in DataLoader(windows, batch_size=8, shuffle=True, num_workers=2):
        assert torch.equal(x + 1, y)
        seen += x[:, 0].tolist()
    assert sorted(seen) == list(range(0, 10_000, 100))
    assert seen != sorted(seen)


# ------------------------------------------------------------------------------------------------
# Formats


def test_a_bare_nanogpt_corpus_is_read(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 50257, 3000).astype(np.uint16)
    for split in ('train', 'val'):
        ids.tofile(tmp_path / f'{split}.bin')  # as nanoGPT's prepare.py writes GPT-2's tokens, without a meta file
    assert read_meta(tmp_path)['tokenizer'] == {'name': 'gpt2'}
    corpus = open_split(tmp_path, 'train', 16, 50304)
    assert np.array_equal(corpus.read(5, 100), ids[5:105])


def test_nanogpts_way_to_read_finds_the_windows_of_a_corpus_file(tiny_dataset: Path, tiny_text: str) -> None:
    data = np.memmap(tiny_dataset / 'train.bin', dtype=np.uint16, mode='r')
    corpus = open_split(tiny_dataset, 'train', 16, 128)
    assert len(data) == len(corpus)
    starts = Order(len(corpus), 16, 1).starts(0, 5)
    x, y = read_batch(corpus, starts, 16, 5, 128)
    for row, i in enumerate(starts.tolist()):
        assert np.array_equal(x[row], data[i:i + 16].astype(np.int64))
        assert np.array_equal(y[row], data[i + 1:i + 17].astype(np.int64))
    vocabulary = tokenizer.from_state(read_meta(tiny_dataset)['tokenizer'])
    assert vocabulary.decode(x[0].tolist()) in tiny_text


def test_large_vocabularies_are_read_as_uint32_in_little_endian(tmp_path: Path) -> None:
    (tmp_path / 'train.bin').write_bytes(b'\1\0\1\0\xff\0\0\0\0\0\2\0')
    assert TokenFile(tmp_path / 'train.bin', 'uint32').read(0, 3).tolist() == [65537, 255, 131072]
    (tmp_path / 'train.bin').write_bytes(b'\x01\x02')
    assert TokenFile(tmp_path / 'train.bin').read(0, 1).tolist() == [513]


def test_a_corpus_is_a_name_in_data_or_any_folder(tiny_dataset: Path) -> None:
    assert data_folder('shakespeare') == comparing.ROOT / 'data/shakespeare'
    assert data_folder(str(tiny_dataset)) == tiny_dataset


def test_a_folder_is_called_by_the_shortest_name_that_means_it_and_no_corpus_in_data(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('stdlib', 'book', 'a/b'):
        (tmp_path / name).mkdir(parents=True)
    for folder, name in ((CORPORA / 'stdlib', 'stdlib'), (CORPORA / 'none', 'none'), (Path('book'), 'book'),
                         (tmp_path / 'book', 'book'), (Path('a/b'), 'a/b'), (Path('stdlib'), f'{tmp_path}/stdlib'),
                         (tmp_path / 'a/b', f'{tmp_path}/a/b'), (Path(), str(tmp_path))):
        assert dataset_of(folder) == name
        assert data_folder(name).absolute() == folder.absolute()


@pytest.mark.parametrize(('n_tokens', 'T', 'count'), [(1000, 16, 10), (1000, 16, 62), (1000, 16, 100), (17, 16, 5)])
def test_evaluation_reads_windows_that_are_spread_evenly_and_never_one_twice(n_tokens: int, T: int, count: int) -> None:
    starts = fixed_starts(n_tokens, T, count)
    assert len(starts) == min(count, (n_tokens - 1) // T), 'at most the whole split'
    assert np.array_equal(starts, fixed_starts(n_tokens, T, count))
    assert (starts % T == 0).all()
    assert starts[-1] + T + 1 <= n_tokens
    gaps = np.diff(starts) // T
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    assert starts[0] == 0
    assert starts[-1] >= n_tokens * (1 - 1 / len(starts)) - 2 * T, 'up to the end of the split'


# ------------------------------------------------------------------------------------------------
# Damage


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    """Return a corpus that a test may damage."""
    return Path(shutil.copytree(tiny_dataset, tmp_path / 'corpus'))


def test_a_file_of_odd_size_is_refused_with_its_size(copy: Path) -> None:
    path = copy / 'train.bin'
    path.write_bytes(path.read_bytes()[:-1])
    message = refused(open_split, copy, 'train', 16, 128)
    assert str(path) in message
    assert f'{path.stat().st_size} bytes' in message


def test_an_empty_file_is_refused(copy: Path) -> None:
    (copy / 'val.bin').write_bytes(b'')
    message = refused(open_split, copy, 'val', 16, 128)
    assert f'{copy}/val.bin has 0 bytes' in message


def test_a_file_of_another_size_than_it_was_made_with_is_refused(copy: Path) -> None:
    path, n = copy / 'train.bin', (copy / 'train.bin').stat().st_size // 2
    path.write_bytes(path.read_bytes()[:-10])
    message = refused(open_split, copy, 'train', 16, 128)
    assert f'{path} has {n - 5} tokens, and meta.json says {n}' in message
    assert f'rebuild the corpus: {errors.python()} data/' in message


@pytest.mark.parametrize('position', [0, 4095, -4096, -1])
def test_other_bytes_at_the_head_or_the_tail_are_noticed(copy: Path, position: int) -> None:
    path = copy / 'train.bin'
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    assert f'{path} is not the file that meta.json describes' in refused(open_split, copy, 'train', 16, 128)


def test_tokens_that_the_model_does_not_know_are_refused_at_the_start(copy: Path) -> None:
    largest = json.loads((copy / 'meta.json').read_text(encoding='utf-8'))['splits']['train']['largest_id']
    open_split(copy, 'train', 16, largest + 1)
    message = refused(open_split, copy, 'train', 16, largest)
    assert f'{copy}/train.bin holds token {largest}, and the model knows only 0 to {largest - 1}' in message
    assert f'--vocab_size={largest + 1}' in message


def test_a_token_that_the_model_does_not_know_is_refused_in_the_batch_that_holds_it(tmp_path: Path) -> None:
    corpus = counted(tmp_path / 'train.bin', 200)
    read_batch(corpus, np.array([0, 83]), 16, 2, 100)
    message = refused(read_batch, corpus, np.array([0, 84]), 16, 2, 100)
    assert f'{corpus.path} holds token 100, and the model knows only 0 to 99' in message


def test_a_corpus_shorter_than_a_block_is_refused_with_the_longest_block_that_fits(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        counted(tmp_path / f'{split}.bin', 50)
    message = refused(open_split, tmp_path, 'val', 50, 128)
    assert f'{tmp_path}/val.bin has 50 tokens' in message
    assert '--block_size=49' in message
    assert len(open_split(tmp_path, 'val', 49, 128)) == 50


def test_a_file_that_shrinks_while_it_is_read_ends_in_a_message(tmp_path: Path) -> None:
    corpus = counted(tmp_path / 'train.bin', 30_000)
    starts = np.array([20_000])
    read_batch(corpus, starts, 16, 1, 1 << 16)
    with open(corpus.path, 'r+b') as file:
        file.truncate(2 * 20_010)
    message = refused(read_batch, corpus, starts, 16, 1, 1 << 16)
    assert message == f'{corpus.path} has shrunk: it had 30000 tokens, and 20010 are left'
    with open(corpus.path, 'r+b') as file:
        file.truncate(0)
    assert f'{corpus.path} has shrunk: it had 30000 tokens' in refused(read_batch, corpus, starts, 16, 1, 1 << 16)
    corpus.path.unlink()
    assert str(corpus.path) in refused(read_batch, corpus, starts, 16, 1, 1 << 16)


def test_a_corpus_that_is_not_prepared_names_the_command_that_does_it(tmp_path: Path) -> None:
    for place, name, command in [
            (CORPORA, 'no-corpus', 'data/text/prepare.py --input=YOUR_TEXT --name=no-corpus'),
            (CORPORA, 'my corpus', f"data/text/prepare.py --input=YOUR_TEXT --to_dir='{CORPORA}/my corpus'"),
            (CORPORA, 'text', 'data/text/prepare.py --input=YOUR_TEXT'),
            (tmp_path, 'openwebtext', f'data/openwebtext/prepare.py --to_dir={tmp_path}/openwebtext'),
            (tmp_path, 'stdlib', f'data/stdlib/prepare.py --to_dir={tmp_path}/stdlib'),
            (tmp_path, "it's text", f"""data/text/prepare.py --input=YOUR_TEXT --to_dir='{tmp_path}/it'"'"'s text'""")]:
        assert refused(read_meta, place / name).endswith(f'first run: {errors.python()} {command}')
    for pattern in ('no*.bin', 'no[1]', '*/*.bin'):
        assert refused(read_meta, tmp_path / pattern).endswith('\ngive a folder, or a glob of .bin or .npy')


def test_a_meta_pkl_is_refused_and_never_opened(copy: Path, tmp_path: Path) -> None:
    (copy / 'meta.json').unlink()
    witness = tmp_path / 'witness'

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    (copy / 'meta.pkl').write_bytes(pickle.dumps(Evil()))
    message = refused(read_meta, copy)
    assert f'{copy}/meta.pkl is a pickle' in message
    assert 'python data/text/prepare.py' in message
    assert not witness.exists()
    pickle.loads((copy / 'meta.pkl').read_bytes())
    assert witness.exists(), 'the pickle would have run'


def without(meta: dict[str, Any], *path: str) -> dict[str, Any]:
    """Return a copy in which one entry is missing."""
    name, *rest = path
    return {key: without(value, *rest) if key == name else value for key, value in meta.items() if rest or key != name}


def damaged(meta: dict[str, Any]) -> Iterator[str]:
    """Yield meta.json as a torn write, another program or a careless user may leave it."""
    text = json.dumps(meta)
    yield from ('', '\0' * len(text), text[:len(text) // 2], '[]', '3', 'null', '\ufeff{')
    for path in ('tokenizer', 'vocab_size', 'dtype', 'splits', 'tokenizer name', 'splits train head'):
        yield json.dumps(without(meta, *path.split()))
    for name, value in [('dtype', 'text'), ('dtype', 'float32'), ('dtype', 3), ('vocab_size', '65'),
                        ('vocab_size', None), ('tokenizer', 'gpt2'), ('splits', []), ('splits', {'train': []})]:
        yield json.dumps(meta | {name: value})
    for name, value in [('tokens', 'many'), ('tokens', True), ('largest_id', -1), ('head', None), ('sha256', 7)]:
        yield json.dumps(meta | {'splits': {'train': meta['splits']['train'] | {name: value}}})
    yield '{"a": ' + '[' * 200_000
    yield json.dumps(meta | {'vocab_size': 128}).replace('128', '1' * 5000)


def test_a_damaged_meta_json_is_refused_by_name(copy: Path) -> None:
    path = copy / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    for text in damaged(meta):
        path.write_text(text, encoding='utf-8')
        assert 'meta.json is damaged' in refused(open_split, copy, 'train', 16, 128), text[:200]
    path.write_bytes(b'\xff\xfe' * 20)
    assert str(path) in refused(open_split, copy, 'train', 16, 128)


# ------------------------------------------------------------------------------------------------
# Memory


def anonymous_memory() -> int:
    """Return the bytes of this process that no file backs."""
    status = Path('/proc/self/status').read_text(encoding='utf-8')
    return 1024 * int(next(line for line in status.splitlines() if line.startswith('RssAnon')).split()[1])


def all_memory() -> int:
    """Return the bytes of this process in main memory: a memory map would count here."""
    status = Path('/proc/self/status').read_text(encoding='utf-8')
    return 1024 * int(next(line for line in status.splitlines() if line.startswith('VmRSS')).split()[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='asks Linux for the memory that is in use')
def test_memory_stays_flat_over_ten_thousand_batches(tmp_path: Path) -> None:
    path = tmp_path / 'train.bin'
    np.zeros(20_000_000, dtype='<u2').tofile(path)  # 40 MB
    corpus = TokenFile(path)
    order = Order(len(corpus), 1024, seed=1)  # 19,530 windows

    def read(steps: range) -> None:
        for step in steps:
            read_batch(corpus, order.starts(2 * step, 2), 1024, 2, 100)

    read(range(500))
    before = anonymous_memory(), all_memory()
    read(range(500, 10_500))
    assert anonymous_memory() - before[0] < 5e6
    assert all_memory() - before[1] < 5e6, 'a memory map would have grown by the size of the file'


def test_the_fingerprint_tells_two_corpora_apart(tmp_path: Path) -> None:
    first, second = counted(tmp_path / 'a.bin', 5000), counted(tmp_path / 'b.bin', 5000)
    bare: dict[str, Any] = {'splits': {}}
    assert fingerprint(first, bare) == fingerprint(second, bare)
    data = first.path.read_bytes()
    pieces = b''.join(data[len(data) * i // 64:][:4096] for i in range(64))
    assert fingerprint(first, bare) == {
        'tokens': 5000, 'head': hashlib.sha256(data[:4096]).hexdigest(),
        'tail': hashlib.sha256(data[-4096:]).hexdigest(), 'sha256': '', 'sample': hashlib.sha256(pieces).hexdigest()}
    second.path.write_bytes(data[:-1] + b'\0')
    assert fingerprint(first, bare) != fingerprint(second, bare)
    assert fingerprint(first, bare) != fingerprint(counted(tmp_path / 'c.bin', 4999), bare)
    prepared = {'splits': {'a': {'sha256': 'one hash'}}}
    assert fingerprint(first, prepared) != fingerprint(first, bare), 'the hash covers the whole file'


def test_an_endless_order_continues_past_its_epochs() -> None:
    order = Order(100, 16, seed=1)  # five windows
    numbers = (order.starts(i, 1)[0] for i in range(10**6, 10**6 + 100))
    assert len(set(islice(numbers, 100))) > 20
