"""Several processes learn what one learns. This file is also the script that torchrun starts: it trains a list of runs,
one after the other, in one group of processes."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import configurator
import logger
import parallel
import train

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'dropout': 0.1, 'max_iters': 8, 'lr_decay_iters': 8,
    'warmup_iters': 2, 'learning_rate': 1e-2, 'min_lr': 1e-3, 'eval_interval': 4, 'device': 'cpu', 'sample_interval': 4,
    'sample_tokens': 5,
}
RUNS: dict[str, dict[str, Any]] = {
    'four micro-batches': {'batch_size': 2, 'gradient_accumulation_steps': 4, 'eval_iters': 4},
    'three micro-batches': {'batch_size': 2, 'gradient_accumulation_steps': 3, 'eval_iters': 3},
    'a short last one': {'batch_size': 3, 'total_batch_size': 7 * 16, 'eval_iters': 5},
    'one window': {'batch_size': 4, 'total_batch_size': 16, 'eval_iters': 1},
    'more windows than there are': {'batch_size': 5, 'gradient_accumulation_steps': 1, 'eval_iters': 100,
                                    'block_size': 128},
    'no clipping, untied, with biases': {'batch_size': 1, 'gradient_accumulation_steps': 5, 'eval_iters': 7,
                                         'grad_clip': 0, 'tie_weights': False, 'bias': True},
    'resumed': {'batch_size': 2, 'gradient_accumulation_steps': 3, 'eval_iters': 3, 'init_from': 'resume'},
}


def arguments(settings: dict[str, Any]) -> list[str]:
    return [f'--{name}={value}' for name, value in (SETTINGS | settings).items()]


def draw_nothing(log: logger.Logger) -> None:
    """In place of the picture of a run, which costs as much time as a hundred of its steps."""


def main() -> None:
    """Train each run of the file that the command line names."""
    process = parallel.start('cpu', 'nccl')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger.Logger, 'plot', draw_nothing)
        for settings in json.loads(Path(sys.argv[1]).read_text(encoding='utf-8')):
            train.train(process, *configurator.configure(train, arguments(settings)))
    parallel.stop()


def torchrun(processes: int, *command: str) -> str:
    """What a launch prints, which must end well."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    result = subprocess.run([*launch, *command], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=300,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in ('tokens_per_second', 'peak_memory_bytes')}
            for line in lines]


def assert_equal_to_rounding(one: Path, several: Path) -> None:
    """The same steps, losses, metrics and weights."""
    ours, theirs = rows_of(one), rows_of(several)
    assert [row.keys() for row in theirs] == [row.keys() for row in ours]
    for mine, other in zip(ours, theirs, strict=True):
        norms = [row.pop('grad_norm', 0.0) for row in (other, mine)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        assert other == pytest.approx(mine, rel=1e-5)
    first, second = checkpoint.load(one / 'ckpt.pt'), checkpoint.load(several / 'ckpt.pt')
    assert second['iter_num'] == first['iter_num'] == 8
    assert list(second['model']) == list(first['model']), 'clean names'
    for name, weight in first['model'].items():
        torch.testing.assert_close(second['model'][name], weight, atol=2e-5, rtol=1e-4, msg=name)
    assert second['best']['loss'] == pytest.approx(first['best']['loss'], rel=1e-5)
    groups = [state['optimizer']['param_groups'] for state in (first, second)]
    assert groups[0] == groups[1]


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """Every run, in this one process."""
    folder = tmp_path_factory.mktemp('alone')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger.Logger, 'plot', draw_nothing)
        for name, settings in RUNS.items():
            whole = settings | {'init_from': 'scratch'}  # the one to resume too: without an interruption
            train.main(arguments(whole | {'out_dir': folder / name, 'dataset': tiny_dataset}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'names'), [(2, list(RUNS)), (3, ['four micro-batches', 'resumed'])])
def test_several_processes_learn_what_one_learns(alone: Path, tiny_dataset: Path, tmp_path: Path, processes: int,
                                                 names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout; micro-batches that divide among the processes and others, some of which get none at all; evaluation
    on windows that do not divide; and a run that one process began."""
    monkeypatch.setattr(logger.Logger, 'plot', draw_nothing)
    begun = RUNS['resumed'] | {'out_dir': tmp_path / 'resumed', 'dataset': tiny_dataset}
    train.main(arguments(begun | {'max_iters': 4, 'init_from': 'scratch'}))
    plan = [RUNS[name] | {'out_dir': str(tmp_path / name), 'dataset': str(tiny_dataset)} for name in names]
    (tmp_path / 'plan.json').write_text(json.dumps(plan), encoding='utf-8')
    printed = torchrun(processes, __file__, str(tmp_path / 'plan.json'))
    for name in names:
        assert_equal_to_rounding(alone / name, tmp_path / name)
        assert (tmp_path / name / 'samples.txt').read_text(encoding='utf-8') == (
            alone / name / 'samples.txt').read_text(encoding='utf-8')
    n = len(names)
    assert printed.count('saving checkpoint') == 2 * n - 1, 'one process writes, and only where it should'
    assert printed.count('iter 7: ') == n
    assert printed.count(f'{processes} processes; device cpu') == n
    assert printed.count('gloo takes the place of nccl') == n

    train.main(arguments(plan[-1] | {'max_iters': 9}))  # and one process goes on from what several left
    assert checkpoint.load(tmp_path / 'resumed/ckpt.pt')['iter_num'] == 9


@pytest.mark.slow
def test_the_command_of_the_readme_runs_on_two_processes(alone: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    name = 'three micro-batches'
    printed = torchrun(2, 'train.py', str(ROOT / 'config/train_gpt2.py'), *arguments(
        {'out_dir': tmp_path, 'dataset': tiny_dataset, 'log_interval': 1, 'wandb_log': False} | RUNS[name]))
    assert 'iter 7: ' in printed
    assert (tmp_path / 'loss.png').stat().st_size > 1000
    assert json.loads((tmp_path / 'status.json').read_text(encoding='utf-8'))['state'] == 'done'
    assert_equal_to_rounding(alone / name, tmp_path)


if __name__ == '__main__':
    main()
