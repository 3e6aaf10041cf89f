"""Wrong commands: each ends in at most three lines that say what is wrong, where, and what to type next, and in the
exit code that scripts read."""
import ast
import errno
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import train
from plaingpt import errors
from plaingpt.errors import CHECK_FAILED, CHECKPOINT, COMMAND, DATA, NOT_FINITE, UserError
from plaingpt.run.log import Log
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[1]
SHAPE = '--n_layer=1 --n_head=2 --n_embd=8 --block_size=16'
TINY = (f'{SHAPE} --batch_size=4 --gradient_accumulation_steps=2 --max_iters=2 --eval_interval=2 --eval_iters=1 '
        '--sample_interval=0 --device=cpu')
ABSENT = 'mps' if torch.cuda.is_available() else 'cuda'


class Wrong(NamedTuple):
    """A wrong command and the answer to it; the words in braces stand for files of the test."""

    command: str
    code: int
    says: list[str]


def trains(options: str) -> str:
    return f'train {TINY} --dataset={{corpus}} --out_dir={{empty}} {options}'


def fine_tunes(options: str) -> str:
    return f'train {TINY.removeprefix(SHAPE)} --dataset={{gpt2_corpus}} --out_dir={{empty}} {options}'


WRONG = [
    # the command line
    Wrong(trains('--batchsize=3'), COMMAND, ["no setting is called 'batchsize'", 'did you mean --batch_size?']),
    Wrong(trains('--batch_size=many'), COMMAND, ['--batch_size', 'a whole number', "'many'"]),
    Wrong(trains('--batch_size=2.5'), COMMAND, ['--batch_size', 'a whole number', '2.5']),
    Wrong(trains('--compile=maybe'), COMMAND, ['--compile', "True or False or 'auto'", "'maybe'"]),
    Wrong(trains('--schedule=cosinus'), COMMAND, ['--schedule', "'cosine'", "'cosinus'"]),
    Wrong(trains('--dtype=float15'), COMMAND, ['--dtype', "'bfloat16'", "'float15'"]),
    Wrong(trains('--bias'), COMMAND, ['--bias has no value', '--bias=True']),
    Wrong(trains('batch_size=3'), COMMAND, ['batch_size=3', 'two dashes']),
    Wrong(trains('config/train_gtp2.py'), COMMAND, ['no config file config/train_gtp2.py', 'config/train_gpt2.py']),
    Wrong(trains('{imports}'), COMMAND, ['{imports}, line 2', 'import os', 'never run']),
    Wrong(trains('{typo}'), COMMAND, ["{typo}, line 1: no setting is called 'leaning_rate'", 'learning_rate']),
    # values
    Wrong(trains('--batch_size=0'), COMMAND, ['--batch_size=0', '1 or more']),
    Wrong(trains('--learning_rate=-1'), COMMAND, ['--learning_rate=-1', '0 or more']),
    Wrong(trains('--dropout=1'), COMMAND, ['--dropout=1', 'less than 1']),
    Wrong(trains('--n_head=3'), COMMAND, ['n_embd=8 must be a multiple of n_head=3']),
    Wrong(trains('--total_batch_size=1000'), COMMAND, ['total_batch_size=1000', 'block_size=16', '992 and 1008']),
    Wrong(trains(f'--device={ABSENT}'), COMMAND, [f'--device={ABSENT}', '--device=cpu']),
    Wrong(trains('--device=tpu'), COMMAND, ['--device=tpu', "'cuda'"]),
    Wrong(trains('--device=cpu:x'), COMMAND, ['--device=cpu:x', "'cpu'"]),
    Wrong(trains('--init_from=auto --overwrite=True'), COMMAND, ['--overwrite=True', '--init_from=auto']),
    # the corpus
    Wrong(trains('--dataset={empty}/openwebtext'), DATA, ['openwebtext', 'python data/openwebtext/prepare.py']),
    Wrong(trains('--dataset={empty}/mytext'), DATA, ['{empty}/mytext', 'python data/text/prepare.py']),
    Wrong(trains('--dataset={pickled}'), DATA, ['meta.pkl', 'prepare.py']),
    Wrong(trains('--dataset={odd}'), DATA, ['{odd}/train.bin', 'bytes', 'prepare']),
    Wrong(trains('--vocab_size=50'), DATA, ['{corpus}/train.bin holds token', '0 to 49', '--vocab_size=']),
    Wrong(trains('--block_size=9000'), DATA, ['{corpus}/val.bin has', 'tokens', '--block_size=']),
    # checkpoints
    Wrong(trains('--init_from=nonsense'), CHECKPOINT, ['nonsense']),
    Wrong(trains('--init_from=resume'), CHECKPOINT, ['{empty}/ckpt.pt', '--init_from=scratch']),
    Wrong(trains('--out_dir={typo}'), COMMAND, ['{typo}', 'another file of that name']),
    Wrong(trains('--init_from='), CHECKPOINT, ["''"]),
    Wrong(trains('--out_dir={run}'), COMMAND, ['{run}', '--init_from=resume', '--overwrite=True']),
    Wrong(trains('--out_dir={run} --init_from=resume --n_layer=2'), COMMAND, ['n_layer=2', 'n_layer out']),
    Wrong(trains('--init_from={run} --dataset={gpt2_corpus}'), DATA, ['gpt2', 'char']),
    Wrong(trains('--init_from={damaged}'), CHECKPOINT, ['{damaged}', 'damaged']),
    # the run itself
    Wrong(trains('--learning_rate=1e18'), NOT_FINITE, ['finite', '--learning_rate']),
    Wrong(trains('--overfit_single_batch=True --learning_rate=0 --min_lr=0'), CHECK_FAILED, ['FAIL: the loss']),
    # the other scripts
    Wrong('evaluate --out_dir={empty}', CHECKPOINT, ['{empty}']),
    Wrong('evaluate --out_dir={run} --batch_size=0', COMMAND, ['--batch_size=0']),
    Wrong('evaluate --out_dir={run} --dataset={empty}/mytext', DATA, ['{empty}/mytext', 'prepare.py']),
    Wrong('evaluate --out_dir={run} --dataset={gpt2_corpus}', DATA, ['gpt2', 'char']),
    Wrong('sample --out_dir={empty}', CHECKPOINT, ['{empty} holds no checkpoint']),
    Wrong('sample --out_dir={run} --start=☃', DATA, ['☃']),
    Wrong('sample --out_dir={run} --start=', COMMAND, ['--start']),
    Wrong('sample --out_dir={run} --start=FILE:{empty}/prompt.txt', DATA, ['{empty}/prompt.txt']),
    Wrong('sample --out_dir={run} --top_p=2', COMMAND, ['--top_p=2']),
    Wrong('sample --out_dir={damaged}', CHECKPOINT, ['{damaged}', 'damaged']),
    Wrong('data.text.prepare', COMMAND, ['--input=PATH']),
    Wrong('data.text.prepare --input={empty}/nothing.txt', DATA, ['{empty}/nothing.txt']),
    Wrong('data.text.prepare --input={typo} --tokenizer=nonsense', COMMAND, ["'nonsense'", 'char', 'bpe:N']),
    Wrong('data.text.prepare --input={typo} --name=a/b', COMMAND, ['--name=a/b']),
]
# Their model comes from transformers, which is slow to import
WRONG_GPT2 = [
    Wrong(fine_tunes('--init_from=gpt2'), CHECKPOINT, ["'gpt2'", 'without network']),
    Wrong(fine_tunes('--init_from={gpt2} --block_size=2048'), COMMAND,
          ['block_size=2048', '1024', '--block_size=1024']),
    Wrong(fine_tunes('--init_from={gpt2} --n_embd=64'), COMMAND, ['n_embd=64', 'n_embd out']),
    Wrong('evaluate --init_from=gpt2-xl --dataset={gpt2_corpus}', CHECKPOINT, ["'gpt2-xl'"]),
    Wrong('sample --init_from={empty}', CHECKPOINT, ['{empty}']),
]
ALL = [pytest.param(wrong, id=wrong.command.replace(TINY, '').replace('--dataset={corpus} --out_dir={empty}', ''))
       for wrong in WRONG]


@pytest.fixture(scope='module')
def files(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory, no_pictures: None) -> dict[str, Path]:
    """Make the files that the commands name in braces."""
    folder = tmp_path_factory.mktemp('files')
    names = ('empty', 'pickled', 'odd', 'run', 'damaged', 'gpt2_corpus', 'imports', 'typo', 'gpt2')
    paths = {name: folder / name for name in names} | {'corpus': tiny_dataset}
    paths['empty'].mkdir()
    paths['imports'].write_text('batch_size = 3\nimport os; os.system("ls")\n', encoding='utf-8')
    paths['typo'].write_text('leaning_rate = 1\n', encoding='utf-8')

    for name in ('pickled', 'odd'):
        shutil.copytree(tiny_dataset, paths[name])
    (paths['pickled'] / 'meta.json').rename(paths['pickled'] / 'meta.pkl')
    (paths['odd'] / 'train.bin').write_bytes((tiny_dataset / 'train.bin').read_bytes()[:-1])
    paths['gpt2_corpus'].mkdir()
    for split in ('train', 'val'):
        np.arange(5000, dtype='<u2').tofile(paths['gpt2_corpus'] / f'{split}.bin')

    train.main([*TINY.split(), f'--dataset={tiny_dataset}', f'--out_dir={paths["run"]}'])
    paths['damaged'].mkdir()
    whole = (paths['run'] / 'ckpt.pt').read_bytes()
    (paths['damaged'] / 'ckpt.pt').write_bytes(whole[:len(whole) // 2])
    return paths


def answer(command: str, files: dict[str, Path]) -> tuple[int, str]:
    """Return the exit code and the message of a command, run in this process."""
    script, *args = command.format(**files).split()
    with pytest.raises((UserError, OSError)) as caught:
        importlib.import_module(script).main(args)
    said = caught.value if isinstance(caught.value, UserError) else errors.refusal(caught.value)  # as errors.run does
    return said.code, str(said)


def check(wrong: Wrong, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    listing = {path: path.stat().st_mtime_ns for path in files['run'].iterdir()}
    code, message = answer(wrong.command, files)
    assert code == wrong.code, message
    for words in wrong.says:
        assert words.format(**files) in message
    lines = message.splitlines()
    assert 1 <= len(lines) <= 3, message
    assert all(line.strip() for line in lines)
    assert not any(word in message for word in ('Traceback', 'Error(', 'None', '<class'))
    assert listing == {path: path.stat().st_mtime_ns for path in files['run'].iterdir()}, 'the files stay as they were'
    for path in (files['empty'] / name for name in ('ckpt.pt', 'best.pt')):
        assert not path.exists()


@pytest.mark.parametrize('wrong', ALL)
def test_a_wrong_command_is_answered_in_words(wrong: Wrong, files: dict[str, Path],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    check(wrong, files, monkeypatch)


@pytest.mark.slow
def test_wrong_commands_with_weights_of_hugging_face_are_answered_in_words(
        files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = importlib.import_module('transformers')
    config = transformers.GPT2Config(n_positions=1024, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(files['gpt2'])
    for wrong in WRONG_GPT2:
        check(wrong, files, monkeypatch)


def test_the_commands_are_right_but_for_what_is_wrong_in_them(files: dict[str, Path], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with which all wrong ones of train.py begin does work."""
    monkeypatch.setattr(Log, 'plot', Log.flush)
    _, *args = trains('').format(**files | {'empty': tmp_path}).split()
    train.main(args)
    assert (tmp_path / 'ckpt.pt').exists()


# ------------------------------------------------------------------------------------------------
# Real processes


Script = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_a_process_prints_the_answer_alone_and_exits_with_the_code(run_script: Script, files: dict[str, Path],
                                                                   tmp_path: Path) -> None:
    """This holds from another folder than the project's, too."""
    commands = {
        'train.py --batchsize=3': 2, f'train.py --dataset={files["odd"]} --device=cpu --n_layer=1 --n_embd=12': 3,
        f'sample.py --out_dir={files["damaged"]}': 4, 'evaluate.py': 4, 'data/text/prepare.py': 2,
    }
    for command, code in commands.items():
        script, *args = command.split()
        result = run_script(script, *args, cwd=tmp_path)
        assert result.returncode == code, command
        lines = result.stderr.splitlines()
        assert 1 <= len(lines) <= 3, result.stderr
        assert 'Traceback' not in result.stdout + result.stderr
        known = ('Overriding: ', 'device ')  # the answer is on stderr
        assert all(line.startswith(known) for line in result.stdout.splitlines())


@pytest.mark.slow
def test_a_run_that_fails_says_so_in_its_status(run_script: Script, files: dict[str, Path], tmp_path: Path) -> None:
    result = run_script('train.py', *TINY.split(), f'--dataset={files["corpus"]}', f'--out_dir={tmp_path}',
                        '--learning_rate=1e18')
    assert result.returncode == NOT_FINITE
    assert len(result.stderr.splitlines()) <= 3
    status = json.loads((tmp_path / 'status.json').read_text(encoding='utf-8'))
    assert (status['state'], status['exit_code']) == ('failed', NOT_FINITE)
    assert status['message'] in result.stderr


def under_limit(kind: int, limit: int, command: str) -> tuple[int, str]:
    """Return the exit code of a real command, and its message, if the system refuses more than the limit."""
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, encoding='utf-8', timeout=PATIENT,
        preexec_fn=partial(resource.setrlimit, kind, (limit, limit)), stdin=subprocess.DEVNULL, check=False)
    assert len(result.stderr.splitlines()) <= 3 and 'Traceback' not in result.stderr, result.stderr
    return result.returncode, result.stderr


@pytest.mark.slow
def test_a_full_disk_is_one_exit_code_whatever_was_to_be_written(files: dict[str, Path], tmp_path: Path) -> None:
    """No file may become larger than 2,000 bytes, as `ulimit -f` sets it."""
    text = tmp_path / 'text.txt'
    text.write_text('To be, or not to be: that is the question. ' * 500, encoding='utf-8')
    source, name = f'--out_dir={files["run"]}', f'full-{os.getpid()}'
    commands = [f'export.py {source} --to=ckpt --to_dir={tmp_path / "ckpt"}',
                f'evaluate.py {source} --eval_iters=1 --device=cpu --json={tmp_path}/a.json',
                f'data/text/prepare.py --input={text} --tokenizer=byte --name={name}']
    try:
        for command in commands:
            code, said = under_limit(resource.RLIMIT_FSIZE, 2000, command)
            assert (code, 'the disk is full' in said) == (errors.DISK_FULL, True), (command, said)
            assert str(tmp_path) in said or name in said, 'the message names the place'
    finally:
        shutil.rmtree(ROOT / 'data' / name, ignore_errors=True)


@pytest.mark.slow
def test_what_else_the_system_refuses_is_not_taken_for_damage_or_a_full_disk(
        files: dict[str, Path], tmp_path: Path) -> None:
    """The system refuses too many open files, a name that is too long, and writing to a read-only file system."""
    command = f'train.py {TINY} --dataset={files["corpus"]} --out_dir='
    said = {limit: under_limit(resource.RLIMIT_NOFILE, limit, f'{command}{tmp_path}/{limit}') for limit in (5, 6, 100)}
    assert said[100] == (errors.DONE, '')
    for limit in (5, 6):
        assert said[limit][0] == COMMAND and 'too many files are open' in said[limit][1], said
    code, message = under_limit(resource.RLIMIT_NOFILE, 100, f'{command}{tmp_path}/{"x" * 300}')
    assert code == COMMAND and 'too long' in message, message

    (tmp_path / 'fixed').mkdir(mode=0o555)  # root may write to it, unless it gives up that capability
    drop = ['setpriv', '--bounding-set=-dac_override', '--inh-caps=-dac_override'] if os.geteuid() == 0 else []
    if not drop or shutil.which(drop[0]):
        result = subprocess.run([*drop, sys.executable, *f'{command}{tmp_path}/fixed'.split()], cwd=ROOT,
                                capture_output=True, text=True, encoding='utf-8', check=False)
        assert result.returncode == COMMAND, result.stderr
        assert f'{tmp_path}/fixed/.lock: permission is denied\n' in result.stderr

    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', str(tmp_path / 'fixed')],
                             capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f'mounts a file system: {mounted.stderr}')
    try:
        for where in ('fixed', 'fixed/new'):
            code, message = under_limit(resource.RLIMIT_NOFILE, 100, f'{command}{tmp_path}/{where}')
            assert code == COMMAND and f'{tmp_path}/{where}' in message and 'is read-only' in message, message
    finally:
        subprocess.run(['umount', '--lazy', str(tmp_path / 'fixed')], check=True)


def test_no_error_of_the_system_but_a_full_disk_has_its_exit_code() -> None:
    full = {'ENOSPC', 'EDQUOT', 'EFBIG'}
    for number, name in errno.errorcode.items():
        error = OSError(number, os.strerror(number), '/a/file')
        in_rust = Exception(f'I/O (os error {number})')
        for refused in (errors.refusal(error, code=DATA), errors.refusal(in_rust, '/a/file')):
            assert (refused.code == errors.DISK_FULL) == (name in full), name
            assert str(refused).startswith('/a/file: ') and len(str(refused).splitlines()) <= 2
        if not isinstance(error, BrokenPipeError):
            assert (errors.code_of(error) == errors.DISK_FULL) == (name in full), name


ABSENT_PACKAGES = {  # with a command that needs each
    'tokenizers': 'data/text/prepare.py --input={typo} --name=absent --tokenizer=bpe:300',
    'tiktoken': 'data/text/prepare.py --input={typo} --name=absent --tokenizer=gpt2',
    'pyarrow': 'data/text/prepare.py --input={odd}/x.parquet --name=absent',
    'fsspec': 'data/text/prepare.py --input={typo} --name=absent',
    'datasets': 'data/fineweb_edu/prepare.py --tokenizer=byte --name=absent',
    'huggingface_hub': 'sample.py --init_from=gpt2',
    'safetensors': 'sample.py --init_from={bare}',
    'gguf': 'export.py --out_dir={run} --to=gguf --to_dir={empty}/gguf',
    's3fs': 'sample.py --out_dir=s3://bucket/run',
}
WITHOUT = """
import io, json, runpy, sys
from contextlib import redirect_stderr
from importlib.machinery import PathFinder


class Finder(PathFinder):
    absent = ''

    @classmethod
    def find_spec(cls, name, *more):
        return None if name.partition('.')[0] == cls.absent else super().find_spec(name, *more)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
answers = {}
for package, (script, *sys.argv[1:]) in json.loads(sys.argv[1]).items():
    Finder.absent, sys.argv[0] = package, script
    for name in [name for name in sys.modules if name.partition('.')[0] == package]:
        del sys.modules[name]
    code = 0
    with redirect_stderr(io.StringIO()) as said:
        try:
            runpy.run_path(script, run_name='__main__')
        except SystemExit as error:
            code = error.code
    answers[package] = [code, said.getvalue()]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_missing_package_is_one_line_with_the_command_that_brings_it(files: dict[str, Path], tmp_path: Path) -> None:
    """Each package is hidden from Python's own search for it."""
    (files['odd'] / 'x.parquet').write_bytes(b'')
    for name, content in (('config.json', '{"model_type": "gpt2"}'), ('model.safetensors', '')):
        (tmp_path / name).write_text(content, encoding='utf-8')
    commands = {package: command.format(**files, bare=tmp_path).split() for package, command in ABSENT_PACKAGES.items()}
    result = subprocess.run([sys.executable, '-c', WITHOUT, json.dumps(commands)], cwd=ROOT, capture_output=True,
                            text=True, encoding='utf-8', timeout=600)
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    line = 'the package {} is missing: {} -m pip install -r requirements.txt\n'
    assert answers == {package: [COMMAND, line.format(package, errors.python())] for package in ABSENT_PACKAGES}
    assert not (ROOT / 'data/absent').exists() and not list(files['empty'].glob('*gguf*'))

    # from another folder, the file has its whole path
    result = subprocess.run([sys.executable, '-c', WITHOUT, json.dumps({'tiktoken': [str(ROOT / command) if i == 0 else
                            command for i, command in enumerate(commands['tiktoken'])]})], cwd=tmp_path,
                            capture_output=True, text=True, encoding='utf-8', timeout=600)
    assert f'-r {ROOT}/requirements.txt' in result.stdout


def test_every_package_that_is_imported_where_it_is_used_is_known_to_be_one_that_may_be_missing() -> None:
    found = set()
    for file in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('data/*/*.py')):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
                found |= {name.partition('.')[0] for name in names}
    found -= {*sys.stdlib_module_names, *(file.stem for file in ROOT.glob('*.py')), 'plaingpt', 'torch', 'tqdm'}
    # plot.py, which is imported to draw a picture, needs two; fsspec brings a third if a URL asks for it
    assert found | {'matplotlib', 'PIL', 's3fs'} == set(errors.PACKAGES)


def end_of(main: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, 'argv', ['script.py', '--a=1'])
    with pytest.raises(SystemExit) as caught:
        errors.run(main)
    return caught.value.code


def test_run_ends_a_process_cleanly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(args: list[str]) -> None:
        raise UserError(f'wrong: {args}', DATA)

    def interrupt(args: list[str]) -> None:
        raise KeyboardInterrupt

    def fail(args: list[str]) -> None:
        raise ZeroDivisionError('a planted mistake')

    monkeypatch.setattr('gc.freeze', lambda: None)  # what other tests leave is to be collected
    assert end_of(stop, monkeypatch) == DATA
    assert capsys.readouterr().err == "wrong: ['--a=1']\n"
    assert end_of(interrupt, monkeypatch) == 130
    with pytest.raises(ZeroDivisionError):
        errors.run(fail)
    seen: list[str] = []
    errors.run(seen.extend)
    assert seen == ['--a=1']


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'evaluate.py', 'export.py', 'xray.py'])
def test_no_garbage_is_looked_for_while_a_stage_is_imported_nor_later_among_what_was(script: str) -> None:
    code = (f"import gc, runpy, sys; usual = gc.get_threshold(); sys.argv = [{script!r}]; runpy.run_path({script!r}); "
            "found = gc.get_stats(); import plaingpt.errors as errors; errors.run(lambda args: None); "
            "print(found[2]['collections'], gc.get_threshold() == usual, gc.get_freeze_count() > 100_000)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == '0 True True\n'


def test_nor_when_the_installed_command_starts_a_stage() -> None:
    code = ("import atexit, gc, sys; sys.argv = ['plaingpt', 'train', '--help']; from plaingpt import __main__; "
            "atexit.register(lambda: print(gc.get_stats()[2]['collections'])); __main__.main()")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 'max_iters' in done.stdout and done.stdout.endswith('\n0\n')


def test_the_exit_codes_are_those_that_are_documented() -> None:
    codes = [errors.DONE, errors.CHECK_FAILED, errors.COMMAND, errors.DATA, errors.CHECKPOINT, errors.NOT_FINITE,
             errors.OUT_OF_MEMORY, errors.DISK_FULL, errors.STOPPED]
    assert codes == [0, 1, 2, 3, 4, 5, 6, 7, 75]
    assert UserError('x').code == 2
