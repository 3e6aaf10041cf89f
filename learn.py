"""
Exercises: write a part of the plain files yourself, and learn what your lines do.

    python learn.py                 lists the exercises, and which you have done
    python learn.py start 11        writes exercises/11_attend.py, with a hole where the lines were
    python learn.py check 11        says what your lines do, and what they should
    python learn.py hint 11         helps a little
    python learn.py show 11         shows the lines of the plain file
    python learn.py bug 11          writes these with a mistake in them: find it, mend it, and type this again
"""
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import configurator
from plaingpt import console, errors
from plaingpt.errors import UserError
from plaingpt.files import read_json, written_whole
from plaingpt.learning import verdict, whole
from plaingpt.learning.exercises import EXERCISES
from plaingpt.learning.mistakes import MISTAKES
from plaingpt.learning.verdict import Verdict
from plaingpt.paths import STAGES

FOLDER = Path('exercises')
PASSED = FOLDER / '.passed.json'  # the files that have passed: the fingerprint of each as it was then
STEPS = 100  # that a GPT with a bug learns


def typed(command: str, number: int) -> str:
    return f'{errors.command("learn.py")} {command} {number}'


def path_of(number: int, prefix: str = '') -> Path:
    return FOLDER / f'{prefix}{number:02}_{EXERCISES[number - 1].part.replace(".", "_").lower()}.py'


def number_of(words: list[str]) -> int:
    """Return the number of the exercise that the command line names by its number or its part."""
    names = {exercise.part.lower(): number for number, exercise in enumerate(EXERCISES, 1)}
    given = words[0].lower() if words else ''
    number = names.get(given, int(given) if given.isdecimal() and len(given) < 9 else 0)
    if len(words) != 1 or not 1 <= number <= len(EXERCISES):
        raise UserError(f'give the number of one exercise, 1 to {len(EXERCISES)}\n'
                        f'this lists them: {errors.command("learn.py")}')
    return number


def header(number: int, text: str, task: str, commands: str) -> str:
    """Return a file to work on."""
    exercise = EXERCISES[number - 1]
    lines = [f'{number}. {exercise.part}, of {exercise.file.name}', '', *textwrap.wrap(task, 112), '',
             *(f'    {typed(command, number)}' for command in commands.split())]
    return '\n'.join(['"""', *lines, '"""', text])


def write(path: Path, text: str) -> None:
    if path.exists():
        raise UserError(f'{path} exists, and is yours: delete it to start over')
    FOLDER.mkdir(exist_ok=True)
    with written_whole(path) as file:
        file.write(text.encode())
    console.say(f'{path} is written: edit it')


def judged(number: int, path: Path) -> Verdict:
    """Return the verdict on a file, whose lines run in a process of their own: they may do anything."""
    if not path.is_file():
        raise UserError(f'{path} is missing: {typed("start", number)}')
    with tempfile.TemporaryDirectory() as folder:
        answer, late = Path(folder, 'verdict.json'), Path(folder, 'late.txt')
        places = filter(None, (str(STAGES), os.environ.get('PYTHONPATH')))
        # -P: a model.py of another project in the current folder is not imported
        command = [sys.executable, '-P', '-m', 'plaingpt.learning.verdict', str(number), str(path), str(answer),
                   str(late), str(verdict.LONGEST)]
        code = subprocess.run(command, env=os.environ | {'PYTHONPATH': os.pathsep.join(places)}).returncode
        found = read_json(answer)
        return Verdict(*found) if found else verdict.unanswered(path, late, code)


def show_list() -> None:
    passed = passed_files()
    for number, exercise in enumerate(EXERCISES, 1):
        path = path_of(number)
        state = 'not begun' if not path.exists() else 'begun'
        if path.exists() and passed.get(path.name) == fingerprint(path):
            state = 'done'
        console.say(f'{number:3}  {exercise.part:26} {exercise.file.name:26} {state}')
    console.say(f'start one: {typed("start", 1)}')


def passed_files() -> dict[str, str]:
    """Return the fingerprints of the files that have passed, by their names."""
    found = read_json(PASSED)
    return found if isinstance(found, dict) else {}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(number: int) -> None:
    exercise = EXERCISES[number - 1]
    write(path_of(number), header(number, exercise.text(exercise.hole()), exercise.task, 'check hint show'))
    console.say(f'then: {typed("check", number)}')


def check(number: int) -> None:
    """Say what the learner's lines do, and remember a file that passes."""
    path = path_of(number)
    passed, says = judged(number, path)
    if not passed:
        raise UserError(f'NOT YET: {says}', errors.CHECK_FAILED)
    console.say(f'PASS: {says}')
    with written_whole(PASSED) as file:
        file.write(json.dumps(passed_files() | {path.name: fingerprint(path)}).encode())
    if number < len(EXERCISES):
        console.say(f'try next: {typed("start", number + 1)}')


def hint(number: int) -> None:
    console.say(textwrap.fill(EXERCISES[number - 1].hint, 112))


def show(number: int) -> None:
    exercise = EXERCISES[number - 1]
    _, function = exercise.nodes()
    console.say(textwrap.dedent('\n'.join(exercise.lines()[function.lineno - 1:function.end_lineno])))


def bug(number: int) -> None:
    """Plant a mistake; the next time, say whether it is still there."""
    exercise, path = EXERCISES[number - 1], path_of(number, 'bug_')
    if path.exists():
        passed, says = judged(number, path)
        if not passed:
            why = f': {says}' if says.startswith('line ') else ''  # one that cannot run; no cause is given away
            raise UserError(f'NOT YET: this is still not what the plain file computes{why}\n'
                            f'its lines: {typed("show", number)}', errors.CHECK_FAILED)
        return console.say('FOUND: the same as the plain file again')
    first, end = exercise.body()
    right = '\n'.join(exercise.lines()[first:end])
    planted = random.choice(MISTAKES[exercise.part]).planted(right)
    assert planted is not None, 'the tests hold that each has a place'
    task = 'There is one mistake in these lines. Find it, mend it, and type this again:'
    write(path, header(number, exercise.text(planted), task, 'bug'))
    if exercise.where.__name__ in whole.LEARNS:
        losses = [whole.learned(verdict.plain(exercise, body), STEPS).val_loss for body in (planted, right)]
        console.say(f'a small GPT with it ends at val loss {losses[0]:.3f} after {STEPS} steps; without it at '
                    f'{losses[1]:.3f}. Would you have noticed?')
    console.say(f'when you have found it: {typed("bug", number)}')


COMMANDS = {'start': start, 'check': check, 'hint': hint, 'show': show, 'bug': bug}


def main(args: list[str]) -> None:
    if '--help' in args or '-h' in args:
        configurator.configure(sys.modules[__name__], ['--help'])
    command, *words = args or ['list']
    if command == 'list' and not words:
        return show_list()
    if command not in COMMANDS:
        raise UserError(f'{" ".join(args)}: the commands are list, start N, check N, hint N, show N and bug N')
    COMMANDS[command](number_of(words))


if __name__ == '__main__':
    errors.run(main)
