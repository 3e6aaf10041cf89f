"""
The bytes that a process holds for each parameter of a model that several train, by strategy, beside the expected ones.

    python benchmarks/memory.py

Weights, gradients and AdamW's two moments, all float32, are four times 4 bytes. ddp: each of N processes has all, 16.
zero1: the moments in parts, 8 + 8/N. fsdp: all in parts, 16/N. The tensors themselves are counted after a step, on gloo
and CPU. Activations, and what is gathered for a moment, come on top.
"""
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import configurator
import train
from model import GPT, GPTConfig
from plaingpt.errors import run
from plaingpt.machines import processes, strategies

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
n_layer: int = 4
n_embd: int = 128
answer: str = ''  # a file for the result of one launch, which this script starts itself
# ------------------------------------------------------------------------------------------------

STRATEGIES: tuple[strategies.Strategy, ...] = ('ddp', 'zero1', 'fsdp')
PROCESSES = (1, 2, 4)


def expected(strategy: strategies.Strategy, n: int) -> float:
    return {'ddp': 16.0, 'zero1': 8 + 8 / n, 'fsdp': 16 / n}[strategy]


def held(tensors: Iterator[Tensor]) -> int:
    """Return the bytes of memory behind the tensors in this process; each piece of memory counts once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in local}.values())


def tensors_of(model: GPT, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for p in model.parameters():
        yield p.data
        if p.grad is not None:
            yield p.grad
    yield from (value for moments in optimizer.state.values() for value in moments.values())


def measure(strategy: strategies.Strategy, process: processes.Process) -> float:
    """Return the most bytes that a process holds for each parameter."""
    config = GPTConfig(n_layer=n_layer, n_head=4, n_embd=n_embd, block_size=64, vocab_size=1024)
    model = GPT(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    wrapped = strategies.distribute(model, model.transformer.h, process, strategy, torch.float32, True, False)
    train.strategy = strategy
    optimizer = train.make_optimizer(model, process)
    ids = torch.randint(1024, (2, 65))
    _, loss = wrapped(ids[:, :-1], ids[:, 1:], logits='none')
    loss.backward()
    optimizer.step()
    of_ranks = torch.zeros(process.world_size)
    of_ranks[process.rank] = held(tensors_of(model, optimizer)) / n_parameters
    return float(processes.total(of_ranks).max())


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if answer:
        with processes.joined('cpu', shards=True) as process:
            results = {strategy: measure(strategy, process) for strategy in STRATEGIES}
            if process.is_main:
                Path(answer).write_text(json.dumps(results), encoding='utf-8')
        return
    print('bytes for each parameter, in the process that holds most (expected)')
    for n in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'answer.json')
            torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
            command = [*torchrun, __file__, f'--answer={file}', f'--n_layer={n_layer}', f'--n_embd={n_embd}']
            environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            results = json.loads(file.read_text(encoding='utf-8'))
        shown = [f'{name} {results[name]:.2f} ({expected(name, n):.2f})' for name in STRATEGIES]
        print(f'{n} processes: {", ".join(shown)}', flush=True)


if __name__ == '__main__':
    run(main)
