"""
Take a model elsewhere: to Hugging Face, to llama.cpp and Ollama, to llm.c; or bring another project's model here.

    python export.py --out_dir=out-stdlib --to=hf                            a run, to out-stdlib/hf
    python export.py --init_from=theirs.pt --out_dir=out-theirs --to=ckpt    another project's model, as a run
"""
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import configurator  # before PyTorch, so that it is imported faster

# isort: split

import torch

from plaingpt import console, errors, files, lock
from plaingpt.errors import UserError
from plaingpt.formats import gguf, huggingface, llmc, others
from plaingpt.formats.exported import Exported
from plaingpt.init_from import corpus_of, learned_tokenizer, open_model
from plaingpt.paths import is_url
from plaingpt.run import checkpoint

# ------------------------------------------------------------------------------------------------
# Settings
out_dir: str = 'out'  # of the run
init_from: str = ''  # a checkpoint file, a run's folder, a Hugging Face folder, llm.c's model or 'gpt2*'; '' is out_dir
to: Literal['hf', 'gguf', 'llmc', 'ckpt'] = 'hf'  # Hugging Face; llama.cpp and Ollama; llm.c; a checkpoint of plainGPT
to_dir: str = ''  # the folder to write; '' is out_dir/hf, out_dir/gguf or out_dir/llmc, and for 'ckpt' out_dir itself
dtype: Literal['float32', 'float16', 'bfloat16', 'q8_0'] = 'float32'  # of the file's weights; 'q8_0' is 8 bits, in GGUF
overwrite: bool = False  # write into a folder that holds other files, over those of the same names
# a checkpoint of another project may not say these
n_head: int = 0  # 0 takes what it says
gelu: Literal['', 'tanh', 'exact'] = ''  # '' takes what it says; the other one changes slightly what a model computes
dataset: str = ''  # the corpus whose tokenizer the model has learned: a folder in data/, or any folder
# ------------------------------------------------------------------------------------------------

UNFINISHED = '.exporting'  # the name of a folder until it is whole
BY_TANH = ('approximates GELU by tanh, and this model has the exact one: what it computes would change a little\n'
           'give --gelu=tanh to export it all the same, or --to=hf')
ONLY_HF = 'and not the modern model: that can be exported with --to=hf, if it has no shortcuts'


class Format(NamedTuple):
    """A format that `to` may name."""

    write: Callable[[Path, Exported], None]  # into a new folder; for a checkpoint, the folder of the run
    dtypes: tuple[str, ...]
    needs: dict[str, tuple[Any, str]]  # by the names of GPTConfig: the only value, and why there is no other
    next_step: str  # the command that uses the export; the function of this name lists what may be in {}
    optional: tuple[str, ...] = ()  # files that one export writes and another does not
    is_run: bool = False  # a checkpoint of plainGPT: it may lack biases and a tokenizer


def write_run(folder: Path, exported: Exported) -> None:
    """Write a checkpoint into the folder of a run, so that all other scripts take it. Its optimizer state comes along,
    if it has one."""
    if checkpoint.holds_run(folder):
        raise UserError(f'{folder} holds a run already: give another --out_dir')
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write(folder, others.complete(exported.state | {
        'model': exported.weights,
        'model_args': checkpoint.model_args(exported.config),
        'config': exported.state.get('config', {}) | checkpoint.shape_of(exported.config),
        'tokenizer': exported.learned.state() if exported.learned else None}), 2, False)


FORMATS = {
    'hf': Format(
        huggingface.write,
        dtypes=('float32', 'float16', 'bfloat16'),
        needs={'shortcuts': (False, (
            "no class of transformers has this model's shortcuts from its first layer to all others\n"
            'use sample.py and evaluate.py, or train a model with --shortcuts=False'))},
        next_step='{python} -c {pipeline}'),
    'gguf': Format(
        gguf.write,
        dtypes=('float32', 'float16', 'q8_0'),
        needs={
            'arch': ('gpt2', f'llama.cpp computes GPT-2, {ONLY_HF}'),
            'gelu': ('tanh', f'llama.cpp {BY_TANH}')},
        next_step='ollama create {name} -f {folder}/Modelfile && ollama run {name} {prompt}'),
    'llmc': Format(
        llmc.write,
        dtypes=('float32', 'bfloat16'),
        needs={
            'arch': ('gpt2', f'llm.c computes GPT-2, {ONLY_HF}'),
            'gelu': ('tanh', f'llm.c {BY_TANH}'),
            'tie_weights': (True, (
                "llm.c predicts tokens with the table that embeds them, and this model's head is another matrix\n"
                'it can be exported with --to=hf or --to=gguf'))},
        next_step='./train_gpt2cu -e {absolute}/model.bin    # in llm.c',
        optional=('tokenizer.bin',)),
    'ckpt': Format(
        write_run,
        dtypes=('float32',),
        needs={},
        next_step='{sample} --out_dir={folder}',
        is_run=True),
}


def open_source() -> Exported:
    """Return the model that the settings name; what they say about it takes precedence over what its file says."""
    source = init_from or out_dir
    model, state = open_model(source, answers={name: value for name, value in
                                               (('n_head', n_head), ('gelu', gelu)) if value})
    if n_head and n_head != model.config.n_head:
        raise UserError(f'--n_head={n_head} was given, and the model in {source} has {model.config.n_head}: leave it '
                        'out')
    if dataset:
        state = state | {'tokenizer': None, 'config': state.get('config', {}) | {'dataset': dataset}}
    if gelu and model.config.arch == 'modern':
        console.say('gelu has no effect: arch=modern decides')
    config = replace(model.config, gelu=gelu or model.config.gelu,
                     dropout=state.get('model_args', {}).get('dropout', 0.0))  # if the training is to continue
    learned = None
    try:
        learned = learned_tokenizer(state, config.vocab_size, corpus_of(state), bool(dataset))
    except UserError as error:
        if not FORMATS[to].is_run:
            raise
        console.say(f'the tokenizer is left out: {error}')
    return Exported(
        name=re.sub(r'[^\w.-]', '-', Path(console.shown(out_dir)).resolve().name),
        config=config,
        weights=model.state_dict(),
        learned=learned,
        dtype=dtype,
        state=state)


def check(exported: Exported) -> None:
    """Raise UserError for a model that the other format cannot hold."""
    if dtype not in FORMATS[to].dtypes:
        raise UserError(f'--dtype={dtype}: for --to={to} it must be {" or ".join(FORMATS[to].dtypes)}')
    for name, (value, reason) in FORMATS[to].needs.items():
        if getattr(exported.config, name) != value:
            raise UserError(reason)
    if dtype == 'float16' and any(p.abs().max() > torch.finfo(torch.float16).max for p in exported.weights.values()):
        raise UserError('this model has weights that float16 cannot hold: give another --dtype')


def write_folder(target: Path, exported: Exported) -> None:
    """Write the model to the folder `target`, in which the files appear when all of them are written. An earlier export
    to the same format is replaced; other files are not, unless `overwrite` says so."""
    if target.exists() and not target.is_dir():
        raise UserError(f'{target} is a file: give another --to_dir')
    is_again = huggingface.read_origin(target).get('to') == to
    if not (is_again or overwrite) and any(path.name != UNFINISHED for path in target.glob('*')):
        raise UserError(f'{target} holds files that are not an export with --to={to}: give another --to_dir, or '
                        '--overwrite=True to write among them')
    temporary = target / UNFINISHED if target.is_dir() else target.with_name(f'.{target.name}{UNFINISHED}')
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    try:
        with files.about(target):
            temporary.mkdir(parents=True)
            FORMATS[to].write(temporary, exported)
            huggingface.write_origin(temporary, exported, to)
        if not target.exists():
            temporary.rename(target)
        else:  # config.json comes last: without it no program takes the folder for whole
            new = sorted(temporary.iterdir(), key=lambda path: path.name == 'config.json')
            for name in (*(FORMATS[to].optional if is_again else ()), *(path.name for path in new)):
                (target / name).unlink(missing_ok=True)
            for path in new:
                path.replace(target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def next_step(target: Path, exported: Exported) -> str:
    """Return the command that uses the export."""
    program = (f'from transformers import pipeline; '
               f"print(pipeline('text-generation', {str(target)!r})({exported.prompt!r})[0]['generated_text'])")
    is_plain = re.fullmatch(r"[\w ;(),.'/\[\]-]+", program)
    return FORMATS[to].next_step.format(
        python=errors.python(), sample=errors.command('sample.py'), name=exported.name,
        prompt=shlex.quote(exported.prompt),
        folder=shlex.quote(str(target)), absolute=shlex.quote(str(target.resolve())),
        pipeline=f'"{program}"' if is_plain else shlex.quote(program))


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if is_url(to_dir or out_dir):
        raise UserError(f'{to_dir or out_dir} is not a folder on this machine: give one as --to_dir')
    target = Path(to_dir).resolve() if to_dir else Path(out_dir, '' if FORMATS[to].is_run else to)
    exported = open_source()
    check(exported)
    if FORMATS[to].is_run:
        with lock.owned(target):
            write_run(target, exported)
    else:
        write_folder(target, exported.complete())
    for path in sorted(filter(Path.is_file, target.iterdir())):
        console.say(f'{path.stat().st_size:15,} bytes  {path}')
    if exported.learned:
        console.say(f'next:\n    {next_step(target, exported)}')


if __name__ == '__main__':
    errors.run(main)
