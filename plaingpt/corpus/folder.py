"""
A corpus on disk: a folder, or a glob, of token files, and what is wrong with it.

train.bin and val.bin, or shards, of which those whose name says so are for validation. meta.json says which tokenizer
made them and what they looked like when they were made.
"""
import hashlib
import itertools
import re
import shlex
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
from plaingpt.errors import ALL_GPUS, DATA, UserError, command
from plaingpt.paths import matching

DATA_ROOT = Path(__file__).parents[2] / 'data'
META = {  # what is read of a meta.json
    'tokenizer': STATE,
    'vocab_size': range(1, MOST_IDS),
    'dtype': {'uint16', 'uint32'},
    'splits': {str: {'tokens': schema.COUNT, 'largest_id': schema.COUNT, 'head': str, 'tail': str, 'sha256?': str}}}
SUFFIXES = ('.bin', '.npy')  # of token files, among all that a folder or glob may hold
FOR_VALIDATION = re.compile(r'(?<![^\W\d_])(val|valid|validation)(?![^\W\d_])', re.IGNORECASE)  # between no letters
OPTION = re.compile(r'--\w+=[\w ./:,+=*?\[\]~@%-]*')  # of a command that is shown although a file brought it


@dataclass(frozen=True)
class Data:
    """A corpus, as a run reads it."""

    folder: Path
    splits: dict[str, TokenFile]  # 'train' and 'val'
    order: Order  # in which training reads its windows
    tokenizer: Tokenizer | None  # None if its files cannot be had
    fingerprint: dict[str, Any]  # of each split

    @property
    def token_sizes(self) -> list[int] | None:
        """Bytes of text that each id stands for."""
        return self.tokenizer.token_sizes() if self.tokenizer else None


def data_folder(dataset: str) -> Path:
    """Return where a corpus is: data/<dataset> beside the stages, or any other folder or glob of token files. What is
    there under that very name comes before what a glob matches."""
    places = (DATA_ROOT / dataset, Path(dataset))
    return next(itertools.chain(filter(Path.exists, places), filter(matching, places)), places[0])


def fingerprint(tokens: TokenFile, meta: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what tells these tokens from others, without reading all of them: how many, the ends of each file, and the
    hash of it that its maker left in `meta`, or of a sample of it."""
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
    """Return whether a file of that name is for `split`: for validation, if the word val, valid or validation is in it;
    for training, if not, as in carnival_000.bin."""
    return (FOR_VALIDATION.search(name) is not None) == (split == 'val')


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the token files of a split, in the order of their names. `folder` may be a glob, too. Beside train.bin and
    val.bin no other file is a part of the corpus."""
    only = folder / f'{split}.bin'
    if only.exists() and (folder / 'train.bin').exists():
        return [only]
    found = folder.iterdir() if folder.is_dir() else matching(folder)
    return sorted(path for path in found
                  if path.suffix in SUFFIXES and is_for(split, path.name) and not path.name.startswith('.'))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what a corpus's maker wrote into meta.json. Other projects' corpora have none: they hold GPT-2's tokens,
    unless their files say otherwise."""
    path = (folder if folder.is_dir() else folder.parent) / 'meta.json'
    meta = files.read_json(path)
    paths = files_of(folder, 'train')
    if isinstance(meta, dict) and meta.get('unfinished'):
        raise UserError(f'{folder} is not complete: a preparation was interrupted, or is at work\n'
                        f'go on with: {how_to_go_on(folder, meta.get("created_by"))}', DATA)
    if not paths:
        raise UserError(f'{folder} holds no prepared corpus\nfirst run: {how_to_prepare(folder)}', DATA)
    if path.exists():
        return schema.read_json(path, META, DATA, f'rebuild the corpus: {how_to_prepare(folder)}')
    if path.with_suffix('.pkl').exists():
        raise UserError(f'{path.with_suffix(".pkl")} is a pickle, which could run any code: it is not read\n'
                        f'rebuild the corpus: {how_to_prepare(folder)}', DATA)
    name = TokenFile(paths[0]).tokenizer
    return {'tokenizer': {'name': name}, 'vocab_size': VOCABULARIES[name], 'dtype': '', 'splits': {}}


def is_prepared(folder: Path) -> bool:
    """Return whether there is a corpus, of any project."""
    return bool(files_of(folder, 'train')) or any((folder / name).exists() for name in ('meta.json', 'meta.pkl'))


def how_to_prepare(folder: Path) -> str:
    """Return the command that makes this corpus."""
    name = folder.parent.name if folder.suffix in SUFFIXES else folder.name
    if (DATA_ROOT / name / 'prepare.py').exists():
        return command(f'data/{name}/prepare.py')
    return command('data/text/prepare.py', input='YOUR_TEXT', name=name)


def how_to_go_on(folder: Path, created_by: object) -> str:
    """Return the command that has begun this corpus, if that is one of this project's; or one that makes it anew."""
    try:
        _, script, *options = shlex.split(str(created_by))
    except ValueError:  # too few words, or a quote too many
        return how_to_prepare(folder)
    name = Path(script).parent.name
    is_ours = Path(script).name == 'prepare.py' and (DATA_ROOT / name / 'prepare.py').exists()
    if is_ours and all(map(OPTION.fullmatch, options)):
        return f'{command(f"data/{name}/prepare.py")} {shlex.join(options)}'
    return how_to_prepare(folder)


def next_steps(config: str, run: str, takes_long: bool = False, **settings: str) -> str:
    """Return what to say when a corpus is made: the commands that train on it, as config/<config>.py and these settings
    say, and that sample the run. A training that takes long is for all GPUs of a machine."""
    train = ('train.py', f'config/{config}.py')
    lines = ['next:', f'    {command(*train, **settings)}', f'    {command("sample.py", out_dir=run)}']
    if takes_long:
        lines += ['or, to train on all GPUs of this machine:', f'    {command(*train, launcher=ALL_GPUS, **settings)}']
    return '\n'.join(lines)


def open_tokens(paths: Sequence[Path], name: Path, meta: dict[str, Any]) -> TokenFile:
    """Open the files of one folder as `open_files` does. What is read of them is compared with their checksums, if
    their maker has left some."""
    tokens, folder = open_files(paths, name, meta['dtype']), paths[0].parent
    command = how_to_go_on(folder, meta.get('created_by'))
    remedy = f'rebuild the corpus: {command}{" --overwrite=True" * ("made_with" in meta)}'
    sums = checksums.read(folder, remedy)
    for file in tokens.files:
        sha256 = meta['splits'].get(file.path.stem, {}).get('sha256', '')
        if sha256 in sums:
            file.comparison = checksums.Comparison(file.path, sums[sha256], remedy)
    return tokens


@cache
def say_unprotected(folder: Path) -> None:
    console.say(f'{folder} has no checksums: damage in the middle of a file may pass unseen')


def open_split(folder: Path, split: str, block_size: int, vocab_size: int) -> TokenFile:
    """Open the tokens of 'train' or 'val', checked: they are what their maker wrote, enough for one window, and known
    to a model of vocab_size tokens. Raises UserError that names the file and the sizes."""
    meta, paths = read_meta(folder), files_of(folder, split)
    listed = {name for name in meta['splits'] if is_for(split, name)}
    missing = listed - {path.stem for path in paths} if folder.is_dir() else set()
    if not paths and not folder.is_dir():
        raise UserError(f'{folder} has no file for {split}: the word val, valid or validation in a name decides\n'
                        'give a folder or a glob that has files for both', DATA)
    if missing or not paths:
        raise UserError(f'{folder / min(missing, default=split)}.bin is not there\nfirst run: {how_to_prepare(folder)}',
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
    """Refuse a file that is not as it was `made`, where that is known."""
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
