"""Comparisons for the tests and benchmarks/kills.py: the files that runs leave, and the messages that refuse."""
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import configurator
from model import GPT
from plaingpt.errors import UserError
from plaingpt.machines.device import choose
from plaingpt.machines.int8 import why_not
from plaingpt.machines.processes import Process
from plaingpt.metrics import Predictor
from plaingpt.run.run import Learner

ROOT = Path(__file__).parents[1]
ALONE = Process(0, 1, torch.device('cpu'), '')  # a process that trains alone
needs_8_bits = pytest.mark.skipif(bool(why_not('cpu')), reason=why_not('cpu'))


def give(script: ModuleType, **settings: Any) -> None:
    """Set some settings of a script as its command line would; all others have their defaults."""
    configurator.configure(script, [f'--{name}={value}' for name, value in settings.items()])


def predictor_of(model: GPT, batch_size: int) -> Predictor:
    return Predictor(model, model.config, ALONE, choose(ALONE.device, 'float32', compile=False), batch_size)


def learner_of(model: GPT, optimizer: torch.optim.Optimizer, scale: float | None = None) -> Learner:
    """Return a learner in a process that is alone, in float32; with a `scale` of the loss, as for float16."""
    scaler = torch.amp.GradScaler('cpu', init_scale=scale or 1.0, enabled=scale is not None)
    return Learner(model, model, optimizer, scaler, ALONE, choose(ALONE.device, 'float32', compile=False))


def in_three_groups(model: GPT) -> list[dict[str, Any]]:
    """Stand in for train.parameter_groups: the two tables are a group of their own, which learns at half the rate."""
    tables = [model.transformer.wte.weight, model.transformer.wpe.weight]
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    return [{'params': tables, 'weight_decay': 0.1, 'scale': 0.5},
            {'params': [p for p in others if p.dim() >= 2], 'weight_decay': 0.1, 'scale': 1.0},
            {'params': [p for p in others if p.dim() < 2], 'weight_decay': 0.0, 'scale': 1.0}]


def copy_script(name: str, target: Path) -> Path:
    """Copy a script of the repository, with what it imports, into a folder of its own, so that it writes there."""
    shutil.copytree(ROOT / 'plaingpt', target / 'plaingpt', ignore=shutil.ignore_patterns('__pycache__'))
    for file in ('configurator.py', name):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target / file)
    return target / name


# The tolerance between two numbers, in float64, if two runs add up the same terms in another order. Rounding separates
# them by 1e-12 at most; a factor that is wrong by a millionth, by more than 1e-8.
ROUNDING = 1e-9


@contextmanager
def in_float64() -> Iterator[None]:
    """Make, train and save models in float64 until the block ends. For float32 no tolerance holds on every machine:
    AdamW divides a gradient by its own size, so if it is 0 except for rounding, rounding decides a whole step."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def refused(call: Callable[..., Any], *positional: Any, code: int, **named: Any) -> str:
    """Return the message, of at most three lines, with which a call refuses its arguments."""
    with pytest.raises(UserError) as caught:
        call(*positional, **named)
    assert caught.value.code == code
    assert str(caught.value).count('\n') < 3
    return str(caught.value)


def damaged(data: bytes, seed: int) -> bytes:
    """Return what bad disks, torn copies and careless programs make of a file."""
    source = random.Random(seed)
    i, j = sorted(source.sample(range(len(data)), 2))
    n = min(source.choice((1, 16, 512, 4096, 70_000)), len(data) - i)
    new = [bytes([data[i] ^ 1 << source.randrange(8)]) + data[i + 1:i + n],  # a bit
           bytes(n), source.randbytes(n), data[i:i + n][::-1],
           data[j - j % n:][:n].ljust(n, b'\0'),  # copied from another place
           b'', 2 * data[i:i + n]]
    return source.choice([*(data[:i] + middle + data[i + n:] for middle in new), data[:i]])


def leaves(tree: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Yield everything in a checkpoint that is neither a dict nor a list, with its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        yield name, tree
    else:
        for key, value in items:
            yield from leaves(value, f'{name}/{key}')


def differences(first: Any, second: Any) -> list[str]:
    """Return the paths at which two checkpoints, or parts of them, are not bit for bit the same."""
    one, two = dict(leaves(first)), dict(leaves(second))
    return [name for name in one.keys() | two.keys() if name not in one or name not in two or not (
        torch.equal(one[name], two[name]) if isinstance(one[name], Tensor) else one[name] == two[name])]


def assert_equal_to_rounding(first: Any, second: Any, rounding: float = ROUNDING) -> None:
    """Assert that two checkpoints of runs in float64, or parts of them, or their rows, hold the same."""
    one, two = dict(leaves(first)), dict(leaves(second))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, Tensor | float):
            first, second = (torch.as_tensor(tree[name], dtype=torch.float64) for tree in (one, two))
            torch.testing.assert_close(first, second, atol=rounding, rtol=0, msg=f'{name}: {first} is not {second}')
        else:
            assert value == two[name], name


def assert_equal_learning(first: Any, second: Any) -> None:
    """Assert that two checkpoints of runs in float64 hold the same weights and moments, of which many are tiny."""
    assert_equal_to_rounding(first['model'], second['model'])
    assert_equal_to_rounding(first['optimizer'], second['optimizer'], ROUNDING / 1000)
