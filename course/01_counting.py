"""
1. Counting. Before anything learns: how well does a table of counts guess the next token?

Whatever guesses gives each token a probability. Its score is -ln of the one that it gave to the token that really came:
0 if it was sure of it, ln V if it took all V tokens for equally likely. The mean of that is the loss, in nats per
token; e to the power -loss is the probability that the truth was given, as a geometric mean. All rungs are scored on
the same 400 windows, which no table and no model has read.

    python data/stdlib/prepare.py        the text, once
    python course/01_counting.py         two seconds

Question: why is A_LITTLE added to each count, and what happens to the loss without it?
"""
import numpy as np
import numpy.typing as npt
import rung

from plaingpt import console
from plaingpt.corpus.batches import read_batch
from plaingpt.corpus.order import Order, fixed_starts

T, WINDOWS, READ = 64, 400, 600 * 16  # tokens in a window; windows that score; those that 600 steps of training read
A_LITTLE = 0.1
Ids = npt.NDArray[np.int64]


def scores() -> dict[str, float]:
    """Return the loss of each way to guess, in nats per token."""
    known, unseen, V = rung.corpus()
    x, y = (z.numpy() for z in read_batch(unseen, fixed_starts(len(unseen), T, WINDOWS), T, WINDOWS, V))  # (400, T)
    ids = known.read(0, len(known)).astype(np.int64)
    read = np.stack([known.read(start, T + 1) for start in Order(len(known), T, 1337).starts(0, READ)]).astype(np.int64)

    tokens = np.bincount(ids, minlength=V) + A_LITTLE  # (V,)
    pairs = count(ids[:-1], ids[1:], V) + A_LITTLE  # (V, V), row: a token, column: the one after it
    few = count(read[:, :-1], read[:, 1:], V) + A_LITTLE
    return {'a guess': float(np.log(V)),
            'counting tokens': float(-np.log(tokens / tokens.sum())[y].mean()),
            'counting pairs': float(-np.log(pairs / pairs.sum(axis=1, keepdims=True))[x, y].mean()),
            'counting pairs in what 600 steps read': float(-np.log(few / few.sum(axis=1, keepdims=True))[x, y].mean())}


def count(first: Ids, second: Ids, V: int) -> Ids:
    """Return how often each token comes after each other one, (V, V)."""
    return np.bincount((first * V + second).ravel(), minlength=V * V).reshape(V, V)


def show() -> None:
    for name, loss in scores().items():
        console.say(f'{name:40} {loss:.3f}')


if __name__ == '__main__':
    rung.main(__file__)
