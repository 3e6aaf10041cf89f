"""--check=True finds each bug that it is meant to find, planted in a real run, and none in a healthy run. This file is
also the script that torchrun starts: it checks a list of runs, one after the other, in one group of processes."""
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import configurator
import model
import model_modern
import train
from plaingpt import errors, metrics
from plaingpt.corpus import batches
from plaingpt.errors import UserError
from plaingpt.machines import processes, strategies
from plaingpt.machines.stop import Stop
from plaingpt.machines.watch import Watch
from plaingpt.machines.zero import Zero
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'batch_size': 4,
                            'gradient_accumulation_steps': 2, 'device': 'cpu', 'check': True}
NAMES = ['ids', 'initial loss', 'causality', 'MLP', 'evaluation', 'gradient', 'update', 'processes', 'overfit',
         'checkpoint']
Patch = pytest.MonkeyPatch


# ------------------------------------------------------------------------------------------------
# The bugs


class Plain(model.Attention):
    """Attention as in model.py, in parts that a bug can replace."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor, cache: model.Cache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).chunk(3, dim=-1))
        return self.project(self.mix(q, k, v).transpose(1, 2).reshape(B, T, C))

    def project(self, y: Tensor) -> Tensor:
        return self.dropout(self.c_proj(y))


class AdditiveMask(Plain):
    """A table of ones and zeros that is added to the scores: it masks nothing."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.size(2), q.size(2)).tril())


class Blind(Plain):
    """A mask that hides all tokens but the token itself."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.eye(q.size(2)).bool())


class Unprojected(Plain):
    """An output projection that is created, and never applied."""

    def project(self, y: Tensor) -> Tensor:
        return self.dropout(y)


class AlwaysDropping(Plain):
    """Attention whose dropout does not ask whether the model is in training."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout.p)


class Unsaved(Plain):
    """Attention that computes with a number drawn anew in each model, and saved in no checkpoint."""

    def __init__(self, config: model.GPTConfig) -> None:
        super().__init__(config)
        self.scale = 1 + 30 * random.random()

    def project(self, y: Tensor) -> Tensor:
        return super().project(y * self.scale)


class LateGelu(model.MLP):
    """An MLP with GELU after the second Linear, and nothing between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(F.gelu(self.c_proj(self.c_fc(x))))


class NoGelu(model.MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.c_fc(x)))


def plant_attention(kind: type[model.Attention]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(model, 'Attention', kind)


def plant_mlp(kind: type[model.MLP]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(model, 'MLP', kind)


Sdpa = Callable[..., Tensor]
SDPA: Sdpa = F.scaled_dot_product_attention


def plant_mask(mask: Callable[[Tensor], Tensor]) -> Callable[[Patch], None]:
    """Return a plant for a mask (T, T), made of a table of ones, in place of the causal one of the modern model."""
    def masked(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return SDPA(q, k, v, attn_mask=mask(torch.ones(q.size(2), k.size(2))))

    return lambda patch: patch.setattr(F, 'scaled_dot_product_attention', masked)


class Unapplied(nn.Linear):
    """A Linear that is created, and never applied."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ModernUnprojected(model_modern.Attention):
    def __init__(self, config: model.GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.c_proj = Unapplied(config.n_embd, config.n_embd, bias=False)


class ModernUnsaved(model_modern.Attention):
    """Attention that computes with a number drawn anew in each model, and saved in no checkpoint."""

    def __init__(self, config: model.GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.scale = 1 + 30 * random.random()

    def forward(self, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, v = super().forward(x, *arguments)
        return y * self.scale, v


class LateSquare(model_modern.MLP):
    """An MLP with ReLU squared after the second Linear, and nothing between the two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c_proj(self.c_fc(x))).square()


class NoSquare(model_modern.MLP):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.c_fc(x))
        return out


def plant_modern(name: str, kind: type) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(model_modern, name, kind)


def plant_modern_weights(patch: Patch) -> None:
    """Draw large first weights: the head is not 0."""
    def init_weights(self: model.GPT) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0.0, 1.0)

    patch.setattr(model_modern.GPT, 'init_weights', init_weights)


def plant_modern_ascent(patch: Patch) -> None:
    """Make steps go up the gradient."""
    parameter_groups = train.parameter_groups
    patch.setattr(train, 'parameter_groups', lambda model: [
        group | {'scale': -group['scale']} for group in parameter_groups(model)])


def plant_silence(patch: Patch) -> None:
    """Let each process update the weights that it owns, and send them to none."""
    step = Zero.step

    def step_alone(self: Zero, closure: object = None) -> None:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(torch.distributed, 'broadcast', lambda tensor, src: None)
            step(self, closure)

    patch.setattr(Zero, 'step', step_alone)


def plant_lost_weights(patch: Patch) -> None:
    """Hide one of the groups from the optimizer."""
    parameter_groups = train.parameter_groups
    patch.setattr(train, 'parameter_groups', lambda model: parameter_groups(model)[1:])


def plant_early_optimizer(patch: Patch) -> None:
    """Build the optimizer before the model is divided."""
    distribute, make_optimizer, early = strategies.distribute, train.make_optimizer, list[torch.optim.Optimizer]()

    def distribute_late(raw_model: model.GPT, *arguments: Any) -> nn.Module:
        early.append(make_optimizer(raw_model))
        return distribute(raw_model, *arguments)

    patch.setattr(strategies, 'distribute', distribute_late)
    patch.setattr(train, 'make_optimizer', lambda *_, **__: early[-1])


def plant_no_exchange(patch: Patch) -> None:
    """Let each process train a model of its own."""
    patch.setattr(strategies, 'distribute', lambda raw_model, *_: raw_model)


def plant_training_mode(patch: Patch) -> None:
    """Leave dropout on in evaluation."""
    patch.setattr(model.GPT, 'eval', lambda self: self)


def plant_large_weights(patch: Patch) -> None:
    def init_weights(self: model.GPT) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0.0, 1.0)

    patch.setattr(model.GPT, 'init_weights', init_weights)


def plant_same_targets(patch: Patch) -> None:
    """Make each token its own target."""
    read_batch = batches.read_batch

    def read_same(*arguments: Any) -> tuple[Tensor, Tensor]:
        x, _ = read_batch(*arguments)
        return x, x

    patch.setattr('plaingpt.corpus.batches.read_batch', read_same)


def plant_ascent(patch: Patch) -> None:
    """Make steps go up the gradient."""
    make_optimizer = train.make_optimizer

    def make_climber(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*arguments)
        for group in optimizer.param_groups:
            group['maximize'] = True
        return optimizer

    patch.setattr(train, 'make_optimizer', make_climber)


def plant_wrong_divisor(patch: Patch) -> None:
    """Report the loss of evaluation per window, not per token."""
    right = metrics.evaluate

    def wrong(*arguments: Any) -> dict[str, float]:
        results = right(*arguments)
        return results | {'loss': results['loss'] * 32}

    patch.setattr(metrics, 'evaluate', wrong)


def plant_crash(patch: Patch) -> None:
    """Use a name that only the main process has, as in a log line."""
    clip = strategies.clip

    def clip_and_log(*arguments: Any) -> Tensor:
        if os.environ.get('RANK', '0') != '0':
            raise NameError("name 'losses' is not defined")
        return clip(*arguments)

    patch.setattr(strategies, 'clip', clip_and_log)


class Bug(dict[str, Any]):
    """A bug: how it is planted, the settings of its run, and the checks that must fail."""

    def __init__(self, plant: Callable[[Patch], None], *fails: str, **settings: Any) -> None:
        super().__init__(settings)
        self.plant, self.fails = plant, list(fails)


BUGS = {
    'an additive mask': Bug(plant_attention(AdditiveMask), 'causality'),
    'a mask that hides all others': Bug(plant_attention(Blind), 'causality'),
    'an unused projection': Bug(plant_attention(Unprojected), 'gradient', 'update'),
    'dropout in evaluation': Bug(plant_attention(AlwaysDropping), 'evaluation'),
    'no model.eval()': Bug(plant_training_mode, 'evaluation'),
    'a misplaced GELU': Bug(plant_mlp(LateGelu), 'MLP'),
    'no GELU': Bug(plant_mlp(NoGelu), 'MLP'),
    'an optimizer built before fsdp': Bug(plant_early_optimizer, 'update', 'overfit', strategy='fsdp'),
    'large weights': Bug(plant_large_weights, 'initial loss'),
    'a wrong divisor': Bug(plant_wrong_divisor, 'initial loss'),
    'targets that are not next': Bug(plant_same_targets, 'ids'),
    'steps up the gradient': Bug(plant_ascent, 'overfit'),
    'something unsaved': Bug(plant_attention(Unsaved), 'checkpoint'),
}
MODERN: dict[str, Any] = {'arch': 'modern', 'tie_weights': False, 'learning_rate': 0.025, 'grad_clip': 0}
MODERN_BUGS = {
    'an additive mask': Bug(plant_mask(torch.tril), 'causality'),
    'a mask that hides all others': Bug(plant_mask(lambda table: torch.eye(len(table)).bool()), 'causality'),
    'an unused projection': Bug(plant_modern('Attention', ModernUnprojected), 'gradient', 'update'),
    # c_proj is 0 at first, and nothing before the square of a 0 learns
    'a misplaced ReLU squared': Bug(plant_modern('MLP', LateSquare), 'MLP', 'gradient', 'update'),
    'no ReLU squared': Bug(plant_modern('MLP', NoSquare), 'MLP'),
    # weights that are 0 at first stay 0, and nothing before them counts
    'an optimizer built before fsdp': Bug(plant_early_optimizer, 'causality', 'gradient', 'update', 'overfit',
                                          strategy='fsdp'),
    'q, k and v left out by the optimizer': Bug(plant_lost_weights, 'update'),
    'large weights': Bug(plant_modern_weights, 'initial loss'),
    'a wrong divisor': Bug(plant_wrong_divisor, 'initial loss'),
    'targets that are not next': Bug(plant_same_targets, 'ids'),
    'steps up the gradient': Bug(plant_modern_ascent, 'overfit'),
    'something unsaved': Bug(plant_modern('Attention', ModernUnsaved), 'checkpoint'),
}
ALL_BUGS = BUGS | {f'modern: {name}': Bug(bug.plant, *bug.fails, **MODERN, **bug) for name, bug in MODERN_BUGS.items()}
BUGS_OF_TWO = {
    'no exchange': Bug(plant_no_exchange, 'processes'),
    'an optimizer built before fsdp': BUGS['an optimizer built before fsdp'],
    'an unused projection': Bug(plant_attention(Unprojected), 'gradient'),
    'an additive mask': Bug(plant_attention(AdditiveMask), 'causality', strategy='zero1'),
    'modern: no exchange': Bug(plant_no_exchange, 'processes', **MODERN),
    'modern: weights that are not sent': Bug(plant_silence, 'update', 'processes', **MODERN),
    'modern: an optimizer built before fsdp': ALL_BUGS['modern: an optimizer built before fsdp'],
}
HEALTHY: dict[str, dict[str, Any]] = {
    'ddp': {'dropout': 0.2}, 'zero1': {'strategy': 'zero1', 'bias': True},
    'fsdp': {'strategy': 'fsdp', 'tie_weights': False, 'dropout': 0.1, 'bias': True},
    'recomputing': {'activation_checkpointing': True, 'gelu': 'exact'}, 'one token': {'block_size': 1},
    'modern': MODERN, 'modern, zero1': MODERN | {'strategy': 'zero1', 'activation_checkpointing': True},
    'modern, fsdp': MODERN | {'strategy': 'fsdp', 'shortcuts': False},
}


# ------------------------------------------------------------------------------------------------
# Running them


def arguments_of(settings: dict[str, Any]) -> list[str]:
    return [f'--{name}={value}' for name, value in (SETTINGS | settings).items()]


def answer(settings: dict[str, Any], bug: Bug | None = None,
           process: processes.Process | None = None) -> tuple[int, str]:
    """Return the exit code of a check, and the message that it raises; in a group of processes, or alone."""
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            bug.plant(patch)
        try:
            if process is None:
                train.main(arguments_of(settings))
            else:
                values, given = configurator.configure(train, arguments_of(settings))
                with Stop(0.0) as stop, Watch(process, PATIENT, PATIENT) as watch:
                    train.carry_out(process, watch, stop, values, given)
        except UserError as error:
            return error.code, str(error)
    return errors.DONE, ''


def verdicts(printed: str) -> dict[str, str]:
    """Return PASS, FAIL or SKIP for each check, in the order of the lines."""
    return {name: word for word, name in re.findall(r'^(PASS|FAIL|SKIP) ([^:]+): ', printed, re.MULTILINE)}


def failures(printed: str) -> list[str]:
    return [name for name, word in verdicts(printed).items() if word == 'FAIL']


def main() -> None:
    """Check each of the runs for two processes, or, if the command line says so, one whose second process crashes."""
    folder, dataset, *crash = sys.argv[1:]
    common = {'dataset': dataset, 'out_dir': folder}
    if crash:
        with pytest.MonkeyPatch.context() as patch:
            plant_crash(patch)
            errors.run(lambda _: train.main(arguments_of(common)))
        return
    process = processes.start('cpu', shards=True)
    for name, settings in [*HEALTHY.items(), *BUGS_OF_TWO.items()]:
        if process.is_main:
            print(f'=== {name}', flush=True)
        code, message = answer(settings | common, BUGS_OF_TWO.get(name), process)
        Path(folder, f'{name}.{process.rank}.json').write_text(json.dumps([code, message]), encoding='utf-8')
    processes.stop()


@pytest.mark.parametrize('name', HEALTHY)
def test_a_healthy_run_passes(name: str, tiny_dataset: Path, tmp_path: Path,
                              capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'out'
    assert answer(HEALTHY[name] | {'dataset': tiny_dataset, 'out_dir': out}) == (errors.DONE, '')
    printed = capsys.readouterr().out
    found = verdicts(printed)
    assert failures(printed) == []
    skipped = ['causality', 'processes'] if name == 'one token' else ['processes']
    assert [check for check, word in found.items() if word == 'SKIP'] == skipped
    assert list(found) == NAMES
    assert printed.endswith(f'\n{len(NAMES) - len(skipped)} checks passed\n')
    assert not out.exists(), 'a check writes nothing'


@pytest.mark.parametrize('name', ALL_BUGS)
def test_a_planted_bug_is_named(name: str, tiny_dataset: Path, tmp_path: Path,
                                capsys: pytest.CaptureFixture[str]) -> None:
    bug = ALL_BUGS[name]
    code, message = answer(bug | {'dataset': tiny_dataset, 'out_dir': tmp_path / 'out'}, bug)
    printed = capsys.readouterr().out
    assert len(verdicts(printed)) == len(NAMES), 'all checks run, although one fails'
    assert failures(printed) == bug.fails
    assert code == errors.CHECK_FAILED and message.endswith(f' checks failed: {", ".join(bug.fails)}')


def test_ln_v_is_what_new_weights_cost(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer({'dataset': tiny_dataset, 'out_dir': tmp_path, 'vocab_size': 1000})
    found = re.findall(r'initial loss: ([\d.]+), ln 1000 is ([\d.]+)', capsys.readouterr().out)[0]
    loss, guess = map(float, found)
    assert guess == pytest.approx(math.log(1000), abs=0.005) and loss == pytest.approx(guess, abs=0.1)


def test_each_parameter_without_a_gradient_is_named(tiny_dataset: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    answer({'dataset': tiny_dataset, 'out_dir': tmp_path}, BUGS['an unused projection'])
    printed = capsys.readouterr().out
    weights = ', '.join(f'transformer.h.{i}.attn.c_proj.weight' for i in range(2))
    assert f'FAIL gradient: none for {weights}\n' in printed and f'FAIL update: nothing moves {weights}\n' in printed


def test_an_id_beyond_the_vocabulary_is_found_wherever_it_is(tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus has no meta.json, so no file says which id is the largest."""
    for split, ids in (('train', [5] * 5000 + [50304] + [5] * 40), ('val', [5] * 500)):
        (tmp_path / f'{split}.bin').write_bytes(b''.join(i.to_bytes(2, 'little') for i in ids))
    code, _ = answer({'dataset': tmp_path, 'out_dir': tmp_path / 'out'})
    assert code == errors.CHECK_FAILED
    assert re.search(r'FAIL ids: up to 50304, and the model knows 50304\b', capsys.readouterr().out)


def test_a_run_that_exists_is_checked_as_it_would_resume_and_left_alone(
        tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is checked as resumed, from its weights, and before it starts over; only new weights have a loss that is
    known."""
    common = {'dataset': tiny_dataset, 'out_dir': tmp_path}
    train.main([*arguments_of(common), '--check=False', '--max_iters=30', '--eval_iters=1', '--warmup_iters=0',
                '--sample_interval=0', '--learning_rate=1e-2'])
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.iterdir()}
    for more, is_new in (({'init_from': 'resume'}, False), ({'init_from': 'auto'}, False), ({}, True),
                         ({'init_from': tmp_path, 'out_dir': tmp_path / 'new'}, False), ({'overwrite': True}, True)):
        capsys.readouterr()
        assert answer(common | more) == (errors.DONE, ''), more
        assert verdicts(capsys.readouterr().out)['initial loss'] == ('PASS' if is_new else 'SKIP'), more
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.iterdir()}


# ------------------------------------------------------------------------------------------------
# Several processes


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', __file__]
    return subprocess.run([*launch, *arguments], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=PATIENT,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding='utf-8')


@pytest.mark.slow
def test_two_processes_pass_and_fail_together(tiny_dataset: Path, tmp_path: Path) -> None:
    result = torchrun(str(tmp_path), str(tiny_dataset))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    printed = dict(section.split('\n', 1) for section in result.stdout.split('=== ')[1:])
    assert list(printed) == [*HEALTHY, *BUGS_OF_TWO]
    for name, text in printed.items():
        fails = BUGS_OF_TWO[name].fails if name in BUGS_OF_TWO else []
        assert failures(text) == fails, text
        for rank in range(2):
            code, message = json.loads((tmp_path / f'{name}.{rank}.json').read_text(encoding='utf-8'))
            assert code == (errors.CHECK_FAILED if fails else errors.DONE), (name, message)
            assert message.endswith(', '.join(fails))
        skipped = [check for check, word in verdicts(text).items() if word == 'SKIP']
        assert skipped == {'one token': ['causality'], 'an unused projection': ['update', 'overfit']}.get(name, [])
    assert {path.suffix for path in tmp_path.iterdir()} == {'.json'}, 'no checkpoint, no log'


@pytest.mark.slow
def test_a_process_that_crashes_alone_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    """Suppose only the main process has made a variable: the other would wait for it forever. The test runs without
    torchrun, which kills the other before it can print, and shows the traceback of the first."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    both = [subprocess.Popen([sys.executable, __file__, str(tmp_path), str(tiny_dataset), 'crash'], text=True, cwd=ROOT,
                             env={**os.environ, 'PYTHONPATH': str(ROOT), 'RANK': str(rank), 'LOCAL_RANK': str(rank),
                                  'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port},
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8')
            for rank in range(2)]
    (out, said), (_, traceback) = (process.communicate(timeout=PATIENT) for process in both)
    assert [process.returncode for process in both] == [errors.PEER_LOST, 1]
    assert re.search(rf"(?m)^process 1 \(pid {both[1].pid} on .*\): name 'losses' is not defined$", said), said
    assert "NameError: name 'losses' is not defined" in traceback
    assert list(verdicts(out)) == NAMES[:6], 'up to the check in which it crashed'
    assert list(tmp_path.iterdir()) == []


if __name__ == '__main__':
    main()
