"""
A corpus on disk: a folder, or a glob, of token files, the command that makes it, and what may be wrong with it.

The files are train.bin and val.bin, or shards; a shard is for validation if its name says so. meta.json says which
tokenizer made them and what they looked like when they were made.
"""
import glob
import hashlib
import itertools
import os
import re
import shlex
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plaingpt import console, files, schema
from plaingpt.corpus import checksums
from plaingpt.corpus.order import Order
from plaingpt.corpus.token_files import PIECES, VOCABULARIES, TokenFile, ends_of, open_files, sample_of
from plaingpt.corpus.tokenizer import MOST_IDS, STATE, Tokenizer
from plaingpt.errors import ALL_GPUS, DATA, UserError, command, command_of
from plaingpt.paths import CORPORA, PREPARE, is_url, matching

META = {  # the parts of a meta.json that are read
    'tokenizer': STATE,
    'vocab_size': range(1, MOST_IDS),
    'dtype': {'uint16', 'uint32'},
    'splits': {str: {'tokens': schema.COUNT, 'largest_id': schema.COUNT, 'head': str, 'tail': str, 'sha256?': str}}}
SUFFIXES = ('.bin', '.npy')  # of token files, among all that a folder or glob may hold
FOR_VALIDATION = re.compile(r'(?<![^\W\d_])(val|valid|validation)(?![^\W\d_])', re.IGNORECASE)  # as a word of its own
SHOWN = re.compile(r'[\w ./:,+=*?\[\]~@%\'"()&!#{}-]*')  # in a command that a file brought, if it is to be shown
RESERVED = re.compile(r'(con|prn|aux|nul|com\d|lpt\d)(\..*)?', re.IGNORECASE)  # names of devices on Windows


@dataclass(frozen=True)
class Data:
    """A corpus as a run reads it."""

    folder: Path
    splits: dict[str, TokenFile]  # 'train' and 'val'
    order: Order  # in which training reads its windows
    tokenizer: Tokenizer | None  # None if its files are not available
    fingerprint: dict[str, Any]  # of each split

    @property
    def token_sizes(self) -> list[int] | None:
        """Return the bytes of text that each id stands for."""
        return self.tokenizer.token_sizes() if self.tokenizer else None


def data_folder(dataset: str) -> Path:
    """Return the place of a corpus: data/<dataset> beside the stages, or any other folder or glob of token files. A
    folder of that very name comes before what a glob matches."""
    places = (CORPORA / dataset, Path(dataset))
    return next(itertools.chain(filter(Path.exists, places), filter(matching, places)), places[0])


def fingerprint(tokens: TokenFile, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what tells these tokens from others, without reading all of them: how many there are, the ends of each
    file, and the hash that its maker left in `meta`, or else the hash of a sample."""
    splits = meta['splits'] if meta else {}
    hashes = [splits.get(file.path.stem, {}).get('sha256', '') for file in tokens.files]
    n_pieces = max(1, PIECES // len(hashes))
    marks = [ends_of(file.path) | {'sha256': sha256} | ({} if sha256 else {'sample': sample_of(file.path, n_pieces)})
             for file, sha256 in zip(tokens.files, hashes, strict=True)]
    if len(marks) > 1:
        joined = {name: ' '.join(mark.get(name, '') for mark in marks) for name in marks[0]}
        marks = [{name: hashlib.sha256(text.encode()).hexdigest() for name, text in joined.items()}]
    return {'tokens': len(tokens), **marks[0]}


def is_for(split: str, name: str) -> bool:
    """Return whether a file of that name is for `split`: it is for validation if it has the word val, valid or
    validation in it, and for training if not, like carnival_000.bin."""
    return (FOR_VALIDATION.search(name) is not None) == (split == 'val')


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the token files of a split, in the order of their names. `folder` may be a glob, too. If there are a
    train.bin and a val.bin, no other file is part of the corpus."""
    only = folder / f'{split}.bin'
    if only.exists() and (folder / 'train.bin').exists():
        return [only]
    found = folder.iterdir() if folder.is_dir() else matching(folder)
    return sorted(path for path in found
                  if path.suffix in SUFFIXES and is_for(split, path.name) and not path.name.startswith('.'))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what a corpus's maker wrote into meta.json. Corpora of other projects have none: they hold GPT-2's tokens,
    unless their files say otherwise."""
    path = (folder if folder.is_dir() else folder.parent) / 'meta.json'
    meta = files.read_json(path)
    paths = files_of(folder, 'train')
    if isinstance(meta, dict) and meta.get('unfinished'):
        raise UserError(f'{folder} is not complete: a preparation was interrupted, or is at work\n'
                        f'continue with: {how_to_prepare(folder)}', DATA)
    if not paths:
        is_glob = glob.has_magic(str(folder)) and not folder.exists()
        remedy = 'give a folder, or a glob of .bin or .npy' if is_glob else f'first run: {how_to_prepare(folder)}'
        raise UserError(f'{folder} holds no prepared corpus\n{remedy}', DATA)
    if path.exists():
        return schema.read_json(path, META, DATA, f'rebuild the corpus: {how_to_prepare(folder)}')
    if path.with_suffix('.pkl').exists():
        raise UserError(f'{path.with_suffix(".pkl")} is a pickle, which could run any code: it is not read\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    name = TokenFile(paths[0]).tokenizer
    return {'tokenizer': {'name': name}, 'vocab_size': VOCABULARIES[name], 'dtype': '', 'splits': {}}


def is_prepared(folder: Path) -> bool:
    """Return whether the folder holds a corpus, of any project."""
    return bool(files_of(folder, 'train')) or any((folder / name).exists() for name in ('meta.json', 'meta.pkl'))


# ------------------------------------------------------------------------------------------------
# Making it


def is_plain(name: str) -> bool:
    """Return whether data/<name> may be a corpus: letters, digits, '_', '.' and '-', which every system takes."""
    is_fine = all(unicodedata.category(character)[0] in 'LMN' or character in '_.-' for character in name)
    return is_fine and name[:1] not in ('', '.', '-') and not RESERVED.fullmatch(name)


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be written to, or made."""
    return os.access(next(path for path in (folder, *folder.absolute().parents) if path.exists()), os.W_OK)


def folder_for(script: str, to_dir: str, name: str | None = None) -> Path:
    """Return the folder that data/<script>/prepare.py is to write: to_dir or, if that is '', data/<name>. Raise
    UserError for a name that is not plain, for the folder of another prepare.py, and for one that cannot be written."""
    name = script if name is None else name
    if is_url(to_dir):
        raise UserError(f'--to_dir={to_dir} is not a folder on this machine')
    if not to_dir and not is_plain(name):
        raise UserError(f"--name={name} becomes the folder data/<name>: letters, digits, '_', '.' and '-', and neither "
                        'of the last two comes first; --to_dir= takes any folder')
    if to_dir and name != script:
        console.say('name has no effect: to_dir decides')
    folder = Path(to_dir) if to_dir else CORPORA / name
    if (folder / 'prepare.py').exists() and folder.resolve() != (CORPORA / script).resolve():
        given = f'--to_dir={to_dir}' if to_dir else f'--name={name}'
        raise UserError(f'{given}: that folder is for the corpus of data/{folder.resolve().name}/prepare.py: give '
                        'another one')
    if not is_writable(folder):
        raise UserError(f'{folder} cannot be written to\nname another folder: --to_dir=FOLDER')
    return folder


def how_to_prepare(folder: Path) -> str:
    """Return the command that makes the corpus in a folder, or makes it anew: the one that its meta.json names, if that
    is one of this project's, or else one that would do."""
    home = folder if folder.is_dir() or not matching(folder) else folder.parent
    meta = files.read_json(home / 'meta.json')
    meta = meta if isinstance(meta, dict) else {}
    script, settings = recorded_command(meta.get('created_by')) or guessed_command(home.absolute().name)
    started = folder_of_paths(meta.get('created_in'), settings)
    name, _ = settings.pop('name', script), settings.pop('to_dir', '')
    place = home.absolute() if is_writable(home) else place_for(home.absolute().name, Path(tempfile.gettempdir()))
    if place.resolve() != (CORPORA / name).resolve() or not is_plain(name):
        settings['to_dir'] = str(place.absolute())
    elif name != script:
        settings['name'] = name
    if is_begun(home) and not meta.get('unfinished') and takes_overwrite(script):
        settings['overwrite'] = 'True'
    return command_of([f'data/{script}/prepare.py'], settings, folder=started)


def is_begun(folder: Path) -> bool:
    """Return whether the folder holds any part of a corpus."""
    return (folder / 'meta.json').exists() or any(folder.glob('*.bin'))


def takes_overwrite(script: str) -> bool:
    """Return whether data/<script>/prepare.py continues an interrupted preparation, unless it is told to start over."""
    path = PREPARE / script / 'prepare.py'
    return path.exists() and '\noverwrite: bool' in path.read_text(encoding='utf-8')


def recorded_command(created_by: object) -> tuple[str, dict[str, str]] | None:
    """Return which prepare.py of this project a command runs, and its settings; None for any other command."""
    try:
        _, script, *words = shlex.split(str(created_by))
    except ValueError:  # too few words, or a quote too many
        return None
    settings, name = dict[str, str](), Path(script).parent.name
    while words:
        option, equals, value = words.pop(0).partition('=')
        value = value if equals or not words else words.pop(0)
        if not re.fullmatch(r'--[\w-]+', option) or not SHOWN.fullmatch(value):
            return None
        settings[option[2:].replace('-', '_')] = value
    is_known = Path(script).name == 'prepare.py' and (PREPARE / name / 'prepare.py').exists()
    return (name, settings) if is_known else None


def guessed_command(name: str) -> tuple[str, dict[str, str]]:
    """Return which prepare.py makes a corpus of that name, and its settings."""
    has_its_own = name != 'text' and (PREPARE / name / 'prepare.py').exists()
    return (name, {}) if has_its_own else ('text', {'input': 'YOUR_TEXT', 'name': name})


def folder_of_paths(created_in: object, settings: dict[str, str]) -> Path | None:
    """Return the folder in which a command was typed, if that is not the current one, and some of the settings are
    paths, or globs, that start there."""
    folder = Path(str(created_in))
    if not SHOWN.fullmatch(str(folder)) or not folder.is_absolute() or folder == Path.cwd() or not folder.is_dir():
        return None
    starts = [value.partition('/')[0] for value in settings.values()]
    return folder if any(start and (glob.has_magic(start) or (folder / start).exists()) for start in starts) else None


def dataset_of(folder: Path) -> str:
    """Return the name that --dataset= takes for a folder."""
    names = (folder.name, str(folder), str(folder.absolute()))
    return next(name for name in names if data_folder(name).resolve() == folder.resolve())


def place_for(name: str, *others: Path) -> Path:
    """Return a path where a folder of that name can be made: in the current folder, or else in the first of the others
    that can be written to."""
    return next((place for place in (Path(), *others) if os.access(place, os.W_OK)), Path()) / name


def next_steps(folder: Path, config: str, dataset: str, out_dir: str, run: str = '', takes_long: bool = False,
               samples: bool = True) -> str:
    """Return what to say when the corpus in `folder` is made: the commands that train on it, and sample the run.
    config/<config>.py has this dataset and out_dir; `run`, if given, takes the place of the latter. For a training that
    takes long, name the command for all GPUs of a machine, too."""
    usual = {'dataset': dataset, 'out_dir': out_dir}
    given = {'dataset': dataset_of(folder), 'out_dir': str(place_for(run or out_dir, folder.absolute().parent, folder))}
    settings = {name: value for name, value in given.items() if value != usual[name]}
    train = ('train.py', f'config/{config}.py')
    lines = ['next:', f'    {command(*train, **settings)}']
    lines += [f'    {command("sample.py", out_dir=given["out_dir"])}'] if samples else []
    if takes_long:
        lines += ['or, to train on all GPUs of this machine:', f'    {command_of(train, settings, launcher=ALL_GPUS)}']
    return '\n'.join(lines)


# ------------------------------------------------------------------------------------------------
# Reading it


def open_tokens(paths: Sequence[Path], name: Path, meta: dict[str, Any]) -> TokenFile:
    """Open the files of one folder as `open_files` does. All that is read from them is compared with their checksums,
    if their maker has left some."""
    tokens, folder = open_files(paths, name, meta['dtype']), paths[0].parent
    remedy = f'rebuild the corpus: {how_to_prepare(folder)}'
    sums = checksums.read(folder, remedy)
    for file in tokens.files:
        sha256 = meta['splits'].get(file.path.stem, {}).get('sha256', '')
        if sha256 in sums:
            file.comparison = checksums.Comparison(file.path, sums[sha256], remedy)
    return tokens


@cache
def say_unprotected(folder: Path) -> None:
    console.say(f'{folder} has no checksums: damage in the middle of a file may go unnoticed')


def open_split(folder: Path, split: str, block_size: int, vocab_size: int) -> TokenFile:
    """Open the tokens of 'train' or 'val', and check that they are as their maker wrote them, enough for one window,
    and known to a model of vocab_size tokens. If not, raise UserError, which names the file and the sizes."""
    meta, paths = read_meta(folder), files_of(folder, split)
    listed = {name for name in meta['splits'] if is_for(split, name)}
    missing = listed - {path.stem for path in paths} if folder.is_dir() else set()
    if not paths and not folder.is_dir():
        raise UserError(f'{folder} has no file for {split}: the word val, valid or validation in a name decides\n'
                        'give a folder or a glob that has files for both', DATA)
    if missing or not paths:
        raise UserError(f'{folder / min(missing, default=split)}.bin is missing\nfirst run: {how_to_prepare(folder)}',
                        DATA)
    tokens = open_tokens(paths, (folder if folder.is_dir() else folder.parent) / split, meta)
    if any(file.comparison is None for file in tokens.files):
        say_unprotected(folder)
    for file in tokens.files:
        if meta['splits'] and file.path.stem not in meta['splits']:
            raise UserError(f'{file.path} is not in the meta.json beside it: it belongs to another corpus\n'
                            f'move it away, or rebuild the corpus: {how_to_prepare(folder)}', DATA)
        check_file(file, meta['splits'].get(file.path.stem, {}), vocab_size, folder)
    if len(tokens) <= block_size:
        raise UserError(f'{tokens.path} has {len(tokens)} tokens: too few for a window of block_size + 1 = '
                        f'{block_size + 1}\ngive --block_size={max(1, len(tokens) - 1)} or less, or prepare more text',
                        DATA)
    return tokens


def check_file(file: TokenFile, made: dict[str, Any], vocab_size: int, folder: Path) -> None:
    """Refuse a file that is not as it was `made`, as far as that is known."""
    if len(file) != made.get('tokens', len(file)):
        raise UserError(f'{file.path} has {len(file)} tokens, and meta.json says {made["tokens"]}: it is damaged\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    if made and ends_of(file.path) != {name: made[name] for name in ('head', 'tail')}:
        raise UserError(f'{file.path} is not the file that meta.json describes: its first or last bytes differ\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    if made.get('largest_id', 0) >= vocab_size:
        raise UserError(f'{file.path} holds token {made["largest_id"]}, and the model knows only 0 to {vocab_size - 1}'
                        f'\ngive --vocab_size={made["largest_id"] + 1}, or prepare the text with another tokenizer',
                        DATA)
