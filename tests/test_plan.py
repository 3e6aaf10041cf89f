"""The plan of a run agrees with the run: counts and files of real models, bytes that a profiler counts, real
corpora."""
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import configurator
import train
from model import GPT, GPTConfig, sum_of_nats
from plaingpt import sizes
from plaingpt.console import duration
from plaingpt.corpus import token_files
from plaingpt.corpus.batches import Part
from plaingpt.errors import UserError
from plaingpt.formats.weights import gpt_class
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import autocast
from plaingpt.plan import Plan, RunSettings, describe, look_at, shape_of
from plaingpt.run import checkpoint
from tests.comparing import give, learner_of

ROOT = Path(__file__).parents[1]
ALONE = processes.Process(0, 1, torch.device('cpu'), '')
PUBLISHED = {'gpt2': 124_439_808, 'gpt2-medium': 354_823_168, 'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200}
SMALL = GPTConfig(32, 65, 2, 2, 32)


def settings_of(*arguments: str) -> RunSettings:
    """Return the settings that train.py would give to its plan."""
    _, given = configurator.configure(train, list(arguments))
    return configurator.pick(RunSettings, train, given=frozenset(given))


def groups_of(model: GPT) -> list[sizes.Group]:
    return [*map(sizes.Group.of, train.parameter_groups(model))]


def modern(block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int,
           shortcuts: bool = True) -> GPTConfig:
    return GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False, tie_weights=False, arch='modern',
                     shortcuts=shortcuts)


def lines_of(*arguments: str, world_size: int = 1) -> list[str]:
    """Return a plan, line by line."""
    return '\n'.join(describe(settings_of(*arguments), train.parameter_groups, world_size)).splitlines()


def warnings_of(*arguments: str, world_size: int = 1) -> str:
    lines = lines_of(*arguments, world_size=world_size)
    first = next(i for i, line in enumerate(lines) if re.fullmatch(r'\d+ warnings?:?', line))
    assert int(lines[first].split()[0]) == len(lines) - first - 1
    return '\n'.join(lines[first + 1:])


# ------------------------------------------------------------------------------------------------
# Parameters


def test_the_four_sizes_of_gpt2_have_their_published_parameters() -> None:
    for name, number in PUBLISHED.items():
        model = GPT.on_meta(sizes.GPT2[name])
        assert sizes.n_parameters(model) == sum(sizes.parts_of(model).values()) == number


@pytest.mark.parametrize('config', [SMALL, GPTConfig(8, 500, 3, 1, 24, bias=False, tie_weights=False)])
def test_parameters_by_part_are_those_of_a_real_model(config: GPTConfig) -> None:
    model, parts = GPT(config), sizes.parts_of(GPT.on_meta(config))
    assert parts['token table'] == model.transformer.wte.weight.numel()
    assert parts['position table'] == model.transformer.wpe.weight.numel()
    assert parts['head'] == (0 if config.tie_weights else model.lm_head.weight.numel())
    for part, word in (('attention', 'attn'), ('MLPs', 'mlp')):
        modules = [block.get_submodule(word) for block in model.transformer.h]
        assert parts[part] == sum(p.numel() for module in modules for p in module.parameters())
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())


def test_no_part_of_a_planned_model_takes_memory() -> None:
    assert {p.device.type for p in GPT.on_meta(sizes.GPT2['gpt2-xl']).parameters()} == {'meta'}


# ------------------------------------------------------------------------------------------------
# Bytes


def counted_peak(config: GPTConfig, batch_size: int, n_parts: int, recomputes: bool) -> int:
    """Return the most bytes of tensors in a training step, weights and moments included, as PyTorch's profiler counts
    what is allocated and freed. An earlier step has made the moments."""
    model = gpt_class(config)(config)
    model.transformer.recomputes = recomputes
    give(train)
    learner = learner_of(model, train.make_optimizer(model))
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size + 1))
    parts = [Part(i, i == n_parts - 1, 1 / n_parts, ids[:, :-1].clone(), ids[:, 1:].clone()) for i in range(n_parts)]

    def step() -> None:
        train.accumulate_gradient(learner, parts)
        strategies.clip(model.parameters(), 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad()

    step()
    before = sum(p.nbytes for p in model.parameters())
    before += sum(moment.nbytes for moments in learner.optimizer.state.values() for moment in moments.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [(event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
              if event.name() == '[memory]']
    held = most = before
    for _, change in sorted(events):
        held += change
        most = max(most, held)
    assert held == before and len(events) > 100, 'the step frees all that it allocates'
    return most


@pytest.mark.parametrize(('config', 'batch_size', 'n_parts', 'recomputes'), [
    (GPTConfig(16, 65, 2, 2, 16), 4, 2, False),  # tiny
    (GPTConfig(64, 65, 4, 4, 128), 8, 1, False),  # few characters: the peak is in the last block
    (GPTConfig(64, 65, 4, 4, 128), 8, 3, False),
    (GPTConfig(64, 20000, 2, 2, 64), 8, 1, False),  # a wide vocabulary: the peak is at the loss
    (GPTConfig(128, 20000, 2, 4, 128), 32, 1, False),  # wider still: the logits are computed in parts
    (GPTConfig(128, 20000, 6, 4, 128), 32, 2, True),
    (GPTConfig(128, 30000, 1, 4, 64, tie_weights=False), 32, 1, False),
    (GPTConfig(128, 1000, 12, 4, 64), 4, 1, False),  # deep
    (GPTConfig(128, 1000, 12, 4, 64), 4, 1, True),
    (GPTConfig(128, 100, 6, 4, 128, bias=False), 4, 2, True),
    (GPTConfig(16, 1000, 4, 4, 256), 1, 1, False),  # little text: the peak is at the end, gradients and moments
    (GPTConfig(16, 5000, 1, 4, 64), 1, 2, False),
    (GPTConfig(16, 5000, 1, 4, 64, tie_weights=False), 1, 2, False),
    (modern(64, 65, 4, 4, 128), 8, 3, False),
    (modern(64, 20000, 2, 2, 64), 8, 1, False),
    (modern(128, 20000, 2, 4, 128, shortcuts=False), 32, 1, False),
    (modern(128, 1000, 12, 4, 64), 4, 1, True),
    (modern(16, 1000, 4, 4, 256), 1, 1, False),  # the peak is in Muon's step
])
def test_the_predicted_peak_is_what_a_profiler_counts(config: GPTConfig, batch_size: int, n_parts: int,
                                                      recomputes: bool) -> None:
    model = gpt_class(config).on_meta(config)
    held, needs = sizes.held(model, groups_of(model), 'ddp', 1, 4), sizes.activations(config, batch_size, 4)
    predicted = sizes.peak(config, held, needs, n_parts > 1, recomputes)
    assert predicted == pytest.approx(counted_peak(config, batch_size, n_parts, recomputes), rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('c++'), reason='torch.compile needs a C++ compiler')
@pytest.mark.parametrize('width', [4, 2])
@pytest.mark.parametrize('config', [GPTConfig(128, 5000, 1, 4, 64), modern(128, 5000, 1, 2, 64)])
def test_what_a_compiled_loss_keeps_is_what_autograd_saves(config: GPTConfig, width: int) -> None:
    needs = sizes.activations(config, 4, width, compiles=True)
    kept = saved_bytes(config, width, torch.compile(sum_of_nats))
    assert needs.blocks + needs.around + needs.kept == pytest.approx(kept, rel=0.05)
    assert needs.kept == pytest.approx(4 * 128 * 5000 * width), 'nothing in float32 beside bfloat16'
    assert needs.kept > 0.5 * kept


def saved_bytes(config: GPTConfig, width: int, compiled_nats: Callable[..., Tensor] | None = None) -> int:
    """Return what autograd keeps of a forward pass, parameters excluded, each storage once."""
    model = gpt_class(config)(config)
    model.compiled_nats = compiled_nats
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    ids = torch.randint(config.vocab_size, (4, config.block_size + 1))
    dtype = {4: torch.float32, 2: torch.bfloat16}[width]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), autocast(torch.device('cpu'), dtype):
        model(ids[:, :-1], ids[:, 1:], logits='none')
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize('width', [4, 2])
@pytest.mark.parametrize('config', [
    GPTConfig(64, 300, 3, 2, 64), GPTConfig(1024, 20_000, 1, 2, 64), modern(64, 300, 6, 2, 64),
    modern(1024, 20_000, 1, 2, 64, shortcuts=False)])
def test_what_the_forward_pass_keeps_is_what_autograd_saves(config: GPTConfig, width: int) -> None:
    needs = sizes.activations(config, 4, width)
    assert needs.blocks + needs.around + needs.kept == pytest.approx(saved_bytes(config, width), rel=0.05)


def test_ddp_and_fsdp_and_zero1_divide_as_readme_says() -> None:
    model = GPT.on_meta(GPTConfig(64, 1024, 4, 4, 128))  # the model of benchmarks/memory.py, which measured these bytes
    n = sizes.n_parameters(model)
    expected: dict[strategies.Strategy, list[float]] = {
        'ddp': [16.0, 16.0, 16.0], 'zero1': [16.0, 12.01, 10.04], 'fsdp': [16.0, 8.0, 4.0]}
    for strategy, bytes_of_each in expected.items():
        held = [sizes.held(model, groups_of(model), strategy, count, 4) for count in (1, 2, 4)]
        assert [round(sum(parts[:3]) / n, 2) for parts in held] == bytes_of_each


# ------------------------------------------------------------------------------------------------
# Files, steps, epochs


TINY = ('--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--device=cpu',
        '--gradient_accumulation_steps=2', '--eval_iters=1', '--sample_interval=0', '--max_iters=3',
        '--lr_decay_iters=3', '--warmup_iters=1', '--eval_interval=2')


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """Return a run of three steps."""
    folder = tmp_path_factory.mktemp('planned') / 'run'
    train.main([*TINY, f'--dataset={tiny_dataset}', f'--out_dir={folder}'])
    return folder


def test_a_checkpoint_is_as_large_as_planned(run_dir: Path, tiny_dataset: Path) -> None:
    config = checkpoint.config_of(checkpoint.load(run_dir / 'ckpt.pt'))
    model = GPT.on_meta(config)
    planned = sizes.checkpoint_bytes(model, groups_of(model), look_at(str(tiny_dataset)).tokenizer_bytes)
    assert planned == pytest.approx((run_dir / 'ckpt.pt').stat().st_size, rel=0.01)


def test_the_disk_that_is_planned_is_what_a_run_asks_for(tiny_dataset: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(*TINY, f'--dataset={tiny_dataset}', '--keep=3')
    config, _ = shape_of(settings, 65)
    model, corpus = GPT.on_meta(config), look_at(str(tiny_dataset))
    planned = Plan(settings, model, groups_of(model), corpus, 1, checkpoint.Place(), 1).disk_bytes
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: real._replace(free=planned - 1))
    with pytest.raises(UserError, match=f' needs {planned:,} bytes '):
        checkpoint.make_ready(tmp_path / 'new', False, False, 12 * sizes.n_parameters(GPT(config)), 3)
    assert 'the disk has no room' in warnings_of(*TINY, f'--dataset={tiny_dataset}', '--keep=3')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: real._replace(free=planned))
    checkpoint.make_ready(tmp_path / 'new', False, False, 12 * sizes.n_parameters(GPT(config)), 3)


def test_steps_tokens_and_epochs_are_those_that_the_run_prints(run_dir: Path, tiny_dataset: Path, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, f'--dataset={tiny_dataset}', f'--out_dir={tmp_path}', '--max_epochs=0.2', '--max_iters=100000']
    train.main([*arguments, '--eval_interval=1000', '--sample_interval=0'])
    printed = capsys.readouterr().out
    planned = '\n'.join(lines_of(*arguments))
    iterations, epochs = re.findall(r'(?m)^([\d,]+) iterations are ([\d.]+) epochs', printed)[0]
    step = re.findall(r'tokens per iteration will be: ([\d,]+) ', printed)[0]
    total = int(iterations.replace(',', '')) * int(step)
    assert f'a step: {step} tokens = 8 windows of 32, in micro-batches of 4, 2 for one process\n' in planned
    assert f'the run: {iterations} steps, {total:,} tokens, {float(epochs):.1f} epochs; ' in planned


def test_max_epochs_ends_the_plan_only_if_the_corpus_is_known(tmp_path: Path) -> None:
    lines = lines_of(*TINY, f'--dataset={tmp_path}', '--max_epochs=1')
    assert any('holds no prepared corpus' in line for line in lines)
    assert any(line.startswith('the run: 3 steps, 768 tokens; ') for line in lines)


def test_a_resumed_run_and_gpt2s_weights_are_planned_without_a_download(run_dir: Path, tiny_dataset: Path) -> None:
    resumed = lines_of(f'--out_dir={run_dir}', '--init_from=resume', f'--dataset={tiny_dataset}', '--max_iters=9')
    assert 'it continues at step 3' in resumed
    assert resumed[0].startswith(f'{sizes.n_parameters(GPT(checkpoint.config_of(checkpoint.load_newest(run_dir)))):,} ')
    assert lines_of('--init_from=gpt2-xl')[0].startswith('1,557,611,200 parameters: 48 layers of 25 heads, 1600 wide')
    cropped = lines_of('--init_from=gpt2', '--block_size=64')[0]
    assert cropped.startswith(f'{124_439_808 - (1024 - 64) * 768:,} parameters') and 'windows of 64' in cropped
    with pytest.raises(UserError, match='n_layer=3 was given'):
        lines_of('--init_from=gpt2', '--n_layer=3')


def test_what_a_checkpoint_does_not_say_is_taken_from_the_settings(tmp_path: Path) -> None:
    torch.save(GPT(SMALL).state_dict(), tmp_path / 'bare.pt')
    with pytest.raises(UserError, match='does not say n_head and gelu'):
        lines_of(f'--init_from={tmp_path}/bare.pt')
    line = lines_of(f'--init_from={tmp_path}/bare.pt', '--n_head=4', '--gelu=exact')[0]
    assert line.startswith(f'{sizes.n_parameters(GPT(SMALL)):,} parameters: 2 layers of 4 heads')


def test_an_evaluation_is_planned_as_one() -> None:
    lines = lines_of(str(ROOT / 'config/eval_gpt2_medium.py'))
    assert lines[0].startswith(f'{PUBLISHED["gpt2-medium"]:,} parameters')
    assert lines[-1] == 'eval_only=True: nothing is trained; weights are 1.42 GB'


def test_several_processes_share_the_micro_batches_of_a_step() -> None:
    assert any('40 for one process' in line for line in lines_of())
    lines = lines_of(world_size=16)
    assert any('3 for each of 16 processes' in line for line in lines)
    assert any(line.startswith('  fsdp, one of 16 ') for line in lines)


# ------------------------------------------------------------------------------------------------
# Hours


def test_hours_are_tokens_times_operations_over_the_speed_of_a_gpu() -> None:
    """GPT-2 on 8 A100 is known to take about four days: 600,000 steps of 491,520 tokens."""
    def hours(*arguments: str) -> list[float]:
        row = next(line for line in lines_of(*arguments) if line.startswith('  A100 '))
        return [float(found.replace(',', '')) for found in re.findall(r'([\d,.]+) h\b', row)]

    alone, eight = hours()
    assert alone == pytest.approx(600_000 * 491_520 * 854_654_976 / (312e12 * 0.4) / 3600, rel=0.01)
    assert eight == pytest.approx(alone / 8, rel=0.01) and 48 < eight < 120
    assert hours('--dtype=float32') == pytest.approx([2 * alone, 2 * eight], rel=0.01)
    assert hours('--max_iters=100') == [] and hours('--max_iters=2000') == pytest.approx([alone / 300], abs=0.1)


@pytest.mark.parametrize(('seconds', 'text'), [(1, '< 1 min'), (60, '1 min'), (3599, '60 min'), (3600, '1.0 h'),
                                               (359_900, '100.0 h'), (7_200_000, '2,000 h')])
def test_a_time_is_shown_as_exactly_as_it_is_known(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_gpu_that_is_too_small_is_reported(tmp_path: Path) -> None:
    row = next(line for line in lines_of('--init_from=gpt2-xl') if line.startswith('  RTX 4090'))
    assert row.split('  ')[-1] == 'too small'
    row = next(line for line in lines_of('--init_from=gpt2-xl', '--batch_size=1', '--strategy=fsdp',
                                         '--activation_checkpointing=True') if line.startswith('  RTX 4090'))
    assert 'too small' in row and row.endswith(' h'), 'one GPU is too small, eight are not'


# ------------------------------------------------------------------------------------------------
# Warnings


@pytest.fixture
def openwebtext(tmp_path: Path) -> Path:
    """Make a corpus of the length of OpenWebText: files with a hole in place of 18 GB."""
    for split, count in (('train', 9_035_582_198), ('val', 4_434_897)):
        with open(tmp_path / f'{split}.bin', 'wb') as file:
            file.truncate(2 * count)
    return tmp_path


def test_nanogpts_run_repeats_its_corpus_32_6_times(openwebtext: Path) -> None:
    arguments = (str(ROOT / 'config/train_gpt2.py'), f'--dataset={openwebtext}')
    assert any(', 32.6 epochs; ' in line for line in lines_of(*arguments))
    assert warnings_of(*arguments).startswith('- 32.6 epochs of this corpus: ')
    assert not warnings_of(*arguments, '--max_iters=60000', '--lr_decay_iters=60000')


def test_shards_are_one_corpus(tmp_path: Path) -> None:
    for name in ('val_000000', 'train_000001', 'train_000002'):
        header = token_files.make_header(np.dtype('uint16'), 4000)
        (tmp_path / f'{name}.bin').write_bytes(header + bytes(8000))
    for dataset in (tmp_path, f'{tmp_path}/*.bin'):
        lines = lines_of(*TINY, f'--dataset={dataset}')
        assert any(line.endswith(': 8,000 tokens to train on, 4,000 to validate, 50257 ids') for line in lines)
        assert 'an epoch: 32 steps' in lines


@pytest.mark.parametrize(('arguments', 'words'), [
    ('--vocab_size=10', "vocab_size=10 is smaller than the tokenizer's"),
    ('--block_size=100000', 'tokens are too few for a window of 100000 + 1'),
    ('--warmup_iters=3', 'the warm-up, 3 steps, is not over'),
    ('--lr_decay_iters=2', 'the learning rate comes down until step 2, and the run ends at 3: --lr_decay_iters=3'),
    ('--total_batch_size=288', '9 windows do not fill 3 x 1 micro-batches of 4: 25% of the time'),
    ('--n_embd=8192 --n_head=64 --n_layer=24', 'are more than any GPU holds: --strategy=fsdp'),
    ('--n_embd=768 --n_head=12 --n_layer=16', '256 tokens are a small step for 1'),
    ('--max_iters=100000 --lr_decay_iters=100000', 'epochs of this corpus'),
])
def test_settings_that_a_user_may_not_have_meant_are_reported(arguments: str, words: str, tiny_dataset: Path) -> None:
    assert warnings_of(*TINY, f'--dataset={tiny_dataset}') == ''
    assert words in warnings_of(*TINY, f'--dataset={tiny_dataset}', *arguments.split())


# ------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_a_plan_reads_no_token_writes_nothing_and_is_printed_once(
        run_script: Callable[..., CompletedProcess[str]], tiny_dataset: Path, tmp_path: Path) -> None:
    """The command runs in a process of its own, alone and as the second of two, without the others; the contents of the
    corpus do not matter."""
    meta: dict[str, Any] = json.loads((tiny_dataset / 'meta.json').read_text(encoding='utf-8'))
    arguments = ('train.py', *TINY, f'--dataset={tiny_dataset}', f'--out_dir={tmp_path / "out"}', '--plan=True')
    alone = run_script(*arguments, cwd=tmp_path)
    assert alone.returncode == 0 and not alone.stderr, alone.stderr
    assert f'{meta["splits"]["train"]["tokens"]:,} tokens to train on' in alone.stdout
    assert alone.stdout.endswith('\n0 warnings\n')
    launched = {'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}
    second = run_script(*arguments, cwd=tmp_path, environment=launched | {'RANK': '1', 'LOCAL_RANK': '1'})
    assert (second.returncode, second.stdout, second.stderr) == (0, '', '')
    first = run_script(*arguments, cwd=tmp_path, environment=launched | {'RANK': '0', 'LOCAL_RANK': '0'})
    assert '1 for each of 2 processes' in first.stdout
    assert list(tmp_path.iterdir()) == []
