"""The report of a run: it shows what the run's files say, whatever they hold, and it never ends a run."""
import html
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from plaingpt.errors import COMMAND, DATA, UserError
from plaingpt.run import curves, records, report
from plaingpt.run.log import Log

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

HOSTILE = '</script><img src=x onerror=alert(1)>'
MACHINE = 'device cuda (NVIDIA H200), which was asked for'


def run_in(folder: Path, seed: int = 0, speed: float = 1000.0, first_step: int = 0, steps: int = 40,
           **settings: Any) -> Path:
    """Write a folder as a run of 100 tokens a step leaves it, with measurements at each tenth step."""
    log, random = Log(folder, True, first_step, steps), np.random.default_rng(seed)
    about = {'settings': {'learning_rate': 1e-3, 'n_layer': 4, **settings}, 'parameters': 1234567, 'python': '3.11',
             'torch': '2.13'}
    log.introduce(about, f'python train.py --note={HOSTILE}', MACHINE)
    with log:
        for step in range(first_step, steps + 1):
            loss = 2 + 5 * math.exp(-step / 10) + random.normal() / 10
            if step % 10 == 0:
                log.row(step, train_loss=loss - 0.1, val_loss=loss + 0.1, val_accuracy=0.1, val_loss_stderr=0.01)
                log.sample(step, f'written before step {step} {HOSTILE}')
            if step < steps:
                log.row(step, loss=loss, lr=1e-3, grad_norm=1.0, tokens=100 * (step + 1), tokens_per_second=speed)
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def page_of(folder: Path) -> str:
    return (folder / 'report.html').read_text(encoding='utf-8')


def values(whole: str, name: str, chart: str) -> tuple[list[float], list[float]]:
    """Return the points of a curve, as they are written for the script."""
    [figure] = [part for part in whole.split('<figure')[1:] if re.search(f'<figcaption>{chart}', part)]
    [(x, y)] = re.findall(rf'data-name="{name}" data-x="(.*?)" data-y="(.*?)"', figure)
    return [float(value) for value in x.split()], [float(value) for value in y.split()]


def test_the_report_holds_what_a_run_has_left(tmp_path: Path) -> None:
    whole, rows = page_of(run_in(tmp_path / 'out-a')), rows_of(tmp_path / 'out-a')
    assert '<h1>out-a</h1>' in whole and '<td>done</td><td class="number">1,234,567</td>' in whole
    for name, key in (('training', 'loss'), ('validation', 'val_loss')):
        x, y = values(whole, name, 'Loss')
        assert x == [row['step'] for row in rows if key in row]
        assert y == pytest.approx([row[key] for row in rows if key in row], rel=1e-4)
    best = min((row for row in rows if 'val_loss' in row), key=lambda row: row['val_loss'])
    assert f'<td class="number">{best["val_loss"]:.4g}</td><td></td><td class="number">{best["step"]}</td>' in whole
    for row in rows[::10]:  # the table of evaluations: a step has read the tokens before it
        figures = (f'{100 * row["step"]:,}', *(f'{row[f"{name}"]:.4g}' for name in ('train_loss', 'val_loss')))
        assert f'{row["step"]}</th>' + ''.join(f'<td class="number">{text}</td>' for text in figures) in whole
    for title in ('Learning rate', 'Gradient norm', 'Tokens per second'):
        assert len(values(whole, 'out-a', title)[0]) == 40
    assert '<th scope="row">learning_rate</th><td class="number">0.001</td>' in whole
    written = re.findall(r'written before step (\d+)', whole)
    assert written == ['0', '20', '40'], 'before, during and after'
    command = html.escape(f'python train.py --note={HOSTILE}')
    assert f'<pre>{command}</pre>' in whole and f'from step 0: {MACHINE}</p>' in whole
    assert 'Python 3.11, PyTorch 2.13.' in whole


def test_the_page_needs_nothing_else_and_what_it_shows_stays_text(tmp_path: Path) -> None:
    whole = page_of(run_in(tmp_path / f'out{HOSTILE.replace("/", "")}'))
    assert not re.search(r'https?:|//\w|<img|<script[^>]|<link|@import|url\(', re.sub(r'\n// .*', '', whole))
    assert whole.count('<script') == whole.count('</script') == 1
    assert whole.count(html.escape(HOSTILE)) == 4
    assert '{{' not in whole and 'nan' not in whole


def test_a_run_that_was_resumed_is_shown_whole(tmp_path: Path) -> None:
    run_in(tmp_path, steps=20)
    run_in(tmp_path, first_step=15, steps=40)
    whole = page_of(tmp_path)
    assert values(whole, 'training', 'Loss')[0] == list(range(40))
    assert re.findall(r'from step (\d+): ', whole) == ['0', '15']
    run_in(tmp_path, first_step=10, steps=20)
    assert re.findall(r'from step (\d+): ', page_of(tmp_path)) == ['0', '10'], 'what came after that is gone'
    run_in(tmp_path, steps=20)
    assert re.findall(r'from step (\d+): ', page_of(tmp_path)) == ['0'], 'another run in the same folder'


def test_rows_that_are_not_finite_or_torn_leave_a_gap(tmp_path: Path) -> None:
    run_in(tmp_path)
    rows = rows_of(tmp_path)
    for number, change in ((3, {'loss': None, 'grad_norm': None}), (10, {'val_loss': None}), (40, {'val_loss': None}),
                           (5, {'tokens_per_second': 0}), (6, {'tokens': None, 'tokens_per_second': None})):
        rows[number] |= change
    text = '\n'.join([*map(json.dumps, rows), '{"step": 41, "lo', '[]', '{"step": -1}'])
    (tmp_path / 'metrics.jsonl').write_text(text, encoding='utf-8')
    whole = report.render([report.read(tmp_path)])
    assert values(whole, 'training', 'Loss')[0] == [step for step in range(40) if step != 3]
    assert values(whole, 'validation', 'Loss')[0] == [0, 20, 30]
    assert not re.search(r'\b(nan|inf|None)\b', whole)


@pytest.mark.parametrize('rows', ['', '{"step": 0, "loss": null}\n', '{"step": 0, "val_loss": 3.5}\n',
                                  '{"step": 7, "loss": 3.5}\n', '{"step": 0, "loss": 1, "tokens": 5}\n'])
def test_a_run_that_has_hardly_begun_has_a_report(rows: str, tmp_path: Path) -> None:
    (tmp_path / 'metrics.jsonl').write_text(rows, encoding='utf-8')
    for stories in ([report.read(tmp_path)], [report.read(tmp_path), report.read(tmp_path)]):
        whole = report.render(stories)
        assert f'<h1>{tmp_path.name}' in whole and not re.search(r'\b(nan|inf|None)\b', whole)
    assert ('<h2>Loss</h2>' in report.render([report.read(tmp_path)])) == ('3.5' in rows or '1,' in rows)


@pytest.mark.parametrize('content', ['', '[]', '{"settings": 3}', '{"starts": [{}]}', 'null', '\xff'])
def test_a_damaged_file_beside_the_numbers_is_left_out(content: str, tmp_path: Path) -> None:
    run_in(tmp_path)
    for name in ('run', 'status', 'evaluation'):
        (tmp_path / f'{name}.json').write_text(content, encoding='latin-1')
    whole = report.render([report.read(tmp_path)])
    assert '<td>unknown</td>' in whole and 'Settings' not in whole and values(whole, 'training', 'Loss')


def test_a_report_that_fails_is_one_line_and_the_run_continues(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(folder: Path) -> None:
        raise ValueError('a mistake')

    monkeypatch.setattr(report, 'write', fail)
    with Log(tmp_path, True, 0, 2) as log:
        log.row(0, loss=2.0)
        log.row(1, loss=1.0)
        log.plot()
    said = capsys.readouterr().out.splitlines()
    assert said == [f'{tmp_path}/report.html is not drawn: a mistake; the run continues'] * 2
    assert len(rows_of(tmp_path)) == 2 and (tmp_path / 'loss.png').exists()
    monkeypatch.undo()
    run_in(tmp_path, steps=10)
    assert capsys.readouterr().out.count('report.html') == 0


def fail_in(folder: Path, error: Exception) -> None:
    with Log(folder, True, 0, 10) as log:
        log.row(0, loss=1.0)
        raise error


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        fail_in(tmp_path, UserError(f'the disk is full {HOSTILE}', DATA))
    whole = page_of(tmp_path)
    assert f'<p>the disk is full {html.escape(HOSTILE)}</p>' in whole and '<td>failed</td>' in whole


# ------------------------------------------------------------------------------------------------
# Several runs


def test_two_runs_share_one_page_by_tokens_and_by_time(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_in(tmp_path / 'out-a', 0, speed=10.0)  # 10 seconds a step
    run_in(tmp_path / 'b/out-a', 1, speed=20.0, learning_rate=3e-3, wandb=None)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    report.main(['out-a', 'b/out-a'])
    assert capsys.readouterr().out == 'open report.html in a browser\n'
    whole = page_of(tmp_path)
    assert '<h1>out-a, b/out-a</h1>' in whole
    for name, minutes in (('out-a', 1 / 6), ('b/out-a', 1 / 12)):
        rows = rows_of(tmp_path / name)
        for kind, key in (('training', 'loss'), ('validation', 'val_loss')):
            steps = [row['step'] for row in rows if key in row]
            for what, factor in (('tokens', 100), ('minutes of learning', minutes)):
                x, y = values(whole, f'{name}: {kind}', f'Loss in nats per token, against {what}')
                assert x == pytest.approx([factor * step for step in steps])
                assert y == pytest.approx([row[key] for row in rows if key in row], rel=1e-4)
    [differ] = re.findall(r'<h2>Settings that differ</h2>(.*?)</table>', whole)
    assert re.findall(r'scope="row">(.*?)</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>', differ) == [
        ('learning_rate', '0.001', '0.003')]
    assert len(re.findall(r'written before step 40', whole)) == 2
    looks = {name: re.findall(rf'class="noisy (tone\d dash\d)" d="[^"]*" data-name="{name}: training"', whole)
             for name in ('out-a', 'b/out-a')}
    assert looks == {'out-a': ['tone0 dash0'] * 2, 'b/out-a': ['tone1 dash1'] * 2}, 'told apart without colour, too'


@pytest.mark.parametrize(('arguments', 'message', 'code'), [
    (['nowhere'], 'nowhere holds no metrics.jsonl: give the out_dir of a run', DATA),
    (['--html=a.html'], 'give the folders of some runs', COMMAND),
    (['out', '--pdf=a'], '--pdf=a: there is no such option', COMMAND),
    (['out', '--html='], 'give the folders of some runs', COMMAND)])
def test_a_folder_without_a_run_and_an_unknown_option_are_refused(
        arguments: list[str], message: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        report.main(arguments)
    assert error.value.code == code and not list(tmp_path.iterdir())


def test_help_is_the_first_lines_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ['--help']):
        report.main(arguments)
        assert capsys.readouterr().out.startswith('A report of a run, or of several')


# ------------------------------------------------------------------------------------------------
# Long runs


def test_a_curve_has_at_most_as_many_points_as_are_seen() -> None:
    x = np.arange(12_345.0)
    thin = curves.thinned(curves.Curve('a', x, 3 * x))
    assert 400 < len(thin.x) <= curves.MOST_POINTS
    assert thin.y == pytest.approx(3 * thin.x) and thin.x[0] == pytest.approx(x[:25].mean())
    assert thin.x[-1] == pytest.approx(x[len(thin.x) * 25 - 25:].mean())
    short = curves.Curve('b', x[:500], x[:500])
    assert curves.thinned(short) is short


def test_some_rows_of_a_long_file_are_read_and_every_evaluation(tmp_path: Path) -> None:
    rows = [{'step': i, 'loss': 1.0, 'padding': 'x' * 300} | ({'val_loss': 1.0} if i % 777 == 5 else {})
            for i in range(10_000)]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n', encoding='utf-8')
    found = records.read_some(tmp_path / 'metrics.jsonl', 1000)
    steps = [row['step'] for row in found]
    assert steps == sorted(set(steps)) and 1000 <= len(steps) < 1100
    assert steps[0] == 0 and steps[-1] == 9999 and max(np.diff(steps)) < 20
    assert {row['step'] for row in found if 'val_loss' in row} == set(range(5, 10_000, 777))
    assert [row['step'] for row in records.read_some(tmp_path / 'metrics.jsonl', 20_000)] == list(range(10_000))


@pytest.mark.parametrize(('low', 'high', 'found'), [
    (0, 2000, [0, 500, 1000, 1500, 2000]), (3.1, 3.4, [3.1, 3.2, 3.3, 3.4]), (0, 0.004, [0, 1e-3, 2e-3, 3e-3, 4e-3]),
    (5, 5, [5])])
def test_an_axis_has_round_numbers(low: float, high: float, found: list[float]) -> None:
    assert curves.ticks(low, high) == pytest.approx(found)


# ------------------------------------------------------------------------------------------------
# A real run, and a real browser


@pytest.mark.slow
def test_train_and_evaluate_write_it_without_a_secret(
        tiny_dataset: Path, tmp_path: Path, run_script: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    small = ['--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=16', '--batch_size=4', '--eval_iters=2',
             '--gradient_accumulation_steps=1', '--eval_interval=4', '--log_interval=2', '--sample_tokens=5',
             '--device=cpu', '--dtype=float32', '--compile=False', f'--dataset={tiny_dataset}',
             '--hellaswag=https://user:hunter2@example.org/file.jsonl?signature=hunter2']
    for arguments in (['--max_iters=4'], ['--max_iters=8', '--init_from=auto']):
        trained = run_script('train.py', *small, *arguments, cwd=tmp_path, environment={'MY_API_KEY': 'hunter2'})
        assert trained.returncode == 0, trained.stderr
    whole, about = page_of(tmp_path / 'out'), json.loads((tmp_path / 'out/run.json').read_text(encoding='utf-8'))
    assert [start['step'] for start in about['starts']] == [0, 4]
    assert re.search(r'<pre>.*python.* .*train\.py --n_layer=1 .*--max_iters=8 --init_from=auto</pre>', whole)
    assert 'device cpu' in about['starts'][0]['machine'] and about['parameters'] > 1000
    assert '<td>done</td>' in whole and '<h2>Evaluation</h2>' not in whole
    evaluated = run_script('evaluate.py', '--eval_iters=2', '--device=cpu', cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert 'out/report.html shows them beside the run' in evaluated.stdout
    [measured] = json.loads((tmp_path / 'out/evaluation.json').read_text(encoding='utf-8'))['measured']
    [table] = re.findall(r'<h2>Evaluation</h2>.*?</table>', page_of(tmp_path / 'out'))
    assert f'<th scope="row">out, step 8</th><td class="number">{measured["val"]["loss"]:.4g}</td>' in table
    for file in ('report.html', 'run.json', 'evaluation.json'):
        assert 'hunter2' not in (tmp_path / 'out' / file).read_text(encoding='utf-8')


def test_published_figures_are_below_the_measured_ones(tmp_path: Path) -> None:
    run_in(tmp_path)
    row = {'checkpoint': 'out', 'step': 40, 'dataset': 'openwebtext', 'val': {'loss': 3.5, 'perplexity': 33.1},
           'hellaswag_completion': {'acc': 0.28, 'acc_norm': None}}
    content = {'measured': [row], 'device': 'cpu', 'dtype': 'float32', 'notes': {'hellaswag_completion': '10 examples'}}
    (tmp_path / 'evaluation.json').write_text(json.dumps(content), encoding='utf-8')
    whole = report.render([report.read(tmp_path)])
    assert '<caption>val of openwebtext</caption>' in whole
    assert '<caption>HellaSwag in completion style, as build-nanogpt and llm.c score it, 10 examples</caption>' in whole
    assert ('<th scope="row">out, step 40</th><td class="number">3.5</td><td class="number">33.1</td></tr>'
            '<tr><th scope="row">GPT-2 124M</th><td class="number">3.12</td><td class="number"></td>') in whole
    assert '<th scope="row">GPT-2 124M</th><td class="number">0.2859</td><td class="number">0.2945</td>' in whole


def test_pointing_at_a_chart_and_a_key_show_values(browser: 'Chrome', tmp_path: Path) -> None:
    rows = rows_of(run_in(tmp_path / 'out'))
    browser.get((tmp_path / 'out/report.html').as_uri())
    svg = browser.find_element('css selector', '.chart > svg')
    said = browser.find_element('css selector', '.chart .values')
    browser.execute_script("""const box = arguments[0].getBoundingClientRect()
        arguments[0].dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width / 2}))""", svg)
    [step] = map(int, re.findall(r'^at (\d+) steps: ', said.text))
    assert 15 <= step <= 22
    loss, val_loss = rows[step]['loss'], rows[10 * round(step / 10)]['val_loss']
    assert said.text == f'at {step} steps: training {loss:.5g}, validation {val_loss:.5g}'
    svg.send_keys('\ue014')  # right
    assert said.text.startswith(f'at {step + 1} steps: training {rows[step + 1]["loss"]:.5g}, validation ')
    assert browser.get_log('browser') == []
