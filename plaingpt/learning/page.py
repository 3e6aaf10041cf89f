"""The page of xray.py: what `look` has seen, drawn. page.html beside this has its words, its style and its script."""
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from plaingpt import page
from plaingpt.learning.look import Prediction
from plaingpt.learning.words import Word, name_of
from plaingpt.page import Html, bar, percent

TOKEN = '<a class="token" href="#t{{i}}" data-i="{{i}}" title="{{hint}}" style="--heat:{{heat}}">{{text}}</a>'
UNPREDICTED = '<span class="token{{kind}}" data-i="{{i}}" title="{{hint}}">{{text}}</span>'
LOOK = '<span class="token{{kind}}" data-i="{{i}}" data-name="{{name}}">{{text}}</span>'
HEAD = '<button type="button" data-name="{{name}}" aria-pressed="{{is_chosen}}">{{picture}}</button>'
CARD = """<section class="card{{chosen}}" id="t{{i}}" data-i="{{i}}">
<h2>“<code>{{name}}</code>” cost {{nats}} nats</h2>
<p>Its probability was {{probability}}, and it was the model's choice number {{rank}}.{{whole}} This was predicted at
the token before, “<code>{{before}}</code>”<span class="with"> (underlined)</span>, from that one and all before it.</p>
<div class="pair">{{best}}{{lens}}</div></section>
"""


class Xray(NamedTuple):
    """The contents of the page, for a text of T tokens."""

    model: str
    about: str  # the model, in a sentence
    tokens: list[Word]
    predictions: list[Prediction]  # of all tokens but the first
    pieces: Sequence[str]  # the text of each id
    tables: Tensor  # (n_layer, H, T, T)
    size: int  # bytes of the text that was predicted


def layer(number: int) -> str:
    return f'layer {number}' if number else 'embedding'


def code(text: str) -> Html:
    return page.fill('<code>{{name}}</code>', {'name': name_of(text)})


def likeliest(seen: Xray, prediction: Prediction) -> Html:
    """Return the likeliest tokens, none of which is cut at the end of a line."""
    one = '<span class="best">{{name}} {{p}}</span> '
    return page.join(page.fill(one, {'name': code(seen.pieces[i]), 'p': percent(p)}) for i, p in prediction.best)


def expected(seen: Xray, prediction: Prediction) -> str:
    return ', '.join(f'{name_of(seen.pieces[i])} {percent(p)}' for i, p in prediction.best)


def text(seen: Xray, hottest: float) -> Iterator[Html]:
    """Yield the tokens, each of which leads to what was expected there."""
    for i, word in enumerate(seen.tokens):
        values = {'i': i, 'text': word.running, 'kind': ' start' if word.is_start else '', 'hint': 'not predicted'}
        if i:
            prediction = seen.predictions[i - 1]
            values |= {'heat': f'{min(1, prediction.nats / hottest):.3f}',
                       'hint': f'{word.name}: {prediction.nats:.2f} nats; expected {expected(seen, prediction)}'}
        yield page.fill(TOKEN if i else UNPREDICTED, values)


def looks(seen: Xray) -> Iterator[Html]:
    """Yield the tokens again, for the script to colour."""
    for i, word in enumerate(seen.tokens):
        kind = ' start' if word.is_start else ''
        yield page.fill(LOOK, {'i': i, 'text': word.running, 'name': word.name, 'kind': kind})


def cards(seen: Xray, chosen: int) -> Iterator[Html]:
    """Yield, for each token, what was expected there, and after how many layers."""
    for i, prediction in enumerate(seen.predictions, 1):
        before, word = seen.tokens[i - 1:i + 1]
        best = [(code(seen.pieces[token]), percent(p), bar(p)) for token, p in prediction.best]
        lens = [(layer(n), code(seen.pieces[token]), percent(p), percent(came), bar(came))
                for n, (token, p, came) in enumerate(prediction.lens)]
        yield page.fill(CARD, {
            'i': i, 'name': word.name, 'before': before.name, 'chosen': ' chosen' if i == chosen else '',
            'nats': f'{prediction.nats:.2f}', 'probability': percent(math.exp(-prediction.nats)),
            'rank': prediction.rank,
            'whole': f' It is a part of “{word.whole}”.' if word.whole else '',
            'best': page.table('The likeliest', ('token', 'probability', ''), best),
            'lens': page.table('Had it stopped after fewer layers',
                               ('after', 'first choice', 'probability', f'of “{word.name}”', ''), lens)})


def means(table: Tensor) -> tuple[str, str, str]:
    """Return what share a head (T, T) gives to a token itself, to the one before it, and to the first, on average over
    the tokens but the first."""
    itself, before, first = (part.mean().item() for part in (table.diagonal()[1:], table.diagonal(-1), table[1:, 0]))
    return percent(itself), percent(before), percent(first)


def pictures(seen: Xray, chosen: tuple[int, int]) -> Iterator[Html]:
    """Yield a picture of each head, layer by layer: the byte of a pixel is the root of its share, of 255."""
    yield Html('<b></b>')
    yield from (page.fill('<b class="top">head {{n}}</b>', {'n': h + 1}) for h in range(seen.tables.size(1)))
    for n, heads in enumerate(seen.tables):
        yield page.fill('<b>layer {{n}}</b>', {'n': n + 1})
        for h, table in enumerate(heads):
            name = f'layer {n + 1}, head {h + 1}'
            itself, before, first = means(table)
            hint = f'on average {itself} to the token itself, {before} to the one before it, {first} to the first'
            rows = [bytes(row) for row in (table.sqrt() * 255).round().int().tolist()]
            yield page.fill(HEAD, {'name': name.capitalize(), 'is_chosen': str((n, h) == chosen).lower(),
                                   'picture': page.picture(rows, f'attention of {name}', hint)})


def sharpest(tables: Tensor, row: int) -> tuple[int, int]:
    """Return the layer and head whose largest share at a row went to another token than itself and the first."""
    between = tables[:, :, row, 1:row]
    heads = between.amax(dim=-1) if between.numel() else tables[:, :, row, 0]  # (n_layer, H)
    n, h = divmod(int(heads.argmax()), tables.size(1))
    return n, h


def numbers(seen: Xray) -> Html:
    """Return all that was predicted, in a row for each token."""
    layers = [layer(n) for n in range(len(seen.predictions[0].lens))]
    rows = [(f'{i}', code(word.text), f'{prediction.nats:.2f}', percent(math.exp(-prediction.nats)), prediction.rank,
             likeliest(seen, prediction), *(code(seen.pieces[token]) for token, _, _ in prediction.lens))
            for i, (word, prediction) in enumerate(zip(seen.tokens[1:], seen.predictions, strict=True), 1)]
    return page.table('What each token cost, what was expected, and the first choice after fewer layers',
                      ('', 'token', 'nats', 'probability', 'choice', 'the likeliest', *layers), rows)


def shares(seen: Xray) -> Html:
    """Return what kind of head each is."""
    rows = [(f'layer {n + 1}, head {h + 1}', *means(table))
            for n, heads in enumerate(seen.tables) for h, table in enumerate(heads)]
    return page.table('What each head gives away, on average over the tokens but the first',
                      ('', 'to the token itself', 'to the one before it', 'to the first'), rows)


def render(seen: Xray) -> str:
    """Return the page, which opens at the token that was the most surprising."""
    nats = [prediction.nats for prediction in seen.predictions]
    chosen = nats.index(max(nats)) + 1
    hottest = max(4.0, math.ceil(max(nats)))
    start = ('' if seen.tokens[0].is_start else 'This tokenizer has no token that begins a document, so nothing was '
             'predicted before the first one.')
    values = {
        'model': seen.model, 'about': seen.about, 'start': start,
        'heads': seen.tables.size(1), 'tokens': len(seen.tokens), 'count': len(nats),
        'hottest': f'{hottest:.0f}', 'mean': f'{sum(nats) / len(nats):.2f}',
        'bits': f'{sum(nats) / math.log(2) / seen.size:.2f}',
        'vocabulary': f'{len(seen.pieces):,}', 'guess': f'{math.log(len(seen.pieces)):.2f}',
        'text': page.join(text(seen, hottest)), 'looks': page.join(looks(seen)),
        'cards': page.join(cards(seen, chosen)), 'numbers': numbers(seen), 'shares': shares(seen),
        'pictures': page.join(pictures(seen, sharpest(seen.tables, chosen - 1))),
    }
    template = Path(__file__).with_name('page.html').read_text(encoding='utf-8')
    return page.document(f'x-ray of {seen.model}', template, values)
