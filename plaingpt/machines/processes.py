"""The processes that train together: how they meet and part, sum up and agree."""
import atexit
import gc
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import configurator
from plaingpt.errors import DONE, STOPPED, UserError, code_of
from plaingpt.machines import meeting
from plaingpt.machines.device import gpu_name, pick_device
from plaingpt.paths import PACKAGE, STAGES

SOURCES = ('configurator', 'evaluate', 'export', 'model', 'model_modern', 'sample', 'train')  # beside the package
Progress = Callable[[Iterable[int], int, str, str], Iterable[int]]  # a bar around items: how many, what, in which unit


@dataclass(frozen=True)
class Process:
    """One of the processes that train together, each on a device of its own."""

    rank: int  # 0 .. world_size - 1, over all machines
    world_size: int  # processes that train together
    device: torch.device
    why: str  # it computes on this device
    local_rank: int = 0  # among those of this machine
    store: dist.Store = field(default_factory=dist.HashStore)  # a small dictionary that all processes read and write

    @property
    def is_main(self) -> bool:
        """Return whether this is the one process that prints and writes files."""
        return self.rank == 0


def start(device: str, backend: str = 'auto', deterministic: bool = False, timeout: float = 1800.0,
          shards: bool = False, offloads: bool = False) -> Process:
    """Join the processes that torchrun, mpirun or srun started, if one did; wait at most `timeout` seconds for the
    others. A process that trains alone forms a group only if it `shards` its model. If it `offloads`, main memories
    exchange data, too."""
    device, why = pick_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True  # for products that stay float32 under autocast; on cuda only
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    kind = torch.device(device).type
    if kind == 'mps' and shards:
        raise UserError('fsdp cannot divide a model on mps: give --strategy=ddp, or --device=cpu')
    if kind != 'cuda' and backend == 'nccl':
        why += ', and gloo takes the place of nccl, which needs cuda'  # nanoGPT's config files ask for nccl
    backend = backend_for(kind, backend, offloads)
    launch = meeting.launch_of(os.environ)
    if launch is None:
        number = int(device.partition(':')[2] or 0)
        if kind == 'cuda':
            torch.cuda.set_device(number)
        if shards:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1,
                                    device_id=gpu_for(backend, number))
        return Process(0, 1, torch.device(device), why + meeting.why_alone(os.environ))
    os.environ.update(launch.variables)
    rank, local_rank, world_size = (int(launch.variables[name]) for name in meeting.RANKS)
    if kind == 'mps':
        raise UserError('several processes cannot share mps: run one, without torchrun, or give --device=cpu')
    number = 0
    if kind == 'cuda':
        # srun --gpus-per-task=1 shows each process its own GPU and no other.
        number = 0 if 'SLURM_LOCALID' in os.environ and torch.cuda.device_count() == 1 else local_rank
        if number >= torch.cuda.device_count():
            raise UserError(f'{torch.cuda.device_count()} GPUs here are too few for process {local_rank + 1}\n'
                            'give torchrun --nproc_per_node=gpu, for one process on each GPU')
        torch.cuda.set_device(number)
        device = f'cuda:{number}'
    store = meeting.join(launch, backend, timeout, gpu_for(backend, number))
    return Process(rank, world_size, torch.device(device), why, local_rank, store)


def backend_for(kind: str, asked: str, offloads: bool) -> str:
    """Return the backend that connects processes on this kind of device. NCCL cannot exchange what lies in main memory.
    gloo can, but needs a working network of its own, so it is added only if it is needed."""
    if kind != 'cuda':
        return 'gloo'
    if asked in ('auto', 'nccl'):
        return 'cpu:gloo,cuda:nccl' if offloads else 'nccl'
    return asked


def gpu_for(backend: str, number: int) -> torch.device | None:
    """Return the GPU that a group is bound to: NCCL then connects at once, and has its barriers on the GPUs."""
    return torch.device('cuda', number) if 'nccl' in backend else None


@contextmanager
def joined(device: str, backend: str = 'auto', deterministic: bool = False, timeout: float = 1800.0,
           shards: bool = False, offloads: bool = False) -> Iterator[Process]:
    """Yield what `start` returns until the block ends. If it ends well, or to stop, all processes leave together:
    torchrun takes the first one that leaves for a failure, and ends the others."""
    process, code = start(device, backend, deterministic, timeout, shards, offloads), DONE
    try:
        yield process
    except BaseException as error:
        code = code_of(error)
        raise
    finally:
        if code in (DONE, STOPPED):
            with suppress(RuntimeError):
                wait_for_all(process)
        if code in (DONE, STOPPED) or process.device.type != 'cuda':
            stop()
        elif dist.is_initialized():
            atexit.register(end_at_once, code)


def end_at_once(code: int) -> None:
    """End this process without destroying what it holds: NCCL might wait for what a lost process owes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it no longer has a reader, or is closed
            stream.flush()
    os._exit(code)


def limit_exchanges(seconds: float) -> None:
    """Let PyTorch end this process, by SIGABRT, if it waits longer than that for the others: the last resort, if no
    thread of its own can end it."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def stop() -> None:
    """Leave the other processes. gloo's threads must end before the interpreter does, or else they crash it. They end
    when nothing refers to the group any more, and a DDP model does until it is collected."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def total(numbers: Tensor) -> Tensor:
    """Return the sum of each number over all processes, on each of them, in place. Every process must call it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def compute_together(n: int, work: Callable[[int], Tensor], process: Process, progress: Progress, label: str,
                     unit: str) -> Tensor:
    """Return work(0) ... work(n - 1), tensors of one shape which the processes compute among them, as the rows of one
    tensor in float64 on the CPU: a sum over them has the same bits for any number of processes. Every process must call
    it. Since all may have to call a model at once, each works equally often, if need be on numbers from n on, whose
    results are dropped."""
    rounds = math.ceil(n / process.world_size)
    rows = [work(number * process.world_size + process.rank) for number in progress(range(rounds), rounds, label, unit)]
    if process.world_size == 1:
        return torch.stack(rows).double()
    table = torch.zeros(rounds * process.world_size, *rows[0].shape, dtype=torch.float64, device=process.device)
    table[process.rank::process.world_size] = torch.stack(rows).double().to(process.device)
    return total(table).cpu()[:n]  # each row is 0 on all processes but one


def agree(numbers: Tensor) -> Tensor:
    """Return which of the numbers are the same on all processes, bit for bit. Every process must call it."""
    first = numbers.clone()
    if dist.is_initialized():
        dist.broadcast(first, src=0)
    return total((numbers != first).int()) == 0


def wait_for_all(process: Process) -> None:
    """Block until every process has called this."""
    total(torch.zeros(1, device=process.device)).item()


def tell_all(process: Process, value: Any) -> list[Any]:
    """Return the values of all processes, in the order of their ranks; they travel as JSON. Every process must call
    it."""
    process.store.set(f'said/{process.rank}', json.dumps(value))
    wait_for_all(process)
    found = list(map(json.loads, process.store.multi_get([f'said/{rank}' for rank in range(process.world_size)])))
    wait_for_all(process)  # before one of them writes again, or ends and takes the store with it
    return found


def refuse_difference(process: Process, values: dict[str, Any], remedy: str) -> None:
    """Raise UserError on all processes, with the remedy, unless all have the same value under each name. Every process
    must call it."""
    found, faults = tell_all(process, values), []
    for name in dict.fromkeys(key for one in found for key in one):
        ranks: dict[str, list[int]] = {}  # the ranks that have each value
        for rank, one in enumerate(found):
            ranks.setdefault(json.dumps(one.get(name), sort_keys=True), []).append(rank)
        if len(ranks) > 1:
            faults.append(f'{name}: ' + ', '.join(f'{"none" if value == "null" else value[:100]} on {name_ranks(those)}'
                                                  for value, those in ranks.items()))
    if faults:
        more = f'; and {len(faults) - 3} more differences' if len(faults) > 3 else ''
        raise UserError(f'{"; ".join(faults[:3])}{more}\n{remedy}')


def name_ranks(ranks: list[int]) -> str:
    """Return 'processes 1, 2' for [1, 2]."""
    names = ', '.join(map(str, ranks[:8])) + (f' and {len(ranks) - 8} more' if len(ranks) > 8 else '')
    return f'process{"es" if len(ranks) > 1 else ""} {names}'


def agree_on_settings(process: Process, script: ModuleType, args: list[str], place: Iterable[str]) -> dict[str, Any]:
    """Return the settings that `args` give to `script`; those with the time in them take it from the clock of process
    0. Every process must call it. Raise UserError on all of them if they differ in the kind of their device, in the
    version of torch, in the source code, or in a setting other than those that belong to a `place`."""
    if process.is_main:
        process.store.set('clock', repr(configurator.STARTED))
    clock = float(process.store.get('clock'))
    if clock != configurator.STARTED:
        configurator.configure(script, args, clock)
    settings = {name: getattr(script, name) for name in configurator.find_settings(script)}
    code = sorted([*(STAGES / f'{name}.py' for name in SOURCES), *PACKAGE.glob('*/*.py'), *PACKAGE.glob('*.py')])
    sums = {str(path.relative_to(PACKAGE.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in code}
    refuse_difference(process, {
        **{name: value for name, value in settings.items() if name not in place},
        'kind of device': process.device.type,
        'torch': str(torch.__version__),
        **sums,
    }, 'give all processes the same command, and the same files')
    return configurator.record(script)


def describe(process: Process) -> str:
    name = gpu_name(process.device)
    where = f'device {process.device}{name and f" ({name})"}, {process.why}'
    return where if process.world_size == 1 else f'{process.world_size} processes; {where}'
