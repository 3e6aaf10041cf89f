"""
Two tests of what a model knows, each by the nats that it costs the model to be told how a text continues.

    HellaSwag (Zellers et al. 2019)    which of four endings is right? The model's answer is the cheapest one
    LAMBADA (Paperno et al. 2016)      what is the last word? The model's answer is the likeliest token at each place

HellaSwag is quoted in two scorings, whose figures differ by percents and must not be compared. 'completion', that of
build-nanogpt and llm.c, reads the raw context, and divides by tokens. 'lm_eval', that of EleutherAI's harness, cleans
the text, puts the activity before it, and divides by characters.
"""
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import refuse_not_finite
from plaingpt import console, schema
from plaingpt.corpus import documents
from plaingpt.corpus.download import download
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import DATA, UserError
from plaingpt.machines.device import to_device
from plaingpt.machines.processes import Process, Progress, compute_together, refuse_difference, wait_for_all
from plaingpt.metrics import Predictor, exp
from plaingpt.paths import CORPORA

Row = dict[str, Any]  # a line of a test's file
Pair = tuple[list[int], list[int]]  # the ids of a text, and of an ending for it
LABELS = ('0', '1', '2', '3')  # which of the four endings is right


# ------------------------------------------------------------------------------------------------
# Files -> rows


def load(task: str, path: str, limit: int, process: Process) -> list[Row]:
    """Return the first `limit` rows (0: all) of one of TASKS, from the file or URL `path`; if that is '', from the
    original, which one process of each machine downloads. Every process must call it."""
    folder, option = CORPORA / task, f'--{task}'
    if not path or path.startswith(('http://', 'https://')):
        url, sha256 = (path, '') if path else (TASKS[task].url, TASKS[task].sha256)
        path = str(folder / PurePosixPath(url.partition('?')[0]).name)
        if process.local_rank == 0:
            download(url, Path(path), sha256, option)
        wait_for_all(process)
    rows = list(read(task, documents.find_files(path, folder, option)[0], limit))
    if not rows:
        raise UserError(f'{path} is empty: {option}= takes a file with an example of {task} in each line', DATA)
    refuse_difference(process, {task: hashlib.sha256(json.dumps(rows).encode()).hexdigest()},
                      f'{path} must be the same on all machines')
    return rows


def read(task: str, path: str, limit: int = 0) -> Iterator[Row]:
    """Yield the rows of a .jsonl file, packed or not. Raise UserError, which names a line that is not an example of the
    task."""
    with documents.opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                row = schema.parse(line)
            except ValueError:
                row = None
            if not schema.fits(row, TASKS[task].row):
                start = str(line[:60], 'utf-8', 'replace')
                raise UserError(f'{path}, line {number} is not an example of {task}: {start}', DATA)
            yield row
            if number == limit:
                return


def is_text(value: object) -> bool:
    return schema.fits(value, str) and str(value).strip() != ''


def parted(row: object) -> tuple[str, str]:
    """Return the context and the last word of a row of LAMBADA. If it is no such row, one of them is ''."""
    match row:
        case {'text': str(text)}:
            context, _, word = text.rpartition(' ')
        case {'context': str(context), 'continuation': str(word)}:
            pass
        case _:
            return '', ''
    return context.rstrip() and context, word


def is_lambada(row: object) -> bool:
    return all(part and schema.fits(part, str) for part in parted(row))


HELLASWAG = {
    'activity_label': str,
    'ctx': is_text,
    'endings': [str] * len(LABELS),
    'label': (set(LABELS), range(len(LABELS))),
    'ctx_a?': str,
    'ctx_b?': str}


class Task(NamedTuple):
    """A test's file: where it comes from, and what each line of it must be."""

    url: str
    sha256: str
    row: Any  # the shape of a line


TASKS = {
    'hellaswag': Task('https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl',
                      '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588', HELLASWAG),
    'lambada': Task('https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl',
                    '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226', is_lambada),
}


def is_raw(rows: Sequence[Row]) -> bool:
    """Return whether this is HellaSwag as published, and not one of the files that others have cleaned: these join the
    two parts of the context."""
    return all('ctx_a' in row for row in rows)


# ------------------------------------------------------------------------------------------------
# Rows -> questions in ids


class Questions(NamedTuple):
    """Questions with the same number of endings each; all endings stand one after the other."""

    pairs: list[Pair]
    lengths: list[int]  # of each ending: acc_norm divides its nats by that
    labels: list[int]  # of each question: which of its endings is right


def completion(rows: Iterable[Row], vocabulary: Tokenizer) -> Questions:
    """Return HellaSwag as build-nanogpt and llm.c ask it: context and ending as they stand, each in its own tokens."""
    pairs, labels = [], []
    for row in rows:
        context = vocabulary.encode(row['ctx'])
        pairs += [(context, vocabulary.encode(f' {ending}')) for ending in row['endings']]
        labels.append(int(row['label']))
    return Questions(pairs, [len(ending) for _, ending in pairs], labels)


def lm_eval(rows: Iterable[Row], vocabulary: Tokenizer) -> Questions:
    """Return HellaSwag as lm-eval asks it. It capitalises the second part of the context; files that others have
    cleaned no longer say where that begins, and leave it as it is."""
    pairs, lengths, labels = [], [], []
    for row in rows:
        context = f'{row["ctx_a"]} {row.get("ctx_b", "").capitalize()}' if 'ctx_a' in row else row['ctx']
        query = cleaned(f'{row["activity_label"]}: {context}')
        endings = [cleaned(ending) for ending in row['endings']]
        pairs += [encode_together(query, f' {ending}', vocabulary) for ending in endings]
        lengths += [max(1, len(ending)) for ending in endings]
        labels.append(int(row['label']))
    return Questions(pairs, lengths, labels)


def cleaned(text: str) -> str:
    """Return the text without the marks of WikiHow's headings: '[header] How to', ' [title] Look', '[substeps]'."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def last_words(rows: Iterable[Row], vocabulary: Tokenizer) -> list[Pair]:
    """Return LAMBADA as lm-eval's lambada_openai asks it: for the word after the last space, with that space."""
    return [encode_together(context, f' {word}', vocabulary) for context, word in map(parted, rows)]


def encode_together(context: str, ending: str, vocabulary: Tokenizer) -> Pair:
    """Return the tokens of the whole text, parted where those of the context alone end. Spaces at the end of the
    context go to the ending, as most tokens begin with their space."""
    bare = context.rstrip()
    before = vocabulary.encode(bare)
    return before, vocabulary.encode(context + ending)[len(before):]


# ------------------------------------------------------------------------------------------------
# Questions -> nats


class Piece(NamedTuple):
    """The ids that the model reads at once: the last n_told are those it is told, and the others are the context."""

    pair: int  # the number of the pair that this is part of
    ids: list[int]  # at most block_size + 1
    n_told: int


NOTHING = Piece(0, [0, 0], 0)  # for a process that has nothing left to read while others do


def pieces(pairs: Iterable[Pair], block_size: int) -> Iterator[Piece]:
    """Yield one piece for each pair, without the beginning of a context that is too long. If the ending itself is too
    long, yield a piece for each block_size tokens of it."""
    for number, (context, ending) in enumerate(pairs):
        ids, untold = [*context, *ending], len(ending)
        while untold:
            last = ids[-block_size - 1:]
            n_told = min(untold, len(last) - 1)
            assert n_told, 'the very first token follows nothing'
            yield Piece(number, last, n_told)
            ids, untold = ids[:-n_told], untold - n_told


def size(piece: Piece) -> int:
    return len(piece.ids)


def batches(todo: list[Piece], most: int) -> list[list[Piece]]:
    """Part the pieces, the longest first, into batches of at most `most` tokens with the padding of `to_batch`: more
    short ones fit into a batch. A piece of more than `most` tokens is a batch of its own."""
    found, first = list[list[Piece]](), 0
    while first < len(todo):
        last = first + max(1, most // (size(todo[first]) - 1))
        found.append(todo[first:last])
        first = last
    return found


def to_batch(batch: list[Piece]) -> tuple[Tensor, Tensor]:
    """Return x and y (B, T), padded on the right: y is -1 wherever nothing is told."""
    T = max(len(piece.ids) for piece in batch) - 1
    x, y = torch.zeros(len(batch), T, dtype=torch.int64), torch.full((len(batch), T), -1)
    for row, (_, ids, n_told) in enumerate(batch):
        end = len(ids) - 1
        x[row, :end] = torch.tensor(ids[:-1])
        y[row, end - n_told:end] = torch.tensor(ids[len(ids) - n_told:])
    return x, y


def score(predict: Predictor, pairs: list[Pair], label: str,
          progress: Progress = console.progress) -> tuple[Tensor, Tensor]:
    """Return the cost of each ending, in nats (N,), and how many of its tokens were not the model's first choice (N,).
    Every process must call it. The number of processes does not decide which pieces are read together, and so changes
    no bit of the result."""
    todo = sorted(pieces(pairs, predict.config.block_size), key=size, reverse=True)  # too little memory shows at once
    parts = batches(todo, predict.batch_size * predict.config.block_size)  # as many tokens as an evaluation reads
    most = max(map(len, parts))

    def score_batch(number: int) -> Tensor:
        x, y = to_batch(parts[number] if number < len(parts) else [NOTHING])
        told = y >= 0  # (B, T)
        logits, targets = predict(x, is_odd=True)[told], to_device(y[told], predict.process.device)  # (N, V), (N,)
        nats = F.cross_entropy(logits, targets, reduction='none')  # (N,)
        is_missed = (logits.argmax(dim=-1) != targets).to(nats.dtype)
        of_pieces = torch.zeros(2, most, dtype=torch.float64)
        of_pieces.index_add_(1, told.nonzero()[:, 0], torch.stack([nats, is_missed]).cpu().double())
        return of_pieces.T  # (most, 2)

    table = compute_together(len(parts), score_batch, predict.process, progress, label, 'batches')  # (parts, most, 2)
    of_pieces = torch.cat([rows[:len(part)] for rows, part in zip(table, parts, strict=True)])  # (pieces, 2)
    refuse_not_finite(bool(of_pieces.isfinite().all()))
    of_pairs = torch.zeros(len(pairs), 2, dtype=torch.float64)
    of_pairs.index_add_(0, torch.tensor([piece.pair for piece in todo]), of_pieces)
    return of_pairs[:, 0], of_pairs[:, 1]


# ------------------------------------------------------------------------------------------------
# Nats -> figures


def choices(questions: Questions, nats: Tensor) -> dict[str, float]:
    """Return how often the right ending is the cheapest (acc), and the cheapest for its length (acc_norm)."""
    labels = torch.tensor(questions.labels)
    lengths = torch.tensor(questions.lengths, dtype=torch.float64)
    results: dict[str, float] = {}
    for name, costs in (('acc', nats), ('acc_norm', nats / lengths)):
        is_right = costs.view(len(labels), -1).argmin(dim=1) == labels
        results |= share(name, is_right)
    return results


def share(name: str, is_right: Tensor) -> dict[str, float]:
    """Return the share of (N,) examples that are right, and its standard error, which a single example does not
    have."""
    n, mean = len(is_right), is_right.double().mean().item()
    return {name: mean} | ({f'{name}_stderr': math.sqrt(mean * (1 - mean) / (n - 1))} if n > 1 else {})


def measure_hellaswag(rows: list[Row], vocabulary: Tokenizer, predict: Predictor) -> dict[str, dict[str, float]]:
    """Return the figures of each scoring under its name."""
    results = {}
    for name, ask in (('hellaswag_completion', completion), ('hellaswag_lm_eval', lm_eval)):
        questions = ask(rows, vocabulary)
        nats, _ = score(predict, questions.pairs, name)
        results[name] = choices(questions, nats)
    return results


def measure_lambada(rows: list[Row], vocabulary: Tokenizer, predict: Predictor) -> dict[str, dict[str, float]]:
    """Return how often all tokens of the last word are the model's first choices, and the perplexity of words: exp of
    their mean cost in nats, whatever their number of tokens."""
    nats, missed = score(predict, last_words(rows, vocabulary), 'lambada_openai')
    return {'lambada_openai': {**share('acc', missed == 0), 'perplexity': exp(nats.mean().item())}}


class InTraining(NamedTuple):
    """HellaSwag in completion style, for a run to answer again and again."""

    prefix: str  # 'hellaswag_', or another one if the text was cleaned: its figures cannot be compared
    questions: Questions

    def answer(self, predict: Predictor, progress: Progress) -> dict[str, float]:
        nats, _ = score(predict, self.questions.pairs, 'HellaSwag', progress)
        return {f'{self.prefix}{name}': value for name, value in choices(self.questions, nats).items()}


def for_training(path: str, limit: int, vocabulary: Tokenizer | None, process: Process) -> InTraining:
    """Return the questions for a run. Every process must call it. Raise UserError if the tokenizer is not available."""
    if vocabulary is None:
        raise UserError("HellaSwag cannot be asked without the files of the corpus's tokenizer:\n"
                        'connect once, so that tiktoken gets them, or give --hellaswag_interval=0', DATA)
    rows = load('hellaswag', path, limit, process)
    return InTraining('hellaswag_' if is_raw(rows) else 'hellaswag_cleaned_', completion(rows, vocabulary))
