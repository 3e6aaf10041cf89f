"""The curve of another run beside this one's: written down small, read back, and drawn at the same tokens."""
import json
from pathlib import Path

import numpy as np
import pytest

import train
from plaingpt.errors import DATA
from plaingpt.run import reference
from tests.comparing import refused

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, n_steps: int = 2000) -> None:
    """Write the rows of a run that reads 100 tokens in a step, and is evaluated every 500."""
    rows = [{'step': step, **({'loss': 7 / (1 + step / 100), 'tokens': 100 * (step + 1)} if step < n_steps else {}),
             **({'val_loss': 7 / (1 + step / 100)} if step % 500 == 0 else {})} for step in range(n_steps + 1)]
    folder.mkdir(exist_ok=True)
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')


def test_a_curve_that_was_written_down_is_read_back_and_small(tmp_path: Path) -> None:
    write_run(tmp_path / 'run')
    reference.main([str(tmp_path / 'run'), str(tmp_path / 'curve.csv')])
    assert (tmp_path / 'curve.csv').stat().st_size < 20_000
    found = reference.read(str(tmp_path / 'curve.csv'))
    assert found.name == 'curve'
    np.testing.assert_allclose(found.val_loss, [7, 7 / 6, 7 / 11, 7 / 16, 7 / 21], rtol=1e-5)
    np.testing.assert_allclose(found.tokens, [100, 50_100, 100_100, 150_100, 200_000])


def test_a_curve_lies_at_the_steps_at_which_the_other_run_had_read_as_many_tokens() -> None:
    curve = reference.Reference('other', np.array([0.0, 1000.0, 2000.0, 9000.0]), np.array([4.0, 3.0, 2.0, 1.0]))
    x, y = curve.beside(np.array([0.0, 10.0, 20.0]), np.array([0.0, 2000.0, 4000.0]))
    np.testing.assert_allclose(x, [0, 5, 10])
    np.testing.assert_allclose(y, [4, 3, 2])  # the last point is further than this run has come
    assert [len(part) for part in curve.beside(np.array([0.0]), np.array([0.0]))] == [1, 1]


@pytest.mark.parametrize('content', ['', 'step,loss\n1,2\n', 'tokens,val_loss\n1,two\n', 'tokens,val_loss\n', '\0\n'])
def test_what_is_no_curve_is_refused_before_a_run_begins(content: str, tmp_path: Path) -> None:
    path = tmp_path / 'curve.csv'
    path.write_text(content, encoding='utf-8')
    said = refused(train.main, [f'--reference={path}', f'--out_dir={tmp_path / "out"}'], code=DATA)
    assert said.startswith(f'--reference={path} is not the curve of a run: ') and 'plaingpt/run/reference.py' in said
    assert not (tmp_path / 'out').exists()
    assert 'is not the curve' in refused(train.main, ['--reference=nowhere.csv'], code=DATA)


def test_a_run_shows_the_curve_of_another_one_in_its_picture_and_in_its_report(
        tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / 'before.csv').write_text('tokens,val_loss\n0,5.5\n32,4.321\n64,3.5\n10000,1\n', encoding='utf-8')
    settings = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--max_iters=4',
                '--gradient_accumulation_steps=1', '--eval_interval=2', '--eval_iters=1', '--sample_interval=0',
                f'--dataset={tiny_dataset}', '--device=cpu']
    train.main([*settings, f'--out_dir={tmp_path / "alone"}'])
    train.main([*settings, f'--out_dir={tmp_path / "beside"}', f'--reference={tmp_path / "before.csv"}'])
    alone, beside = ((tmp_path / name / 'report.html').read_text(encoding='utf-8') for name in ('alone', 'beside'))
    assert 'another run' not in alone
    assert 'before, another run' in beside and '4.321' in beside
    pictures = [(tmp_path / name / 'loss.png').read_bytes() for name in ('alone', 'beside')]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize('path', sorted((ROOT / 'docs/curves').glob('*.csv')), ids=lambda path: path.name)
def test_each_curve_that_comes_with_the_project_is_one_and_small(path: Path) -> None:
    curve = reference.read(str(path))
    assert len(curve.tokens) >= 4 and curve.val_loss[-1] < curve.val_loss[0] / 1.5
    assert path.stat().st_size < 20_000
