"""SIGKILL at random moments, again and again: the run is in the end what it would have been without."""
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'strategy', 'kills'), [(1, 'ddp', 20), (2, 'ddp', 20), (2, 'fsdp', 4)])
def test_twenty_kills_change_nothing(tiny_dataset: Path, processes: int, strategy: str, kills: int,
                                     run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run_script('benchmarks/kills.py', f'--kills={kills}', f'--processes={processes}', f'--strategy={strategy}',
                        f'--dataset={tiny_dataset}')
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    count = re.search(r'killed (\d+) times', result.stdout)
    assert count is not None, result.stdout
    assert int(count[1]) >= kills
