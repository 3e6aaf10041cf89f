"""The picture of a run: HellaSwag beside the losses. test_log.py looks at the losses, in pixels."""
import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from PIL import Image

from plaingpt.published import PUBLISHED
from plaingpt.run import plot

N, TOKENS = 50, 524288  # rows, tokens in a step


def columns_of(name: str, last: float) -> dict[str, plot.Values]:
    """Return a run whose accuracy rises from chance, and is measured in every tenth row."""
    columns = {column: np.full(N, np.nan) for column in plot.COLUMNS}
    columns['step'] = np.arange(N) * 250.0
    columns['tokens'] = (columns['step'] + 1) * TOKENS
    columns['loss'] = np.linspace(10.0, 3.0, N)
    columns[name][::10] = np.linspace(0.25, last, N // 10)
    columns[f'{name}_stderr'][::10] = 0.0045
    return columns


def right_panel(columns: dict[str, plot.Values]) -> Axes:
    return plot.picture(columns, 'out-gpt2').axes[-1]


def test_hellaswag_is_drawn_beside_the_losses_against_tokens() -> None:
    columns = columns_of('hellaswag_acc_norm', 0.31)
    panel = right_panel(columns)
    assert panel.get_title('left') == 'HellaSwag acc_norm, completion style, GPT-3 as OpenAI scored it'
    curve = np.asarray(panel.lines[-1].get_xydata())
    assert curve[:, 1].tolist() == np.linspace(0.25, 0.31, 5).tolist()
    assert curve[:, 0] == pytest.approx(columns['tokens'][::10], abs=2 * TOKENS)
    assert any(text.get_text() == '0.310 ± 0.004' for text in panel.texts), 'the last value'
    with Image.open(io.BytesIO(plot.draw(columns, 'out-gpt2'))) as image:
        assert image.format == 'PNG' and image.width == 2100


def test_the_axis_of_tokens_bends_where_the_batch_has_changed() -> None:
    columns = columns_of('hellaswag_acc_norm', 0.31)
    steps = columns['step'] + 1
    columns['tokens'] = TOKENS * np.where(steps < 5000, steps, 5000 + 4 * (steps - 5000))
    for name in ('tokens', 'loss'):
        columns[name][-1] = np.nan  # only an evaluation happened there
    figure = plot.picture(columns, 'out-gpt2')
    losses, *_, panel = figure.axes
    figure.draw_without_rendering()
    above = losses.child_axes[0]
    for step, tokens in ((0, 0), (4000, 4000), (5000, 5000), (6000, 9000), (12250, 5000 + 4 * 7250)):
        place = above.transData.transform((tokens * TOKENS, 0))[0]
        assert place == pytest.approx(losses.transData.transform((step, 0))[0], abs=1), 'pixels'
    curve = np.asarray(panel.lines[-1].get_xydata())
    assert curve[:, 0] / TOKENS == pytest.approx([0, 2500, 5000, 15000, 25000], abs=4)


@pytest.mark.parametrize(('last', 'highest'), [(0.26, 'GPT-3 125M'), (0.31, 'GPT-2 355M'), (0.56, 'GPT-3 1.3B')])
def test_the_published_figures_are_lines_up_to_the_next_two_above(last: float, highest: str) -> None:
    figures = {name: row['acc_norm'] for name, row in PUBLISHED['hellaswag_completion'].items()}
    panel = right_panel(columns_of('hellaswag_acc_norm', last))
    heights = {np.asarray(line.get_ydata())[0] for line in panel.lines[:-1]}
    assert heights == {0.25} | {figure for figure in figures.values() if figure <= figures[highest]}
    labels = {text.get_text(): text.xy[1] for text in panel.texts if isinstance(text, Annotation)}
    del labels[f'{last:.3f} ± 0.004']
    assert labels == {'chance': 0.25} | {name: y for name, y in figures.items() if y <= figures[highest]}


def test_names_of_lines_that_are_close_do_not_cover_each_other() -> None:
    panel = right_panel(columns_of('hellaswag_acc_norm', 0.5))
    place = {text.get_text(): text.get_verticalalignment() for text in panel.texts}
    assert (place['GPT-2 774M'], place['GPT-3 350M'], place['GPT-2 124M']) == ('top', 'bottom', 'center')


def test_the_standard_error_of_few_questions_is_seen_whole() -> None:
    columns = columns_of('hellaswag_acc_norm', 0.31)
    columns['hellaswag_acc_norm_stderr'][::10] = 0.09
    low, high = right_panel(columns).get_ylim()
    assert low < 0.25 - 0.09
    assert high > 0.31 + 0.09


def test_figures_of_cleaned_text_are_labelled() -> None:
    panel = right_panel(columns_of('hellaswag_cleaned_acc_norm', 0.4))
    assert 'cleaned text: not comparable' in panel.get_title('left')


def test_a_run_that_was_never_asked_has_no_such_panel() -> None:
    columns = columns_of('hellaswag_acc_norm', 0.31)
    columns['hellaswag_acc_norm'][:] = np.nan
    assert not any('HellaSwag' in axes.get_title('left') for axes in plot.picture(columns, 'out').axes)
