"""
Look inside: what a model makes of a text, token by token, on the terminal and as a page.

    python xray.py --out_dir=out-stdlib --text='def read('    a run, and a text to read
    python xray.py --init_from=gpt2 --text='To be or not'     GPT-2's weights

The page is one file, which needs no network: loss, the likeliest tokens, what fewer layers would say, and where each
head looked.
"""
import math
import sys
from pathlib import Path

import configurator  # before PyTorch, so that it is imported faster

# isort: split

import torch

from model import GPT
from plaingpt import console, errors, files
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import UserError
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from plaingpt.learning import page
from plaingpt.learning.look import look, predictions
from plaingpt.learning.page import Xray, expected
from plaingpt.learning.words import name_of, text_of, words
from plaingpt.run.checkpoint import State

# ------------------------------------------------------------------------------------------------
# Settings
init_from: str = ''  # a checkpoint file, a run's folder, a Hugging Face folder, 'gpt2*'; '' is out_dir
out_dir: str = 'out'  # of the run
text: str = 'import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n'
top: int = 5  # how many of the likeliest tokens are shown
html: str = 'xray.html'  # the page, a file; '' writes none
# ------------------------------------------------------------------------------------------------

MOST_TOKENS = 64  # more would be too much to take in, and of GPT-2's 144 heads a page of more than a megabyte
SHADES = (None, 223, 216, 209, 202)  # of a terminal's 256 colours, from pale to strong
NATS_OF_SHADE = 1.5


def most_tokens(n_heads: int) -> int:
    """Return for how many tokens the pictures of all heads fit into a page. A picture has the square of that number of
    cells, and all else about it takes the room of some 450 more."""
    return min(MOST_TOKENS, int(math.sqrt(max(16, (MOST_TOKENS**2 + 450) * 144 / max(1, n_heads) - 450))))


def read(vocabulary: Tokenizer, block_size: int, n_heads: int, is_given: bool) -> list[int]:
    """Return the ids of the text, after the one that begins a document, if there is one. The default text is
    shortened if need be."""
    ids = vocabulary.encode_prompt(text)
    start = [] if vocabulary.bos is None or ids[:1] == [vocabulary.bos] else [vocabulary.bos]
    fit = most_tokens(n_heads)
    most = min(fit, block_size - len(start))
    if not is_given:
        ids = ids[:most]
    if len(ids) > most:
        why = (f', as the model reads {block_size} at a time' if most < fit else
               f' of {n_heads} heads' if most < MOST_TOKENS else '')
        raise UserError(f'--text has {len(ids)} tokens, and at most {most} can be shown{why}: give a shorter one')
    if len(start + ids) < 2:
        raise UserError(f'--text has {len(ids)} tokens: give a longer one, of which something can be predicted')
    return start + ids


def see(model: GPT, state: State, vocabulary: Tokenizer, ids: list[int]) -> Xray:
    """Return what the model makes of the ids."""
    lens, tables = look(model.eval(), torch.tensor([ids]))
    c = model.config
    steps = f', after {state["iter_num"]:,} steps' if 'iter_num' in state else ''
    size = sum(p.numel() for p in model.parameters())
    about = f'The model: {c.n_layer} layers of {c.n_head} heads, {console.short(size)} parameters{steps}.'
    sizes = vocabulary.token_sizes()
    return Xray(
        model=console.shown(init_from or out_dir),
        about=about,
        tokens=list(words(ids, vocabulary)),
        predictions=predictions(lens, ids, top, vocabulary.n_vocab),
        pieces=[text_of(piece) for piece in vocabulary.pieces],
        tables=tables,
        size=sum(sizes[i] for i in ids[1:]),
    )


def report(seen: Xray) -> None:
    """Print the text, the darker the more surprising, and below it what was expected."""
    costs = [0.0, *(prediction.nats for prediction in seen.predictions)]
    console.say_shaded((word.running, SHADES[min(len(SHADES) - 1, int(nats / NATS_OF_SHADE))])
                       for word, nats in zip(seen.tokens, costs, strict=True) if not word.is_start)
    head = f'{"nats":>6} {"choice":>6}  {"token":<14} {"the likeliest":<52}'
    console.say(f'\n{head} after the embedding, and after each layer')
    for word, prediction in zip(seen.tokens[1:], seen.predictions, strict=True):
        layers = ' > '.join(name_of(seen.pieces[i]) for i, _, _ in prediction.lens)
        line = f'{prediction.nats:6.2f} {prediction.rank:6}  {word.name:<14} {expected(seen, prediction):<52}'
        console.say(f'{line} {layers}')
    mean, guess = sum(costs) / len(seen.predictions), math.log(len(seen.pieces))
    console.say(f'{mean:6.2f} nats a token; a blind guess costs {guess:.2f}')
    if not seen.tokens[0].is_start:
        console.say('the first token is not predicted: this tokenizer has none that begins a document')


def main(args: list[str]) -> None:
    script = sys.modules[__name__]
    _, given = configurator.configure(script, args)
    configurator.check_range(script, 'top', 1, below=configurator.MANY)
    if html and Path(html).is_dir():
        raise UserError(f'--html={html} is a folder: give the name of a file')
    model, state = open_model(init_from or out_dir)
    vocabulary = learned_tokenizer(state, model.config.vocab_size, corpus_of(state))
    c = model.config
    seen = see(model, state, vocabulary, read(vocabulary, c.block_size, c.n_layer * c.n_head, 'text' in given))
    report(seen)
    if html:
        with files.written_whole(Path(html)) as file:
            file.write(page.render(seen).encode())
        console.say(f'\nopen {html} in a browser')


if __name__ == '__main__':
    errors.run(main)
