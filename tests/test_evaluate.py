"""Evaluation: what the table says is what a plain computation gives, whatever the batches."""
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import checkpoint
import errors
import evaluate
import logger
import parallel
import tokenizer
import tokens
import train
from errors import UserError
from evaluate import METRICS, Metric, Predictions
from model import GPT, GPTConfig

ALONE = parallel.Process(0, 1, torch.device('cpu'), '')
V, T = 128, 16


def silent(items: Iterable[int], total: int, label: str, unit: str) -> Iterator[int]:
    yield from items


def measured(model: GPT, corpus: tokens.TokenFile, n_windows: int, batch_size: int,
             sizes: list[int] | None) -> dict[str, float]:
    return evaluate.evaluate(model, model.config, corpus, n_windows, batch_size, sizes, ALONE,
                             parallel.autocast(ALONE.device, torch.float32), silent)


@pytest.fixture
def corpus(tiny_dataset: Path) -> tokens.TokenFile:
    return tokens.open_split(tiny_dataset, 'val', T, V)


@pytest.fixture
def model() -> GPT:
    """Weights so large that its predictions differ from token to token."""
    model = GPT(GPTConfig(T, V, 2, 2, 16, dropout=0.3))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    return model


def of_each_token(model: GPT, corpus: tokens.TokenFile, starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """One window at a time, in float64: nats (W, T), whether it was the first choice (W, T), and the targets (W, T)."""
    nats, firsts, targets = [], [], []
    double = GPT.from_weights(model.config, {name: p.double() for name, p in model.state_dict().items()}).eval()
    for start in starts:
        ids = torch.from_numpy(corpus.read(start, T + 1).astype(np.int64))
        with torch.no_grad():
            logits, _ = double(ids[None, :-1])
        probabilities = logits[0].exp() / logits[0].exp().sum(dim=1, keepdim=True)
        nats.append([-math.log(probabilities[t, ids[t + 1]]) for t in range(T)])
        firsts.append([probabilities[t].max() == probabilities[t, ids[t + 1]] for t in range(T)])
        targets.append(ids[1:])
    return torch.tensor(nats), torch.tensor(firsts), torch.stack(targets)


def test_every_metric_is_what_a_plain_computation_gives(model: GPT, corpus: tokens.TokenFile) -> None:
    sizes = [1 + i % 5 for i in range(100)]  # of the ids from 100 on, which are padding, there are none
    starts = tokens.fixed_starts(len(corpus), T, 13).tolist()
    with torch.no_grad():  # a guess that is right now and then
        model.transformer.ln_f.weight.mul_(0.1)
        model.transformer.ln_f.bias.copy_(10 * model.transformer.wte.weight[corpus.read(starts[3] + 5, 1).item()])
    nats, firsts, targets = of_each_token(model, corpus, starts)
    of_windows = nats.mean(dim=1)
    expected = {
        'loss': nats.mean().item(), 'perplexity': math.exp(nats.mean()), 'accuracy': firsts.double().mean().item(),
        'bits_per_byte': nats.sum().item() / math.log(2) / sum(sizes[i] for i in targets.flatten()),
        'loss_stderr': of_windows.std().item() / math.sqrt(13),
    }
    assert measured(model, corpus, 13, 4, sizes) == pytest.approx(expected, rel=1e-4)
    assert 0 < expected['accuracy'] < 1, 'or else a wrong one might pass'
    assert 'bits_per_byte' not in measured(model, corpus, 13, 4, None), 'unknown without the sizes of the tokens'


def test_the_size_of_the_batches_changes_nothing_and_fixed_windows_give_the_same_bits(
        model: GPT, corpus: tokens.TokenFile) -> None:
    expected = measured(model, corpus, 13, 1, [1] * V)
    for batch_size in (2, 5, 13, 50):
        assert measured(model, corpus, 13, batch_size, [1] * V) == pytest.approx(expected, rel=1e-6)
    torch.manual_seed(5)  # dropout is off: nothing is drawn
    assert measured(model, corpus, 13, 1, [1] * V) == expected
    assert model.training, 'the mode is what it was'


def test_at_most_the_whole_split_is_read_and_no_window_twice(model: GPT, corpus: tokens.TokenFile) -> None:
    whole = measured(model, corpus, (len(corpus) - 1) // T, 8, None)
    assert measured(model, corpus, 10**6, 8, None) == whole
    nats, _, _ = of_each_token(model, corpus, list(range(0, len(corpus) - T, T)))
    assert whole['loss'] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert measured(model, corpus, 1, 8, None)['loss_stderr'] == 0, 'one window tells nothing of the others'


def confidence(p: Predictions) -> Tensor:
    """The probability of the likeliest token."""
    return p.logits.softmax(dim=-1).amax(dim=-1)


def test_a_metric_is_one_more_line(model: GPT, corpus: tokens.TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, 'confidence', Metric(confidence, better=max))
    results = {'val': measured(model, corpus, 10, 4, [1] * V)}
    assert 1 / V < results['val']['confidence'] < 1
    best: evaluate.Best = {}
    evaluate.keep_best(best, results['val'], 5)
    table = evaluate.table(results, best).splitlines()
    column = table[0].split().index('confidence')
    assert table[1].split()[1 + column] == f'{results["val"]["confidence"]:.4f}'
    assert best['confidence'] == [results['val']['confidence'], 5]


def test_the_best_of_each_metric_is_kept_in_its_own_direction() -> None:
    best: evaluate.Best = {}
    assert evaluate.keep_best(best, {'loss': 3.0, 'accuracy': 0.5}, 10)
    assert not evaluate.keep_best(best, {'loss': 3.5, 'accuracy': 0.6}, 20)
    assert best == {'loss': [3.0, 10], 'accuracy': [0.6, 20]}
    assert evaluate.keep_best(best, {'loss': 2.5, 'accuracy': 0.6, 'perplexity': 12.0}, 30)
    assert best == {'loss': [2.5, 30], 'accuracy': [0.6, 20], 'perplexity': [12.0, 30]}, 'equal is not better'


def test_the_table_shows_each_row_and_the_best() -> None:
    rows = {'train': {'loss': 3.0}, 'val': {'loss': 3.25, 'accuracy': 0.5}}
    lines = evaluate.table(rows, {'loss': [3.125, 40]}).splitlines()
    assert [line.split() for line in lines] == [
        ['loss', 'accuracy'], ['train', '3.0000'], ['val', '3.2500', '0.5000'], ['best', '3.1250'],
        ['at', 'step', '40']]
    assert len({len(line) for line in lines}) == 1, 'columns are aligned'
    assert len(evaluate.table(rows, {}).splitlines()) == 3


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity() -> None:
    assert METRICS['perplexity'].finish(1000.0) == math.inf
    assert METRICS['perplexity'].finish(2.0) == pytest.approx(math.e**2)
    assert math.isnan(METRICS['perplexity'].finish(math.nan))


# ------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope='module')
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps."""
    def draw_nothing(log: logger.Logger) -> None:
        """A picture costs as much time as a hundred steps of this run."""

    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger.Logger, 'plot', draw_nothing)
        train.main([f'--{name}={value}' for name, value in {
            'out_dir': folder, 'dataset': tiny_dataset, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': T,
            'batch_size': 4, 'gradient_accumulation_steps': 2, 'max_iters': 30, 'eval_interval': 15, 'eval_iters': 2,
            'sample_interval': 0, 'device': 'cpu', 'learning_rate': 1e-2, 'warmup_iters': 0}.items()])
    return folder


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    """The table on the console: a dict for each row."""
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ['loss'])
    names = lines[first].split()
    return {line.split()[0]: dict(zip(names, map(float, line.split()[1:]), strict=True)) for line in lines[first + 1:]}


def test_the_script_says_what_training_said(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last row of metrics.jsonl is of the same eight windows."""
    row = json.loads((trained / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()[-1])
    for where in (f'--out_dir={trained}', f'--init_from={trained}', f'--init_from={trained}/best.pt'):
        evaluate.main([where, '--eval_iters=2', '--batch_size=4', '--device=cpu'])
        assert shown(capsys) == {'val': {
            name.removeprefix('val_'): round(value, 4) for name, value in row.items() if name.startswith('val_')}}
    evaluate.main([f'--out_dir={trained}', '--eval_iters=2', '--batch_size=4', '--device=cpu', '--split=train'])
    assert shown(capsys)['train']['loss'] == round(row['train_loss'], 4)


def test_without_a_number_of_batches_the_whole_split_is_read(trained: Path, corpus: tokens.TokenFile,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main([f'--out_dir={trained}', '--device=cpu', '--batch_size=100'])
    model, state = checkpoint.open_model(str(trained))
    sizes = tokenizer.from_state(state['tokenizer']).token_sizes()
    expected = measured(model, corpus, len(corpus), 32, sizes)
    assert shown(capsys)['val'] == pytest.approx(expected, abs=2e-4)
    assert expected['loss'] < 4.2 < math.log(len(sizes)), 'it has learned something'
    assert expected['bits_per_byte'] == pytest.approx(expected['loss'] / math.log(2), rel=0.01), 'one byte each'


def refused(call: Callable[..., Any], *positional: Any, code: int) -> str:
    with pytest.raises(UserError) as caught:
        call(*positional)
    assert caught.value.code == code
    assert str(caught.value).count('\n') < 3
    return str(caught.value)


def test_what_cannot_be_evaluated_is_refused(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    where = f'--out_dir={trained}'
    assert 'nothing' in refused(evaluate.main, [f'--out_dir={tmp_path}/nothing'], code=errors.CHECKPOINT)
    assert '--batch_size=0' in refused(evaluate.main, [where, '--batch_size=0'], code=errors.COMMAND)
    assert '--eval_iters=-1' in refused(evaluate.main, [where, '--eval_iters=-1'], code=errors.COMMAND)
    assert "'float64'" in refused(evaluate.main, [where, '--dtype=float64'], code=errors.COMMAND)
    assert "'test'" in refused(evaluate.main, [where, '--split=test'], code=errors.COMMAND)
    message = refused(evaluate.main, [where, f'--dataset={tmp_path}/mine'], code=errors.DATA)
    assert 'prepare.py' in message


def test_a_corpus_of_another_tokenizer_is_refused(trained: Path, tmp_path: Path, tiny_dataset: Path) -> None:
    meta = json.loads((tiny_dataset / 'meta.json').read_text(encoding='utf-8'))
    meta['tokenizer'] = {'name': 'byte', 'eot': False}
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    for split in ('train', 'val'):
        (tmp_path / f'{split}.bin').symlink_to(tiny_dataset / f'{split}.bin')
    message = refused(evaluate.main, [f'--out_dir={trained}', f'--dataset={tmp_path}'], code=errors.DATA)
    assert 'byte' in message
    assert 'char' in message
