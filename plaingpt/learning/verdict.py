"""What a learner's lines do: the same as the plain file's, or as the plain file's with a known mistake in them, or else
where they first differ. A verdict is a measurement: no cause is named that has not given the same numbers."""
import itertools
import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from importlib.abc import InspectLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plaingpt.files import written_whole
from plaingpt.learning import whole
from plaingpt.learning.exercises import EXERCISES
from plaingpt.learning.mistakes import MISTAKES
from plaingpt.learning.part import HOLE, Exercise, Results
from plaingpt.learning.questions import ARGUMENTS

LONGEST = 20.0  # seconds that a learner's lines may take
SAME = 1e-7  # relative; the numbers are float64
FEW = 12  # whole numbers that a message shows in full


class Verdict(NamedTuple):
    passed: bool
    says: str


class Text(InspectLoader):
    """Makes a module of a text, as if it were the file at `path`."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path = text, path

    def get_source(self, fullname: str) -> str:
        return self.text

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.text, str(self.path))


def module_of(text: str, name: str, path: Path) -> ModuleType:
    """Return a new module of this text; the one that is imported under this name stays as it is."""
    loader = Text(text, path)
    spec = spec_from_loader(name, loader, origin=str(path))
    assert spec is not None
    module = module_from_spec(spec)
    module.__file__ = str(path)
    loader.exec_module(module)
    return module


def plain(exercise: Exercise, body: str | None = None) -> ModuleType:
    """Return the plain file as a module of its own, with another body of the part if one is given."""
    text = '\n'.join(exercise.lines()) if body is None else exercise.with_body(body)
    return module_of(text, exercise.where.__name__, exercise.file)


def results(exercise: Exercise, module: ModuleType) -> Results | BaseException:
    """Return what a module that has the part answers, or what it raised."""
    torch.manual_seed(0)
    with whole.in_float64():
        try:
            return exercise.run(module)
        except (Exception, SystemExit) as error:
            return error


def numbers(value: Any) -> Iterator[Tensor]:
    """Yield all numbers in an answer, as tensors of float64; whole numbers side by side are one."""
    if isinstance(value, Tensor):
        yield value.detach().double()
    elif isinstance(value, int | float):
        yield torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)


def equal(one: Any, other: Any) -> bool:
    """Return whether two answers are equal to rounding, and of the same shapes."""
    a, b = list(numbers(one)), list(numbers(other))
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, SAME, SAME / 100, equal_nan=True)
                                    for x, y in zip(a, b, strict=True))


def agree(one: Results, other: Results) -> bool:
    return len(one) == len(other) and all(equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def known_mistake(exercise: Exercise, found: Results) -> str | None:
    """Return what one says of the known mistake, or the two, with which the plain file gives these answers."""
    first, end = exercise.body()
    body = '\n'.join(exercise.lines()[first:end])
    for n in (1, 2):
        for chosen in itertools.combinations(MISTAKES[exercise.part], n):
            planted: str | None = body
            for mistake in chosen:
                planted = planted and mistake.planted(planted)
            try:
                answers = results(exercise, plain(exercise, planted)) if planted else None
            except SyntaxError:  # of two that do not go together
                continue
            if isinstance(answers, list) and agree(answers, found):
                return '\nand: '.join(dict.fromkeys(mistake.says for mistake in chosen))
    return None


def lines_of(trace: TracebackType | None, path: Path, text: str) -> str:
    """Return the last line of the learner's file that a traceback goes through, with its number."""
    numbers = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(path) and frame.lineno]
    return f'line {numbers[-1]}: {text.splitlines()[numbers[-1] - 1].strip()}\n' if numbers else ''


def crash(error: BaseException, path: Path, text: str) -> str:
    """Return what went wrong, and in which of the learner's lines."""
    if isinstance(error, SystemExit):
        return lines_of(error.__traceback__, path, text) + 'this ends the program'
    message = (str(error).splitlines() or [''])[0]
    return f'{lines_of(error.__traceback__, path, text)}{type(error).__name__}: {message}'


def shape(value: Any) -> str:
    """Return what kind of thing an answer is, in words."""
    if value is None:
        return 'nothing (is there a `return`?)'
    if isinstance(value, Tensor):
        return f'a tensor of shape {tuple(value.shape)}'
    return f'a {type(value).__name__} of {len(value)}' if isinstance(value, list | tuple) else f'{type(value).__name__}'


def first_difference(expected: Results, found: Results) -> str | None:
    """Say at which question the answers first differ, and how."""
    for (what, right), (_, answer) in zip(expected, found, strict=True):
        if equal(right, answer):
            continue
        if what.startswith(ARGUMENTS):
            return (f'{what.removeprefix(ARGUMENTS)}: the answer is right, but its arguments are changed, and the '
                    'caller still needs them: work on new tensors or lists')
        a, b = list(numbers(right)), list(numbers(answer))
        if is_short(right) and isinstance(answer, list | tuple):
            return f'{what} is {list(right)}; here it is {list(answer)}'
        if [x.shape for x in a] != [y.shape for y in b]:
            return f'{what}: this returns {shape(answer)}; it should be {shape(right)}'
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            wrong = ~torch.isclose(x, y, SAME, SAME / 100, equal_nan=True)
            if wrong.any():
                at = wrong.nonzero()[0].tolist()
                place = (f', in tensor {number}' if len(a) > 1 else '') + (f', at {at}' if at else '')
                return (f'{what}: {wrong.double().mean().item():.0%} of the numbers differ; the first{place}, is '
                        f'{y[tuple(at)].item():.6g} and should be {x[tuple(at)].item():.6g}')
    return None


def is_short(answer: Any) -> bool:
    """Return whether an answer is a few whole numbers, which a message shows in full."""
    return isinstance(answer, list | tuple) and all(isinstance(i, int) for i in answer) and len(answer) <= FEW


def of_lines(exercise: Exercise, text: str, path: Path) -> Verdict:
    """Return the verdict on a file that a learner has written."""
    if not text.strip():
        return Verdict(False, f'{path.name} is empty')
    try:
        written = module_of(text, 'exercise', path)
    except SyntaxError as error:
        return Verdict(False, f'line {error.lineno}: {(error.text or "").strip()}\n{error.msg}')
    except (Exception, SystemExit) as error:
        return Verdict(False, crash(error, path, text))
    if not hasattr(written, exercise.name):
        return Verdict(False, f'{path.name} has no {exercise.name}')
    module = plain(exercise)
    setattr(module, exercise.name, getattr(written, exercise.name))
    expected, found = results(exercise, plain(exercise)), results(exercise, module)
    assert isinstance(expected, list), expected
    if isinstance(found, NotImplementedError) and HOLE in text:
        return Verdict(False, 'nothing is written there yet')
    if isinstance(found, BaseException):
        return Verdict(False, crash(found, path, text))
    if agree(expected, found):
        return in_the_whole(exercise, module)
    answers = [(what, answer) for what, answer in found if not what.startswith(ARGUMENTS)]
    are_right = agree([pair for pair in expected if not pair[0].startswith(ARGUMENTS)], answers)
    says = known_mistake(exercise, found)
    if says is None and not are_right:
        says = probed(exercise, module, expected, found)
    return Verdict(False, says or first_difference(expected, found) or 'the answers differ')


def probed(exercise: Exercise, module: ModuleType, expected: Results, found: Results) -> str | None:
    """Return what a probe of the exercise finds, if the answers have the right shapes."""
    sizes = [[x.shape for _, answer in answers for x in numbers(answer)] for answers in (expected, found)]
    torch.manual_seed(0)
    return exercise.probe(module) if sizes[0] == sizes[1] else None


def in_the_whole(exercise: Exercise, module: ModuleType) -> Verdict:
    """Return the verdict on a part that answers as the plain one does: put it into the whole, which must agree, too."""
    says = 'the same as the plain file'
    if exercise.where.__name__ not in whole.LEARNS:
        return Verdict(True, says)
    right, found = whole.learned(plain(exercise), 3), whole.learned(module, 3)
    if not all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(right.losses, found.losses, strict=True)):
        return Verdict(False, f'alone it is {says}, but a GPT with it learns otherwise: three steps have losses '
                              f'{found.losses}, and should have {right.losses}')
    return Verdict(True, f'{says}, and three steps of a GPT with it end at loss {found.losses[-1]:.4f}, as before')


def on_time(exercise: Exercise, text: str, path: Path, give: Any) -> Verdict:
    """Return the verdict; if it takes too long, give another one, and end the process."""
    main = threading.main_thread().ident

    def end() -> None:
        frame: FrameType | None = sys._current_frames().get(main or 0)
        while frame and frame.f_code.co_filename != str(path):
            frame = frame.f_back
        where = f'line {frame.f_lineno}: {text.splitlines()[frame.f_lineno - 1].strip()}\n' if frame else ''
        give(Verdict(False, f'{where}it has not ended after {LONGEST:.0f} seconds: does its loop come to an end?'))
        os._exit(0)

    timer = threading.Timer(LONGEST, end)
    timer.daemon = True
    timer.start()
    verdict = of_lines(exercise, text, path)
    timer.cancel()
    return verdict


def main(number: str, file: str, answer: str) -> None:
    """Write the verdict on a file to another one. The process is this learner's alone."""
    path = Path(file)

    def give(verdict: Verdict) -> None:
        with written_whole(answer) as out:
            out.write(json.dumps(verdict).encode())

    torch.set_num_threads(1)
    give(on_time(EXERCISES[int(number) - 1], path.read_text(encoding='utf-8'), path, give))


if __name__ == '__main__':
    main(*sys.argv[1:])
