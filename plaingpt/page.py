"""Pages to look at: one file of HTML each, which needs no network, no library and, to be read, no script."""
import base64
import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from plaingpt.console import printable

BLUE = (37, 99, 235)
PLACE = re.compile(r'\{\{(\w+)\}\}')
NUMBER = re.compile(r'(&lt;)?[-+]?\d[\d,.]*(e[-+]?\d+)?( ?%)?|')  # or none


class Html(str):
    """Markup. Whatever else comes into a page is text, and escaped."""


def html(value: object) -> Html:
    """Return a value as markup: a text stays the text that it is, whatever it holds."""
    return value if isinstance(value, Html) else Html(escape(printable(str(value))))


def fill(template: str, values: Mapping[str, object]) -> Html:
    """Return the template with a value in each {{place}}."""
    return Html(PLACE.sub(lambda place: html(values[place[1]]), template))


def join(parts: Iterable[object]) -> Html:
    return Html(''.join(map(html, parts)))


def document(title: str, template: str, values: Mapping[str, object]) -> str:
    """Return a page whose body is the template, filled. No script runs in it but the template's own, and nothing is
    loaded from anywhere: the page itself forbids both."""
    scripts = re.findall(r'<script>(.*?)</script>', template, re.DOTALL)
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = ' '.join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    frame = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
    return fill(frame, {'title': title, 'scripts': Html(allowed), 'body': fill(template, values)})


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """Return a table. The first cell of each row names it; numbers stand at the right of their column."""
    values = [[html(value) for value in row] for row in rows]
    columns = zip(*values, strict=True) if values else ([] for _ in head)
    kinds = [' class="number"' if any(column) and all(map(NUMBER.fullmatch, column)) else '' for column in columns]
    titles = join(Html(f'<th scope="col"{kind}>{html(title)}</th>') for kind, title in zip(kinds, head, strict=True))
    lines = []
    for first, *others in values:
        cells = join(Html(f'<td{kind}>{value}</td>') for kind, value in zip(kinds[1:], others, strict=True))
        lines.append(Html(f'<tr><th scope="row"{kinds[0]}>{first}</th>{cells}</tr>'))
    above = Html(f'<caption>{html(caption)}</caption>') if caption else ''
    return Html(f'<table>{above}<thead><tr>{titles}</tr></thead>'
                f'<tbody>{join(lines)}</tbody></table>')


def percent(share: float) -> str:
    """Return 0.9312 as 93 %, 0.0123 as 1.2 %, and 0.00123 as 0.12 %."""
    digits = 0 if share >= 0.0995 else 1 if share >= 0.00995 else 2
    return f'{100 * share:.{digits}f} %' if share >= 5e-5 else '<0.01 %' if share else '0 %'


def bar(share: float) -> Html:
    """Return a bar beside a number, which says the same."""
    return Html(f'<i class="bar" style="--share:{share:.3f}"></i>')


def picture(rows: Sequence[bytes], alt: str, hint: str, colour: tuple[int, int, int] = BLUE) -> Html:
    """Return an image of a table of bytes, a pixel each: one colour, the more opaque the larger the byte."""
    data = base64.b64encode(png(rows, colour)).decode()
    return Html(f'<img src="data:image/png;base64,{data}" alt="{html(alt)}" title="{html(hint)}">')


def png(rows: Sequence[bytes], colour: tuple[int, int, int]) -> bytes:
    """Return the table as a PNG: each pixel has the colour, and the byte is how opaque it is. (A palette of 256 such
    colours takes more room than the pixels of a small table.)"""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', len(rows[0]), len(rows), 8, 6, 0, 0, 0)  # 8 bits of red, green, blue and opacity
    pixels = b''.join(b'\0' + b''.join(bytes((*colour, value)) for value in row) for row in rows)  # rows unfiltered
    return b''.join((
        b'\x89PNG\r\n\x1a\n',
        chunk(b'IHDR', header),
        chunk(b'IDAT', zlib.compress(pixels, 9)),
        chunk(b'IEND', b''),
    ))
