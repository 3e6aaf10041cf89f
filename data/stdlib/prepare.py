"""
The default text: the source code of Python's own standard library, which is on every machine that can run this project.

    python data/stdlib/prepare.py

About ten megabytes of real text without any download. Tests, installed packages and the character tables of `encodings`
are left out. One file is one document; about one in twenty is for validation. Takes seconds.
"""
import sys
import sysconfig
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import configurator
from plaingpt import console
from plaingpt.corpus import tokenise
from plaingpt.corpus.folder import folder_for, next_steps
from plaingpt.encoder import encoder_for
from plaingpt.errors import DATA, UserError, command, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
tokenizer: str = 'bpe:1024'  # a byte-pair encoding of so many ids, trained on this text; or 'char', 'byte', 'gpt2', ...
to_dir: str = ''  # the folder to write; '' is data/stdlib
# ------------------------------------------------------------------------------------------------

LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', 'encodings'}
ONE_IN = 20  # files, one of which is for validation


def find_sources(library: Path) -> list[str]:
    """Return the names of the library's files, in a fixed order."""
    names = (path.relative_to(library) for path in library.rglob('*.py'))
    return sorted(name.as_posix() for name in names if not LEFT_OUT & set(name.parts[:-1]))


def read_sources(library: Path) -> list[tuple[bool, str]]:
    """Return for every file whether it is for validation, and its text. The name alone decides that, so that other
    versions of Python, which have some other files, validate on much the same ones."""
    texts = ((name, (library / name).read_text(encoding='utf-8')) for name in find_sources(library))
    return [(zlib.crc32(name.encode()) % ONE_IN == 0, text) for name, text in texts if text]


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    folder = folder_for('stdlib', to_dir)
    library = Path(sysconfig.get_paths()['stdlib'])
    files = read_sources(library)
    if not files:
        raise UserError(f'{library} holds no .py files: this Python comes without its source code\n'
                               f'prepare another text: {command("data/text/prepare.py", input="PATH")}', DATA)
    source = f'the standard library of Python {sys.version.split()[0]}'
    console.say(f'found {len(files):,} files in {library}')

    texts, validation = [text for _, text in files], np.flatnonzero([is_val for is_val, _ in files])
    encoder = encoder_for(tokenizer, lambda: tokenise.build_tokenizer(tokenizer, [texts], validation, eot=True))
    tokenise.write_corpus(folder, tokenise.Packer(encoder, encoder.eot), [texts], validation, source)
    console.say(next_steps(folder, 'train_stdlib', 'stdlib', 'out-stdlib'))


if __name__ == '__main__':
    run(main)
