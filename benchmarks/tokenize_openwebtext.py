"""
How near data/openwebtext/prepare.py comes to the speed of tiktoken alone.

    python benchmarks/tokenize_openwebtext.py --input=openwebtext-1000.jsonl

Ours is all that prepare.py does once it has the files: count the documents, draw the split, start the processes, read,
tokenise, and write train.bin, val.bin and meta.json. The limit is the same number of processes that hold their share of
the documents in memory, start together, and call tiktoken's encode_ordinary, with nothing written. The two take turns,
and the medians count. With as many processes as cores, the one that reads and writes shares a core with a worker.
"""
import importlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import corpus
import tokenizer as tokenizers
from errors import COMMAND, UserError, run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
input: str = ''  # .jsonl or .parquet files of documents
copies: int = 50  # of these documents that make the text, so that it takes tens of seconds
kind: str = 'parquet'  # of the file that holds the copies: 'parquet' or 'jsonl'
num_proc: int = 2  # processes that tokenise
runs: int = 5
# ------------------------------------------------------------------------------------------------


BYTES_PER_TOKEN = 2


def write_copies(texts: list[str], copies: int, path: Path) -> None:
    """A file with `copies` times the documents."""
    import json

    import pyarrow
    import pyarrow.parquet

    if path.suffix == '.jsonl':
        with open(path, 'w', encoding='utf-8') as file:
            for _ in range(copies):
                file.writelines(json.dumps({'text': text}) + '\n' for text in texts)
        return
    table = pyarrow.table({'text': texts})
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(copies):
            writer.write_table(table)


def time_ours(path: Path, folder: Path, num_proc: int) -> float:
    """Tokens per second from the file to finished token files."""
    prepare = importlib.import_module('data.openwebtext.prepare')
    started = time.perf_counter()
    encoder = tokenizers.build('gpt2', list, eot=True)
    n_documents = corpus.count_documents(str(path))
    validation = corpus.choose_validation(n_documents, 0.0005, 2357).tolist()
    documents = prepare.split_documents(corpus.read_documents([str(path)]), validation)
    corpus.write_corpus(folder, encoder, documents, n_documents, str(path), encoder.eot, num_proc)
    seconds = time.perf_counter() - started
    return sum((folder / f'{split}.bin').stat().st_size for split in corpus.SPLITS) / BYTES_PER_TOKEN / seconds


def encode_only(texts: list[str], copies: int, together: Barrier, answer: Connection) -> None:
    """One process of the limit: when it started, when it ended, and its tokens."""
    import tiktoken

    encoding = tiktoken.get_encoding('gpt2')
    together.wait()
    started, n_tokens = time.monotonic(), 0
    for _ in range(copies):
        n_tokens += sum(len(encoding.encode_ordinary(text)) for text in texts)
    answer.send((started, time.monotonic(), n_tokens))


def time_limit(texts: list[str], copies: int, num_proc: int) -> float:
    """Tokens per second of `num_proc` processes that do nothing but tokenise."""
    context = multiprocessing.get_context('spawn')
    together, answers = context.Barrier(num_proc), []
    for _ in range(num_proc):
        ours, theirs = context.Pipe()
        context.Process(target=encode_only, args=(texts, copies // num_proc, together, theirs)).start()
        answers.append(ours)
    starts, ends, tokens = zip(*(answer.recv() for answer in answers), strict=True)
    return float(sum(tokens) / (max(ends) - min(starts)))


def median_ratio(ours: list[float], limit: list[float]) -> float:
    return statistics.median(ours) / statistics.median(limit)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if not input:
        raise UserError('which documents? give --input=PATH', COMMAND)
    folder = Path(tempfile.mkdtemp())
    try:
        texts = list(corpus.read_documents(corpus.find_files(input, folder)))
        path = folder / f'copies.{kind}'
        write_copies(texts, copies, path)
        ours, limit = [], []
        for _ in range(runs):
            limit.append(time_limit(texts, copies, num_proc))
            ours.append(time_ours(path, folder, num_proc))
            print(f'tiktoken alone {limit[-1]:,.0f} tokens/s, prepare {ours[-1]:,.0f} tokens/s', flush=True)
        print(f'{num_proc} processes on {os.cpu_count()} cores, {copies * len(texts):,} documents in {kind}, '
              f'medians of {runs} runs: tiktoken alone {statistics.median(limit):,.0f} tokens/s, '
              f'prepare {statistics.median(ours):,.0f} tokens/s, ratio {median_ratio(ours, limit):.3f}')
    finally:
        shutil.rmtree(folder)


if __name__ == '__main__':
    run(main)
