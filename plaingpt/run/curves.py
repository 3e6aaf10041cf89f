"""Curves as SVG, which can be read without a script; they carry their values, for a script that shows these."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from plaingpt import page
from plaingpt.console import short
from plaingpt.page import Html

Values = NDArray[np.float64]

SIZE, SMALL = (720, 270), (360, 190)  # units of a drawing
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 34  # its margins
MOST_POINTS = 500  # in a curve
SMOOTH = 99.5  # percent of the values that are seen in any case: one spike does not flatten the rest
LINE = '<path class="{{kind}} {{look}}" d="{{d}}" data-name="{{name}}" data-x="{{x}}" data-y="{{y}}"/>'
BAND = '<path class="band {{look}}" d="{{d}}"/>'
DOT = '<circle class="{{look}}" cx="{{x}}" cy="{{y}}" r="3"/>'
KEY = """<li><svg viewBox="0 0 30 10" width="30" height="10" aria-hidden="true"><path class="{{kind}} {{look}}" \
d="M1 5H29"/></svg> {{name}} <b>{{last}}</b></li>"""
CHART = """<figure class="chart" style="max-width:{{wide}}rem"><figcaption>{{title}}</figcaption>
<ul class="keys">{{keys}}</ul>
<svg viewBox="0 0 {{width}} {{height}}" role="img" aria-label="{{title}}" tabindex="0" data-unit="{{unit}}" \
data-from="{{left}} {{low}}" data-to="{{right}} {{high}}">
{{grid}}<svg x="{{left}}" y="{{top}}" width="{{inner}}" height="{{tall}}" \
viewBox="{{left}} {{top}} {{inner}} {{tall}}">{{lines}}</svg>
<line class="cursor" y1="{{top}}" y2="{{bottom}}" x1="-9" x2="-9"/></svg>
<p class="values soft with" aria-live="polite">&nbsp;</p></figure>
"""


class Curve(NamedTuple):
    """Values against steps, tokens or time: finite, and in order."""

    name: str
    x: Values
    y: Values
    look: str = 'tone0 dash0'  # classes of report.html: which colour it has, and which dashes
    kind: str = 'noisy'  # or 'measured', now and then, each of which is a dot
    error: Values | None = None


def figure(value: float) -> str:
    """Return a number with four digits, or with all before its point."""
    return f'{value:,.0f}' if 1e4 <= abs(value) < math.inf else f'{value:.4g}'


def thinned(curve: Curve) -> Curve:
    """Return the curve with at most MOST_POINTS points, each the mean of those in its place."""
    n, error = math.ceil(len(curve.x) / MOST_POINTS), curve.error
    if n <= 1:
        return curve
    starts = np.arange(0, len(curve.x), n)
    counts = np.diff(np.append(starts, len(curve.x)))
    x, y = (np.add.reduceat(values, starts) / counts for values in (curve.x, curve.y))
    return curve._replace(x=x, y=y, error=None if error is None else error[starts])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from low to high."""
    if not high > low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= count)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def limits(curves: Sequence[Curve], from_zero: bool) -> tuple[float, float]:
    """Return the lowest and the highest value that the drawing shows."""
    y = np.concatenate([curve.y for curve in curves])
    firsts = [float(curve.y[0]) for curve in curves]
    low, high = 0.0 if from_zero else float(y.min()), max([float(np.percentile(y, SMOOTH)), *firsts])
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low if from_zero else low - margin, high + margin


def chart(title: str, unit: str, curves: Sequence[Curve], from_zero: bool = False,
          size: tuple[int, int] = SIZE) -> Html:
    """Return a figure of these curves, of which at least one has a point; `unit` is that of x."""
    curves = [thinned(curve) for curve in curves if len(curve.x)]
    width, height = size
    right, bottom = width - RIGHT, height - BOTTOM
    end = max(float(curve.x[-1]) for curve in curves) or 1.0
    low, high = limits(curves, from_zero)

    def place(x: Values | float, y: Values | float) -> tuple[Values, Values]:
        return (np.asarray(LEFT + (right - LEFT) * np.asarray(x) / end),
                np.asarray(bottom - (bottom - TOP) * (np.asarray(y) - low) / (high - low)))

    grid = []
    for value in ticks(low, high):
        y = place(0.0, value)[1]
        grid.append(Html(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>'
                         f'<text x="{LEFT - 7}" y="{y + 4:.1f}" class="left">{short(value)}</text>'))
    for value in ticks(0.0, end, width // 120):
        x = place(value, 0.0)[0]
        label, kind = (short(value), 'below') if value else (f'0 {unit}', 'first')
        grid.append(Html(f'<text x="{x:.1f}" y="{bottom + 19}" class="{kind}">{page.html(label)}</text>'))
    lines = [part for curve in curves for part in drawn(curve, *place(curve.x, curve.y), (bottom - TOP) / (high - low))]
    keys = [page.fill(KEY, {'kind': curve.kind, 'look': curve.look, 'name': curve.name, 'last': figure(curve.y[-1])})
            for curve in curves]
    return page.fill(CHART, {
        'title': title, 'unit': unit, 'keys': page.join(keys), 'grid': page.join(grid), 'lines': page.join(lines),
        'width': width, 'height': height, 'wide': width / 14, 'low': 0.0, 'high': f'{end:.8g}',
        'left': LEFT, 'right': right, 'top': TOP, 'bottom': bottom, 'inner': right - LEFT, 'tall': bottom - TOP})


def drawn(curve: Curve, x: Values, y: Values, scale: float) -> list[Html]:
    """Return a curve whose points lie at x and y of the drawing, within its standard error; 1 is `scale` units high."""
    parts = []
    if curve.error is not None:
        error = np.nan_to_num(curve.error) * scale
        around = [*zip(x, y - error, strict=True), *zip(x[::-1], (y + error)[::-1], strict=True)]
        parts.append(page.fill(BAND, {'look': curve.look, 'd': path(around) + 'Z'}))
    parts.append(page.fill(LINE, {
        'kind': curve.kind, 'look': curve.look, 'name': curve.name, 'd': path([*zip(x, y, strict=True)]),
        'x': ' '.join(f'{value:.8g}' for value in curve.x), 'y': ' '.join(f'{value:.5g}' for value in curve.y)}))
    if curve.kind == 'measured' and len(x) <= 60:
        parts += [page.fill(DOT, {'look': curve.look, 'x': f'{a:.1f}', 'y': f'{b:.1f}'})
                  for a, b in zip(x, y, strict=True)]
    return parts


def path(points: Sequence[tuple[float, float]]) -> str:
    return 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in points)
