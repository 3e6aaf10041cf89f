"""
plainGPT beside what a user would take instead, in one run on one machine: a table of seconds, bytes and ratios.

    python benchmarks/peers.py
    python benchmarks/peers.py --nanogpt=FOLDER --to=docs/measured.md     with a clone of nanoGPT; this makes that page,
                                                                          or this CPU's section of it anew

All take turns, so that a busy moment of the machine hits all of them; a first round does not count. A cell is a median,
and in brackets the median of the rounds' ratios: how much of that peer's time, or memory, plainGPT takes. On one thread
the seconds are those of the CPU, which a busy machine hardly changes; on all of them, those of the clock. What is not
installed, or was not asked for, is a blank cell: transformers, xllamacpp (llama.cpp), tiktoken's files of GPT-2.

In steps all have nanoGPT's GELU, the exact one. In fewer bits, steps are in bfloat16, and texts are written in 8.
"""
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
import train
from benchmarks import start
from model import GPT, GPTConfig
from plaingpt import console
from plaingpt.corpus import documents, tokenise, tokenizer
from plaingpt.errors import UserError, run
from plaingpt.formats import gguf
from plaingpt.formats.exported import Exported
from plaingpt.init_from import open_model
from plaingpt.machines import device
from plaingpt.machines.int8 import quantise, why_not
from plaingpt.machines.processes import Process
from plaingpt.machines.strategies import gather
from plaingpt.run import checkpoint
from plaingpt.run.upload import Uploader

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
nanogpt: str = ''  # the folder of a clone of https://github.com/karpathy/nanoGPT; '' leaves it out
rounds: int = 3
threads: str = '1,all'  # of torch and llama.cpp
rows: str = 'step,memory,write,load,save,prepare,start'  # which to measure
size: str = 'gpt2'  # of the models that write, load and save: 'gpt2' is 124M, 'tiny' shows that this script works
to: str = ''  # the page to write the table to, beside the terminal; other CPUs keep their sections
# ------------------------------------------------------------------------------------------------

PLAINGPT, FEWER_BITS = 'plainGPT', 'plainGPT, fewer bits'
COLUMNS = (PLAINGPT, FEWER_BITS, 'nanoGPT', 'transformers', 'llama.cpp F32', 'llama.cpp F16', 'llama.cpp Q8_0',
           'tiktoken')
Runs = dict[str, Callable[[], object]]  # by column: the function to measure
SHAPES = {  # of training steps, with nanoGPT's GELU: windows, and a model; the first is that of its README for a CPU
    'nanoGPT for a CPU, 12 x 64 tokens': (12, GPTConfig(64, 65, 4, 4, 128, bias=False, gelu='exact')),
    "make train's, 16 x 64 tokens": (16, GPTConfig(64, 1024, 4, 4, 128, bias=False, gelu='exact')),
    '124M, 1 x 256 tokens': (1, GPTConfig(256, 50304, bias=False, gelu='exact'))}
TINY = GPTConfig(128, 50257, 1, 2, 64, bias=False)
PROMPT, NEW = 64, 64  # tokens
Cell = tuple[float, float | None]  # a median, and that of the ratios


def take_turns(runs: Runs, clock: Callable[[], float]) -> dict[str, Cell]:
    """Time all runs in turn. A run that returns a number has measured itself."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, one in runs.items():
            began = clock()
            result = one()
            if number:
                seconds[name].append(result if isinstance(result, float) else clock() - began)
    return {name: (median(each), median(a / b for a, b in zip(seconds[PLAINGPT], each, strict=True)))
            for name, each in seconds.items()}


def load_nanogpt() -> ModuleType | None:
    """Import nanoGPT's model.py, under a name that plainGPT does not have."""
    if not nanogpt:
        return None
    spec = importlib.util.spec_from_file_location('nanogpt_model', Path(nanogpt, 'model.py'))
    if spec is None or spec.loader is None or not Path(nanogpt, 'model.py').is_file():
        raise UserError(f'--nanogpt={nanogpt}: it has no model.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['nanogpt_model'] = module
    spec.loader.exec_module(module)
    return module


def build_nanogpt(module: ModuleType, config: GPTConfig) -> nn.Module:
    names = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    model: nn.Module = module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in names}))
    return model


def build_transformer(config: GPTConfig) -> nn.Module | None:
    """Return transformers' GPT-2 of that shape, if transformers is installed."""
    if importlib.util.find_spec('transformers') is None:
        return None
    import transformers

    shape = transformers.GPT2Config(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, vocab_size=config.vocab_size,
        n_positions=config.block_size, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function='gelu' if config.gelu == 'exact' else 'gelu_new')
    model: nn.Module = transformers.GPT2LMHeadModel(shape)
    return model


# ------------------------------------------------------------------------------------------------
# Training


def steps_of(windows: int, config: GPTConfig) -> Runs:
    """Return a training step of each peer: forward, backward, clip, update."""
    x = torch.randint(config.vocab_size, (windows, config.block_size))
    y = torch.randint(config.vocab_size, (windows, config.block_size))
    runs: Runs = {}

    def add(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
        def step() -> None:
            loss_of().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        runs[name] = step

    for name, dtype in ((PLAINGPT, torch.float32), (FEWER_BITS, torch.bfloat16)):
        plain_gpt, context = GPT(config), device.autocast(torch.device('cpu'), dtype)

        def loss_of(model: GPT = plain_gpt, context: Any = context) -> Any:
            with context:
                return model(x, y, logits='none')[1]

        add(name, plain_gpt, train.make_optimizer(plain_gpt), loss_of)
    if module := load_nanogpt():
        with redirect_stdout(io.StringIO()):
            nano_gpt: Any = build_nanogpt(module, config)
            optimizer = nano_gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
        add('nanoGPT', nano_gpt, optimizer, lambda: nano_gpt(x, y)[1])
    if transformer := build_transformer(config):
        add('transformers', transformer, torch.optim.AdamW(transformer.parameters(), fused=True),
            lambda: transformer(input_ids=x, labels=y).loss)
    return runs


def peak_bytes(step: Callable[[], object], model_bytes: int) -> float:
    """Return the most bytes of tensors in a step, with the weights and moments that it begins with."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = sorted((event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
                     if event.name() == '[memory]')
    held = most = model_bytes
    for _, change in changes:
        held += change
        most = max(most, held)
    return float(most)


def memory_of_steps() -> Iterator[tuple[str, dict[str, Cell]]]:
    """Yield the row of memory. Two layers suffice, as it is the logits that make the difference."""
    windows, config = (12, GPTConfig(1024, 50304, 2, bias=False, gelu='exact')) if size == 'gpt2' else (4, TINY)
    model_bytes = 12 * sum(p.numel() for p in GPT.on_meta(config).parameters())
    most = {name: peak_bytes(step, model_bytes) for name, step in steps_of(windows, config).items()}
    yield (f'most memory in a step, {config.n_layer} layers, {windows} x {config.block_size} tokens, GB',
           {name: (number / 1e9, most[PLAINGPT] / number) for name, number in most.items()})


# ------------------------------------------------------------------------------------------------
# Writing


def writers(batch: int, n_threads: int, folder: Path) -> Runs:
    """Return a greedy writer for each peer, with the same prompt and number of tokens."""
    model = GPT(GPTConfig(vocab_size=50257) if size == 'gpt2' else TINY).eval()
    prompt = torch.randint(256, (batch, PROMPT if size == 'gpt2' else 8))

    def write(model: GPT) -> None:
        with torch.inference_mode():  # as sample.py does
            model.generate(prompt, NEW, temperature=0.0)

    runs: Runs = {PLAINGPT: partial(write, model)}
    if not why_not('cpu'):
        few_bits = deepcopy(model)
        quantise(few_bits)
        runs[FEWER_BITS] = partial(write, few_bits)
    if found := build_transformer(model.config):
        transformer: Any = found.eval()
        runs['transformers'] = lambda: transformer.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW,
                                                            do_sample=False, pad_token_id=0)
    if batch == 1 and importlib.util.find_spec('xllamacpp'):
        for name, dtype in (('F32', 'float32'), ('F16', 'float16'), ('Q8_0', 'q8_0')):
            if (path := folder / dtype).exists() or write_gguf(path, model, dtype):
                runs[f'llama.cpp {name}'] = llama_writer(path / 'model.gguf', prompt[0].tolist(), n_threads)
    return runs


def write_gguf(folder: Path, model: GPT, dtype: str) -> bool:
    """Write a GGUF file. Return False if GPT-2's tokenizer, which the format needs, is not available."""
    try:
        vocabulary = tokenizer.load_tiktoken('gpt2')
    except tokenizer.Unavailable:
        return False
    folder.mkdir()
    gguf.write(folder, Exported('random', model.config, model.state_dict(), vocabulary, dtype, {}).complete())
    return True


def llama_writer(path: Path, prompt: list[int], n_threads: int) -> Callable[[], object]:
    import urllib.request

    llama = importlib.import_module('xllamacpp')
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup, settings.n_parallel = str(path), 256, False, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = n_threads
    server = llama.Server(settings)
    question = json.dumps({'prompt': prompt, 'n_predict': NEW, 'temperature': 0, 'ignore_eos': True,
                           'cache_prompt': False}).encode()

    def write() -> None:
        request = urllib.request.Request(f'{server.listening_address}/completion', question,
                                         {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)['tokens_predicted'] == NEW

    return write


# ------------------------------------------------------------------------------------------------
# Files


def trained() -> tuple[GPT, torch.optim.Optimizer]:
    """Return a model, and an optimizer that has its moments."""
    model = GPT(GPTConfig(bias=False) if size == 'gpt2' else TINY)
    optimizer = train.make_optimizer(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return model, optimizer


def loaders(folder: Path) -> Runs:
    """Return a loader for each peer: from a file to a model that is ready."""
    model, optimizer = trained()
    path = folder / 'ckpt.pt'
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': 1,
                'model_args': checkpoint.model_args(model.config), 'best_val_loss': 1.0, 'config': {}}, path)
    runs: Runs = {PLAINGPT: lambda: open_model(str(path))}
    if module := load_nanogpt():
        def load() -> None:
            with redirect_stdout(io.StringIO()):
                nano_gpt = build_nanogpt(module, model.config)
                nano_gpt.load_state_dict(torch.load(path, map_location='cpu')['model'])

        runs['nanoGPT'] = load
    if importlib.util.find_spec('transformers'):
        import transformers

        transformer: Any = build_transformer(model.config)
        transformer.save_pretrained(folder / 'hf')
        runs['transformers'] = lambda: transformers.GPT2LMHeadModel.from_pretrained(folder / 'hf')
    return runs


def savers(folder: Path) -> Runs:
    """Return functions that measure, by the clock, how long training waits for a checkpoint with weights and moments.
    plainGPT writes it while training continues; nanoGPT calls torch.save, as here."""
    model, optimizer = trained()
    alone = Process(0, 1, torch.device('cpu'), '')
    saver = checkpoint.Saver(folder / 'plaingpt', 1, Uploader('', print), lambda: None)

    def save() -> float:
        began = time.perf_counter()
        weights, moments = gather(model, optimizer, alone)
        saver.save(False, {'model': weights, 'optimizer': moments})
        seconds = time.perf_counter() - began
        saver.wait()
        return seconds

    def save_as_nanogpt() -> float:
        began = time.perf_counter()
        torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, folder / 'nanogpt.pt')
        return time.perf_counter() - began

    return {PLAINGPT: save, 'nanoGPT': save_as_nanogpt}


def preparers(folder: Path) -> Runs:
    """Return the ways from text to token files, in one process; tiktoken alone only encodes, and writes nothing."""
    try:
        gpt2 = tokenizer.load_tiktoken('gpt2')
    except tokenizer.Unavailable:
        return {}
    sources = [path.read_text(encoding='utf-8') for path in sorted(Path(os.__file__).parent.glob('*.py'))]
    path = folder / 'texts.jsonl'
    path.write_text('\n'.join(json.dumps({'text': text}) for text in sources), encoding='utf-8')

    def prepare() -> None:
        pieces = list(documents.find_pieces(str(path)))
        validation = tokenise.choose_validation(len(sources), 0.1, 1)
        with redirect_stdout(io.StringIO()):
            tokenise.write_corpus(folder / 'corpus', tokenise.Packer(gpt2, gpt2.eot), pieces, validation, 'texts', 1)

    return {PLAINGPT: prepare, 'tiktoken': lambda: [gpt2.library.encode_ordinary(text) for text in sources]}


def starters(folder: Path) -> Runs:
    """Return functions that measure how long it takes from the command to the end of the first step."""
    if size != 'gpt2':  # which shows that this script works
        return {}
    os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that start
    starts = zip((PLAINGPT, 'nanoGPT'), start.first_steps(folder, nanogpt).values(), strict=False)
    return {name: partial(cpu_seconds, one) for name, one in starts}


def cpu_seconds(one: start.Start) -> float:
    return start.measure(one)[0]


# ------------------------------------------------------------------------------------------------
# The table

BARS = (  # a row, how much of the time or memory of the second column the first one takes, and what it should be
    ('a training step, 124M', FEWER_BITS, 'nanoGPT', 'in bfloat16', 0.5),
    ('most memory in a step', PLAINGPT, 'nanoGPT', '', 0.25),
    ('writing 1 x', FEWER_BITS, 'transformers', 'in 8 bits', 1 / 2.8),
    ('writing 1 x', FEWER_BITS, 'llama.cpp Q8_0', 'in 8 bits', 1 / 1.3),
    ('writing 10 x', FEWER_BITS, PLAINGPT, 'in 8 bits', 1 / 2),
    ('from the command', PLAINGPT, 'nanoGPT', '', 1.1))

def measure(n_threads: int, folder: Path) -> Iterator[tuple[str, dict[str, Cell]]]:
    """Yield each row: what was measured, in which unit, and the cells by column."""
    torch.set_num_threads(n_threads)
    clock = time.process_time if n_threads == 1 else time.perf_counter
    asked = rows.split(',')
    if 'step' in asked:
        for what, (windows, config) in SHAPES.items():
            if size == 'gpt2' or config.vocab_size < 2000:
                yield f'a training step, {what}, s', take_turns(steps_of(windows, config), clock)
    for batch in (1, 10) if 'write' in asked else ():
        yield f'writing {batch} x {NEW} tokens, {size}, s', take_turns(writers(batch, n_threads, folder), clock)
    if n_threads > 1:
        return
    if 'memory' in asked:
        yield from memory_of_steps()
    for word, what, runs_of in (('load', f'loading a checkpoint, {size}, s', loaders),
                                ('save', f'how long a checkpoint keeps training, {size}, s', savers),
                                ('prepare', 'preparing text in one process, s', preparers),
                                ('start', "from the command to make train's first step, s", starters)):
        if word in asked and (runs := runs_of(folder)):
            yield what, take_turns(runs, clock)


def about_bars(found: list[tuple[str, int, dict[str, Cell]]]) -> Iterator[str]:
    """Yield a line for each bar of which both columns were measured."""
    yield '| bar | threads | at most | found |\n|---|---|---|---|'
    for begin, one, other, how, most in BARS:
        for what, n_threads, cells in found:
            if what.startswith(begin) and one in cells and other in cells:
                ratio = cells[one][0] / cells[other][0]
                is_slow = how == 'in bfloat16' and device.time_in_bfloat16(256, 768) > 0.5
                limit = 'no bar: this CPU multiplies it slowly' if is_slow else f'{most:.2f}'
                bar = ', '.join([what.rpartition(', ')[0], *filter(None, [how]), f'beside {other}'])
                yield f'| {bar} | {n_threads} | {limit} | {ratio:.2f} |'


def cell(cells: dict[str, Cell], column: str) -> str:
    if column not in cells:
        return ''
    number, ratio = cells[column]
    return f'{number:.3g}' if column == PLAINGPT else f'{number:.3g} ({ratio:.2f})'


def versions() -> str:
    names = ('torch', 'transformers', 'xllamacpp', 'tiktoken')
    found = [f'{name} {importlib.metadata.version(name)}' for name in names if importlib.util.find_spec(name)]
    return ', '.join([f'Python {platform.python_version()}', *found])


def cpu_name() -> str:
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8')
        return next(line.partition(': ')[2] for line in text.splitlines() if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_page(section: str) -> None:
    """Write the section of this CPU, and keep those of others."""
    path = Path(to)
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    sections = dict(re.findall(r'^## (.+)\n\n((?s:.*?))\n*(?=^## |\Z)', old, re.MULTILINE)) | {cpu_name(): section}
    parts = [f'## {name}\n\n{text}' for name, text in sorted(sections.items())]
    path.write_text('\n\n'.join(['# Measured', (__doc__ or '').strip(), *parts]) + '\n', encoding='utf-8')


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    table, found = [], []
    for n_threads in [os.cpu_count() or 1 if name == 'all' else int(name) for name in threads.split(',')]:
        with tempfile.TemporaryDirectory() as folder:
            for what, cells in measure(n_threads, Path(folder)):
                found.append((what, n_threads, cells))
                line = ' | '.join(cell(cells, column) for column in COLUMNS)
                table.append(f'| {what} | {n_threads} | {line} |')
                console.say(table[-1])
    head = f'| | threads | {" | ".join(COLUMNS)} |\n|---|---|{"---|" * len(COLUMNS)}'
    part = device.time_in_bfloat16(256, 768)
    how = (f'{time.strftime("%Y-%m-%d")}; {os.cpu_count()} cores; a matrix product in bfloat16 takes {part:.2f} of the '
           f'time of float32; {versions()}; medians of {rounds}')
    text = '\n\n'.join([how, '\n'.join([head, *table]), '\n'.join(about_bars(found))])
    console.say(f'\n{cpu_name()}, {text}')
    if to:
        write_page(text)


if __name__ == '__main__':
    run(main)
