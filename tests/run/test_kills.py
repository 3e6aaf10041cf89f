"""SIGKILL at random moments, again and again: in the end, the run is the same as without any kill."""
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.test_upload import needs_s3, server

__all__ = ['server']  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize(('processes', 'strategy', 'kills'), [(1, 'ddp', 20), (2, 'ddp', 10), (2, 'fsdp', 4)])
def test_kills_at_any_moment_change_nothing(tiny_dataset: Path, processes: int, strategy: str, kills: int,
                                     run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = run_script('benchmarks/kills.py', f'--kills={kills}', f'--processes={processes}', f'--strategy={strategy}',
                        f'--dataset={tiny_dataset}')
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    count = re.search(r'killed (\d+) times', result.stdout)
    assert count is not None, result.stdout
    assert int(count[1]) >= kills


@pytest.mark.slow
@pytest.mark.parametrize('more', [
    ['--torchrun=True', '--processes=2', '--kills=4'], ['--writers=2', '--processes=1', '--kills=6'],
    ['--writers=2', '--processes=2', '--kills=3'], ['--upload_to={folder}', '--processes=1', '--kills=6'],
    pytest.param(['--upload_to=s3://bucket/killed', '--processes=1', '--kills=3'], marks=needs_s3)], ids=' '.join)
def test_kills_change_nothing_under_torchrun_while_another_waits_and_while_copies_are_made(
        more: list[str], tiny_dataset: Path, tmp_path: Path, request: pytest.FixtureRequest,
        run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    if 's3' in more[0]:
        request.getfixturevalue('server')
    options = [option.format(folder=(tmp_path / 'elsewhere').as_uri()) for option in more]
    result = run_script('benchmarks/kills.py', *options, f'--dataset={tiny_dataset}')
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    count, least = re.search(r'killed (\d+) times', result.stdout), int(more[-1].partition('=')[2])
    assert count is not None and int(count[1]) >= least, result.stdout
