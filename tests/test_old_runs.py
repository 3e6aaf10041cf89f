"""Runs of earlier versions load, evaluate, write text and resume. data/run_0.1.0/README.md describes the files of that
run."""
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate
import sample
import train
from plaingpt.run import checkpoint
from tests.comparing import assert_equal_to_rounding

OLD = Path(__file__).parent / 'data/run_0.1.0'  # saved at step 980 of 1000
COMMAND = ['--n_layer=2', '--n_head=2', '--n_embd=12', '--block_size=16', '--batch_size=3', '--total_batch_size=128',
           '--dropout=0.1', '--max_iters=1000', '--lr_decay_iters=1000', '--warmup_iters=20', '--learning_rate=2e-2',
           '--min_lr=2e-3', '--eval_interval=490', '--eval_iters=4', '--sample_interval=0', '--keep=9',
           '--log_interval=20', '--device=cpu']
LEARNED = ('step', 'loss', 'lr', 'grad_norm', 'tokens')  # evaluation is in float32, whatever the weights are
EXPECTED = json.loads((OLD / 'expected.json').read_text(encoding='utf-8'))
Rows = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures('no_pictures')


def rows_of(run: Path) -> Rows:
    lines = (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: value for name, value in json.loads(line).items()
             if name not in ('tokens_per_second', 'peak_memory_bytes')} for line in lines]


def go_on(run: Path, *changes: str) -> Rows:
    """Resume a copy of the old run and train it to its end. Return the rows of these steps."""
    train.main([f'--dataset={OLD}/corpus', f'--out_dir={run}', *COMMAND, '--init_from=resume', *changes])
    assert checkpoint.load(run / 'ckpt.pt')['iter_num'] == 1000
    before, rows = ([row for row in rows_of(folder) if row['step'] < 980] for folder in (OLD, run))
    assert rows == before, 'the old rows stay'
    return rows_of(run)[len(before):]


def to_float64(tree: Any) -> Any:
    """Return a checkpoint with float64 in place of float32."""
    if isinstance(tree, torch.Tensor):
        return tree.double()
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    return [to_float64(value) for value in tree] if isinstance(tree, list) else tree


def dropped() -> list[int]:
    """Return what dropout drops first: on another platform, or in another version of torch, it may be something
    else."""
    torch.manual_seed(0)
    return torch.nn.functional.dropout(torch.ones(64), 0.1).eq(0).nonzero().flatten().tolist()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a copy of the old run."""
    return Path(shutil.copytree(OLD, tmp_path / 'run'))


def test_an_old_checkpoint_holds_what_it_held(run: Path) -> None:
    state, row = checkpoint.load(run / 'ckpt.pt'), next(row for row in rows_of(OLD) if row['step'] == 980)
    assert (state['iter_num'], state['best']['loss']) == (980, [row['val_loss'], 980])
    assert (state['config']['learning_rate'], state['config']['dropout'], state['tokenizer']['name']) == (
        0.02, 0.1, 'char')
    assert (state['windows'], state['windows_before'], state['tokens']) == (980 * 8, 0, 980 * 128), 'as it counted then'
    assert all(moments['step'] == 980 for moments in state['optimizer']['state'].values())
    evaluate.main([f'--out_dir={run}', f'--dataset={OLD}/corpus', '--eval_iters=4', '--batch_size=3', '--device=cpu'])
    measured, = json.loads((run / 'evaluation.json').read_text(encoding='utf-8'))['measured']
    for name in ('loss', 'accuracy', 'bits_per_byte'):
        assert measured['val'][name] == pytest.approx(row[f'val_{name}'], abs=1e-5)


def test_an_old_run_resumes_as_its_user_would_expect(run: Path) -> None:
    rows, expected = go_on(run), rows_of(OLD)[-3:]
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    assert [row['step'] for row in rows] == [980, 999, 1000]
    assert rows[0]['val_loss'] == pytest.approx(expected[0]['val_loss'], abs=1e-5)
    if dropped() == EXPECTED['dropped']:  # the loss of the first step: in float32, the updates after it may differ
        assert rows[0]['loss'] == pytest.approx(expected[0]['loss'], abs=1e-5)
    assert rows[-1]['val_loss'] == pytest.approx(expected[-1]['val_loss'], abs=0.1), 'about where the old run ended'


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('dropout', [0.0, 0.1])
def test_an_old_run_resumes_to_the_same_losses_in_float64(run: Path, dropout: float) -> None:
    if dropout and dropped() != EXPECTED['dropped']:
        pytest.skip('here, dropout drops something else')
    torch.save(to_float64(checkpoint.load(run / 'ckpt.pt')), run / 'ckpt.pt')
    rows, expected = go_on(run, f'--dropout={dropout}', '--log_interval=1'), EXPECTED[f'rows with dropout {dropout}']
    for name in LEARNED:
        assert_equal_to_rounding([row.get(name) for row in rows], [row.get(name) for row in expected])
    assert rows[-1]['val_loss'] == pytest.approx(expected[-1]['val_loss'], abs=1e-5)


def test_an_old_run_writes_what_it_wrote(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main([f'--out_dir={run}', '--start=The ', '--num_samples=1', '--max_new_tokens=20', '--temperature=0',
                 '--device=cpu'])
    assert capsys.readouterr().out.startswith(EXPECTED['text'] + '\n')
