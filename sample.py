"""
Let a model write: one trained here, or GPT-2.

    python sample.py                                           the run in out/, or else the newest one in this folder
    python sample.py --out_dir=out-stdlib --start='def '       a run of your choice, and a text that it continues
    python sample.py --init_from=gpt2-xl --start=FILE:a.txt    GPT-2's weights, and a prompt from a file
    python sample.py --out_dir=out-stdlib --interactive=True   one prompt after the other, a line each

The samples go to stdout, and nothing else does.
"""
import codecs
import io
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

import configurator  # before PyTorch, so that it is imported faster

# isort: split

import torch
from torch import Tensor

from model import GPT
from plaingpt import console, errors
from plaingpt.corpus import documents, token_files, tokenizer
from plaingpt.corpus.folder import data_folder, how_to_prepare, is_prepared
from plaingpt.errors import UserError
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from plaingpt.machines import processes
from plaingpt.machines.device import name_of, pick_compile, pick_dtype
from plaingpt.machines.int8 import quantise
from plaingpt.machines.replay import Replay
from plaingpt.paths import is_url
from plaingpt.run import checkpoint

# ------------------------------------------------------------------------------------------------
# Settings: names, defaults and meanings are nanoGPT's if it has them
init_from: str = 'resume'  # 'resume' is out_dir; or a checkpoint file, a run's folder, a Hugging Face folder, 'gpt2*'
out_dir: str = 'out'  # of the run
start: str = '\n'  # what each sample continues: text, '<|endoftext|>', 'FILE:path'; '' begins a document
interactive: bool = False  # continue each line of stdin, after all that was read and written before; Ctrl-D ends it
num_samples: int = 10
batch_size: int = 16  # samples that are drawn at once; lower it when memory runs out
max_new_tokens: int = 500  # in each sample
stop: bool = False  # end a sample where the model ends the document
temperature: float = 0.8  # below 1 likely tokens become likelier, above 1 less so; 0 always takes the likeliest
top_k: int = 200  # draw from so many of the likeliest tokens; 0 draws from all
top_p: float = 1.0  # draw from the likeliest tokens that together have this probability; 1.0 draws from all
seed: int = 1337  # the same seed gives the same texts
device: str = 'auto'  # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto' is the first of these that the machine has
# of the weights and of all that is computed with them; on a CPU 'int8' is the fastest, and 'auto' is exact
dtype: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8'] = 'auto'
compile: bool | Literal['auto'] = 'auto'  # 'auto' is off: compiling takes longer than it saves
# ------------------------------------------------------------------------------------------------

RULE = '-' * 15  # nanoGPT's line after each sample


def refuse_mistakes() -> None:
    """Refuse mistakes that show before anything is loaded."""
    script = sys.modules[__name__]
    configurator.check_range(script, 'num_samples batch_size', 1, below=configurator.MANY)
    configurator.check_range(script, 'max_new_tokens top_k', 0, below=configurator.MANY)
    configurator.check_range(script, 'temperature', 0)
    if not 0 <= top_p <= 1:
        raise UserError(f'--top_p={top_p}: must be a probability, from 0 to 1')


def read_prompt(start: str) -> str:
    """Return the text that `start` is, or that it names as 'FILE:path'."""
    if not start.startswith('FILE:'):
        return start
    path = Path(start.removeprefix('FILE:'))
    try:
        return documents.decode(f'--start={start}: {path}', path.read_bytes(), 0)
    except OSError as error:
        raise errors.refusal(error, f'--start={start}', errors.DATA) from None


def find_run(out_dir: str, is_given: bool) -> str:
    """Return out_dir if it holds a checkpoint; if not, and the user did not give it, the newest run in the current
    folder."""
    if is_url(out_dir) or Path(out_dir).is_file() or checkpoint.holds_run(Path(out_dir)):
        return out_dir
    runs = sorted((path.stat().st_mtime, path.parent.name) for path in Path().glob('out*/ckpt.pt'))
    if runs and not is_given:
        newest = runs[-1][1]
        console.note(f'{out_dir} holds no checkpoint: this is the newest run here, --out_dir={shlex.quote(newest)}')
        return newest
    names = ', '.join(name for _, name in reversed(runs[-5:]))
    remedy = f'the newest runs here: {names}' if runs else (
        f"train a small model: {how_to_train()}\n"
        f"or take GPT-2's weights: {errors.command('sample.py', init_from='gpt2')}")
    raise UserError(f'{out_dir} holds no checkpoint{"" if runs else ", and no other out*/ here does"}\n{remedy}',
                    errors.CHECKPOINT)


def how_to_train() -> str:
    """Return the command that trains a first run, or first the one that prepares its corpus, and then names the
    other."""
    folder = data_folder('stdlib')
    return errors.command('train.py', 'config/train_stdlib.py') if is_prepared(folder) else how_to_prepare(folder)


def encode(prompt: str, vocabulary: tokenizer.Tokenizer, block_size: int) -> list[int]:
    """Return the ids to continue, at least one. An empty prompt asks for the beginning of a document."""
    if not prompt and vocabulary.bos is None:
        raise UserError(f"--start is empty, and this model's tokenizer '{vocabulary.name}' has no token that begins a "
                        'document\ngive a text to continue, such as --start=A')
    ids = vocabulary.encode_prompt(prompt) if prompt else [vocabulary.bos or 0]
    if len(ids) > block_size:
        console.note(f'the prompt has {len(ids)} tokens: the model reads the last {block_size} of them')
    return ids


def encode_start(text: str, vocabulary: tokenizer.Tokenizer | None,
                 unseen: token_files.TokenFile) -> tuple[list[int], str]:
    """Return the ids that samples in training continue, and a line to print if these are not `text`: a text that the
    vocabulary cannot write gives way to the beginning of the validation text, and an empty one to the beginning of a
    document."""
    if vocabulary is None:
        return [], f'the tokenizer of {unseen.path} is not available: no samples, and no bits per byte'
    if not text and vocabulary.bos is not None:
        return [vocabulary.bos], ''
    try:
        ids = vocabulary.encode_prompt(text)
    except UserError:
        ids = []
    line = f'--sample_start={text!r} cannot be written in this vocabulary: samples continue the start of {unseen.path}'
    return (ids, '') if ids else (unseen.read(0, 8).tolist(), line)


def continue_text(model: GPT, prompt: list[int], vocabulary: tokenizer.Tokenizer, n_tokens: int, seed: int,
                  device: torch.device) -> str:
    """Return a model's continuation of a prompt during training. Every process must call it, as each may hold a part of
    the model."""
    idx = torch.tensor([prompt], device=device)  # (1, T)
    text = model.generate(idx, n_tokens, temperature=0.8, top_k=200, seed=seed, n_vocab=vocabulary.n_vocab)
    return vocabulary.decode(text[0].tolist())


def texts(stream: Iterable[Tensor], count: int, prompt: str, vocabulary: tokenizer.Tokenizer,
          stops: Sequence[int]) -> Iterator[str]:
    """Yield the text to show, piece by piece, while `stream` gives each sample one token (count,) at a time: the first
    sample as it grows; once that has ended, all there is of the second, and so on. Characters are whole, lines end in
    \\n."""
    decoders = [io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8')('replace'), translate=True)
                for _ in range(count)]
    unseen = [decoder.decode(prompt.encode('utf-8')) for decoder in decoders]  # text of each sample, not shown yet
    has_ended = [False] * count
    shown = 0  # the sample that grows before the reader's eyes
    yield unseen[0]
    unseen[0] = ''
    for ids in stream:
        for row, token in enumerate(ids.tolist()):
            has_ended[row] = token in stops  # and so it stays: a row that has stopped repeats that id
            if not has_ended[row]:
                unseen[row] += decoders[row].decode(vocabulary.decode_bytes([token]))
        while shown < count - 1 and has_ended[shown]:
            yield f'{unseen[shown]}{decoders[shown].decode(b"", final=True)}\n{RULE}\n'
            shown += 1
        yield unseen[shown]
        unseen[shown] = ''
    for row in range(shown, count):
        yield f'{unseen[row]}{decoders[row].decode(b"", final=True)}\n{RULE}\n'


def show(pieces: Iterable[str]) -> None:
    """Print each piece as soon as it comes, without what would steer the terminal; in the main process only."""
    for piece in pieces:
        if console.is_main():
            console.write(piece, sys.stdout)


def continued(model: GPT, idx: Tensor, vocabulary: tokenizer.Tokenizer, first: int) -> Iterator[Tensor]:
    """Yield one token (B,) at a time of the samples number `first`, first + 1, ..., which continue idx (B, T)."""
    return model.stream(idx, max_new_tokens, temperature, top_k or None, top_p if top_p < 1 else None,
                        ends_of(vocabulary) or None, seed, vocabulary.n_vocab, first=first)


def ends_of(vocabulary: tokenizer.Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a sample."""
    return vocabulary.stops if stop else ()


def write_samples(model: GPT, prompt: str, ids: list[int], vocabulary: tokenizer.Tokenizer,
                  device: torch.device) -> None:
    """Print num_samples texts that continue the prompt, which has these ids."""
    for first in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - first)
        idx = torch.tensor([ids] * count, device=device)  # (B, T)
        show(texts(continued(model, idx, vocabulary, first), count, prompt, vocabulary,
                   ends_of(vocabulary)))


def converse(model: GPT, context: list[int], vocabulary: tokenizer.Tokenizer, device: torch.device) -> None:
    """Print a continuation of each line of stdin, after the context and all lines and continuations before it. Ctrl-C
    ends a continuation."""
    block_size = model.config.block_size
    for number, line in enumerate(lines()):
        try:
            context += vocabulary.encode_prompt(line)
            context = context or encode('', vocabulary, block_size)
            if len(context) > block_size:
                console.note(f'the context is longer than {block_size} tokens: the model reads the last of them')
                context = context[-block_size:]
            stream = continued(model, torch.tensor([context], device=device), vocabulary, number)
            show(texts(noted(stream, context), 1, '', vocabulary, ends_of(vocabulary)))
        except KeyboardInterrupt:
            show([f'\n{RULE}\n'])
        except UserError as error:
            if error.code == errors.NOT_FINITE:
                raise
            console.note(str(error))
            show([f'\n{RULE}\n'])


def lines() -> Iterator[str]:
    """Yield the lines of stdin without their ends. Show a prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            console.write('> ', sys.stderr)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line.decode('utf-8', errors='replace').rstrip('\r\n')


def noted(stream: Iterable[Tensor], ids: list[int]) -> Iterator[Tensor]:
    """Yield the tokens (1,) of the stream, each after it has been appended to `ids`."""
    for token in stream:
        ids.append(int(token))
        yield token


def sample(source: str, prompt: str) -> None:
    """Open the model that `source` names, and let it continue the prompt."""
    process = processes.start(device)
    precision, why_precision = pick_dtype(dtype, process.device.type)
    model, state = open_model(source)
    vocabulary = learned_tokenizer(state, model.config.vocab_size, corpus_of(state))
    ids = encode(prompt, vocabulary, model.config.block_size) if prompt or not interactive else []
    if stop and vocabulary.eot is None:
        console.note(f"--stop=True changes nothing: this model's tokenizer '{vocabulary.name}' does not mark where a "
                     'document ends')
    console.note(f'{source}; {processes.describe(process)}; {name_of(precision)}, {why_precision}')

    # fast: every token reads all weights, and smaller ones are read sooner
    model.to(process.device, torch.float32 if precision == torch.int8 else precision).eval()
    compiles, why = pick_compile(compile is True, process.device.type)
    if precision == torch.int8:
        quantise(model, compiles)
    if compile is True and not compiles:
        console.note(f'not compiled, {why}')
    for block in model.transformer.h if compiles else ():
        block.compile()
    if process.device.type == 'cuda':
        model.replay = Replay(model)  # fast: the launches of a token's kernels take longer than the kernels
    with torch.inference_mode():  # fast: tensors do not count their changes, nor know whose views they are
        if interactive:
            converse(model, ids, vocabulary, process.device)
        else:
            write_samples(model, prompt, ids, vocabulary, process.device)


def main(args: list[str]) -> None:
    wants_help = not {'-h', '--help'}.isdisjoint(args)
    with redirect_stdout(sys.stdout if wants_help else io.StringIO()):  # stdout is for the samples alone
        _, given = configurator.configure(sys.modules[__name__], args)
    refuse_mistakes()
    prompt = read_prompt(start) if 'start' in given or not interactive else ''
    sample(find_run(out_dir, 'out_dir' in given) if init_from == 'resume' else init_from, prompt)


if __name__ == '__main__':
    errors.run(main)
