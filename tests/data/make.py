"""Write what is derived from documents.jsonl: the same documents in other forms, and the vocabulary that they teach.

    python -m tests.data.make
"""
import base64
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tokenizers import ByteLevelBPETokenizer

from plaingpt.corpus.tokenizer import bytes_of_printable_alphabet

FOLDER = Path(__file__).parent
N_MERGES = 1000


def main() -> None:
    source = (FOLDER / 'documents.jsonl').read_bytes()
    rows = [json.loads(line) for line in source.splitlines() if line]
    texts = [row['text'].replace('\ud83d', '\ufffd') for row in rows]  # parquet has no half characters
    with gzip.GzipFile(FOLDER / 'documents.jsonl.gz', 'wb', mtime=0) as file:
        file.write(source)
    table = pyarrow.table({'id': [row['id'] for row in rows], 'text': texts})
    pyarrow.parquet.write_table(table, FOLDER / 'documents.parquet', row_group_size=10, compression='zstd')

    library = ByteLevelBPETokenizer()
    library.train_from_iterator(texts, 256 + N_MERGES, min_frequency=2, show_progress=False)
    byte_of = bytes_of_printable_alphabet()
    alphabet = [bytes([byte]) for byte in byte_of.values()]  # in GPT-2's order
    merges = json.loads(library.to_str())['model']['merges']
    learned = [bytes(byte_of[symbol] for symbol in left + right) for left, right in merges]
    ranks = dict.fromkeys([*alphabet, *learned])
    lines = [f'{base64.b64encode(token).decode()} {rank}\n' for rank, token in enumerate(ranks)]
    (FOLDER / 'vocabulary/small.tiktoken').write_text(''.join(lines), encoding='utf-8', newline='\n')


if __name__ == '__main__':
    main()
