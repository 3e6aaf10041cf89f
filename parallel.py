"""Machines: who am I among the processes, where do I compute and in which precision, and how do we add up."""
import gc
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class Process:
    """One of those that train together, each on a device of its own."""

    rank: int  # 0 .. world_size - 1, over all machines
    world_size: int  # processes that train together
    device: torch.device
    why: str  # this device

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


def start(device: str, backend: str = 'auto', deterministic: bool = False) -> Process:
    """Join the processes that torchrun started, if it did."""
    device, why = pick_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True  # what stays float32 under autocast; it touches nothing but cuda
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    kind = torch.device(device).type
    if not {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= os.environ.keys():
        if kind == 'cuda':
            torch.cuda.set_device(device if ':' in device else 0)
        return Process(0, 1, torch.device(device), why)
    local_rank = int(os.environ['LOCAL_RANK'])
    if kind == 'mps':
        raise UserError('several processes cannot share mps: run `python train.py`, or give --device=cpu')
    if kind == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise UserError(f'{torch.cuda.device_count()} cards here are too few for process {local_rank + 1}\n'
                            'give torchrun --nproc_per_node=gpu, for one process on each card')
        torch.cuda.set_device(local_rank)
        device = f'cuda:{local_rank}'
    if kind != 'cuda' and backend == 'nccl':
        why += ', and gloo takes the place of nccl, which needs cuda'  # nanoGPT's configurations name it
    dist.init_process_group('gloo' if kind != 'cuda' else 'nccl' if backend == 'auto' else backend)
    return Process(dist.get_rank(), dist.get_world_size(), torch.device(device), why)


def stop() -> None:
    """Leave the other processes. gloo's threads must end before the interpreter does, or they take it down with them:
    they do when nothing refers to the group any more, and a DDP model does until it is collected."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Matrix products in `dtype`; weights, sums and the loss stay in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def wrap(model: nn.Module, process: Process) -> nn.Module:
    """The model whose backward pass ends with the mean of the gradients over all processes."""
    if process.world_size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[process.device] if process.device.type == 'cuda' else None)


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Gradients are exchanged once in a step, after its last micro-batch: before that it would be waste."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on


def total(numbers: Tensor) -> Tensor:
    """The sum of each number over all processes, on each of them, in place. Every process must call it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


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
