"""HellaSwag and LAMBADA: the questions are those that other projects ask, and the answers those of a plain
computation."""
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from model import GPT, GPTConfig
from plaingpt import console, errors
from plaingpt.corpus import tokenizer
from plaingpt.errors import UserError
from plaingpt.tasks import (
    HELLASWAG,
    TASKS,
    Pair,
    Piece,
    Questions,
    Task,
    batches,
    choices,
    completion,
    encode_together,
    for_training,
    is_lambada,
    is_raw,
    last_words,
    lm_eval,
    load,
    measure_hellaswag,
    measure_lambada,
    pieces,
    read,
    score,
    size,
)
from tests.comparing import ALONE, predictor_of
from tests.waiting import PATIENT

BYTES = tokenizer.Bytes(eot=False)
# Two rows as HellaSwag has them, one from a film and one from WikiHow, and two as LAMBADA has them
RAW: list[dict[str, Any]] = [
    {'ind': 24, 'activity_label': 'Roof shingle removal', 'ctx_a': 'A man is sitting on a roof.', 'ctx_b': 'he',
     'ctx': 'A man is sitting on a roof. he', 'split': 'val', 'split_type': 'indomain', 'label': 3, 'source_id': 'a',
     'endings': ['is using wrap to wrap skis.', 'is ripping tiles off.', 'holds a cube.', 'starts pulling it up.']},
    {'ind': 43, 'activity_label': 'Health', 'ctx_a': '[header] How to rest [title] Lie down. [step] Find a bed.',
     'ctx_b': '', 'ctx': '[header] How to rest [title] Lie down. [step] Find a bed.', 'split': 'val', 'label': '0',
     'split_type': 'zeroshot', 'source_id': 'wikihow~1',
     'endings': ['[substeps] Sleep. [title] Wake up.', 'Run.', ' Jump  twice.', 'Sit [substeps] up.']},
]
WORDS = [{'text': 'She asked for bread and he gave her bread'}, {'context': 'Two and two is', 'continuation': 'four'}]


def make_model(block_size: int = 128) -> GPT:
    """Return a model with weights so large that its predictions differ from token to token."""
    model = GPT(GPTConfig(block_size, 256, 2, 2, 16, dropout=0.3))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    return model


def plain_nats(model: GPT, ids: list[int], n_told: int) -> list[float]:
    """Return the cost of each of the last n_told tokens, one at a time, in float64, each after at most block_size
    others."""
    double = GPT.from_weights(model.config, {name: p.double() for name, p in model.state_dict().items()}).eval()
    costs = []
    for place in range(len(ids) - n_told, len(ids)):
        with torch.no_grad():
            logits, _ = double(torch.tensor([ids[max(0, place - model.config.block_size):place]]))
        costs.append(-logits[0, -1].log_softmax(dim=0)[ids[place]].item())
    return costs


# ------------------------------------------------------------------------------------------------
# Questions


def texts(pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    return [(BYTES.decode(context), BYTES.decode(ending)) for context, ending in pairs]


def test_completion_asks_with_the_unchanged_text() -> None:
    questions = completion(RAW, BYTES)
    assert questions.labels == [3, 0]
    assert texts(questions.pairs[:2]) == [('A man is sitting on a roof. he', ' is using wrap to wrap skis.'),
                                          ('A man is sitting on a roof. he', ' is ripping tiles off.')]
    assert texts(questions.pairs[4:5]) == [('[header] How to rest [title] Lie down. [step] Find a bed.',
                                            ' [substeps] Sleep. [title] Wake up.')]
    assert questions.lengths == [len(ending) for _, ending in questions.pairs], 'one token for each byte'


def test_lm_eval_asks_with_the_activity_and_without_the_marks_of_wikihow() -> None:
    questions = lm_eval(RAW, BYTES)
    assert texts(questions.pairs[:1]) == [
        ('Roof shingle removal: A man is sitting on a roof. He', ' is using wrap to wrap skis.')]
    assert texts(questions.pairs[4:]) == [
        ('Health: How to rest. Lie down. Find a bed.', ending) for ending in (
            '  Sleep.. Wake up.', ' Run.', ' Jump twice.', ' Sit up.')]
    assert questions.lengths[4:] == [17, 4, 11, 7], 'characters, without the space in front'


def test_a_cleaned_file_is_recognised_and_scored_as_far_as_it_goes() -> None:
    cleaned = {'row': 0, 'activity_label': 'Canoeing', 'ctx': 'Two women paddle. the child', 'label': 2,
               'endings': ['a.', 'b.', 'c.', 'd.'], 'source': 'activitynet'}
    assert is_raw(RAW) and not is_raw([*RAW, cleaned])
    assert texts(lm_eval([cleaned], BYTES).pairs[:1]) == [('Canoeing: Two women paddle. the child', ' a.')]


def test_the_last_word_is_asked_for_with_the_space_before_it() -> None:
    assert texts(last_words(WORDS, BYTES)) == [
        ('She asked for bread and he gave her', ' bread'), ('Two and two is', ' four')]


def test_a_word_is_scored_in_the_tokens_that_it_has_in_the_text(gpt2_stand_in: tiktoken.Encoding) -> None:
    gpt2 = tokenizer.Tiktoken(gpt2_stand_in)
    context, ending = encode_together('It is in the  ', ' boat', gpt2)
    assert gpt2.decode(context) == 'It is in the', 'spaces belong to what follows'
    assert gpt2.decode(ending) == '   boat'
    assert [*context, *ending] == gpt2.encode('It is in the   boat')
    assert [gpt2.decode([i]) for i in ending] == ['  ', ' boat']


# ------------------------------------------------------------------------------------------------
# Answers


def test_each_ending_costs_what_a_plain_computation_says() -> None:
    model = make_model()
    pairs = completion(RAW, BYTES).pairs
    expected = [sum(plain_nats(model, context + ending, len(ending))) for context, ending in pairs]
    for batch_size in (1, 3, 50):
        nats, _ = score(predictor_of(model, batch_size), pairs, '')
        assert nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert model.training, 'the mode is as before'


def test_the_answer_is_the_cheapest_ending_and_the_cheapest_for_its_length() -> None:
    questions = Questions([], 3 * [1, 2, 4, 8], [3, 0, 3])
    nats = torch.tensor([5.0, 6.0, 7.0, 8.0, 1.0, 3.0, 9.0, 9.0, 5.0, 2.0, 5.0, 4.0])
    #    per length      5.0, 3.0, 1.7, 1.0, 1.0, 1.5, 2.2, 1.1, 5.0, 1.0, 1.2, 0.5
    results = choices(questions, nats)
    assert results == pytest.approx({'acc': 1 / 3, 'acc_stderr': 1 / 3, 'acc_norm': 1.0, 'acc_norm_stderr': 0.0})
    nats[5] = 1.0  # as cheap as the right one: the first of equals counts
    assert choices(questions, nats)['acc'] == 1 / 3
    nats[4] = 1.5
    assert choices(questions, nats)['acc'] == 0


def test_the_end_of_a_long_context_is_read_and_a_long_ending_is_scored_in_pieces() -> None:
    model = make_model(block_size=8)
    ids = BYTES.encode('The quick brown fox jumps over the lazy dog')
    assert [(piece.ids, piece.n_told) for piece in pieces([(ids[:30], ids[30:34])], 8)] == [(ids[25:34], 4)]
    assert [(piece.ids, piece.n_told) for piece in pieces([(ids[:30], ids[30:])], 8)] == [
        (ids[-9:], 8), (ids[-17:-8], 5)], 'every token once, after at least one other'
    assert [(piece.ids, piece.n_told) for piece in pieces([(ids[:1], ids[1:18])], 8)] == [
        (ids[9:18], 8), (ids[1:10], 8), (ids[:2], 1)]

    nats, _ = score(predictor_of(model, 3), [(ids[:30], ids[30:34]), (ids[:30], ids[30:])], '')
    first = sum(plain_nats(model, ids[25:34], 4))
    second = sum(plain_nats(model, ids[-17:-8], 5)) + sum(plain_nats(model, ids[-9:], 8))
    assert nats.tolist() == pytest.approx([first, second], rel=1e-5)


def test_a_batch_has_as_many_tokens_as_fit_and_each_piece_is_in_one() -> None:
    todo = [Piece(number, [0] * (length + 1), 1) for number, length in enumerate([9, 8, 4, 4, 4, 3, 2, 2, 1, 1, 1, 1])]
    parts = batches(todo, 8)
    assert [[size(piece) - 1 for piece in part] for part in parts] == [
        [9], [8], [4, 4], [4, 3], [2, 2, 1, 1], [1, 1]]
    assert [piece for part in parts for piece in part] == todo
    assert batches([], 8) == []


def test_short_endings_are_read_together_and_cost_what_they_cost_alone() -> None:
    """There are far fewer batches than sequences, and none has more tokens than an evaluation reads at once."""
    model, shapes = make_model(), list[tuple[int, int]]()
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    ask = predictor_of(model, 2)
    pairs = [(BYTES.encode('It is'), BYTES.encode(' so' * n)) for n in range(1, 13)] * 3
    nats, _ = score(ask, pairs, '')
    most = ask.batch_size * ask.config.block_size
    assert sum(rows for rows, _ in shapes) == len(pairs) > 2 * ask.batch_size * len(shapes)
    assert all(rows * length <= most < (rows + 1) * length for rows, length in shapes[:-1])
    expected = [sum(plain_nats(model, context + ending, len(ending))) for context, ending in pairs]
    assert nats.tolist() == pytest.approx(expected, rel=1e-5)


def learn(texts: Iterable[str]) -> GPT:
    """Return a small model that has overfitted these texts."""
    model = GPT(GPTConfig(128, 256, 1, 2, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = [torch.tensor(BYTES.encode(text)) for text in texts]
    for _ in range(150):
        losses = [model(ids[None, :-1], ids[None, 1:], logits='none')[1] for ids in batch]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_model_that_has_overfitted_the_texts_gives_the_right_answers() -> None:
    right = [f'{row["ctx"]} {row["endings"][int(row["label"])]}' for row in RAW]
    figures = measure_hellaswag(RAW, BYTES, predictor_of(learn(right), 3))
    assert figures['hellaswag_completion'] == {'acc': 1.0, 'acc_norm': 1.0, 'acc_stderr': 0.0, 'acc_norm_stderr': 0.0}
    wrong = [f'{row["ctx"]} {row["endings"][1]}' for row in RAW]
    assert measure_hellaswag(RAW, BYTES, predictor_of(learn(wrong), 3))['hellaswag_completion']['acc_norm'] == 0
    assert list(figures) == ['hellaswag_completion', 'hellaswag_lm_eval'], 'neither is taken for the other'


def test_a_last_word_counts_when_each_of_its_tokens_is_the_first_choice() -> None:
    model = learn(['She asked for bread and he gave her bread', 'Two and two is foul'])
    figures = measure_lambada(WORDS, BYTES, predictor_of(model, 3))['lambada_openai']
    nats = [sum(plain_nats(model, context + word, len(word))) for context, word in last_words(WORDS, BYTES)]
    assert nats[0] < 0.2 < 3 < nats[1], "the model knows all but the last letter of 'four'"
    assert figures['acc'] == 0.5
    assert figures['acc_stderr'] == 0.5
    assert figures['perplexity'] == pytest.approx(math.exp(sum(nats) / 2), rel=1e-4), 'of words, not of tokens'


def test_a_run_notes_the_completion_style_under_the_name_of_its_text(tmp_path: Path) -> None:
    model, questions = make_model(), completion(RAW, BYTES)
    raw = for_training(str(write(tmp_path / 'raw.jsonl', RAW)), 0, BYTES, ALONE)
    nats, _ = score(predictor_of(model, 3), questions.pairs, '')
    assert raw.answer(predictor_of(model, 3), console.progress) == {
        f'hellaswag_{name}': value for name, value in choices(questions, nats).items()}
    cleaned = [{name: value for name, value in row.items() if name not in ('ctx_a', 'ctx_b')} for row in RAW]
    other = for_training(str(write(tmp_path / 'cleaned.jsonl', cleaned)), 1, BYTES, ALONE)
    assert 'hellaswag_cleaned_acc_norm' in other.answer(predictor_of(model, 3), console.progress)
    assert len(other.questions.labels) == 1
    with pytest.raises(UserError, match='--hellaswag_interval=0'):
        for_training('', 0, None, ALONE)


TRAINING = """
import sys, torch, test_tasks
from plaingpt import tasks
from plaingpt.machines import device, processes, strategies
from plaingpt.metrics import Predictor
from tests.comparing import predictor_of
with processes.joined('cpu', shards=True) as process:
    torch.manual_seed(0)
    model, raw = test_tasks.make_model(), test_tasks.make_model()
    raw.load_state_dict(model.state_dict())
    blocks, compute = model.transformer.h, device.choose(process.device, 'float32', True)
    for block in blocks:
        block.compile()
    distributed = strategies.distribute(model, blocks, process, sys.argv[1], torch.float32, True, False)
    pairs = tasks.completion(test_tasks.RAW, test_tasks.BYTES).pairs
    alone = tasks.score(predictor_of(raw, 3), pairs, '')
    together = tasks.score(Predictor(distributed, model.config, process, compute, 3), pairs, '')
    assert torch.equal(alone[0], together[0]) and torch.equal(alone[1], together[1])
    assert not torch._dynamo.utils.counters['frames'], 'nothing was compiled'
    with torch.compiler.set_stance('force_eager'):
        x = torch.arange(16).view(2, 8)
        distributed(x, x, logits='none')[1].backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize('strategy', ['ddp', 'fsdp'])
def test_a_model_that_several_processes_train_is_asked_as_if_by_one(strategy: str, tmp_path: Path) -> None:
    """Blocks are to be compiled: the many lengths of the questions compile nothing. And training continues."""
    root = Path(__file__).parents[1]
    (tmp_path / 'ask.py').write_text(TRAINING, encoding='utf-8')
    asked = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(tmp_path / 'ask.py'),
         strategy],
        env={**os.environ, 'PYTHONPATH': f'{root}{os.pathsep}{root / "tests"}'}, capture_output=True, text=True,
        encoding='utf-8', timeout=PATIENT)
    assert asked.returncode == 0, asked.stderr


# ------------------------------------------------------------------------------------------------
# Files


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
    return path


def test_files_in_the_form_of_the_originals_are_read() -> None:
    folder = Path(__file__).parent / 'data'
    questions = load('hellaswag', str(folder / 'hellaswag.jsonl'), 0, ALONE)
    assert len(questions) == 20 and is_raw(questions)
    for ask, marks in ((completion, 10), (lm_eval, 0)):
        asked = ask(questions, BYTES)
        assert asked.labels == [row['label'] for row in questions]
        assert [ending for _, ending in texts(asked.pairs) if not ending.startswith(' ')] == []
        assert sum('[title]' in context for context, _ in texts(asked.pairs[::4])) == marks, "WikiHow's"
    passages = load('lambada', str(folder / 'lambada.jsonl'), 0, ALONE)
    assert len(passages) == 20
    assert [word for _, word in texts(last_words(passages, BYTES))][:3] == [' key', ' lake', ' cake']


def test_the_published_files_are_read(shared_data: Path) -> None:
    questions = list(read('hellaswag', str(shared_data / 'hellaswag/hellaswag_val.jsonl.xz')))
    assert len(questions) == 10042
    assert not is_raw(questions)
    passages = list(read('lambada', str(shared_data / 'lambada/lambada_openai.jsonl')))
    assert len(passages) == 5153
    assert texts(last_words(passages[:1], BYTES))[0][1] == ' signs'


def test_only_the_first_examples_are_read_when_so_many_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / 'a.jsonl', [*RAW, 'no example'])
    assert load('hellaswag', str(path), 2, ALONE) == RAW
    with pytest.raises(UserError, match='line 3'):
        load('hellaswag', str(path), 0, ALONE)


@pytest.mark.parametrize(('task', 'row'), [
    ('hellaswag', {**RAW[0], 'label': 4}), ('hellaswag', {**RAW[0], 'label': ''}), ('hellaswag', {**RAW[0], 'ctx': ''}),
    ('hellaswag', {**RAW[0], 'endings': ['a', 'b', 'c']}), ('hellaswag', {**RAW[0], 'endings': ['a', 'b', 'c', 4]}),
    ('hellaswag', {**RAW[0], 'ctx_b': None}), ('hellaswag', WORDS[0]), ('hellaswag', [1]),
    ('lambada', {'text': 'one'}), ('lambada', {'text': ' one'}),
    ('hellaswag', {**RAW[0], 'label': True}), ('hellaswag', {**RAW[0], 'label': [1]}),
    ('hellaswag', {**RAW[0], 'ctx': '\ud83d'}), ('hellaswag', {**RAW[0], 'endings': ['a', 'b', 'c', '\udfff']}),
    ('lambada', {'text': 'one \ud83d'}), ('lambada', {'context': '\udfff', 'continuation': 'word'}),
    ('lambada', {'text': 'one '}), ('lambada', {'context': '', 'continuation': 'word'}), ('lambada', RAW[0]),
])
def test_a_row_that_is_no_example_is_refused_with_its_line(task: str, row: Any, tmp_path: Path) -> None:
    path = write(tmp_path / 'a.jsonl', [*(RAW if task == 'hellaswag' else WORDS), row])
    with pytest.raises(UserError, match=fr'a\.jsonl, line 3 is not an example of {task}') as caught:
        load(task, str(path), 0, ALONE)
    assert caught.value.code == errors.DATA


def test_files_that_are_damaged_or_empty_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'bad.jsonl').write_bytes(b'{"text": "a \xff b"}\n')
    (tmp_path / 'empty.jsonl').write_bytes(b'')
    (tmp_path / 'deep.jsonl').write_bytes(b'[' * 200_000)
    (tmp_path / 'long.jsonl').write_bytes(b'{"text": "a b", "id": ' + b'1' * 5000 + b'}')
    for name, message in (('bad', 'line 1'), ('deep', 'line 1'), ('long', 'line 1'),
                          ('empty', 'is empty'), ('nowhere', 'matches no file')):
        with pytest.raises(UserError, match=message) as caught:
            load('lambada', str(tmp_path / f'{name}.jsonl'), 0, ALONE)
        assert caught.value.code == errors.DATA


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *parts: object) -> None:
        """Print nothing among the results of the tests."""


class InStep(Silent):
    """A server of which neither of two answers ends before the other has begun."""

    both_began = threading.Barrier(2)

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(9))
        self.both_began.wait(60)
        outputfile.write(source.read())


@contextmanager
def serving(folder: Path, handler: type[Silent]) -> Iterator[str]:
    """Yield the address at which this folder can be downloaded."""
    folder.mkdir()
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Yield the address at which tmp_path/web can be downloaded."""
    with serving(tmp_path / 'web', Silent) as address:
        yield address


def test_two_machines_that_share_a_folder_may_download_at_the_same_time(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('plaingpt.tasks.CORPORA', tmp_path / 'data')
    with serving(tmp_path / 'web', InStep) as address, ThreadPoolExecutor() as machines:
        write(tmp_path / 'web/words.jsonl', WORDS)
        loading = [machines.submit(load, 'lambada', f'{address}/words.jsonl', 0, ALONE) for _ in range(2)]
        assert [machine.result() for machine in loading] == [WORDS, WORDS]
    assert [path.name for path in (tmp_path / 'data/lambada').iterdir()] == ['words.jsonl']


def test_without_a_path_the_original_is_downloaded_and_anything_else_refused(
        served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('plaingpt.tasks.CORPORA', tmp_path / 'data')
    file = write(tmp_path / 'web/hellaswag_val.jsonl', RAW)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(TASKS, 'hellaswag', Task(f'{served}/hellaswag_val.jsonl', digest, HELLASWAG))
    assert load('hellaswag', '', 0, ALONE) == RAW
    assert (tmp_path / 'data/hellaswag/hellaswag_val.jsonl').read_bytes() == file.read_bytes()
    file.unlink()
    assert load('hellaswag', '', 0, ALONE) == RAW, 'the file has been downloaded'

    write(tmp_path / 'web/lambada_test.jsonl', WORDS)
    monkeypatch.setitem(TASKS, 'lambada', Task(f'{served}/lambada_test.jsonl', digest, is_lambada))
    with pytest.raises(UserError, match=r'sha256 is .* is expected\n.*--lambada=PATH'):
        load('lambada', '', 0, ALONE)
    assert load('lambada', f'{served}/lambada_test.jsonl', 1, ALONE) == WORDS[:1], 'by its address, unchanged'


def test_the_originals_are_named_by_their_known_hashes() -> None:
    assert {name: (task.url.rpartition('/')[2], task.sha256[:8]) for name, task in TASKS.items()} == {
        'hellaswag': ('hellaswag_val.jsonl', '0aa3b888'), 'lambada': ('lambada_test.jsonl', '4aa8d02c')}
