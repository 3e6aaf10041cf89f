"""
FineWeb-Edu, educational web pages, in GPT-2's tokens: about 10 billion of them from the sample of that size, in shards
of 100 million. The first shard is for validation. Each document begins with the end-of-text token.

    python data/fineweb_edu/prepare.py
    python data/fineweb_edu/prepare.py --config=sample-100BT --name=fineweb_edu_100bt
    python data/fineweb_edu/prepare.py --input='/data/fineweb/*.parquet'      .parquet or .jsonl files on this machine

Whatever interrupts it, the same command continues after the last complete shard. Files are fetched one after the other
(28 GB in all, into Hugging Face's cache), each while the one before it is tokenised; 20 GB are written. A process takes
about 130 MB of memory, however long the corpus is.

val_000000.bin, train_000001.bin, ... are in llm.c's format: build-nanogpt's, llm.c's and modded-nanogpt's sequence of
tokens, in files that train.py, llm.c and modded-nanogpt read.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import configurator
from plaingpt import console
from plaingpt.corpus import documents, shards, tokenise
from plaingpt.corpus.download import fetch_hub_files, find_hub_files
from plaingpt.corpus.folder import folder_for, next_steps
from plaingpt.corpus.tokenizer import build
from plaingpt.encoder import encoder_for
from plaingpt.errors import COMMAND, UserError, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
source: str = 'HuggingFaceFW/fineweb-edu'  # a dataset of parquet files on the Hugging Face hub, or a folder with some
config: str = 'sample-10BT'  # of that dataset: 'sample-100BT', 'sample-350BT', 'default' ...; '' is its only one
revision: str = ''  # of that dataset; '' is its newest
input: str = ''  # .jsonl or .parquet files on this machine instead: a file, a folder or a glob
column: str = 'text'  # where the text stands in them
tokenizer: str = 'gpt2'  # or another name of tiktoken's, 'byte', or the path of a run or model that has one
shard_size: int = 10**8  # tokens in a file
name: str = 'fineweb_edu'  # the shards are written to data/<name>
to_dir: str = ''  # the folder to write; '' is data/<name>
num_proc: int = 0  # processes that tokenise; 0 is one for each core
overwrite: bool = False  # delete what other settings or files have made, and start over
# ------------------------------------------------------------------------------------------------


def fetch(name: str) -> str:
    """Return the path of a file of the hub on this machine, to which it is downloaded."""
    return fetch_hub_files([name])[0]


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if tokenizer == 'char' or tokenizer.startswith('bpe:'):
        raise UserError(f'--tokenizer={tokenizer} would have to read the whole corpus first: take gpt2, another of '
                        "tiktoken's, or byte\nor let data/text/prepare.py do it, which writes no shards", COMMAND)
    folder = folder_for('fineweb_edu', to_dir, name)
    encoder = encoder_for(tokenizer, lambda: build(tokenizer, list, eot=True))
    if input:
        texts = shards.Source(documents.find_files(input, folder), str, column)
    else:
        texts = shards.Source(find_hub_files(source, config, revision), fetch, column)
    console.say(f'found: files {len(texts.files):,}')
    shards.write_shards(folder, tokenise.Packer(encoder, encoder.eot, eot_first=True), texts, shard_size,
                        input or f'{source}/{config}@{revision or "main"}', num_proc, overwrite)
    console.say(next_steps(folder, 'train_fineweb_edu', 'fineweb_edu', 'out-fineweb-edu', takes_long=True))


if __name__ == '__main__':
    run(main)
