"""The first minutes on a fresh machine: make, pip and continuous integration, run for real in folders of their own."""
import ast
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
EXTRAS = PROJECT['project']['optional-dependencies']
OF_TESTS = ('dev', 'lm-eval')  # the second is the reference of one test, and brings many packages
BOUNDS = {file: [Requirement(text) for text in chain.from_iterable(groups)] for file, groups in {
    'requirements-core.txt': [PROJECT['project']['dependencies']],
    'requirements.txt': [group for name, group in EXTRAS.items() if name not in OF_TESTS],
    'requirements-test.txt': [EXTRAS['dev']]}.items()}  # each file holds all of those before it
OF_TORCH = re.compile(r'nvidia|cuda|triton')  # libraries that torch pins itself, different ones on each platform


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does who has just opened a terminal: outside any other make."""
    outside = {name: value for name, value in os.environ.items() if 'MAKE' not in name and name != 'MFLAGS'}
    return subprocess.run(command, cwd=folder, env={**outside, **environment}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, encoding='utf-8', timeout=PATIENT)


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(folder, 'make', *arguments, **environment)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """Return a folder with the Makefile and requirements that ask for small packages: the core's for hello 1.0, the
    tests' for world 1.0 as well. A 2.0 of each is available."""
    shutil.copy(ROOT / 'Makefile', tmp_path)
    for name in ('hello', 'world'):
        for version in ('1.0', '2.0'):
            with zipfile.ZipFile(tmp_path / f'{name}-{version}-py3-none-any.whl', 'w') as wheel:
                info = f'{name}-{version}.dist-info'
                wheel.writestr(f'{name}.py', f'print("{name}", {version})')
                wheel.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
                wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
                files = (f'{name}.py', *(f'{info}/{file}' for file in ('METADATA', 'WHEEL', 'RECORD')))
                wheel.writestr(f'{info}/RECORD', ''.join(f'{file},,\n' for file in files))
    (tmp_path / 'requirements.txt').write_text('-r requirements-core.txt\n', encoding='utf-8')
    require(tmp_path, 'hello', '1.0')
    require(tmp_path, 'world', '1.0')
    return tmp_path


def require(folder: Path, name: str, version: str) -> None:
    file, base = {'hello': ('core', ''), 'world': ('test', '-r requirements.txt\n')}[name]
    text = f'{base}./{name}-{version}-py3-none-any.whl\n'
    (folder / f'requirements-{file}.txt').write_text(text, encoding='utf-8')


def installed(folder: Path) -> list[str]:
    """Return what hello and world print, if they are installed."""
    said = (run(folder, '.venv/bin/python', '-c', f'import {name}').stdout.strip() for name in ('hello', 'world'))
    return list(filter(None, said))


def borrow_packages(folder: Path) -> None:
    """Give the folder a .venv that make takes for set up, with the packages that these tests need."""
    run(folder, sys.executable, '-m', 'venv', '--without-pip', '.venv')
    packages = next((folder / '.venv/lib').glob('python*/site-packages'))
    (packages / 'borrowed.pth').write_text('\n'.join(site.getsitepackages()), encoding='utf-8')
    (folder / '.venv/test').touch()


@pytest.mark.slow
def test_the_set_up_happens_once_follows_requirements_and_heals(fresh: Path) -> None:
    assert make(fresh, '.venv/core', PYTHON=sys.executable).returncode == 0
    assert installed(fresh) == ['hello 1.0']
    assert 'up to date' in make(fresh, '.venv/core').stdout

    # the tests' requirements go into the same .venv, and each file is up to date on its own
    assert make(fresh, '.venv/test').returncode == 0
    assert installed(fresh) == ['hello 1.0', 'world 1.0']
    assert 'up to date' in make(fresh, '.venv/test').stdout
    assert 'up to date' in make(fresh, '.venv/core').stdout

    require(fresh, 'world', '2.0')
    assert 'up to date' in make(fresh, '.venv/core').stdout
    require(fresh, 'hello', '2.0')
    assert make(fresh, '.venv/core').returncode == 0
    assert installed(fresh) == ['hello 2.0', 'world 1.0']
    assert make(fresh, '.venv/test').returncode == 0
    assert installed(fresh) == ['hello 2.0', 'world 2.0']

    # an installation that fails halfway, and leaves a package that pip takes for whole
    require(fresh, 'world', '3.0')
    assert make(fresh, '.venv/test').returncode != 0
    next(fresh.glob('.venv/lib/*/site-packages/hello.py')).unlink()
    assert make(fresh, '.venv/core', PYTHON=sys.executable).returncode == 0
    assert installed(fresh) == ['hello 2.0']

    # the system's Python was replaced
    (fresh / '.venv/bin/python').unlink()
    (fresh / '.venv/bin/python').symlink_to('/nowhere/python3')
    assert make(fresh, '.venv/core', PYTHON=sys.executable).returncode == 0
    assert installed(fresh) == ['hello 2.0']


def test_a_python_without_venv_is_answered_with_the_package_to_install(fresh: Path) -> None:
    (fresh / 'ensurepip.py').write_text('raise ImportError', encoding='utf-8')  # so does Debian without python3-venv
    for name in ('python3', 'python3.11'):
        (fresh / name).symlink_to(sys.executable)
        result = make(fresh, 'train', PYTHON=str(fresh / name), PYTHONPATH=str(fresh))
        assert result.returncode != 0
        assert result.stdout == ''
        assert re.fullmatch(rf'.* sudo apt install {name}-venv\..*\n', result.stderr)
    assert not (fresh / '.venv').exists()


def test_an_old_python_is_answered_with_the_versions_that_work(fresh: Path) -> None:
    old = "import sys; sys.version_info = (3, 9, 18, 'final', 0)"
    (fresh / 'sitecustomize.py').write_text(old, encoding='utf-8')
    for arguments in ([], [f'PYTHON={sys.executable}']):
        result = make(fresh, 'train', *arguments, PYTHONPATH=str(fresh))
        assert result.returncode != 0
        assert result.stdout == ''
        assert re.fullmatch(r'.* needs Python 3\.11 to 3\.14\. .* make PYTHON=.*\n', result.stderr)
    assert not (fresh / '.venv').exists()


def test_a_newer_python_beside_an_old_python3_is_found(fresh: Path) -> None:
    for name in ('python3', 'python3.14', 'python3.13', 'python3.12', 'python3.11'):
        (fresh / name).write_text('#!/bin/sh\nexit 1\n', encoding='utf-8')
        (fresh / name).chmod(0o755)
    (fresh / 'python3.12').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding='utf-8')
    path = f'{fresh}:{os.environ["PATH"]}'
    assert '\npython3.12 -m venv .venv\n' in make(fresh, '-n', 'train', PATH=path).stdout


def test_make_train_sets_up_prepares_and_trains_in_this_order(fresh: Path) -> None:
    lines = make(fresh, '-n', 'train', PYTHON=sys.executable).stdout.splitlines()
    commands = [line for line in lines if line.startswith(('.venv', sys.executable))]
    assert commands == [
        f'{sys.executable} -m venv .venv',
        '.venv/bin/python -m pip install --disable-pip-version-check -r requirements-core.txt',
        '.venv/bin/python data/stdlib/prepare.py',
        '.venv/bin/python train.py config/train_stdlib.py --overwrite=True',
    ]
    assert [path for path in ('data/stdlib/prepare.py', 'train.py', 'config/train_stdlib.py')
            if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize('target', ['test', 'test-fast', 'lint', 'bench'])
def test_every_other_make_target_has_the_requirements_of_the_tests(target: str, fresh: Path) -> None:
    lines = make(fresh, '-n', target, PYTHON=sys.executable).stdout.splitlines()
    assert '.venv/bin/python -m pip install --disable-pip-version-check -r requirements-test.txt' in lines


def test_make_alone_lists_every_command(fresh: Path) -> None:
    listed = [line.split()[1] for line in make(fresh).stdout.splitlines()]
    phony = re.findall(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
    assert listed == phony[0].split()


@pytest.mark.slow
def test_ci_fails_when_a_test_fails_or_the_linter_fails_or_no_test_exists(tmp_path: Path) -> None:
    for name in ('Makefile', 'pyproject.toml', *BOUNDS):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / '.ci', tmp_path / '.ci')
    (tmp_path / 'tests').mkdir()
    borrow_packages(tmp_path)

    def ci(test: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / 'tests/test_it.py').write_text(test, encoding='utf-8')
        return run(Path('/'), 'bash', str(tmp_path / '.ci/run'), CI='true')

    passed = ci('def test_it() -> None:\n    assert 1 + 1 == 2\n')
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert '1 passed' in passed.stdout
    failed = ci('def test_it() -> None:\n    assert 1 + 1 == 3\n')
    assert failed.returncode != 0
    assert '1 failed' in failed.stdout
    empty = ci('def it() -> None:\n    assert 1 + 1 == 2\n')
    assert empty.returncode != 0
    assert 'no tests ran' in empty.stdout
    untyped = ci('def test_it():\n    assert 1 + 1 == 2\n')
    assert untyped.returncode != 0
    assert 'no-untyped-def' in untyped.stdout
    untidy = ci('import os\n\n\ndef test_it() -> None:\n    assert 1 + 1 == 2\n')
    assert untidy.returncode != 0
    assert 'F401' in untidy.stdout


def pins(file: str) -> dict[str, str]:
    """Return the versions that one of the files pins itself."""
    found = re.findall(r'^([\w.-]+)==(\S+)$', (ROOT / file).read_text(encoding='utf-8'), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def test_every_bound_of_the_project_holds_for_the_exact_version() -> None:
    versions: dict[str, str] = {}
    for file, bounds in BOUNDS.items():
        versions |= pins(file)
        for bound in bounds:
            assert [specifier.operator for specifier in bound.specifier] == ['>='], f'{bound} is not a lower bound'
            assert bound.specifier.contains(versions[canonicalize_name(bound.name)]), bound
    python = Requirement(f'python{PROJECT["project"]["requires-python"]}')
    assert not python.specifier.contains('3.10')
    assert python.specifier.contains('3.11')


def needs_of(name: str, extras: set[str]) -> list[Requirement]:
    """Return what an installed package needs in turn, on this machine and with these extras."""
    needs = map(Requirement, metadata.requires(name) or [])
    return [need for need in needs if not need.marker or any(
        need.marker.evaluate({'extra': extra}) for extra in ('', *extras))]


def test_each_file_of_requirements_pins_its_packages_and_what_they_need_in_turn_and_builds_on_the_one_before() -> None:
    versions: dict[str, str] = {}
    extras: dict[str, set[str]] = {}  # that the project asks for
    before: list[str] = []
    for file, bounds in BOUNDS.items():
        lines = [line for line in (ROOT / file).read_text(encoding='utf-8').splitlines()
                 if line and not line.startswith('#')]
        own = pins(file)
        assert [line for line in lines if '==' not in line] == lines[:len(before)] == before
        assert len(lines) == len(before) + len(own) and not own.keys() & versions.keys()
        versions |= own
        extras |= {canonicalize_name(bound.name): bound.extras for bound in bounds}
        for name, version in versions.items():
            if Version(metadata.version(name)).public != version:
                pytest.skip(f'{name} {metadata.version(name)} is installed, and {file} has {version}')
        wanted = {name: set(extras.get(name, ())) for name in versions}
        for _ in range(2):  # a package may ask for an extra of one that comes before it
            needs = [need for name in versions for need in needs_of(name, wanted[name])]
            for need in needs:
                wanted.get(canonicalize_name(need.name), set()).update(need.extras)
        names = {canonicalize_name(need.name) for need in needs}
        assert {name for name in names - versions.keys() if not OF_TORCH.match(name)} == set()
        assert own.keys() - names - extras.keys() == set(), 'no package needs these'
        before = [f'-r {file}']


def test_every_package_that_is_imported_is_declared() -> None:
    declared = {canonicalize_name(bound.name) for bound in chain.from_iterable(BOUNDS.values())}
    folders = ('.', 'plaingpt/**', 'data/*', 'tests/**', 'benchmarks', 'course')
    files = [file for folder in folders for file in ROOT.glob(f'{folder}/*.py')]
    known = sys.stdlib_module_names | {file.stem for file in files} | {'plaingpt', 'tests', 'benchmarks'}
    distributions = metadata.packages_distributions()
    undeclared = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            for package in {name.split('.')[0] for name in names} - known:
                if not declared & {canonicalize_name(name) for name in distributions.get(package, [])}:
                    undeclared.add(f'{file.relative_to(ROOT)}: {package}')
    assert undeclared == set()


def test_a_release_has_one_version_and_one_licence_in_all_its_files() -> None:
    files = ('CITATION.cff', 'LICENSE', 'docs/CHANGELOG.md')
    texts = {name: (ROOT / name).read_text(encoding='utf-8') for name in files}
    project = PROJECT['project']
    newest = re.search(r'^## (\S+) \((\S+)\)$', texts['docs/CHANGELOG.md'], re.MULTILINE)
    cited = dict(re.findall(r'^([\w-]+): (\S.*)$', texts['CITATION.cff'], re.MULTILINE))
    assert newest and newest.groups() == (cited['version'], cited['date-released'])
    assert project['version'] == cited['version']
    assert project['license'] == cited['license'] == texts['LICENSE'].split()[0] == 'MIT'
    [author] = project['authors']
    assert all(author['name'] in texts[name] for name in ('CITATION.cff', 'LICENSE'))


def test_every_stage_config_and_script_that_prepares_a_text_travels_in_the_wheel() -> None:
    inside = PROJECT['tool']['hatch']['build']['targets']['wheel']['force-include']
    files = [*(file.name for file in ROOT.glob('*.py')), 'config', 'docs/curves', *(
        file.relative_to(ROOT).as_posix() for file in ROOT.glob('data/*/prepare.py'))]
    assert inside == {file: f'plaingpt/stages/{file}' for file in files}


@pytest.mark.slow
def test_an_editable_installation_can_be_imported_from_any_folder(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / 'source', tmp_path / 'elsewhere'
    source.mkdir()
    elsewhere.mkdir()
    for file in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('plaingpt/**/*.html'),
                 *ROOT.glob('config/*.py'), *ROOT.glob('data/*/prepare.py'), *ROOT.glob('docs/curves/*.csv'),
                 ROOT / 'pyproject.toml', ROOT / 'README.md', ROOT / 'LICENSE'):
        (source / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, source / file.relative_to(ROOT))
    borrow_packages(elsewhere)
    installed = run(elsewhere, '.venv/bin/python', '-m', 'pip', 'install', '--no-build-isolation', '--no-deps', '-e',
                    str(source))
    assert installed.returncode == 0, installed.stderr
    code = 'import train; from plaingpt.corpus import order; print(order.__file__)'
    imported = run(elsewhere, '.venv/bin/python', '-c', code)
    assert imported.stdout.strip() == str(source / 'plaingpt/corpus/order.py')
