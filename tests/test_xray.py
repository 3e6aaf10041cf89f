"""The command xray.py: the table that it prints, and its page, read as a file and viewed in a real browser."""
import base64
import html
import io
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import xray
from model import GPTConfig
from plaingpt import page as parts
from plaingpt.corpus import tokenizer
from plaingpt.errors import COMMAND, UserError
from plaingpt.formats.weights import gpt_class
from plaingpt.init_from import open_model
from plaingpt.learning import page
from plaingpt.learning.look import look, predictions
from plaingpt.learning.words import Word, words
from plaingpt.run import checkpoint

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

ROOT = Path(__file__).parents[1]
HOSTILE = '</script><img src=x onerror=alert(1)>&"\''
MODERN = {'arch': 'modern', 'bias': False, 'tie_weights': False, 'shortcuts': True}
Saved = Callable[..., str]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Write a checkpoint of random weights that knows bytes, as a run leaves it; return the setting that names it."""

    def save(has_start: bool = True, **shape: Any) -> str:
        config = GPTConfig(**{'block_size': 80, 'vocab_size': 257, 'n_layer': 2, 'n_head': 3, 'n_embd': 24, **shape})
        torch.manual_seed(1)
        model = gpt_class(config)(config)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
        torch.save({'model': model.state_dict(), 'model_args': checkpoint.model_args(config), 'iter_num': 7,
                    'config': checkpoint.shape_of(config),
                    'tokenizer': {'name': 'byte', 'eot': has_start}}, tmp_path / 'ckpt.pt')
        return f'--init_from={tmp_path}/ckpt.pt'

    return save


def drawn(tmp_path: Path, *arguments: str) -> str:
    """Return the page that xray.py writes."""
    xray.main([*arguments, f'--html={tmp_path}/page.html'])
    return (tmp_path / 'page.html').read_text(encoding='utf-8')


# ------------------------------------------------------------------------------------------------
# The page, as a file


@pytest.mark.parametrize('shape', [{}, MODERN], ids=['gpt2', 'modern'])
def test_the_numbers_of_the_page_are_the_models(shape: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    where = saved(**shape)
    whole = drawn(tmp_path, where, '--text=def f', '--top=4')
    model, idx = open_model(where.partition('=')[2])[0].eval(), torch.tensor([[256, *b'def f']])
    with torch.no_grad():
        logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert f'<b>{loss.item():.2f} nats</b>' in whole and f'costs {math.log(257):.2f}' in whole
    assert f'{loss.item() / math.log(2):.2f} bits for each byte' in whole, 'a token is a byte here'
    for t, p in enumerate(logits[0].softmax(dim=-1)):
        [card] = re.findall(rf'<section class="card[^>]* id="t{t + 1}".*?</section>', whole, re.DOTALL)
        came = p[idx[0, t + 1]].item()
        assert f'cost {-math.log(came):.2f} nats</h2>' in card
        assert f'probability was {html.escape(parts.percent(came))}' in card
        best, lens = card.split('</table>')[:2]
        shares = re.findall(r'<tr><th scope="row"><code>.*?</code></th><td class="number">(.*?)</td>', best)
        likeliest = p.sort(descending=True).values[:4].tolist()
        assert [html.unescape(share) for share in shares] == list(map(parts.percent, likeliest))
        assert re.findall(r'<th scope="row">(embedding|layer \d)</th>', lens) == ['embedding', 'layer 1', 'layer 2']
        assert lens.count(html.escape(parts.percent(came))) >= 1
    nats = [float(cost) for cost in re.findall(r'cost (\d+\.\d+) nats</h2>', whole)]
    [chosen] = re.findall(r'class="card chosen" id="t(\d+)"', whole)
    assert nats[int(chosen) - 1] == max(nats), 'the page opens at the most surprising token'
    hints = re.findall(r'<a class="token" href="#t\d" data-i="\d" title="[^"]+: (\d+\.\d\d) nats; expected', whole)
    assert list(map(float, hints)) == nats


def test_each_picture_is_the_table_of_its_head(saved: Saved, tmp_path: Path) -> None:
    where = saved()
    whole = drawn(tmp_path, where, '--text=for key, value in')
    tables = look(open_model(where.partition('=')[2])[0].eval(), torch.tensor([[256, *b'for key, value in']])).tables
    found = re.findall(r'src="data:image/png;base64,(.*?)" alt="attention of layer (\d), head (\d)"', whole)
    assert len(found) == 6
    for data, n, h in found:
        opacity = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGBA'))[..., 3] / 255
        table = tables[int(n) - 1, int(h) - 1]
        assert np.abs(opacity ** 2 - table.numpy()).max() <= 1 / 255
        assert table.std() > 0.05, 'the picture is not blank'
        itself = table.diagonal()[1:].mean().item()
        assert f'<th scope="row">layer {n}, head {h}</th><td class="number">{parts.percent(itself)}</td>' in whole


def test_a_text_with_markup_stays_text(saved: Saved, tmp_path: Path) -> None:
    whole = drawn(tmp_path, saved(), f'--text={HOSTILE}')
    assert re.findall(r'<img(?! src="data:image/png;base64,)', whole) == []
    assert whole.count('<script') == whole.count('</script') == 1
    shown = re.sub(r'<.*?>', '', whole.partition('id="text">')[2].partition('</div>')[0])
    assert html.unescape(shown) == f'start of the document{HOSTILE}'


@pytest.mark.parametrize('heads', ['as they are', 'noisy'])
@pytest.mark.parametrize(('n_layer', 'n_head'), [(12, 12), (24, 16), (48, 25)])
def test_the_page_needs_nothing_else_and_is_small(n_layer: int, n_head: int, heads: str) -> None:
    """The model has the shape of a GPT-2, and the text is the longest."""
    config = GPTConfig(block_size=64, vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=4 * n_head)
    T = xray.most_tokens(n_layer * n_head)
    ids = torch.randint(50257, (1, T))
    lens, tables = look(gpt_class(config)(config).eval(), ids)
    if heads == 'noisy':
        scores = torch.randn(tables.shape) * 3
        tables = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf).softmax(dim=-1)
    seen = page.Xray('a model', 'It is one.', [Word(' language')] * T, predictions(lens, ids[0].tolist(), 5, 50257),
                     [' language'] * 50257, tables, 600)
    whole = page.render(seen)
    assert 500_000 < len(whole.encode()) < 1_000_000
    assert {144: 64, 384: 35, 1200: 9}[n_layer * n_head] == T
    code = re.sub(r'base64,[\w+/=]*', '', whole)
    assert not re.search(r'https?:|//\w|<script[^>]|<link|@import|url\(', code)
    assert set(re.findall(r'src="(.{5})', whole)) == {'data:'}
    assert '{{' not in whole and whole.count('<img') == n_layer * n_head


@pytest.mark.parametrize('n', range(1, 5))
def test_the_shortest_texts_are_shown(n: int, saved: Saved, tmp_path: Path) -> None:
    assert len(re.findall('<section class="card', drawn(tmp_path, saved(), f'--text={"a" * n}'))) == n


def test_a_tokenizer_without_a_start_predicts_all_but_the_first_token(
        saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = drawn(tmp_path, saved(has_start=False, vocab_size=256), '--text=abc')
    assert re.findall(r'<section class="card[^>]* id="(t\d)"', whole) == ['t1', 't2']
    assert 'nothing was predicted before the first one' in whole
    assert 'the first token is not predicted: ' in capsys.readouterr().out
    assert 'nothing was predicted' not in drawn(tmp_path, saved(), '--text=abc')
    assert 'the first token' not in capsys.readouterr().out


def test_a_part_of_a_character_is_shown_by_its_bytes_and_with_the_whole(saved: Saved, tmp_path: Path) -> None:
    vocabulary = tokenizer.from_state({'name': 'byte', 'eot': True})
    ids = [256, *'a€é'.encode(), 0xE2, 0x82]
    shown = list(words(ids, vocabulary))
    assert [word.text for word in shown] == [
        'start of the document', 'a', '⟨e2⟩', '⟨82⟩', '⟨ac⟩', '⟨c3⟩', '⟨a9⟩', '⟨e2⟩', '⟨82⟩']
    assert shown[0].name == 'start of the document'
    assert [word.whole for word in shown] == ['', '', '€', '€', '€', 'é', 'é', '\ufffd', '\ufffd']
    assert 'It is a part of “€”.' in drawn(tmp_path, saved(), '--text=a€')
    assert Word(' a\n\tb\r').name == '·a⏎⇥b␍' and Word('a\n').running == 'a⏎\n'


# ------------------------------------------------------------------------------------------------
# The terminal, and refused texts


def test_without_a_terminal_there_is_no_colour_and_without_a_name_no_page(
        saved: Saved, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    xray.main([saved(), '--text=a b\n\x1b[31m', '--html='])
    out = capsys.readouterr().out
    assert '\x1b' not in out and 'a b⏎\n\\x1b[31m\n' in out
    lines = re.findall(r'^ *\d+\.\d\d +\d+  (\S+) +\S+ [\d.]+ %, .* > .* > .*$', out, re.MULTILINE)
    assert lines == ['a', '·', 'b', '⏎', '\\x1b', '[', '3', '1', 'm']
    assert not list(tmp_path.glob('*.html'))
    xray.main([saved(), '--text=ab'])
    assert (tmp_path / 'xray.html').is_file() and 'open xray.html in a browser' in capsys.readouterr().out


@pytest.mark.parametrize('no_color', ['', '1'])
def test_a_terminal_shows_surprise_in_colour_unless_it_is_not_wanted(no_color: str, saved: Saved) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, 'xray.py', saved(), '--text=a b\nc\x1b[31m', '--html=']
    with subprocess.Popen(command, cwd=ROOT, stdout=slave, stderr=slave,
                          env={**os.environ, 'NO_COLOR': no_color}) as process:
        os.close(slave)
        out = b''
        try:
            while more := os.read(master, 1000):
                out += more
        except OSError:  # the end, on Linux
            pass
    assert process.returncode == 0, out
    codes = set(re.findall(rb'\x1b\[[\d;]*m', out))
    assert (codes == set()) if no_color else (b'\x1b[0m' in codes and len(codes) > 1)
    assert b'\x1b[31m' not in out and b'\\x1b' in out, 'no text steers the terminal'
    assert not re.search(rb'\x1b\[38;[\d;]+m[^\x1b]*\n', out), 'no background reaches over the end of a line'


@pytest.mark.parametrize(('shape', 'arguments', 'message'), [
    ({}, [f'--text={"a" * 65}'], '--text has 65 tokens, and at most 64 can be shown: give a shorter one'),
    ({'block_size': 16}, [f'--text={"a" * 16}'],
     '--text has 16 tokens, and at most 15 can be shown, as the model reads 16 at a time: give a shorter one'),
    ({'n_layer': 16, 'n_head': 16, 'n_embd': 32}, [f'--text={"a" * 48}'],
     '--text has 48 tokens, and at most 45 can be shown of 256 heads: give a shorter one'),
    ({'has_start': False, 'vocab_size': 256}, ['--text=a'], '--text has 1 tokens: give a longer one, of which '),
    ({}, ['--text='], '--text has 0 tokens: give a longer one, of which '),
    ({}, ['--top=0'], '--top=0: must be 1 or more'),
    ({}, ['--html=.'], '--html=. is a folder: give the name of a file'),
])
def test_what_cannot_be_shown_is_refused(
        shape: dict[str, Any], arguments: list[str], message: str, saved: Saved) -> None:
    with pytest.raises(UserError) as error:
        xray.main([saved(**shape), *arguments])
    assert str(error.value).startswith(message) and error.value.code == COMMAND


def test_the_longest_texts_that_fit_are_shown(saved: Saved, tmp_path: Path) -> None:
    assert len(re.findall('<section', drawn(tmp_path, saved(), f'--text={"a" * 64}'))) == 64
    assert len(re.findall('<section', drawn(tmp_path, saved(block_size=16), f'--text={"a" * 15}'))) == 15


# ------------------------------------------------------------------------------------------------
# The page, in a browser


@pytest.fixture
def opened(browser: 'Chrome', saved: Saved, tmp_path: Path) -> 'Chrome':
    """Open the page of a text that would run a script if it could; return the browser."""
    drawn(tmp_path, saved(), f'--text=ab c{HOSTILE}')
    browser.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': False})
    browser.get((tmp_path / 'page.html').as_uri())
    return browser


def attribute(element: 'WebElement', name: str) -> str:
    return element.get_attribute(name) or ''


def heading(browser: 'Chrome') -> str:
    """Return the headings of the cards that are visible."""
    cards = browser.find_elements('css selector', '.card h2')
    return '\n'.join(card.text for card in cards if card.is_displayed())


def test_a_click_and_a_key_change_what_is_shown(opened: 'Chrome') -> None:
    assert opened.find_element('tag name', 'body').get_attribute('class') == 'live', 'the script has run to its end'
    links = opened.find_elements('css selector', '#text a')
    opened.execute_script('arguments[0].scrollIntoView()', links[1])
    links[1].click()
    assert re.fullmatch(r'“b” cost \d+\.\d\d nats', heading(opened))
    where = opened.find_element('id', 'where').text
    assert ', at “a” (underlined), where the model predicted what came as “b” (framed). Most went to “' in where
    keys, body = '\ue012\ue014', opened.find_element('tag name', 'body')  # left and right
    body.send_keys(keys[1])
    assert heading(opened).startswith('“·” cost')
    body.send_keys(keys[0])
    body.send_keys(keys[0])
    assert heading(opened).startswith('“a” cost')
    body.send_keys(keys[0])
    assert heading(opened).startswith('“a” cost'), 'the first token has none before it'
    assert opened.execute_script('return document.querySelectorAll("#text .chosen, #text .before").length') == 2
    assert 'start' in attribute(opened.find_element('css selector', '#text .before'), 'class').split()

    # Enter follows a link that has the focus, as a click does
    links[4].send_keys('\ue007')
    assert heading(opened).startswith('“&lt;” cost') or heading(opened).startswith('“<” cost')
    assert opened.get_log('browser') == []


def test_the_shares_that_a_script_reads_from_a_picture_are_those_of_the_head(
        opened: 'Chrome', tmp_path: Path) -> None:
    ids = [256, *f'ab c{HOSTILE}'.encode()]
    tables = look(open_model(f'{tmp_path}/ckpt.pt')[0].eval(), torch.tensor([ids])).tables
    opened.find_elements('css selector', '#text a')[3].click()
    for n, h in ((0, 0), (1, 2)):
        button = opened.find_element('css selector', f'[data-name="Layer {n + 1}, head {h + 1}"]')
        opened.execute_script('arguments[0].click()', button)
        assert button.get_attribute('aria-pressed') == 'true'
        titles = [attribute(token, 'title') for token in opened.find_elements('css selector', '#looks .token')]
        shares = [float(title.rpartition(': ')[2].strip('<% ')) / 100 for title in titles[:4]]
        assert shares == pytest.approx(tables[n, h, 3, :4].tolist(), abs=0.01)
        assert all(title.endswith(': not seen yet') for title in titles[4:])
    image = opened.find_element('css selector', '[data-name="Layer 1, head 1"]')
    opened.execute_script("""const box = arguments[0].getBoundingClientRect()
        const corner = {clientX: box.left + 1, clientY: box.bottom - 1}
        arguments[0].dispatchEvent(new MouseEvent('mousemove', corner))""", image)
    assert re.fullmatch(r'Layer 1, head 1: “\'” \(token \d+\) gives [<\d.]+ % to “start of the document” \(token 1\)',
                        opened.find_element('id', 'pointed').text)


def test_a_text_cannot_run_a_script(opened: 'Chrome') -> None:
    assert opened.execute_script('return document.images.length') == 6
    assert opened.find_element('id', 'looks').text.endswith(HOSTILE)
    assert opened.get_log('browser') == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_page_is_light_or_dark_as_the_reader_prefers_and_legible(scheme: str, opened: 'Chrome') -> None:
    features = {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
    opened.execute_cdp_cmd('Emulation.setEmulatedMedia', features)
    colours = """const style = getComputedStyle(document.body), soft = document.querySelector('.soft')
        const hot = document.createElement('i'); hot.style.background = 'var(--hot)'; document.body.append(hot)
        const look = document.createElement('i'); look.style.background = 'var(--look)'; document.body.append(look)
        return [style.color, getComputedStyle(soft).color, style.backgroundColor, getComputedStyle(hot).backgroundColor,
                getComputedStyle(look).backgroundColor]"""
    ink, soft, paper, hot, look_ = map(luminance, opened.execute_script(colours))
    assert (paper > 0.8) if scheme == 'light' else (paper < 0.05)
    for one, other in ((ink, paper), (soft, paper), (ink, hot), (ink, look_)):
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5, 'WCAG 2.2, 1.4.3'


def luminance(colour: str) -> float:
    """Return the relative luminance of 'rgb(r, g, b)' (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r'\d+', colour)[:3]]
    r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_without_scripts_all_can_be_read(opened: 'Chrome', tmp_path: Path) -> None:
    opened.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': True})
    try:
        opened.get((tmp_path / 'page.html').as_uri())
        assert opened.find_element('id', 'text').text.endswith(HOSTILE)
        assert heading(opened).count('cost') == 1, 'the most surprising token is open'
        opened.get(f'{(tmp_path / "page.html").as_uri()}#t2')
        assert heading(opened).startswith('“b” cost') and heading(opened).count('cost') == 1
        rows = opened.find_elements('css selector', '.numbers tbody tr')
        assert rows[1].is_displayed() and rows[1].text.startswith('2 b ')
        assert all(image.is_displayed() for image in opened.find_elements('tag name', 'img'))
        assert not opened.find_element('id', 'looks').is_displayed(), 'only a script fills it'
    finally:
        opened.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': False})
