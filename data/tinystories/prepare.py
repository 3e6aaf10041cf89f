"""
TinyStories, two million short stories in the words of a small child, in 4096 tokens learned from them: a first BPE run.

    python data/tinystories/prepare.py
    python data/tinystories/prepare.py --input=train.parquet --val_input=validation.parquet      files on this machine

Downloads one gigabyte. The dataset's own 21,990 stories for validation are kept apart. Each story is followed by the
end-of-text token.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

import configurator
from plaingpt import console
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.download import fetch_hub_files, find_hub_files
from plaingpt.corpus.folder import folder_for, next_steps
from plaingpt.encoder import encoder_for
from plaingpt.errors import COMMAND, DATA, UserError, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
source: str = 'roneneldan/TinyStories'  # a dataset of parquet files on the Hugging Face hub, or a folder with some
revision: str = ''  # of that dataset; '' is its newest
input: str = ''  # .jsonl or .parquet files on this machine instead: a file, a folder or a glob
val_input: str = ''  # the same, for validation
column: str = 'text'  # where the text stands in them
tokenizer: str = 'bpe:4096'  # learned from the training stories; or 'byte', 'char', 'gpt2', another name of tiktoken's
num_proc: int = 0  # processes that tokenise; 0 is one for each core
to_dir: str = ''  # the folder to write; '' is data/tinystories
# ------------------------------------------------------------------------------------------------


def find_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files for training and those for validation. A file that comes from a URL is kept in `folder`."""
    if input:
        return documents.find_files(input, folder), documents.find_files(val_input, folder, '--val_input')
    train, val = (find_hub_files(source, '', revision, split) for split in ('train', 'validation'))
    return fetch_hub_files(train), fetch_hub_files(val)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    folder = folder_for('tinystories', to_dir)
    if bool(input) != bool(val_input):
        raise UserError('give --input=PATH and --val_input=PATH together; without them both are downloaded', COMMAND)
    train, val = ([piece for file in files for piece in documents.find_pieces(file, column)]
                  for files in find_files(folder))
    n_train, n_val = tokenise.count_documents(train), tokenise.count_documents(val)
    console.say(f'found: stories {n_train:,}, for validation {n_val:,}')
    if not n_train or not n_val:
        raise UserError(f'{input or source} holds no stories to train on, or none for validation', DATA)

    parts, validation = [*train, *val], np.arange(n_train, n_train + n_val)
    encoder = encoder_for(tokenizer, lambda: tokenise.build_tokenizer(tokenizer, parts, validation, eot=True))
    tokenise.write_corpus(folder, tokenise.Packer(encoder, encoder.eot, keep_empty=False), parts, validation,
                        input or f'{source}@{revision or "main"}', num_proc)
    console.say(next_steps(folder, 'train_tinystories', 'tinystories', 'out-tinystories'))


if __name__ == '__main__':
    run(main)
