"""The picture of a run: loss.png. log.py imports this where it draws, so that a run does without matplotlib, too."""
import io
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from plaingpt.console import short
from plaingpt.published import PUBLISHED

Values = NDArray[np.float64]
Columns = Mapping[str, Values]  # of the same length: one value for each row, NaN where it was not measured

PANELS = {'lr': 'learning rate', 'grad_norm': 'gradient norm', 'tokens_per_second': 'tokens per second'}
HELLASWAG = ('hellaswag_acc_norm', 'hellaswag_cleaned_acc_norm')  # in completion style; the text as it is, or cleaned
COLUMNS = ('step', 'tokens', 'loss', 'val_loss', 'val_loss_stderr', 'val_bits_per_byte', *PANELS,
           *HELLASWAG, *(f'{name}_stderr' for name in HELLASWAG))
TRAIN, VALIDATION, INK, FAINT, GRID = '#3b6ea8', '#d1495b', '#2b2b2b', '#7f7f7f', '#ececec'


def measured(columns: Columns, name: str) -> tuple[Values, Values]:
    """The steps at which `name` was measured, and what it was."""
    there = np.isfinite(columns[name])
    return columns['step'][there], columns[name][there]


def smoothed(y: Values) -> Values:
    """The mean of each value and its neighbours: 2 % of all on either side, and where the left has fewer, as few on the
    right, so that a curve that begins to fall stays where it is."""
    i, n = np.arange(len(y)), len(y)
    left = np.minimum(i, n // 50)
    right = np.minimum(np.minimum(i, n - 1 - i), n // 50)
    total = np.concatenate([[0.0], np.cumsum(y)])
    return np.asarray((total[i + right + 1] - total[i - left]) / (left + right + 1))


def clean(axes: Axes, unit: str) -> None:
    """Only the lines that help to read a value, and short numbers; where x is 0 stands what it counts."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color('#c8c8c8')
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=FAINT, labelsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n) if n else unit))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))


def draw_noisy(axes: Axes, x: Values, y: Values, colour: str) -> None:
    """What each step measured: itself faintly, its running mean clearly."""
    thin = slice(None, None, 1 + len(x) // 4000)
    axes.plot(x[thin], y[thin], color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(x[thin], smoothed(y)[thin], color=colour, linewidth=1.5, solid_capstyle='round')


def draw_losses(axes: Axes, columns: Columns) -> None:
    """Training loss, and validation loss within its standard error; each is named where it ends."""
    x, y = measured(columns, 'loss')
    val_x, val_y = measured(columns, 'val_loss')
    drawn, first = np.concatenate([y, val_y]), np.concatenate([y[:1], val_y[:1]])
    low, high = drawn.min(), max(np.percentile(drawn, 99.5), first.max())  # one spike does not flatten the rest
    margin = 0.1 * (high - low) + 1e-3  # room for a name
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel('loss, nats per token', color=FAINT, fontsize=9)

    names = []
    if len(x):
        draw_noisy(axes, x, y, TRAIN)
        names.append((smoothed(y)[-1], 'train', '', TRAIN, y[x >= 0.8 * x[-1]]))
    if len(val_x):
        error = columns['val_loss_stderr'][np.isfinite(columns['val_loss'])]
        axes.fill_between(val_x, val_y - error, val_y + error, color=VALIDATION, alpha=0.2, linewidth=0)
        axes.plot(val_x, val_y, color=VALIDATION, linewidth=1.5, marker='o', markersize=3 if len(val_x) < 60 else 0)
        doubt = f' ± {error[-1]:.3f}' if np.isfinite(error[-1]) else ''
        names.append((val_y[-1], 'validation', doubt, VALIDATION, val_y[val_x >= 0.8 * val_x[-1]]))

    # The higher curve has its name above all of its last fifth, the lower one below.
    names.sort(key=itemgetter(0), reverse=True)
    for (end, name, doubt, colour, tail), is_higher in zip(names, (True, False), strict=False):
        axes.annotate(
            f'{name} {end:.3f}{doubt}',
            xy=(columns['step'][-1], tail.max() if is_higher else tail.min()),
            xytext=(-2, 9 if is_higher else -7),
            textcoords='offset points',
            ha='right',
            va='bottom' if is_higher else 'top',
            color=colour,
            fontsize=10,
        )


def draw_hellaswag(axes: Axes, columns: Columns, name: str, tokens_per_step: float) -> None:
    """Accuracy against tokens, within its standard error, and those published figures which it has passed or may pass
    next. They stand for the whole set, of its own text."""
    steps, y = measured(columns, name)
    x, error = steps * tokens_per_step, columns[f'{name}_stderr'][np.isfinite(columns[name])]
    figures = {model: row['acc_norm'] for model, row in PUBLISHED['hellaswag_completion'].items()}
    to_pass = sorted(figure for figure in figures.values() if figure > y.max())[:2]
    low, high = min(0.24, (y - error).min() - 0.005), max(*to_pass, (y + error).max(), 0.25) + 0.015
    axes.set(xlim=(0, columns['step'][-1] * tokens_per_step), ylim=(low, high))
    for model, figure in {'chance': 0.25, **figures}.items():
        if figure > high:
            continue
        colour, style = (INK, 'dashed') if model.startswith('GPT-2') else (FAINT, 'dotted')
        axes.axhline(figure, color=colour, linewidth=0.8, linestyle=style)
        close = [other for other in figures.values() if 0 < abs(other - figure) < 0.04 * (high - low)]  # to its name
        place: Literal['center', 'top', 'bottom'] = 'center'
        if close:
            place = 'top' if close[0] > figure else 'bottom'
        axes.annotate(model, (1.02, figure), xycoords=('axes fraction', 'data'), va=place, fontsize=8, color=colour)
    axes.fill_between(x, y - error, y + error, color=TRAIN, alpha=0.2, linewidth=0)
    axes.plot(x, y, color=TRAIN, linewidth=1.8, marker='o', markersize=3 if len(x) < 60 else 0)
    axes.annotate(f'{y[-1]:.3f} ± {error[-1]:.3f}', (x[-1], (y + error)[x >= 0.7 * x[-1]].max()), xytext=(-2, 5),
                  textcoords='offset points', ha='right', color=TRAIN, fontsize=10)
    remark = 'of cleaned text: not comparable' if 'cleaned' in name else 'GPT-3 as OpenAI scored it'
    axes.set_title(f'HellaSwag acc_norm, completion style, {remark}', loc='left', fontsize=9, color=FAINT, pad=8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    clean(axes, '0 tokens')


def best(columns: Columns) -> str:
    """The lowest validation loss of the run, in words."""
    x, y = measured(columns, 'val_loss')
    if not len(y):
        return ''
    at = int(np.argmin(y))
    bits = columns['val_bits_per_byte'][np.isfinite(columns['val_loss'])][at]
    per_byte = f', {bits:.3f} bits per byte' if np.isfinite(bits) else ''
    return f'best validation loss {y[at]:.3f}{per_byte}, at step {x[at]:,.0f}'


def picture(columns: Columns, title: str) -> Figure:
    """Losses against steps (above: against tokens), below them a panel for each of PANELS that was measured, and beside
    them HellaSwag."""
    steps, tokens = measured(columns, 'tokens')
    tokens_per_step = tokens[-1] / steps[-1] if len(tokens) and steps[-1] > 0 else 0.0
    panels = [name for name in PANELS if np.isfinite(columns[name]).any()]
    hellaswag = [name for name in HELLASWAG if np.isfinite(columns[name]).any() and tokens_per_step]
    figure = Figure(figsize=(9 + 5 * bool(hellaswag), 5.2 if panels else 3.8), dpi=150, layout='constrained')
    halves = figure.add_gridspec(1, 2, width_ratios=(9, 5)) if hellaswag else figure.add_gridspec(1, 1)
    ratios = {'height_ratios': (3, 1)} if panels else {}
    grid = halves[0].subgridspec(2 if panels else 1, max(1, len(panels)), **ratios)

    losses = figure.add_subplot(grid[0, :])
    draw_losses(losses, columns)
    clean(losses, 'step 0')
    losses.set_title(title, loc='left', fontsize=12, fontweight='bold', color=INK, pad=8)
    losses.set_title(best(columns), loc='right', fontsize=9, color=FAINT, pad=8)
    if tokens_per_step:
        there, back = partial(np.multiply, tokens_per_step), partial(np.multiply, 1 / tokens_per_step)
        above = losses.secondary_xaxis('top', functions=(there, back))
        above.spines['top'].set_visible(False)
        above.tick_params(length=0, colors=FAINT, labelsize=9)
        above.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n) if n else '0 tokens'))

    for i, name in enumerate(panels):
        panel = figure.add_subplot(grid[1, i])
        x, y = measured(columns, name)
        if name == 'lr':
            panel.plot(x, y, color=INK, linewidth=1.5)
        else:
            draw_noisy(panel, x, y, INK)
        panel.set_ylim(0, 1.08 * max(np.percentile(y, 99.5), 1e-12))
        panel.set_title(PANELS[name], loc='left', fontsize=9, color=FAINT)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.yaxis.set_major_locator(MaxNLocator(3))
        clean(panel, '0')
    for axes in figure.axes:
        axes.set_xlim(0, max(columns['step'][-1], 1))
    if hellaswag:
        draw_hellaswag(figure.add_subplot(halves[1]), columns, hellaswag[0], tokens_per_step)
    return figure


def draw(columns: Columns, title: str) -> bytes:
    """The PNG of a run, some loss of which must be there."""
    figure = picture(columns, title)
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format='png', facecolor='white')
    Image.open(full).convert('RGB').quantize(64).save(small, format='png', optimize=True)  # in 64 colours
    return small.getvalue()
