"""
The strategies by which several processes train one model: each holds all of it or a part, and a checkpoint puts the
parts together.

PyTorch's modules for that take half a second to import. They are imported where they are used, and so never by a
process that trains alone, unless it was asked for fsdp.
"""
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from plaingpt.errors import UserError
from plaingpt.machines.processes import Process
from plaingpt.machines.zero import Zero

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Strategy = Literal['ddp', 'zero1', 'fsdp']


def distribute(model: nn.Module, blocks: Iterable[nn.Module], process: Process, strategy: Strategy, dtype: torch.dtype,
               reshard: bool, cpu_offload: bool) -> nn.Module:
    """Return the model on its device, with a backward pass that ends with the mean of the gradients over all processes.
    Each holds all of it, or, with 'fsdp', an equal part of every tensor (Zhao et al. 2023), which the others complete
    where it is used: block after block. Build the optimizer afterwards, from what is held then."""
    if cpu_offload and strategy != 'fsdp':
        raise UserError('--cpu_offload=True is a part of --strategy=fsdp: give both, or neither')
    if strategy != 'fsdp':
        model.to(process.device)
        if process.world_size == 1:
            return model
        torch._dynamo.config.optimize_ddp = False  # single blocks are compiled: DDP need not cut them further
        return DistributedDataParallel(model, device_ids=[process.device] if process.device.type == 'cuda' else None,
                                       gradient_as_bucket_view=True)
    if dtype == torch.float16:
        raise UserError('float16 needs a GradScaler, and that does not know the parts of fsdp: give --dtype=bfloat16, '
                        '--dtype=float32, or another --strategy')
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = dist.init_device_mesh(process.device.type, (process.world_size,))
    offload = CPUOffloadPolicy(pin_memory=process.device.type == 'cuda') if cpu_offload else OffloadPolicy()
    # Weights travel in `dtype`, gradients are added in float32, and autocast sees to the rest as it does for ddp. But
    # autocast on a CPU cannot apply LayerNorm's bfloat16 gains to float32 numbers: there a block gets bfloat16, and
    # returns float32.
    has_gains = any(isinstance(module, nn.LayerNorm) for module in model.modules())
    precision = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(
        dtype, torch.float32, torch.float32, cast_forward_inputs=has_gains and process.device.type == 'cpu')
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)
    return model


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Switch the exchange of gradients on or off. One exchange in a step, after its last micro-batch, is enough; with
    'fsdp' there is one after each, as no process has room for all gradients."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on


def clip(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Shorten the gradient, as one vector over all processes, to `limit`. Return the length that it had, a scalar."""
    return complete(nn.utils.clip_grad_norm_(parameters, limit or math.inf))


def is_divided(tensor: Tensor) -> 'TypeGuard[DTensor]':
    """Return whether each process holds a part of the tensor."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def complete(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, even if each process holds a part. Every process must call it."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def gather(model: nn.Module, optimizer: Optimizer, process: Process) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights and the optimizer's state, whole, under the names they would have in one process. They are
    copies in main memory, so that training can continue. Every process must call it; all but the main one get
    nothing."""
    if dist.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # evaluation may have left its weights complete
    state = optimizer.state_dict()
    copies = {p: whole_copy(p, process) for p in model.parameters()}  # tied weights stay one tensor
    weights = {name: copies[p] for name, p in model.named_parameters(remove_duplicate=False)}
    moments = optimizer.gather() if isinstance(optimizer, Zero) else {
        number: {name: whole_copy(tensor, process) for name, tensor in tensors.items()}
        for number, tensors in state['state'].items()}
    return (weights, state | {'state': moments}) if process.is_main else ({}, {})


def whole_copy(tensor: Tensor, process: Process) -> Tensor:
    """Return the whole tensor, in main memory, in the main process; the others get nothing. Every process must call
    it."""
    tensor = complete(tensor.detach())
    return tensor.to('cpu', copy=True) if process.is_main else torch.empty(0)


def load_optimizer(optimizer: Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Give the optimizer the state of each weight, whole as `gather` returned it; a process keeps its part. Learning
    rates and the like stay as they are."""
    for number, p in enumerate(p for group in optimizer.param_groups for p in group['params']):
        if number in state and (not isinstance(optimizer, Zero) or optimizer.holds(p)):
            optimizer.state[p] = {name: moment_of(p, name, value) for name, value in state[number].items()}


def moment_of(p: nn.Parameter, name: str, value: Tensor | float) -> Tensor:
    """Return a copy of this process's part of a tensor in the state of p: the given one may be in a file."""
    # a fused AdamW keeps the number of updates as a float32, on the weight's device
    dtype = torch.float32 if name == 'step' else p.dtype
    return shard_like(torch.as_tensor(value), p).to(p.device, dtype, copy=True)


def shard_like(tensor: Tensor, p: nn.Parameter) -> Tensor:
    """Return this process's part of a tensor that belongs to `p`, which has fewer rows if the block_size is shorter
    than before; the number of steps, a scalar, belongs to every process."""
    tensor = tensor[:len(p)] if tensor.dim() else tensor
    if not is_divided(p) or tensor.dim() == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)  # all have the same: no exchange
