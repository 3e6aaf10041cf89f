"""The processes that train together: how they meet and part, add up and agree; and Slurm, which may start them."""
import gc
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plaingpt.errors import PEER_LOST, STOPPED, UserError
from plaingpt.machines.device import card, pick_device

Progress = Callable[[Iterable[int], int, str, str], Iterable[int]]  # a bar around items: how many, what, in which unit
# What srun says, under the names of torchrun.
SLURM = {'RANK': 'SLURM_PROCID', 'LOCAL_RANK': 'SLURM_LOCALID', 'WORLD_SIZE': 'SLURM_NTASKS'}


@dataclass(frozen=True)
class Process:
    """One of those that train together, each on a device of its own."""

    rank: int  # 0 .. world_size - 1, over all machines
    world_size: int  # processes that train together
    device: torch.device
    why: str  # this device
    local_rank: int = 0  # among those of this machine
    store: dist.Store = field(default_factory=dist.HashStore)  # a small dictionary that all processes read and write

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes files."""
        return self.rank == 0


def start(device: str, backend: str = 'auto', deterministic: bool = False, timeout: float = 1800.0,
          shards: bool = False) -> Process:
    """Join the processes that torchrun or srun started, if one did; wait at most `timeout` seconds for the others. A
    process that trains alone belongs to a group only where its model `shards`."""
    device, why = pick_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32 under autocast; it touches nothing but cuda
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    kind = torch.device(device).type
    if kind == 'mps' and shards:
        raise UserError('fsdp cannot divide a model on mps: give --strategy=ddp, or --device=cpu')
    if kind != 'cuda' and backend == 'nccl':
        why += ', and gloo takes the place of nccl, which needs cuda'  # nanoGPT's configurations name it
    if kind != 'cuda' or backend == 'auto':
        backend = 'cpu:gloo,cuda:nccl' if kind == 'cuda' else 'gloo'  # what is offloaded is added up on the CPU
    os.environ.update(slurm_as_torchrun(os.environ))
    if not {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= os.environ.keys():
        if kind == 'cuda':
            torch.cuda.set_device(device if ':' in device else 0)
        if shards:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Process(0, 1, torch.device(device), why)
    local_rank = int(os.environ['LOCAL_RANK'])
    if kind == 'mps':
        raise UserError('several processes cannot share mps: run `python train.py`, or give --device=cpu')
    if kind == 'cuda':
        # srun --gpus-per-task=1 shows a process its own card and no other.
        number = 0 if 'SLURM_LOCALID' in os.environ and torch.cuda.device_count() == 1 else local_rank
        if number >= torch.cuda.device_count():
            raise UserError(f'{torch.cuda.device_count()} cards here are too few for process {local_rank + 1}\n'
                            'give torchrun --nproc_per_node=gpu, for one process on each card')
        torch.cuda.set_device(number)
        device = f'cuda:{number}'
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    return Process(rank, world_size, torch.device(device), why, local_rank, join(backend, timeout))


@contextmanager
def joined(device: str, backend: str = 'auto', deterministic: bool = False, timeout: float = 1800.0,
           shards: bool = False) -> Iterator[Process]:
    """What `start` gives, until the block ends. Where it ends well, or to stop, all processes leave together: torchrun
    takes the first that goes for a failure, and ends the others."""
    process, has_failed = start(device, backend, deterministic, timeout, shards), True
    try:
        yield process
        has_failed = False
    except UserError as error:
        has_failed = error.code != STOPPED
        raise
    finally:
        if not has_failed:
            with suppress(RuntimeError):
                wait_for_all(process)
        if not (has_failed and process.device.type == 'cuda'):  # NCCL might wait for what a lost process owes
            stop()


def slurm_as_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a process that srun started: {} where there is one process, or torchrun has set them."""
    if 'RANK' in environment or not environment.keys() >= set(SLURM.values()) or environment['SLURM_NTASKS'] == '1':
        return {}
    nodes = environment.get('SLURM_STEP_NODELIST') or environment.get('SLURM_JOB_NODELIST') or 'localhost'
    first = re.sub(r'^([^,\[]*)\[(\w+)[^]]*]([^,]*).*', r'\1\2\3', nodes).partition(',')[0]  # gpu[07-09,12] -> gpu07
    job = int(environment.get('SLURM_JOB_ID', '0'))
    return {
        'MASTER_ADDR': environment.get('MASTER_ADDR', first),
        'MASTER_PORT': environment.get('MASTER_PORT', str(20000 + job % 20000)),  # the same on all machines of a job
        **{name: environment[theirs] for name, theirs in SLURM.items()},
    }


def join(backend: str, timeout: float) -> dist.Store:
    """Form the group of all processes, and return a connection of our own to their store. watch.Watch notices sooner
    than the group's own time-out that a process is lost, and names it."""
    limit, where = timedelta(seconds=timeout), [os.environ.get(name, '') for name in ('MASTER_ADDR', 'MASTER_PORT')]
    try:
        store, rank, world_size = next(iter(dist.rendezvous('env://', timeout=limit)))
        dist.init_process_group(backend, store=dist.PrefixStore('group', store), rank=rank, world_size=world_size,
                                timeout=2 * limit)
        dist.barrier()
        ours = dist.TCPStore(where[0], int(where[1]), is_master=False, timeout=limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(f'process {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]} has not met all others at '
                        f'{":".join(where)} in {timeout:.0f} s: {str(error).splitlines()[0]}\n'
                        'were all of them started (with Slurm: srun python train.py), and can they reach that address?',
                        PEER_LOST) from None
    return dist.PrefixStore(f'watch/{os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}', ours)


def stop() -> None:
    """Leave the other processes. gloo's threads must end before the interpreter does, or they take it down with them:
    they do when nothing refers to the group any more, and a DDP model does until it is collected."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def total(numbers: Tensor) -> Tensor:
    """The sum of each number over all processes, on each of them, in place. Every process must call it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def compute_together(n: int, work: Callable[[int], Tensor], process: Process, progress: Progress, label: str,
                     unit: str) -> Tensor:
    """work(0) ... work(n - 1), each a tensor of the same shape and computed by one of the processes, as the rows of one
    tensor in float64 on the CPU: whatever is added up over them has the same bits for any number of processes. Every
    process must call it. Since a model may have to be called by all at once, each works equally often, on numbers from
    n on if need be, whose results are dropped."""
    rounds = math.ceil(n / process.world_size)
    rows = [work(number * process.world_size + process.rank) for number in progress(range(rounds), rounds, label, unit)]
    if process.world_size == 1:
        return torch.stack(rows).double()
    table = torch.zeros(rounds * process.world_size, *rows[0].shape, dtype=torch.float64, device=process.device)
    table[process.rank::process.world_size] = torch.stack(rows).double().to(process.device)
    return total(table).cpu()[:n]  # each row is 0 on all processes but one


def agree(numbers: Tensor) -> Tensor:
    """Which of the numbers are the same on all processes, bit for bit. Every process must call it."""
    first = numbers.clone()
    if dist.is_initialized():
        dist.broadcast(first, src=0)
    return total((numbers != first).int()) == 0


def wait_for_all(process: Process) -> None:
    """Until every process is here."""
    total(torch.zeros(1, device=process.device)).item()


def refuse_difference(process: Process, what: str, value: Any, remedy: str) -> None:
    """Machines may not share the folders that they should: every process must have found the same `value`. All of them
    must call it. Raises UserError, with the remedy, if one has found another."""
    process.store.set(f'{what}/{process.rank}', json.dumps(value, sort_keys=True))
    wait_for_all(process)
    answers = process.store.multi_get([f'{what}/{rank}' for rank in range(process.world_size)])
    found = ['none' if answer == b'null' else str(answer, 'utf-8') for answer in answers]
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(f'process 0 has found the {what} {found[0][:100]}, and process {rank} {other[:100]}\n'
                            f'{remedy}')


def describe(process: Process) -> str:
    name = card(process.device)
    where = f'device {process.device}{name and f" ({name})"}, {process.why}'
    return where if process.world_size == 1 else f'{process.world_size} processes; {where}'
