"""
The memory that the preparation of one long document takes, beside that of a document of a tenth of its length.

    python benchmarks/long_document.py
    python benchmarks/long_document.py --megabytes=2000 --tokenizers=gpt2

Memory should not grow with the document: the ratios to reach are 1. It is what all processes of the command hold (the
proportional set size of each, from /proc, twenty times a second: Linux only).
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from plaingpt import console
from plaingpt.errors import UserError, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
megabytes: int = 200  # of the long document
tokenizers: str = 'byte,char,bpe:1024,gpt2'
num_proc: int = 2
# ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


def write_document(path: Path, size: int) -> None:
    """Write the sources of Python's standard library, one after the other and again and again, as one text."""
    sources = [file.read_bytes() for file in sorted(Path(os.__file__).parent.glob('*.py'))]
    with open(path, 'wb') as file:
        while file.tell() < size:
            for source in sources:
                file.write(source)


def held(pid: int) -> int:
    """Return the bytes of memory that a process and its descendants hold; pages that several share count once."""
    try:
        rollup = Path(f'/proc/{pid}/smaps_rollup').read_text(encoding='ascii')
        children = [child for task in Path(f'/proc/{pid}/task').iterdir()
                    for child in (task / 'children').read_text(encoding='ascii').split()]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    own = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith('Pss:')), 0)
    return own * 1024 + sum(held(int(child)) for child in children)


def measure(text: Path, tokenizer: str) -> tuple[int, float]:
    """Prepare the text; return the most bytes of memory that it took, and seconds."""
    name = f'benchmark-{os.getpid()}'
    command = [sys.executable, str(ROOT / 'data/text/prepare.py'), f'--input={text}', f'--name={name}',
               f'--tokenizer={tokenizer}', f'--num_proc={num_proc}']
    most, began = 0, time.monotonic()
    try:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                most = max(most, held(process.pid))
                time.sleep(0.05)
        if process.returncode:
            raise UserError(f'{" ".join(command)} ended with {process.returncode}', process.returncode)
        return most, time.monotonic() - began
    finally:
        shutil.rmtree(ROOT / 'data' / name, ignore_errors=True)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    configurator.check_range(sys.modules[__name__], 'megabytes', 10)
    with tempfile.TemporaryDirectory() as folder:
        short, long = Path(folder, 'short.txt'), Path(folder, 'long.txt')
        write_document(short, megabytes * 10**5)
        write_document(long, megabytes * 10**6)
        sizes = ' and '.join(console.size(path.stat().st_size) for path in (short, long))
        console.say(f'one document of {sizes}, {num_proc} processes')
        for tokenizer in tokenizers.split(','):
            (little, _), (much, seconds) = (measure(path, tokenizer) for path in (short, long))
            console.say(f'{tokenizer:12} {console.size(little)} and {console.size(much)}: {much / little:.2f} x for '
                        f'ten times the text; {seconds:.0f} s')


if __name__ == '__main__':
    run(main)
