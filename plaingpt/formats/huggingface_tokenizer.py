"""
The tokenizer beside another project's GPT-2 -> this project's Tokenizer, which gives the ids that transformers gives.

    tokenizer.json                  the vocabulary, and the tokens that were added to it
    vocab.json, merges.txt          the same in older folders, with added_tokens.json
    tokenizer_config.json, special_tokens_map.json, config.json, generation_config.json
                                    which tokens are special, which of them begins a text, and which ends one
"""
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaingpt import schema
from plaingpt.corpus import tokenizer
from plaingpt.corpus.tokenizer import END_OF_TEXT, ForeignBPE, byte_level
from plaingpt.errors import CHECKPOINT, UserError
from plaingpt.formats.huggingface import folder_of, readable_errors

if TYPE_CHECKING:
    import tokenizers

VOCABULARY = ('tokenizer.json', 'vocab.json', 'merges.txt', 'added_tokens.json')
SETTINGS = ('tokenizer_config.json', 'special_tokens_map.json', 'config.json', 'generation_config.json')
GPT2_CLASSES = ('GPT2Tokenizer', 'GPT2TokenizerFast')
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')  # in their order
MORE = ('additional_special_tokens', 'extra_special_tokens')
FLAGS = ('lstrip', 'rstrip', 'single_word', 'normalized')
TOKEN = (str, {'content': str, 'special?': bool, **{f'{flag}?': bool for flag in FLAGS}})
ID = (None, schema.COUNT, [schema.COUNT, ...])
SAYS = {  # the parts of SETTINGS that are read
    'tokenizer_class?': (str, None), 'add_prefix_space?': (bool, None),
    **{f'{role}?': (*TOKEN, None) for role in ROLES},
    **{f'{name}?': (None, [TOKEN, ...], {str: TOKEN}) for name in MORE}, 'added_tokens_decoder?': {str: TOKEN[1]},
    'bos_token_id?': ID, 'eos_token_id?': ID, 'vocab_size?': schema.COUNT}
GPT2_PIECES = '7db3ecccc3244b0f6caf9087f7d9c8224cbb8bdc6d01888e547329c0e064260f'  # sha256 of its tokens, one a line


def read(name_or_folder: str) -> dict[str, Any]:
    """Return what a checkpoint would say about the tokenizer beside a model of another project, or in a file of this
    name; {} if it is GPT-2's, or if there is none. Raise UserError if it is of another kind than GPT-2's."""
    path = Path(name_or_folder)
    if name_or_folder.startswith('gpt2') and not path.exists():
        return {}
    if path.is_file():
        folder, file = path.parent, path
    else:
        with readable_errors(name_or_folder):
            folder = folder_of(name_or_folder, *VOCABULARY, *SETTINGS)
        file = folder / 'tokenizer.json'
    if not file.is_file() and not is_in(folder):
        return {}
    try:
        learned = open_files(folder, file, is_in_folder=file.name == 'tokenizer.json')
    except ModuleNotFoundError:
        raise
    except Exception:  # the library may raise anything over foreign files; or the vocabulary lacks bytes
        raise UserError(f"the tokenizer of {name_or_folder} is damaged, or of another kind than GPT-2's: it is not read"
                        "\nwithout its files, the model's tokens are taken for GPT-2's, or those of a --dataset",
                        CHECKPOINT) from None
    is_gpt2 = learned.is_plain and hashlib.sha256(b'\n'.join(learned.pieces)).hexdigest() == GPT2_PIECES
    return {} if is_gpt2 else {'tokenizer': learned.state()}


def is_in(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""
    return (folder / VOCABULARY[0]).is_file() or all((folder / name).is_file() for name in VOCABULARY[1:3])


def open_files(folder: Path, file: Path, is_in_folder: bool) -> ForeignBPE:
    """Return the tokenizer of a folder, or that of one file alone. Raise ValueError, or whatever the library raises, if
    it cannot be read as transformers reads it."""
    says: dict[str, Any] = {}
    for name in SETTINGS if is_in_folder else ():  # the later files win
        if (folder / name).is_file() and not (name == 'special_tokens_map.json' and 'added_tokens_decoder' in says):
            found = schema.read_json(folder / name, SAYS, CHECKPOINT)
            names = (name.rstrip('?') for name in SAYS)
            says |= {name: found[name] for name in names if found.get(name) is not None}
    says['is_gpt2'] = is_in_folder and says.get('tokenizer_class', GPT2_CLASSES[0]) in GPT2_CLASSES
    library = open_json(file, says) if file.is_file() else open_pair(folder, says)
    library.no_truncation()  # a tokenizer.json may ask for both
    library.no_padding()
    add_special(library, says)
    (eot, *more), (bos, *_) = (ids_of(role, says, library) for role in ('eos_token', 'bos_token'))
    vocabulary = ForeignBPE(f'bpe:{library.get_vocab_size()}', library, eot, bos, more)
    content = json.loads(library.to_str())
    words = content['pre_tokenizer'] | {'trim_offsets': True}
    if not (content['model']['type'] == 'BPE' and not content['model']['dropout'] and content['normalizer'] is None
            and words == {'type': 'ByteLevel', 'add_prefix_space': words['add_prefix_space'], 'trim_offsets': True,
                          'use_regex': True} and set(vocabulary.pieces) >= tokenizer.BYTES):
        raise ValueError('it is of another kind')
    return vocabulary


def add_special(library: 'tokenizers.Tokenizer', says: dict[str, Any]) -> None:
    """Make the tokens special that the settings call special. Add those that the vocabulary lacks, as far as the model
    has ids for them. A token that was added before keeps its flags."""
    for _, token in sorted(says.get('added_tokens_decoder', {}).items(), key=lambda item: int(item[0])):
        if library.token_to_id(token['content']) is None and has_room(library, says):
            library.add_tokens([added_token(token, token.get('special', False))])
    for token in special_tokens(says):
        before = {known.content: known for known in library.get_added_tokens_decoder().values()}.get(token.content)
        if before is not None:
            before.special = True
        if before is not None or library.token_to_id(token.content) is not None or has_room(library, says):
            library.add_special_tokens([before or token])


def has_room(library: 'tokenizers.Tokenizer', says: dict[str, Any]) -> bool:
    """Return whether the model has an id for one more token."""
    return bool(library.get_vocab_size() < says.get('vocab_size', 0))


def open_json(file: Path, says: dict[str, Any]) -> 'tokenizers.Tokenizer':
    """Read tokenizer.json. The class that transformers has for GPT-2 takes the file's vocabulary and added tokens, but
    cuts words in its own way."""
    library = tokenizer.open_library(file.read_text(encoding='utf-8'))
    if says['is_gpt2']:
        model = json.loads(library.to_str())['model']
        merges = [tuple(pair) for pair in model['merges']]
        plain = byte_level(model['vocab'], merges, '', bool(says.get('add_prefix_space')), ignores_merges=False)
        library.model, library.pre_tokenizer, library.decoder = plain.model, plain.pre_tokenizer, plain.decoder
    return library


def open_pair(folder: Path, says: dict[str, Any]) -> 'tokenizers.Tokenizer':
    """Read vocab.json and merges.txt, and the added tokens, in the order of their ids."""
    import tokenizers

    ids, merges = tokenizers.models.BPE.read_file(str(folder / 'vocab.json'), str(folder / 'merges.txt'))
    library = byte_level(ids, merges, '', bool(says.get('add_prefix_space')), ignores_merges=False)
    added = says.get('added_tokens_decoder', {})
    if 'added_tokens_decoder' not in says and (folder / 'added_tokens.json').is_file():
        names = schema.read_json(folder / 'added_tokens.json', {str: schema.COUNT}, CHECKPOINT)
        special = {token.content for token in special_tokens(says)}
        added = {str(i): {'content': name, 'special': name in special} for name, i in names.items()}
    for _, token in sorted(added.items(), key=lambda item: int(item[0])):
        library.add_tokens([added_token(token, token.get('special', False))])
    return library


def special_tokens(says: dict[str, Any]) -> Iterator['tokenizers.AddedToken']:
    """Yield the tokens that the settings call special."""
    tokens = dict.fromkeys(ROLES[:3], END_OF_TEXT) if says['is_gpt2'] else {}
    tokens |= {role: says[role] for role in ROLES if role in says}
    more = (says.get(name, ()) for name in MORE)
    listed = (token for some in more for token in (some.values() if isinstance(some, dict) else some))
    for token in (*tokens.values(), *listed):
        yield added_token(token, True)


def added_token(token: str | dict[str, Any], special: bool) -> 'tokenizers.AddedToken':
    import tokenizers

    known = token if isinstance(token, dict) else {'content': token}
    flags = {flag: known[flag] for flag in FLAGS if flag in known}  # normalized: matched after the others
    return tokenizers.AddedToken(known['content'], **{'normalized': not special} | flags, special=special)


def ids_of(role: str, says: dict[str, Any], library: 'tokenizers.Tokenizer') -> list[Any]:
    """Return the ids of the tokens that begin or end a text: those at which transformers' `generate` stops, or else the
    one that the tokenizer names, or else <|endoftext|>; [None] if there is none."""
    given = says.get(f'{role}_id')
    known = [i for i in (given if isinstance(given, list) else [given]) if i is not None and library.id_to_token(i)]
    token = says.get(role, END_OF_TEXT)
    named = library.token_to_id(token if isinstance(token, str) else token['content'])
    return list(dict.fromkeys(known)) or [library.token_to_id(END_OF_TEXT) if named is None else named]
