"""Sums in another order: results that are equal to rounding on this machine are so on others, which add up in another
order."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EQUALITIES = [
    'tests/test_twins.py', 'tests/test_training_twins.py',
    'tests/test_train.py::test_accumulation_changes_nothing_but_rounding',
    'tests/run/test_checkpoint.py::test_nanogpts_run_resumes_here_with_its_moments',
    'tests/machines/test_strategies.py::test_several_processes_learn_what_one_learns[3-names2]',
]
# torch's own kernels without vector instructions, and MKL's as on the oldest processors
OTHER_ORDER = {'ATEN_CPU_CAPABILITY': 'default', 'MKL_CBWR': 'COMPATIBLE'}


@pytest.mark.slow
def test_equalities_hold_when_sums_are_added_up_in_another_order(tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '--show-capture=no',
               f'--basetemp={tmp_path}/child', *EQUALITIES]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **OTHER_ORDER}, stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0, result.stdout[-9000:] + result.stderr[-2000:]
