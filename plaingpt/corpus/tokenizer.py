"""Tokenizers: text <-> ids. There are four kinds of vocabulary: characters, bytes, a byte-pair encoding trained on the
text, and tiktoken's.

    build('bpe:1024', texts, eot=True)     makes the tokenizer of a text, while it is being prepared
    tokenizer.state()                      travels in the checkpoint; from_state(state) needs no file and no network
    tokenizer.reference()                  is what meta.json keeps: the same, but only the name of a tiktoken vocabulary
"""
import base64
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from plaingpt.errors import COMMAND, DATA, UserError, first_line, refusal
from plaingpt.schema import COUNT, faults, parse

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = '<|endoftext|>'
SMALLEST_BPE = 257  # every byte, and the end of a text
LARGEST_BPE = 10**6  # trainers set memory aside for as many
GPT2_PATTERNS = (  # how GPT-2 cuts text into words, in two forms: the published one, and tiktoken's, which is faster
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
)
CUT_ALIKE = ('cl100k_base', 'o200k_base', 'o200k_harmony')  # like GPT-2's, their patterns join no word to a next space
PART = 1 << 18  # characters of a text that a library is given at once, or a few more
LONGEST = 1_000_000  # characters: tiktoken panics over a longer run of spaces, and libraries take much memory for it
LEARNED = 1000  # characters of a word that a vocabulary learns from, as the time for it grows with their square
PLACE = re.compile(r'(?<=\S) ')  # a space after anything else begins a new word, so a cut there changes no id
LONG_WORD = re.compile(rf'\S{{{LEARNED}}}|\s{{{LEARNED}}}')
STATE = (  # the shapes of a tokenizer's `reference()` and `state()`
    {'name': str},
    {'name': {'char'}, 'characters': str, 'eot': bool},
    {'name': {'byte'}, 'eot': bool},
    {'name': str, 'json': str, 'eot?': (), 'bos?': ()},
    {'name': str, 'json': str, 'eot': (COUNT, None), 'bos': (COUNT, None), 'stops?': [COUNT, ...]},
    {'name': str, 'pattern': str, 'ranks': str, 'special_tokens': {str: COUNT}})
LIBRARY = {'model': {  # a byte-pair encoding of bytes, as the library `tokenizers` keeps it
    'type': {'BPE'}, 'vocab': {str: COUNT}, 'continuing_subword_prefix?': ({''}, None),
    'end_of_word_suffix?': ({''}, None)}}
BYTES = set(map(bytes, zip(range(256), strict=True)))  # each byte alone: with all of them any text has ids
MOST_IDS = 1 << 22  # that a vocabulary may have


class Unavailable(UserError):
    """A vocabulary of tiktoken's whose files are not available on this machine."""


class Tokenizer(ABC):
    """A vocabulary, and the way from text to ids and back. `pieces` holds the UTF-8 bytes of every id; `eot` is the id
    that ends a document, None if there is none; `bos` is the one that begins it, which differs only in tokenizers of
    other projects."""

    def __init__(self, name: str, pieces: list[bytes], eot: int | None) -> None:
        self.name, self.pieces, self.eot, self.bos = name, pieces, eot, eot
        self.special = {eot}  # ids that stand for no text
        self.may_cut = True  # if `parts_of` cuts a long text, its ids stay the same
        self.has_words = True  # so that a cut within a word would change its ids

    @property
    def n_vocab(self) -> int:
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text: the name of a special token in it is text like any other."""

    def encode_batch(self, texts: list[str]) -> Iterable[npt.NDArray[np.uint32]]:
        """Return the ids of each text, as `encode` gives them, in arrays."""
        return (np.array(self.encode(text), dtype=np.uint32) for text in texts)

    def encode_prompt(self, text: str) -> list[int]:
        """Return what `encode` does, but a literal <|endoftext|> becomes `eot`, if there is one."""
        if self.eot is None:
            return self.encode(text)
        ids: list[int] = []
        for part in text.split(END_OF_TEXT):
            ids += [self.eot, *self.encode(part)]
        return ids[1:]  # `eot` stands between the parts, and not before the first

    @property
    def stops(self) -> tuple[int, ...]:
        """Return the ids at which a text may end: `eot`, and more in some tokenizers of other projects."""
        return () if self.eot is None else (self.eot,)

    def parts(self, text: str) -> Iterable[str]:
        """Return a text in parts that may be encoded one after the other."""
        return parts_of([text]) if self.may_cut else [text]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of `ids`; a few ids may well end in the middle of a character."""
        return b''.join(self.pieces[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def token_sizes(self) -> list[int]:
        """Return the number of UTF-8 bytes that each id stands for, 0 for the end of a document; bits per byte divide
        by it."""
        return [0 if i in self.special else len(piece) for i, piece in enumerate(self.pieces)]

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return all that `from_state` needs, in plain Python values."""

    def reference(self) -> dict[str, Any]:
        """Return what meta.json keeps, in values that JSON can hold."""
        return self.state()

    @abstractmethod
    def to_huggingface(self) -> 'tokenizers.Tokenizer':
        """Return the same vocabulary in the form that Hugging Face's libraries load. As in `encode_prompt`, the name of
        a special token stands for its id."""


class Characters(Tokenizer):
    """One id for every character that the text holds, in the order of their code points, as nanoGPT has it."""

    def __init__(self, characters: str, eot: bool) -> None:
        pieces = [character.encode('utf-8') for character in characters] + [END_OF_TEXT.encode()] * eot
        super().__init__('char', pieces, len(characters) if eot else None)
        self.has_words = False
        self.characters = characters
        self.id_of = {character: i for i, character in enumerate(characters)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self.id_of[character] for character in text]
        except KeyError as error:
            position = text.index(error.args[0])
            raise UserError(f'character {error.args[0]!r} (position {position} of the text) is not among the '
                            f'{len(self.characters)} of the vocabulary, which has those of its own text:\n'
                            f'{self.characters[:100]!r}', DATA) from None

    def state(self) -> dict[str, Any]:
        return {'name': self.name, 'characters': self.characters, 'eot': self.eot is not None}

    def to_huggingface(self) -> 'tokenizers.Tokenizer':
        """Return a vocabulary in which an unknown character is an error, too, as it has no id."""
        import tokenizers

        # the library wants a token for unknown characters: this one is in no vocabulary, and so it raises an error
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel(self.id_of, unk_token=END_OF_TEXT * 2))
        library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
        library.decoder = tokenizers.decoders.Fuse()
        library.add_special_tokens([END_OF_TEXT] if self.eot is not None else [])
        return library


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8: any text, nothing to train, long sequences."""

    def __init__(self, eot: bool) -> None:
        pieces = [bytes([i]) for i in range(256)] + [END_OF_TEXT.encode()] * eot
        super().__init__('byte', pieces, 256 if eot else None)
        self.has_words = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode('utf-8'))

    def state(self) -> dict[str, Any]:
        return {'name': self.name, 'eot': self.eot is not None}

    def to_huggingface(self) -> 'tokenizers.Tokenizer':
        """Return a byte-pair encoding without any pairs."""
        library = byte_level(bytes_of_printable_alphabet(), [])
        library.add_special_tokens([END_OF_TEXT] if self.eot is not None else [])
        return library


class TrainedBPE(Tokenizer):
    """GPT-2's kind of byte-pair encoding; the library `tokenizers` learns its merges from the text itself."""

    def __init__(self, name: str, library: 'tokenizers.Tokenizer') -> None:
        byte_of = bytes_of_printable_alphabet()
        added = {token.content for token in library.get_added_tokens_decoder().values()}  # such as <|endoftext|>
        vocabulary = sorted(library.get_vocab().items(), key=lambda item: item[1])
        if [i for _, i in vocabulary] != list(range(len(vocabulary))):
            raise ValueError('its ids have gaps')
        pieces = [token.encode() if token in added else bytes(byte_of[symbol] for symbol in token)
                  for token, _ in vocabulary]
        super().__init__(name, pieces, library.token_to_id(END_OF_TEXT))
        self.library = library
        self.library.encode_special_tokens = True  # that is: as ordinary text

    @classmethod
    def train(cls, name: str, texts: Iterable[str], n_vocab: int) -> 'TrainedBPE':
        """Learn at most `n_vocab` ids: a small text may hold too few pairs of neighbours for that many."""
        import tokenizers

        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=n_vocab - 1, initial_alphabet=alphabet, show_progress=False)  # one id is for the end of a text
        parts = (part for text in texts for whole in parts_of([text]) for part in without_long_words(whole))
        library.train_from_iterator(parts, trainer)
        library.add_special_tokens([END_OF_TEXT])
        return cls(name, library)

    def encode(self, text: str) -> list[int]:
        return [i for part in self.parts(text) for i in self.library.encode(part, add_special_tokens=False).ids]

    def encode_batch(self, texts: list[str]) -> Iterable[npt.NDArray[np.uint32]]:
        short = [text for text in texts if len(text) <= PART]  # `encode` cuts the others
        encoded = iter(self.library.encode_batch_fast(short, add_special_tokens=False))  # without offsets in the text
        return (np.array(next(encoded).ids if len(text) <= PART else self.encode(text), dtype=np.uint32)
                for text in texts)

    def state(self) -> dict[str, Any]:
        return {'name': self.name, 'json': self.library.to_str()}

    def to_huggingface(self) -> 'tokenizers.Tokenizer':
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.library.to_str())


class ForeignBPE(TrainedBPE):
    """A byte-pair encoding of another project. It gives the ids that transformers gives: the names of added tokens,
    special or not, stand for these tokens in any text."""

    def __init__(self, name: str, library: 'tokenizers.Tokenizer', eot: int | None, bos: int | None,
                 more: Sequence[int] = ()) -> None:
        super().__init__(name, library)
        self.more = tuple(more)  # ids that end a text as well
        library.encode_special_tokens = False  # that is: names of special tokens become their ids
        added = library.get_added_tokens_decoder()
        if max(eot or 0, bos or 0, *self.more) >= self.n_vocab:
            raise ValueError('the token that begins a text, or ends one, is unknown')
        self.eot, self.bos = eot, bos
        self.special = {i for i, token in added.items() if token.special}
        self.prefixes_space = bool(json.loads(library.to_str())['pre_tokenizer']['add_prefix_space'])
        begins = library.encode('').ids  # the ids that it puts before a text, or after it
        names = {token.content for token in added.values()}
        ends = {eot, bos, library.token_to_id(END_OF_TEXT)}
        # like GPT-2's, but for the vocabulary
        self.is_plain = names == {END_OF_TEXT} and len({*ends, *more}) == 1 and not begins and not self.prefixes_space
        reaches_out = (token for token in added.values() if token.lstrip or token.rstrip or token.single_word
                       or re.search(r'\s', token.content))  # its match depends on text beyond its name, or may be cut
        self.may_cut = not self.prefixes_space and not any(reaches_out)

    def token_sizes(self) -> list[int]:
        """Return the bytes of each id. The names of special tokens may stand in a text here, and so count, but for
        those that begin and end it."""
        ends = {self.eot, self.bos} & self.special
        return [0 if i in ends else len(piece) for i, piece in enumerate(self.pieces)]

    @property
    def stops(self) -> tuple[int, ...]:
        return (*super().stops, *self.more)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that transformers gives for a text, with those that it puts before and after it."""
        return list(self.library.encode(text).ids)

    def state(self) -> dict[str, Any]:
        more = {'stops': list(self.stops)} if self.more else {}
        return super().state() | ({} if self.is_plain else {'eot': self.eot, 'bos': self.bos} | more)


class Tiktoken(Tokenizer):
    """A published vocabulary: 'gpt2', 'cl100k_base' and others. Ids that it leaves unused stand for no bytes."""

    def __init__(self, library: 'tiktoken.Encoding') -> None:
        special = library._special_tokens
        token_of = {i: token for token, i in library._mergeable_ranks.items()}
        token_of |= {i: token.encode('utf-8') for token, i in special.items()}
        super().__init__(library.name, [token_of.get(i, b'') for i in range(library.n_vocab)], special.get(END_OF_TEXT))
        self.special.update(special.values())
        self.library = library
        self.may_cut = library._pat_str in GPT2_PATTERNS or library.name in CUT_ALIKE

    def encode(self, text: str) -> list[int]:
        return np.concatenate(list(self.encode_batch([text]))).tolist()

    def encode_batch(self, texts: list[str]) -> Iterable[npt.NDArray[np.uint32]]:
        for text in texts:
            yield np.concatenate([self.encode_part(part) for part in self.parts(text)])

    def encode_part(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self.library.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:  # a panic of Rust is not an Exception, and its class cannot be imported
            if type(error).__name__ != 'PanicException' and not isinstance(error, ValueError):
                raise
            raise UserError(f"the tokenizer '{self.name}' cannot encode a text of {len(text):,} characters, perhaps a "
                            f'long run of spaces in it: {first_line(error)}', DATA) from None

    def state(self) -> dict[str, Any]:
        """Return the ranks in the form of tiktoken's own files: a token in base 64 and its rank on every line."""
        ranks = sorted(self.library._mergeable_ranks.items(), key=lambda item: item[1])
        lines = (f'{base64.b64encode(token).decode()} {rank}' for token, rank in ranks)
        return {'name': self.name, 'pattern': self.library._pat_str, 'ranks': '\n'.join(lines),
                'special_tokens': dict(self.library._special_tokens)}

    def reference(self) -> dict[str, Any]:
        return {'name': self.name}

    def to_huggingface(self) -> 'tokenizers.Tokenizer':
        """Return the same vocabulary, with the pattern in another dialect of regular expressions: there {1,3}+ repeats
        the repetition, and $ is the end of a line."""
        symbol_of = {byte: symbol for symbol, byte in bytes_of_printable_alphabet().items()}
        ranks, special = self.library._mergeable_ranks, self.library._special_tokens
        names = {token: ''.join(symbol_of[byte] for byte in token) for token in ranks}
        merges = [(names[left], names[right]) for left, right in merges_of(ranks)]
        pattern = re.sub(r'(\{\d+,\d+\})\+', r'\1', self.library._pat_str).replace('$', r'\z')
        library = byte_level({names[token]: rank for token, rank in ranks.items()} | special, merges,
                             '' if is_gpt2_like(self) else pattern)
        library.add_special_tokens(list(special))
        return library


def parts_of(blocks: Iterable[str]) -> Iterator[str]:
    """Yield a long text, which comes in blocks, in parts whose ids, one after the other, are those of the whole. This
    holds for GPT-2's pattern of words and for those of CUT_ALIKE: the text is cut before a space that follows anything
    else; if there is none for LONGEST characters, it is cut after them, and the ids may change."""
    text = ''
    for block in chain(blocks, [None]):  # None: there are no more
        text, start = text + (block or ''), 0
        # until the last block it looks LONGEST characters ahead, so that the cuts do not depend on the blocks
        while len(text) - start > (PART if block is None else LONGEST):
            place = PLACE.search(text, start + PART, start + LONGEST)
            stop = place.start() if place else start + LONGEST
            if stop >= len(text):
                break
            if not place:  # a long word follows: cut before it, at the last place there is, so that it fits into a part
                stop = max((place.start() for place in PLACE.finditer(text, start + 1, start + PART)), default=stop)
            yield text[start:stop]
            start = stop
        text = text[start:]
    yield text


def count_hard_cuts(text: str, ends: bool) -> int:
    """Return how often `parts_of` cuts through a word in this text, which may continue after it unless it `ends`."""
    if len(text) < LONGEST:
        return 0
    sizes = [len(part) for part in parts_of([text])]
    return (sizes[:-1] if ends else sizes).count(LONGEST)


def without_long_words(text: str) -> Iterator[str]:
    """Yield a text in parts that cut each word of more than LEARNED characters."""
    ends = [0, *(match.end() for match in LONG_WORD.finditer(text)), len(text)]
    return (text[start:stop] for start, stop in pairwise(ends))


def model_vocab_size(n_vocab: int) -> int:
    """Return how many ids a model has rows for: a large vocabulary is rounded up to a multiple of 128, since matrices
    of round sizes multiply faster (GPT-2's 50257 become 50304)."""
    return n_vocab if n_vocab < 4096 else -(-n_vocab // 128) * 128


def bytes_of_printable_alphabet() -> dict[str, int]:
    """Return GPT-2's way to write bytes: a printable byte is its Latin-1 character, the n-th of the others is chr(256 +
    n)."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def is_gpt2_like(vocabulary: Tokenizer) -> bool:
    """Return whether text is cut into words as GPT-2 cuts it, and words are then merged from bytes. For Bytes, which
    merge nothing, the cut makes no difference."""
    if isinstance(vocabulary, Tiktoken):
        return vocabulary.library._pat_str in GPT2_PATTERNS
    return isinstance(vocabulary, TrainedBPE | Bytes) and not (
        isinstance(vocabulary, ForeignBPE) and vocabulary.prefixes_space)


def byte_level(ids: dict[str, int], merges: list[tuple[str, str]], pattern: str | None = None,
               prefixes_space: bool = False, ignores_merges: bool = True) -> 'tokenizers.Tokenizer':
    """Return a byte-pair encoding with GPT-2's way to write bytes. `pattern` matches the words, each of which is
    encoded on its own; '' is GPT-2's, and None takes the text as one word. With `ignores_merges`, a whole word that is
    a token becomes that token, even if no merges lead to it."""
    import tokenizers

    model = tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=ignores_merges and pattern is not None)
    library = tokenizers.Tokenizer(model)
    bytes_of = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefixes_space, use_regex=pattern == '')
    library.pre_tokenizer = bytes_of
    if pattern:
        words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
        library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, bytes_of])
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def merges_of(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """Yield the two parts that each token of a byte-pair encoding was made from, in the order of learning: they are
    what is left of the token when all tokens that were learned before it are merged."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            first = pairs.index(min(pairs))
            if pairs[first] == rank:
                break  # no merges lead there: such a token is only ever a whole word
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def load_tiktoken(name: str) -> Tiktoken:
    """Load a vocabulary that tiktoken knows by name; tiktoken downloads the files of one that it has not met before."""
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise Unavailable(f"tokenizer '{name}' is unknown; it may be 'char', 'byte', 'bpe:N' with a number N,\n"
                        f"or one of tiktoken's: {', '.join(known)}", COMMAND)
    try:
        return Tiktoken(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        refused = refusal(error, f"tiktoken cannot get the files of '{name}'", DATA,
                          'connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds them')
        raise Unavailable(str(refused), refused.code) from error


def build(spec: str, texts: Callable[[], Iterable[str]], eot: bool) -> Tokenizer:
    """Return the tokenizer that `spec` names: 'char', 'byte', 'bpe:N' or a name that tiktoken knows. `texts()` iterates
    over the training text, for tokenizers that learn from it. `eot` asks char and byte for one more id, the end of a
    document."""
    if spec == 'char':
        return Characters(''.join(sorted(set(chain.from_iterable(texts())))), eot)
    if spec == 'byte':
        return Bytes(eot)
    if spec.startswith('bpe:'):
        size = spec.removeprefix('bpe:')
        if not re.fullmatch(r'\d{1,9}', size) or not SMALLEST_BPE <= int(size) <= LARGEST_BPE:
            raise UserError(f"tokenizer '{spec}': N of 'bpe:N' is a number of ids, {SMALLEST_BPE} or more, and at most "
                            f'{LARGEST_BPE}', COMMAND)
        return TrainedBPE.train(spec, texts(), int(size))
    return load_tiktoken(spec)


def from_state(state: dict[str, Any], code: int = DATA) -> Tokenizer:
    """Return the tokenizer whose `state()`, or `reference()`, this is. Raise UserError, with this code, if it is
    damaged, and Unavailable if the files that it refers to are not available."""
    try:
        vocabulary = rebuild(state)
        if not (vocabulary.pieces if isinstance(vocabulary, Characters) else set(vocabulary.pieces) >= BYTES):
            raise ValueError('it lacks characters or bytes')
    except Unavailable as error:
        raise Unavailable(str(error), code) from None
    except ModuleNotFoundError:
        raise
    except Exception as error:  # two libraries raise errors of their own
        raise UserError(f"the tokenizer '{state['name']}' is damaged: {first_line(error)}", code) from None
    return vocabulary


def open_library(text: str) -> 'tokenizers.Tokenizer':
    """Return a byte-pair encoding from the form in which the library `tokenizers` keeps it. Raise whatever that raises
    if it is damaged, and ValueError for damage over which it would panic."""
    import tokenizers

    if fault := next(faults(parse(text), LIBRARY, ''), None):
        raise ValueError(fault)
    return tokenizers.Tokenizer.from_str(text)


def rebuild(state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a state that is one of STATE. Raise whatever its library raises if it is damaged."""
    match state:
        case {'name': 'char', 'characters': characters, 'eot': eot}:
            return Characters(characters, eot)
        case {'name': 'byte', 'eot': eot}:
            return Bytes(eot)
        case {'name': name, 'json': text, 'eot': eot, 'bos': bos}:
            return ForeignBPE(name, open_library(text), eot, bos, state.get('stops', [])[1:])
        case {'name': name, 'json': text}:
            return TrainedBPE(name, open_library(text))
        case {'name': name, 'ranks': ranks, 'pattern': pattern, 'special_tokens': special}:
            import tiktoken

            lines = (line.split() for line in ranks.splitlines())
            rank_of = {base64.b64decode(token): int(rank) for token, rank in lines}
            ids = [*rank_of.values(), *special.values()]
            if len(set(ids)) < len(ids) or max(ids) >= MOST_IDS:  # its library would panic over these
                raise ValueError('an id occurs twice, or is too large')
            return Tiktoken(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=rank_of, special_tokens=special))
    return load_tiktoken(state['name'])
