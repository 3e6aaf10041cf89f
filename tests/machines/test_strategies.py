"""Several processes learn what one process learns, whatever part each of them holds. This file is also the script that
torchrun starts: it trains a list of runs, one after the other, in one group of processes."""
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import configurator
import model
import train
from plaingpt.corpus import batches
from plaingpt.corpus.batches import Part
from plaingpt.machines import processes
from plaingpt.machines.stop import Stop
from plaingpt.machines.watch import Watch
from plaingpt.run import checkpoint
from plaingpt.run.log import Log
from tests.comparing import (
    assert_equal_learning,
    assert_equal_to_rounding,
    differences,
    in_float64,
    in_three_groups,
)
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'block_size': 16, 'dropout': 0.1, 'max_iters': 8, 'lr_decay_iters': 8,
    'warmup_iters': 2, 'learning_rate': 1e-2, 'min_lr': 1e-3, 'eval_interval': 4, 'device': 'cpu', 'sample_interval': 4,
    'sample_tokens': 5, 'hellaswag_interval': 4,
}
MODERN: dict[str, Any] = {
    'arch': 'modern', 'tie_weights': False, 'dropout': 0.0, 'learning_rate': 0.025, 'min_lr': 0.0, 'weight_decay': 0.05,
    'beta1': 0.8, 'grad_clip': 0.0, 'schedule': 'wsd', 'decay_fraction': 0.7, 'warmup_iters': 0,
}
RESUMED = 'resumed, with three parameter groups'
MODERN_PARTS = 'modern, three micro-batches'
RUNS: dict[str, dict[str, Any]] = {
    'four micro-batches': {'batch_size': 2, 'gradient_accumulation_steps': 4, 'eval_iters': 4},
    'three micro-batches': {'batch_size': 2, 'gradient_accumulation_steps': 3, 'eval_iters': 3},
    'a short last one': {'batch_size': 3, 'total_batch_size': 7 * 16, 'eval_iters': 5},
    'one window': {'batch_size': 4, 'total_batch_size': 16, 'eval_iters': 1},
    'more windows than there are': {'batch_size': 5, 'gradient_accumulation_steps': 1, 'eval_iters': 100,
                                    'block_size': 128},
    'no clipping, untied, with biases': {'batch_size': 1, 'gradient_accumulation_steps': 5, 'eval_iters': 7,
                                         'grad_clip': 0, 'tie_weights': False, 'bias': True},
    MODERN_PARTS: MODERN | {'batch_size': 2, 'gradient_accumulation_steps': 3, 'eval_iters': 3},
    'modern, without shortcuts, a short last one': MODERN | {'batch_size': 3, 'total_batch_size': 7 * 16,
                                                             'eval_iters': 5, 'shortcuts': False, 'n_layer': 1},
    RESUMED: {'batch_size': 2, 'gradient_accumulation_steps': 3, 'eval_iters': 3, 'init_from': 'resume'},
}


def arguments(settings: dict[str, Any]) -> list[str]:
    questions = f'{settings["dataset"]}/hellaswag.jsonl'
    return [f'--{name}={value}' for name, value in (SETTINGS | {'hellaswag': questions} | settings).items()]


def draw_nothing(log: Log) -> None:
    """Stand in for the picture of a run, which costs as much time as a hundred of its steps."""


# Several processes compute the loss of these runs in chunks; one process computes it as a whole.
IN_CHUNKS = ('three micro-batches', 'no clipping, untied, with biases', MODERN_PARTS)


@contextmanager
def loss_of(folder: str | Path) -> Iterator[None]:
    """Have the loss of some runs computed for a few tokens at a time, as for a large vocabulary; but of no run that
    compiles its loss."""
    with pytest.MonkeyPatch.context() as patch:
        if Path(folder).name.startswith(IN_CHUNKS) and not Path(folder).name.endswith('compiled'):
            patch.setattr(model, 'MOST_LOGITS', 0)
            patch.setattr(model, 'CHUNK', 1000)
        yield


@contextmanager
def groups_of(folder: str | Path) -> Iterator[None]:
    """Give the optimizer of the run in this folder its three groups of parameters, if it is the run that has them."""
    with pytest.MonkeyPatch.context() as patch:
        if Path(folder).name.startswith(RESUMED):
            patch.setattr(train, 'parameter_groups', in_three_groups)
        yield


def note_tokens(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Have every micro-batch that training reads noted beside the run: a line of JSON in tokens.RANK.jsonl."""
    parts_of = batches.parts_of

    def noting(*arguments: Any) -> Iterator[Part]:
        Path(train.out_dir).mkdir(exist_ok=True)  # the main process may not have made it yet
        for part in parts_of(*arguments):
            with open(Path(train.out_dir, f'tokens.{rank}.jsonl'), 'a', encoding='utf-8') as file:
                print(json.dumps([part.number, part.share, part.x.tolist(), part.y.tolist()]), file=file)
            yield part

    patch.setattr('train.parts_of', noting)


def tokens_of(folder: Path) -> list[list[Any]]:
    """Return the micro-batches that all processes of a run have read, in the order of the steps, as one process reads
    them. Padding is left out."""
    steps: dict[int, list[list[Any]]] = {}
    for path in sorted(folder.glob('tokens.*.jsonl')):
        parts = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
        step, last = -1, sys.maxsize
        for part in parts:
            step, last = step + (part[0] <= last), part[0]
            steps.setdefault(step, []).append(part)
    assert len(steps) >= 8, 'each step has been noted'
    return [part for _, parts in sorted(steps.items()) for part in sorted(parts) if part[1] > 0]


def main() -> None:
    """Train each run of the file that the command line names; in float64, unless the run names a precision."""
    plan = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
    process = processes.start('cpu', 'nccl', shards=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, 'plot', draw_nothing)
        note_tokens(patch, process.rank)
        for run in plan:
            settings, given = configurator.configure(train, arguments(run))
            precision = nullcontext() if 'dtype' in run else in_float64()
            with (precision, groups_of(run['out_dir']), loss_of(run['out_dir']), Stop(0.0) as stop,
                  Watch(process, PATIENT, PATIENT) as watch):
                train.carry_out(process, watch, stop, settings, given)
    processes.stop()


def torchrun(processes: int, *command: str) -> str:
    """Return what a launch prints; it must exit with code 0."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    result = subprocess.run([*launch, *command], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=PATIENT,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-9000:]
    return result.stdout


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in ('tokens_per_second', 'peak_memory_bytes')}
            for line in lines]


def assert_equal_runs(one: Path, several: Path, steps: int = 8) -> None:
    """Assert that two runs have the same steps, losses, metrics, answers, weights and moments, apart from rounding."""
    rows = rows_of(one)
    assert [row['step'] for row in rows if 'hellaswag_acc_norm' in row] == list(range(0, steps + 1, 4))
    assert_equal_to_rounding(rows_of(several), rows)
    first, second = checkpoint.load(one / 'ckpt.pt'), checkpoint.load(several / 'ckpt.pt')
    assert second['iter_num'] == first['iter_num'] == steps
    assert_equal_learning(second, first)
    assert_equal_to_rounding(second['best'], first['best'])


@pytest.fixture(scope='module')
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """Train every run in this one process."""
    folder = tmp_path_factory.mktemp('alone')
    with in_float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, 'plot', draw_nothing)
        note_tokens(patch, 0)
        for name, settings in RUNS.items():
            whole = settings | {'init_from': 'scratch'}  # also the run to resume, here without an interruption
            with groups_of(name):
                train.main(arguments(whole | {'out_dir': folder / name, 'dataset': tiny_dataset}))
    return folder


STRATEGIES = ('ddp', 'zero1', 'fsdp')
CROSSING = ('ddp', 'ddp', 'zero1', 'zero1', 'fsdp', 'fsdp', 'ddp', 'fsdp', 'zero1', 'ddp')  # each after each other one
SOME = ['four micro-batches', 'three micro-batches', 'a short last one']


def plan_of(folder: Path, dataset: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of each of these runs with each strategy, by the name of its folder."""
    return {f'{name}, {strategy}': RUNS[name] | {'strategy': strategy, 'out_dir': str(folder / f'{name}, {strategy}'),
                                                 'dataset': str(dataset)}
            for name in names for strategy in STRATEGIES}


@pytest.mark.slow
@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize(('processes', 'names'), [
    (1, SOME[:2]), (2, list(RUNS)), (3, [*SOME, MODERN_PARTS]), (4, SOME)])
def test_several_processes_learn_what_one_learns(alone: Path, tiny_dataset: Path, tmp_path: Path, processes: int,
                                                 names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs have dropout; micro-batches that divide among the processes and others, some of which leave a process
    without any; evaluation on windows that do not divide; a run that one process began; and one that each strategy
    continues after each."""
    monkeypatch.setattr(Log, 'plot', draw_nothing)
    plan = plan_of(tmp_path, tiny_dataset, names)
    for settings in plan.values():
        if settings.get('init_from') == 'resume':
            with groups_of(settings['out_dir']):
                train.main(arguments(settings | {'max_iters': 4, 'init_from': 'scratch', 'strategy': 'ddp'}))
    crossings = [RUNS[name] | {'out_dir': str(tmp_path / f'{name}, crossing'), 'dataset': str(tiny_dataset)}
                 for name in ['three micro-batches', *([MODERN_PARTS] if processes == 3 else [])]]
    for crossing in crossings:
        train.main(arguments(crossing | {'max_iters': 1, 'eval_interval': 1}))
    segments = [crossing | {'max_iters': step, 'eval_interval': 1, 'init_from': 'resume', 'strategy': strategy}
                for crossing in crossings for step, strategy in enumerate(CROSSING, start=2)]
    (tmp_path / 'plan.json').write_text(json.dumps([*plan.values(), *segments]), encoding='utf-8')

    printed = torchrun(processes, __file__, str(tmp_path / 'plan.json'))

    for folder in plan:
        name = folder.partition(', ')[0] if folder.startswith(tuple(SOME)) else folder.rpartition(', ')[0]
        assert_equal_runs(alone / name, tmp_path / folder)
        assert (tmp_path / folder / 'samples.txt').read_text(encoding='utf-8') == (
            alone / name / 'samples.txt').read_text(encoding='utf-8')
        if RUNS[name].get('init_from') != 'resume':
            assert tokens_of(tmp_path / folder) == tokens_of(alone / name), 'the same windows in the same order'
    assert printed.count('gloo takes the place of nccl') == len(plan) + len(segments)

    for crossing in crossings:
        never = str(tmp_path / 'never crossed' / Path(crossing['out_dir']).name)
        train.main(arguments(crossing | {'max_iters': 12, 'eval_interval': 1, 'init_from': 'resume'}))  # one process
        train.main(arguments(crossing | {'max_iters': 12, 'eval_interval': 1, 'out_dir': never}))
        assert_equal_runs(Path(never), Path(crossing['out_dir']), 12)


@pytest.mark.slow
@pytest.mark.usefixtures('float64')
def test_what_saves_memory_changes_nothing_that_is_learned(alone: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    """The options recompute blocks, keep weights after a block, offload them, or compile, with each strategy."""
    name = 'three micro-batches'
    variants: list[dict[str, Any]] = [
        *({'strategy': strategy, 'activation_checkpointing': True} for strategy in STRATEGIES),
        {'strategy': 'fsdp', 'reshard_after_forward': False},
        {'strategy': 'fsdp', 'cpu_offload': True},
        *({'strategy': strategy, 'compile': True, 'activation_checkpointing': strategy != 'zero1'}
          for strategy in STRATEGIES),
    ]
    folders = [f'{name} {number}{" compiled" if "compile" in variant else ""}'
               for number, variant in enumerate(variants)]
    plan = [RUNS[name] | {'dropout': 0.0 if 'compile' in variant else 0.1, 'dataset': str(tiny_dataset),
                          'out_dir': str(tmp_path / folder)} | variant
            for folder, variant in zip(folders, variants, strict=True)]
    plan += [RUNS[MODERN_PARTS] | {'strategy': strategy, 'activation_checkpointing': True, 'dataset': str(tiny_dataset),
                             'cpu_offload': strategy == 'fsdp', 'out_dir': str(tmp_path / f'{MODERN_PARTS} {strategy}')}
             for strategy in ('ddp', 'fsdp')]
    (tmp_path / 'plan.json').write_text(json.dumps(plan), encoding='utf-8')
    torchrun(2, __file__, str(tmp_path / 'plan.json'))
    train.main(arguments(RUNS[name] | {'dropout': 0.0, 'dataset': tiny_dataset, 'out_dir': tmp_path / 'no dropout'}))
    for folder, variant in zip(folders, variants, strict=True):
        one = tmp_path / 'no dropout' if 'compile' in variant else alone / name
        assert_equal_runs(one, tmp_path / folder)
    for strategy in ('ddp', 'fsdp'):
        assert_equal_runs(alone / MODERN_PARTS, tmp_path / f'{MODERN_PARTS} {strategy}')


@pytest.fixture(scope='module')
def in_real_precisions(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what two processes leave with each strategy: runs in bfloat16, of both models; and runs of the modern one
    in float32, one in a single piece and one in two."""
    folder = tmp_path_factory.mktemp('precisions')
    plan: list[dict[str, Any]] = []
    for strategy in STRATEGIES:
        common = RUNS['three micro-batches'] | {'strategy': strategy, 'dataset': str(tiny_dataset)}
        plan += [common | {'dtype': 'bfloat16', 'out_dir': str(folder / f'gpt2 {strategy}')},
                 common | MODERN | {'dtype': 'bfloat16', 'out_dir': str(folder / f'modern {strategy}')}]
        modern = common | MODERN | {'dtype': 'float32', 'hellaswag_interval': 0, 'sample_interval': 0,
                                    'eval_interval': 2, 'eval_iters': 1, 'max_iters': 4, 'lr_decay_iters': 4}
        pieces: list[dict[str, Any]] = [{'out_dir': 'whole'}, {'out_dir': 'pieces', 'max_iters': 2},
                                        {'out_dir': 'pieces', 'init_from': 'resume'}]
        plan += [modern | piece | {'out_dir': str(folder / f'{piece["out_dir"]} {strategy}')} for piece in pieces]
    (folder / 'plan.json').write_text(json.dumps(plan), encoding='utf-8')
    torchrun(2, __file__, str(folder / 'plan.json'))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['gpt2', 'modern'])
def test_bfloat16_means_the_same_to_each_strategy(in_real_precisions: Path, arch: str) -> None:
    """They have the same loss and gradient, until the first update magnifies small differences; and the weights stay in
    float32."""
    expected = rows_of(in_real_precisions / f'{arch} ddp')[0]
    for strategy in STRATEGIES:
        folder = in_real_precisions / f'{arch} {strategy}'
        first, *_, last, _ = rows_of(folder)
        for name in ('loss', 'grad_norm', 'train_loss', 'val_loss'):
            assert first[name] == pytest.approx(expected[name], rel=2**-8), 'the last of 8 bits may differ'
        assert last['loss'] < first['loss'] - 0.1, 'it learns'
        weights = checkpoint.load(folder / 'ckpt.pt')['model'].values()
        assert {p.dtype for p in weights} == {torch.float32}
        assert any((p != p.bfloat16()).any() for p in weights), 'small updates are not rounded away'


@pytest.mark.slow
@pytest.mark.parametrize('strategy', STRATEGIES)
def test_two_processes_resume_a_modern_run_bit_for_bit(in_real_precisions: Path, strategy: str) -> None:
    whole, pieces = (in_real_precisions / f'{name} {strategy}' for name in ('whole', 'pieces'))
    assert rows_of(pieces) == rows_of(whole)
    first, second = (checkpoint.load(folder / 'ckpt.pt') for folder in (pieces, whole))
    assert first['iter_num'] == second['iter_num'] == 4
    for part in ('model', 'optimizer', 'best'):
        assert not differences(first[part], second[part]), part


@pytest.mark.slow
def test_the_command_of_the_readme_runs_on_two_processes(tiny_dataset: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Log, 'plot', draw_nothing)
    settings = RUNS['three micro-batches'] | {'dataset': tiny_dataset, 'log_interval': 1, 'wandb_log': False}
    several, one = tmp_path / 'several', tmp_path / 'one'
    command = [str(ROOT / 'config/train_gpt2.py'), *arguments(settings | {'out_dir': several})]
    printed = torchrun(2, 'train.py', *command)
    assert 'iter 7: ' in printed
    assert (several / 'loss.png').stat().st_size > 1000
    assert json.loads((several / 'status.json').read_text(encoding='utf-8'))['state'] == 'done'
    assert [row['step'] for row in rows_of(several)] == list(range(9))

    train.main([*command, '--max_iters=1', f'--out_dir={one}'])
    first = rows_of(one)[0]  # in float32, equality to rounding ends with the first update
    assert {'loss', 'grad_norm', 'val_loss'} <= first.keys()
    assert rows_of(several)[0] == pytest.approx(first, rel=1e-5)


if __name__ == '__main__':
    main()
