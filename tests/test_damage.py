"""Files of every kind, damaged at random: each is refused in a line that names it, or read as it was."""
import re
import subprocess
from collections.abc import Callable

import pytest


@pytest.mark.slow
def test_a_damaged_file_of_any_kind_is_refused_or_read_as_it_was(
        run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    pytest.importorskip('pyarrow')
    pytest.importorskip('safetensors')
    result = run_script('benchmarks/damage.py', '--times=25')
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r'(?m)^(.+?) +(\d+) +(\d+) +(\d+)$', result.stdout)
    assert len(rows) > 40 and all(sum(map(int, counts)) == 25 for _, *counts in rows)
    assert sum(int(refused) for _, refused, *_ in rows) > 500
