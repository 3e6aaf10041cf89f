"""The picture of a run: loss.png. log.py imports this only when it draws, so that a run can do without matplotlib."""
import io
from collections.abc import Mapping
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from plaingpt.console import short
from plaingpt.published import PUBLISHED
from plaingpt.run.reference import Reference

Values = NDArray[np.float64]
Columns = Mapping[str, Values]  # of the same length: one value for each row, NaN if it was not measured

PANELS = {'lr': 'learning rate', 'grad_norm': 'gradient norm', 'tokens_per_second': 'tokens per second'}
HELLASWAG = ('hellaswag_acc_norm', 'hellaswag_cleaned_acc_norm')  # in completion style; of published or cleaned text
COLUMNS = ('step', 'tokens', 'loss', 'val_loss', 'val_loss_stderr', 'val_bits_per_byte', *PANELS,
           *HELLASWAG, *(f'{name}_stderr' for name in HELLASWAG))
TRAIN, VALIDATION, INK, FAINT, GREY = '#3b6ea8', '#d1495b', '#2b2b2b', '#7f7f7f', '#d8d8d8'
STYLE: dict[Any, Any] = {  # matplotlib's settings: only the lines that help to read a value
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#c8c8c8',
    'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#ececec',
    'axes.labelcolor': FAINT, 'axes.labelsize': 9,
    'axes.titlecolor': FAINT, 'axes.titlesize': 9, 'axes.titlelocation': 'left',
    'xtick.color': FAINT, 'xtick.labelsize': 9, 'xtick.major.size': 0,
    'ytick.color': FAINT, 'ytick.labelsize': 9, 'ytick.major.size': 0,
}
ASIDE: dict[int, Literal['bottom', 'center', 'top']] = {-1: 'bottom', 0: 'center', 1: 'top'}  # to make way for a name


def measured(columns: Columns, *names: str) -> list[Values]:
    """Return the steps at which the first of these was measured, and the value of each at these steps."""
    is_measured = np.isfinite(columns[names[0]])
    return [columns[name][is_measured] for name in ('step', *names)]


def line_of_tokens(columns: Columns) -> tuple[Values, Values]:
    """Return how many tokens were read after how many steps: the corners of a line that bends where the batch size
    changed, and continues as it ends. If tokens were never measured, return the first corner only."""
    steps, tokens = (np.append(0.0, values) for values in measured(columns, 'tokens'))
    steps[1:] += 1  # a row says what was read when its step was done
    after = columns['step'][-1] + 1
    more = after * np.diff(tokens[-2:]) / np.diff(steps[-2:])
    return np.append(steps, steps[-1] + after)[:len(steps) + len(more)], np.append(tokens, tokens[-1] + more)


def smoothed(y: Values) -> Values:
    """Return the mean of each value and its neighbours: 2 % of all on either side. If there are fewer on the left, take
    as few on the right, so that a curve that falls at its beginning is not shifted."""
    i, n = np.arange(len(y)), len(y)
    left = np.minimum(i, n // 50)
    right = np.minimum(left, n - 1 - i)
    total = np.concatenate([[0.0], np.cumsum(y)])
    return np.asarray((total[i + right + 1] - total[i - left]) / (left + right + 1))


def scale(axes: Axes, end: float, unit: str) -> None:
    """Let x reach from 0, which is labelled with its unit, to `end`; and write 1k for 1000 on both axes."""
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(lambda n, _: short(n) if n else unit)
    axes.yaxis.set_major_formatter(lambda n, _: short(n))


def draw_noisy(axes: Axes, x: Values, y: Values, colour: str) -> None:
    """Draw what each step measured: the values faintly, their running mean clearly."""
    thin = slice(None, None, 1 + len(x) // 4000)
    axes.plot(x[thin], y[thin], color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(x[thin], smoothed(y)[thin], color=colour, linewidth=1.5, solid_capstyle='round')


def draw_measured(axes: Axes, x: Values, y: Values, error: Values, colour: str) -> None:
    """Draw what was measured now and then, within its standard error."""
    axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, y, color=colour, linewidth=1.5, marker='o', markersize=3 if len(x) < 60 else 0)


def draw_reference(axes: Axes, columns: Columns, reference: Reference) -> None:
    """Draw the validation loss of another run, at the same tokens; it is named where it begins."""
    x, y = reference.beside(*line_of_tokens(columns))
    axes.plot(x, y, color=GREY, linewidth=4, zorder=0, solid_capstyle='round')
    if len(x):
        axes.annotate(f'{reference.name} {y[-1]:.3f}', (x[0], y[0]), xytext=(8, -2), textcoords='offset points',
                      ha='left', va='top', color=FAINT, fontsize=10)


def draw_losses(axes: Axes, columns: Columns) -> None:
    """Draw the training loss, and the validation loss within its standard error; each is named where it ends."""
    x, y = measured(columns, 'loss')
    val_x, val_y, error = measured(columns, 'val_loss', 'val_loss_stderr')
    drawn, first = np.concatenate([y, val_y]), np.concatenate([y[:1], val_y[:1]])
    low, high = drawn.min(), max(np.percentile(drawn, 99.5), first.max())  # one spike does not flatten the rest
    margin = 0.1 * (high - low) + 1e-3  # room for a name
    axes.set(ylim=(low - margin, high + margin), ylabel='loss, nats per token')

    names = []
    if len(x):
        draw_noisy(axes, x, y, TRAIN)
        end = smoothed(y)[-1]
        names.append((end, f'train {end:.3f}', TRAIN, y[x >= 0.8 * x[-1]]))
    if len(val_x):
        draw_measured(axes, val_x, val_y, error, VALIDATION)
        doubt = f' ± {error[-1]:.3f}' if np.isfinite(error[-1]) else ''
        names.append((val_y[-1], f'validation {val_y[-1]:.3f}{doubt}', VALIDATION, val_y[val_x >= 0.8 * val_x[-1]]))

    # The higher curve has its name above all of its last fifth, the lower one below.
    for (_, name, colour, tail), is_higher in zip(sorted(names, reverse=True), (True, False), strict=False):
        axes.annotate(
            name,
            xy=(columns['step'][-1], tail.max() if is_higher else tail.min()),
            xytext=(-2, 9 if is_higher else -7),
            textcoords='offset points',
            ha='right',
            va='bottom' if is_higher else 'top',
            color=colour,
            fontsize=10,
        )


def draw_hellaswag(axes: Axes, columns: Columns, name: str, tokens_by_step: tuple[Values, Values]) -> None:
    """Draw accuracy against tokens, within its standard error, and the published figures that it has passed or may pass
    next. Those are for the whole set, with its text as published."""
    steps, y, error = measured(columns, name, f'{name}_stderr')
    x = np.interp(steps, *tokens_by_step)
    figures = {model: row['acc_norm'] for model, row in PUBLISHED['hellaswag_completion'].items()}
    to_pass = sorted(figure for figure in figures.values() if figure > y.max())[:2]
    low, high = min(0.24, (y - error).min() - 0.005), max(*to_pass, (y + error).max(), 0.25) + 0.015
    shown = {model: figure for model, figure in {'chance': 0.25, **figures}.items() if figure <= high}
    for model, figure in shown.items():
        colour, style = (INK, 'dashed') if model.startswith('GPT-2') else (FAINT, 'dotted')
        axes.axhline(figure, color=colour, linewidth=0.8, linestyle=style)
        distances = (other - figure for other in figures.values())
        to_next = next((far for far in distances if 0 < abs(far) < 0.04 * (high - low)), 0.0)  # a line close to it
        axes.annotate(model, (1.02, figure), xycoords=('axes fraction', 'data'), va=ASIDE[int(np.sign(to_next))],
                      fontsize=8, color=colour)
    draw_measured(axes, x, y, error, TRAIN)
    axes.annotate(f'{y[-1]:.3f} ± {error[-1]:.3f}', (x[-1], (y + error)[x >= 0.7 * x[-1]].max()), xytext=(-2, 5),
                  textcoords='offset points', ha='right', color=TRAIN, fontsize=10)
    remark = 'of cleaned text: not comparable' if 'cleaned' in name else 'GPT-3 as OpenAI scored it'
    axes.set_title(f'HellaSwag acc_norm, completion style, {remark}', loc='left', pad=8)
    axes.set_ylim(low, high)
    scale(axes, np.interp(columns['step'][-1], *tokens_by_step), '0 tokens')


def best(columns: Columns) -> str:
    """Return the lowest validation loss of the run, in words."""
    x, y, bits = measured(columns, 'val_loss', 'val_bits_per_byte')
    if not len(y):
        return ''
    at = int(np.argmin(y))
    per_byte = f', {bits[at]:.3f} bits per byte' if np.isfinite(bits[at]) else ''
    return f'best validation loss {y[at]:.3f}{per_byte}, at step {x[at]:,.0f}'


def picture(columns: Columns, title: str, reference: Reference | None = None) -> Figure:
    """Return a figure of losses against steps (and tokens, along the top), the validation loss of another run in grey,
    with a panel below them for each of PANELS that was measured, and HellaSwag beside them."""
    steps, tokens = line_of_tokens(columns)
    end, has_tokens = max(columns['step'][-1], 1), len(tokens) > 1
    panels = [name for name in PANELS if np.isfinite(columns[name]).any()]
    hellaswag = [name for name in HELLASWAG if np.isfinite(columns[name]).any() and has_tokens]
    figure = Figure(figsize=(14 if hellaswag else 9, 5.2 if panels else 3.8), dpi=150, layout='constrained')
    halves = figure.add_gridspec(1, 2, width_ratios=(9, 5)) if hellaswag else figure.add_gridspec(1, 1)
    grid = halves[0].subgridspec(2, len(panels), height_ratios=(3, 1)) if panels else halves

    losses = figure.add_subplot(grid[0, :])
    draw_losses(losses, columns)
    if reference:
        draw_reference(losses, columns, reference)
    losses.set_title(title, loc='left', fontsize=12, fontweight='bold', color=INK, pad=8)
    losses.set_title(best(columns), loc='right', pad=8)
    scale(losses, end, 'step 0')
    if has_tokens:
        above = losses.secondary_xaxis('top', functions=(
            lambda x: np.interp(np.asarray(x), steps, tokens), lambda x: np.interp(np.asarray(x), tokens, steps)))
        above.spines['top'].set_visible(False)
        above.xaxis.set_major_formatter(lambda n, _: short(n) if n else '0 tokens')

    for i, name in enumerate(panels):
        panel = figure.add_subplot(grid[1, i])
        x, y = measured(columns, name)
        if name == 'lr':
            panel.plot(x, y, color=INK, linewidth=1.5)
        else:
            draw_noisy(panel, x, y, INK)
        panel.set(title=PANELS[name], ylim=(0, 1.08 * max(np.percentile(y, 99.5), 1e-12)))
        scale(panel, end, '0')
    if hellaswag:
        draw_hellaswag(figure.add_subplot(halves[1]), columns, hellaswag[0], (steps, tokens))
    return figure


@matplotlib.rc_context(STYLE)
def draw(columns: Columns, title: str, reference: Reference | None = None) -> bytes:
    """Return the PNG of a run, which must have at least one loss."""
    full, small = io.BytesIO(), io.BytesIO()
    picture(columns, title, reference).savefig(full, format='png', facecolor='white')
    Image.open(full).convert('RGB').quantize(64).save(small, format='png', optimize=True)  # in 64 colours
    return small.getvalue()
