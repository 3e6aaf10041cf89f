"""Command lines drawn at random, over all scripts: each is answered in words, and none with a traceback."""
import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import configurator
from plaingpt.errors import COMMAND, DATA, NOT_FINITE, UserError
from tests.waiting import PATIENT

RunScript = Callable[..., subprocess.CompletedProcess[str]]


ROOT = Path(__file__).parents[1]
WITH_SETTINGS = [path for path in (*ROOT.glob('*.py'), *ROOT.glob('data/*/prepare.py'))
                 if "if __name__ == '__main__'" in path.read_text(encoding='utf-8')]


@pytest.mark.parametrize('path', WITH_SETTINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_answers_help_with_its_settings(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))
    with pytest.raises(SystemExit) as end:
        script.main(['--help'])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith((script.__doc__ or '?').strip().splitlines()[0])
    names = configurator.find_settings(script)
    assert all(f'\n{name}: ' in said for name in names) and ('It has no settings' in said) == (not names)


@pytest.mark.slow
@pytest.mark.parametrize('path', [*ROOT.glob('benchmarks/*.py'), *ROOT.glob('launch/*.py'),
                                  ROOT / 'course/all.py', ROOT / 'course/ladder.py'], ids=lambda path: path.name)
def test_every_other_script_answers_help(path: Path, run_script: RunScript) -> None:
    result = run_script(str(path.relative_to(ROOT)), '--help')
    first = (ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '?').splitlines()[0]
    assert result.returncode in (0, COMMAND) and 'Traceback' not in result.stderr
    assert result.stdout.startswith((first, 'usage: '))


def gpu_check(tmp_path: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    given = {'QUICK': '1', 'PY': sys.executable, 'OUT': str(tmp_path)}
    return subprocess.run(['bash', 'benchmarks/gpu_check.sh', *steps], cwd=ROOT, env={**os.environ, **given},
                          capture_output=True, text=True, encoding='utf-8', timeout=PATIENT)


@pytest.mark.slow
def test_the_check_of_a_gpu_can_be_tried_on_a_cpu_where_each_step_succeeds(tmp_path: Path) -> None:
    result = gpu_check(tmp_path)
    assert (result.returncode, result.stderr) == (0, ''), result.stdout
    steps = re.findall(r'^(\w+) +\d+ s  ok  ', result.stdout, re.MULTILINE)
    assert ' '.join(steps) == ('machine parts b12 b64 waits check float16 fsdp offload same1 same2 same stop resume '
                               'writing')
    source = (ROOT / 'benchmarks/gpu_check.sh').read_text(encoding='utf-8')
    limits = re.findall(r'^ *(?:probe|train|step|stop|resume) (\d+)', source.partition('\nseveral=')[0],
                        re.MULTILINE)
    of_same = limits.pop(0)
    assert sum(map(int, [*limits, of_same, of_same])) < 600, 'seconds, on one GPU'


@pytest.mark.slow
def test_a_step_of_the_check_of_a_gpu_that_fails_is_named(tmp_path: Path) -> None:
    result = gpu_check(tmp_path, 'resume')  # and nothing has stopped before
    assert result.returncode == 1
    assert re.fullmatch(r'resume +\d+ s  FAIL, exit code 4  .*\n', result.stdout)


@pytest.mark.slow
def test_a_thousand_command_lines_end_without_a_traceback(run_script: RunScript) -> None:
    result = run_script('benchmarks/commands.py', '--lines=1000', '--real=12')
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr
    codes = dict(re.findall(r'(\d+): (\d+)', result.stdout.splitlines()[-1]))
    assert sum(map(int, codes.values())) == 1000
    assert {'0', '2', '3', '4'} <= codes.keys(), 'not all were right, nor all wrong'


@pytest.mark.parametrize(('script', 'argument', 'answer'), [
    ('train', '--gradient_accumulation_steps=1e18', '--gradient_accumulation_steps=1000000000000000000: must be less'),
    ('train', '--total_batch_size=9e18', 'total_batch_size=9000000000000000000: a step of 8789062500000000 windows'),
    ('train', '--batch_size=2e9', 'gradient_accumulation_steps=40 x batch_size=2000000000: a step of 80000000000 win'),
    ('train', '--n_layer=1e9', 'n_layer=1000000000, n_embd=768, vocab_size=50304, block_size=1024: a model of 7.1e+15'),
    ('train', '--n_embd=1.2e9', 'n_layer=12, n_embd=1200000000, vocab_size=50304, block_size=1024: a model of 2.1e+20'),
    ('train', '--timeout=1e18', '--timeout=1e+18: must be less than 2147483648'),
    ('train', '--sample_start=\udcff', '--sample_start: sample_start must be text in UTF-8, without the character NUL'),
    ('train', f'--dataset={"x" * 5000}', f'--dataset: dataset={"x" * 57}...: File name too long'),
    ('train', f'--out_dir=a/{"x" * 300}', f'--out_dir: out_dir=a/{"x" * 55}...: File name too long'),
    ('train_trivialised', '--beta1=1', 'nothing is finite any more: try a lower --learning_rate'),
    ('train_trivialised', '--n_layer=1e18', 'n_layer=1000000000000000000, n_embd=128'),
    ('sample', '--num_samples=1e18', '--num_samples=1000000000000000000: must be less than 2147483648'),
    ('evaluate', '--batch_size=1e18', '--batch_size=1000000000000000000: must be less than 2147483648'),
    ('evaluate', '--json=.', '--json=. is a folder: give the name of a file'),
    ('data.text.prepare', '--seed=-1', '--seed=-1: must be 0 or more'),
    ('data.text.prepare', '--tokenizer=bpe:99999999999999', "tokenizer 'bpe:99999999999999': N of 'bpe:N' is"),
    *(('data.text.prepare', f'--input={url}', f'--input={url} cannot be opened: ') for url in (
        'reference://x', 'zip://a.txt', 'zip://a.txt::none.zip', 'hf://x', 'nosuch://x', 'jupyter://x')),
    ('data.text.prepare', '--input=data:,x', '--input=data:,x matches no file and no folder'),
    ('data.text.prepare', '--input=http://[', 'http://[ cannot be used: Invalid IPv6 URL'),
])
def test_what_no_machine_can_do_is_refused_in_words_before_it_is_tried(
        script: str, argument: str, answer: str, tmp_path: Path, tiny_dataset: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n' * 30, encoding='utf-8')
    right = {'train': ['--plan=True'],
             'train_trivialised': [f'--dataset={tiny_dataset}', '--max_iters=1', '--n_layer=0'],
             'data.text.prepare': ['--input=a.jsonl', '--tokenizer=byte', '--name=never']}
    with pytest.raises(UserError) as caught:
        importlib.import_module(script).main([*right.get(script, []), argument])
    assert caught.value.code in (COMMAND, DATA, NOT_FINITE)
    assert str(caught.value).startswith(answer) and str(caught.value).count('\n') < 3


@pytest.mark.slow
def test_a_dataset_that_the_hub_does_not_give_is_one_message_and_nothing_before_it(
        tmp_path: Path, run_script: RunScript) -> None:
    done = run_script('data/tinystories/prepare.py', '--source=nobody/nothing', cwd=tmp_path,
                      environment={'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '0'})
    assert done.returncode == 3
    assert done.stderr.startswith('nobody/nothing cannot be downloaded: ') and done.stderr.count('\n') == 2, done.stderr


@pytest.mark.slow
def test_the_table_beside_peers_has_a_row_for_each_question(tmp_path: Path, run_script: RunScript) -> None:
    """The rows are of tiny models, and of those peers that are installed. Other machines keep their sections."""
    others = ['## A CPU\n\nwhat it did\n\n| more |', f'## {"~" * 9}\n\n| of another |']
    (tmp_path / 'table.md').write_text('# Measured\n\nold words\n\n' + '\n\n'.join(others) + '\n', encoding='utf-8')
    result = run_script('benchmarks/peers.py', '--size=tiny', '--rounds=1', '--threads=1', f'--to={tmp_path}/table.md',
                        '--rows=step,memory,write,load,save')
    assert result.returncode == 0, result.stderr
    page = (tmp_path / 'table.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (.+?), (?:s|GB) \| 1 \| (\S+) \|', page, re.MULTILINE)
    assert len(rows) == 7 and all(float(number) > 0 for _, number in rows)
    assert page.count('\n## ') == 3 and 'old words' not in page
    assert f'\n\n{others[0]}\n\n' in page and page.endswith(f'\n\n{others[1]}\n')
