"""The verdict on a learner's lines: they do the same as the plain file's, or the same as the plain file's with a known
mistake, or else they first differ somewhere. A verdict is a measurement: no cause is named that has not given the same
numbers."""
import faulthandler
import itertools
import json
import math
import re
import sys
import traceback
from collections.abc import Iterator
from importlib.abc import InspectLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plaingpt.errors import first_line
from plaingpt.files import written_whole
from plaingpt.learning import whole
from plaingpt.learning.exercises import EXERCISES
from plaingpt.learning.mistakes import MISTAKES
from plaingpt.learning.part import HOLE, Exercise, Results
from plaingpt.learning.questions import ARGUMENTS

LONGEST = 20.0  # seconds that a learner's lines may take
SAME = 1e-9  # relative; the numbers are float64
CHANGED = 'its arguments are changed, and the caller still needs them: work on new tensors or lists'
ENDLESS = f'this has not ended after {LONGEST:.0f} seconds: does each loop end, or is a line very slow?'
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
    with whole.in_float64(), torch.enable_grad():
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
    elif isinstance(value, dict):
        yield from numbers([item for pair in value.items() for item in pair])
    elif isinstance(value, list | tuple) and all(isinstance(item, int) for item in value):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)


def kind(value: Any) -> str:
    """Return what an answer is made of, in words."""
    if value is None:
        return 'nothing (does it have a `return`?)'
    if isinstance(value, Tensor):
        return f'a tensor of shape {tuple(value.shape)}'
    if isinstance(value, int | float):
        return 'a number'
    if isinstance(value, list | tuple):
        parts = list(map(kind, value[:4]))
        if len(set(parts)) == 1:
            parts = [f'each {parts[0]}']
        inside = f': {", ".join(parts)}{", ..." if len(value) > 4 and len(parts) > 1 else ""}' if parts else ''
        return f'({type(value).__name__} of {len(value)}{inside})'
    return f'a {type(value).__name__} of {len(value)}' if isinstance(value, dict) else f'a {type(value).__name__}'


def equal(one: Any, other: Any) -> bool:
    """Return whether two answers are of the same kind, and their numbers equal to rounding."""
    return kind(one) == kind(other) and all(
        x.shape == y.shape and torch.allclose(x, y, SAME, SAME / 100, equal_nan=True)
        for x, y in zip(numbers(one), numbers(other), strict=True))


def agree(one: Results, other: Results) -> bool:
    return len(one) == len(other) and all(equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def of_answers(results: Results) -> Results:
    """Return the answers alone, without what is left of the arguments."""
    return [(what, answer) for what, answer in results if not what.startswith(ARGUMENTS)]


def tells(answers: Results, n: int) -> bool:
    """Return whether answers can tell n mistakes from others: nan equals nan, whatever made it, so two need all finite
    ones."""
    finite = torch.cat([x.isfinite().flatten() for _, answer in answers for x in numbers(answer)] or [torch.ones(1)])
    return bool(finite.all() if n > 1 else finite.any())


def known_mistake(exercise: Exercise, found: Results) -> str | None:
    """Describe the known mistake, or the two, that make the plain file give these answers; None if there are none."""
    first, end = exercise.body()
    body, answers = '\n'.join(exercise.lines()[first:end]), of_answers(found)
    for n in (1, 2) if tells(answers, 1) else ():
        for chosen in itertools.combinations(MISTAKES[exercise.part], n if tells(answers, n) else 0):
            planted: str | None = body
            for mistake in chosen:
                planted = planted and mistake.planted(planted)
            try:
                with_it = results(exercise, plain(exercise, planted)) if planted and chosen else None
            except SyntaxError:  # of two that do not go together
                continue
            if isinstance(with_it, list) and agree(of_answers(with_it), answers):
                says = [mistake.says for mistake in chosen]
                return '\nand: '.join(dict.fromkeys([*says, *([] if agree(with_it, found) else [CHANGED])]))
    return None


def lines_of(trace: TracebackType | None, path: Path, text: str) -> str:
    """Return the last line of the learner's file that a traceback goes through, with its number."""
    found = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == str(path) and frame.lineno]
    return line_of(text, found[-1]) if found else ''


def line_of(text: str, number: int) -> str:
    return f'line {number}: {text.splitlines()[number - 1].strip()}\n'


def crash(error: BaseException, path: Path, text: str) -> str:
    """Return what went wrong, and in which of the learner's lines."""
    if isinstance(error, SystemExit):
        return lines_of(error.__traceback__, path, text) + 'this ends the program'
    return f'{lines_of(error.__traceback__, path, text)}{type(error).__name__}: {first_line(error)}'


def first_difference(expected: Results, found: Results) -> str:
    """Say at which question the answers first differ, and how."""
    what, right, answer = next((what, right, answer) for (what, right), (_, answer) in zip(expected, found, strict=True)
                               if not equal(right, answer))
    if what.startswith(ARGUMENTS):
        return f'{what.removeprefix(ARGUMENTS)}: the answer is right, but {CHANGED}'
    is_few = isinstance(right, list | tuple) and all(isinstance(i, int) for i in right) and len(right) <= FEW
    if isinstance(right, int) or (is_few and type(answer) is type(right)):
        return f'{what} should be {right}, and here it is {answer}'
    if kind(right) != kind(answer):
        return f'{what}: this returns {kind(answer)}; it should be {kind(right)}'
    pairs = enumerate(zip(numbers(right), numbers(answer), strict=True))
    number, x, y = next((i, x, y) for i, (x, y) in pairs if not torch.allclose(x, y, SAME, SAME / 100, equal_nan=True))
    wrong = ~torch.isclose(x, y, SAME, SAME / 100, equal_nan=True)
    at = wrong.nonzero()[0].tolist()
    should, is_now = x[tuple(at)].item(), y[tuple(at)].item()
    digits = 6 if f'{should:.6g}' != f'{is_now:.6g}' else 12
    places = [f'in tensor {number}' if len(list(numbers(right))) > 1 else '', f'at {at}' if at else '']
    place = ' '.join(filter(None, places))
    share = f'{wrong.double().mean().item():.0%} of the numbers differ; ' if x.numel() > 1 else ''
    why = ' (inf - inf, 0 * inf and 0 / 0 are nan)' if math.isnan(is_now) else ''
    which = f'the one {place} ' if place else ''
    return f'{what}: {share}{which}should be {should:.{digits}g}, and is {is_now:.{digits}g}{why}'


def of_lines(exercise: Exercise, text: str, path: Path) -> Verdict:
    """Return the verdict on a file that a learner has written."""
    if not text.strip():
        return Verdict(False, f'{path.name} is empty')
    try:
        with torch.enable_grad():  # what the file switches off is on again afterwards
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
    again = results(exercise, module)
    if isinstance(again, BaseException) or not agree(found, again):
        return Verdict(False, 'called twice with the same arguments, this gives different answers: is it random?')
    are_right = agree(of_answers(expected), of_answers(found))
    says = None if are_right else known_mistake(exercise, found) or probed(exercise, module, expected, found)
    return Verdict(False, says or first_difference(expected, found))


def probed(exercise: Exercise, module: ModuleType, expected: Results, found: Results) -> str | None:
    """Return what a probe of the exercise finds, if the answers have the right shapes."""
    kinds = [[kind(answer) for _, answer in answers] for answers in (expected, found)]
    if kinds[0] != kinds[1] or not tells(found, 2):
        return None
    torch.manual_seed(0)
    with whole.in_float64(), torch.no_grad():
        try:
            return exercise.probe(module)
        except (Exception, SystemExit):  # of other shapes than those that were asked for
            return None


def in_the_whole(exercise: Exercise, module: ModuleType) -> Verdict:
    """Return the verdict on a part that answers as the plain one does: put it into the whole, which must agree, too."""
    says = 'the same as the plain file'
    if exercise.where.__name__ not in whole.LEARNS or exercise.part == 'GPT.generate':  # training does not write
        return Verdict(True, says)
    try:
        with torch.enable_grad():
            right, found = whole.learned(plain(exercise), 3), whole.learned(module, 3)
    except (Exception, SystemExit) as error:  # numbers may be right, and yet not be what autograd can follow
        is_cut = 'grad' in str(error)
        why = ': does a gradient flow through it? .item(), .detach() and numpy cut it off' if is_cut else ''
        return Verdict(False, f'alone it is {says}, but a GPT with it cannot learn: {type(error).__name__}: '
                              f'{first_line(error)}{why}')
    if not all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(right.losses, found.losses, strict=True)):
        return Verdict(False, f'alone it is {says}, but a GPT with it learns otherwise: three steps have losses '
                              f'{found.losses}, and should have {right.losses}')
    return Verdict(True, f'{says}, and three steps of a GPT with it end at loss {found.losses[-1]:.4f}, as before')


def of_file(exercise: Exercise, path: Path) -> Verdict:
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError:
        return Verdict(False, f'{path.name} is not text in UTF-8: save it as that')
    try:
        return of_lines(exercise, text, path)
    except Exception as error:  # such as a list that holds itself
        return Verdict(False, crash(error, path, text))


def unanswered(path: Path, late: Path, code: int) -> Verdict:
    """Return the verdict on a file whose process has given none: from what that wrote when it was late, and the code
    that it ended with."""
    trace = late.read_text(encoding='utf-8') if late.exists() else ''
    if not trace:
        return Verdict(False, f'its process ended with code {code}, and no answer')
    running = re.search(rf'File "{re.escape(str(path))}", line (\d+)', trace)
    line = line_of(path.read_text(encoding='utf-8-sig'), int(running[1])) if running else ''
    return Verdict(False, f'{line}{ENDLESS}')


def main(number: str, file: str, answer: str, late: str, longest: str) -> None:
    """Write the verdict on a file into `answer`. If the learner's lines take longer than so many seconds, write into
    `late` which of them are running, and end the process, which is theirs alone: a loop in C lets no other thread of
    Python run, but it does not hold up this one."""
    torch.set_num_threads(1)
    with open(late, 'w', encoding='utf-8') as trace:
        faulthandler.dump_traceback_later(float(longest), exit=True, file=trace)
        verdict = of_file(EXERCISES[int(number) - 1], Path(file))
        faulthandler.cancel_dump_traceback_later()
    with written_whole(answer) as out:
        out.write(json.dumps(verdict).encode())


if __name__ == '__main__':
    main(*sys.argv[1:])
