"""
Take a model elsewhere: to Hugging Face, to llama.cpp and Ollama, to llm.c; or bring one of theirs here.

    python export.py --out_dir=out-stdlib --to=hf                            a run, to out-stdlib/hf
    python export.py --init_from=theirs.pt --out_dir=out-theirs --to=ckpt    what another project has trained, as a run
"""
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import configurator
from model import GPT, GPTConfig
from plaingpt import errors
from plaingpt.corpus.tokenizer import Tokenizer
from plaingpt.errors import UserError
from plaingpt.formats import gguf, huggingface, llmc, others
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from plaingpt.run import checkpoint, upload

# ------------------------------------------------------------------------------------------------
# Settings
out_dir: str = 'out'  # of the run
init_from: str = ''  # a checkpoint file, a run's folder, a Hugging Face folder, llm.c's model or 'gpt2*'; '' is out_dir
to: Literal['hf', 'gguf', 'llmc', 'ckpt'] = 'hf'  # Hugging Face; llama.cpp and Ollama; llm.c; a checkpoint of our own
to_dir: str = ''  # the folder to write; '' is out_dir/hf, out_dir/gguf or out_dir/llmc, and for 'ckpt' out_dir itself
dtype: Literal['float32', 'float16', 'bfloat16'] = 'float32'  # of the weights there
overwrite: bool = False  # write into a folder that holds other files, over those of the same names
# what a checkpoint of another project may not say
n_head: int = 0  # 0 is what it says
gelu: Literal['', 'tanh', 'exact'] = ''  # '' is what it says; a model that has another one becomes slightly another
dataset: str = ''  # the corpus whose tokenizer it has learned: a folder in data/, or any folder
# ------------------------------------------------------------------------------------------------

DTYPES = {'hf': ('float32', 'float16', 'bfloat16'), 'gguf': ('float32', 'float16'), 'llmc': ('float32', 'bfloat16'),
          'ckpt': ('float32',)}
WITHOUT_BIAS = ('wte.weight', 'wpe.weight', 'lm_head.weight')
UNFINISHED = '.exporting'  # a folder that is not whole yet
PROGRAMS = {'gguf': 'llama.cpp', 'llmc': 'llm.c'}  # which compute GELU by tanh
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, plaingpt]
# license: the owner of this model says here what others may do with it
---

# {name}

A GPT-2 with {parameters:,} parameters, exported by plainGPT: {config.n_layer} layers, {config.n_head} heads,
{config.n_embd} channels, {config.block_size} positions; {tokens}.

{numbers}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = '.'  # where this file is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer({prompt!r}, return_tensors='pt')
print(tokenizer.decode(model.generate(**prompt)[0]))
```

It continues a text; it was not trained to follow instructions. It reads and writes at most {config.block_size} tokens.
"""


def open_source(source: str, n_head: int, gelu: Literal['', 'tanh', 'exact'],
                dataset: str) -> tuple[GPT, checkpoint.State]:
    """The model that `source` names, and its checkpoint, with what the user says of them in place of what they say."""
    answers = {name: value for name, value in (('n_head', n_head), ('gelu', gelu)) if value}
    model, state = open_model(source, answers=answers)
    if n_head and n_head != model.config.n_head:
        raise UserError(f'--n_head={n_head} was given, and the model in {source} has {model.config.n_head}: leave it '
                        'out')
    if gelu and gelu != model.config.gelu:
        model = GPT.from_weights(replace(model.config, gelu=gelu), model.state_dict())
    if dataset:
        state = state | {'tokenizer': None, 'config': state.get('config', {}) | {'dataset': dataset}}
    return model, state


def check(to: str, dtype: str, model: GPT) -> None:
    """Refuse what the other format cannot hold."""
    if dtype not in DTYPES[to]:
        raise UserError(f'--dtype={dtype}: for --to={to} it must be {" or ".join(DTYPES[to])}')
    if to in PROGRAMS and model.config.gelu != 'tanh':
        raise UserError(f'{PROGRAMS[to]} approximates GELU by tanh, and this model has the exact one: what it computes '
                        'would change a little\ngive --gelu=tanh to export it all the same, or --to=hf')
    if to == 'llmc' and not model.config.tie_weights:
        raise UserError("llm.c predicts tokens with the table that embeds them, and this model's head is another "
                        'matrix\nit can be exported with --to=hf or --to=gguf')
    if dtype == 'float16' and any(p.abs().max() > torch.finfo(torch.float16).max for p in model.parameters()):
        raise UserError('this model has weights that float16 cannot hold: give another --dtype')


def complete(model: GPT, n_vocab: int) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The same function in the form that others expect: with biases, which may be zero, and without the rows that pad
    the vocabulary."""
    weights = model.state_dict()
    for name in [name for name in weights if name.endswith('.weight') and not name.endswith(WITHOUT_BIAS)]:
        weights.setdefault(f'{name.removesuffix("weight")}bias', torch.zeros(weights[name].size(0)))
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        weights[name] = weights[name][:n_vocab]
    return replace(model.config, bias=True, vocab_size=n_vocab), weights


def origin_of(state: checkpoint.State, vocabulary: Tokenizer) -> dict[str, Any]:
    """What a checkpoint says that only this project can read, in values that JSON has: nothing of the machine."""
    corpus = Path(state.get('config', {}).get('dataset', '')).name
    return {'tokenizer': vocabulary.state(), 'iter_num': state.get('iter_num', 0), 'best': state.get('best', {}),
            'config': {'dataset': corpus} if corpus else {}}


def card(name: str, config: GPTConfig, weights: dict[str, Tensor], state: checkpoint.State,
         vocabulary: Tokenizer) -> str:
    """The README.md of a Hugging Face folder: what the model is, and the numbers of its run."""
    settings, best = state.get('config', {}), state.get('best', {})
    tokens_in_step = settings.get('total_batch_size', 0) or math.prod(
        settings.get(part, 0) for part in ('gradient_accumulation_steps', 'batch_size', 'block_size'))
    numbers = {
        'corpus': Path(settings.get('dataset', '')).name,
        'steps': f'{state.get("iter_num", 0):,}',
        'tokens seen': f'{state.get("iter_num", 0) * tokens_in_step:,}' if tokens_in_step else '',
        'tokens of the corpus': f'{state["data"]["train"]["tokens"]:,}' if state.get('data') else '',
        'validation loss, nats per token': f'{best["loss"][0]:.4f}, at step {best["loss"][1]:,}' if best else '',
        'bits per byte': f'{best["bits_per_byte"][0]:.4f}' if 'bits_per_byte' in best else ''}
    rows = [f'| {label} | {value} |' for label, value in numbers.items() if value and state]
    tokens = f"{vocabulary.n_vocab:,} tokens of the tokenizer '{vocabulary.name}'"
    if vocabulary.name == 'char':
        tokens += ', which knows the characters of its corpus and refuses any other'
    tied = weights['lm_head.weight'].numel() if config.tie_weights else 0
    table = '\n'.join(['| | |', '|---|---|', *rows]) if rows else 'Nothing is known of its training.'
    return CARD.format(name=name, config=config, tokens=tokens, numbers=table, prompt=prompt_for(vocabulary),
                       parameters=sum(p.numel() for p in weights.values()) - tied)


def prompt_for(vocabulary: Tokenizer) -> str:
    """A text to try the model with."""
    try:
        vocabulary.encode('The')
    except UserError:
        return vocabulary.decode([vocabulary.n_vocab // 2])
    return 'The'


@contextmanager
def folder_to_fill(target: Path, to: str, overwrite: bool) -> Iterator[Path]:
    """A new folder, whose files are at `target` when all of them are written, and not before. An earlier export to the
    same form is replaced; anything else is not, unless told so."""
    if target.exists() and not target.is_dir():
        raise UserError(f'{target} is a file: give another --to_dir')
    earlier = huggingface.read_origin(target)
    others = [path.name for path in target.glob('*') if path.name != UNFINISHED]
    if others and not overwrite and earlier.get('to') != to:
        raise UserError(f'{target} holds other files than an export with --to={to}: give another --to_dir, or '
                        '--overwrite=True to write among them')
    temporary = target / UNFINISHED if target.is_dir() else target.with_name(f'.{target.name}{UNFINISHED}')
    shutil.rmtree(temporary, ignore_errors=True)  # what a kill has left
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f'{target} cannot be written: {error.strerror}') from None
    try:
        yield temporary
        if not target.exists():
            os.rename(temporary, target)
            return
        new = sorted(temporary.iterdir(), key=is_config)  # it comes last: without it nobody takes the folder for whole
        replaced = {path.name for path in new}.union(earlier['files'] if earlier.get('to') == to else ())
        for name in replaced.intersection(others):
            (target / name).unlink()
        for path in new:
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_config(path: Path) -> bool:
    return path.name == 'config.json'


def write_run(folder: Path, model: GPT, state: checkpoint.State, vocabulary: Tokenizer | None) -> None:
    """A checkpoint in a run's folder, so that all other scripts take it. Its optimizer state comes along, if it has
    one."""
    if checkpoint.holds_run(folder):
        raise UserError(f'{folder} holds a run already: give another --out_dir')
    folder.mkdir(parents=True, exist_ok=True)
    shape = {name: getattr(model.config, name) for name in checkpoint.SHAPE}
    args = checkpoint.model_args(model.config) | {'dropout': state.get('model_args', {}).get('dropout', 0.0)}
    checkpoint.write(folder, others.complete(state | {
        'model': model.state_dict(), 'model_args': args, 'config': state.get('config', {}) | shape,
        'tokenizer': vocabulary.state() if vocabulary else None}), 2, False)


def vocabulary_of(state: checkpoint.State, vocab_size: int, is_needed: bool) -> Tokenizer | None:
    """The tokenizer that the model has learned. A checkpoint of our own may do without, where that is not to be
    had."""
    try:
        return learned_tokenizer(state, vocab_size, corpus_of(state))
    except UserError as error:
        if is_needed:
            raise
        print(f'the tokenizer stays behind: {error}')
        return None


def next_step(to: str, target: Path, name: str, prompt: str) -> str:
    """What to type where the export is wanted."""
    if to == 'ckpt':
        return f'{errors.python()} sample.py --out_dir={shlex.quote(str(target))}'
    if to == 'gguf':
        modelfile = shlex.quote(f'{target}/Modelfile')
        return f'ollama create {name} -f {modelfile} && ollama run {name} {shlex.quote(prompt)}'
    if to == 'llmc':
        model = shlex.quote(f'{target.resolve()}/model.bin')
        return f'./train_gpt2cu -e {model}    # in llm.c'
    program = (f'from transformers import pipeline; '
               f"print(pipeline('text-generation', {str(target)!r})({prompt!r})[0]['generated_text'])")
    is_plain = re.fullmatch(r"[\w ;(),.'/\[\]-]+", program)
    return f'{errors.python()} -c ' + (f'"{program}"' if is_plain else shlex.quote(program))


def export(target: Path, to: str, dtype: str, overwrite: bool, name: str, model: GPT, state: checkpoint.State,
           vocabulary: Tokenizer) -> None:
    """Write a model that has passed `check`, and its tokenizer, to the folder `target`, in the form `to`."""
    config, weights = complete(model, vocabulary.n_vocab)
    config = replace(config, dropout=state.get('model_args', {}).get('dropout', 0.0))  # for those who train on
    precision = getattr(torch, dtype)
    with folder_to_fill(target, to, overwrite) as folder:
        if to == 'hf':
            huggingface.write(folder, config, weights, vocabulary, precision)
            (folder / 'README.md').write_text(card(name, config, weights, state, vocabulary), encoding='utf-8')
        elif to == 'gguf':
            gguf.write(folder, name, config, weights, vocabulary, precision)
        else:
            llmc.write(folder, config, weights, vocabulary, precision)
        files = sorted(path.name for path in folder.iterdir())
        origin = origin_of(state, vocabulary) | {'to': to, 'files': files}
        (folder / huggingface.ORIGIN).write_text(json.dumps(origin), encoding='utf-8')


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if upload.is_url(to_dir or out_dir):
        raise UserError(f'{upload.shown(to_dir or out_dir)} is no folder of this machine: give one as --to_dir')
    target = Path(to_dir).resolve() if to_dir else Path(out_dir) if to == 'ckpt' else Path(out_dir, to)
    model, state = open_source(init_from or out_dir, n_head, gelu, dataset)
    check(to, dtype, model)
    vocabulary = vocabulary_of(state, model.config.vocab_size, to != 'ckpt')
    name = re.sub(r'[^\w.-]', '-', Path(out_dir).resolve().name)
    if to == 'ckpt' or vocabulary is None:
        write_run(target, model, state, vocabulary)
    else:
        export(target, to, dtype, overwrite, name, model, state, vocabulary)
    for path in sorted(target.iterdir()):
        if path.is_file():
            print(f'{path.stat().st_size:15,} bytes  {path}')
    if vocabulary:
        print(f'next:\n    {next_step(to, target, name, prompt_for(vocabulary))}')


if __name__ == '__main__':
    errors.run(main)
