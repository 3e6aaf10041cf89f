"""The figures of evaluate.py and train.py equal plain arithmetic, written out here from the raw text on: GPT-2
in numpy, byte-pair encoding, the scorings of HellaSwag and LAMBADA, the schedules of the learning rate, AdamW.

No code of the project computes the expected figures. Only those of ASKED import it, to run what is checked, and the
last test holds this file to that.
"""
import ast
import importlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch

DATA = Path(__file__).parent / 'data'
OLD = DATA / 'run_0.1.0'  # by characters, tied, without biases, GELU by tanh: `trained` differs in each of these
Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Rows = list[dict[str, Any]]
Ending = tuple[list[int], list[int], int]  # the ids of a context, the ids of an ending, and the ending's length
ASKED = {'run', 'costs_of_endings'}  # the only functions that import the project
EXACT = 1e-9  # relative tolerance in float64: only the order of additions differs
PEAK, FLOOR = 1e-2, 1e-3  # of the learning rate
# Cases that the questions in data/ lack: endings beyond ASCII, marks in odd places, spaces at the end of a context
ODD: dict[str, dict[str, Any]] = {
    'hellaswag': {'activity_label': 'Cafés', 'ctx_a': 'The waiter brings tea [title]and ', 'ctx_b': 'éclairs [step]',
                  'ctx': 'The waiter brings tea [title]and  éclairs [step]', 'label': 2,
                  'endings': ['ça va.', 'trois cafés 🫖🫖, là-bas.', 'À vous. [title]Enfin:  [substeps]', 'no.']},
    'lambada': {'text': 'He looked for the key, and all he found was a  key'},
}

pytestmark = pytest.mark.usefixtures('no_pictures')


# ------------------------------------------------------------------------------------------------
# Figures of the project


def run(script: str, *arguments: str, in_float64: bool = True) -> None:
    """Run a stage as its command line does, for the files that it leaves."""
    comparing = importlib.import_module('tests.comparing')
    with comparing.in_float64() if in_float64 else nullcontext():
        importlib.import_module(script).main([*arguments])


def costs_of_endings(folder: Path, questions: Path, scoring: str) -> tuple[list[float], list[int]]:
    """Return the nats of each ending in HellaSwag's questions, and the divisor of each: no file has them."""
    tasks, comparing = importlib.import_module('plaingpt.tasks'), importlib.import_module('tests.comparing')
    init_from = importlib.import_module('plaingpt.init_from')
    with comparing.in_float64():
        model, state = init_from.open_model(str(folder))
        vocabulary = init_from.learned_tokenizer(state, model.config.vocab_size, folder)
        asked = getattr(tasks, scoring)(tasks.read('hellaswag', str(questions)), vocabulary)
        nats, _ = tasks.score(comparing.predictor_of(model, 7), asked.pairs, '')
    return nats.tolist(), asked.lengths


def read_checkpoint(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def write_lines(path: Path, rows: Rows) -> Path:
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return path


def read_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def measured(folder: Path) -> dict[str, Any]:
    """Return what evaluate.py has written about one checkpoint."""
    row, = json.loads((folder / 'evaluation.json').read_text(encoding='utf-8'))['measured']
    return dict(row)


# ------------------------------------------------------------------------------------------------
# Byte-pair encoding (Sennrich et al. 2016), as GPT-2 has it

# GPT-2's words. For the texts below, Python's character classes are those of its pattern.
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class Vocabulary(NamedTuple):
    """A vocabulary that a corpus has learned, as its meta.json holds it, in GPT-2's way to write bytes."""

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]  # of the merges
    symbols: list[str]  # of the 256 bytes

    def encode(self, text: str) -> list[int]:
        """Merge the pair of the lowest rank in a word, at all its places from left to right, until no pair has a
        rank."""
        found = []
        for word in WORD.findall(text):
            parts = [self.symbols[byte] for byte in word.encode()]
            while pairs := [pair for pair in pairwise(parts) if pair in self.ranks]:
                first = min(pairs, key=self.ranks.__getitem__)
                merged: list[str] = []
                for part in parts:
                    if merged and (merged[-1], part) == first:
                        merged[-1] += part
                    else:
                        merged.append(part)
                parts = merged
            found += [self.ids[part] for part in parts]
        return found


def vocabulary_of(corpus: Path) -> Vocabulary:
    learned = json.loads(json.loads((corpus / 'meta.json').read_text(encoding='utf-8'))['tokenizer']['json'])['model']
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
    return Vocabulary(learned['vocab'], {(a, b): rank for rank, (a, b) in enumerate(learned['merges'])}, symbols)


# ------------------------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019)


class Model(NamedTuple):
    """A checkpoint in numpy."""

    weights: dict[str, Array]
    n_layer: int
    n_head: int
    block_size: int
    gelu: str


def read_model(folder: Path) -> Model:
    state = read_checkpoint(folder / 'ckpt.pt')
    weights = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in state['model'].items()}
    shape = state['model_args']
    return Model(weights, shape['n_layer'], shape['n_head'], shape['block_size'], state['config']['gelu'])


def linear(model: Model, name: str, x: Array) -> Array:
    return np.asarray(x @ model.weights[f'{name}.weight'].T + model.weights.get(f'{name}.bias', 0.0))


def layer_norm(model: Model, name: str, x: Array) -> Array:
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    scaled = (x - mean) / np.sqrt(variance + 1e-5) * model.weights[f'{name}.weight']
    return np.asarray(scaled + model.weights.get(f'{name}.bias', 0.0))


def log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def attention(model: Model, name: str, x: Array) -> Array:
    T, D = len(x), x.shape[1] // model.n_head
    q, k, v = np.split(linear(model, f'{name}.c_attn', x), 3, axis=1)  # each (T, C)
    heads = []
    for head in range(model.n_head):
        part = slice(head * D, (head + 1) * D)
        scores = q[:, part] @ k[:, part].T / math.sqrt(D)  # (T, T)
        scores[np.triu_indices(T, 1)] = -np.inf  # later tokens are hidden
        heads.append(np.exp(log_softmax(scores)) @ v[:, part])  # (T, D)
    return linear(model, f'{name}.c_proj', np.concatenate(heads, axis=1))


def activation(model: Model, x: Array) -> Array:
    """Apply GELU (Hendrycks and Gimpel 2016), or its approximation."""
    if model.gelu == 'tanh':
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def log_probabilities(model: Model, ids: Sequence[int] | Ids) -> Array:
    """Return the model's log-probabilities of the token after each of ids (T,): (T, V)."""
    x = model.weights['transformer.wte.weight'][ids] + model.weights['transformer.wpe.weight'][:len(ids)]  # (T, C)
    for layer in range(model.n_layer):
        block = f'transformer.h.{layer}'
        x = x + attention(model, f'{block}.attn', layer_norm(model, f'{block}.ln_1', x))
        hidden = activation(model, linear(model, f'{block}.mlp.c_fc', layer_norm(model, f'{block}.ln_2', x)))
        x = x + linear(model, f'{block}.mlp.c_proj', hidden)
    return log_softmax(linear(model, 'lm_head', layer_norm(model, 'transformer.ln_f', x)))


# ------------------------------------------------------------------------------------------------
# A split


def read_window(model: Model, ids: Ids, start: int) -> tuple[Array, Array]:
    """Return the nats of the block_size tokens after ids[start], (T,), and whether each was the first choice, (T,)."""
    window = ids[start:start + model.block_size + 1]
    said = log_probabilities(model, window[:-1])  # (T, V)
    return -said[np.arange(len(said)), window[1:]], (said.argmax(axis=1) == window[1:]).astype(np.float64)


def figures_of_split(model: Model, ids: Ids, n_bytes: int) -> dict[str, float]:
    """Measure each token but the first in windows that do not overlap, and the remaining ones in one more window, which
    ends with the last token. `n_bytes` is the size of the text without its first token."""
    T = model.block_size
    nats, is_right = np.full(len(ids), np.nan), np.full(len(ids), np.nan)
    windows = []
    for start in range(0, len(ids) - T, T):
        nats[start + 1:start + T + 1], is_right[start + 1:start + T + 1] = read_window(model, ids, start)
        windows.append(nats[start + 1:start + T + 1].mean())
    left = np.isnan(nats)
    left[0] = False
    assert 0 < left.sum() < T, 'the other windows leave a remainder'
    last_nats, last_is_right = read_window(model, ids, len(ids) - T - 1)
    nats[left], is_right[left] = last_nats[left[-T:]], last_is_right[left[-T:]]
    return figures_of(nats[1:], is_right[1:], n_bytes, windows)


def figures_of(nats: Array, is_right: Array, n_bytes: int, windows: list[float]) -> dict[str, float]:
    return {
        'loss': nats.mean(), 'perplexity': math.exp(nats.mean()), 'accuracy': is_right.mean(),
        'bits_per_byte': nats.sum() / math.log(2) / n_bytes,
        'loss_stderr': np.std(windows, ddof=1) / math.sqrt(len(windows)),
    }


class Corpus(NamedTuple):
    """A corpus: the folder to learn from, and the documents to validate on."""

    folder: Path
    unseen: list[str]

    @property
    def ids(self) -> Ids:
        """Return the ids of the documents to validate on, with an end after each."""
        vocabulary = vocabulary_of(self.folder)
        end = max(vocabulary.ids.values()) + 1
        return np.array([i for text in self.unseen for i in (*vocabulary.encode(text), end)])

    @property
    def n_bytes(self) -> int:
        """Return the bytes of the text after the first token, which is a single letter."""
        return sum(len(text.encode()) for text in self.unseen) - 1


@pytest.fixture(scope='module')
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Prepare a corpus: to learn from, the first half of HellaSwag's and LAMBADA's rows, with the right answers; to
    validate on, the short documents of documents.jsonl, in many scripts."""
    folder = tmp_path_factory.mktemp('corpus')
    documents = [row['text'].replace('\ud83d', '\ufffd') for row in read_lines(DATA / 'documents.jsonl')]
    unseen = ['A beginning.', *(text for text in documents if 0 < len(text) < 1000)]
    known = [f'{row["ctx"]} {row["endings"][int(row["label"])]}' for row in read_lines(DATA / 'hellaswag.jsonl')[:10]]
    known += 3 * [row['text'] for row in read_lines(DATA / 'lambada.jsonl')[:10]]
    for name, texts in (('seen', known), ('unseen', unseen)):
        write_lines(folder / f'{name}.jsonl', [{'text': text} for text in texts])
    run('data.text.prepare', f'--input={folder}/seen.jsonl', f'--val_input={folder}/unseen.jsonl',
        f'--to_dir={folder}/corpus', '--tokenizer=bpe:400')
    return Corpus(folder / 'corpus', unseen)


@pytest.fixture(scope='module')
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train until the model knows most of what it reads."""
    folder = tmp_path_factory.mktemp('run')
    run('train', f'--out_dir={folder}', f'--dataset={corpus.folder}', '--n_layer=2', '--n_head=4', '--n_embd=32',
        '--block_size=96', '--bias=True', '--gelu=exact', '--tie_weights=False', '--batch_size=8',
        '--gradient_accumulation_steps=1', '--max_iters=200', '--lr_decay_iters=200', '--warmup_iters=10',
        '--learning_rate=1e-2', '--min_lr=1e-3', '--eval_interval=200', '--eval_iters=2', '--sample_interval=0',
        '--device=cpu')
    return folder


def test_a_split_is_read_in_the_tokens_of_its_text(corpus: Corpus) -> None:
    assert np.fromfile(corpus.folder / 'val.bin', dtype='<u2').tolist() == corpus.ids.tolist()


def test_loss_perplexity_accuracy_and_bits_per_byte_are_those_of_each_token_but_the_first(
        trained: Path, corpus: Corpus) -> None:
    expected = figures_of_split(read_model(trained), corpus.ids, corpus.n_bytes)
    run('evaluate', f'--out_dir={trained}', '--batch_size=7', '--device=cpu')
    assert measured(trained)['val'] == pytest.approx(expected, rel=EXACT)


def test_a_run_of_an_older_version_has_these_figures_in_float32(tmp_path: Path) -> None:
    """Its tokens are characters of a single text, and count with the bytes of that text."""
    folder = Path(shutil.copytree(OLD, tmp_path / 'run'))
    characters = json.loads((OLD / 'corpus/meta.json').read_text(encoding='utf-8'))['tokenizer']['characters']
    texts = {}
    for split in ('train', 'val'):
        run('evaluate', f'--out_dir={folder}', f'--dataset={folder}/corpus', f'--split={split}', '--device=cpu',
            in_float64=False)
        ids = np.fromfile(OLD / f'corpus/{split}.bin', dtype='<u2').astype(np.int64)
        texts[split] = ''.join(characters[i] for i in ids)
        expected = figures_of_split(read_model(OLD), ids, len(texts[split][1:].encode()))
        assert measured(folder)[split] == pytest.approx(expected, rel=1e-5)
    assert len(texts['train']) < len(texts['train'].encode()), 'some characters have several bytes'


def test_a_number_of_batches_is_as_many_windows_spread_evenly_over_the_split(trained: Path, corpus: Corpus) -> None:
    """train.py evaluates in the same way: here on 2 batches of 8."""
    model, ids, vocabulary = read_model(trained), corpus.ids, vocabulary_of(corpus.folder)
    symbols_of = {i: symbols for symbols, i in vocabulary.ids.items()}
    T, n_windows = model.block_size, (len(ids) - 1) // model.block_size
    starts = [i * n_windows // 16 * T for i in range(16)]
    read = [read_window(model, ids, start) for start in starts]
    nats, is_right = np.array([nats for nats, _ in read]), np.array([is_right for _, is_right in read])  # (16, T)
    targets = np.concatenate([ids[start + 1:start + T + 1] for start in starts])
    n_bytes = sum(len(symbols_of.get(i, '')) for i in targets.tolist())  # GPT-2 writes a byte as a character
    expected = figures_of(nats, is_right, n_bytes, nats.mean(axis=1).tolist())
    run('evaluate', f'--out_dir={trained}', '--batch_size=8', '--eval_iters=2', '--device=cpu')
    assert measured(trained)['val'] == pytest.approx(expected, rel=EXACT)
    last = read_lines(trained / 'metrics.jsonl')[-1]
    assert {name: last[f'val_{name}'] for name in expected} == pytest.approx(expected, rel=EXACT)


# ------------------------------------------------------------------------------------------------
# HellaSwag (Zellers et al. 2019) and LAMBADA (Paperno et al. 2016)


def tell(model: Model, context: Sequence[int], ending: Sequence[int]) -> tuple[float, bool]:
    """Return the nats of the ending after as much of the context as the model can read, and whether each of its tokens
    is the first choice."""
    ids = np.array([*context, *ending])[-model.block_size - 1:]
    assert len(ending) < len(ids), 'the first token of an ending follows another'
    said, targets = log_probabilities(model, ids[:-1])[-len(ending):], ids[-len(ending):]
    return -said[np.arange(len(ending)), targets].sum(), bool((said.argmax(axis=1) == targets).all())


def by_completion(row: dict[str, Any], vocabulary: Vocabulary) -> Iterator[Ending]:
    """Ask as build-nanogpt's hellaswag.py and llm.c do: context and ending are encoded separately, the ending after a
    space, and acc_norm divides by the tokens of the ending."""
    for ending in row['endings']:
        ids = vocabulary.encode(' ' + ending)
        yield vocabulary.encode(row['ctx']), ids, len(ids)


def cleaned(text: str) -> str:
    """Do what `preprocess` does in lm_eval/tasks/hellaswag/utils.py."""
    text = text.strip()
    text = text.replace(' [title]', '. ')
    text = re.sub('\\[.*?\\]', '', text)
    return text.replace('  ', ' ')


def parted(context: str, ending: str, vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Encode as lm-eval does: both together, then cut where the context alone would end, without spaces at its end."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        context, ending = context[:-n_spaces], context[-n_spaces:] + ending
    n_context = len(vocabulary.encode(context))
    whole = vocabulary.encode(context + ending)
    return whole[:n_context], whole[n_context:]


def by_lm_eval(row: dict[str, Any], vocabulary: Vocabulary) -> Iterator[Ending]:
    """Ask as lm-eval's hellaswag does: the activity comes first, and acc_norm divides by characters."""
    query = cleaned(row['activity_label'] + ': ' + row['ctx_a'] + ' ' + row['ctx_b'].capitalize())
    for ending in map(cleaned, row['endings']):
        yield *parted(query, ' ' + ending, vocabulary), len(ending)


def share(name: str, is_right: Sequence[bool]) -> dict[str, float]:
    """Return the share that is right, and its standard error."""
    numbers = np.array(is_right, dtype=np.float64)
    return {name: numbers.mean(), f'{name}_stderr': np.std(numbers, ddof=1) / math.sqrt(len(numbers))}


def questions_in(folder: Path, task: str) -> Path:
    """Write the questions of data/, and an odd one, into a file of that folder."""
    return write_lines(folder / f'{task}.jsonl', [*read_lines(DATA / f'{task}.jsonl'), ODD[task]])


@pytest.mark.parametrize(('ask', 'scoring'), [(by_completion, 'completion'), (by_lm_eval, 'lm_eval')])
def test_hellaswag_chooses_the_ending_that_costs_least_in_all_and_for_its_length(
        ask: Callable[[dict[str, Any], Vocabulary], Iterator[Ending]], scoring: str, trained: Path,
        corpus: Corpus, tmp_path: Path) -> None:
    model, vocabulary, file = read_model(trained), vocabulary_of(corpus.folder), questions_in(tmp_path, 'hellaswag')
    rows = read_lines(file)
    questions = [list(ask(row, vocabulary)) for row in rows]
    costs = np.array([[tell(model, context, ending)[0] for context, ending, _ in endings] for endings in questions])
    lengths = np.array([[length for _, _, length in endings] for endings in questions])
    nats, divisors = costs_of_endings(trained, file, scoring)
    assert divisors == lengths.flatten().tolist()
    assert nats == pytest.approx(costs.flatten().tolist(), rel=EXACT)

    labels = np.array([int(row['label']) for row in rows])
    least, least_for_its_length = costs.argmin(axis=1), (costs / lengths).argmin(axis=1)
    expected = share('acc', least == labels) | share('acc_norm', least_for_its_length == labels)
    run('evaluate', f'--out_dir={trained}', '--tasks=hellaswag', f'--hellaswag={file}', '--device=cpu')
    assert measured(trained)[f'hellaswag_{scoring}'] == pytest.approx(expected, rel=EXACT)
    assert expected['acc'] != expected['acc_norm'], 'or else the wrong one might pass'
    longest = max(len(context) + len(ending) for endings in questions for context, ending, _ in endings)
    assert longest > model.block_size + 1, 'the beginning of some contexts is not read'


def test_lambada_counts_the_words_that_are_first_choices_and_their_perplexity(
        trained: Path, corpus: Corpus, tmp_path: Path) -> None:
    """The scoring is that of lm-eval's lambada_openai."""
    model, vocabulary, file = read_model(trained), vocabulary_of(corpus.folder), questions_in(tmp_path, 'lambada')
    told = []
    for row in read_lines(file):
        words = row['text'].split(' ')
        told.append(tell(model, *parted(' '.join(words[:-1]), ' ' + words[-1], vocabulary)))
    costs, is_right = zip(*told, strict=True)
    expected = share('acc', is_right) | {'perplexity': math.exp(sum(costs) / len(costs))}
    run('evaluate', f'--out_dir={trained}', '--tasks=lambada', f'--lambada={file}', '--device=cpu')
    assert measured(trained)['lambada_openai'] == pytest.approx(expected, rel=EXACT)
    assert 0 < expected['acc'] < 1


# ------------------------------------------------------------------------------------------------
# Learning


def nanogpts_rate(it: int, warmup_iters: int, lr_decay_iters: int) -> float:
    """Return what nanoGPT's get_lr does."""
    if it < warmup_iters:
        return PEAK * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return FLOOR
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return FLOOR + coeff * (PEAK - FLOOR)


def rate_at(schedule: str, it: int, warmup: int, end: int) -> float:
    """Return the rate of another schedule: nanoGPT's warm-up, then a straight line down; for 'wsd' in the last
    quarter."""
    if it < warmup:
        return nanogpts_rate(it, warmup, end)
    if schedule == 'constant':
        return PEAK
    begin = {'linear': warmup, 'wsd': end - end // 4}[schedule]
    return float(np.interp(it, [begin, end], [PEAK, FLOOR]))


@pytest.fixture(scope='module')
def play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare a short text as bytes."""
    folder = tmp_path_factory.mktemp('play')
    run('data.text.prepare', f'--input={DATA}/play.txt', f'--to_dir={folder}/corpus', '--tokenizer=byte')
    return folder / 'corpus'


SMALL = ['--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=4', '--eval_iters=1',
         '--gradient_accumulation_steps=1', '--sample_interval=0', '--device=cpu', f'--learning_rate={PEAK}',
         f'--min_lr={FLOOR}', '--decay_fraction=0.25']


def rates_of(folder: Path) -> list[float]:
    """Return the rate of every step; none is missing."""
    rows = [row for row in read_lines(folder / 'metrics.jsonl') if 'lr' in row]
    assert [row['step'] for row in rows] == list(range(len(rows)))
    return [row['lr'] for row in rows]


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'constant', 'wsd'])
@pytest.mark.parametrize(('warmup', 'end'), [(5, 32), (0, 40), (7, 1000)])
def test_each_step_learns_at_the_rate_of_its_schedule(
        schedule: str, warmup: int, end: int, play: Path, tmp_path: Path) -> None:
    """The first two runs reach the end of the schedule and go beyond; the last is cut short, which does not move the
    end."""
    run('train', f'--dataset={play}', f'--out_dir={tmp_path}', *SMALL, '--max_iters=40', '--eval_interval=100',
        f'--schedule={schedule}', f'--warmup_iters={warmup}', f'--lr_decay_iters={end}')
    expected = [nanogpts_rate(it, warmup, end) if schedule == 'cosine' else rate_at(schedule, it, warmup, end)
                for it in range(40)]
    assert rates_of(tmp_path) == pytest.approx(expected, rel=EXACT)


def test_without_decay_every_step_learns_at_the_highest_rate(play: Path, tmp_path: Path) -> None:
    run('train', f'--dataset={play}', f'--out_dir={tmp_path}', *SMALL, '--max_iters=10', '--warmup_iters=5',
        '--decay_lr=False')
    assert rates_of(tmp_path) == [PEAK] * 10


def test_with_max_epochs_the_lowest_rate_is_reached_as_the_run_ends(play: Path, tmp_path: Path) -> None:
    windows = len(np.fromfile(play / 'train.bin', dtype='<u2')) // 8 - 1  # one is lost to the offset
    n_steps = math.ceil(0.75 * windows / 4)
    run('train', f'--dataset={play}', f'--out_dir={tmp_path}', *SMALL, '--max_epochs=0.75', '--warmup_iters=3')
    assert rates_of(tmp_path) == pytest.approx([nanogpts_rate(it, 3, n_steps) for it in range(n_steps)], rel=EXACT)


def test_each_update_is_adamws_at_the_rate_of_its_step(play: Path, tmp_path: Path) -> None:
    """Loshchilov and Hutter 2017, algorithm 2, from the moments that each checkpoint holds."""
    run('train', f'--dataset={play}', f'--out_dir={tmp_path}', *SMALL, '--max_iters=8', '--warmup_iters=3',
        '--lr_decay_iters=6', '--eval_interval=1', '--keep=20', '--weight_decay=0.5', '--beta1=0.8', '--beta2=0.9')
    states = sorted((read_checkpoint(path) for path in tmp_path.glob('ckpt*.pt')), key=lambda state: state['iter_num'])
    assert [state['iter_num'] for state in states] == [1, 2, 3, 4, 5, 6, 7, 8]
    for before, after in pairwise(states):
        t = after['iter_num']  # updates so far, with this one
        rate = nanogpts_rate(t - 1, 3, 6)
        names = [name for name in after['model'] if name != 'lm_head.weight']  # the head is wte.weight
        matrices = [name for name in names if after['model'][name].ndim == 2]
        in_order = [*matrices, *(name for name in names if name not in matrices)]
        assert len(in_order) == len(after['optimizer']['state'])
        for number, name in enumerate(in_order):
            moments = {key: np.asarray(value) for key, value in after['optimizer']['state'][number].items()}
            m, v = moments['exp_avg'] / (1 - 0.8**t), moments['exp_avg_sq'] / (1 - 0.9**t)
            p = np.asarray(before['model'][name]) * (1 - rate * (0.5 if name in matrices else 0.0))
            np.testing.assert_allclose(np.asarray(after['model'][name]), p - rate * m / (np.sqrt(v) + 1e-8),
                                       rtol=EXACT, atol=1e-12, err_msg=f'{name}, update {t}')


# ------------------------------------------------------------------------------------------------
# This file


def test_nothing_of_the_project_computes_what_is_expected() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding='utf-8'))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or '' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split('.')[0] for name in imported} - sys.stdlib_module_names == {'numpy', 'pytest', 'torch'}
    names = {node.name: {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
             for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name for name, used in names.items() if 'importlib' in used} == ASKED
    assert {name for name, used in names.items() if 'torch' in used} == {'read_checkpoint'}
    ask = {name for name, used in names.items() if used & ASKED}
    assert ask == {name for name in ask if name.startswith('test_')} | {'corpus', 'trained', 'play'}
