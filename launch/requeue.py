"""
Decide whether a Slurm job that has lost a process starts again: one that ended with code 8, or with 128 + n if signal n
has killed a process. It does if the run has come further than at its last such end, and three times even if it has not.
Exit code 0 means yes.

    python launch/requeue.py CODE [the arguments of train.py]
"""
import io
import os
import sys
from contextlib import redirect_stdout
from json import dumps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from plaingpt import console, errors, files, schema

TRIES = 3


def is_loss(code: int) -> bool:
    """Return whether the code is that of a lost process, and not of one that the user ended."""
    return code == errors.PEER_LOST or (code > 128 and code not in (errors.INTERRUPTED, errors.BROKEN_PIPE))


def count_tries(folder: Path, job: str) -> tuple[int, int]:
    """Return the step at which the run in this folder has ended, and how often this job has now ended without progress,
    which is kept in requeued.json."""
    path = folder / 'requeued.json'
    status, before = files.read_json(folder / 'status.json'), files.read_json(path)
    step, tries = status['step'] if schema.fits(status, {'step': schema.COUNT}) else -1, 1
    if schema.fits(before, {'job': {job}, 'step': int, 'tries': schema.COUNT}):
        tries = 0 if step > before['step'] else before['tries'] + 1
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_whole(path) as file:
        file.write(dumps({'job': job, 'step': step, 'tries': tries}).encode() + b'\n')
    return step, tries


def main(args: list[str]) -> None:
    if not (args and args[0].isdecimal()):
        console.say(f'{__doc__}'.strip())
        sys.exit(errors.COMMAND)
    code = int(args[0])
    if not is_loss(code):
        sys.exit(1)
    import configurator
    import train  # only now, as it loads PyTorch, for which most ends need not wait

    folders = set()
    with redirect_stdout(io.StringIO()):  # train.py has said all of it
        for clock in (0, 1_000_000):  # two moments
            configurator.configure(train, args[1:], clock)
            folders.add(train.out_dir)
    if len(folders) > 1:
        console.say('the job ends: an out_dir with the time in its name is a new one each time, and cannot be resumed')
        sys.exit(1)
    step, tries = count_tries(Path(*folders), os.environ['SLURM_JOB_ID'])
    console.say(f'exit code {code} at step {step}: the job {"starts again" if tries <= TRIES else "ends"}, after '
                f'{tries} {"end" if tries == 1 else "ends"} without progress')
    sys.exit(tries > TRIES)


if __name__ == '__main__':
    errors.run(main)
