"""What a user sees when something is wrong: one message that says what to do next, and an exit code that scripts can
read."""
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

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
BROKEN_PIPE = 141  # the output has no reader any more, as shells count it

REQUIREMENTS = Path(__file__).resolve().parents[1] / 'requirements.txt'  # where this is a checkout
PACKAGES = ('PIL', 'datasets', 'fsspec', 'gguf', 'huggingface_hub', 'matplotlib', 'pyarrow', 's3fs', 'safetensors',
            'tiktoken', 'tokenizers', 'wandb')  # in there, and imported only where they are used


class UserError(ValueError):
    """A mistake that the message lets its reader repair: what is wrong, where, what to type next, in at most three
    lines."""

    def __init__(self, message: str, code: int = COMMAND) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """Return what another project's error says, as part of a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def python() -> str:
    """What to type for the Python that runs this: the one of this folder's virtual environment, or else `python`."""
    here, found = Path(sys.executable), shutil.which('python')
    is_on_path = found is not None and Path(found).parent == here.parent
    return 'python' if is_on_path or not here.is_relative_to(Path.cwd()) else str(here.relative_to(Path.cwd()))


def is_missing_package(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and (error.name or '').partition('.')[0] in PACKAGES


def missing_package(error: BaseException) -> UserError:
    """What to type where a package is not installed. fsspec, which raises errors of its own, names it in their
    cause."""
    cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
    package = (getattr(cause, 'name', None) or 'fsspec[full]').partition('.')[0]
    path, here = REQUIREMENTS, Path.cwd()
    path = path.relative_to(here) if path.is_relative_to(here) else path
    is_in_file = package in PACKAGES and REQUIREMENTS.is_file()
    return UserError(f'the package {package} is missing: {python()} -m pip install '
                     f'{f"-r {shlex.quote(str(path))}" if is_in_file else package}')


def is_out_of_memory(error: BaseException) -> bool:
    """On cards PyTorch has a class for it; in main memory it is a RuntimeError."""
    words = ('out of memory', "can't allocate memory", 'not enough memory')
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def code_of(error: BaseException) -> int:
    """The exit code of a process that this error ends."""
    if isinstance(error, UserError):
        return error.code
    if is_missing_package(error):
        return COMMAND
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if is_disk_full(error):
        return DISK_FULL
    return {KeyboardInterrupt: INTERRUPTED, BrokenPipeError: BROKEN_PIPE}.get(type(error), 1)


def run(main: Callable[[list[str]], None]) -> None:
    """Call main with the command line's arguments. A UserError ends the process with its message and code, no
    traceback; and so does a package that is not installed."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        leave(str(error), error.code)
    except ModuleNotFoundError as error:
        if not is_missing_package(error):
            raise
        leave(str(missing_package(error)), COMMAND)
    except KeyboardInterrupt:
        leave('interrupted', INTERRUPTED)
    except BrokenPipeError as error:  # `python train.py | head`: the reader has left
        drop_output()
        sys.exit(code_of(error))
    except (OSError, RuntimeError, MemoryError) as error:
        reason = (str(error).splitlines() or ['main memory'])[0]
        if is_out_of_memory(error):
            leave(f'out of memory: {reason}', OUT_OF_MEMORY)
        if is_disk_full(error):
            leave(f'the disk is full: {reason}\nmake room, and run the same command again', DISK_FULL)
        raise


def leave(message: str, code: int) -> NoReturn:
    """The last words of a process; whoever read them may be gone."""
    try:
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:
        drop_output()
    sys.exit(code)


def drop_output() -> None:
    """Nobody reads it, and nobody shall complain of what is left in the buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
