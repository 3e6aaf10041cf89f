"""
plainGPT: train, sample, evaluate and export a GPT-2, and understand it.

    plaingpt prepare stdlib                       the text that every machine has
    plaingpt train config/train_stdlib.py         the default run
    plaingpt sample --out_dir=out-stdlib
    plaingpt STAGE --help                         the settings of any stage

`python -m plaingpt` is the same. Corpora are in data/, and runs in out*/, of the current folder.
"""
import gc
import runpy
import sys

from plaingpt import RARELY, console, errors
from plaingpt.paths import PREPARE, STAGES


def scripts() -> dict[str, str]:
    """Return the file of each script under the words that start it, such as 'train' or 'prepare stdlib'."""
    stages = {file.stem: file for file in STAGES.glob('*.py')}
    texts = {f'prepare {file.parent.name}': file for file in PREPARE.glob('*/prepare.py')}
    return {words: str(file) for words, file in sorted((stages | texts).items())
            if "\nif __name__ == '__main__':" in file.read_text(encoding='utf-8')}


def start(args: list[str]) -> None:
    """Run a script as Python does, with the rest of the command line, and its folder first on the path."""
    if not args or args[0] in ('-h', '--help'):
        return console.say(f'{(__doc__ or "").strip()}\n\nSTAGE is one of: {", ".join(scripts())}')
    n_words = 2 if args[0] == 'prepare' else 1
    words = ' '.join(args[:n_words])
    if words not in (known := scripts()):
        raise errors.UserError(f'plaingpt {words}: there is no such stage; the stages are {", ".join(known)}')
    sys.argv = [known[words], *args[n_words:]]
    sys.path.insert(0, str(STAGES))
    gc.set_threshold(RARELY)
    runpy.run_path(known[words], run_name='__main__')


def main() -> None:
    errors.run(start)


if __name__ == '__main__':
    main()
