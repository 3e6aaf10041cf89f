"""learn.py as a learner uses it: real files, each judged in a process of its own."""
import re
from pathlib import Path

import pytest

import learn
from plaingpt.errors import CHECK_FAILED, COMMAND
from plaingpt.learning import verdict
from plaingpt.learning.exercises import EXERCISES
from plaingpt.learning.part import HOLE
from plaingpt.learning.verdict import of_lines
from tests.comparing import refused
from tests.learning.attempts import ATTEMPTS

BY_PART = {exercise.part: exercise for exercise in EXERCISES}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(('part', 'text', 'told'), ATTEMPTS, ids=[
    f'{number} {part}' for number, (part, _, _) in enumerate(ATTEMPTS)])
def test_attempts_in_other_words_are_answered_by_what_they_do(part: str, text: str, told: str) -> None:
    exercise = BY_PART[part]
    head = '; '.join(line for line in exercise.imports() if 'import' in line)
    passed, says = of_lines(exercise, f'import torch.nn as nn; {head}{text}', Path('exercise.py'))
    assert passed == (not told), says
    assert told in says


def fill(path: Path, body: str) -> None:
    text = path.read_text(encoding='utf-8')
    assert text.count(HOLE) == 1
    path.write_text(text.replace(HOLE, body), encoding='utf-8')


def test_an_exercise_is_started_tried_and_done(capfd: pytest.CaptureFixture[str]) -> None:
    path = Path('exercises/08_gelu.py')
    learn.main(['start', '8'])
    said = refused(learn.main, ['start', 'gelu'], code=COMMAND)
    assert said == f'{path} exists, and is yours: delete it to start over'
    assert refused(learn.main, ['check', '8'], code=CHECK_FAILED) == 'NOT YET: nothing is written there yet'
    fill(path, "print('seen by the learner')\n    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))")
    assert 'this is the exact GELU' in refused(learn.main, ['check', '8'], code=CHECK_FAILED)
    assert 'seen by the learner' in capfd.readouterr().out
    learn.main(['list'])
    assert 'gelu                       model_trivialised.py       begun' in capfd.readouterr().out

    path.write_text(path.read_text(encoding='utf-8').replace(
        'torch.erf(x / math.sqrt(2))', 'torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))'), encoding='utf-8')
    learn.main(['check', '8'])
    said = capfd.readouterr().out
    assert 'PASS: the same as the plain file, and three steps of a GPT with it end at loss 5.1' in said
    assert 'learn.py start 9' in said
    learn.main([])
    assert 'gelu                       model_trivialised.py       done' in capfd.readouterr().out
    path.write_text(path.read_text(encoding='utf-8') + '\n# another thought', encoding='utf-8')
    learn.main(['list'])
    assert 'done' not in capfd.readouterr().out, 'the file has not been checked since'


def test_hints_and_the_lines_of_the_plain_file_are_shown(capfd: pytest.CaptureFixture[str]) -> None:
    for exercise in EXERCISES:
        learn.main(['hint', exercise.part])
        assert capfd.readouterr().out.split() == exercise.hint.split()
        learn.main(['show', exercise.part])
        shown = capfd.readouterr().out
        assert shown.startswith('def ') and f'def {exercise.part.rpartition(".")[2]}(' in shown


def test_a_planted_bug_is_found_only_when_it_is_fixed(capfd: pytest.CaptureFixture[str]) -> None:
    learn.main(['bug', '15'])
    path = Path('exercises/bug_15_clip.py')
    said = capfd.readouterr().out
    assert 'ends at val loss' in said and 'without it at' in said
    assert 'this is still not what the plain file computes' in refused(learn.main, ['bug', '15'], code=CHECK_FAILED)
    path.write_text(BY_PART['clip'].text(), encoding='utf-8')
    learn.main(['bug', '15'])
    assert 'FOUND' in capfd.readouterr().out


@pytest.mark.parametrize('words', [
    ['strat', '3'], ['start'], ['start', '0'], ['start', '23'], ['start', '-1'], ['check', 'GPT'], ['hint', '1', '2'],
    ['list', '3'], ['start', '1e1'], ['show', '²']])
def test_a_mistyped_command_is_refused_with_the_commands_that_exist(words: list[str]) -> None:
    assert 'exercise' in (said := refused(learn.main, words, code=COMMAND)) or 'the commands are' in said
    assert not Path('exercises').exists()


def test_a_file_that_is_missing_is_asked_for() -> None:
    assert 'learn.py start 3' in refused(learn.main, ['check', '3'], code=COMMAND)


@pytest.mark.parametrize(('body', 'told'), [
    ('import os; os._exit(3)', 'its process ended with code 3, and no answer'),
    ('raise SystemExit', 'line N: raise SystemExit\nthis ends the program'),
    ('return x +', 'line N: return x +\ninvalid syntax'),
    ('return undefined', "line N: return undefined\nNameError: name 'undefined' is not defined"),
])
def test_the_learner_gets_an_answer_whatever_happens_to_the_process(body: str, told: str) -> None:
    learn.main(['start', 'gelu'])
    fill(Path('exercises/08_gelu.py'), body)
    said = refused(learn.main, ['check', 'gelu'], code=CHECK_FAILED)
    assert re.sub(r'line \d+', 'line N', said) == f'NOT YET: {told}'


@pytest.mark.parametrize(('body', 'lines'), [
    ('i = 0\n    while i < 1:\n        pass', r'while i < 1:|pass'),
    ('return sum(range(10 ** 13))', r'return sum\(range\(10 \*\* 13\)\)'),  # lets no other thread run
])
def test_a_loop_that_never_ends_is_ended_and_shown(body: str, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, 'LONGEST', 1.0)
    learn.main(['start', 'merge'])
    fill(Path('exercises/01_merge.py'), body)
    said = refused(learn.main, ['check', 'merge'], code=CHECK_FAILED)
    assert re.fullmatch(rf'NOT YET: line \d+: ({lines})\n{re.escape(verdict.ENDLESS)}', said), said


def test_files_of_other_projects_and_other_encodings_do_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    Path('model.py').write_text('raise SystemExit("the model of another project")', encoding='utf-8')
    path = Path('exercises/08_gelu.py')
    learn.main(['start', 'gelu'])
    Path('exercises/.passed.json').write_text('[1]', encoding='utf-8')
    path.write_bytes(b'\xef\xbb\xbf' + BY_PART['gelu'].text().encode())  # as Notepad saves it
    learn.main(['check', 'gelu'])
    assert 'PASS' in capfd.readouterr().out
    path.write_bytes('# à'.encode('latin-1'))
    assert 'is not text in UTF-8' in refused(learn.main, ['check', 'gelu'], code=CHECK_FAILED)
