"""
Does any command line end in a traceback?

    python benchmarks/commands.py                       10,000 of them, drawn at random, over all scripts
    python benchmarks/commands.py --lines=500 --seed=7 --real=30

A copy of this project, in a temporary folder, is given small texts, a small trained model, and command lines that are
right but for one to three settings. Each is run by `main(args)` in this process, the last `real` ones as commands. Each
must end with exit code 0, or with one that README lists and a message of at most three lines. Exit code 1 says which
did not.
"""
import faulthandler
import importlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import configurator
from plaingpt.errors import CHECK_FAILED, UserError, code_of, run
from plaingpt.run.log import Log

# ------------------------------------------------------------------------------------------------
# Settings: the annotated names from here to the next rule. Nothing below assigns to them.
lines: int = 10000
real: int = 100  # of these lines are run as commands
seed: int = 1  # decides which lines these are
is_copy: bool = False  # this process is that of the copy, which the original starts
# ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]

SMALL = ['--device=cpu', '--dataset=tiny', '--n_layer=1', '--n_head=2', '--n_embd=8', '--block_size=8',
         '--batch_size=2', '--gradient_accumulation_steps=2', '--max_iters=2', '--eval_iters=1', '--sample_tokens=3']
RIGHT = {  # command lines that do little, and how often each is drawn
    'train': ([*SMALL, '--overwrite=True'], 8),
    'sample': (['--device=cpu', '--out_dir=trained', '--num_samples=2', '--max_new_tokens=3'], 4),
    'evaluate': (['--device=cpu', '--out_dir=trained', '--eval_iters=1'], 4),
    'export': (['--out_dir=trained', '--to_dir=exported', '--overwrite=True'], 4),
    'train_trivialised': (['--dataset=tiny', '--max_iters=1', '--n_layer=1', '--n_embd=8', '--n_head=1'], 1),
    'data.text.prepare': (['--input=rows.jsonl', '--tokenizer=byte', '--name=more'], 4),
    'data.fineweb_edu.prepare': (['--input=rows.jsonl', '--tokenizer=byte', '--name=more', '--shard_size=50'], 2),
    'data.openwebtext.prepare': (['--input=rows.jsonl'], 1),
    'data.tinystories.prepare': (['--input=rows.jsonl', '--val_input=rows.jsonl', '--tokenizer=byte'], 2),
    'data.shakespeare_char.prepare': (['--input=play.txt'], 1),
    'data.shakespeare.prepare': (['--input=play.txt'], 1),
}
WHOLE = ['0', '1', '3', '-1', '7', '30', '1e18', '-1e18', '2147483648', '9e18']
NUMBERS = ['0.5', '-0.5', '1e-18', '1e-300', '1e18', '-1e18', '1', '0', '1e10']
NO_NUMBERS = ['99999999999999999999', '1e300', '1e400', 'nan', 'inf', '', 'x', 'True', '1_0', '٣', "'1'", '2**3']
TEXTS = ['', ' ', '.', '..', 'none', 'none/none', '/dev/null', '/dev/null/none', '/proc/none', 'x' * 300, 'x' * 5000,
         'é日', '\udcff', 'a\nb', '\x1b[2J', '~none', '$HOME', '*', '[', '**', '?', "'", '"', "'x'", '{time}', '%s',
         'FILE:none', 'FILE:.', 'FILE:/dev/null', 'FILE:play.txt', 'FILE:trained/ckpt.pt', '<|endoftext|>', 'char',
         'byte', 'bpe:', 'bpe:0', 'bpe:-1', 'bpe:300', 'bpe:1e9', 'bpe:99999999999999', 'gpt2', 'gpt9', 'resume',
         'auto', 'scratch', 'cpu', 'cpu:7', 'cuda', 'cuda:99', 'mps', 'meta', 'gloo', 'nccl', 'val', 'val,val',
         'hellaswag', 'lambada,val', 'play.txt', 'rows.jsonl', '*.jsonl', 'tiny', 'tiny/*.bin', 'trained', 'trained/*',
         'trained/ckpt.pt', 'good.py', 'http://', 'http://[', 'http://127.0.0.1:1/..', 'http://a:b@127.0.0.1:1/c?d',
         'reference://x', 'zip://a::b', 'zip://*::play.txt', 'data:,x', 'hf://x', 'memory://x', 'nosuch://x', '://',
         'file://none', 'simplecache::file://none', 's3://', 'abc://\udcff']
EXTRAS = ['good.py', 'bad.py', 'none.py', '.', '', '-x', '--', '--=', '---', '--x', 'a=b', '\udcff', '--é=1',
          'trained/ckpt.pt', 'x' * 5000]
PATIENCE = 600  # seconds that a line may take; after that a traceback shows where it hangs
LONG = {'max_iters', 'eval_iters', 'num_samples', 'max_new_tokens', 'sample_tokens', 'compile'}  # large ones take long


def make_folder(folder: Path) -> None:
    """Copy the project, and write the files that the command lines name."""
    for path in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('data/*/prepare.py'), Path(__file__)):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(ROOT / 'config', folder / 'config')
    text = 'To be, or not to be: that is the question.\n'
    (folder / 'play.txt').write_text(text * 20, encoding='utf-8')
    (folder / 'rows.jsonl').write_text('{"text": "to be"}\n{"text": "or not to be"}\n' * 20, encoding='utf-8')
    (folder / 'good.py').write_text('import time\nseed = 3\n', encoding='utf-8')
    (folder / 'bad.py').write_text('seed = open("none")\n', encoding='utf-8')
    for command in (['data/text/prepare.py', '--input=play.txt', '--tokenizer=char', '--name=tiny'],
                    ['train.py', *SMALL, '--out_dir=trained']):
        subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def draw_line(chance: random.Random, scripts: dict[str, ModuleType]) -> tuple[str, list[str]]:
    """Draw a script, and arguments that are right but for a few."""
    [name] = chance.choices(list(RIGHT), [weight for _, weight in RIGHT.values()])
    args = list(RIGHT[name][0])
    settings = list(configurator.find_settings(scripts[name]))
    annotations = scripts[name].__annotations__
    for _ in range(chance.randint(1, 3)):
        setting = chance.choice(settings)
        kinds = configurator.alternatives(annotations[setting])
        values = [*filter(None, (kind for kind in kinds if isinstance(kind, str)))]
        values += [*['True', 'False'] * (bool in kinds), *WHOLE * (int in kinds), *NUMBERS * (float in kinds),
                   *TEXTS * (str in kinds)]
        if chance.random() < 0.1:
            values = NO_NUMBERS
        if setting in LONG:
            values = ['0', '1', '-1', 'x'] if int in kinds else ['False']
        args.append(f'--{setting}={chance.choice(values)}')
    if chance.random() < 0.2:
        args.insert(chance.randint(0, len(args)), chance.choice(EXTRAS))
    return name, args


def complaint_about(code: Any, message: str) -> str:
    """Return what is wrong with the end of a command; '' if nothing is."""
    if code not in (0, 1, 2, 3, 4, 5, 6, 7, 75):
        return f'exit code {code}'
    if 'Traceback' in message:
        return message
    return 'more than three lines' if code and message.count('\n') > 2 else ''


def call(main: Any, args: list[str]) -> tuple[Any, str, str]:
    """Return the exit code, the message and the complaint of one call in this process."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            main(args)
        return 0, '', ''
    except UserError as error:
        return error.code, str(error), complaint_about(error.code, str(error))
    except SystemExit as error:
        return error.code, '', complaint_about(error.code, '')
    except BaseException as error:
        code, text = code_of(error), traceback.format_exc()
        is_answered = isinstance(error, OSError) or code != CHECK_FAILED  # errors.run turns these into a message
        return code, text, '' if is_answered else text


def run_command(name: str, args: list[str]) -> tuple[Any, str, str]:
    """Return the same for a real command."""
    script = f'{name.replace(".", "/")}.py'
    done = subprocess.run([sys.executable, script, *args], stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, encoding='utf-8', errors='replace', timeout=300)
    return done.returncode, done.stderr, complaint_about(done.returncode, done.stderr.rstrip('\n'))


def try_lines() -> Iterator[tuple[Any, str]]:
    """Yield the exit code of each line, and a report if it was answered wrongly."""
    chance = random.Random(seed)
    scripts = {name: importlib.import_module(name) for name in RIGHT}
    for number in range(lines):
        name, args = draw_line(chance, scripts)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if number < lines - real:
            code, message, complaint = call(scripts[name].main, args)
        else:
            code, message, complaint = run_command(name, args)
        faulthandler.cancel_dump_traceback_later()
        shown = ' '.join(arg if len(arg) < 100 else f'{arg[:50]}...' for arg in args)
        yield code, f'\n{name} {shown!a}\ncode {code}: {complaint}\n{message[-1500:]}' if complaint else ''


def report() -> None:
    """Try all lines, and print the results."""
    begun, codes, n_wrong = time.monotonic(), Counter[str](), 0
    with patch.object(Log, 'plot'):  # pictures take longer than such a run
        for code, text in try_lines():
            codes[str(code)] += 1
            n_wrong += bool(text)
            if text:
                print(text, flush=True)
    print(f'{lines} command lines, {real} of them as commands, in {time.monotonic() - begun:.0f} seconds; exit codes '
          + ', '.join(f'{code}: {n}' for code, n in sorted(codes.items())))
    if n_wrong:
        raise UserError(f'{n_wrong} command lines were not answered as they should be', CHECK_FAILED)


def main(args: list[str]) -> None:
    configurator.configure(sys.modules[__name__], args)
    if is_copy:
        return report()
    surroundings = {'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'disabled', 'AWS_EC2_METADATA_DISABLED': 'true'}
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / 'copy'
        make_folder(folder)
        command = [sys.executable, f'benchmarks/{Path(__file__).name}', *args, '--is_copy=True']
        done = subprocess.run(command, cwd=folder, env=os.environ | surroundings)
    sys.exit(done.returncode)


if __name__ == '__main__':
    run(main)
