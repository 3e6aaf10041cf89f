"""Machines: who am I among the processes, where do I compute and how precisely, how do we add up."""
import gc
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from errors import PEER_LOST, STOPPED, UserError

# What srun says, under the names of torchrun.
SLURM = {'RANK': 'SLURM_PROCID', 'LOCAL_RANK': 'SLURM_LOCALID', 'WORLD_SIZE': 'SLURM_NTASKS'}
# Dense 16-bit matrix FLOP/s with 32-bit accumulation, from the makers' data sheets and architecture white papers (which
# often print twice as much, for sparse matrices). The words of a line all stand in the name that the driver gives; the
# first such line counts.
PEAK_FLOPS = {
    'GB200': 2500e12, 'B200': 2250e12,
    'GH200': 989.4e12, 'H200 NVL': 835.5e12, 'H200': 989.4e12,
    'H100 NVL': 835.5e12, 'H100 PCIe': 756e12, 'H100 HBM3': 989.4e12,
    'A100': 312e12, 'A40': 149.7e12, 'A30': 165e12, 'A10': 125e12, 'A10G': 70e12,
    'L40S': 362e12, 'L40': 181e12, 'L4': 121e12,
    'V100S PCIe': 130e12, 'V100 PCIe': 112e12, 'V100 SXM2': 125e12, 'T4': 65e12,
    'RTX 6000 Ada': 364.2e12, 'RTX A6000': 154.8e12,
    'RTX 5090': 209.5e12, 'RTX 4090': 165.2e12, 'RTX 3090 Ti': 80e12, 'RTX 3090': 71e12,
}
FLOAT16_ONLY = {'V100S', 'V100', 'T4'}  # before Ampere: neither bfloat16 nor TF32
OTHER_CHIP = {'mig', 'laptop', 'mobile', 'max-q', 'd'}  # a part of a card, or a smaller chip under the same name
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Process:
    """One of those that train together, each on a device of its own."""

    rank: int  # 0 .. world_size - 1, over all machines
    world_size: int  # processes that train together
    device: torch.device
    why: str  # this device
    local_rank: int = 0  # among those of this machine
    store: dist.Store | None = None  # a small dictionary that all processes read and write; None where there is one

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes files."""
        return self.rank == 0


def pick_device(name: str) -> tuple[str, str]:
    """'auto' takes the first of cuda, mps and cpu that this machine has. Returns the device's type, and why."""
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        name = next(device for device, is_there in there.items() if is_there)
        return name, f'the first of {", ".join(there)} that is here'
    kind, colon, number = name.partition(':')
    if kind not in there or (colon and not number.isdecimal()):
        raise UserError(f"--device={name}: expected 'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'")
    if not there[kind]:
        raise UserError(f'--device={name}: this machine, or this build of torch {torch.__version__}, has no {kind}\n'
                        'try --device=cpu, or --device=auto for the best there is')
    if kind == 'cuda' and colon and int(number) >= torch.cuda.device_count():
        raise UserError(f'--device={name}: the last card here is cuda:{torch.cuda.device_count() - 1}')
    return name, 'as asked'


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The precision of the matrix products, and why: 'auto' takes the fastest that trains soundly on this type of
    device."""
    if device == 'cuda':
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if name == 'auto':
            best = torch.bfloat16 if has_bfloat16 else torch.float16
            return best, 'the card computes with it' if has_bfloat16 else 'the card has no bfloat16'
    elif device == 'mps':
        has_bfloat16 = True
    else:
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if name == 'auto':
        return torch.float32, f'which is sound on every {device}'
    if name == 'bfloat16' and not has_bfloat16:
        return torch.float32, f'bfloat16 was asked for, and this {device} is not known to multiply it'
    if name == 'float16' and device != 'cuda':
        return torch.float32, 'float16 was asked for, and is for cuda alone'
    return DTYPES[name], 'as asked'


def pick_compile(choice: bool | str, device: str) -> tuple[bool, str]:
    """Whether to compile, and why."""
    if choice != 'auto':
        return bool(choice), 'as asked'
    if device != 'cuda':
        return False, 'which rarely pays off cuda'
    compiles = find_spec('triton') is not None and torch.cuda.get_device_capability() >= (7, 0)
    return compiles, 'which pays on cuda' if compiles else 'for want of Triton, or of a newer card'


class Compute(NamedTuple):
    """How a process computes."""

    dtype: torch.dtype  # of matrix products
    autocast: AbstractContextManager[None]  # in which they have it; weights, sums and the loss stay in float32
    compiles: bool
    peak: float | None  # FLOP/s that all cards together promise in them, if that is known
    line: str  # for people: all this, and why


def choose(process: Process, dtype: str, compile: bool | str) -> Compute:
    """What the settings `dtype` and `compile` come to on this machine."""
    precision, why_precision = pick_dtype(dtype, process.device.type)
    compiles, why_compile = pick_compile(compile, process.device.type)
    line = (f'{describe(process)}; {name_of(precision)}, {why_precision}; '
            f'{"compiled" if compiles else "not compiled"}, {why_compile}')
    peak = peak_flops(card(process), name_of(precision))
    return Compute(precision, autocast(process.device, precision), compiles, peak and peak * process.world_size, line)


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
        has_own = 'SLURM_LOCALID' in os.environ and torch.cuda.device_count() == 1  # srun --gpus-per-task=1
        number = 0 if has_own else local_rank
        if number >= torch.cuda.device_count():
            raise UserError(f'{torch.cuda.device_count()} cards here are too few for process {local_rank + 1}\n'
                            'give torchrun --nproc_per_node=gpu, for one process on each card')
        torch.cuda.set_device(number)
        device = f'cuda:{number}'
    rank, world_size, store = join(backend, timeout)
    return Process(rank, world_size, torch.device(device), why, local_rank, store)


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
    port = 20000 + int(environment.get('SLURM_JOB_ID', '0')) % 20000  # the same everywhere, and another for each job
    ours = {name: environment[theirs] for name, theirs in SLURM.items()}
    return {'MASTER_ADDR': first, 'MASTER_PORT': str(port)} | {
        name: environment[name] for name in ('MASTER_ADDR', 'MASTER_PORT') if name in environment} | ours


def join(backend: str, timeout: float) -> tuple[int, int, dist.Store]:
    """The group of all processes: rank, world size, and a connection of our own to their store. faults.Watch notices
    sooner than the group's own time-out that a process is lost, and names it."""
    limit, where = timedelta(seconds=timeout), [os.environ.get(name, '') for name in ('MASTER_ADDR', 'MASTER_PORT')]
    try:
        store, rank, world_size = next(iter(dist.rendezvous('env://', timeout=limit)))
        dist.init_process_group(backend, store=dist.PrefixStore('group', store), rank=rank, world_size=world_size,
                                timeout=2 * limit)
        dist.barrier()
        ours = dist.TCPStore(where[0], int(where[1]), is_master=False, timeout=limit, wait_for_workers=False)
    except (dist.DistError, RuntimeError, ValueError) as error:
        me, reason = f'process {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}', str(error).splitlines()[0]
        raise UserError(f'{me} has not met all others at {":".join(where)} in {timeout:.0f} s: {reason}\n'
                        'were all of them started (with Slurm: srun python train.py), and can they reach that address?',
                        PEER_LOST) from None
    return rank, world_size, dist.PrefixStore(f'watch/{os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}', ours)


def stop() -> None:
    """Leave the other processes. gloo's threads must end before the interpreter does, or they take it down with them:
    they do when nothing refers to the group any more, and a DDP model does until it is collected."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype`; weights, sums and the loss stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def total(numbers: Tensor) -> Tensor:
    """The sum of each number over all processes, on each of them, in place. Every process must call it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def agree(numbers: Tensor) -> Tensor:
    """Which of the numbers are the same on all processes, bit for bit. Every process must call it."""
    least, most = numbers.clone(), numbers.clone()
    if dist.is_initialized():
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return least == most


def wait_for_all(process: Process) -> None:
    """Until every process is here."""
    total(torch.zeros(1, device=process.device)).item()


def refuse_difference(process: Process, what: str, value: Any, remedy: str) -> None:
    """Machines may not share the folders that they should: every process must have found the same `value`. All of them
    must call it; each says it in JSON."""
    if process.store is None:
        return
    process.store.set(f'{what}/{process.rank}', json.dumps(value, sort_keys=True))
    wait_for_all(process)
    found = process.store.multi_get([f'{what}/{rank}' for rank in range(process.world_size)])
    other = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if other is not None:
        ours, theirs = (str(found[rank], 'utf-8')[:100].replace('null', 'none') for rank in (0, other))
        raise UserError(f'process 0 has found the {what} {ours}, and process {other} {theirs}\n{remedy}')


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def card(process: Process) -> str:
    """What the maker calls it; '' where there is none."""
    return torch.cuda.get_device_name(process.device) if process.device.type == 'cuda' else ''


def describe(process: Process) -> str:
    where = f'device {process.device}{card(process) and f" ({card(process)})"}, {process.why}'
    return where if process.world_size == 1 else f'{process.world_size} processes; {where}'


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """On cuda this process does not wait for the copy: it queues it, as it queues the work on it, and goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s that the card promises in matrix products of `dtype` ('float32': with TF32 allowed, half the 16-bit rate);
    None where it is not known, so that no wrong utilisation is shown."""
    words = set(re.split(r'[\s-]+', device_name.lower()))
    if not words.isdisjoint(OTHER_CHIP):
        return None
    for name, flops in PEAK_FLOPS.items():
        if words.issuperset(name.lower().split()):
            if name.split()[0] in FLOAT16_ONLY and dtype != 'float16':
                return None
            return flops / 2 if dtype == 'float32' else flops
    return None


def peak_memory(device_type: str) -> int:
    """The most bytes that this process has held, on the card ('mps': that it holds now) or in main memory; 0 where the
    system does not say."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    if device_type == 'mps':
        return torch.mps.driver_allocated_memory()
    if sys.platform == 'win32':
        return 0
    import resource  # absent on Windows

    unit = 1 if sys.platform == 'darwin' else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
