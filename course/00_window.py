"""
0. A window. What does a model read, and what must it say? A window is a piece of T tokens of the text, x; the answers,
y, are the same piece moved by one token. So a window of 64 tokens asks 64 questions at once: after the first token,
what is the second? After the first two, what is the third? Nothing is labelled by hand: the text is its own answer.

    python data/stdlib/prepare.py        the text, once
    python course/00_window.py           a second

Training takes windows in a shuffled order; where each starts is no secret, and may wait (plaingpt/corpus/order.py).

Question: the last line shows the last token of x. How many tokens may a model have read when it says what comes next?
"""
import rung

from plaingpt import console
from plaingpt.corpus import tokenizer
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.folder import data_folder, read_meta
from plaingpt.corpus.order import Order

T = 16  # tokens, of the 64 that a window of the default run has, so that it fits on a screen


def show() -> None:
    known, _, V = rung.corpus()
    x, y = read_batch(known, Order(len(known), 64, seed=1337).starts(0, 1), T, 1, V)  # (1, T) each
    vocabulary = tokenizer.from_state(read_meta(data_folder('stdlib'))['tokenizer'])
    console.say('  x    y   after the tokens up to this one ... comes this one')
    for token, answer in zip(x[0].tolist(), y[0].tolist(), strict=True):
        console.say(f'{token:4} {answer:4}   {vocabulary.decode([token])!r:29} {vocabulary.decode([answer])!r}')


if __name__ == '__main__':
    rung.main(__file__)
