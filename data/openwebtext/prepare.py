"""
OpenWebText, the public copy of GPT-2's training text, in GPT-2's tokens: 9,035,582,198 for training and 4,434,897 for
validation, from 8,013,769 documents, each followed by the end-of-text token.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --input='/data/owt/*.parquet'      .parquet or .jsonl files on this machine

Downloads 24 GB once (into Hugging Face's cache, which resumes) and writes 18 GB. Memory holds a few megabytes for each
process, the numbers of the documents while the split is drawn (8 bytes each), and the validation documents' tokens.

The split is nanoGPT's, train_test_split(test_size=0.0005, seed=2357): the same documents. val.bin is also the same byte
for byte, since it keeps the drawn order; train.bin keeps the order of the source, as training shuffles its windows.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from plaingpt import console
from plaingpt.corpus import documents, tokenise
from plaingpt.corpus.download import fetch_hub_files, find_hub_files
from plaingpt.corpus.folder import folder_for, next_steps
from plaingpt.corpus.tokenizer import build
from plaingpt.encoder import encoder_for
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
source: str = 'Skylion007/openwebtext'  # a dataset of parquet files on the Hugging Face hub, or a folder with some
revision: str = '79d93d786212f7344586290adb811d4ae6a1762c'  # of that dataset; '' is its newest
input: str = ''  # .jsonl or .parquet files on this machine instead: a file, a folder or a glob
column: str = 'text'  # where the text stands in them
tokenizer: str = 'gpt2'  # or another name of tiktoken's, 'byte', or the path of a run or model that has one
val_fraction: float = 0.0005  # of the documents, set aside for validation
seed: int = 2357  # decides which documents these are
num_proc: int = 0  # processes that tokenise; 0 is one for each core
to_dir: str = ''  # the folder to write; '' is data/openwebtext
# ------------------------------------------------------------------------------------------------


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    folder = folder_for('openwebtext', to_dir)
    encoder = encoder_for(tokenizer, lambda: build(tokenizer, list, eot=True))
    if input:
        files = documents.find_files(input, folder)
    else:
        files = fetch_hub_files(find_hub_files(source, '', revision))
    pieces = [piece for file in files for piece in documents.find_pieces(file, column)]
    n_documents = tokenise.count_documents(pieces)
    console.say(f'found: files {len(files):,}, documents {n_documents:,}')

    validation = tokenise.choose_validation(n_documents, val_fraction, seed)
    tokenise.write_corpus(folder, tokenise.Packer(encoder, encoder.eot), pieces, validation,
                        input or f'{source}@{revision or "main"}', num_proc)
    console.say(next_steps(folder, 'train_gpt2', 'openwebtext', 'out', takes_long=True))


if __name__ == '__main__':
    run(main)
