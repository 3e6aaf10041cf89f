"""
Checks before a run: are the model and the run wired right? Each check exists for a bug that real codebases have had.

    python train.py config/train_gpt2.py --check=True

All of them use what the run itself has built, on its device, with its strategy and its number of processes, and a
window of at most 64 tokens for each process. Nothing is written but a temporary file; the run does not begin.
"""
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from plaingpt import console, metrics
from plaingpt.corpus.batches import Part, parts_of
from plaingpt.corpus.folder import Data
from plaingpt.corpus.order import Order
from plaingpt.errors import CHECK_FAILED, UserError
from plaingpt.machines import processes, strategies
from plaingpt.metrics import Predictor
from plaingpt.run import checkpoint
from plaingpt.run.run import Learner

Backward = Callable[[Learner, Iterable[Part]], Tensor]  # train's: the gradient of micro-batches; it returns their loss
LENGTH = 64  # tokens of the window
SCANNED = 1_000_000  # tokens of each split whose ids are checked
NEAR = 0.5  # nats between the loss of new weights and the expected one
SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # nats by which rounding may change a loss
LEARNED = 0.5  # of the first loss: overfitting one window gets below this
STEPS = 200  # at most, to get there
WAKING = 2  # steps after which no matrix is 0
STILL = 10  # steps after which a loss that has not come down at all never will


class Result(NamedTuple):
    """The outcome of a check."""

    name: str
    has_passed: bool | None  # None if it does not apply to this run
    seen: str
    cause: str = ''  # where to look first, if it has failed


class Trial:
    """A window for each process, and what the run itself does with it."""

    def __init__(self, data: Data, learner: Learner, is_new: bool, backward: Backward, seed: int,
                 grad_clip: float) -> None:
        self.data, self.learner, self.is_new, self.backward = data, learner, is_new, backward
        self.model, self.process, self.grad_clip = learner.raw_model, learner.process, grad_clip
        self.config = replace(self.model.config, block_size=min(LENGTH, self.model.config.block_size))
        corpus, n = data.splits['train'], self.process.world_size
        starts = Order(len(corpus), self.config.block_size, seed).starts(0, n)
        self.part = next(parts_of(corpus, starts, 1, self.config, self.process))
        self.predict = Predictor(learner.model, self.config, self.process, learner.compute, batch_size=1)
        self.first_loss = 0.0  # in training
        self.is_stuck = False  # several processes would wait for a gradient that one parameter will never have
        for group in learner.optimizer.param_groups:
            # a constant rate; the wider a model, the smaller its steps
            group['lr'] = min(1e-2, 1 / self.config.n_embd) * group['scale']

    def loss(self, predict: Predictor) -> float:
        """Return the loss of this process's window, in nats per token, without dropout."""
        return F.cross_entropy(predict(self.part.x).flatten(0, 1), self.part.y.flatten()).item()

    def evaluated(self) -> float:
        """Return the loss by the run's own evaluation: nats per token over one window for each process."""
        return metrics.evaluate(self.predict, self.data.splits['val'], self.process.world_size, None)['loss']

    def differentiate(self, step: int) -> float:
        """Leave the gradient in the parameters, as training does. Return the loss over all processes."""
        self.learner.step = step
        return processes.total(self.backward(self.learner, [self.part])).item()

    def apply(self) -> None:
        """Update the weights, as training does."""
        optimizer, scaler = self.learner.optimizer, self.learner.scaler
        scaler.unscale_(optimizer)
        strategies.clip(self.model.parameters(), self.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def wake(self) -> None:
        """Learn until no matrix is 0. The modern model begins with some that are, and what they multiply has no effect
        and no gradient: its head learns in the first step, and what the head sees in the second."""
        for step in range(WAKING + 10 * self.learner.scaler.is_enabled()):  # float16 moves nothing at first
            if all(strategies.complete(p.detach()).any() for p in self.model.parameters() if p.dim() > 1):
                return
            self.differentiate(step)
            self.apply()


@contextmanager
def dropout_of(model: nn.Module, p: float) -> Iterator[None]:
    """Give every dropout of the model this probability until the block ends."""
    before = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in before:
        module.p = p
    try:
        yield
    finally:
        for module, old in before.items():
            module.p = old


def names(found: list[str]) -> str:
    return ', '.join(found[:3]) + (f' and {len(found) - 3} more' if len(found) > 3 else '')


def prints(model: GPT) -> Tensor:
    """Return two sums for each parameter, (P, 2) in float64: they change with nearly every change to it."""
    rows = []
    for p in model.parameters():
        numbers = strategies.complete(p.detach()).cpu()
        rows.append(torch.stack([numbers.sum(dtype=torch.float64), numbers.square().sum(dtype=torch.float64)]))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------
# The checks, in the order in which they run: the last ones change the weights


def ids(trial: Trial) -> Result:
    """Check that the model's table has a row for each id, which fails if the corpus is damaged, or made with
    another tokenizer. Show some text, too: if the tokenizer is the wrong one, it cannot be read. Look at it!"""
    largest = max(int(corpus.read(0, min(SCANNED, len(corpus))).max()) for corpus in trial.data.splits.values())
    shift = bool((trial.part.x[:, 1:] == trial.part.y[:, :-1]).all())  # y is what comes next
    text = trial.data.tokenizer.decode(trial.part.x[0].tolist())[:40] if trial.data.tokenizer else ''
    where = f' in the first {SCANNED:,} tokens' * any(len(corpus) > SCANNED for corpus in trial.data.splits.values())
    shown = f'; they say {text!r}' if text else '; no tokenizer shows them as text'
    return Result('ids', largest < trial.config.vocab_size and shift,
                  f'up to {largest}{where}, and the model knows {trial.config.vocab_size}{shown}',
                  'another tokenizer made this corpus, or targets are not the next tokens')


def initial_loss(trial: Trial) -> Result:
    """Check that new weights know nothing. They guess among V tokens, which costs ln V, and a little more as logits are
    not quite equal: half their variance, which is that of the head's weights, 0.02^2 or 0, times its width."""
    if not trial.is_new:
        return Result('initial loss', None, 'the weights are not new')
    guess = math.log(trial.config.vocab_size)
    variance = {'gpt2': 0.02**2, 'modern': 0.0}[trial.config.arch] * trial.config.n_embd
    expected, loss = guess + variance / 2, trial.evaluated()
    seen = f'{loss:.2f}, ln {trial.config.vocab_size} is {guess:.2f}'
    return Result('initial loss', abs(loss - expected) < NEAR, seen,
                  'weights are drawn too large, or the loss is not the mean over tokens')


def causality(trial: Trial) -> Result:
    """Check that a token changes nothing that is predicted before it, and does change what is predicted from it on: a
    mask of ones and zeros that is added to the scores, say, masks nothing."""
    name, x, T = 'causality', trial.part.x, trial.config.block_size
    if T == 1:
        return Result(name, None, 'a window of one token has no future')
    logits, leaks, deaf = trial.predict(x), 0.0, False
    for t in sorted({1, T // 2, T - 1}):
        other = x.clone()
        other[:, t] = (other[:, t] + 1) % trial.config.vocab_size
        change = (trial.predict(other) - logits).abs().amax(dim=(0, 2))  # (T,)
        leaks = max(leaks, change[:t].max().item())
        deaf |= change[min(t + 1, T - 1):].max().item() == 0
    is_tight = leaks <= 1e-5 * logits.abs().max().item()  # the same sums, in another order perhaps
    seen = f'a changed token changes the logits before it by {leaks:.1g}' + ', and none after it' * deaf
    return Result(name, is_tight and not deaf, seen, "attention's mask lets tokens see later ones, or not earlier ones")


def nonlinearity(trial: Trial) -> Result:
    """Check that the MLP's non-linearity stands between c_fc and c_proj, and nothing but dropout after them: two Linear
    layers with nothing between them are one."""
    given, got = dict[nn.Module, Tensor](), dict[nn.Module, Tensor]()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given[module], got[module] = inputs[0][0], output[0]  # (T, ...)

    triples = [[block.get_submodule(name) for name in ('mlp', 'mlp.c_fc', 'mlp.c_proj')]
               for block in trial.model.transformer.h]
    handles = [module.register_forward_hook(note) for triple in triples for module in triple]
    trial.predict(trial.part.x)
    for handle in handles:
        handle.remove()
    bare = [f'layer {i}' for i, (_, c_fc, c_proj) in enumerate(triples) if torch.equal(got[c_fc], given[c_proj])]
    late = [f'layer {i}' for i, (mlp, _, c_proj) in enumerate(triples) if not torch.equal(got[c_proj], got[mlp])]
    seen = 'a non-linearity stands between the two Linears'
    seen = f'nothing between the two Linears of {names(bare)}' if bare else seen
    seen += f', and something after those of {names(late)}' if late else ''
    return Result('MLP', not bare and not late, seen, 'the non-linearity is missing, or in the wrong place')


def evaluation(trial: Trial) -> Result:
    """Check that the same windows have the same loss twice, even if training drops half of everything."""
    with dropout_of(trial.model, 0.5):
        first, second = trial.evaluated(), trial.evaluated()
    return Result('evaluation', math.isclose(first, second, rel_tol=1e-6), f'twice, with loss {first:.6f} and '
                  f'{second:.6f}', 'dropout is still on after model.eval()')


def gradient(trial: Trial) -> Result:
    """Check that every parameter has a gradient: one without is not used, and learns nothing."""
    trial.first_loss = trial.differentiate(0)
    found = torch.zeros(len(list(trial.model.parameters())), device=trial.process.device)
    for i, p in enumerate(trial.model.parameters()):
        if p.grad is not None:
            found[i] = (p.grad.to_local() if strategies.is_divided(p.grad) else p.grad).count_nonzero()
    found = processes.total(found)
    none = [name for (name, _), n in zip(trial.model.named_parameters(), found.tolist(), strict=True) if n == 0]
    trial.is_stuck = none != [] and isinstance(trial.learner.model, DistributedDataParallel)
    return Result('gradient', not none, f'none for {names(none)}' if none else f'all {len(found)} parameters have one',
                  'forward creates this layer and never applies it, or cuts it off the loss')


def update(trial: Trial) -> Result:
    """Check that a step moves every parameter: an optimizer that was built before the model was divided updates tensors
    that the model no longer uses."""
    if trial.is_stuck:
        return Result('update', None, 'there is no gradient')
    before = prints(trial.model)
    trial.apply()  # the gradient of the check before this one
    for step in range(1, 10 * trial.learner.scaler.is_enabled()):  # float16 moves nothing until the scale is low enough
        trial.differentiate(step)
        trial.apply()
    stays = (prints(trial.model) == before).all(dim=1).tolist()
    still = [name for (name, _), stay in zip(trial.model.named_parameters(), stays, strict=True) if stay]
    seen = f'nothing moves {names(still)}' if still else 'one step moves each parameter'
    return Result('update', not still, seen,
                  'the optimizer has other parameters than the model: build it after strategies.distribute')


def same_weights(trial: Trial) -> Result:
    """Check that all processes have the same weights. Each has read a different window, so they must have exchanged
    their gradients."""
    if trial.process.world_size == 1:
        return Result('processes', None, 'there is one')
    equal = processes.agree(prints(trial.model).to(trial.process.device)).all(dim=1).tolist()
    other = [name for (name, _), is_equal in zip(trial.model.named_parameters(), equal, strict=True) if not is_equal]
    return Result('processes', not other, f'they differ in {names(other)}' if other else
                  f'all {trial.process.world_size} have the same weights', 'gradients or new weights are not exchanged')


def overfit(trial: Trial) -> Result:
    """Check that the model overfits one window: if it cannot, it learns nothing else."""
    if trial.is_stuck:
        return Result('overfit', None, 'there is no gradient')
    with dropout_of(trial.model, 0.0):
        for step in range(STEPS):
            loss = trial.differentiate(step)
            trial.apply()
            if loss < LEARNED * trial.first_loss or (step == STILL and not loss < 0.98 * trial.first_loss):
                break
    seen = f'from {trial.first_loss:.2f} to {loss:.2f} in {step + 1} steps on {trial.config.block_size} tokens'
    return Result('overfit', loss < LEARNED * trial.first_loss, seen,
                  'targets do not belong to these inputs, or the gradient to this loss')


def saved(trial: Trial) -> Result:
    """Check that a checkpoint holds all that the model computes with."""
    weights, _ = strategies.gather(trial.model, trial.learner.optimizer, trial.process)
    config, before = trial.model.config, trial.loss(trial.predict)
    after = before
    if trial.process.is_main:
        state = {'model': weights, 'model_args': checkpoint.model_args(config), 'config': checkpoint.shape_of(config)}
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.write(Path(folder), state, 2, False)
            loaded = checkpoint.model_of(checkpoint.load_newest(Path(folder))).to(trial.process.device)
        after = trial.loss(Predictor(loaded, trial.config, trial.process, trial.learner.compute, batch_size=1))
    is_same = abs(before - after) <= SAME[trial.learner.compute.dtype] * max(1.0, before)
    return Result('checkpoint', is_same, f'loss {before:.6f} before it was saved, and {after:.6f} after it was loaded',
                  'something that the model computes with is not a parameter: make it one, or derive it from GPTConfig')


CHECKS = (ids, initial_loss, causality, nonlinearity, evaluation, gradient, update, same_weights, overfit, saved)


def run_checks(data: Data, learner: Learner, is_new: bool, backward: Backward, seed: int, grad_clip: float) -> None:
    """Do all checks on what a run has built before its first step, and print a line for each; `is_new` says that its
    weights have just been drawn, and have learned nothing. Every process must call it. Raise UserError, which names the
    checks that failed on any process."""
    process, failed, done = learner.process, [], 0
    trial = Trial(data, learner, is_new, backward, seed, grad_clip)
    console.say(f'{processes.describe(process)}; {learner.compute.line}')
    with learner.compute.eager():  # compiled, it is the same function
        for check in CHECKS:
            if check is causality:
                trial.wake()  # zeros would hide what the checks from here on look at
            result = check(trial)
            has_failed = torch.tensor(float(result.has_passed is False), device=process.device)
            n_failed = processes.total(has_failed).item()
            word = 'FAIL' if n_failed else 'SKIP' if result.has_passed is None else 'PASS'
            failed += [result.name] if n_failed else []
            done += word != 'SKIP'
            console.say(f'{word} {result.name}: {result.seen}' + (f'\n     {result.cause}?' if n_failed else ''))
    if failed:
        raise UserError(f'{len(failed)} of {done} checks failed: {", ".join(failed)}', CHECK_FAILED)
    console.say(f'{done} checks passed')
