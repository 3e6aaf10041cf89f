"""Errors as a user sees them: one message that says what to do next, and an exit code that scripts can read."""
import errno
import gc
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from plaingpt import COLLECTED, console
from plaingpt.paths import IS_INSTALLED, STAGES

DONE = 0
CHECK_FAILED = 1  # for example, overfit_single_batch did not overfit
COMMAND = 2  # a wrong command or setting
DATA = 3  # token files or texts are missing or damaged, or do not fit
CHECKPOINT = 4  # a checkpoint is missing or damaged, or does not fit
NOT_FINITE = 5  # the loss is NaN or infinite
OUT_OF_MEMORY = 6
DISK_FULL = 7
PEER_LOST = 8  # another process is lost, cannot be reached, or owns the folder: run the same command again
STOPPED = 75  # stopped after saving: run the same command again
INTERRUPTED = 130  # Ctrl-C, as shells count it
BROKEN_PIPE = 141  # the output no longer has a reader, as shells count it

REQUIREMENTS = STAGES / 'requirements.txt'
ALL_GPUS = '-m torch.distributed.run --standalone --nproc_per_node=gpu'  # torchrun, which need not be on the PATH
PACKAGES = ('PIL', 'datasets', 'fsspec', 'gguf', 'huggingface_hub', 'matplotlib', 'pyarrow', 's3fs', 'safetensors',
            'tiktoken', 'tokenizers', 'wandb')  # in that file, and imported only where they are used
MAKE_ROOM = 'make room, and run the same command again'
OTHER_FOLDER = 'give a folder that you may write to, or change its owner, which ls -ld shows'
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SYSTEM = {  # refusals of the system: what each means, and what to do
    errno.ENOSPC: ('the disk is full', MAKE_ROOM),
    errno.EDQUOT: ('the disk is full: the quota is used up', MAKE_ROOM),
    errno.EFBIG: ('the disk is full: no file may become larger', 'see `ulimit -f`, or write to another disk'),
    errno.ENOENT: ('there is no such file or folder', 'check the name: the file may have been moved or deleted'),
    errno.EROFS: ('this file system is read-only', 'give a folder on another one'),
    errno.EACCES: ('permission is denied', OTHER_FOLDER),
    errno.EPERM: ('permission is denied', OTHER_FOLDER),
    errno.EMFILE: ('too many files are open in this process', 'raise the limit: ulimit -n 4096'),
    errno.ENFILE: ('too many files are open on this machine', 'end other programs, and run the same command again'),
    errno.ENAMETOOLONG: ('the name is too long', 'give a shorter one'),
    errno.EEXIST: ('there is another file of that name', 'give another name'),
    errno.EISDIR: ('this is a folder', 'give the name of a file'),
    errno.ENOTDIR: ('a part of this path is a file, not a folder', 'give another path'),
}


class UserError(ValueError):
    """A mistake of the user's, with a message that helps to repair it: what is wrong, where, and what to type next, in
    at most three lines."""

    def __init__(self, message: str, code: int = COMMAND) -> None:
        super().__init__(console.message(message))
        self.code = code


def first_line(error: BaseException) -> str:
    """Return what another project's error says, as part of a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def typed(path: Path, folder: Path | None = None) -> str:
    """Return what to type for a path in a POSIX shell in `folder`, or else in the current folder."""
    here = folder or Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def python(folder: Path | None = None) -> str:
    """Return what to type there for the Python that runs this: its name, if a shell finds it so, or its path."""
    here = Path(sys.executable)
    for name in ('python', here.name):
        found = shutil.which(name)
        if found and Path(found).absolute().parent == here.parent and os.path.samefile(found, here):
            return name
    path = typed(here, folder)
    return path if '/' in path else f'./{path}'


def command(*files: str, **settings: object) -> str:
    """Return what to type to run one of this project's scripts, such as 'train.py', with its config files, if there are
    any, and settings."""
    return command_of(files, settings)


def command_of(files: Sequence[str], settings: Mapping[str, object], launcher: str = '',
               folder: Path | None = None) -> str:
    """Return what `command` does, with a launcher between Python and the script, or in a `folder` other than the
    current one: paths in the settings then start there."""
    options = (f'--{name}={shlex.quote(str(value))}' for name, value in settings.items())
    others = (file if IS_INSTALLED else typed(STAGES / file, folder) for file in files[1:])
    words = (*started(files[0], launcher, folder), *others, *options)
    line = ' '.join(filter(None, words))
    return f'(cd {shlex.quote(str(folder))} && {line})' if folder else line


def started(script: str, launcher: str = '', folder: Path | None = None) -> list[str]:
    """Return the words that start one of this project's scripts there: in a clone by its file, else by its name."""
    if not IS_INSTALLED:
        return [python(folder), launcher, typed(STAGES / script, folder)]
    name = Path(script).stem
    if name == 'prepare':
        name = f'prepare {Path(script).parent.name}'
    found = shutil.which('plaingpt')
    is_found = found and Path(found).absolute().parent == Path(sys.executable).parent
    return ['plaingpt', name] if is_found and not launcher else [python(folder), launcher, '-m plaingpt', name]


def is_missing_package(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and (error.name or '').partition('.')[0] in PACKAGES


def missing_package(error: BaseException) -> UserError:
    """Return an error that says how to install a missing package. fsspec, which raises errors of its own, names the
    package in their cause."""
    cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
    package = (getattr(cause, 'name', None) or 'fsspec[full]').partition('.')[0]
    is_in_file = package in PACKAGES and REQUIREMENTS.is_file()
    return UserError(f'the package {package} is missing: {python()} -m pip install '
                     f'{f"-r {typed(REQUIREMENTS)}" if is_in_file else shlex.quote(package)}')


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out. PyTorch has a class for that on GPUs; in main memory it is a RuntimeError."""
    words = ('out of memory', "can't allocate memory", 'not enough memory', 'CUBLAS_STATUS_ALLOC_FAILED',
             'CUDNN_STATUS_ALLOC_FAILED')
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def of_system(error: BaseException) -> OSError | None:
    """Return the system's refusal, if one is behind this error: PyTorch raises another error in its place, libraries in
    Rust tell its number, and numpy says only that some bytes were not written."""
    if number := re.search(r'\(os error (\d+)\)|^\d+ requested and \d+ written$', str(error)):
        code = int(number[1] or errno.ENOSPC)
        return OSError(code, os.strerror(code))
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    return cause if isinstance(cause, OSError) else None


def refusal(error: BaseException, what: str | Path = '', code: int | None = None, remedy: str = '') -> UserError:
    """Return an error that says what the system has refused, for `what` or else the file that the error names, and what
    to do about it; the `remedy` is for errors that SYSTEM does not list. The exit code is the caller's, unless the disk
    is full."""
    number, name, words = 0, '', first_line(error)
    if refused := of_system(error):
        number, name, words = refused.errno or 0, refused.filename or '', refused.strerror or words
    meaning, remedy = SYSTEM.get(number, (words, remedy))
    code = (COMMAND if number in SYSTEM else CHECK_FAILED) if code is None else code
    message = ': '.join(filter(None, (str(what or name), meaning)))
    return UserError('\n'.join(filter(None, (message, remedy))), DISK_FULL if number in FULL else code)


def code_of(error: BaseException) -> int:
    """Return the exit code of a process that this error ends."""
    if isinstance(error, UserError):
        return error.code
    if is_missing_package(error):
        return COMMAND
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return refusal(error).code
    return {KeyboardInterrupt: INTERRUPTED, BrokenPipeError: BROKEN_PIPE}.get(type(error), 1)


def run(main: Callable[[list[str]], None]) -> None:
    """Call main with the command line's arguments. A UserError ends the process with its message and code, and without
    a traceback; so does a package that is not installed."""
    gc.freeze()  # what was imported stays, and is not searched for garbage, neither in between nor at the end
    gc.set_threshold(*COLLECTED)
    sys.excepthook = console.note_traceback
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
        drop(sys.stdout)
        sys.exit(code_of(error))
    except OSError as error:
        if error.errno not in SYSTEM:
            raise
        refused = refusal(error)
        leave(str(refused), refused.code)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        leave(f'out of memory: {(str(error).splitlines() or ["main memory"])[0]}', OUT_OF_MEMORY)


def leave(message: str, code: int) -> NoReturn:
    """Say the last words of a process, whose readers may be gone, and end it."""
    for stream, words in ((sys.stdout, ''), (sys.stderr, f'{console.shown(message)}\n')):
        try:
            console.write(words, stream)
        except OSError:
            drop(stream)
    sys.exit(code)


def drop(stream: TextIO) -> None:
    """Discard output that no longer has a reader, and what is left in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
