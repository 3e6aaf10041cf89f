"""Evaluation: the table shows what a plain computation gives, whatever the size of the batches."""
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from torch import Tensor

import evaluate
import train
from model import GPT, GPTConfig
from plaingpt import errors, metrics
from plaingpt.corpus import token_files, tokenizer
from plaingpt.corpus.folder import open_split
from plaingpt.corpus.order import fixed_starts
from plaingpt.init_from import open_model
from plaingpt.published import TITLES
from tests.comparing import ROUNDING, predictor_of, refused
from tests.waiting import PATIENT

V, T = 128, 16


def measured(model: GPT, corpus: token_files.TokenFile, n_windows: int, batch_size: int,
             sizes: list[int] | None) -> dict[str, float]:
    return metrics.evaluate(predictor_of(model, batch_size), corpus, n_windows, sizes)


@pytest.fixture
def corpus(tiny_dataset: Path) -> token_files.TokenFile:
    return open_split(tiny_dataset, 'val', T, V)


@pytest.fixture
def model() -> GPT:
    """Return a model with weights so large that its predictions differ from token to token."""
    model = GPT(GPTConfig(T, V, 2, 2, 16, dropout=0.3))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.1)
    return model


def of_each_token(model: GPT, corpus: token_files.TokenFile, starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Read one window at a time, in float64: nats (W, T), whether each is the first choice (W, T), and the targets (W,
    T)."""
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


def test_every_metric_is_what_a_plain_computation_gives(model: GPT, corpus: token_files.TokenFile) -> None:
    sizes = [1 + i % 5 for i in range(100)]  # the ids from 100 on are padding, and have no size
    starts = fixed_starts(len(corpus), T, 13).tolist()
    with torch.no_grad():  # some guesses are right
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
    assert 0 < expected['accuracy'] < 1, 'or else a wrong accuracy might pass'
    assert 'bits_per_byte' not in measured(model, corpus, 13, 4, None), 'unknown without the sizes of the tokens'


def test_the_size_of_the_batches_changes_nothing_and_fixed_windows_give_the_same_bits(
        model: GPT, corpus: token_files.TokenFile) -> None:
    expected = measured(model.double(), corpus, 13, 1, [1] * V)
    for batch_size in (2, 5, 13, 50):
        assert measured(model, corpus, 13, batch_size, [1] * V) == pytest.approx(expected, rel=ROUNDING)
    torch.manual_seed(5)  # dropout is off: nothing is drawn
    assert measured(model, corpus, 13, 1, [1] * V) == expected
    assert model.training, 'the mode is as before'


def test_at_most_the_whole_split_is_read_and_no_window_twice(model: GPT, corpus: token_files.TokenFile) -> None:
    whole = measured(model, corpus, (len(corpus) - 1) // T, 8, None)
    assert measured(model, corpus, 10**6, 8, None) == whole
    nats, _, _ = of_each_token(model, corpus, list(range(0, len(corpus) - T, T)))
    assert whole['loss'] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert 'loss_stderr' not in measured(model, corpus, 1, 8, None), 'one window tells nothing of the others'


@pytest.mark.parametrize('n_tokens', [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T + 5])
def test_the_whole_of_a_split_is_each_of_its_tokens_once(model: GPT, tmp_path: Path, n_tokens: int) -> None:
    np.random.default_rng(1).integers(0, V, n_tokens).astype('<u2').tofile(tmp_path / 'val.bin')
    corpus, starts = token_files.TokenFile(tmp_path / 'val.bin', 'uint16'), list(range(0, n_tokens - T, T))
    nats, _, _ = of_each_token(model, corpus, [*starts, n_tokens - 1 - T])
    counted = torch.cat([nats[:-1].flatten(), nats[-1, T - (n_tokens - 1) % T:] if (n_tokens - 1) % T else nats[0, :0]])
    assert len(counted) == n_tokens - 1
    for batch_size in (1, 2, 8):
        found = measured(model, corpus, 0, batch_size, [1] * V)
        assert found['loss'] == pytest.approx(counted.mean().item(), rel=1e-5)
        assert found['bits_per_byte'] == pytest.approx(counted.mean().item() / math.log(2), rel=1e-5)
        doubt = nats[:-1].mean(dim=1).std().item() / math.sqrt(len(starts)) if len(starts) > 1 else None
        assert found.get('loss_stderr') == (doubt and pytest.approx(doubt, rel=1e-3)), 'of whole windows only'


def test_a_metric_that_needs_a_sum_of_its_own_is_two_lines(model: GPT, corpus: token_files.TokenFile,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    sums_of, figures = metrics.sums_of, metrics.figures

    def more_sums(logits: Tensor, y: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        is_near = (logits.topk(V // 2).indices == y[..., None]).any(dim=-1)
        return sums_of(logits, y, sizes) | {'near': is_near.sum().double()}

    def more_figures(sums: dict[str, float], n_windows: int) -> dict[str, float]:
        return figures(sums, n_windows) | {'wide_accuracy': sums['near'] / sums['tokens']}

    monkeypatch.setattr(metrics, 'sums_of', more_sums)
    monkeypatch.setattr(metrics, 'figures', more_figures)
    results = measured(model, corpus, 10, 4, [1] * V)
    assert results['accuracy'] < results['wide_accuracy'] < 1
    best: metrics.Best = {}
    for step, value in enumerate((0.5, 0.75, 0.25)):
        metrics.keep_best(best, {'loss': 1.0, 'wide_accuracy': value}, step)
    assert best['wide_accuracy'] == [0.75, 1], 'an accuracy is better when it is higher'


def test_a_metric_is_one_more_line(model: GPT, corpus: token_files.TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = metrics.figures
    monkeypatch.setattr(metrics, 'figures', lambda *sums: {**figures(*sums), 'errors': 1 - figures(*sums)['accuracy']})
    results = {'val': measured(model, corpus, 10, 4, [1] * V)}
    best: metrics.Best = {}
    metrics.keep_best(best, results['val'], 5)
    table = metrics.table(results, best).splitlines()
    assert table[0].split()[-1] == 'errors'
    assert table[1].split()[-1] == f'{results["val"]["errors"]:.4f}'
    assert best['errors'] == [results['val']['errors'], 5]


def test_the_best_of_each_metric_is_kept_in_its_own_direction() -> None:
    best: metrics.Best = {}
    assert metrics.keep_best(best, {'loss': 3.0, 'accuracy': 0.5}, 10)
    assert not metrics.keep_best(best, {'loss': 3.5, 'accuracy': 0.6}, 20)
    assert best == {'loss': [3.0, 10], 'accuracy': [0.6, 20]}
    assert metrics.keep_best(best, {'loss': 2.5, 'accuracy': 0.6, 'perplexity': 12.0}, 30)
    assert best == {'loss': [2.5, 30], 'accuracy': [0.6, 20], 'perplexity': [12.0, 30]}, 'equal is not better'


def test_the_table_shows_each_row_and_the_best() -> None:
    rows = {'train': {'loss': 3.0}, 'val': {'loss': 3.25, 'accuracy': 0.5}}
    lines = metrics.table(rows, {'loss': [3.125, 40]}).splitlines()
    assert [line.split() for line in lines] == [
        ['loss', 'accuracy'], ['train', '3.0000'], ['val', '3.2500', '0.5000'], ['best', '3.1250'],
        ['at', 'step', '40']]
    assert len({len(line) for line in lines}) == 1, 'columns are aligned'
    assert len(metrics.table(rows, {}).splitlines()) == 3
    rows['val']['loss_stderr'] = 0.0625
    lines = metrics.table(rows, {}).splitlines()
    assert [line.split() for line in lines[1:]] == [['train', '3.0000'], ['val', '3.2500', '±', '0.0625', '0.5000']]
    assert lines[1].index('3.0000') == lines[2].index('3.2500'), 'decimals are aligned'


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity() -> None:
    assert metrics.exp(1000.0) == math.inf
    assert metrics.exp(2.0) == pytest.approx(math.e**2)
    assert math.isnan(metrics.exp(math.nan))


# ------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope='module')
def trained(tiny_dataset: Path, no_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 30 steps."""
    folder = tmp_path_factory.mktemp('run')
    train.main([f'--{name}={value}' for name, value in {
        'out_dir': folder, 'dataset': tiny_dataset, 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': T,
        'batch_size': 4, 'gradient_accumulation_steps': 2, 'max_iters': 30, 'eval_interval': 15, 'eval_iters': 2,
        'hellaswag_interval': 20, 'hellaswag': tiny_dataset / 'hellaswag.jsonl', 'sample_interval': 0, 'device': 'cpu',
        'learning_rate': 1e-2, 'warmup_iters': 0}.items()])
    return folder


def figures(folder: Path) -> Any:
    """Return the figures that the script leaves beside a checkpoint."""
    return json.loads((folder / 'evaluation.json').read_text(encoding='utf-8'))


def test_the_script_says_what_training_said(trained: Path, tiny_dataset: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """The last row of metrics.jsonl is of the same eight windows, and of the same questions."""
    row = json.loads((trained / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()[-1])
    expected = {name.removeprefix('val_'): value for name, value in row.items() if name.startswith('val_')}
    for where in (f'--out_dir={trained}', f'--init_from={trained}', f'--init_from={trained}/best.pt'):
        evaluate.main([where, '--eval_iters=2', '--batch_size=4', '--device=cpu'])
        measured, = figures(trained)['measured']
        assert measured['val'] == expected
        assert measured['step'] == 30
        numbers = fr'{expected["loss"]:.4f} ± {expected["loss_stderr"]:.4f} .* {expected["bits_per_byte"]:.4f}'
        assert re.search(fr', step 30 +{numbers}\n', capsys.readouterr().out)
    evaluate.main([f'--out_dir={trained}', '--tasks=hellaswag', f'--hellaswag={tiny_dataset}/hellaswag.jsonl',
                   '--device=cpu'])
    answers = figures(trained)['measured'][0]['hellaswag_completion']
    assert answers == {name: row[f'hellaswag_{name}'] for name in ('acc', 'acc_norm', 'acc_stderr', 'acc_norm_stderr')}
    evaluate.main([f'--out_dir={trained}', '--eval_iters=2', '--batch_size=4', '--device=cpu', '--split=train'])
    assert figures(trained)['measured'][0]['train']['loss'] == row['train_loss']


def test_without_a_number_of_batches_the_whole_split_is_read(trained: Path, corpus: token_files.TokenFile) -> None:
    evaluate.main([f'--out_dir={trained}', '--device=cpu', '--batch_size=100'])
    model, state = open_model(str(trained))
    sizes = tokenizer.from_state(state['tokenizer']).token_sizes()
    expected = measured(model, corpus, 0, 100, sizes)
    assert figures(trained)['measured'][0]['val'] == expected
    assert expected['loss'] < 4.2 < math.log(len(sizes)), 'the model has learned something'
    assert expected['bits_per_byte'] == pytest.approx(expected['loss'] / math.log(2), rel=0.01), 'one byte a character'


@pytest.mark.parametrize('is_folder', [False, True])
def test_a_text_that_was_not_prepared_gives_the_figures_of_one_that_was(
        is_folder: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The texts are a document, and a folder of several, one of them without text; their documents end with the
    end-of-text token."""
    texts = ['', 'Some text: café, 日本.\n' * 9, 'and more of it'] if is_folder else ['one document, ' * 30]
    (tmp_path / 'in').mkdir()
    for number, text in enumerate(texts):
        (tmp_path / f'in/{number}.txt').write_text(text, encoding='utf-8')
    named = tmp_path / 'in' if is_folder else tmp_path / 'in/0.txt'
    model, vocabulary = GPT(GPTConfig(T, 257, 1, 1, 8)), tokenizer.Bytes(eot=True)
    torch.save({'model': model.state_dict(), 'tokenizer': vocabulary.state(), 'model_args': {
        'n_layer': 1, 'n_head': 1, 'n_embd': 8, 'block_size': T, 'vocab_size': 257, 'bias': True, 'dropout': 0.0,
    }}, tmp_path / 'model.pt')
    arguments = ['--device=cpu', f'--init_from={tmp_path}/model.pt', f'--json={tmp_path}/x.json', '--batch_size=3']
    evaluate.main([*arguments, f'--dataset={named}'])
    [found] = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))['measured']
    assert f'text of {named.name}' in capsys.readouterr().out and found['dataset'] == named.name

    ends = [256] if is_folder else []
    ids = np.array([i for text in texts if text for i in [*vocabulary.encode(text), *ends]], dtype='<u2')
    ids.tofile(tmp_path / 'same.bin')
    same = token_files.TokenFile(tmp_path / 'same.bin', 'uint16')
    assert found['text'] == measured(open_model(f'{tmp_path}/model.pt')[0], same, 0, 3, vocabulary.token_sizes())
    (tmp_path / 'in/0.txt').write_text('short', encoding='utf-8')
    assert 'too few for a window' in refused(
        evaluate.main, [*arguments, f'--dataset={tmp_path}/in/0.txt'], code=errors.DATA)


def test_a_text_is_read_from_the_column_that_is_named(trained: Path, tmp_path: Path) -> None:
    letters = ''.join(piece.decode() for piece in tokenizer.from_state(
        open_model(str(trained))[1]['tokenizer']).pieces if piece.isalpha()) * 2
    (tmp_path / 'a.jsonl').write_text(json.dumps({'body': letters}), encoding='utf-8')
    arguments = [f'--out_dir={trained}', f'--dataset={tmp_path}/a.jsonl', '--device=cpu']
    assert '--column=' in refused(evaluate.main, arguments, code=errors.DATA)
    assert 'has no splits' in refused(evaluate.main, [*arguments, '--split=train'], code=errors.COMMAND)
    for missing in (f'{tmp_path}/missing.txt', 'missing.txt', 'memory://missing.txt'):
        message = refused(evaluate.main, [arguments[0], f'--dataset={missing}', '--device=cpu'], code=errors.DATA)
        assert f'--dataset={missing} matches no file' in message
    evaluate.main([*arguments, '--column=body'])
    assert figures(trained)['measured'][0]['dataset'] == 'a.jsonl'


def test_checkpoints_that_a_glob_matches_are_rows_in_the_order_of_their_steps(
        trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / 'a-later-copy.pt').write_bytes((trained / 'ckpt.pt').read_bytes())
    evaluate.main([f'--init_from={trained}/*.pt', '--eval_iters=2', '--batch_size=4', '--device=cpu'])
    rows = figures(trained)['measured']
    assert [(Path(row['checkpoint']).name, row['step']) for row in rows] == [
        ('ckpt.1.pt', 15), ('a-later-copy.pt', 30), ('best.pt', 30), ('ckpt.pt', 30)]
    assert rows[0]['val']['loss'] > rows[1]['val']['loss'] == rows[3]['val']['loss']
    shown = capsys.readouterr().out
    assert [shown.index(f'{row["checkpoint"]}, step {row["step"]} ') for row in rows] == sorted(
        shown.index(f'{row["checkpoint"]}, step {row["step"]} ') for row in rows)
    (trained / 'a-later-copy.pt').unlink()


LAST_WORDS = [{'text': 'import json and import json'}, {'text': f'return {json.__name__} or raise'}]


@pytest.fixture(scope='module')
def questions(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the settings that name few questions, in characters that the run knows."""
    lambada = tmp_path_factory.mktemp('questions') / 'lambada.jsonl'
    lambada.write_text('\n'.join(map(json.dumps, LAST_WORDS)), encoding='utf-8')
    return ['--tasks=val,hellaswag,lambada', f'--hellaswag={tiny_dataset}/hellaswag.jsonl', f'--lambada={lambada}']


def test_each_task_has_its_table_with_the_published_figures_below(
        trained: Path, questions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f'--out_dir={trained}', *questions, '--eval_iters=1', '--device=cpu', '--limit=4']
    evaluate.main([*command, f'--json={tmp_path}/figures.json'])
    results = json.loads((tmp_path / 'figures.json').read_text(encoding='utf-8'))
    measured, = results['measured']
    tables = capsys.readouterr().out.partition('val of ')[2].split('\n\n')
    assert len(tables) == 5
    for table, name in zip(tables[1:], ('hellaswag_completion', 'hellaswag_lm_eval', 'lambada_openai'), strict=False):
        title, note, columns, found, *published = table.splitlines()
        metrics = columns.split()
        assert f'{measured[name]["acc"]:.4f} ± {measured[name]["acc_stderr"]:.4f}' in found
        assert set(metrics) == {metric for metric in measured[name] if not metric.endswith('_stderr')}
        assert [row.split('  ')[0] for row in published] == list(results['published'][name])
        assert f'{results["published"][name]["GPT-2 124M"]["acc"]:.4f}' in published[0]
        assert title == TITLES[name]
        assert note == results['notes'][name]
        assert note.startswith(f'{2 if name == "lambada_openai" else 4} examples')
        assert ('OpenAI' in note) == any(row.startswith('GPT-3') for row in published), 'GPT-3 has a scoring of its own'
    assert (measured['step'], results['device'], results['dtype']) == (30, 'cpu', 'float32')
    assert results['settings']['limit'] == 4
    assert set(results['published']['hellaswag_completion']) > set(results['published']['hellaswag_lm_eval'])


def test_text_that_was_cleaned_is_not_taken_for_that_of_the_published_figures(
        trained: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (tiny_dataset / 'hellaswag.jsonl').read_text(encoding='utf-8').splitlines()
    rows = [{name: value for name, value in json.loads(line).items() if name not in ('ctx_a', 'ctx_b')}
            for line in lines]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    evaluate.main([f'--out_dir={trained}', '--tasks=hellaswag', f'--hellaswag={tmp_path}/a.jsonl', '--device=cpu'])
    assert capsys.readouterr().out.count('5 examples of cleaned text: not comparable') == 2
    assert all('cleaned' in note for note in figures(trained)['notes'].values())


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_file(trained: Path, questions: list[str], tmp_path: Path) -> None:
    """Three processes have too little to do: the last of them gets no batch in some rounds."""
    files, command = [], [f'--init_from={trained}', *questions, '--device=cpu', '--batch_size=3']
    for n in (1, 2, 3):
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
        subprocess.run([sys.executable, *(launcher if n > 1 else []), 'evaluate.py', *command,
                        f'--json={tmp_path}/all.json'],
                       cwd=Path(evaluate.__file__).parent, check=True, capture_output=True, timeout=PATIENT)
        files.append((tmp_path / 'all.json').read_bytes())
    assert files[0] == files[1] == files[2]
    assert len(json.loads(files[0])['measured'][0]) == 7


@pytest.mark.slow
def test_processes_that_would_measure_different_things_are_refused(trained: Path, tiny_dataset: Path,
                                                                   tmp_path: Path) -> None:
    """A setting differs; or the questions in files of the same name, as machines may have them."""
    shutil.copy(tiny_dataset / 'hellaswag.jsonl', tmp_path)
    other = (tiny_dataset / 'hellaswag.jsonl').read_text(encoding='utf-8').replace('return', 'yield')
    (tmp_path / 'other.jsonl').write_text(other, encoding='utf-8')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    launched = os.environ | {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    for changes, words, code in (
            (['--limit=2'], 'limit: 0 on process 0, 2 on process 1', errors.COMMAND),
            ([f'--hellaswag={tmp_path}/other.jsonl'], 'hellaswag: "', errors.COMMAND),
            ([f'--hellaswag={tmp_path}/gone.jsonl'], ('process 1 (pid ', f'--hellaswag={tmp_path}/gone'), errors.DATA)):
        both = [subprocess.Popen(
            [sys.executable, 'evaluate.py', f'--init_from={trained}', '--tasks=hellaswag', '--device=cpu',
             f'--hellaswag={tmp_path}/hellaswag.jsonl', f'--json={tmp_path}/x.json', *(changes if rank else [])],
            cwd=Path(evaluate.__file__).parent, env=launched | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding='utf-8') for rank in range(2)]
        for text, process in [(process.communicate(timeout=PATIENT)[1], process) for process in both]:
            assert process.returncode == code, text
            assert text.startswith(words) and len(text.splitlines()) <= 3, text
    assert not (tmp_path / 'x.json').exists()


def test_the_file_of_figures_is_beside_the_checkpoints_or_under_their_name(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ('out-a', 'out-b'):
        Path(run).mkdir()
        Path(run, 'ckpt.pt').touch()
    for where, found, expected in (
            ('out-a', ['out-a'], 'out-a/evaluation.json'),
            ('out-a/ckpt.pt', ['out-a/ckpt.pt'], 'out-a/evaluation.json'),
            ('out-*', ['out-a', 'out-b'], 'evaluation.json'), ('gpt2-xl', ['gpt2-xl'], 'evaluation-gpt2-xl.json'),
            ('out-*/ckpt.pt', ['out-a/ckpt.pt', 'out-b/ckpt.pt'], 'evaluation.json'),
            ('s3://bucket/run/best.pt', ['s3://bucket/run/best.pt'], 'evaluation-best.json')):
        assert evaluate.find_checkpoints(where) == found
        assert evaluate.json_file(where, found) == expected


def test_losses_are_compared_with_published_ones_of_the_same_text_only() -> None:
    for dataset, split, there in (('openwebtext', 'val', True), ('openwebtext', 'train', False), ('x', 'val', False)):
        shown = evaluate.report([evaluate.Measured('a.pt', None, dataset, {split: {'loss': 3.0}})], {})
        assert shown.startswith(f'{split} of {dataset}\n')
        assert (re.search(r'\nGPT-2 1558M +2\.5400$', shown) is not None) == there


def test_what_is_not_finite_is_null_in_the_file() -> None:
    figures = {'loss': math.nan, 'perplexity': math.inf, 'accuracy': 0.5}
    measured = evaluate.Measured('a.pt', None, 'x', {'val': figures})
    row, = json.loads(evaluate.as_json([measured], {}))['measured']
    assert row == {'checkpoint': 'a.pt', 'step': None, 'dataset': 'x',
                   'val': {'loss': None, 'perplexity': None, 'accuracy': 0.5}}


@pytest.mark.parametrize('size', ['', '_medium', '_large', '_xl'])
def test_the_commands_for_gpt2_give_what_transformers_gives(
        size: str, documents: list[str], gpt2_stand_in: tiktoken.Encoding, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They read tokens of text, in nanoGPT's files, with a small random GPT-2 in place of OpenAI's."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    shape = transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    reference = transformers.GPT2LMHeadModel(shape).eval()
    reference.save_pretrained(tmp_path / 'gpt2')
    ids = gpt2_stand_in.encode_ordinary(''.join(documents))
    for split in ('train', 'val'):
        np.array(ids, dtype='<u2').tofile(tmp_path / f'{split}.bin')
    monkeypatch.chdir(Path(evaluate.__file__).parent)
    more = [f'--init_from={tmp_path}/gpt2', f'--dataset={tmp_path}', '--device=cpu', '--eval_iters=3', '--batch_size=2']
    train.main([f'config/eval_gpt2{size}.py', *more, f'--out_dir={tmp_path}/out'])
    printed = re.findall(r'val loss (\d+\.\d+)', capsys.readouterr().out)
    evaluate.main([*more, '--tasks=val'])

    windows = torch.tensor([ids[start:start + 65] for start in fixed_starts(len(ids), 64, 6).tolist()])
    with torch.no_grad():
        scores = reference(windows[:, :-1]).logits.log_softmax(dim=-1)
    expected = -scores.gather(2, windows[:, 1:, None]).mean().item()
    assert figures(tmp_path / 'gpt2')['measured'][0]['val']['loss'] == pytest.approx(expected, rel=1e-5)
    assert [float(loss) for loss in printed] == pytest.approx([expected], abs=1e-4), 'as printed, with four digits'


def test_what_cannot_be_evaluated_is_refused(trained: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    where = f'--out_dir={trained}'
    assert 'nothing' in refused(evaluate.main, [f'--out_dir={tmp_path}/nothing'], code=errors.CHECKPOINT)
    assert '--batch_size=0' in refused(evaluate.main, [where, '--batch_size=0'], code=errors.COMMAND)
    assert '--eval_iters=-1' in refused(evaluate.main, [where, '--eval_iters=-1'], code=errors.COMMAND)
    assert "'float64'" in refused(evaluate.main, [where, '--dtype=float64'], code=errors.COMMAND)
    assert "'test'" in refused(evaluate.main, [where, '--split=test'], code=errors.COMMAND)
    assert "'piqa'" in refused(evaluate.main, [where, '--tasks=val,piqa'], code=errors.COMMAND)
    assert '--limit=-1' in refused(evaluate.main, [where, '--limit=-1'], code=errors.COMMAND)
    assert 'matches no' in refused(evaluate.main, [f'--init_from={tmp_path}/*.pt'], code=errors.CHECKPOINT)
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/no/a'$"):  # errors.run prints it in one line
        evaluate.main([where, '--eval_iters=1', '--device=cpu', f'--json={tmp_path}/no/a'])
    (tmp_path / 'odd.jsonl').write_text(json.dumps({'text': 'words in 中文'}), encoding='utf-8')
    odd = [where, '--tasks=lambada', f'--lambada={tmp_path}/odd.jsonl', '--device=cpu']
    assert "character '中'" in refused(evaluate.main, odd, code=errors.DATA)
    message = refused(evaluate.main, [where, f'--dataset={tmp_path}/absent'], code=errors.DATA)
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
