"""
Your own text -> data/<name>/train.bin, val.bin and meta.json.

    python data/text/prepare.py --input=book.txt --tokenizer=char --name=book
    python data/text/prepare.py --input='posts/*.jsonl' --column=body --tokenizer=bpe:4096 --name=posts
    python data/text/prepare.py --input=https://example.org/part.parquet --tokenizer=gpt2 --name=part

A .txt file is one document, and so is any other file that is named outright, and each row of a .jsonl or .parquet file.
The split is by document, with an end-of-text token after each. A single document is split by position instead, and has
no end-of-text token, since nothing follows it. Empty documents are left out.
"""
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import configurator
from plaingpt import console
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.folder import folder_for, next_steps
from plaingpt.encoder import encoder_for
from plaingpt.errors import COMMAND, DATA, UserError, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
input: str = ''  # a file, a folder, a glob or a URL: .txt, .jsonl and .parquet, also packed as .gz, .bz2 or .xz
val_input: str = ''  # the same, for validation; '' sets a part of the input aside
val_fraction: float = 0.1  # of the documents, or of the characters of a single one, that is set aside for validation
seed: int = 2357  # decides which documents these are
column: str = 'text'  # where the text stands in .jsonl and .parquet files
# 'char', 'byte', 'bpe:N' (N ids, trained on this text), 'gpt2' or another name of tiktoken's; or the path of a run, a
# model's folder or a tokenizer.json that has one
tokenizer: str = 'gpt2'
name: str = 'text'  # the corpus is written to data/<name>
to_dir: str = ''  # the folder to write; '' is data/<name>
num_proc: int = 0  # processes that tokenise; 0 is one for each core
# ------------------------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if not input:
        raise UserError('which text? give --input=PATH: a file, a folder, a glob or a URL', COMMAND)
    folder = folder_for('text', to_dir, name)
    train_files = documents.find_files(input, folder)
    val_files = documents.find_files(val_input, folder, '--val_input') if val_input else []
    train, val = ([piece for file in files for piece in documents.find_pieces(file, column)]
                  for files in (train_files, val_files))
    texts, n_val = tokenise.numbers_of_texts(train), tokenise.count_documents(val)  # the others are empty
    n_train = len(texts)
    console.say(f'found: files {len(train_files) + len(val_files):,}, documents {n_train + n_val:,}')
    if n_train == 0:
        raise UserError(f'--input={input} holds no documents', DATA)

    parts: Sequence[tokenise.Part] = [*train, *val]
    by_position = n_train == 1 and not val_files
    if by_position:
        console.say(f'a single document: the last {val_fraction:.0%} of its characters are for validation')
        parts, validation = tokenise.split_document(train, int(texts[0]), val_fraction)
    elif val_files:
        validation = tokenise.count_documents(train) + np.arange(n_val)
    else:
        validation = texts[np.sort(tokenise.choose_validation(n_train, val_fraction, seed))]

    encoder = encoder_for(tokenizer, lambda: tokenise.build_tokenizer(tokenizer, parts, validation,
                                                                      eot=n_train > 1 or n_val > 1))
    if (n_train > 1 or n_val > 1) and encoder.eot is None:
        console.say(f"the tokenizer '{encoder.name}' has no token that ends a document: none stands between them")
    packer = tokenise.Packer(encoder, None if by_position else encoder.eot, keep_empty=False)
    tokenise.write_corpus(folder, packer, parts, validation, input, num_proc)
    console.say(next_steps(folder, 'train_stdlib', 'stdlib', 'out-stdlib', run=f'out-{folder.absolute().name}'))


if __name__ == '__main__':
    run(main)
