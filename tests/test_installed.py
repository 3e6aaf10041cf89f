"""The pip package: one name, `plaingpt`, and a command of that name, which does in any folder what a clone does."""
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from plaingpt.errors import COMMAND, DATA
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
pytestmark = pytest.mark.slow
OF_USE = (  # what commands leave in a clone
    'out-stdlib/ckpt.pt', 'data/stdlib/train.bin', 'data/mytext/train.bin', 'exercises/07_attend.py', 'mytext.txt',
    'report.html', '.venv/bin/python', '.mypy_cache/3.11', 'config/__pycache__/train_gpt2.cpython-311.pyc',
    'plaingpt/__pycache__/lock.cpython-311.pyc')
SHORT = ('--max_iters=3 --eval_interval=3 --eval_iters=1 --sample_interval=3 --sample_tokens=5 --n_layer=1 --n_head=2 '
         '--n_embd=16 --device=cpu --batch_size=2 --total_batch_size=0 --gradient_accumulation_steps=2')


@pytest.fixture(scope='module')
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that git would put into a clone, and add what lies in one that is used."""
    folder = tmp_path_factory.mktemp('clone')
    listed = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split('\0')):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in OF_USE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'x')
    return folder


@pytest.fixture(scope='module')
def built(clone: Path) -> tuple[Path, Path]:
    """Build what `python -m build` does: the sdist of a clone, and a wheel of that sdist alone; return both."""
    done = subprocess.run([sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', 'dist'], cwd=clone,
                          capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr
    [sdist] = (clone / 'dist').iterdir()
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-build-isolation', '--no-deps', '-w',
                           str(clone / 'dist'), str(sdist)], capture_output=True, text=True, timeout=PATIENT)
    assert done.returncode == 0, done.stderr
    [wheel] = (clone / 'dist').glob('*.whl')
    return sdist, wheel


@pytest.fixture(scope='module')
def wheel(built: tuple[Path, Path]) -> Path:
    return built[1]


@pytest.fixture(scope='module')
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment in which the wheel is installed; all else is borrowed from this one."""
    folder = tmp_path_factory.mktemp('environment')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(folder)], check=True)
    packages = next((folder / 'lib').glob('python*/site-packages'))
    (packages / 'borrowed.pth').write_text('\n'.join(site.getsitepackages()), encoding='utf-8')
    subprocess.run([folder / 'bin/python', '-m', 'pip', 'install', '--no-deps', str(wheel)], check=True,
                   capture_output=True, timeout=PATIENT)
    return folder / 'bin'


def run(programs: Path, folder: Path, command: str, code: int = 0) -> str:
    """Run a command as a user of the environment types it in a folder, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    environment['PATH'] = f'{programs}:{environment["PATH"]}'
    done = subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True,
                          encoding='utf-8', timeout=PATIENT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_sdist_has_the_source_and_nothing_that_use_leaves_in_a_clone(built: tuple[Path, Path], clone: Path) -> None:
    with tarfile.open(built[0]) as archive:
        names = {member.name.partition('/')[2] for member in archive.getmembers()}
        version = archive.getmembers()[0].name.partition('/')[0]
    assert version == f'plaingpt-{PROJECT["version"]}'
    assert {'LICENSE', 'README.md', 'train.py', 'plaingpt/lock.py', 'data/text/prepare.py', 'course/all.py'} <= names
    assert not names & set(OF_USE) and not [name for name in names if name.startswith('tests/')]
    made = {'PKG-INFO', '.gitignore'}  # hatchling adds them: the second tells it again what to leave out
    assert {name for name in names - made if not (ROOT / name).is_file()} == set()
    assert all((clone / name).stat().st_size < 100_000 for name in names - made)


def test_the_wheel_has_one_name_at_the_top_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition('/')[0] for name in names if '.dist-info/' not in name} == {'plaingpt'}
    assert {'plaingpt/stages/train.py', 'plaingpt/stages/config/train_gpt2.py', 'plaingpt/learning/page.html',
            'plaingpt/stages/data/text/prepare.py', 'plaingpt/stages/docs/curves/stdlib.csv'} <= set(names)
    assert [name for name in names if name.endswith('.dist-info/licenses/LICENSE')]
    assert not [name for name in names if name.endswith(('.bin', '.pt', '.pyc')) or 'tests' in name]


def test_a_wheel_of_the_sdist_holds_what_a_wheel_of_the_clone_holds(wheel: Path, clone: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(tmp_path)], cwd=clone,
                   check=True, capture_output=True, timeout=PATIENT)
    [direct] = tmp_path.iterdir()
    first, second = ({entry.filename: entry.CRC for entry in zipfile.ZipFile(path).infolist()}
                     for path in (wheel, direct))
    assert first == second


def test_from_text_to_sample_in_any_folder_by_the_commands_that_are_printed(programs: Path, tmp_path: Path,
                                                                            tiny_text: str) -> None:
    (tmp_path / 'mytext.txt').write_text(tiny_text, encoding='utf-8')
    said = run(programs, tmp_path, 'plaingpt train --dataset=mytext', code=DATA)
    [prepare] = re.findall(r'first run: (plaingpt prepare text .*)', said)
    said = run(programs, tmp_path, prepare.replace('YOUR_TEXT', 'mytext.txt') + ' --tokenizer=byte')
    assert 'to data/mytext' in said and (tmp_path / 'data/mytext/train.bin').exists()
    train, sample = (line.strip() for line in said.partition('next:\n')[2].splitlines())
    assert train == 'plaingpt train config/train_stdlib.py --dataset=mytext --out_dir=out-mytext'
    said = run(programs, tmp_path, f'{train} {SHORT}')
    assert '=== step 3 ===' in said and f'try next: {sample}' in said
    run(programs, tmp_path, f'{sample} --num_samples=1 --max_new_tokens=5')

    more = SHORT.replace('max_iters=3', 'max_iters=5')
    again = run(programs, tmp_path, 'python -m torch.distributed.run --standalone --nproc_per_node=2 -m plaingpt '
                f'{train.removeprefix("plaingpt ")} --init_from=resume {more}')
    assert 'resuming at step 3' in again and '=== step 5 ===' in again
    assert 'bits_per_byte' in run(programs, tmp_path, 'python -m plaingpt evaluate --out_dir=out-mytext --eval_iters=1')
    run(programs, tmp_path, 'python -m plaingpt.run.report out-mytext')
    run(programs, tmp_path, 'plaingpt train --plan=True --dataset=mytext --reference=docs/curves/stdlib.csv')
    run(programs, tmp_path, 'plaingpt xray --out_dir=out-mytext --text=def')
    run(programs, tmp_path, 'plaingpt learn start gelu')
    assert 'nothing is written there yet' in run(programs, tmp_path, 'plaingpt learn check gelu', code=1)


def test_a_mistyped_command_is_answered_with_the_commands_that_exist(programs: Path, tmp_path: Path) -> None:
    assert 'plaingpt train config/train_stdlib.py' in run(programs, tmp_path, 'plaingpt')
    assert run(programs, tmp_path, 'plaingpt --help') == run(programs, tmp_path, 'python -m plaingpt')
    for command in ('plaingpt trian', 'plaingpt prepare', 'plaingpt prepare nothing', 'plaingpt model'):
        assert 'prepare tinystories, sample, train' in run(programs, tmp_path, command, code=COMMAND)
    assert 'train_stdlib' in run(programs, tmp_path, 'plaingpt train config/nothing.py', code=COMMAND)


def test_no_process_of_another_package_finds_a_stage_on_its_path(programs: Path, tmp_path: Path) -> None:
    code = ('import plaingpt, importlib.util as util; '
            'print([name for name in ("train", "model", "sample", "configurator", "export") if util.find_spec(name)])')
    assert run(programs, tmp_path, f"python -c '{code}'").strip() == '[]'
    (tmp_path / 'model.py').write_text('raise SystemExit("the model of another project")', encoding='utf-8')
    assert 'Train a GPT' in run(programs, tmp_path, 'plaingpt train --help'), 'but plaingpt finds its stages'
