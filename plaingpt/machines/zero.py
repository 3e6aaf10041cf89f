"""An optimizer that several processes share: each keeps the state of the weights that it owns, and updates them."""
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from plaingpt.machines import processes
from plaingpt.machines.processes import Process

Groups = list[dict[str, Any]]


def deal(sizes: list[int], n: int) -> list[int]:
    """Return which of n processes owns each of the tensors of these sizes: the largest go first, each to the process
    that has least."""
    shares, owners = [0] * n, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owners[number] = shares.index(min(shares))
        shares[owners[number]] += sizes[number]
    return owners


def names_of(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of what an optimizer keeps for each weight of a group: Muon, if the group has `parts`, or
    AdamW."""
    return ('momentum_buffer',) if 'parts' in group else ('step', 'exp_avg', 'exp_avg_sq')


class Zero(Optimizer):
    """ZeRO, stage 1 (Rajbhandari et al. 2020): the weights of the `divided` groups are dealt out to the processes. Each
    updates its own, with the optimizer that `make` makes, and sends them to the others. All update the weights that are
    not divided."""

    def __init__(self, groups: Groups, divided: Groups, make: Callable[[Groups], Optimizer], process: Process) -> None:
        self.process = process
        weights = [p for group in divided for p in group['params']]
        self.owners = dict(zip(weights, deal([p.numel() for p in weights], process.world_size), strict=True))
        self.part = make([{**group, 'params': [p for p in group['params'] if self.holds(p)]} for group in groups])
        super().__init__([{**part, 'params': group['params']}
                          for group, part in zip(groups, self.part.param_groups, strict=True)], self.part.defaults)
        self.state = self.part.state

    def holds(self, p: Tensor) -> bool:
        """Return whether this process has the state of a weight."""
        return self.owners.get(p, self.process.rank) == self.process.rank

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:
        for group, part in zip(self.param_groups, self.part.param_groups, strict=True):
            part.update({name: value for name, value in group.items() if name != 'params'})
        self.part.step()
        for rank in range(self.process.world_size):
            owned = [p for p, owner in self.owners.items() if owner == rank]
            if owned:
                flat = torch.cat([p.flatten() for p in owned])  # one exchange instead of many
                dist.broadcast(flat, rank)
                for p, new in zip(owned, flat.split([p.numel() for p in owned]), strict=True):
                    p.copy_(new.view_as(p))

    def gather(self) -> dict[int, dict[str, Tensor]]:
        """Return the state of each weight, by its number, in the memory of process 0; the others get nothing. Every
        process must call it."""
        weights = [p for group in self.param_groups for p in group['params']]
        owned = {number: {name: [*tensor.shape] for name, tensor in self.state[p].items()}
                 for number, p in enumerate(weights) if p in self.state and self.owners.get(p, 0) == self.process.rank}
        whole = dict[int, dict[str, Tensor]]()
        for owner, shapes in enumerate(processes.tell_all(self.process, owned)):
            for number, of_names in shapes.items():
                p = weights[int(number)]
                whole[int(number)] = {name: self.send(p, name, owner, shape) for name, shape in of_names.items()}
        return dict(sorted(whole.items())) if self.process.is_main else {}

    def send(self, p: Tensor, name: str, owner: int, shape: list[int]) -> Tensor:
        """Return, in process 0, a copy of a tensor in the state of p, which its owner sends there."""
        rank = self.process.rank
        if rank == owner == 0:
            return self.state[p][name].to('cpu', copy=True)
        if rank == owner:
            dist.send(self.state[p][name].contiguous(), 0)
        elif rank == 0:
            # the number of updates, a scalar, is a float32
            tensor = torch.empty(shape, dtype=p.dtype if shape else torch.float32, device=p.device)
            dist.recv(tensor, owner)
            return tensor.cpu()
        return torch.empty(0)
