"""The plain step on several machines gives the gradient of the whole batch, and that of train.py on two real processes.
This file is also the script that torchrun starts: it computes such gradients and saves them."""
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import model as fast
import parallel_trivialised as plain
import train
import train_trivialised
from model import GPTConfig
from model_trivialised import GPT
from plaingpt.corpus.batches import parts_of, read_batch
from plaingpt.corpus.folder import open_split
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import choose
from plaingpt.run.run import Learner
from tests.comparing import assert_equal_to_rounding, in_float64
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
SHAPE = GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=16)
STRATEGIES: tuple[Literal['ddp', 'zero1', 'fsdp'], ...] = ('ddp', 'zero1', 'fsdp')


def batch(n_windows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, each (N, T)."""
    tokens = torch.randint(SHAPE.vocab_size, (n_windows, 17), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def whole_gradient(model: GPT, x: Tensor, y: Tensor) -> list[Tensor]:
    _, loss = model(x, y)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def names(gradients: list[Tensor]) -> dict[int, Tensor]:
    assert all(g.any() for g in gradients), 'each weight has a part in the loss'
    return dict(enumerate(gradients))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('batch_size', [1, 3, 7, 100])
def test_parts_that_need_not_be_equal_add_up_to_the_gradient_of_the_whole_batch(batch_size: int) -> None:
    model, (x, y) = GPT(SHAPE), batch(7)
    assert_equal_to_rounding(names(plain.accumulate(model, x, y, batch_size)), names(whole_gradient(model, x, y)))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('n', [1, 2, 3, 7])
@pytest.mark.parametrize('shape', [(3, 4), (5,), (1,), (2, 1, 3)])
def test_a_ring_gives_each_machine_the_sum(n: int, shape: tuple[int, ...]) -> None:
    parts = [torch.randn(shape) for _ in range(n)]
    kept = [part.clone() for part in parts]
    total = torch.stack(parts).sum(dim=0)
    for machine in plain.all_reduce(parts):
        torch.testing.assert_close(machine, total)
    pieces = plain.reduce_scatter(parts)
    assert [piece.numel() for piece in pieces] == [piece.numel() for piece in total.flatten().tensor_split(n)]
    torch.testing.assert_close(torch.cat(pieces), total.flatten())
    assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True)), 'the inputs of the machines are unchanged'


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('n', [1, 2, 3])
def test_data_parallel_machines_all_get_the_gradient_of_the_whole_batch(n: int) -> None:
    model, (x, y) = GPT(SHAPE), batch(7)
    of_machines = plain.data_parallel(model, x, y, n)
    assert len(of_machines) == n
    for gradients in of_machines:
        assert_equal_to_rounding(names(gradients), names(whole_gradient(model, x, y)))


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('n', [1, 2, 3])
def test_fsdp_machines_get_pieces_of_that_gradient_from_pieces_of_the_weights(n: int) -> None:
    model, (x, y) = GPT(SHAPE), batch(7)
    expected = whole_gradient(model, x, y)
    pieces = [[p.detach().flatten().tensor_split(n)[machine].clone() for p in model.parameters()]
              for machine in range(n)]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(9.0)  # no machine has a whole weight before the step
    found = plain.fsdp(model, pieces, x, y)
    for i, g in enumerate(expected):
        torch.testing.assert_close(torch.cat([of_machine[i] for of_machine in found]).view_as(g), g)


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('n', [1, 2, 3])
def test_zero1_machines_learn_what_one_learns_with_a_part_of_the_moments_each(n: int) -> None:
    sizes = [(3, 4), (5,), (2, 2), (7,)]
    alone = [torch.randn(size) for size in sizes]
    weights = [[p.clone() for p in alone] for _ in range(n)]
    moments = [{i: (torch.zeros_like(p), torch.zeros_like(p)) for i, p in enumerate(alone) if i % n == machine}
               for machine in range(n)]
    of_one = [(torch.zeros_like(p), torch.zeros_like(p)) for p in alone]
    for step in range(3):
        gradients = [torch.randn(size) for size in sizes]
        for p, g, (m, v) in zip(alone, gradients, of_one, strict=True):
            train_trivialised.adamw(p, g, m, v, step, 0.1, 0.5)
        plain.zero1(weights, [gradients] * n, moments, step, 0.1, 0.5)
    for machine in weights:
        assert all(torch.equal(p, q) for p, q in zip(machine, alone, strict=True))


def main(dataset: str, out: str) -> None:
    """Compute the gradient of one step of train.py with each strategy, and save it."""
    process = processes.start('cpu', 'gloo', shards=True)
    corpus = open_split(Path(dataset), 'train', SHAPE.block_size, SHAPE.vocab_size)
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        with in_float64():
            torch.manual_seed(5)
            raw = fast.GPT(SHAPE)
            compute = choose(process.device, 'float32', compile=False)
            model = strategies.distribute(raw, raw.transformer.h, process, strategy, compute.dtype, True, False)
            optimizer = torch.optim.AdamW(raw.parameters())
            scaler = torch.amp.GradScaler('cpu', enabled=False)
            learner = Learner(raw, model, optimizer, scaler, process, compute)
            train.accumulate_gradient(learner, parts_of(corpus, torch.arange(0, 7 * 20, 20).numpy(), 2, SHAPE, process))
            found[strategy] = {name: strategies.complete(p.grad) for name, p in raw.named_parameters()
                               if p.grad is not None}
    if process.is_main:
        torch.save(found, out)
    processes.stop()


@pytest.mark.slow
def test_train_py_on_two_real_processes_computes_the_gradient_of_the_plain_file(
        tiny_dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m',
               'tests.test_parallel_twins', str(tiny_dataset), str(tmp_path / 'gradients.pt')]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / 'gradients.pt')

    corpus = open_split(tiny_dataset, 'train', SHAPE.block_size, SHAPE.vocab_size)
    x, y = read_batch(corpus, torch.arange(0, 7 * 20, 20).numpy(), SHAPE.block_size, 7, SHAPE.vocab_size)
    with in_float64():
        torch.manual_seed(5)
        model = GPT(SHAPE)
        expected = plain.data_parallel(model, x, y, 2)[0]
    for strategy in STRATEGIES:
        of_names = dict(zip([name for name, _ in model.named_parameters()], expected, strict=True))
        assert_equal_to_rounding(found[strategy], of_names)


if __name__ == '__main__':
    main(*sys.argv[1:])
