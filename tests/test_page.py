"""The building blocks of pages: text stays text, a picture is its table, and nothing else can run."""
import base64
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from plaingpt import page
from plaingpt.page import Html

HOSTILE = '</script><img src=x onerror="alert(1)">\'&amp;\x1b[31m\u202e{{title}}'


def test_whatever_is_not_markup_is_escaped() -> None:
    escaped = ('&lt;/script&gt;&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&#x27;&amp;amp;\\x1b[31m\\u202e{{title}}')
    assert page.html(HOSTILE) == escaped
    assert page.fill('<p title="{{a}}">{{b}}', {'a': HOSTILE, 'b': Html('<b>')}) == f'<p title="{escaped}"><b>'
    assert page.join([HOSTILE, Html('<b>'), 3]) == f'{escaped}<b>3'
    drawn = page.table(HOSTILE, [HOSTILE, 'n'], [(HOSTILE, HOSTILE)]) + page.picture([b'a'], HOSTILE, HOSTILE)
    assert drawn.count(escaped) == 6 and '<img src=x' not in drawn
    assert page.document(HOSTILE, '{{x}}', {'x': HOSTILE}).count(escaped) == 2


def test_a_table_has_headings_and_its_numbers_are_aligned() -> None:
    drawn = page.table('of two', ['name', 'loss', 'share', 'word'], [
        ('a', '1.50', '<0.01 %', 'x'), ('b', '-12', '93 %', '12'), ('c', '', '1.2e-05', '')])
    assert drawn.startswith('<table><caption>of two</caption><thead><tr><th scope="col">name</th>'
                            '<th scope="col" class="number">loss</th><th scope="col" class="number">share</th>'
                            '<th scope="col">word</th></tr></thead>')
    assert '<tr><th scope="row">b</th><td class="number">-12</td><td class="number">93 %</td><td>12</td></tr>' in drawn
    assert page.table('none', ['a', 'b'], []).count('<th') == 3  # and <thead>
    with pytest.raises(ValueError, match='zip'):
        page.table('uneven', ['a', 'b'], [('x',)])


@pytest.mark.parametrize(('share', 'text'), [
    (1, '100 %'), (0.931, '93 %'), (0.0996, '10 %'), (0.0987, '9.9 %'), (0.01, '1.0 %'), (0.0099, '0.99 %'),
    (5e-5, '0.01 %'), (4e-5, '<0.01 %'), (0, '0 %')])
def test_a_share_is_written_with_two_digits(share: float, text: str) -> None:
    assert page.percent(share) == text


def test_any_reader_of_png_gets_the_table_back() -> None:
    table = np.random.default_rng(0).integers(0, 256, (5, 9), dtype=np.uint8)
    rows = [bytes(row) for row in table]
    image = Image.open(io.BytesIO(page.png(rows, (1, 2, 3))))
    assert image.size == (9, 5)
    colours = np.asarray(image.convert('RGBA'))
    assert (colours[..., :3] == (1, 2, 3)).all() and np.array_equal(colours[..., 3], table), 'the bytes are opacities'
    assert base64.b64encode(page.png(rows, page.BLUE)).decode() in page.picture(rows, 'a', 'b')


def test_only_the_script_of_the_template_may_run() -> None:
    whole = page.document('t', '<p>{{x}}</p><script>\nlet a = 1\n</script>', {'x': Html('<script>other()</script>')})
    digest = base64.b64encode(hashlib.sha256(b'\nlet a = 1\n').digest()).decode()
    [policy] = re.findall(r'content="(default-src.*?)"', whole)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "script-src 'none'" in page.document('t', 'no script', {})
    assert whole.startswith('<!doctype html>\n<html lang="en">') and '<title>t</title>' in whole
