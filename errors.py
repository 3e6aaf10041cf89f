"""What a user sees when something is wrong: one message that says what to do next, and an exit code that scripts can
read."""
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

DONE = 0
CHECK_FAILED = 1  # for example, overfit_single_batch did not overfit
COMMAND = 2  # a wrong command or setting
DATA = 3  # token files or texts that are missing, damaged or do not fit
CHECKPOINT = 4  # a checkpoint that is missing, damaged or does not fit
NOT_FINITE = 5  # the loss is NaN or infinite
OUT_OF_MEMORY = 6
DISK_FULL = 7
PEER_LOST = 8  # another process of this run died, or hangs: run the same command again
STOPPED = 75  # stopped after saving: run the same command again
INTERRUPTED = 130  # Ctrl-C, as shells count it
BROKEN_PIPE = 141  # nobody reads the output any more, as shells count it


class UserError(ValueError):
    """A mistake that the message lets its reader repair: what is wrong, where, what to type next, in at most three
    lines."""

    def __init__(self, message: str, code: int = COMMAND) -> None:
        super().__init__(message)
        self.code = code


def python() -> str:
    """What to type for the Python that runs this: the one of this folder's virtual environment, or else `python`."""
    here, found = Path(sys.executable), shutil.which('python')
    is_on_path = found is not None and Path(found).parent == here.parent
    return 'python' if is_on_path or not here.is_relative_to(Path.cwd()) else str(here.relative_to(Path.cwd()))


def is_out_of_memory(error: BaseException) -> bool:
    """On cards PyTorch has a class for it; in main memory it is a RuntimeError."""
    words = ('out of memory', "can't allocate memory", 'not enough memory')
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def code_of(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    if isinstance(error, UserError):
        return error.code
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return {KeyboardInterrupt: INTERRUPTED, BrokenPipeError: BROKEN_PIPE}.get(type(error), 1)


def run(main: Callable[[list[str]], None]) -> None:
    """Call main with the command line's arguments. A UserError ends the process with its message and code, no
    traceback."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stdout.flush()
        print(error, file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError as error:  # `python train.py | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor complains of what is left in the buffer
        sys.exit(code_of(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f'out of memory: {str(error).splitlines()[0] if str(error) else "main memory"}', file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)
    except KeyboardInterrupt as error:
        print('interrupted', file=sys.stderr)
        sys.exit(code_of(error))
