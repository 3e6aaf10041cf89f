"""How tests, and benchmarks/kills.py, compare what runs leave, and what they refuse."""
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plaingpt.errors import UserError

ROOT = Path(__file__).parents[1]


def copy_script(name: str, target: Path) -> Path:
    """A script of the repository in a folder of its own, with what it imports, so that it writes there."""
    shutil.copytree(ROOT / 'plaingpt', target / 'plaingpt', ignore=shutil.ignore_patterns('__pycache__'))
    for file in ('configurator.py', name):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target / file)
    return target / name


def refused(call: Callable[..., Any], *positional: Any, code: int, **named: Any) -> str:
    """The message, of at most three lines, with which a call refuses what it was given."""
    with pytest.raises(UserError) as caught:
        call(*positional, **named)
    assert caught.value.code == code
    assert str(caught.value).count('\n') < 3
    return str(caught.value)


def leaves(tree: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    """Everything in a checkpoint that is neither a dict nor a list, by its path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if items is None:
        yield name, tree
    else:
        for key, value in items:
            yield from leaves(value, f'{name}/{key}')


def differences(first: Any, second: Any) -> list[str]:
    """The paths at which two checkpoints, or parts of them, are not bit for bit the same."""
    one, two = dict(leaves(first)), dict(leaves(second))
    return [name for name in one.keys() | two.keys() if name not in one or name not in two or not (
        torch.equal(one[name], two[name]) if isinstance(one[name], Tensor) else one[name] == two[name])]
