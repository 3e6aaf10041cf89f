"""
Write docs/course.md, and the table at the end of docs/ladder.md: from the texts and the sources of the rungs, which are
compared with those that they take the place of, and from what was measured.

    python course/pages.py
"""
import ast
import difflib
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ladder
import measured
import rung

from plaingpt.errors import run
from plaingpt.files import written_whole

Pieces = dict[tuple[str, str], list[str]]  # the lines of a function, by its class ('' outside of any) and its name
COURSE, LADDER = rung.ROOT / 'docs/course.md', rung.ROOT / 'docs/ladder.md'
RECORD = '## The record\n'  # the heading in LADDER below which this file writes
OF_THE_COURSE = {'PARTS', 'BEFORE', 'PROCESSES', 'DTYPE', 'COMPARED', 'ROUNDING', 'IN_MODERN'}  # not parts of any model
TIMED = {'model': 'forward and backward', 'training': 'a training step', 'text': 'writing 64 tokens'}
OPENING = """# From the plain files to the fast ones

Each rung changes one thing, in a file of at most 60 lines that holds nothing else. Its parts take the place of the
plain files', or of those that an earlier rung has put there; then it is proven that the numbers are the same, and
measured what that gains. The last part of each kind is the one that model.py or train.py has, so where this page ends
the main files begin. Files 0 to 3 of `course/`, which are other functions, belong to [the ladder](ladder.md).

```sh
python course/06_flash.py               # prove and time one rung
python course/all.py                    # all of them
python course/all.py --measure=True     # and write this page anew
```

Diffs leave out docstrings and imports. Proofs are in float64, whose rounding is far smaller than any mistake; a
difference is relative to the largest number of its kind, and weights are those after ten steps of training. Times are
seconds that a process computes, without its waiting for others, in float32, at the shape of the default run: 4 layers
of 4 heads, 128 channels, 16 windows of 64 tokens. Rungs 8 and 9 are side paths, for a GPU; rung 10 continues from rung
7, as train.py does on a CPU.

"""

GAINS = """How many times as fast as the rung that it changes, and as the plain files; 1.0 is a result, too. The last
column is empty until a GPU has been measured.
"""
LEARNED = """*What it learns,* by the val loss at equal tokens, 600 steps of 1,024, in a model of one layer with three
seeds: {here} nats, mean and standard deviation; {old}: {before}. From the same seed, the loss changes by {change}."""
ABLATED = """benchmarks/ablate.py, with four layers, makes such changes in [another order](modern.md); there, what is
below 0.016 is noise."""


def course() -> str:
    """Return the whole page."""
    found = measured.read('course')
    names = [name for name in rung.NAMES if name in found]
    sections = [section(name, found[name]) for name in names]
    return OPENING + '\n'.join(sections) + '\n' + summary(names, found)


def section(name: str, found: dict[str, Any]) -> str:
    """Return what the page says of a rung."""
    title = rung.title(name)
    paragraphs = rung.text_of(name).removeprefix(title + '.').split('\n\n')
    text = '\n\n'.join(textwrap.fill(' '.join(paragraph.split()), 120) for paragraph in paragraphs)
    result = proven(name, found) if rung.is_same_function(name) else learned(name, found)
    return f'## {title}\n\n{text}\n\n```diff {name}.py\n{changes(name)}\n```\n\n{result}\n'


def proven(name: str, found: dict[str, Any]) -> str:
    """Return how far a rung is from those that it is to equal."""
    old = rung.label(name, 'before')
    apart = {against: ', '.join(f'{kind} {most:.0e}' if most else f'{kind} 0' for kind, most in kinds.items())
             for against, kinds in found['apart'].items()}
    proof = f'from the plain files: {apart["plain"]}'
    if old != rung.label(name, 'plain'):
        proof = f'from {old}: {apart["before"]}; {proof}'
    return f'*How far apart,* {proof}.'


def learned(name: str, found: dict[str, Any]) -> str:
    """Return what a rung that is another function learns, here and in docs/modern.md."""
    differences = [new - old for new, old in zip(found['losses'], found['before'], strict=True)]
    here = LEARNED.format(here=rung.spread(found['losses']), old=rung.label(name, 'before'),
                          before=rung.spread(found['before']), change=rung.spread(differences, '+'))
    gains = []
    table = (rung.ROOT / 'docs/modern.md').read_text(encoding='utf-8')
    for row in rung.find(name).IN_MODERN:
        added, taken = (re.search(rf'^\| {words} {re.escape(row)} \| [^|]* \| (\S+) ', table, re.MULTILINE)
                        for words in (r'\+', 'modern, less'))
        assert added and taken, row
        gains.append(f'{row}: {added[1]} nats if added, {taken[1]} if taken away')
    gained = '; '.join(gains)
    return textwrap.fill(f'{here} {ABLATED} {gained[:1].upper()}{gained[1:]}.', 120)


def summary(names: list[str], found: dict[str, Any]) -> str:
    """Return the table of all gains."""
    lines = ['## What each gains\n',
             GAINS,
             '| rung | timed | it changes | times as fast as that | as the plain files | on a GPU |',
             '|---|---|---|---|---|---|']
    for name in filter(rung.is_same_function, names):
        seconds = found[name]['seconds']
        processes = ', by each of two processes' if rung.processes_of([name]) == 2 else ''
        timed = TIMED[rung.kind_of(rung.find(name))] + processes
        lines.append(f'| {rung.title(name)} | {timed} | {rung.label(name, "before")} | '
                     f'{seconds["before"] / seconds["this"]:.2f} | {seconds["plain"] / seconds["this"]:.2f} | |')
    where = '\n'.join(f'- {place}' for place in measured.places(found))
    return '\n'.join(lines) + f'\n\nMeasured on\n\n{where}\n'


def changes(name: str) -> str:
    """Return the lines in which the parts of a rung differ from those whose place they take."""
    earlier = rung.way_to(rung.before(name))
    old: Pieces = {}
    for path in (*(rung.ROOT / f'{file}_trivialised.py' for file in ('model', 'train')), *map(path_of, earlier)):
        old |= pieces(path)
    blocks = []
    for (inside, part), lines in pieces(path_of(name)).items():
        whole = [line for (other, _), body in old.items() if other == part for line in [*body, '']][:-1]  # a class
        diff = difflib.unified_diff(old.get((inside, part), whole), lines, n=3, lineterm='')
        changed = [line.rstrip() for line in diff if line[:3] not in ('---', '+++', '@@ ')]
        blocks.append('\n'.join([f'@@ class {inside} @@', *changed] if inside else changed))
    return '\n\n'.join(blocks)


def path_of(name: str) -> Path:
    return rung.FOLDER / f'{name}.py'


def pieces(path: Path) -> Pieces:
    """Return the functions and methods of a file, and what it calls by another name, without docstrings."""
    source = path.read_text(encoding='utf-8')
    lines = source.splitlines()
    return {key: [line.rstrip() for line in without_docstring(node, lines)] for key, node in nodes(ast.parse(source))}


def nodes(tree: ast.Module) -> Iterator[tuple[tuple[str, str], ast.stmt]]:
    """Yield each piece of a file, and how it is called."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield ('', node.name), node
        elif isinstance(node, ast.ClassDef):
            yield from (((node.name, part.name), part) for part in node.body if isinstance(part, ast.FunctionDef))
        elif isinstance(node, ast.Assign) and not OF_THE_COURSE & set(re.findall(r'\w+', ast.unparse(node.targets[0]))):
            yield ('', ast.unparse(node.targets[0])), node


def without_docstring(node: ast.stmt, lines: list[str]) -> list[str]:
    """Return the lines of a function, or of another statement."""
    first, last = node.lineno - 1, node.end_lineno
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        body = node.body[0]
        return [*lines[first:body.lineno - 1], *lines[body.end_lineno:last]]
    return lines[first:last]


def record() -> str:
    """Return the table of docs/ladder.md."""
    found = measured.read('ladder')
    names = [name for patterns in ladder.NUMBERS.values() for name in patterns if name in found]
    rows = [f'| {name} | {found[name]["value"]:.3f} | {found[name]["seconds"]:.0f} |' for name in names]
    where = '\n'.join(f'- {place}' for place in measured.places(found))
    opening = ('Depth is in bits per byte, all else in nats. Seconds are those of the whole run, which may give\n'
               'several numbers, and include waiting for other programs.\n')
    table = '\n'.join([RECORD, opening, '| run | number | seconds |', '|---|---|---|', *rows])
    return f'{table}\n\nMeasured on\n\n{where}\n'


def main(args: list[str]) -> None:
    climbed = LADDER.read_text(encoding='utf-8').partition(RECORD)[0] + record()
    for path, text in ((COURSE, course()), (LADDER, climbed)):
        with written_whole(path) as file:
            file.write(text.encode())


if __name__ == '__main__':
    run(main)
