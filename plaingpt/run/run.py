"""The two objects that the training loop holds beside its data: the learner, and the run around it."""
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from model import GPT
from plaingpt import console
from plaingpt.corpus.folder import Data
from plaingpt.machines import processes, strategies
from plaingpt.machines.device import Compute, name_of, peak_memory
from plaingpt.machines.processes import Process, Progress
from plaingpt.machines.stop import Stop, StopAsked
from plaingpt.machines.watch import Watch
from plaingpt.metrics import Best, Predictor
from plaingpt.run import checkpoint
from plaingpt.run.log import Log, Pace


@dataclass
class Learner:
    """A model, all that changes while it learns, which a checkpoint holds, and the device it learns on."""

    raw_model: GPT
    model: nn.Module  # the same, as several processes share it
    optimizer: Optimizer  # each group's learning rate is the schedule's times its `scale`
    scaler: torch.amp.GradScaler  # of the loss, for float16
    process: Process
    compute: Compute
    step: int = 0  # updates made
    windows: int = 0  # read in all
    windows_before: int = 0  # of these: before this corpus and block_size
    tokens: int = 0  # read in all
    best: Best = field(default_factory=dict)
    skipped: int = 0  # steps without an update, as something was not finite
    skipped_in_a_row: int = 0

    def predictor(self, batch_size: int) -> Predictor:
        return Predictor(self.model, self.raw_model.config, self.process, self.compute, batch_size)

    @property
    def place(self) -> checkpoint.Place:
        return checkpoint.Place(self.step, self.windows, self.windows_before, self.tokens)

    def count_step(self, n_windows: int) -> None:
        """Note that one more step is done, in which all processes together have read n_windows."""
        self.step += 1
        self.windows += n_windows
        self.tokens += n_windows * self.raw_model.config.block_size

    def is_sound(self, loss: float, grad_norm: float) -> bool:
        """Return whether the weights may be updated: loss and gradient are finite, and then they are on all processes.
        An overflow of float16 is left to the scaler, which then updates nothing either."""
        return math.isfinite(loss) and (math.isfinite(grad_norm) or self.may_overflow())

    def may_overflow(self) -> bool:
        """Return whether a smaller scale of the loss may help against an overflow. A GPU is waited for."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1


class Work(NamedTuple):
    """The amount of work that a run has to do."""

    n_windows: int  # in a step, over all processes
    n_parts: int  # micro-batches of each process in a step
    last_step: int  # the run ends before this step
    decay_steps: int  # the step at which the learning rate has come down
    end: int  # windows of this corpus that are read by the end


@dataclass
class Run:
    """All that surrounds learning. Every process calls it alike; only the main one writes."""

    folder: Path
    log: Log
    saver: checkpoint.Saver
    watch: Watch  # over the other processes
    stop: Stop  # may ask for an end
    process: Process
    record: dict[str, Any]  # the settings, as checkpoints keep them
    wandb_run_id: str
    first_step: int  # updates that were made before
    work: Work
    log_interval: int  # steps
    pace: Pace
    first_loss: float = math.nan  # of the reported steps
    last_loss: float = math.nan
    is_asked: bool | None = None  # whether any process was asked to end, as of the last exchange; None: not known

    def heed(self, learner: Learner) -> None:
        """Raise StopAsked, on all processes at once, if any of them was asked to end. Raise what went wrong with the
        last checkpoint, if that is known by now."""
        self.watch.beat(learner.step)
        if self.is_asked is None:
            self.add_up(torch.zeros((), device=self.process.device))
        if self.is_asked:
            raise StopAsked(self.stop.reason or 'another process')
        self.is_asked = None
        self.saver.complain()

    def add_up(self, part_of_loss: Tensor, *others: Tensor) -> list[float]:
        """Return the loss over all processes, and other scalars that each of them has. Learn with it whether any of
        them was asked to end: what is exchanged at once, and read at once, makes a GPU wait once in a step."""
        self.watch.beat()  # a process that does not come so far is behind those that wait for it here
        # a signal may have reached one process alone, and all must end before the same step
        is_asked = part_of_loss.new_full((), float(self.stop.is_asked()))
        shared = processes.total(torch.stack([part_of_loss, is_asked]))
        loss, asked, *numbers = torch.stack([*shared, *(other.to(shared) for other in others)]).tolist()
        self.is_asked = asked > 0
        return [loss, *numbers]

    def progress(self, learner: Learner) -> Progress:
        """Return a bar for loops, in which they heed requests to stop."""
        def heeding(items: Iterable[int], total: int, label: str, unit: str) -> Iterator[int]:
            for item in console.progress(items, total, label, unit, say=self.log.line):
                self.heed(learner)
                yield item

        return heeding

    def is_due(self, interval: int, step: int) -> bool:
        """Return whether something is due before `step`: every `interval` steps, and at the end. 0 means never."""
        return interval > 0 and (step % interval == 0 or step == self.work.last_step)

    def report(self, learner: Learner, loss: float, lr: float, grad_norm: float) -> None:
        """Report the last update, every log_interval steps, and the first and the last one of the run."""
        step = self.log.reached = learner.step - 1
        if step % self.log_interval and step not in (self.first_step, self.work.last_step - 1):
            return
        self.first_loss = loss if step == self.first_step else self.first_loss
        self.last_loss = loss
        self.log.iteration(step, {
            'loss': loss,
            'lr': lr,
            'grad_norm': grad_norm,
            'tokens': learner.tokens,
            'skipped': learner.skipped,
            'peak_memory_bytes': peak_memory(self.process.device.type),
        }, self.pace.lap())

    def save(self, data: Data, learner: Learner, is_best: bool = False) -> None:
        """Begin to write a checkpoint: every process gives its part, and the main one writes while all continue."""
        self.saver.wait()  # so that memory holds one copy of the weights at a time
        weights, moments = strategies.gather(learner.raw_model, learner.optimizer, self.process)
        if not self.process.is_main:
            return
        self.log.flush()
        self.log.line(f'saving checkpoint to {self.folder}')
        config, best = learner.raw_model.config, learner.best
        self.saver.save(is_best, {
            'model': weights,
            'optimizer': moments,
            'model_args': checkpoint.model_args(config),
            'config': self.record | checkpoint.shape_of(config),
            'iter_num': learner.step,
            'windows': learner.windows,
            'windows_before': learner.windows_before,
            'tokens': learner.tokens,
            'best_val_loss': best['loss'][0] if best else math.inf,
            'best': dict(best),
            'tokenizer': data.tokenizer.state() if data.tokenizer else None,
            'skipped': learner.skipped,
            'scaler': learner.scaler.state_dict(),
            'wandb_run_id': self.wandb_run_id,
            'data': data.fingerprint,
            'compute': {'device': self.process.device.type, 'dtype': name_of(learner.compute.dtype)},
        })
