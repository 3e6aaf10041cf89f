"""The commands that scripts print for their readers to type next: each works as printed, in the place in which it is
printed."""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from plaingpt import errors
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
PYTHON = shlex.quote(sys.executable)  # as messages name it: no virtual environment is on the PATH here
TRAIN = ['--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2',
         '--max_iters=2', '--gradient_accumulation_steps=1', '--eval_iters=1', '--sample_tokens=3']  # a short run
SAMPLE = ['--device=cpu', '--num_samples=1', '--max_new_tokens=3']
TEXT = "it's mytext.txt"


class Place:
    """A folder in which a user types, and a clone, which may be in another one."""

    def __init__(self, clone: Path, folder: Path, text: str, launcher: Sequence[str] = ()) -> None:
        self.clone, self.folder, self.launcher = clone, folder, launcher
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TEXT).write_text(text, encoding='utf-8')

    def follow(self, command: str, *more: str, code: int = 0) -> str:
        """Return what a command prints in a shell, with more settings at its end, if it exits with this code."""
        own_bin = str(Path(sys.executable).parent)
        path = os.pathsep.join(folder for folder in os.environ['PATH'].split(os.pathsep) if folder != own_bin)
        line = f'{command} {shlex.join(more)}'
        result = subprocess.run([*self.launcher, 'sh', '-c', f'cd {shlex.quote(str(self.folder))} && {line}'],
                                stdin=subprocess.DEVNULL, timeout=PATIENT, env={**os.environ, 'PATH': path},
                                capture_output=True, text=True, encoding='utf-8')
        assert result.returncode == code, f'{line}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}'
        assert 'Traceback' not in result.stderr, result.stderr
        return result.stdout + result.stderr

    def run(self, script: str, *arguments: str, code: int = 0) -> list[str]:
        """Return the commands that a script prints."""
        return commands_in(self.follow(shlex.join([sys.executable, str(self.clone / script), *arguments]), code=code))


def commands_in(text: str) -> list[str]:
    """Return the commands in a text; each ends its line."""
    return re.findall(rf'(?:\(cd .*? && )?{re.escape(PYTHON)} .*', text)


@pytest.fixture(scope='module')
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy a clone into a folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp('next') / "my clone's copy"
    for pattern in ('*.py', 'plaingpt/**/*.py', 'plaingpt/**/*.html', 'config/*.py', 'data/*/prepare.py'):
        for file in ROOT.glob(pattern):
            (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ROOT))
    return folder


@pytest.fixture(params=['in the clone', 'elsewhere'])
def place(request: pytest.FixtureRequest, clone: Path, tmp_path: Path, tiny_text: str) -> Place:
    return Place(clone, clone if request.param == 'in the clone' else tmp_path / 'some & where', tiny_text)


@pytest.fixture
def elsewhere(clone: Path, tmp_path: Path, tiny_text: str) -> Place:
    return Place(clone, tmp_path / 'some & where', tiny_text)


@pytest.mark.slow
def test_from_a_text_to_samples_each_command_names_the_next(place: Place) -> None:
    name = 'here' if place.folder == place.clone else 'there'
    train, sample = place.run('data/text/prepare.py', f'--input={TEXT}', '--tokenizer=char', f'--name={name}')
    place.follow(train, *TRAIN)
    place.follow(sample, *SAMPLE)
    [sample] = place.run('train.py', f'--dataset={name}', '--out_dir=out my run', *TRAIN)
    place.follow(sample, *SAMPLE)
    [sample] = place.run('export.py', '--out_dir=out my run', '--to=ckpt', "--to_dir=it's (a) copy")
    place.follow(sample, *SAMPLE)


@pytest.mark.slow
def test_a_run_without_a_checkpoint_names_no_command_that_samples_it(elsewhere: Place, tiny_dataset: Path) -> None:
    for setting in ('--max_iters=0', '--eval_only=True'):
        assert elsewhere.run('train.py', f'--dataset={tiny_dataset}', *TRAIN, setting) == []


@pytest.mark.slow
def test_a_command_that_a_message_names_repairs_the_fault(elsewhere: Place) -> None:
    [settings] = elsewhere.run('train.py', '--xyz=1', code=errors.COMMAND)
    assert "\nout_dir: str = 'out'" in elsewhere.follow(settings)
    wrong = shlex.join([sys.executable, str(elsewhere.clone / 'train.py'), 'config/train_stdlbi.py'])
    said = elsewhere.follow(wrong, code=errors.COMMAND)
    nearest = said.strip().partition('did you mean ')[2].removesuffix('?')
    assert shlex.split(nearest)[0] == str(elsewhere.clone / 'config/train_stdlib.py')

    prepare, gpt2 = elsewhere.run('sample.py', code=errors.CHECKPOINT)
    assert "'gpt2'" in elsewhere.follow(gpt2, code=errors.CHECKPOINT), 'there is no network'
    train, _ = commands_in(elsewhere.follow(prepare, '--tokenizer=byte'))
    assert elsewhere.run('sample.py', code=errors.CHECKPOINT) == [train, gpt2]
    elsewhere.follow(train, *TRAIN)
    (elsewhere.folder / 'out-stdlib').rename(elsewhere.folder / 'out; newest')
    said = elsewhere.follow(shlex.join([sys.executable, str(elsewhere.clone / 'sample.py')]), *SAMPLE)
    assert "--out_dir='out; newest'\n" in said

    [prepare] = elsewhere.run('train.py', '--dataset=new', code=errors.DATA)
    elsewhere.follow(prepare.replace('YOUR_TEXT', shlex.quote(TEXT)), '--tokenizer=byte')
    assert elsewhere.run('train.py', '--dataset=new', '--plan=True') == []


@pytest.mark.slow
@pytest.mark.parametrize('to_dir', ['', "it's there"])
def test_a_corpus_is_made_anew_by_the_command_that_a_message_names(to_dir: str, place: Place, tmp_path: Path) -> None:
    """The command works in the folder in which the corpus was made, and in another, in which the relative path of the
    text means nothing."""
    given = [f'--input={TEXT}', '--tokenizer=byte', f'--to_dir={to_dir}'] + ['--name=again'] * (not to_dir)
    place.run('data/text/prepare.py', *given)
    corpus = place.folder / to_dir if to_dir else place.clone / 'data/again'
    other = Place(place.clone, tmp_path / 'far (away)', 'another text')
    whole = contents(corpus)
    for user in (place, other):
        for name, damaged in (('train.bin', whole['train.bin'][:-4]), ('meta.json', b'{"unfinished": true')):
            meta = (corpus / 'meta.json').read_bytes()
            (corpus / name).write_bytes(damaged if name == 'train.bin' else meta.replace(b'{', damaged + b',', 1))
            [again] = user.run('train.py', f'--dataset={corpus}', '--device=cpu', code=errors.DATA)
            user.follow(again)
            assert contents(corpus) == whole


def contents(folder: Path) -> dict[str, Any]:
    """Return what the files of a corpus hold, except for the command that has made them."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'prepare.py'}
    meta = json.loads(found['meta.json'])
    return found | {'meta.json': {name: value for name, value in meta.items() if not name.startswith('created')}}


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2_stand_in')
def test_shards_are_made_anew_and_resumed_by_the_command_that_a_message_names(elsewhere: Place) -> None:
    folder = elsewhere.folder / 'the shards'
    given = [f'--input={TEXT}', f'--to_dir={folder.name}', '--tokenizer=byte', '--shard_size=9999']
    train, *_ = elsewhere.run('data/fineweb_edu/prepare.py', *given)
    whole, made = contents(folder), json.loads((folder / 'meta.json').read_bytes())
    place = {'file': 0, 'before': 0, 'document': 0, 'tokens': 9999}
    first = {'val_000000': made['splits']['val_000000']}
    begun = {'unfinished': True, 'splits': first, 'next': place, 'documents': 0, 'bytes': 0}
    for name, damaged in (('train_000002.bin', whole['train_000002.bin'][:-1] + b'\1'), ('train_000002.bin', b''),
                          ('meta.json', json.dumps(made | {'vocab_size': 'many'}).encode()),
                          ('meta.json', json.dumps(made | begun).encode())):
        (folder / name).write_bytes(damaged)
        if not damaged:
            (folder / name).unlink()
        [again] = commands_in(elsewhere.follow(train, '--device=cpu', code=errors.DATA))
        assert ('--overwrite=True' in again) == (b'unfinished' not in damaged)
        elsewhere.follow(again)
        assert contents(folder) == whole


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2_stand_in')
def test_a_command_that_a_message_names_takes_the_weights_of_others(elsewhere: Place) -> None:
    weights = GPT(GPTConfig(16, 50304, 1, 1, 64)).state_dict()
    torch.save(weights, elsewhere.folder / 'their weights.pt')
    [convert] = elsewhere.run('sample.py', '--init_from=their weights.pt', code=errors.CHECKPOINT)
    [sample] = commands_in(elsewhere.follow(convert))
    elsewhere.follow(sample, *SAMPLE)
    torch.save(weights, elsewhere.folder / "it's old.pt", _use_new_zipfile_serialization=False)
    [convert] = elsewhere.run('sample.py', "--init_from=it's old.pt", code=errors.CHECKPOINT)
    elsewhere.follow(convert)
    assert elsewhere.run('sample.py', "--init_from=it's old.converted.pt", code=errors.CHECKPOINT)


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2_stand_in')
def test_every_prepare_script_names_a_training_on_what_it_has_made(elsewhere: Place) -> None:
    for name, text in (('a row.jsonl', '{"text": "to be or not to be: that is the question"}\n' * 3000),
                       ('a play.txt', 'To be or not to be:\nthat is the question.\n\n' * 4000)):
        (elsewhere.folder / name).write_text(text, encoding='utf-8')
    rows, play = '--input=a row.jsonl', '--input=a play.txt'
    given = {'text': [rows, '--name=rows'], 'openwebtext': [rows], 'fineweb_edu': [rows, '--shard_size=9999'],
             'tinystories': [rows, '--val_input=a row.jsonl', '--tokenizer=byte'], 'stdlib': ['--tokenizer=byte']}
    for script in sorted(elsewhere.clone.glob('data/*/prepare.py')):
        name = script.parent.name
        train, *others = elsewhere.run(f'data/{name}/prepare.py', *given.get(name, [play]))
        for command in (train, *(other for other in others if 'torch.distributed.run' in other)):
            said = elsewhere.follow(command.replace('--nproc_per_node=gpu', '--nproc_per_node=2'), '--plan=True')
            assert ' tokens to train on, ' in said
    train, *_ = elsewhere.run('data/shakespeare/prepare.py', play, '--tokenizer=byte')  # no GPT-2 knows these tokens
    assert ' tokens to train on, ' in elsewhere.follow(train, '--plan=True') and 'finetune' not in train


@pytest.fixture(params=['a mount', 'permissions'])
def read_only(request: pytest.FixtureRequest, clone: Path, tmp_path: Path, tiny_text: str) -> Iterator[Place]:
    """Yield a clone that the user may not write to, and the user's place in it."""
    copy = tmp_path / 'fixed clone'
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns('*.bin', '*.npz', 'meta.json', 'out*', '__pycache__'))
    where = shlex.quote(str(copy))
    mount = f'mount --bind {where} {where} && mount -o remount,bind,ro {where} && exec "$@"'
    launcher = ['unshare', '-m' if os.geteuid() == 0 else '-rm', 'sh', '-c', mount, 'sh']
    user = Place(copy, copy, tiny_text, launcher)
    if request.param == 'permissions':  # root may ignore them, unless it gives up that capability
        for path in (copy, *copy.rglob('*')):
            path.chmod(path.stat().st_mode & ~0o222)
        user.launcher = ['setpriv', '--bounding-set=-dac_override', '--inh-caps=-dac_override'] * (os.geteuid() == 0)
    if subprocess.run([*user.launcher, 'true'], capture_output=True).returncode:
        pytest.skip(f'needs the right to {shlex.join(user.launcher[:2])}')
    yield user
    for path in (copy, *copy.rglob('*')):
        path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.slow
def test_a_clone_that_cannot_be_written_to_prepares_trains_and_samples_elsewhere(
        read_only: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'for all'))
    (tmp_path / 'for all').mkdir()
    read_only.follow('touch x', code=1)
    before = sorted(read_only.clone.rglob('*'))
    said = read_only.follow(f'{PYTHON} data/stdlib/prepare.py', code=errors.COMMAND)
    assert said.endswith('data/stdlib cannot be written to\nname another folder: --to_dir=FOLDER\n')

    run = [f'--out_dir={tmp_path}/run', '--device=cpu']
    [prepare] = read_only.run('train.py', 'config/train_stdlib.py', *run, code=errors.DATA)
    train, sample = commands_in(read_only.follow(prepare, '--tokenizer=byte'))
    read_only.follow(train, *TRAIN)
    read_only.follow(sample, *SAMPLE)
    assert {'out-stdlib', 'stdlib'} <= {path.name for path in (tmp_path / 'for all').iterdir()}

    folder = tmp_path / 'my corpora' / 'of mytext'
    train, sample = read_only.run('data/text/prepare.py', f'--input={TEXT}', '--tokenizer=char', f'--to_dir={folder}')
    read_only.follow(train, *TRAIN)
    read_only.follow(sample, *SAMPLE)
    assert sorted(path.name for path in folder.parent.iterdir()) == ['of mytext', 'out-of mytext']
    assert sorted(read_only.clone.rglob('*')) == before


def test_a_command_is_quoted_and_found_from_its_readers_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = "a b'c\"d$e`f;g&h|i*j?k[l]m(n)o#p!q~r\\s"
    monkeypatch.chdir(ROOT)
    assert errors.command('train.py').endswith(' train.py')
    monkeypatch.chdir(tmp_path)
    for settings in ({'out_dir': odd}, {'out_dir': '', 'start': '~'}, {'init_from': tmp_path / odd}):
        line = errors.command('train.py', 'config/train_gpt2.py', **settings)
        shown = subprocess.run(['sh', '-c', f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
        python, *words = shown.stdout.splitlines()
        assert shutil.which(python) == shutil.which(sys.executable)
        assert words == [f'{ROOT}/train.py', f'{ROOT}/config/train_gpt2.py',
                         *(f'--{name}={value}' for name, value in settings.items())]


@pytest.mark.parametrize(('path', 'python', 'folder', 'expected'), [
    (['my bin'], 'same', '.', 'python'),
    (['my bin'], 'none', '.', 'python3'),
    (['my bin'], 'other', '.', 'python3'),
    (['of the system', 'my bin'], 'same', '.', "'my bin/python3'"),
    (['another', 'my bin'], 'same', '.', "'my bin/python3'"),
    ([], 'same', '.', "'my bin/python3'"),
    ([], 'same', 'my bin', './python3'),
])
def test_the_python_that_is_named_is_the_one_that_runs(
        path: list[str], python: str, folder: str, expected: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The python of a virtual environment, `my bin`, is a link to one of the system, which lacks its packages."""
    for place in ('my bin', 'of the system', 'another'):
        (tmp_path / place).mkdir()
        for name in ('python', 'python3'):
            is_other = place == 'another' or (place == 'my bin' and name == 'python' and python == 'other')
            (tmp_path / place / name).symlink_to('/bin/false' if is_other else sys.executable)
    if python == 'none':
        (tmp_path / 'my bin/python').unlink()
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'my bin/python3'))
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.setenv('PATH', os.pathsep.join([*(str(tmp_path / place) for place in path), '/bin']))
    assert errors.python() == expected
    subprocess.run(['sh', '-c', f'{expected} -c 0'], check=True)


COMMAND = re.compile(r'\b(train|sample|evaluate|export|prepare)\.py [-c]|\bpython[\d.]* [-\w./]')


def test_no_message_spells_out_a_command_itself() -> None:
    """errors.command spells it out: from any folder, and with quotes. Docstrings are no messages."""
    found = set()
    for path in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('data/*/prepare.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docs]
        found |= {f'{path.relative_to(ROOT)}: {node.value}' for node in texts
                  if isinstance(node.value, str) and COMMAND.search(node.value)}
    assert found == set()
