"""Training: the schedule, the optimizer, the batch, the files of a run, and interruptions, which change nothing.

Most runs take place in this process, on a tiny model and real text. None draws its picture (run/test_log.py does),
except those in a process of their own.
"""
import ast
import dataclasses
import inspect
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.corpus import token_files
from plaingpt.corpus.batches import Part, parts_of
from plaingpt.corpus.folder import open_split
from plaingpt.corpus.order import Integers, Order
from plaingpt.machines import device, processes
from plaingpt.machines.device import pick_dtype
from plaingpt.plan import RunSettings, windows_in_step
from plaingpt.run import checkpoint, wandb
from tests.comparing import (
    ALONE,
    ROUNDING,
    assert_equal_learning,
    assert_equal_to_rounding,
    differences,
    give,
    in_three_groups,
    learner_of,
    refused,
)

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Any]]
Run = Callable[..., Rows]
TINY: dict[str, Any] = {
    'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'batch_size': 4, 'gradient_accumulation_steps': 2,
    'max_iters': 10, 'lr_decay_iters': 10, 'warmup_iters': 2, 'learning_rate': 1e-2, 'min_lr': 1e-3,
    'eval_interval': 5, 'eval_iters': 2, 'sample_interval': 0, 'device': 'cpu',
}
HALTING = """import sys, time, train
from plaingpt.run.log import Log
iteration = Log.iteration
def halting(log, step, *rest):
    iteration(log, step, *rest)
    time.sleep(10000 if step == 27 else 0)
Log.iteration = halting
train.main(sys.argv[1:])
"""
CLOCK = {'tokens_per_second', 'peak_memory_bytes'}  # the columns that differ between two equal runs


def arguments(out_dir: Path, dataset: Path, changes: dict[str, Any]) -> list[str]:
    settings = TINY | {'out_dir': out_dir, 'dataset': dataset} | changes
    return [f'--{name}={value}' for name, value in settings.items() if value is not None]


def rows_of(out_dir: Path) -> Rows:
    """Return the rows of metrics.jsonl, without the columns that the clock decides."""
    path = out_dir / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [{name: x for name, x in json.loads(line).items() if name not in CLOCK} for line in lines]


pytestmark = pytest.mark.usefixtures('no_pictures')


@pytest.fixture
def run(tiny_dataset: Path) -> Run:
    """Train in this process: run(out_dir, name=value, ...) -> the rows of metrics.jsonl. None leaves a setting out."""
    def run(out_dir: Path, **changes: Any) -> Rows:
        train.main(arguments(out_dir, tiny_dataset, changes))
        return rows_of(out_dir)

    return run


def losses(rows: Rows, name: str = 'loss') -> list[float]:
    return [row[name] for row in rows if name in row]


def last(out_dir: Path) -> checkpoint.State:
    return checkpoint.load(out_dir / 'ckpt.pt')


# ------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize(('kind', 'step', 'expected'), [
    # a warm-up of 10 steps to 1.0, which is reached at step 10; then to 0.1 at step 100
    ('cosine', 0, 1 / 11), ('cosine', 4, 5 / 11), ('cosine', 9, 10 / 11), ('cosine', 10, 1.0),
    ('cosine', 40, 0.1 + 0.9 * 0.75), ('cosine', 55, 0.55), ('cosine', 70, 0.1 + 0.9 * 0.25), ('cosine', 100, 0.1),
    ('cosine', 5000, 0.1),
    ('linear', 9, 10 / 11), ('linear', 10, 1.0), ('linear', 28, 0.82), ('linear', 55, 0.55), ('linear', 100, 0.1),
    ('linear', 5000, 0.1),
    ('constant', 9, 10 / 11), ('constant', 10, 1.0), ('constant', 100, 1.0), ('constant', 5000, 1.0),
    ('wsd', 9, 10 / 11), ('wsd', 10, 1.0), ('wsd', 79, 1.0), ('wsd', 80, 1.0), ('wsd', 85, 0.775), ('wsd', 90, 0.55),
    ('wsd', 100, 0.1), ('wsd', 5000, 0.1),
])
def test_each_schedule_is_what_it_says(kind: str, step: int, expected: float) -> None:
    give(train, schedule=kind, learning_rate=1.0, min_lr=0.1, warmup_iters=10, decay_fraction=0.2)
    assert train.lr_at(step, 100) == pytest.approx(expected)


@pytest.mark.parametrize('kind', ['cosine', 'linear', 'constant', 'wsd'])
@pytest.mark.parametrize(('warmup', 'total', 'decay'),
                         [(0, 0, 0.2), (0, 1, 1.0), (10, 5, 0.2), (10, 10, 0.0), (3, 9, 1.0)])
def test_no_schedule_leaves_its_bounds_or_divides_by_zero(kind: str, warmup: int, total: int, decay: float) -> None:
    give(train, schedule=kind, learning_rate=1.0, min_lr=0.1, warmup_iters=warmup, decay_fraction=decay)
    rates = [train.lr_at(step, total) for step in range(30)]
    assert min(rates[warmup:]) >= 0.1 - 1e-12
    assert max(rates) <= 1.0
    assert min(rates) > 0, 'even the first step learns'
    after = rates[warmup:]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize('tie', [True, False])
def test_matrices_decay_and_vectors_do_not(tie: bool) -> None:
    model = GPT(GPTConfig(16, 64, 2, 2, 16, bias=True, tie_weights=tie))
    give(train, learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9)
    optimizer = train.make_optimizer(model)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group['params']] for group in optimizer.param_groups)
    assert decayed == [name for name, p in model.named_parameters() if p.dim() == 2]
    assert {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.1.mlp.c_proj.weight'} <= set(decayed)
    assert ('lm_head.weight' in decayed) is not tie
    assert others == [name for name, p in model.named_parameters() if p.dim() == 1]
    assert {'transformer.ln_f.weight', 'transformer.h.0.attn.c_attn.bias'} <= set(others)

    groups = optimizer.state_dict()['param_groups']
    assert [group['params'] for group in groups] == [list(range(len(decayed))),
                                                     list(range(len(decayed), len(names)))]
    assert [group['weight_decay'] for group in groups] == [0.5, 0.0]
    assert {(group['lr'], group['betas']) for group in groups} == {(0.1, (0.8, 0.9))}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in decayed else 1.0
        torch.testing.assert_close(p.detach(), factor * before[name], msg=name)


@pytest.mark.parametrize(('total', 'nearest'), [(1000, '992 and 1008'), (5, '16'), (17, '16 and 32')])
def test_a_total_batch_size_that_is_no_multiple_of_the_block_names_the_nearest(total: int, nearest: str) -> None:
    message = refused(windows_in_step, total, 40, 12, 16, code=errors.COMMAND)
    assert f'total_batch_size={total} must be a multiple of block_size=16' in message
    assert message.endswith(f'the nearest are {nearest}')
    assert windows_in_step(1008, 40, 12, 16) == 63
    assert windows_in_step(0, 40, 12, 16) == 480


def batch(n_windows: int, corpus: token_files.TokenFile, config: GPTConfig, batch_size: int) -> list[Part]:
    starts = Order(len(corpus), config.block_size, 1).starts(0, n_windows)
    return list(parts_of(corpus, starts, batch_size, config, ALONE))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('scaled', [False, True])
def test_gradients_add_up_over_micro_batches_with_a_loss_scale_and_without(tiny_dataset: Path, scaled: bool) -> None:
    """The scaler that float16 needs on cuda works on a CPU too, though train.py leaves it out there."""
    config = GPTConfig(16, 128, 2, 2, 16)
    model = GPT(config)
    corpus = open_split(tiny_dataset, 'train', 16, 128)
    (whole,) = batch(10, corpus, config, 10)
    _, expected = model(whole.x, whole.y)
    gradients = torch.autograd.grad(expected, list(model.parameters()))

    parts = batch(10, corpus, config, 4)  # the last one lacks two windows
    give(train, seed=1)
    learner = learner_of(model, train.make_optimizer(model), 2.0**12 if scaled else None)
    loss = train.accumulate_gradient(learner, parts)
    assert loss.item() == pytest.approx(expected.item(), abs=ROUNDING)
    grown = 2.0**12 if scaled else 1.0
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad / grown, gradient, atol=ROUNDING, rtol=0)
    learner.scaler.unscale_(learner.optimizer)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=ROUNDING, rtol=0)


def test_float16_on_a_machine_that_lacks_it_falls_back_and_says_so(
        run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(tmp_path / 'a', max_iters=2)
    half = run(tmp_path / 'b', max_iters=2, dtype='float16')
    assert losses(half) == losses(plain)
    assert 'float32, float16 was asked for, and is for cuda alone' in capsys.readouterr().out
    assert last(tmp_path / 'b')['scaler'] == {}
    assert pick_dtype('auto', 'cpu')[0] == torch.float32
    assert pick_dtype('bfloat16', 'cpu')[0] == pick_dtype('bfloat16', 'mps')[0] == torch.bfloat16


@pytest.mark.parametrize(('dtype', 'product', 'layer', 'words'), [
    ('auto', 0.3, 0.55, 'bfloat16 would take about 0.6 of the time here: --dtype=bfloat16'),
    ('auto', 0.3, 0.9, ''), ('auto', 0.3, 1.4, ''), ('auto', 400.0, math.nan, ''), ('float32', 0.3, 0.5, ''),
    ('bfloat16', 0.3, 0.5, ''), ('bfloat16', 0.9, 1.1, ''),
    ('bfloat16', 0.3, 1.4, 'bfloat16 takes 1.4 times as long as float32 here: --dtype=float32'),
    ('bfloat16', 400.0, math.nan, 'bfloat16 takes 400.0 times as long as float32 here: --dtype=float32')])
def test_a_cpu_that_learns_faster_in_another_precision_is_reported_and_decides_nothing(
        dtype: str, product: float, layer: float, words: str, run: Run, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(device, 'time_in_bfloat16', lambda rows, width: product)
    monkeypatch.setattr(device, 'layer_in_bfloat16', lambda config: layer)
    run(tmp_path, max_iters=1, dtype=dtype)
    said = [line for line in capsys.readouterr().out.splitlines() if ' of the time here' in line or ' times as' in line]
    assert said == [words] * bool(words)
    precision = 'bfloat16' if dtype == 'bfloat16' else 'float32'
    assert last(tmp_path)['compute'] == {'device': 'cpu', 'dtype': precision}


def test_both_precisions_are_measured_and_nothing_is_drawn_at_random() -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    assert 0 < device.time_in_bfloat16(64, 32) < math.inf
    assert 0 < device.layer_in_bfloat16(GPTConfig(16, 8, 1, 2, 32)) < math.inf
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]


def test_a_resumed_run_keeps_its_precision_on_the_same_type_of_device(
        run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with the same bits as one that was never interrupted; a setting, or another device, takes precedence."""
    run(tmp_path / 'whole', max_iters=4, dtype='bfloat16')
    run(tmp_path / 'parts', max_iters=2, dtype='bfloat16')
    shutil.copytree(tmp_path / 'parts', tmp_path / 'other')
    shutil.copytree(tmp_path / 'parts', tmp_path / 'moved')
    capsys.readouterr()
    run(tmp_path / 'parts', max_iters=4, init_from='resume')
    said = capsys.readouterr().out
    assert 'bfloat16, as before' in said and '(was bfloat16)' not in said
    for part in ('model', 'optimizer'):
        assert differences(last(tmp_path / 'parts')[part], last(tmp_path / 'whole')[part]) == []

    run(tmp_path / 'other', max_iters=4, init_from='resume', dtype='float32')
    assert 'float32, as asked' in capsys.readouterr().out
    assert last(tmp_path / 'other')['compute']['dtype'] == 'float32'

    path = tmp_path / 'moved/ckpt.pt'
    torch.save(torch.load(path) | {'compute': {'device': 'cuda', 'dtype': 'float16'}}, path)
    run(tmp_path / 'moved', max_iters=4, init_from='resume')
    assert 'float32, which is sound on every cpu (it was float16 on cuda)' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The settings


def block_of_settings() -> list[str]:
    names = []
    for node in ast.parse((ROOT / 'train.py').read_text(encoding='utf-8')).body:
        if isinstance(node, ast.FunctionDef):
            break
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return names


def test_every_setting_is_read_somewhere() -> None:
    names = block_of_settings()
    assert {'out_dir', 'seed', 'deterministic', 'n_layer'} <= set(names)
    functions = [node for node in ast.parse((ROOT / 'train.py').read_text(encoding='utf-8')).body
                 if isinstance(node, ast.FunctionDef)]
    read = {node.id for function in functions for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for file in ('plan.py', 'init_from.py'):  # they take settings by name
        text = (ROOT / 'plaingpt' / file).read_text(encoding='utf-8')
        read |= set(re.findall(r'(?:settings|self)\.(\w+)', text))
    read |= set(checkpoint.SHAPE)  # a resume compares these
    assert [name for name in names if name not in read] == []


def test_the_settings_that_a_plan_reads_have_the_types_of_train_py() -> None:
    declared = inspect.get_annotations(train)
    for field in dataclasses.fields(RunSettings):
        if field.name != 'given':
            assert field.type in (declared[field.name], str), field.name


def test_nothing_assigns_to_a_setting() -> None:
    tree = ast.parse((ROOT / 'train.py').read_text(encoding='utf-8'))
    names = set(block_of_settings())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assigned = {node.id for function in functions for node in ast.walk(function)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert not assigned & names


def test_a_run_takes_every_setting_of_nanogpt_at_once(run: Run, tmp_path: Path) -> None:
    rows = run(tmp_path, eval_interval=2, log_interval=1, eval_iters=1, eval_only=False, always_save_checkpoint=True,
               init_from='scratch', wandb_log=False, wandb_project='owt', wandb_run_name='gpt2',
               gradient_accumulation_steps=2, batch_size=2, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.1,
               bias=True, learning_rate=1e-3, max_iters=3, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0,
               decay_lr=True, warmup_iters=1, lr_decay_iters=3, min_lr=1e-4, backend='nccl', device='cpu',
               dtype='float32', compile=False)
    assert [row['step'] for row in rows] == [0, 1, 2, 3]
    assert last(tmp_path)['model_args'] == {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 8, 'bias': True,
                                            'vocab_size': last(tmp_path)['model_args']['vocab_size'], 'dropout': 0.1}


@pytest.mark.parametrize('change', [
    {'seed': 7}, {'dropout': 0.3}, {'bias': True}, {'tie_weights': False}, {'weight_decay': 1.0},
    {'beta1': 0.5}, {'beta2': 0.5}, {'grad_clip': 0.01}, {'learning_rate': 0.02}, {'min_lr': 5e-3}, {'warmup_iters': 0},
    {'schedule': 'linear'}, {'decay_lr': False}, {'lr_decay_iters': 4}, {'batch_size': 3}, {'total_batch_size': 64},
    {'gradient_accumulation_steps': 3}, {'block_size': 8}, {'n_head': 4}, {'n_layer': 1}, {'vocab_size': 256},
    {'max_epochs': 0.02},
], ids=str)
def test_each_setting_of_learning_changes_what_is_learned(run: Run, tmp_path: Path, change: dict[str, Any],
                                                          plain_losses: list[float]) -> None:
    changed = losses(run(tmp_path, max_iters=6, eval_interval=100, **change))
    assert len(changed) == 6
    assert changed != plain_losses
    assert all(math.isfinite(loss) for loss in changed)


@pytest.fixture(scope='module')
def plain_losses(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp('plain')
    train.main(arguments(folder, tiny_dataset, {'max_iters': 6, 'eval_interval': 100}))
    return losses(rows_of(folder))


# ------------------------------------------------------------------------------------------------
# A run


@pytest.mark.usefixtures('float64')
def test_accumulation_changes_nothing_but_rounding(run: Run, tmp_path: Path) -> None:
    """The same eight windows make a step, cut into 1, 2, 4 and 8 micro-batches, and into 3, the last of them short."""
    whole = run(tmp_path / 'whole', batch_size=8, gradient_accumulation_steps=1)
    for batch_size, count in [(4, 2), (2, 4), (1, 8), (3, None)]:
        cut = tmp_path / str(batch_size)
        rows = run(cut, batch_size=batch_size, gradient_accumulation_steps=count or 40,
                   total_batch_size=0 if count else 8 * 16)
        assert_equal_to_rounding(losses(rows), losses(whole))
        assert_equal_to_rounding(losses(rows, 'grad_norm'), losses(whole, 'grad_norm'))
        assert_equal_learning(last(cut), last(tmp_path / 'whole'))
    assert losses(whole)[-1] < losses(whole)[0] - 0.3, 'and the run learns'


def test_max_iters_updates_are_made_and_no_more(run: Run, tmp_path: Path) -> None:
    rows = run(tmp_path, max_iters=7)
    assert [row['step'] for row in rows if 'loss' in row] == list(range(7))
    assert [row['step'] for row in rows if 'val_loss' in row] == [0, 5, 7]
    state = last(tmp_path)
    assert state['iter_num'] == 7
    assert {moments['step'].item() for moments in state['optimizer']['state'].values()} == {7}
    assert rows[6]['tokens'] == 7 * 8 * 16
    status = json.loads((tmp_path / 'status.json').read_text(encoding='utf-8'))
    assert (status['state'], status['step'], status['exit_code']) == ('done', 7, 0)


def test_a_run_without_updates_evaluates_and_leaves(run: Run, tmp_path: Path) -> None:
    assert [row['step'] for row in run(tmp_path, max_iters=0)] == [0]
    assert not (tmp_path / 'ckpt.pt').exists()


def test_max_epochs_ends_the_run_and_the_schedule(run: Run, tmp_path: Path, tiny_dataset: Path) -> None:
    order = Order(len(open_split(tiny_dataset, 'train', 16, 128)), 16, 1337)
    steps = math.ceil(0.02 * order.epoch / 8)
    rows = run(tmp_path, max_epochs=0.02, max_iters=1000, lr_decay_iters=1000, eval_interval=100)
    assert len(losses(rows)) == steps == last(tmp_path)['iter_num']
    assert losses(rows, 'lr') == [train.lr_at(step, steps) for step in range(steps)]
    assert len(losses(run(tmp_path / 'short', max_epochs=0.02, max_iters=3))) == 3, 'whichever comes first'


def test_the_console_has_the_lines_that_people_parse(run: Run, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, log_interval=2)
    out = capsys.readouterr().out
    assert re.findall(r'^tokens per iteration will be: (\S+)', out, re.MULTILINE) == ['128']
    assert re.findall(r'^number of parameters: (\d+\.\d\d)M$', out, re.MULTILINE) == ['0.01']
    assert out.count(f'saving checkpoint to {tmp_path}\n') == 2
    steps = re.findall(r'^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$', out, re.MULTILINE)
    assert steps == [(str(row['step']), f'{row["train_loss"]:.4f}', f'{row["val_loss"]:.4f}')
                     for row in rows if 'val_loss' in row]
    iters = re.findall(r'^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d\d)ms', out, re.MULTILINE)
    assert [int(step) for step, _, _ in iters] == [0, 2, 4, 6, 8, 9], 'every second step, and the last'
    assert [loss for _, loss, _ in iters] == [f'{loss:.4f}' for loss in losses(rows)]
    assert 'mfu' not in out, 'the peak speed of a CPU is unknown'
    assert re.search(r'^device cpu, as asked; float32, .*; not compiled, ', out, re.MULTILINE)
    assert out.rstrip().endswith(f'python sample.py --out_dir={tmp_path}')
    assert 'ckpt.pt' in out.splitlines()[-2]


def test_a_row_holds_what_was_measured(run: Run, tmp_path: Path) -> None:
    rows = run(tmp_path)
    learned = {'step', 'loss', 'lr', 'grad_norm', 'tokens', 'skipped'}
    assert set(rows[0]) == learned | {'train_loss', 'val_loss', 'val_perplexity', 'val_accuracy', 'val_bits_per_byte',
                                       'val_loss_stderr'}
    assert set(rows[1]) == learned
    raw = json.loads((tmp_path / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()[1])
    assert raw['tokens_per_second'] > 0
    assert raw['peak_memory_bytes'] > 1e7


def test_samples_are_drawn_before_the_first_step_between_and_after_the_last(run: Run, tmp_path: Path) -> None:
    rows = run(tmp_path, max_iters=9, sample_interval=4, sample_tokens=12, sample_start='import')
    text = (tmp_path / 'samples.txt').read_text(encoding='utf-8')
    assert re.findall(r'^=== step (\d+) ===$', text, re.MULTILINE) == ['0', '4', '8', '9']
    samples = re.split(r'^=== step \d+ ===\n', text, flags=re.MULTILINE)[1:]
    assert all(sample.startswith('import') for sample in samples)
    assert {len(sample) for sample in samples} == {len('import') + 12 + 2}
    assert samples[0] != samples[-1]
    assert losses(rows) == losses(run(tmp_path / 'none', max_iters=9)), 'samples do not change what is learned'


def test_a_sample_whose_start_the_corpus_cannot_write_continues_its_validation_text_and_says_so(
        run: Run, tmp_path: Path, tiny_text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for start in ('☃', ''):
        run(tmp_path / f'from {len(start)}', max_iters=2, sample_interval=5, sample_tokens=5, sample_start=start)
        assert f'--sample_start={start!r} cannot be written in this vocabulary' in capsys.readouterr().out
        text = (tmp_path / f'from {len(start)}' / 'samples.txt').read_text(encoding='utf-8')
        cut = len(tiny_text) * 9 // 10
        assert text.startswith(f'=== step 0 ===\n{tiny_text[cut:cut + 8]}')


def test_a_floor_above_the_peak_of_the_learning_rate_is_refused(run: Run, tmp_path: Path) -> None:
    assert '--min_lr=0' in refused(run, tmp_path, learning_rate=1e-5, min_lr=6e-5, decay_lr=True, code=errors.COMMAND)
    run(tmp_path, learning_rate=1e-5, min_lr=6e-5, decay_lr=False, max_iters=1)


def test_a_resume_on_another_corpus_is_refused_unless_asked_for(run: Run, tmp_path: Path,
                                                                tiny_dataset: Path) -> None:
    other = tmp_path / 'other'
    shutil.copytree(tiny_dataset, other)
    meta = json.loads((other / 'meta.json').read_text(encoding='utf-8'))
    (other / 'train.bin').write_bytes((other / 'train.bin').read_bytes()[:-2000])
    (other / 'meta.json').write_text(json.dumps(meta | {'splits': {}}), encoding='utf-8')
    run(tmp_path / 'run', max_iters=2, eval_interval=1)
    run(tmp_path / 'run', max_iters=3, eval_interval=1, init_from='resume')
    before = (tmp_path / 'run/ckpt.pt').read_bytes()
    message = refused(run, tmp_path / 'run', max_iters=4, init_from='resume', dataset=str(other), code=errors.DATA)
    assert all(word in message for word in ('42,506', '43,506', str(other), '--ignore_data_change=True'))
    assert (tmp_path / 'run/ckpt.pt').read_bytes() == before
    run(tmp_path / 'run', max_iters=4, init_from='resume', dataset=str(other), ignore_data_change=True)
    assert last(tmp_path / 'run')['iter_num'] == 4


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the windows that training reads, by where they start, one step after the other."""
    starts: list[int] = []

    def noting(corpus: token_files.TokenFile, of_step: Integers, *rest: Any) -> Iterator[Part]:
        starts.extend(of_step.tolist())
        return parts_of(corpus, of_step, *rest)

    monkeypatch.setattr(train, 'parts_of', noting)
    return starts


def test_a_resume_with_another_batch_reads_the_next_window_and_counts_tokens_epochs_and_steps_from_there(
        run: Run, tmp_path: Path, tiny_dataset: Path, read: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    order = Order(len(open_split(tiny_dataset, 'train', 16, 128)), 16, 1337)
    common: dict[str, Any] = {'gradient_accumulation_steps': 1, 'lr_decay_iters': 1000}
    run(tmp_path, max_iters=6, **common)  # of 4 windows, 64 tokens
    run(tmp_path, max_iters=8, init_from='resume', **common, batch_size=8)
    assert (last(tmp_path)['windows'], last(tmp_path)['windows_before']) == (40, 0)
    epochs = {'max_epochs': 50 / order.epoch, 'max_iters': 1000}
    rows = run(tmp_path, init_from='resume', **common, **epochs, total_batch_size=48)
    assert read == order.starts(0, 52).tolist(), 'each window once, and in order'
    assert losses(rows, 'tokens') == [64, 128, 192, 256, 320, 384, 512, 640, 688, 736, 784, 832]
    assert last(tmp_path)['tokens'] == 832
    assert f'12 iterations are {52 / order.epoch:.2f} epochs\n' in capsys.readouterr().out
    settings = TINY | common | epochs | {'total_batch_size': 96, 'max_epochs': 1.0, 'init_from': 'resume', 'plan': True}
    train.main(arguments(tmp_path, tiny_dataset, settings))
    left = math.ceil((order.epoch - 52) / 6)
    assert (f'the run: {12 + left:,} steps, {832 + left * 96:,} tokens, 1.0 epochs; ') in capsys.readouterr().out


def test_another_corpus_is_read_from_its_first_window_on_and_a_line_says_so(
        run: Run, tmp_path: Path, tiny_dataset: Path, read: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(tiny_dataset, tmp_path / 'other'))
    meta = json.loads((other / 'meta.json').read_text(encoding='utf-8'))
    (other / 'meta.json').write_text(json.dumps(meta | {'splits': {}}), encoding='utf-8')
    (other / 'train.bin').write_bytes((other / 'train.bin').read_bytes()[:-2000])
    order = Order(len(open_split(other, 'train', 16, 128)), 16, 1337)
    out, line = tmp_path / 'run', 'the corpus or block_size has changed: the corpus is read from its first window on\n'
    run(out, max_iters=5)
    changes: dict[str, Any] = {'init_from': 'resume', 'dataset': other, 'max_epochs': 30 / order.epoch}
    assert line not in capsys.readouterr().out
    run(out, **changes, ignore_data_change=True, max_iters=7)
    assert line in capsys.readouterr().out
    rows = run(out, **changes, max_iters=1000)
    assert line not in capsys.readouterr().out
    assert read[40:] == order.starts(0, 32).tolist()
    assert losses(rows, 'tokens') == [128 * step for step in range(1, 10)]
    assert {name: last(out)[name] for name in ('iter_num', 'windows', 'windows_before', 'tokens')} == {
        'iter_num': 9, 'windows': 72, 'windows_before': 40, 'tokens': 1152}
    longer = refused(run, out, init_from='resume', dataset=other, block_size=32, code=errors.COMMAND)
    assert longer.startswith('block_size=32 is longer than the 16 positions that this model has learned')
    read.clear()
    run(out, init_from='resume', dataset=other, block_size=8, max_iters=11, strategy='zero1')
    assert line in capsys.readouterr().out
    assert read == Order(order.n_tokens, 8, 1337).starts(0, 16).tolist()
    state = last(out)
    assert [state[name] for name in ('windows', 'windows_before', 'tokens')] == [88, 72, 1280]
    assert state['model']['transformer.wpe.weight'].shape == (8, 16)
    assert not differences(run(out, init_from='resume', dataset=other, max_iters=11, block_size=None), rows_of(out))


def test_a_corpus_that_differs_only_in_the_middle_is_another_one_and_damage_ends_the_run(
        run: Run, tmp_path: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Most of train.bin is reversed: checksums notice the damage; without them, as in other projects' corpora, a sample
    of the file notices that it is another one, and the run says that it checks no more than that."""
    line = 'has no checksums: damage in the middle of a file may go unnoticed\n'
    corpus = Path(shutil.copytree(tiny_dataset, tmp_path / 'corpus'))
    run(tmp_path / 'run', max_iters=2, dataset=corpus)
    assert line not in capsys.readouterr().out
    data, meta = bytearray((corpus / 'train.bin').read_bytes()), (corpus / 'meta.json').read_bytes()
    (corpus / 'meta.json').write_text(json.dumps(json.loads(meta) | {'splits': {}}), encoding='utf-8')
    run(tmp_path / 'bare', max_iters=2, dataset=corpus)
    assert capsys.readouterr().out.count(f'{corpus} {line}') == 1
    data[4096:-4096] = data[4096:-4096][::-1]
    (corpus / 'train.bin').write_bytes(data)
    message = refused(run, tmp_path / 'bare', max_iters=4, init_from='resume', dataset=corpus, code=errors.DATA)
    assert 'is not the one that this run has read' in message and message.count('43,506 tokens') == 2
    (corpus / 'meta.json').write_bytes(meta)
    message = refused(run, tmp_path / 'run', max_iters=4, init_from='resume', dataset=corpus, code=errors.DATA)
    assert re.match(rf'{corpus}/train.bin is damaged: bytes \d', message) and 'prepare.py' in message
    assert last(tmp_path / 'run')['iter_num'] == 2


def test_evaluation_and_logging_do_not_change_what_is_learned(run: Run, tmp_path: Path, tiny_dataset: Path) -> None:
    seldom = run(tmp_path / 'seldom', eval_interval=100, dropout=0.1)
    often = run(tmp_path / 'often', eval_interval=1, eval_iters=1, log_interval=3, dropout=0.1, hellaswag_interval=1,
                hellaswag=tiny_dataset / 'hellaswag.jsonl')
    assert [row['loss'] for row in seldom if row['step'] in (0, 3, 6, 9)] == losses(often)
    assert not differences(last(tmp_path / 'seldom')['model'], last(tmp_path / 'often')['model'])


def test_a_loss_that_is_not_finite_ends_the_run_with_its_own_code(run: Run, tmp_path: Path) -> None:
    message = refused(run, tmp_path, learning_rate=1e18, eval_interval=100, code=errors.NOT_FINITE)
    assert re.match(r'nothing is finite any more: ', message)
    assert '--learning_rate' in message
    status = json.loads((tmp_path / 'status.json').read_text(encoding='utf-8'))
    assert (status['state'], status['exit_code']) == ('failed', 5)


def test_an_evaluation_that_is_not_finite_is_never_the_best(run: Run, tmp_path: Path) -> None:
    refused(run, tmp_path, learning_rate=1e18, eval_interval=1, log_interval=100, max_iters=200,
            code=errors.NOT_FINITE)
    for name in ('best.pt', 'ckpt.pt'):
        if (tmp_path / name).exists():
            state = checkpoint.load(tmp_path / name)
            assert all(weight.isfinite().all() for weight in state['model'].values()), 'no broken weight was saved'


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_in_a_step_processes_add_up_once_and_a_gpu_is_waited_for_once(
        run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Each of these ways to a number of Python waits for a GPU that computes it; here they are counted on a CPU."""
    monkeypatch.setattr('plaingpt.machines.device.pick_dtype', lambda name, device: (dtype, 'for a test'))
    counts: Counter[str] = Counter()

    def counted(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            counts[name] += threading.current_thread() is threading.main_thread()
            return do(*arguments, **options)

        return counting

    monkeypatch.setattr(processes, 'total', counted('exchanges', processes.total))
    for way in ('item', 'tolist', 'cpu', 'numpy', '__bool__', '__float__', '__int__', '__index__'):
        monkeypatch.setattr(torch.Tensor, way, counted('waits', getattr(torch.Tensor, way)))
    of_runs = []
    for steps in (3, 8):
        counts.clear()
        run(tmp_path / str(steps), max_iters=steps, eval_interval=100)
        of_runs.append(counts.copy())
    assert of_runs[1] - of_runs[0] == {'exchanges': 5, 'waits': 5}


# ------------------------------------------------------------------------------------------------
# Checks


def test_overfit_single_batch_passes_on_a_model_that_learns(run: Run, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, overfit_single_batch=True, max_iters=120, lr_decay_iters=120, learning_rate=0.03, n_embd=32,
        batch_size=2, gradient_accumulation_steps=1)
    assert re.search(r'^PASS: the loss on one batch went from 4\.\d+ to 0\.\d+', capsys.readouterr().out, re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir()] == ['overfit'], 'the check leaves a run in out_dir alone'
    assert not (tmp_path / 'overfit/ckpt.pt').exists()


def test_overfit_single_batch_fails_on_a_model_that_does_not_learn(run: Run, tmp_path: Path) -> None:
    message = refused(run, tmp_path, overfit_single_batch=True, learning_rate=0, min_lr=0, code=errors.CHECK_FAILED)
    assert message.startswith('FAIL: the loss on one batch went from ')


def test_eval_only_evaluates_whatever_else_is_asked_for(run: Run, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, eval_only=True, overfit_single_batch=True)
    out = capsys.readouterr().out
    assert re.search(r'^step 0: train loss \d', out, re.MULTILINE)
    assert 'iterations are' not in out and 'one batch' not in out


def test_eval_only_measures_and_touches_nothing(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    run(tmp_path, eval_only=True, init_from='resume', max_iters=3)
    out = capsys.readouterr().out
    assert f'step 10: train loss {rows[-1]["train_loss"]:.4f}, val loss {rows[-1]["val_loss"]:.4f}\n' in out
    assert 'saving' not in out
    assert not re.search('^iter ', out, re.MULTILINE)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    run(tmp_path / 'new', eval_only=True)
    assert not (tmp_path / 'new').exists() or not any((tmp_path / 'new').iterdir())


# ------------------------------------------------------------------------------------------------
# Interruption


def test_a_run_resumed_from_any_of_five_points_ends_bit_for_bit_like_the_one_that_was_not_interrupted(
        run: Run, tmp_path: Path, tiny_dataset: Path) -> None:
    """Each checkpoint of one run is continued alone, with the files that the run had left by then: with dropout, steps
    of three micro-batches, the last of them short, and evaluations and questions on the way."""
    settings = {'dropout': 0.1, 'batch_size': 3, 'total_batch_size': 7 * 16, 'eval_interval': 3, 'max_iters': 17,
                'lr_decay_iters': 17, 'keep': 10, 'sample_interval': 4, 'sample_tokens': 5, 'hellaswag_interval': 2,
                'hellaswag': tiny_dataset / 'hellaswag.jsonl'}
    whole = run(tmp_path / 'whole', **settings)
    assert [row['step'] for row in whole if 'hellaswag_acc_norm' in row] == [*range(0, 17, 2), 17]
    end = last(tmp_path / 'whole')
    assert end['best']['loss'][1] > 0
    samples = (tmp_path / 'whole/samples.txt').read_bytes()
    for age, step in [(1, 15), (2, 12), (3, 9), (4, 6), (5, 3)]:
        cut = tmp_path / str(step)
        cut.mkdir()
        shutil.copy(tmp_path / f'whole/ckpt.{age}.pt', cut / 'ckpt.pt')
        for name in ('metrics.jsonl', 'samples.txt'):  # these go further: the run was not killed at once
            shutil.copy(tmp_path / 'whole' / name, cut / name)
        assert last(cut)['iter_num'] == step
        assert differences(last(cut)['model'], end['model'])
        rows = run(cut, init_from='resume', **settings)
        assert rows == whole
        for part in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'best', 'scaler', 'data', 'tokenizer'):
            assert not differences(last(cut)[part], end[part]), part
        assert (cut / 'samples.txt').read_bytes() == samples


def wait_for(process: subprocess.Popen[str], text: str) -> list[str]:
    """Return the lines that a process has printed, up to the one with `text` in it."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f'it ended before it said {text!r}:\n' + ''.join(lines))


@pytest.mark.slow
def test_a_run_that_was_killed_resumes_as_if_nothing_had_happened(run: Run, tmp_path: Path, tiny_dataset: Path) -> None:
    """A real process gets a real SIGKILL, between two checkpoints, at step 27, at which it waits to be killed;
    `init_from=auto` starts the first and the second."""
    settings = {'dropout': 0.1, 'eval_interval': 20, 'max_iters': 60, 'lr_decay_iters': 60}
    whole = run(tmp_path / 'whole', **settings)
    killed = tmp_path / 'killed'
    command = arguments(killed, tiny_dataset, settings | {'init_from': 'auto'})
    with subprocess.Popen([sys.executable, '-c', HALTING, *command], cwd=ROOT, text=True, encoding='utf-8',
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for(process, 'saving checkpoint')
        wait_for(process, 'iter 27:')
        process.kill()
    assert process.returncode == -signal.SIGKILL
    step = last(killed)['iter_num']
    assert 20 <= step < 60, 'the run was killed on its way'
    rows = run(killed, **settings | {'init_from': 'auto'})
    assert rows == whole
    for part in ('model', 'optimizer', 'best', 'iter_num'):
        assert not differences(last(killed)[part], last(tmp_path / 'whole')[part]), part


def test_a_kill_during_the_first_save_leaves_no_run(run: Run, tmp_path: Path) -> None:
    """Half a file under its temporary name is not a checkpoint: 'auto' starts over, and so does 'scratch'."""
    (tmp_path / 'ckpt.new.pt').write_bytes(b'PK half a checkpoint')
    first = run(tmp_path, init_from='auto', max_iters=2)
    assert last(tmp_path)['iter_num'] == 2
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'ckpt.new.pt').write_bytes(b'')
    assert run(other, max_iters=2) == first


def test_a_finished_run_is_continued_by_more_steps(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / 'whole', dropout=0.1, eval_interval=4, max_iters=12, lr_decay_iters=12)
    run(tmp_path / 'cut', dropout=0.1, eval_interval=4, max_iters=8, lr_decay_iters=12)
    assert run(tmp_path / 'cut', dropout=0.1, eval_interval=4, max_iters=12, lr_decay_iters=12,
               init_from='resume') == whole
    assert not differences(last(tmp_path / 'cut')['optimizer'], last(tmp_path / 'whole')['optimizer'])
    again = run(tmp_path / 'cut', dropout=0.1, eval_interval=4, max_iters=12, lr_decay_iters=12, init_from='resume')
    assert again == whole, 'nothing was left to do'


def flip(path: Path, byte: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if byte < 0 else byte] ^= 4
    path.unlink()  # best.pt may be the same file
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_a_line_says_so(
        run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(tmp_path, dropout=0.1)
    end = last(tmp_path)
    flip(tmp_path / 'ckpt.pt')
    refused(checkpoint.load, tmp_path / 'ckpt.pt', code=errors.CHECKPOINT)
    capsys.readouterr()
    assert run(tmp_path, dropout=0.1, init_from='resume') == whole
    error = capsys.readouterr().err
    assert f'{tmp_path}/ckpt.pt is damaged' in error
    assert f'{tmp_path}/ckpt.1.pt is used in its place, from step 5' in error
    assert not differences(last(tmp_path)['model'], end['model'])

    for path in tmp_path.glob('ckpt*.pt'):
        path.write_bytes(b'')
    message = refused(run, tmp_path, init_from='resume', code=errors.CHECKPOINT)
    assert f'{tmp_path}/ckpt.pt' in message
    assert all(path.stat().st_size == 0 for path in tmp_path.glob('ckpt*.pt')), 'no new run replaced them'
    refused(run, tmp_path, init_from='auto', code=errors.CHECKPOINT)


# ------------------------------------------------------------------------------------------------
# Checkpoints on the way


@pytest.mark.usefixtures('float64')  # so wild a run is then the same on every machine
def test_the_newest_checkpoints_are_kept_and_the_best_is_one_more(run: Run, tmp_path: Path) -> None:
    rows = run(tmp_path, eval_interval=2, max_iters=14, lr_decay_iters=14, learning_rate=0.1, decay_lr=False,
               keep=2)
    found = {path.name: checkpoint.load(path)['iter_num'] for path in tmp_path.glob('*.pt')}
    by_step = {row['step']: row['val_loss'] for row in rows if 'val_loss' in row}
    best = min(by_step, key=lambda step: by_step[step] if step else math.inf)
    assert best not in (12, 14), 'at this constant rate the loss rises in the end'
    assert found == {'ckpt.pt': 14, 'ckpt.1.pt': 12, 'best.pt': best}
    for name in found:
        state = checkpoint.load(tmp_path / name)
        reached = {step: loss for step, loss in by_step.items() if step <= state['iter_num']}
        assert state['best_val_loss'] == min(reached.values()) == state['best']['loss'][0]
        assert by_step[state['best']['loss'][1]] == state['best_val_loss']


@pytest.mark.usefixtures('float64')
def test_without_always_save_checkpoint_only_improvements_are_saved(run: Run, tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, eval_interval=2, max_iters=14, lr_decay_iters=14, learning_rate=0.1, decay_lr=False,
               keep=20, always_save_checkpoint=False)
    improved, best = [], math.inf
    for row in rows:
        if row.get('val_loss', math.inf) < best:
            best = row['val_loss']
            improved += [row['step']] if row['step'] else []
    assert 0 < len(improved) < 7
    assert capsys.readouterr().out.count('saving checkpoint') == len(improved)
    assert sorted(checkpoint.load(path)['iter_num'] for path in tmp_path.glob('ckpt*.pt')) == improved
    assert checkpoint.load(tmp_path / 'best.pt')['iter_num'] == last(tmp_path)['iter_num'] == improved[-1]


def test_the_best_value_and_its_step_are_kept_across_a_resume(run: Run, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    best = last(tmp_path)['best']
    assert set(best) == {'loss', 'perplexity', 'accuracy', 'bits_per_byte'}
    capsys.readouterr()
    run(tmp_path, init_from='resume', max_iters=12, learning_rate=1.0, min_lr=1.0)
    assert last(tmp_path)['best']['loss'] == best['loss'], 'later losses were worse'
    assert checkpoint.load(tmp_path / 'best.pt')['iter_num'] == best['loss'][1]
    shown = re.findall(r'^(best|at step) +(\S+)', capsys.readouterr().out, re.MULTILINE)
    assert shown[-2:] == [('best', f'{best["loss"][0]:.4f}'), ('at step', str(best['loss'][1]))]


def test_a_run_starts_over_only_if_asked_to(run: Run, tmp_path: Path) -> None:
    rows = run(tmp_path, sample_interval=5, sample_tokens=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for init_from in ('scratch', 'start', str(tmp_path / 'ckpt.pt')):
        message = refused(run, tmp_path, init_from=init_from, code=errors.COMMAND)
        assert str(tmp_path) in message
        assert '--init_from=resume' in message
        assert '--overwrite=True' in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    evaluated = {name: x for name, x in rows[5].items() if name == 'step' or 'val_' in name or 'train_' in name}
    assert run(tmp_path, overwrite=True, max_iters=5, init_from='start') == [*rows[:5], evaluated]
    assert [path.name for path in sorted(tmp_path.glob('*.pt'))] == ['best.pt', 'ckpt.pt']
    assert (tmp_path / 'samples.txt').read_text(encoding='utf-8') == '', 'the new run drew none'


def test_resume_takes_the_shape_from_the_checkpoint_and_refuses_another(run: Run, tmp_path: Path) -> None:
    run(tmp_path, bias=True, gelu='exact', tie_weights=False)
    run(tmp_path, init_from='resume', max_iters=12, total_batch_size=8 * 16, n_layer=None, n_head=None, n_embd=None,
        block_size=None)
    state = last(tmp_path)
    assert state['iter_num'] == 12
    config = checkpoint.config_of(state)
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (2, 2, 16, 16)
    assert (config.bias, config.gelu, config.tie_weights) == (True, 'exact', False)
    others: dict[str, Any] = {'n_layer': 3, 'n_head': 4, 'n_embd': 32, 'bias': False, 'gelu': 'tanh',
                              'vocab_size': 512, 'tie_weights': True}
    for name, value in others.items():
        message = refused(run, tmp_path, init_from='resume', max_iters=14, **{name: value}, code=errors.COMMAND)
        assert f'{name}={value} was given' in message
        assert f' has {getattr(config, name)}\n' in message
    assert last(tmp_path)['iter_num'] == 12
    run(tmp_path, init_from='resume', max_iters=13, bias=True, vocab_size=0)


def test_a_resumed_run_takes_new_settings_for_its_optimizer(run: Run, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    moments = last(tmp_path)['optimizer']['state']
    capsys.readouterr()
    run(tmp_path, init_from='resume', max_iters=11, weight_decay=0.5, beta2=0.5, learning_rate=0.03, decay_lr=False)
    decayed, others = last(tmp_path)['optimizer']['param_groups']
    assert (decayed['weight_decay'], others['weight_decay'], decayed['betas']) == (0.5, 0.0, (0.9, 0.5))
    assert decayed['lr'] == others['lr'] == 0.03
    assert differences(last(tmp_path)['optimizer']['state'], moments)
    line = re.search(r'^resuming at step 10, with (.*)$', capsys.readouterr().out, re.MULTILINE)
    assert line
    assert {'max_iters=11 (was 10)', 'weight_decay=0.5 (was 0.1)', 'beta2=0.5 (was 0.95)'} <= set(line[1].split(', '))


def test_an_optimizer_may_have_any_number_of_parameter_groups_each_with_its_own_rate(
        run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two = run(tmp_path / 'two', eval_interval=4, max_iters=8)
    monkeypatch.setattr(train, 'parameter_groups', in_three_groups)
    whole = run(tmp_path / 'whole', eval_interval=4, max_iters=8)
    assert losses(whole)[0] == losses(two)[0]
    assert losses(whole)[-1] != losses(two)[-1], 'the tables have learned more slowly'
    run(tmp_path / 'parts', eval_interval=4, max_iters=4)
    assert run(tmp_path / 'parts', eval_interval=4, max_iters=8, init_from='resume') == whole
    tables, matrices, vectors = last(tmp_path / 'parts')['optimizer']['param_groups']
    assert tables['lr'] == matrices['lr'] / 2 == vectors['lr'] / 2 > 0

    out = capsys.readouterr().out
    numbers = [int(number.replace(',', '')) for number in re.findall(r'decayed .*, with ([\d,]+) parameters', out)[-2:]]
    assert sum(numbers) == sum(p.numel() for p in checkpoint.model_of(last(tmp_path / 'parts')).parameters())
    run(tmp_path / 'checked', check=True)
    assert '9 checks passed' in capsys.readouterr().out
    run(tmp_path / 'planned', plan=True)
    assert 'zero1, one of 8' in capsys.readouterr().out


def test_init_from_auto_starts_and_then_continues(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / 'whole', eval_interval=4, max_iters=8)
    run(tmp_path / 'auto', eval_interval=4, max_iters=4, init_from='auto')
    assert run(tmp_path / 'auto', eval_interval=4, max_iters=8, init_from='auto') == whole


def test_a_path_starts_from_the_weights_that_it_holds(run: Run, tmp_path: Path) -> None:
    run(tmp_path / 'first')
    for source in (tmp_path / 'first', tmp_path / 'first/ckpt.pt', tmp_path / 'first/best.pt'):
        out_dir = tmp_path / 'second' / source.name
        rows = run(out_dir, init_from=source, max_iters=3, n_layer=None)
        assert losses(rows)[0] < 4.1, 'the run starts from what was learned'
        assert [row['step'] for row in rows] == [0, 1, 2, 3], 'with steps of its own'
        assert {moments['step'].item() for moments in last(out_dir)['optimizer']['state'].values()} == {3}

    cropped = tmp_path / 'cropped'
    run(cropped, init_from=tmp_path / 'first', block_size=8, max_iters=0, eval_interval=1)
    run(cropped, init_from=tmp_path / 'first', block_size=8, max_iters=1, learning_rate=0, min_lr=0)
    found, expected = last(cropped), last(tmp_path / 'first')
    assert found['model_args']['block_size'] == 8
    assert torch.equal(found['model']['transformer.wpe.weight'], expected['model']['transformer.wpe.weight'][:8])
    assert torch.equal(found['model']['lm_head.weight'], expected['model']['lm_head.weight'])
    message = refused(run, tmp_path / 'longer', init_from=tmp_path / 'first', block_size=32, code=errors.COMMAND)
    assert 'block_size=32' in message
    assert '--block_size=16' in message


def test_weights_that_have_learned_another_tokenizer_are_refused(run: Run, tmp_path: Path, tiny_dataset: Path) -> None:
    run(tmp_path / 'first', max_iters=1)
    other = Path(shutil.copytree(tiny_dataset, tmp_path / 'other'))
    meta = json.loads((other / 'meta.json').read_text(encoding='utf-8'))
    meta |= {'tokenizer': {'name': 'byte', 'eot': False}, 'vocab_size': 256}
    (other / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    message = refused(run, tmp_path / 'second', init_from=tmp_path / 'first', dataset=other, code=errors.DATA)
    assert 'byte' in message
    assert 'char' in message
    refused(run, tmp_path / 'first', init_from='resume', dataset=other, code=errors.DATA)


def test_weights_are_fine_tuned_under_a_new_wandb_run_and_resumed_under_the_old(run: Run, tmp_path: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing(wandb.Wandb):
        def __init__(self, project: str, name: str, run_id: str, out_dir: str, settings: dict[str, Any]) -> None:
            started.append(run_id)

        def row(self, step: int, values: dict[str, float]) -> None:
            """Log no row."""

        def close(self, exit_code: int) -> None:
            """Close nothing."""

    started: list[str] = []
    monkeypatch.setattr(wandb, 'Wandb', Nothing)
    run(tmp_path / 'first', wandb_log=True, max_iters=2)
    run(tmp_path / 'first', wandb_log=True, max_iters=3, init_from='resume')
    run(tmp_path / 'second', wandb_log=True, max_iters=2, init_from=tmp_path / 'first')
    assert started[0] == started[1] == last(tmp_path / 'first')['wandb_run_id'] != ''
    assert started[2] == last(tmp_path / 'second')['wandb_run_id'] != started[0]


def test_a_run_may_be_in_any_thread(run: Run, tmp_path: Path) -> None:
    """A notebook or a server does so: the run has no signals, and the same result."""
    expected = run(tmp_path / 'main', max_iters=3)
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(run, tmp_path / 'thread', max_iters=3).result()
    assert losses(found) == losses(expected)


# ------------------------------------------------------------------------------------------------
# Compiled


def test_without_a_compiler_a_run_is_not_compiled(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('CXX', 'no-such-compiler')
    run(tmp_path, max_iters=1, compile=True)
    assert '; not compiled, as that needs a C++ compiler, no-such-compiler\n' in capsys.readouterr().out


def test_a_compiled_run_compiles_its_blocks_and_its_loss(run: Run, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is replaced by one that returns its argument, and notes each call of that."""
    calls: list[str] = []

    def noting(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments)

        return call

    monkeypatch.setattr(torch, 'compile', noting)
    plain = run(tmp_path / 'plain', max_iters=2)
    assert calls == []
    fast = run(tmp_path / 'fast', max_iters=2, compile=True)
    assert losses(fast) == losses(plain)
    assert calls.count('sum_of_nats') > 0
    assert calls.count('_call_impl') > calls.count('sum_of_nats'), 'blocks are compiled, in evaluation too'


@pytest.mark.slow
@pytest.mark.usefixtures('float64')
def test_a_compiled_run_learns_the_same(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(tmp_path / 'plain', max_iters=4, eval_interval=2, sample_interval=4, sample_tokens=4)
    fast = run(tmp_path / 'fast', max_iters=4, eval_interval=2, sample_interval=4, sample_tokens=4, compile=True)
    assert 'compiled, as asked' in capsys.readouterr().out
    assert_equal_to_rounding(fast, plain)
    assert_equal_learning(last(tmp_path / 'fast'), last(tmp_path / 'plain'))  # under clean names
    resumed = run(tmp_path / 'fast', max_iters=5, init_from='resume', compile=False)
    assert len(losses(resumed)) == 5
