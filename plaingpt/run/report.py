"""
A report of a run, or of several beside each other, as a page: curves, settings, samples, evaluation, machine, commands.

    python -m plaingpt.run.report out-stdlib                      the report of a run: report.html in this folder
    python -m plaingpt.run.report out-a out-b --html=both.html    two runs, by tokens and by time

train.py writes out_dir/report.html at each evaluation, and evaluate.py when it has measured a checkpoint of the run.
"""
import math
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plaingpt import console, errors, files, page, schema
from plaingpt.errors import DATA, UserError
from plaingpt.page import Html
from plaingpt.published import PUBLISHED, TITLES
from plaingpt.run import reference
from plaingpt.run.curves import SMALL, Curve, Values, chart, figure
from plaingpt.run.records import columns_of, number, read_samples, read_some
from plaingpt.run.reference import Reference

HELLASWAG = ('hellaswag_acc_norm', 'hellaswag_cleaned_acc_norm')  # of the text as it is, or cleaned
PANELS = {'lr': 'Learning rate', 'grad_norm': 'Gradient norm', 'tokens_per_second': 'Tokens per second'}
COLUMNS = ('step', 'tokens', 'loss', 'val_loss', 'val_loss_stderr', *PANELS, *HELLASWAG,
           *(f'{name}_stderr' for name in HELLASWAG))
ABOUT = {  # what run.json holds
    'settings': {str: (str, bool, int, float, None)},
    'starts': [{'step': schema.COUNT, 'time': str, 'command': str, 'machine': str}, ...],
    'parameters': schema.COUNT, 'python': str, 'torch': str,
}
EVALUATION = {'measured': [{'checkpoint': str}, ...], 'device': str, 'dtype': str, 'notes': {str: str}}
MOST_STEPS = 10_000  # rows of metrics.jsonl that are read, so that long runs wait no longer for their report
MOST_ROWS = 40  # evaluations in the table
UNITS = tuple((seconds, f'{name} of learning') for seconds, name in (
    (1, 'seconds'), (60, 'minutes'), (3600, 'hours'), (86400, 'days')))
TONES = 4  # colours of runs


class Story(NamedTuple):
    """A run, as its files tell it."""

    name: str
    columns: dict[str, Values]  # of metrics.jsonl
    evaluations: list[dict[str, Any]]  # rows of it
    samples: list[tuple[int, str]]  # steps, and what was written then
    about: dict[str, Any]  # run.json; {} if there is none
    status: dict[str, Any]  # status.json
    evaluation: dict[str, Any]  # evaluation.json
    reference: Reference | None = None  # the curve of another run that its settings name

    def measured(self, *names: str) -> list[Values]:
        """Return the columns, in the rows in which the first of them was measured."""
        there = np.isfinite(self.columns[names[0]])
        return [self.columns[name][there] for name in names]

    def after(self, steps: Values, what: str) -> Values:
        """Return how many tokens had been read, or seconds spent on learning, after each of these numbers of steps. A
        row includes its own step. Seconds are those of the steps alone, without evaluations."""
        tokens, step, speed = self.measured('tokens', 'step', 'tokens_per_second')
        done = np.append(0.0, step + 1)
        total = np.append(0.0, tokens)
        if what == 'seconds':
            spent = np.diff(total) / np.where(speed > 0, speed, np.nan)
            total = np.append(0.0, np.cumsum(np.nan_to_num(spent)))
        return np.asarray(np.interp(steps, done, total))


def read(folder: Path, name: str = '') -> Story:
    """Read what a run has left. Raise UserError if it has left no numbers."""
    if not (folder / 'metrics.jsonl').is_file():
        raise UserError(f'{folder} holds no metrics.jsonl: give the out_dir of a run', DATA)
    found = [files.read_json(folder / f'{file}.json') for file in ('run', 'status', 'evaluation')]
    about, status, evaluation = (content if schema.fits(content, shape) else {} for content, shape in zip(
        found, (ABOUT, {'state': str, 'message': str}, EVALUATION), strict=True))
    rows = read_some(folder / 'metrics.jsonl', MOST_STEPS)
    return Story(
        name=name or folder.absolute().name,
        columns=columns_of(rows, COLUMNS),
        evaluations=[row for row in rows if number(row.get('val_loss')) is not None],
        samples=read_samples(folder / 'samples.txt'),
        about=about,
        status=status,
        evaluation=evaluation,
        reference=reference_of(about.get('settings', {}).get('reference')),
    )


def reference_of(path: object) -> Reference | None:
    """Return the curve that a run's settings name; None if it is missing."""
    try:
        return reference.read(str(path)) if path else None
    except UserError:
        return None


# ------------------------------------------------------------------------------------------------
# Curves


def look(run: int, several: bool, is_measured: bool = False) -> str:
    """Return how a curve looks: of one run both losses, of several each run has a colour."""
    return f'tone{run % TONES} dash{run % TONES}' if several else f'tone{int(is_measured)} dash0'


def losses(stories: Sequence[Story], what: str) -> Html:
    """Return the losses of all runs against 'steps', 'tokens' or 'seconds'."""
    curves, several = list[Curve](), len(stories) > 1
    for run, story in enumerate(stories):
        prefix = f'{story.name}: ' if several else ''
        loss, step = story.measured('loss', 'step')
        val, val_step, error = story.measured('val_loss', 'step', 'val_loss_stderr')
        x, val_x = (steps if what == 'steps' else story.after(steps, what) for steps in (step, val_step))
        curves.append(Curve(f'{prefix}training', x, loss, look(run, several)))
        curves.append(Curve(f'{prefix}validation', val_x, val, look(run, several, True), 'measured', error))
        if story.reference and what == 'steps':
            tokens, step = story.measured('tokens', 'step')
            at, y = story.reference.beside(np.append(0.0, step + 1), np.append(0.0, tokens))
            curves.append(Curve(f"{story.reference.name}, another run's validation", at, y, 'grey', 'measured'))
    curves = [curve for curve in curves if len(curve.x)]
    end = max((float(curve.x[-1]) for curve in curves), default=0.0)
    if not curves or (what != 'steps' and not end):
        return Html('')
    if what == 'seconds':
        size, what = next((pair for pair in reversed(UNITS) if end >= 2 * pair[0]), UNITS[0])
        curves = [curve._replace(x=curve.x / size) for curve in curves]
    return chart(f'Loss in nats per token, against {what}', what, curves)


def panels(stories: Sequence[Story]) -> Iterator[Html]:
    """Yield a chart of each other thing that was measured, against steps; of HellaSwag against tokens."""
    several = len(stories) > 1
    for name, title in PANELS.items():
        found = [story.measured(name, 'step') for story in stories]
        curves = [Curve(story.name, step, y, look(run, several))
                  for run, (story, (y, step)) in enumerate(zip(stories, found, strict=True))]
        if any(len(curve.x) for curve in curves):
            yield chart(f'{title}, against steps', 'steps', curves, True, SMALL)
    for name in HELLASWAG:
        curves = []
        for run, story in enumerate(stories):
            y, step, error = story.measured(name, 'step', f'{name}_stderr')
            x = story.after(step, 'tokens')
            curves.append(Curve(story.name, x, y, look(run, several), 'measured', error))
        if any(len(curve.x) for curve in curves):
            of = 'of cleaned text' if 'cleaned' in name else 'completion style'
            yield chart(f'HellaSwag acc_norm, {of}, against tokens', 'tokens', curves, size=SMALL)


# ------------------------------------------------------------------------------------------------
# Tables


def cell(value: object) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, float):
        return figure(value)
    return f'{value:,}' if type(value) is int else '' if value is None else str(value)


def summary(stories: Sequence[Story]) -> Html:
    """Return how far each run has come, and what it has reached."""
    rows = []
    for story in stories:
        steps = story.columns['step']
        done = np.array([steps[-1] if len(steps) else 0.0])
        [tokens], [seconds] = (story.after(done + 1, what) for what in ('tokens', 'seconds'))
        best = min(story.evaluations, key=itemgetter('val_loss'), default={})
        rows.append((story.name, story.status.get('state', 'unknown'), story.about.get('parameters'),
                     int(story.status.get('step', done[0])), int(tokens), console.duration(seconds),
                     best.get('val_loss'), best.get('val_bits_per_byte'), best.get('step')))
    head = ('run', 'state', 'parameters', 'steps', 'tokens', 'time learning', 'best validation loss', 'bits per byte',
            'at step')
    return page.table('', head, [[cell(value) for value in row] for row in rows])


def evaluations(story: Story) -> Html:
    """Return the evaluations while the run was training, in at most MOST_ROWS rows."""
    every = math.ceil(len(story.evaluations) / MOST_ROWS) or 1
    rows = [row for i, row in enumerate(reversed(story.evaluations)) if i % every == 0][::-1]
    names = [name for name in dict.fromkeys(name for row in rows for name in row)
             if name.startswith(('val_', 'train_')) and not name.endswith('_stderr')]
    said = 'Evaluations' if every == 1 else f'Each {every}th evaluation'
    head = ['step', 'tokens', *(name.replace('val_', '').replace('_', ' ') for name in names)]
    tokens = story.after(np.array([float(row['step']) for row in rows]), 'tokens')
    return page.table(said, head, [
        [cell(row['step']), cell(int(read)), *(cell(row.get(name)) for name in names)]
        for row, read in zip(rows, tokens, strict=True)]) if rows else Html('')


def beside_published(story: Story) -> Iterator[Html]:
    """Yield a table for each thing that evaluate.py has measured, with the published figures below."""
    measured = story.evaluation.get('measured', [])
    for name in dict.fromkeys(name for row in measured for name, value in row.items() if isinstance(value, dict)):
        corpus = f'{name} of {measured[0].get("dataset", "")}'
        found = {f'{row["checkpoint"]}, step {row.get("step")}': row[name] for row in measured
                if isinstance(row.get(name), dict)}
        figures = found | PUBLISHED.get(corpus, PUBLISHED.get(name, {}))
        metrics = list(dict.fromkeys(metric for row in figures.values() for metric in row))
        caption = ', '.join(filter(None, (TITLES.get(name, corpus), story.evaluation['notes'].get(name))))
        head = ['', *(metric.replace('_', ' ') for metric in metrics)]
        yield page.table(caption, head, [[model, *(cell(row.get(metric)) for metric in metrics)]
                                         for model, row in figures.items()])


def settings(stories: Sequence[Story]) -> Html:
    """Return the settings of a run, or those in which several differ."""
    all_settings = [story.about.get('settings', {}) for story in stories]
    names = dict.fromkeys(name for each in all_settings for name in each)
    rows = [[name, *('' if each.get(name) is None else str(each[name]) for each in all_settings)] for name in names]
    if len(stories) > 1:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    return page.table('', ['setting', *(story.name for story in stories)], rows) if rows else Html('')


# ------------------------------------------------------------------------------------------------
# The page


def section(title: str, *parts: Html) -> Html:
    content = page.join(parts)
    return page.fill('<h2>{{title}}</h2>{{content}}', {'title': title, 'content': content}) if content else Html('')


def shown_samples(story: Story, several: bool) -> Iterator[Html]:
    """Yield what the model wrote before, in the middle and at the end of the run; of several runs, at the end."""
    n = len(story.samples)
    for i in [n - 1] if several and n else sorted({0, n // 2, n - 1} & set(range(n))):
        step, text = story.samples[i]
        yield page.fill('<h3>{{name}}step {{step}}</h3><pre>{{text}}</pre>', {
            'name': f'{story.name}, ' if several else '', 'step': f'{step:,}', 'text': text})


def starts(story: Story, several: bool) -> Iterator[Html]:
    """Yield each command that began or continued the run, with the machine that ran it."""
    about = story.about
    for start in about.get('starts', []):
        yield page.fill('<p>{{name}}{{time}}, from step {{step}}: {{machine}}</p><pre>{{command}}</pre>', {
            **start, 'step': f'{start["step"]:,}', 'name': f'{story.name}, ' if several else ''})
    if about:
        yield page.fill('<p class="soft">Python {{python}}, PyTorch {{torch}}.</p>', about)


def render(stories: Sequence[Story]) -> str:
    """Return the page of one run or of several."""
    several, title = len(stories) > 1, ', '.join(story.name for story in stories)
    said = '' if several else stories[0].status.get('message', '')
    kinds = ('tokens', 'seconds') if several else ('steps',)
    small = page.join(panels(stories))
    of_one = [] if several else [evaluations(stories[0])]
    found = [table for story in stories for table in beside_published(story)]
    body = page.join([
        summary(stories), page.fill('<p>{{said}}</p>', {'said': said}) if said else '',
        section('Loss', *(losses(stories, kind) for kind in kinds), *of_one),
        section('What else was measured', Html(f'<div class="panels">{small}</div>' if small else '')),
        section('Evaluation', *found),
        section('What it wrote', *(part for story in stories for part in shown_samples(story, several))),
        section('Commands and machines', *(part for story in stories for part in starts(story, several))),
        section('Settings that differ' if several else 'Settings', settings(stories)),
    ])
    template = Path(__file__).with_name('report.html').read_text(encoding='utf-8')
    return page.document(f'{title}: report', template, {'title': title, 'body': body})


def write(folder: Path) -> None:
    """Write report.html beside what a run has left."""
    with files.written_whole(folder / 'report.html') as file:
        file.write(render([read(folder)]).encode())


def main(args: list[str]) -> None:
    if not args or {'-h', '--help'} & set(args):
        console.say((__doc__ or '').strip())
        return
    options = [arg for arg in args if arg.startswith('--')]
    if unknown := [option for option in options if not option.startswith('--html=')]:
        raise UserError(f'{unknown[0]}: there is no such option; give folders of runs, and --html=FILE')
    where = options[-1].partition('=')[2] if options else 'report.html'
    folders = [arg for arg in args if arg not in options]
    if not folders or not where:
        raise UserError('give the folders of some runs, and --html=FILE if report.html is not to be written')
    names = [Path(folder).absolute().name for folder in folders]
    stories = [read(Path(folder), name if names.count(name) == 1 else folder)
               for folder, name in zip(folders, names, strict=True)]
    with files.written_whole(where) as file:
        file.write(render(stories).encode())
    console.say(f'open {where} in a browser')


if __name__ == '__main__':
    errors.run(main)
