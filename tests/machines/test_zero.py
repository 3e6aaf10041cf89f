"""An optimizer that the processes share updates as a whole optimizer in each of them would. This file is also the
script that each of the processes runs."""
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW, Optimizer

from plaingpt import muon
from plaingpt.machines import processes, strategies
from plaingpt.machines.processes import Process
from plaingpt.machines.zero import Zero, deal
from tests.comparing import ROUNDING, in_float64
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]
STEPS = 4
MATRICES = [[24, 8], [8, 8], [32, 8], [8, 32], [24, 8]]
OTHERS = [[20, 8], [20, 8], [2], [1]]
Groups = list[dict[str, Any]]


class Case:
    """Weights, the optimizer that updates them, and which of them are divided among the processes."""

    def __init__(self, matrices: list[list[int]], others: list[list[int]], is_muon: bool, divides_all: bool) -> None:
        self.shapes, self.n_matrices = matrices + others, len(matrices)
        self.is_muon, self.divides_all = is_muon, divides_all

    def groups(self) -> Groups:
        """Return the same weights each time, in groups as train.parameter_groups makes them."""
        torch.manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in self.shapes]
        of_muon: dict[str, Any] = {'parts': 1, 'momentum': 0.9} if self.is_muon else {}
        groups = [{'params': weights[:self.n_matrices], 'weight_decay': 0.1, 'scale': 1.0, **of_muon},
                  {'params': weights[self.n_matrices:], 'weight_decay': 0.0, 'scale': 0.5}]
        if of_muon and self.n_matrices > 1:  # the first matrix is three in one
            groups = [{**groups[0], 'params': weights[:1], 'parts': 3},
                      {**groups[0], 'params': weights[1:self.n_matrices]}, groups[1]]
        return groups

    def make(self) -> Callable[[Groups], Optimizer]:
        if self.is_muon:
            return partial(muon.Muon, lr=0.1, betas=(0.8, 0.95))
        return partial(AdamW, lr=0.1, betas=(0.8, 0.95), fused=True)

    def shared(self, process: Process) -> Zero:
        groups = self.groups()
        divided = groups if self.divides_all else [group for group in groups if 'parts' in group]
        return Zero(groups, divided, self.make(), process)


CASES = {
    'AdamW': Case(MATRICES, OTHERS, False, True),
    'Muon, as with ddp': Case(MATRICES, OTHERS, True, False),
    'Muon, as with zero1': Case(MATRICES, OTHERS, True, True),
    'Muon of one matrix': Case(MATRICES[1:2], OTHERS[-1:], True, False),  # the other process owns nothing
    'AdamW of one tensor': Case(MATRICES[1:2], [], False, True),
}


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group['params']]


def learn(optimizer: Optimizer) -> None:
    """Make some steps, at a rate and with a momentum that change. A process that only receives a weight has no valid
    gradient for it."""
    torch.manual_seed(2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group['lr'] = 0.1 / (1 + step) * group['scale']
            if 'parts' in group:
                group['momentum'] = 0.85 + 0.02 * step
        for p in weights_of(optimizer):
            p.grad = torch.randn_like(p)
            if isinstance(optimizer, Zero) and not optimizer.holds(p):
                p.grad.fill_(torch.nan)
        optimizer.step()


def main() -> None:
    """Learn each case, and write this process's share of it to a file; then continue from the state that process 0 has
    gathered."""
    folder = Path(sys.argv[1])
    process = processes.start('cpu')
    with in_float64():
        for name, case in CASES.items():
            optimizer = case.shared(process)
            learn(optimizer)
            weights = weights_of(optimizer)
            held = [number for number, p in enumerate(weights) if p in optimizer.state]
            gathered = optimizer.gather()
            torch.save({'weights': [p.detach() for p in weights], 'held': held, 'gathered': gathered,
                        'groups': optimizer.state_dict()['param_groups']},
                       folder / f'{name}.{process.rank}.pt')
            processes.wait_for_all(process)

            again = case.shared(process)
            strategies.load_optimizer(again, torch.load(folder / f'{name}.0.pt')['gathered'])
            assert [number for number, p in enumerate(weights_of(again)) if p in again.state] == held
            with torch.no_grad():
                for p, old in zip(weights_of(again), weights, strict=True):
                    p.copy_(old)
            learn(again)
            torch.save([p.detach() for p in weights_of(again)], folder / f'{name}, resumed.{process.rank}.pt')
    processes.stop()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that two processes fill."""
    folder = tmp_path_factory.mktemp('zero')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    both = [subprocess.Popen([sys.executable, __file__, str(folder)], text=True, cwd=ROOT, encoding='utf-8',
                             env={**os.environ, 'PYTHONPATH': str(ROOT), 'RANK': str(rank), 'LOCAL_RANK': str(rank),
                                  'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port},
                             stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in range(2)]
    said = [process.communicate(timeout=PATIENT)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], '\n'.join(said)
    return folder


@pytest.mark.parametrize(('sizes', 'n', 'owners'), [
    ([5, 3, 3, 2, 2, 1], 2, [0, 1, 1, 0, 1, 0]), ([1, 2, 2, 3, 3, 5], 2, [0, 0, 1, 1, 1, 0]),
    ([4] * 7, 3, [0, 1, 2, 0, 1, 2, 0]), ([7], 3, [0]), ([], 2, []), ([1, 9, 1], 1, [0, 0, 0])])
def test_the_largest_goes_first_to_the_process_that_has_least(sizes: list[int], n: int, owners: list[int]) -> None:
    assert deal(sizes, n) == owners


@pytest.mark.parametrize('name', CASES)
@pytest.mark.usefixtures('float64')
def test_two_processes_update_as_one_optimizer_of_everything_does(name: str, folder: Path) -> None:
    """The same holds when they continue from a state that process 0 has gathered. Both processes hold the same weights,
    to the last bit."""
    case = CASES[name]
    alone = case.make()(case.groups())
    learn(alone)
    both = [torch.load(folder / f'{name}.{rank}.pt') for rank in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*(one['weights'] for one in both), strict=True))
    before = [p.detach().clone() for p in weights_of(alone)]
    torch.testing.assert_close(both[0]['weights'], before, rtol=0, atol=ROUNDING)

    whole = {number: alone.state[p] for number, p in enumerate(weights_of(alone))}
    torch.testing.assert_close(both[0]['gathered'], whole, rtol=0, atol=ROUNDING)
    assert list(both[0]['gathered']) == list(whole) and both[1]['gathered'] == {}
    assert both[0]['groups'] == both[1]['groups'] == alone.state_dict()['param_groups']

    learn(alone)
    resumed = [torch.load(folder / f'{name}, resumed.{rank}.pt') for rank in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*resumed, strict=True))
    torch.testing.assert_close(resumed[0], [p.detach() for p in weights_of(alone)], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize('name', CASES)
def test_each_process_holds_the_state_of_its_own_weights_alone(name: str, folder: Path) -> None:
    """Of a group that is not divided, each process has the whole state."""
    case = CASES[name]
    first, second = ({*torch.load(folder / f'{name}.{rank}.pt')['held']} for rank in range(2))
    divided = range(len(case.shapes) if case.divides_all else case.n_matrices)
    numels = [torch.Size(case.shapes[number]).numel() for number in divided]
    owners = deal(numels, 2)
    assert first & set(divided) == {number for number, owner in zip(divided, owners, strict=True) if owner == 0}
    assert second & set(divided) == {number for number, owner in zip(divided, owners, strict=True) if owner == 1}
    assert first - set(divided) == second - set(divided) == set(range(len(case.shapes))) - set(divided)


def test_on_a_gpu_what_a_checkpoint_holds_of_a_weight_goes_to_that_gpu() -> None:
    """The fused AdamW of a GPU refuses a number of updates that lies in main memory. The GPU is emulated."""
    held = {'step': torch.tensor(3.0), 'exp_avg': torch.ones(4, 2), 'exp_avg_sq': torch.ones(4, 2)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        p = torch.nn.Parameter(torch.empty(4, 2, device='cuda'))
        alone = Process(0, 2, torch.device('cuda', 0), '')
        groups: Groups = [{'params': [p], 'weight_decay': 0.1, 'scale': 1.0}]
        optimizer = Zero(groups, groups, partial(AdamW, lr=1.0, fused=True), alone)
        strategies.load_optimizer(optimizer, {0: held})
        assert {moment.device.type for moment in optimizer.state[p].values()} == {'cuda'}
        assert optimizer.state is optimizer.part.state, 'and there is one copy of it'


if __name__ == '__main__':
    main()
