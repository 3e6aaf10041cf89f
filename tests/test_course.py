"""The course: each rung computes what it says, its pages say what its files do, and it ends where model.py begins."""
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any, get_args

import measured
import numpy as np
import pages
import pytest
import rung
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

import model
import model_modern
import model_trivialised
import parallel_trivialised
import train
from model import GPTConfig
from plaingpt.corpus.batches import parts_of, read_batch
from plaingpt.corpus.order import Order
from plaingpt.corpus.token_files import TokenFile
from plaingpt.errors import UserError
from plaingpt.machines import strategies
from plaingpt.machines.device import choose
from plaingpt.machines.processes import Process
from plaingpt.machines.strategies import Strategy
from plaingpt.run.run import Learner
from tests.comparing import give, in_float64
from tests.docs.test_readme import tables

ROOT = Path(__file__).parents[1]
SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=32, bias=False)
UNEVEN = 3  # windows in a micro-batch, of 16 in a step
RUNGS = [*filter(rung.is_same_function, rung.NAMES)]
MODERN = [name for name in rung.NAMES if int(name[:2]) > rung.LAST]
COMPILED = pytest.param('09_compile', marks=[pytest.mark.slow, pytest.mark.skipif(
    shutil.which('g++') is None, reason='torch.compile needs a C++ compiler')])
ALONE = [COMPILED if name == '09_compile' else name for name in RUNGS if rung.processes_of([name]) == 1]
TOGETHER = [name for name in RUNGS if rung.processes_of([name]) > 1]


# ------------------------------------------------------------------------------------------------
# The rungs


@pytest.mark.parametrize('path', sorted(rung.FOLDER.glob('[0-9]*.py')), ids=lambda path: path.stem)
def test_a_file_of_the_course_is_read_in_a_minute(path: Path) -> None:
    source = path.read_text(encoding='utf-8')
    assert len(source.splitlines()) <= 60
    assert int(path.stem[:2]) == int(rung.text_of(path.stem).partition('.')[0])
    assert 'Question: ' in rung.text_of(path.stem)


@pytest.mark.parametrize('name', ALONE)
def test_a_rung_computes_what_the_one_before_it_and_the_plain_files_compute(name: str) -> None:
    for kinds in rung.prove(name, SMALL, UNEVEN).values():
        assert kinds and max(kinds.values()) <= (2**-8 if name == '08_bfloat16' else 1e-9)


def without_the_last_window(model: nn.Module, x: Tensor, y: Tensor) -> float:
    _, loss = model(x[:-1], y[:-1])
    loss.backward()
    return loss.item()


def without_shares(model: nn.Module, x: Tensor, y: Tensor) -> float:
    for part_x, part_y in zip(x.split(UNEVEN), y.split(UNEVEN), strict=True):
        _, mean = model(part_x, part_y)
        mean.backward()
    return model(x, y)[1].item()


@pytest.mark.parametrize(('name', 'part', 'mistake'), [
    ('04_kernels', 'gelu', torch.relu),
    ('07_adamw', 'gradient', without_the_last_window),
    ('10_accumulation', 'gradient', without_shares),
])
def test_a_mistake_in_a_rung_is_seen(name: str, part: str, mistake: Callable[..., object],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    find = rung.find

    def mistaken(wanted: str) -> ModuleType:
        found = find(wanted)
        if wanted == name:
            setattr(found, part, mistake)
        return found

    monkeypatch.setattr(rung, 'find', mistaken)
    with pytest.raises(AssertionError, match=f'{name} is another function than'):
        rung.prove(name, SMALL, UNEVEN)


@cache
def outcomes() -> dict[str, rung.Outcome]:
    """Return the outcome of the plain files and of rungs 10 to 13, of which two processes make the last three."""
    names = ['', '10_accumulation', *TOGETHER]
    runs = [rung.Run(rung.way_to(name), 'training', SMALL, batch_size=UNEVEN) for name in names]
    return {name: outcome for name, (outcome, _) in zip(names, rung.perform(runs), strict=True)}


@pytest.mark.parametrize('name', TOGETHER)
def test_two_processes_make_the_steps_of_one(name: str) -> None:
    for other in ('', rung.before(name)):
        assert max(rung.difference(outcomes()[other], outcomes()[name]).values()) < 1e-9


def gradients_by(name: str, machines: list[model_trivialised.GPT], x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """What parallel_trivialised.py has for a rung: the gradient of a step, [machine][weight]."""
    plain = machines[0]
    if name == '10_accumulation':
        return [parallel_trivialised.accumulate(plain, x, y, UNEVEN)] * 2
    if name != '13_fsdp':
        return parallel_trivialised.data_parallel(plain, x, y, 2)
    pieces = [[p.detach().flatten().tensor_split(2)[machine] for p in plain.parameters()] for machine in (0, 1)]
    parts = parallel_trivialised.fsdp(plain, pieces, x, y)
    return [[torch.cat(both).view_as(p) for *both, p in zip(*parts, plain.parameters(), strict=True)]] * 2


@pytest.mark.parametrize('name', ['10_accumulation', *TOGETHER])
def test_processes_do_what_machines_in_a_list_do(name: str, tmp_path: Path) -> None:
    plain = rung.plain_training([])
    torch.manual_seed(1)
    machines = [model_trivialised.GPT(SMALL).double()]
    machines.append(model_trivialised.GPT(SMALL).double())
    machines[1].load_state_dict(machines[0].state_dict())
    weights: list[list[Tensor]] = [list(machine.parameters()) for machine in machines]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in weights[0]]
    rung.write_corpus(tmp_path / 'train.bin', SMALL)
    corpus = TokenFile(tmp_path / 'train.bin', 'uint16')
    order = Order(len(corpus), SMALL.block_size, plain.seed)
    for step in range(rung.STEPS):
        starts = order.starts(step * rung.N_WINDOWS, rung.N_WINDOWS)
        x, y = read_batch(corpus, starts, SMALL.block_size, rung.N_WINDOWS, SMALL.vocab_size)
        of_machines = [plain.clip(g, plain.grad_clip)[0] for g in gradients_by(name, machines, x, y)]
        rate = plain.lr_at(step, plain.learning_rate, plain.min_lr, 2, rung.STEPS)
        with torch.no_grad():
            for number, (p, moments_of_p) in enumerate(zip(weights[0], moments, strict=True)):
                decay = plain.weight_decay if p.dim() >= 2 else 0.0
                parallel_trivialised.zero1([[w[number]] for w in weights], [[g[number]] for g in of_machines],
                                           [{0: moments_of_p}], step, rate, decay)
    found = {'weights': [p.detach() for p in weights[0]]}
    assert rung.difference(found, {'weights': outcomes()[name]['weights']})['weights'] < 1e-9


@pytest.mark.parametrize('name', [*RUNGS, *MODERN])
def test_the_rungs_up_to_each_build_a_model_with_the_same_names(name: str) -> None:
    made = rung.plain_model(rung.way_to(name)).GPT(SMALL)
    assert list(made.state_dict()) == list(model.GPT(SMALL).state_dict())
    assert rung.way_to(name)[0] == '04_kernels'


def test_the_modern_rungs_are_parts_of_the_modern_model() -> None:
    config = replace(SMALL, arch='modern', tie_weights=False)
    made = rung.plain_model(rung.way_to('16_relu2'))
    plain, fast = made.GPT(SMALL).transformer.h[0], model_modern.Block(config, 0)
    fast.load_state_dict({name: p for name, p in plain.state_dict().items() if 'ln_' not in name})
    plain, fast, x = plain.double(), fast.double(), torch.randn(2, 16, 32).double()
    turns = model_modern.turns_of(0, 16, 16, x)
    torch.testing.assert_close(plain.attn(x), fast.attn(x, turns, None)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(plain.mlp(x), fast.mlp(x), rtol=0, atol=1e-12)

    # no table of positions is read, and Muon has the matrices that train.py gives it
    ids, gpt = torch.randint(61, (2, 16)), made.GPT(SMALL)
    body = gpt.transformer
    before = body(ids)
    body.wpe.weight.data.fill_(9.0)
    assert torch.equal(body(ids), before)
    names = {id(p): name for name, p in body.named_parameters()}
    whole = model_modern.GPT(config)
    of_train = {id(p): name for name, p in whole.transformer.named_parameters()}
    groups = [[(group['parts'], sorted(known[id(p)] for p in group['params'])) for group in made if 'parts' in group]
              for known, made in ((names, rung.find('17_muon').make_optimizer(gpt).param_groups),
                                  (of_train, train.groups_of_modern(whole)))]
    assert groups[0] == groups[1] and len(groups[0]) == 2


def test_a_rung_without_settings_refuses_some() -> None:
    for name in ('01_counting', '06_flash'):
        with pytest.raises(UserError, match=f'{name}.py has no settings: leave out --n_layer=2'):
            rung.carry_out(name, ['--n_layer=2'])


def test_what_a_token_sees_on_the_rungs_below_attention() -> None:
    q, k, v = torch.randn(3, 2, 5, 4).unbind()
    itself, average = (rung.find(name).attend for name in ('02_itself', '03_average'))
    assert torch.equal(itself(q, k, v), v)
    assert torch.equal(itself(q, k, v)[:, :1], model_trivialised.attend(q, k, v)[:, :1])  # the first sees itself alone
    torch.testing.assert_close(average(q, k, v), model_trivialised.attend(torch.zeros_like(q), k, v))


# ------------------------------------------------------------------------------------------------
# Where the course ends


@pytest.mark.parametrize('name', ['06_flash', '14_cache'])
def test_the_model_at_the_end_is_that_of_model_py(name: str) -> None:
    torch.manual_seed(2)
    fast, built = model.GPT(SMALL), rung.plain_model(rung.way_to(name)).GPT(SMALL)
    built.load_state_dict(fast.state_dict())
    ids = torch.randint(SMALL.vocab_size, (2, 17))
    assert torch.equal(built(ids[:, :-1])[0], fast(ids[:, :-1])[0])
    fast, built = fast.double(), built.double()
    (_, loss), (_, same) = fast(ids[:, :-1], ids[:, 1:]), built(ids[:, :-1], ids[:, 1:])
    gradients = [torch.autograd.grad(which, list(of.parameters())) for which, of in ((loss, fast), (same, built))]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for length in (1, 9, 17):  # the last is longer than the block from the start
        assert torch.equal(built.generate(ids[:, :length], 20, seed=3), fast.generate(ids[:, :length], 20, seed=3))


def test_the_optimizer_at_the_end_is_that_of_train_py(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = rung.plain_training([])
    for name in ('beta1', 'beta2', 'weight_decay'):
        monkeypatch.setattr(train, name, getattr(settings, name))
    made = model.GPT(SMALL)
    plain, fast = rung.find('07_adamw').make_optimizer(made), train.make_optimizer(made)
    assert type(plain) is type(fast)
    for one, other in zip(plain.param_groups, fast.param_groups, strict=True):
        assert [*map(id, one['params'])] == [*map(id, other['params'])]
        for name in ('weight_decay', 'betas', 'eps', 'fused', 'amsgrad'):
            assert one[name] == other[name], name


def two_steps(model: nn.Module, optimizer: Optimizer, add_gradient: Callable[[Any], object]) -> rung.Outcome:
    """Make two steps, and return the gradient of each, as this process has it, and the weights afterwards."""
    gradients = []
    for step in range(2):
        add_gradient(np.arange(rung.N_WINDOWS) * 20 + step)  # where the step's windows start
        gradients += [strategies.complete(p.grad).clone() for p in model.parameters() if p.grad is not None]
        for group in optimizer.param_groups:
            group['lr'] = 0.01 * group['scale']
        optimizer.step()
        model.zero_grad()  # the optimizer of rung 12 knows only the weights that its process owns
    return {'gradients': gradients, 'weights': [strategies.complete(p.detach()) for p in model.parameters()]}


def steps_of_course(name: str, model: Any, corpus: TokenFile) -> rung.Outcome:
    module = rung.plain_training(rung.way_to(name), batch_size=UNEVEN)
    prepared = module.prepare(model)

    def add_gradient(starts: Any) -> None:
        module.gradient(prepared, *read_batch(corpus, starts, SMALL.block_size, len(starts), SMALL.vocab_size))

    return two_steps(model, module.make_optimizer(prepared), add_gradient)


def steps_of_train_py(strategy: Strategy, model: model.GPT, corpus: TokenFile, process: Process) -> rung.Outcome:
    settings = rung.plain_training([])
    give(train, strategy=strategy, beta1=settings.beta1, beta2=settings.beta2, weight_decay=settings.weight_decay)
    compute = choose(process.device, 'float32', compile=False)
    shared = strategies.distribute(model, model.transformer.h, process, strategy, compute.dtype, True, False)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    learner = Learner(model, shared, train.make_optimizer(model, process), scaler, process, compute)

    def add_gradient(starts: Any) -> None:
        train.accumulate_gradient(learner, parts_of(corpus, starts, UNEVEN, SMALL, process))

    return two_steps(model, learner.optimizer, add_gradient)


def step_together(rank: int, folder: str) -> None:
    """Be one of two processes that make the same steps as the rungs for several do, and as train.py does."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    process, corpus = Process(rank, 2, torch.device('cpu'), ''), TokenFile(Path(folder, 'train.bin'), 'uint16')
    found = {}
    with in_float64():
        for name, strategy in zip(TOGETHER, get_args(Strategy), strict=True):
            torch.manual_seed(1)
            fast, built = model.GPT(SMALL), rung.plain_model(rung.way_to(name)).GPT(SMALL)
            built.load_state_dict(fast.state_dict())
            found[name] = steps_of_course(name, built, corpus), steps_of_train_py(strategy, fast, corpus, process)
    torch.save(found, Path(folder, f'{rank}.pt'))
    dist.destroy_process_group()


def test_the_steps_of_two_processes_at_the_end_are_those_of_train_py(tmp_path: Path) -> None:
    rung.write_corpus(tmp_path / 'train.bin', SMALL)
    mp.spawn(step_together, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert [*found] == TOGETHER
        for name, (course, main) in found.items():
            assert len(main['gradients']) == 2 * len(main['weights']) and all(g.any() for g in main['gradients'])
            assert max(rung.difference(main, course).values()) < 1e-9, f'{name}, process {rank}'


# ------------------------------------------------------------------------------------------------
# What the pages say


def test_the_pages_are_as_generated() -> None:
    assert pages.COURSE.read_text(encoding='utf-8') == pages.course()
    assert pages.LADDER.read_text(encoding='utf-8').endswith('\n' + pages.record())
    assert {*RUNGS, *MODERN} == {*measured.read('course')}


def test_each_diff_leads_to_the_part() -> None:
    for name in (*RUNGS, *MODERN):
        lines = [line[1:] for line in pages.changes(name).splitlines() if line[:1] in ('+', ' ')]
        source = (rung.FOLDER / f'{name}.py').read_text(encoding='utf-8')
        assert any(line in source for line in lines if line.strip())
        assert {line.strip() for line in lines if line.strip()} <= {line.strip() for line in source.splitlines()}, name


def test_every_loss_on_the_ladder_was_measured_or_is_a_difference_of_two() -> None:
    found = {name: entry['value'] for name, entry in measured.read('ladder').items()}
    gains = (('itself', 'average'), ('average', 'attention'), ('itself', 'attention'), ('few pairs', 'attention'),
             ('pairs', 'attention'))
    near = [*found.values(), *(found[one] - found[other] for one, other in gains)]
    text = (ROOT / 'docs/ladder.md').read_text(encoding='utf-8').partition(pages.RECORD)[0]
    rows = [row[-1] for row in tables((ROOT / 'README.md').read_text(encoding='utf-8'))['rung']]
    text = re.sub(r'6\.93|1\.44|0\.0[36]\b|Python 3\.11', '', f'{text}\n{rows}')  # of which none is measured
    said = re.findall(r'(?<![\d.])\d\.\d\d+(?![\d.])', text)
    assert len(said) > 25
    for number in said:
        digits = len(number.partition('.')[2])
        assert any(abs(float(number) - value) <= 0.51 * 10**-digits for value in near), number


def test_counting_gives_what_readme_says(tmp_path: Path, run_script: Callable[..., CompletedProcess[str]],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_script('data/stdlib/prepare.py', f'--to_dir={tmp_path / "stdlib"}')
    if made.returncode:
        pytest.skip(f'the default text cannot be made: {made.stderr}')
    monkeypatch.setattr(rung, 'data_folder', lambda name: tmp_path / name)
    found = rung.find('01_counting').scores()
    [row] = [row for row in tables((ROOT / 'README.md').read_text(encoding='utf-8'))['rung'] if 'counting' in row[1]]
    tokens, pairs = map(float, re.findall(r'\d\.\d\d', row[-1]))
    ladder = (ROOT / 'docs/ladder.md').read_text(encoding='utf-8')
    few = float(re.findall(r'training read, it is (\d\.\d\d)', ladder)[0])
    tolerance = 0.03 if sys.version_info[:2] == (3, 11) else 0.06  # of 3.11 is the library that README was measured on
    assert list(found.values()) == pytest.approx([6.931, tokens, pairs, few], abs=tolerance)
    assert found['counting pairs'] < found['counting pairs in what 600 steps read'] < found['counting tokens']
