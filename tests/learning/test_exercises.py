"""Every exercise can be done, and every known mistake is recognised by the numbers that it gives."""
import itertools
import re
from pathlib import Path

import pytest

from plaingpt.learning import whole
from plaingpt.learning.exercises import EXERCISES
from plaingpt.learning.mistakes import MISTAKES
from plaingpt.learning.part import HOLE, Exercise, Results
from plaingpt.learning.verdict import agree, of_lines, plain, results

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize('exercise', EXERCISES, ids=lambda exercise: exercise.part)


def body_of(exercise: Exercise) -> str:
    first, end = exercise.body()
    return '\n'.join(exercise.lines()[first:end])


def answers(exercise: Exercise, body: str) -> Results:
    found = results(exercise, plain(exercise, body))
    assert isinstance(found, list), found
    return found


def test_there_are_22_exercises_each_with_known_mistakes_and_a_hint() -> None:
    assert len(EXERCISES) == 22 and len({exercise.name for exercise in EXERCISES}) >= 20
    assert {exercise.part for exercise in EXERCISES} == MISTAKES.keys()
    assert all(len(mistakes) >= 4 for mistakes in MISTAKES.values())
    for exercise in EXERCISES:
        lines = [line.strip() for line in body_of(exercise).splitlines() if len(line.strip()) > 20]
        assert exercise.hint and not any(line in exercise.hint for line in lines), 'a hint is not the solution'


def test_they_are_in_the_order_of_the_ladder() -> None:
    ladder = (ROOT / 'docs/ladder.md').read_text(encoding='utf-8')
    named = [pair for text in ladder.split('*Do*')[1:] for pair in re.findall(r'(\d+)\s`([\w.]+)`', text)]
    assert named == [(str(number), exercise.part) for number, exercise in enumerate(EXERCISES, 1)]


@each
def test_a_hole_fails_and_the_lines_of_the_plain_file_pass(exercise: Exercise) -> None:
    path = exercise.file.with_name('exercise.py')
    assert of_lines(exercise, exercise.text(exercise.hole()), path) == (False, 'nothing is written there yet')
    passed, says = of_lines(exercise, exercise.text(), path)
    assert passed and says.startswith('the same as the plain file')
    assert HOLE not in exercise.text() and body_of(exercise) not in exercise.text(exercise.hole())


@each
def test_each_known_mistake_is_named_as_itself_and_no_two_are_the_same(exercise: Exercise) -> None:
    right, path = answers(exercise, body_of(exercise)), exercise.file.with_name('exercise.py')
    seen: list[tuple[str, Results]] = []
    for mistake in MISTAKES[exercise.part]:
        body = mistake.planted(body_of(exercise))
        assert body is not None, f'{mistake.says}: it has no place in the plain file'
        found = answers(exercise, body)
        assert not agree(found, right), f'{mistake.says}: its numbers are right'
        seen.append((mistake.says, found))
        assert of_lines(exercise, exercise.text(body), path) == (False, mistake.says)
    for (says, one), (also, other) in itertools.combinations(seen, 2):
        assert says == also or not agree(one, other), f'{says} cannot be told from {also}'


@each
def test_a_gpt_with_any_known_mistake_in_it_can_be_trained(exercise: Exercise) -> None:
    """As `learn.py bug` does, though a part may leave a parameter out."""
    for mistake in MISTAKES[exercise.part] if exercise.where.__name__ in whole.LEARNS else ():
        learned = whole.learned(plain(exercise, mistake.planted(body_of(exercise))), 1)
        assert isinstance(learned.val_loss, float), mistake.says
