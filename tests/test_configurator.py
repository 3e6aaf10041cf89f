"""Settings: the syntax of config files and of the command line, the resulting values, and the answers to mistakes."""
import importlib.util
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import configurator
import train
from plaingpt.errors import COMMAND, UserError, python

ROOT = Path(__file__).parents[1]
SCRIPT = '''"""Says what its settings are."""
import sys
from typing import Literal

import configurator
from plaingpt import errors

SIZES: dict[str, int] = {}

# ---- Settings
out_dir: str = 'out'  # where results go
wandb_run_name: str = 'gpt2'
start: str = '\\n'  # the prompt
batch_size: int = 12  # sequences
gradient_accumulation_steps: int = 5 * 8
learning_rate: float = 6e-4  # the highest
min_lr: float = 6e-5
max_epochs: float = 0
decay_lr: bool = True
schedule: Literal['cosine', 'linear'] = 'cosine'
compile: bool | Literal['auto'] = 'auto'
# ----


def main(args: list[str]) -> None:
    settings, given = configurator.configure(sys.modules[__name__], args)
    print(sorted(given), batch_size, settings['learning_rate'])


later: int = 3

if __name__ == '__main__':
    errors.run(main)
'''


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a script with settings, in a folder of its own, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT, encoding='utf-8')
    specification = importlib.util.spec_from_file_location('script', path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def write(text: str, name: str = 'a.py') -> str:
    Path(name).write_text(text, encoding='utf-8')
    return name


def complaint(script: ModuleType, *args: str) -> str:
    """Return the answer to these arguments, checked for the form that every message has."""
    with pytest.raises(UserError) as caught:
        configurator.configure(script, list(args))
    message = str(caught.value)
    assert caught.value.code == COMMAND
    assert len(message.splitlines()) <= 3
    assert max(map(len, message.splitlines())) <= 200
    return message


def test_settings_are_the_lower_case_annotated_names_above_the_first_function(script: ModuleType) -> None:
    settings, given = configurator.configure(script, [])
    assert settings == {
        'out_dir': 'out', 'wandb_run_name': 'gpt2', 'start': '\n', 'batch_size': 12, 'gradient_accumulation_steps': 40,
        'learning_rate': 6e-4, 'min_lr': 6e-5, 'max_epochs': 0.0, 'decay_lr': True, 'schedule': 'cosine',
        'compile': 'auto',
    }
    assert given == set()


def test_the_last_word_wins_among_files_and_options(script: ModuleType) -> None:
    first = write('batch_size = 1\nmin_lr = 0.5', 'first.py')
    second = write('batch_size = 2', 'second.py')
    for args, batch_size in [
        ([first], 1), ([first, second], 2), ([second, first], 1), ([first, '--batch_size=3'], 3),
        (['--batch_size=3', first], 1), (['--batch_size=3', '--batch_size=4'], 4), ([first, '--batch_size', '5'], 5),
    ]:
        settings, given = configurator.configure(script, args)
        assert settings['batch_size'] == script.batch_size == batch_size, args
        assert given == ({'batch_size', 'min_lr'} if first in args else {'batch_size'})


def test_a_second_call_starts_from_the_defaults_in_the_source(script: ModuleType) -> None:
    configurator.configure(script, ['--batch_size=3', '--start=x'])
    settings, given = configurator.configure(script, ['--min_lr=1'])
    assert (settings['batch_size'], script.batch_size, script.start, given) == (12, 12, '\n', {'min_lr'})


@pytest.mark.parametrize(('option', 'expected'), [
    ('--learning_rate=1', 1.0), ('--learning_rate=3e-4', 3e-4), ('--learning-rate=1', 1.0),
    ('--learning_rate=-.5', -0.5), ('--max_epochs=+2', 2.0),
    ('--batch_size=1e5', 100000), ('--batch_size=1_000', 1000), ('--batch_size=-1', -1), ('--batch_size=8.0', 8),
    ('--decay_lr=true', True), ('--decay_lr=FALSE', False), ('--decay_lr=1', True), ('--decay_lr=0', False),
    ('--compile=auto', 'auto'), ('--compile=false', False), ('--compile=True', True), ('--schedule=linear', 'linear'),
    ('--start=5', '5'), ('--start=True', 'True'), ('--start=a=b', 'a=b'), ('--start=', ''), ('--start= x', ' x'),
    ('--start=None', 'None'), ("--start='5'", '5'), ("--start='\\n'", '\n'), ("--start='", "'"),
    ('--start="Hello" "world"', '"Hello" "world"'), ("--start='a' + 'b'", "'a' + 'b'"), (r'--start="a\"b"', 'a"b'),
    ("--start='a','b'", "'a','b'"),
    ("--start='it's'", "'it's'"), ('--start={time}', '{time}'), ('--out_dir=a=b', 'a=b'), ('--out-dir=a-b', 'a-b'),
])
def test_a_value_is_read_as_the_declared_type(script: ModuleType, option: str, expected: object) -> None:
    name, _, value = option[2:].partition('=')
    name = name.replace('-', '_')
    for args in ([option], [option.partition('=')[0], value]):
        settings, given = configurator.configure(script, args)
        assert settings[name] == expected
        assert type(settings[name]) is type(expected)
        assert getattr(script, name) == expected
        assert given == {name}


def test_a_config_file_may_compute_with_settings(script: ModuleType) -> None:
    path = write('\ufeff"""A docstring."""\n# a comment\nlearning_rate = 1; min_lr = learning_rate / 10  # another\n'
                 'batch_size: int = -(-7 // 2) + 2 ** 3 % 5 - 1\ngradient_accumulation_steps = batch_size * (1 + 1)\n'
                 "out_dir = 'out-' + \\\n    'é'\ndecay_lr = False\nmax_epochs = 3\ncompile = 1\nschedule = 'linear'\n"
                 "start = ('one '\n         'two')\n")
    settings, given = configurator.configure(script, ['--learning_rate=5', path])
    assert settings == {
        'out_dir': 'out-é', 'wandb_run_name': 'gpt2', 'start': 'one two', 'batch_size': 6,
        'gradient_accumulation_steps': 12, 'learning_rate': 1.0, 'min_lr': 0.1, 'max_epochs': 3.0, 'decay_lr': False,
        'schedule': 'linear', 'compile': True,
    }
    assert given == set(settings) - {'wandb_run_name'}


def test_names_of_settings_in_a_file_stand_for_their_value_so_far(script: ModuleType) -> None:
    settings, _ = configurator.configure(script, ['--learning_rate=4', write('min_lr = learning_rate / 2')])
    assert settings['min_lr'] == 2.0


COMPUTING = """
import time
width: int = 3 * 2
name = f'w{width:03d}-{learning_rate}'
out_dir = wandb_run_name = f'out-{name}-' + str(time.time())
batch_size = max(int(width / 4), round(2.6), min(width, 1))
max_epochs = round(1.26, 1)
min_lr = float(1) * 2 ** -1
start = str(None) + str(True) + str(1.5)
"""


def test_what_a_file_computes_is_what_python_makes_of_it(
        script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, 'time', partial(float, 1700000000.25))
    wanted: dict[str, Any] = {'learning_rate': 6e-4}
    exec(COMPUTING, wanted)
    settings, given = configurator.configure(script, [write(COMPUTING)], time.time())
    assert given == {'out_dir', 'wandb_run_name', 'batch_size', 'max_epochs', 'min_lr', 'start'}
    assert {name: settings[name] for name in given} == {name: wanted[name] for name in given}
    assert settings['out_dir'] == 'out-w006-0.0006-1700000000.25'


def test_a_typo_that_a_later_line_reads_is_no_helper(tmp_path: Path) -> None:
    (tmp_path / 'a.py').write_text('learning_rat = 1e-3\nmin_lr = learning_rat / 10\n', encoding='utf-8')
    with pytest.raises(UserError, match=r'did you mean learning_rate\?'):
        configurator.configure(train, [str(tmp_path / 'a.py')])


def test_a_helper_is_announced_and_serves_the_lines_of_its_own_file_alone(
        script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    write('n = 2\nwidth = n\nbatch_size = width', 'b.py')
    settings, given = configurator.configure(script, ['b.py'])
    assert (settings['batch_size'], given, 'n' in vars(script)) == (2, {'batch_size'}, False)
    assert capsys.readouterr().out.splitlines()[-1] == (
        'b.py: for its own lines only, as no setting has this name: n, width')
    assert complaint(script, 'b.py', write('batch_size = n')).startswith("a.py, line 1: no setting is called 'n';")


@pytest.mark.parametrize(('name', 'meant'), [
    ('max_iter', 'max_iters'), ('n_layers', 'n_layer'), ('warmup_iter', 'warmup_iters'), ('n_embed', 'n_embd'),
    ('learningrate', 'learning_rate'), ('gradient_accumulation_step', 'gradient_accumulation_steps'),
    ('weight_deacy', 'weight_decay'), ('num_layer', 'n_layer'), ('Dropout', 'dropout'),
    ('max_length', ''), ('use_flash', ''), ('hidden_size', ''), ('rope_theta', ''), ('optimizer', ''), ('lr', ''),
    ('max_tokens', ''), ('num_workers', ''), ('vocab', ''), ('head_dim', ''), ('log_dir', ''), ('ffn_mult', '')])
def test_a_name_is_suggested_only_if_it_is_near(name: str, meant: str, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for args in ([f'--{name}=1'], [write(f'{name} = 1')]):
        with pytest.raises(UserError) as caught:
            configurator.configure(train, args)
        assert ('did you mean' in str(caught.value)) == bool(meant)
        assert f'{meant}?' in str(caught.value) or not meant


def test_time_in_the_name_of_a_run_or_folder_is_the_time_of_the_start(script: ModuleType) -> None:
    path = write("wandb_run_name = 'ft-{time}'")
    settings, _ = configurator.configure(script, [path, '--out_dir=out-{time}'])
    assert re.fullmatch(r'ft-\d{8}-\d{6}', settings['wandb_run_name'])
    assert settings['out_dir'] == settings['wandb_run_name'].replace('ft-', 'out-')
    first, second = (configurator.configure(script, [path], clock)[0] for clock in (1.7e9, 1.8e9))
    assert first['wandb_run_name'] != second['wandb_run_name']


def test_secrets_of_a_url_reach_the_script_and_neither_console_nor_records(
        script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    url = 's3://me:secret-1@host/run?signature=secret-2'
    settings, _ = configurator.configure(script, [write(f"start = '{url}'  # {url}"), f'--out_dir={url}'])
    assert (vars(script)['start'], vars(script)['out_dir']) == (url, url)
    assert (settings['start'], settings['out_dir']) == ('s3://***@host/run?***', 's3://***@host/run?***')
    out, _ = capsys.readouterr()
    assert out.count('s3://***@host/run?***') == 3 and 'secret' not in out


def test_what_is_overridden_is_printed_as_nanogpt_prints_it(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [write('batch_size = 4  # four\n'), '--learning_rate=1', '--start', 'x']
    configurator.configure(script, args)
    assert capsys.readouterr().out == (
        'Overriding config with a.py:\nbatch_size = 4  # four\n\n'
        'Overriding: learning_rate = 1.0\nOverriding: start = x\n')
    monkeypatch.setenv('RANK', '1')
    configurator.configure(script, args)
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(('args', 'answer'), [
    ('--batch_siz=3', "--batch_siz: no setting is called 'batch_siz'; did you mean --batch_size?"),
    ('--BATCH_SIZE=3', "--BATCH_SIZE: no setting is called 'BATCH_SIZE'; did you mean --batch_size?"),
    ('--xyz=3', "--xyz: no setting is called 'xyz'; this lists the settings: python script.py --help"),
    ('--=3', "--: no setting is called ''; this lists the settings: python script.py --help"),
    ('--later=4', "--later: no setting is called 'later'; this lists the settings: python script.py --help"),
    ('--SIZES=4', "--SIZES: no setting is called 'SIZES'; this lists the settings: python script.py --help"),
    ('--decay_lr', '--decay_lr has no value: type --decay_lr=True or --decay_lr=False'),
    ('--decay_lr --batch_size=3', '--decay_lr has no value: type --decay_lr=True or --decay_lr=False'),
    ('--batch_size', '--batch_size has no value: type --batch_size=...'),
    ('--batch_size=', "--batch_size: batch_size must be a whole number, not ''"),
    ('--batch_size=many', "--batch_size: batch_size must be a whole number, not 'many'"),
    ('--batch_size=1.5', '--batch_size: batch_size must be a whole number, not 1.5'),
    ('--batch_size=True', '--batch_size: batch_size must be a whole number, not True'),
    ('--learning_rate=nan', '--learning_rate: learning_rate must be a number, not nan'),
    ('--learning_rate=1e999', '--learning_rate: learning_rate must be a number, not inf'),
    ('--learning_rate=1,5', "--learning_rate: learning_rate must be a number, not '1,5'"),
    ('--decay_lr=yes', "--decay_lr: decay_lr must be True or False, not 'yes'"),
    ('--decay_lr=2', '--decay_lr: decay_lr must be True or False, not 2'),
    ('--schedule=cosin', "--schedule: schedule must be 'cosine' or 'linear', not 'cosin'"),
    ('--compile=maybe', "--compile: compile must be True or False or 'auto', not 'maybe'"),
    ('--start=\udcff', '--start: start must be text in UTF-8, without the character NUL'),
    ('--out_dir=\udcff', '--out_dir: out_dir must be text in UTF-8, without the character NUL'),
    ('batch_size=3', 'batch_size=3: a setting is given with two dashes, --name=value'),
    ('-batch_size 3', '-batch_size: a setting is given with two dashes, --name=value'),
    ('.', "'.' cannot be read as a config file: Is a directory; a setting is given as --name=value"),
])
def test_a_wrong_command_has_a_clear_answer(script: ModuleType, args: str, answer: str) -> None:
    assert complaint(script, *args.split()) == answer.replace('python ', f'{python()} ')


REMEDY = '\n' + configurator.REMEDY
TIME = '\n' + configurator.TIME_REMEDY
HELP = 'every script lists its settings with --help.'
DIGITS = ': an exponent, or a number of digits, is above 64'


@pytest.mark.parametrize(('text', 'answer'), [
    ('\n\nbatch_siz = 3', "a.py, line 3: no setting is called 'batch_siz'; did you mean batch_size?"),
    ('batch_size = 3\nx = 3', f"a.py, line 2: no setting is called 'x'; {HELP}"),
    ('batch_size = min_l', "a.py, line 1: no setting is called 'min_l'; did you mean min_lr?"),
    ('decay_lr = true', "a.py, line 1: no setting is called 'true'; did you mean True?"),
    ("batch_size = '4'", "a.py, line 1: batch_size must be a whole number, not '4'"),
    ('batch_size = 0.5', 'a.py, line 1: batch_size must be a whole number, not 0.5'),
    ('learning_rate = None', 'a.py, line 1: learning_rate must be a number, not None'),
    ('out_dir = 5', "a.py, line 1: out_dir must be text in quotes, 'like this', not 5"),
    ("out_dir = b'x'", "a.py, line 1: out_dir must be text in quotes, 'like this', not b'x'"),
    ('learning_rate = 1j', 'a.py, line 1: learning_rate must be a number, not 1j'),
    ('import time as t', 'a.py, line 1: this is refused: import time as t' + TIME),
    ("wandb_run_name = time.strftime('%d')", "a.py, line 1: this is refused: time.strftime('%d')" + TIME),
    ('learning_rate = time', f"a.py, line 1: no setting is called 'time'; {HELP}"),
    ('import os', 'a.py, line 1: this is refused: import os' + REMEDY),
    ('batch_size = abs(-5)', 'a.py, line 1: this is refused: abs(-5)' + REMEDY),
    ('batch_size = int()', 'a.py, line 1: this is refused: int()' + REMEDY),
    ("batch_size = int('5')", "a.py, line 1: int('5'): arithmetic takes numbers, and text + text"),
    ("batch_size = int('5', base=8)", "a.py, line 1: this is refused: int('5', base=8)" + REMEDY),
    ("out_dir = max('a', 'b')", "a.py, line 1: max('a', 'b'): arithmetic takes numbers, and text + text"),
    ('batch_size = max(3)', 'a.py, line 1: max(3): ...'),
    ('batch_size = int(1e999)', 'a.py, line 1: int(1e309): ...'),
    ('batch_size = round(1, -9**9)', 'a.py, line 1: round(1, -9 ** 9)' + DIGITS),
    ("out_dir = f'{1:999}'", 'a.py, line 1: {1:999}' + DIGITS),
    ("out_dir = f'{1:{min_lr}%%}'", 'a.py, line 1: {1:{min_lr}%%}: ...'),
    ("out_dir = f'{min_lr!r}'", 'a.py, line 1: this is refused: ...'),
    ('out_dir = str(0x' + 'f' * 9999 + ')', 'a.py is not a config file: ...'),
    ("start = f'{start}{start}'\n" * 40, "a.py, line 17: f'{start}{start}': the result is too large, or not a number"),
    ('use_flash = False', f"a.py, line 1: no setting is called 'use_flash'; {HELP}"),
    ('x = y = 4\nbatch_size = x', f"a.py, line 1: no setting is called 'y'; {HELP}"),
    ('batch_size = x\nx = 4', f"a.py, line 1: no setting is called 'x'; {HELP}"),
    ('x = 4\nx = x + 1', f"a.py, line 2: no setting is called 'x'; {HELP}"),
    ('max_length = 4', f"a.py, line 1: no setting is called 'max_length'; {HELP}"),
    ('batch_size = [4][0]', 'a.py, line 1: this is refused: [4][0]' + REMEDY),
    ('batch_size = (lambda: 4)()', 'a.py, line 1: this is refused: (lambda: 4)()' + REMEDY),
    ('batch_size = start.x', 'a.py, line 1: this is refused: start.x' + REMEDY),
    ('batch_size = 1 << 3', 'a.py, line 1: this is refused: 1 << 3' + REMEDY),
    ('batch_size, min_lr = 1, 2', 'a.py, line 1: this is refused: batch_size, min_lr = (1, 2)' + REMEDY),
    ('batch_size += 1', 'a.py, line 1: this is refused: batch_size += 1' + REMEDY),
    ('batch_size: int', 'a.py, line 1: this is refused: batch_size: int' + REMEDY),
    ('if True:\n    batch_size = 1', 'a.py, line 1: this is refused: if True: batch_size = 1' + REMEDY),
    ('batch_size = 9**9**9', 'a.py, line 1: 9 ** 9 ** 9' + DIGITS),
    ('batch_size = 9**64', 'a.py, line 1: 9 ** 64: the result is too large, or not a number'),
    ('learning_rate = (-8) ** 0.5', 'a.py, line 1: (-8) ** 0.5: the result is too large, or not a number'),
    ('batch_size = 1 // 0', 'a.py, line 1: 1 // 0: ...'),
    ("out_dir = 'a' * 9999999999", "a.py, line 1: 'a' * 9999999999: arithmetic takes numbers, and text + text"),
    ("out_dir = '%s' % 'a'", "a.py, line 1: '%s' % 'a': arithmetic takes numbers, and text + text"),
    ('start = start + start\n' * 40, 'a.py, line 17: start + start: the result is too large, or not a number'),
    ('batch_size = ', 'a.py, line 1: invalid syntax' + REMEDY),
    ('batch_size: 12\nmax: 3\n- x y', 'a.py, line 3: invalid syntax' + REMEDY),
    ('batch_size = ' + '-' * 3000 + '1', 'a.py is not a config file: ...'),
    ('batch_size = 1' + ' + 1' * 3000, 'a.py is not a config file: ...'),
    ('batch_size = \0', 'a.py...'),
    (r"out_dir = 'a\0b'", 'a.py, line 1: out_dir must be text in UTF-8, without the character NUL'),
    ('#' * 200_000, 'a.py is not a config file: it is longer than 100,000 characters'),
])
def test_a_config_file_that_is_more_than_settings_is_refused(script: ModuleType, text: str, answer: str) -> None:
    found = complaint(script, write(text))
    beginning = answer.removesuffix('...')  # the rest is Python's own words, which differ between its versions
    assert found == answer or (answer != beginning and found.startswith(beginning))
    assert (script.batch_size, script.out_dir) == (12, 'out'), 'a refused file must not set anything'


def test_a_file_that_is_no_text_is_refused(script: ModuleType) -> None:
    Path('ckpt.pt').write_bytes(b'PK\x03\x04\xff\xfe')
    assert complaint(script, 'ckpt.pt') == 'ckpt.pt is not a config file: it is not text in UTF-8'


def test_a_missing_config_file_is_answered_with_the_nearest(script: ModuleType) -> None:
    write('', 'mytext.py')
    assert 'config/ has eval_gpt2, eval_gpt2_large, ' in complaint(script, 'zzzz.py')
    assert complaint(script, 'mytext') == 'there is no config file mytext\ndid you mean mytext.py?'
    for typed in ('train_gpt2', 'config/train_gpt2.py', 'train_gpt-2.py'):
        first, second = complaint(script, typed).splitlines()
        assert first == f'there is no config file {typed}'
        nearest = second.removeprefix('did you mean ').split(' or ')[0].rstrip('?')
        assert Path(nearest).resolve() == ROOT / 'config/train_gpt2.py', 'the answer can be typed as printed'


def run(script: ModuleType, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the script as a process of its own, in the folder `cwd`."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'utf-8'}
    command = [sys.executable, str(script.__file__), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding='utf-8')


def test_help_prints_the_docstring_and_the_settings_as_written(script: ModuleType, tmp_path: Path) -> None:
    done = run(script, '--batch_size=3', '--help', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.startswith('Says what its settings are.\n')
    for line in SCRIPT.split('# ---- Settings\n')[1].split('# ----\n')[0].splitlines():
        assert line in done.stdout.splitlines()
    for other in ('SIZES', 'import', 'later', 'def main'):
        assert other not in done.stdout
    assert run(script, '-h', cwd=tmp_path).stdout == done.stdout


def test_nothing_in_a_config_file_or_in_the_current_folder_is_executed(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    for name in ('configurator.py', 'plaingpt.py', 'train.py'):
        (folder / name).write_text("open('executed', 'w')", encoding='utf-8')
    (folder / 'good.py').write_text('batch_size = 7', encoding='utf-8')
    (folder / 'evil.py').write_text("batch_size = 7; import os; os.system('touch executed')", encoding='utf-8')
    (folder / 'worse.py').write_text("out_dir = __import__('os').system('touch executed')", encoding='utf-8')

    good = run(script, 'good.py', '--learning_rate=1', cwd=folder)
    assert (good.returncode, good.stderr) == (0, '')
    assert good.stdout.endswith("['batch_size', 'learning_rate'] 7 1.0\n")
    for name, line in (('evil.py', 'import os'), ('worse.py', "__import__('os').system('touch executed')")):
        refused = run(script, name, cwd=folder)
        assert (refused.returncode, refused.stdout) == (COMMAND, '')
        assert refused.stderr == f'{name}, line 1: this is refused: {line}\n{configurator.REMEDY}\n'
    assert not (folder / 'executed').exists()
