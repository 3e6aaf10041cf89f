"""
The speed of data/openwebtext/prepare.py and data/fineweb_edu/prepare.py, beside that of tiktoken alone.

    python benchmarks/tokenize_openwebtext.py --input=openwebtext-1000.jsonl --copies=600

Each is timed from the moment it has the files: it counts the documents, draws the split, starts the processes, reads,
tokenises, and writes train.bin, val.bin and meta.json, or shards. The limit is the same number of processes that hold
their share of the documents in memory, start together, and call tiktoken's encode_ordinary, with nothing written. They
take turns, and the medians count. To start the processes takes half a second, which does not matter for a long text:
600 copies of a thousand documents take a minute. With as many processes as cores, the one that plans and writes shares
a core with a worker. Tokens per CPU second, of all processes together, depend less on what else the machine is doing.
"""
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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from plaingpt.corpus import documents, shards, tokenise, tokenizer
from plaingpt.corpus.token_files import HEADER
from plaingpt.errors import run

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
input: str = ''  # .jsonl or .parquet files of documents; '' takes the source code of Python's library
copies: int = 100  # of these documents, which make a text that takes tens of seconds
kind: str = 'parquet'  # of the file that holds the copies: 'parquet' or 'jsonl'
num_proc: int = 2  # processes that tokenise
runs: int = 3
# ------------------------------------------------------------------------------------------------


BYTES_PER_TOKEN = 2
SHARD = 10**8  # tokens, as FineWeb-Edu's are


class Speed(NamedTuple):
    tokens: int
    seconds: float
    cpu_seconds: float  # of all processes, in their own code and in the system's

    def per_second(self) -> float:
        return self.tokens / self.seconds

    def per_cpu_second(self) -> float:
        return self.tokens / self.cpu_seconds


def write_copies(texts: list[str], copies: int, path: Path) -> None:
    """Write a file with `copies` times the documents."""
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


def measure_corpus(path: Path, folder: Path, num_proc: int) -> Speed:
    """Measure the way from the file to finished token files."""
    started, before = time.perf_counter(), os.times()
    encoder = tokenizer.build('gpt2', list, eot=True)
    pieces = list(documents.find_pieces(str(path)))
    validation = tokenise.choose_validation(tokenise.count_documents(pieces), 0.0005, 2357)
    tokenise.write_corpus(folder, tokenise.Packer(encoder, encoder.eot), pieces, validation, str(path), num_proc)
    seconds, after = time.perf_counter() - started, os.times()
    n_tokens = sum((folder / f'{split}.bin').stat().st_size for split in tokenise.SPLITS) // BYTES_PER_TOKEN
    return Speed(n_tokens, seconds, sum(after[:4]) - sum(before[:4]))  # user, system, and the same of children


def measure_shards(path: Path, folder: Path, num_proc: int) -> Speed:
    """Measure the way from the file to finished shards."""
    started, before = time.perf_counter(), os.times()
    encoder = tokenizer.build('gpt2', list, eot=True)
    packer = tokenise.Packer(encoder, encoder.eot, eot_first=True)
    source = shards.Source([str(path)], str, 'text')
    shards.write_shards(folder, packer, source, SHARD, str(path), num_proc)
    seconds, after = time.perf_counter() - started, os.times()
    n_tokens = sum(file.stat().st_size - HEADER for file in folder.glob('*_0*.bin')) // BYTES_PER_TOKEN
    return Speed(n_tokens, seconds, sum(after[:4]) - sum(before[:4]))


def encode_only(packed: list[bytes], copies: int, together: Barrier, answer: Connection) -> None:
    """Do the work of one process of the limit, and send its tokens, and its seconds and CPU seconds in the tokenizer.
    Each text is a new str, as in a preparation: a str that was asked for its UTF-8 keeps it, and is faster the next
    time."""
    import tiktoken

    encoding = tiktoken.get_encoding('gpt2')
    together.wait()
    n_tokens, seconds, cpu_seconds = 0, 0.0, 0.0
    for _ in range(copies):
        texts = [text.decode('utf-8') for text in packed]
        started, cpu = time.monotonic(), time.process_time()
        n_tokens += sum(len(encoding.encode_ordinary(text)) for text in texts)
        seconds, cpu_seconds = seconds + time.monotonic() - started, cpu_seconds + time.process_time() - cpu
    answer.send((n_tokens, seconds, cpu_seconds))


def measure_limit(texts: list[str], copies: int, num_proc: int) -> Speed:
    """Measure `num_proc` processes that do nothing but tokenise."""
    context = multiprocessing.get_context('spawn')
    together, answers, processes = context.Barrier(num_proc), [], []
    packed = [text.encode('utf-8') for text in texts]
    for _ in range(num_proc):
        reader, writer = context.Pipe()
        processes.append(context.Process(target=encode_only, args=(packed, copies // num_proc, together, writer)))
        processes[-1].start()
        answers.append(reader)
    n_tokens, seconds, cpu_seconds = zip(*(answer.recv() for answer in answers), strict=True)
    for process in processes:
        process.join()  # from now on, what it used counts as used by children
    return Speed(sum(n_tokens), max(seconds), sum(cpu_seconds))


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    folder = Path(tempfile.mkdtemp())
    try:
        files = documents.find_files(input or f'{Path(os.__file__).parent}/*.py', folder)
        texts = [text for file in files for text in documents.read_documents(documents.find_pieces(file))]
        path = folder / f'copies.{kind}'
        write_copies(texts, copies, path)
        speeds: dict[str, list[Speed]] = {'tiktoken alone': [], 'openwebtext': [], 'fineweb_edu': []}
        for number in range(runs):
            speeds['tiktoken alone'].append(measure_limit(texts, copies, num_proc))
            speeds['openwebtext'].append(measure_corpus(path, folder / 'whole', num_proc))
            speeds['fineweb_edu'].append(measure_shards(path, folder / f'shards-{number}', num_proc))
            print(', '.join(f'{name} {some[-1].per_second():,.0f} tokens/s' for name, some in speeds.items()),
                  flush=True)
        print(f'{num_proc} processes on {os.cpu_count()} cores, {copies * len(texts):,} documents in {kind}, '
              f'medians of {runs} runs')
        for unit, measure in (('second', Speed.per_second), ('CPU second', Speed.per_cpu_second)):
            medians = {name: statistics.median(map(measure, some)) for name, some in speeds.items()}
            limit = medians['tiktoken alone']
            print(f'tokens per {unit}: ' + ', '.join(f'{name} {median:,.0f} ({median / limit:.3f})'
                                                     for name, median in medians.items()))
    finally:
        shutil.rmtree(folder)


if __name__ == '__main__':
    run(main)
