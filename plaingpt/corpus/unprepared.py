"""A text that no prepare.py has seen, tokenised on the spot, so that any model can be measured on it."""
from contextlib import closing
from pathlib import Path

import numpy as np

from plaingpt import console
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.folder import SUFFIXES, data_folder, is_prepared
from plaingpt.corpus.token_files import TokenFile
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import DATA, UserError
from plaingpt.paths import is_url, matching


def is_unprepared(dataset: str) -> bool:
    """Return whether `dataset` names text, and not a corpus: a file, a glob, a folder of texts, or a URL."""
    path, of_data = Path(dataset), data_folder(dataset)
    if is_url(dataset):
        return True
    if not dataset or path.suffix in SUFFIXES or is_prepared(path) or (of_data != path and of_data.exists()):
        return False
    if path.is_dir():
        return any(documents.kind_of(file.name) in documents.KINDS for file in path.rglob('*'))
    return bool(matching(path)) or documents.kind_of(dataset) in documents.KINDS


def open_text(dataset: str, column: str, vocabulary: Tokenizer, block_size: int, folder: Path) -> TokenFile:
    """Return the tokens of all documents. If there are several, each ends with the end-of-text token. The tokens are
    written to `folder`. Raise UserError if the text cannot be read, or is too short for one window."""
    pieces = [piece for file in documents.find_files(dataset, folder, '--dataset')
              for piece in documents.find_pieces(file, column)]
    n_texts = len(tokenise.numbers_of_texts(pieces))
    packer = tokenise.Packer(vocabulary, vocabulary.eot if n_texts > 1 else None, keep_empty=False)
    batches = tokenise.make_batches(pieces, np.array([], dtype=np.int64), vocabulary.may_cut)  # none for validation
    path = folder / 'text'
    n_tokens = n_bytes = 0
    with open(path, 'wb') as file, closing(tokenise.tokenise(batches, packer, num_proc=1)) as results:
        for done in results:
            n_bytes += done.train.n_bytes
            n_tokens += file.write(done.train.tokens) // packer.dtype.itemsize
    if n_tokens <= block_size:
        raise UserError(f'{dataset} has {n_tokens} tokens: too few for a window of block_size + 1 = {block_size + 1}\n'
                        'give a longer text', DATA)
    console.say(f'{dataset}: documents {n_texts:,}, bytes {n_bytes:,}, tokens of {vocabulary.name} {n_tokens:,}')
    return TokenFile(path, packer.dtype.name)
