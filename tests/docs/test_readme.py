"""The promises of README and docs/: their commands are run as they stand there, and what they say of files and settings
is compared.

What a table marks with † needs a GPU or a download. A command that this file runs is in RUN, any other one in
EXCEPTIONS, with the reason; if the reason is a GPU or a download, the page must say so.
"""
import ast
import importlib
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from configurator import find_settings
from tests.waiting import PATIENT

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding='utf-8') for path in (
    ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md')))
    if path.name != 'changing.md'}  # tests/docs/test_changing.py reads that
GUIDE = '\n'.join(PAGES.values())
PROSE = re.sub(r'^```.*?^```$', '', GUIDE, flags=re.MULTILINE | re.DOTALL)  # without their blocks of code
PROGRAMS = ('make ', 'python ', 'python3 ', '.venv/bin/python ', 'torchrun ', 'pip ', 'diff ', '. ', 'sbatch ', 'srun ',
            'kubectl ', 'docker ', 'plaingpt ')
MARKS = {'a GPU': ('†', 'GPU', 'Apple'), 'a download': ('†', 'download', 'hub'),
         'a cluster': ('machines', 'cluster', 'Slurm')}  # the words by which README says so


class Run(NamedTuple):
    """A run of one of README's commands."""

    more: str  # settings that are appended, to make it short
    expected: str  # a regular expression, found in the output; its group is the number that README says to expect


TRAIN, SAMPLE = '--max_iters=3 --eval_iters=1 --sample_tokens=5', '--max_new_tokens=5 --num_samples=1'
PLAIN = Run('--max_iters=3', r'\nval loss \d\.\d{4}\n')
VENV, ACTIVATE = 'python3 -m venv .venv', '. .venv/bin/activate'  # `clone` runs the first, every test the other
DEFAULT = 'python train.py config/train_stdlib.py'

# In an order in which each command finds what it needs
RUN = {
    'python data/stdlib/prepare.py': Run('', r'(?m)^train: .* tokens, (\d\.\d+) bytes of text each'),
    'python train.py config/train_gpt2.py --plan=True':
        Run('', r'(?m)^124,3\d\d,\d+ parameters: 12 layers of 12 heads'),
    f'{DEFAULT} --check=True': Run('', r'\n9 checks passed\n'),
    f'{DEFAULT} --overwrite=True': Run(TRAIN, r'\n=== step 3 ===\n'),
    f'{DEFAULT} --overwrite=True --reference=docs/curves/stdlib.csv': Run(TRAIN, r'\n=== step 3 ===\n'),
    'python -m plaingpt.run.reference out-stdlib mytext.csv': Run('', r'mytext\.csv is written'),
    f'{DEFAULT} --init_from=auto': Run('--max_iters=5 --eval_iters=1', r'\nresuming at step 3\b'),
    '.venv/bin/python sample.py --out_dir=out-stdlib --start="def main("': Run(SAMPLE, r'(?m)^def main\('),
    '.venv/bin/python sample.py --out_dir=out-stdlib --interactive=True':
        Run('--max_new_tokens=5 < requirements-core.txt', r'(?s)(?:\n-{15}\n.*){5}'),
    'python xray.py --out_dir=out-stdlib': Run('', r'\nopen xray\.html in a browser\n'),
    "python xray.py --out_dir=out-stdlib --text='def read('": Run('', r'\n *\d+\.\d\d +\d+  \( +\S+ [\d.]+ %'),
    'python export.py --out_dir=out-stdlib --to=hf': Run('', r' out-stdlib/hf/model\.safetensors\n(?s:.*)\nnext:\n'),
    'python export.py --out_dir=out-stdlib --to=gguf': Run('', r' out-stdlib/gguf/model\.gguf\n(?s:.*)ollama create'),
    'python export.py --out_dir=out-stdlib --to=llmc': Run('', r' out-stdlib/llmc/model\.bin\n(?s:.*)train_gpt2cu'),
    'python export.py --init_from=MODEL.pt --out_dir=out-model --to=ckpt --n_head=12 --gelu=tanh':
        Run('--n_head=4 --dataset=stdlib', r' out-model/ckpt\.pt\n'),
    'python evaluate.py --out_dir=out-stdlib': Run('--eval_iters=2', r'bits_per_byte\nout-stdlib, step \d+ +\d+\.\d+ '),
    'python evaluate.py --init_from="out-stdlib/ckpt*.pt"':
        Run('--eval_iters=1', r'\nout-stdlib/ckpt\.1\.pt, step \d .*\nout-stdlib/ckpt\.pt, step \d '),
    'python evaluate.py --out_dir=out-stdlib --dataset=README.md':
        Run('--eval_iters=1', r'\ntext of README\.md\n +loss .*\nout-stdlib, step \d+ +\d+\.\d+ '),
    'python train.py config/train_modern_stdlib.py': Run(TRAIN, r'\n=== step 3 ===\n'),
    'python sample.py --out_dir=out-modern-stdlib': Run(SAMPLE, r'-{15}\n'),
    f'{DEFAULT} --overfit_single_batch=True --max_iters=100': Run('', r'\nPASS: .* in 100 steps\n'),
    'torchrun --standalone --nproc_per_node=2 train.py config/train_stdlib.py --device=cpu --out_dir=out-two '
    '--overwrite=True':
        Run(TRAIN, r'(?s)\b2 processes; .*\n=== step 3 ===\n'),
    'python learn.py': Run('', r'(?m)^ +11  attend +model_trivialised\.py +not begun$'),
    'python learn.py start 11': Run('', r'exercises/11_attend\.py is written'),
    'python learn.py hint 11': Run('', r'rows are queries'),
    'python learn.py bug 16': Run('', r'exercises/bug_16_adamw\.py is written.*\na small GPT with it ends at'),
    'python -m plaingpt.run.report out-stdlib out-two': Run('', r'^open report\.html in a browser\n$'),
    'python train_trivialised.py --max_iters=1': Run('', r'(?m)^step 0, loss (\d\.\d+)'),
    'python course/00_window.py': Run('', r"(?m)^ *\d+ +\d+ +'"),
    'python course/01_counting.py': Run('', r'(?m)^counting tokens +(\d\.\d+)'),
    'python course/02_itself.py': PLAIN,
    'python course/03_average.py': PLAIN,
    'python course/06_flash.py': Run('', r'(?m)^ +\d+\.\d\d times as fast as rung 5, and apart from it by: logits \de'),
    'python train_trivialised.py --n_layer=1': PLAIN,
    'python train_trivialised.py --learning_rate=4e-4': PLAIN,
    'python train_trivialised.py': PLAIN,
    'python data/text/prepare.py --input=PATH --tokenizer=bpe:4096 --name=mytext':
        Run('', r'\n    python train\.py config/train_stdlib\.py --dataset=mytext --out_dir=out-mytext\n'),
    f'{DEFAULT} --dataset=mytext --out_dir=out-mytext': Run(TRAIN, r'\n=== step 3 ===\n'),
    'python sample.py --out_dir=out-mytext': Run(SAMPLE, r'-{15}\n'),
    'python train.py --help': Run('', re.escape("out_dir: str = 'out'\n")),
    'python benchmarks/fast_marks.py': Run('', r'(?m)^AdamW +\d'),
    'python benchmarks/memory.py': Run('--n_layer=1', r'2 processes: ddp 16\.\d\d .*, zero1 1[23]\.\d\d .*, fsdp 8\.'),
    'diff model_trivialised.py model.py || test $? = 1': Run('', r'# fast: '),  # 1: they differ
}
GPT2_ON_A_CPU = ('python train.py config/train_gpt2.py --device=cpu --compile=False --block_size=256 --batch_size=4 '
                 '--n_layer=4 --n_head=4')
EXCEPTIONS = {
    'make train': 'tests/test_pipeline.py runs it',
    'make test': 'runs this very file',
    'make test-fast': 'is a part of make test',
    'make lint': '.ci/run runs it',
    'make reference': 'test_the_settings_are_those_of_the_scripts_line_for_line compares what it writes',
    'python -m pytest tests/test_twins.py -k causal': 'is a part of what runs this file',
    'pip install .': 'tests/test_installed.py installs the wheel',
    'uv venv && uv pip install . && . .venv/bin/activate': 'a download',
    'plaingpt prepare stdlib && plaingpt train config/train_stdlib.py': 'tests/test_installed.py runs both, shorter',
    'pip install -e .': 'tests/test_setup.py does',
    'python -m build': 'tests/test_installed.py makes the same two files without that package',
    'plaingpt prepare stdlib': 'tests/test_installed.py runs it for a smaller text',
    'plaingpt train config/train_stdlib.py': 'tests/test_installed.py runs it, shorter',
    'plaingpt sample --out_dir=out-stdlib': 'tests/test_installed.py runs it',
    'python -m plaingpt': 'tests/test_installed.py runs it',
    'plaingpt train --help': 'tests/test_installed.py runs it',
    'python -m torch.distributed.run --standalone --nproc_per_node=gpu -m plaingpt train config/train_gpt2.py': 'a GPU',
    'python benchmarks/ablate.py': 'takes hours; tests/test_ablate.py runs it, shorter',
    'python benchmarks/modern.py': 'takes half an hour',
    'python course/all.py': 'tests/test_course.py proves each rung',
    'python course/all.py --measure=True': 'writes what was measured; tests/test_course.py proves each rung',
    'python course/ladder.py --only=depth': 'takes many minutes',
    'python learn.py check 11': 'tests/learning/test_learn.py passes and fails it: one that is only begun fails',
    'make ladder': 'takes an hour; tests/test_course.py holds its numbers together',
    'python -m pytest tests/test_twins.py': 'is a part of what runs this file',
    'pip install -r requirements-core.txt': 'a download',
    'pip install -r requirements.txt': 'a download',
    'pip install -r requirements-test.txt && python -m pytest': 'a download',
    'python data/shakespeare/prepare.py': 'a download',
    'python data/fineweb_edu/prepare.py': 'a download',
    "python train.py config/train_stdlib.py --dataset='SHARDS/*.bin' --out_dir=out-shards":
        'tests/corpus/test_shards.py trains on such files',
    'python train.py config/overfit_tinyshakespeare.py': 'a download',
    'python train.py config/train_tinystories.py': 'a download',
    'torchrun --standalone --nproc_per_node=8 train.py config/train_fineweb_edu.py': 'a GPU',
    'python sample.py --init_from=gpt2-xl --start="What is the answer to life, the universe, and everything?"':
        'a download',
    'python train.py config/finetune_shakespeare.py': 'a download',
    'python train.py config/finetune_shakespeare.py --init_from=gpt2': 'a download',
    'python train.py config/eval_gpt2.py': 'a download',
    'python evaluate.py --out_dir=out-stdlib --tasks=val,hellaswag,lambada --limit=200': 'a download',
    'torchrun --standalone --nproc_per_node=gpu evaluate.py --init_from=gpt2-xl --tasks=hellaswag,lambada': 'a GPU',
    'python train.py config/gpt_nano.py': 'a download',
    'python train.py config/train_shakespeare_char.py': 'a GPU',
    'python train.py config/train_modern_shakespeare_char.py': 'a download',
    'torchrun --standalone --nproc_per_node=8 train.py config/train_modern.py': 'a GPU',
    'python train.py config/train_gpt2.py --device=mps --compile=False --batch_size=4': 'a GPU',
    'python train.py config/train_gpt2.py --device=cuda': 'a GPU',
    'torchrun --standalone --nproc_per_node=gpu train.py config/train_gpt2.py': 'a GPU',
    'torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py': 'a GPU',
    'torchrun --standalone --nproc_per_node=gpu --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 '
    '--shutdown-timeout=120 train.py config/train_gpt2.py --init_from=auto': 'a GPU',
    **{f'torchrun --nnodes=2 {more} train.py config/train_gpt2.py': 'a cluster' for more in (
        '--node_rank=0 --nproc_per_node=8 --master_addr=HOST', '--node_rank=1 --nproc_per_node=8 --master_addr=HOST',
        '--nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500')},
    'srun python train.py config/train_gpt2.py': 'a cluster',
    'sbatch launch/slurm.sbatch config/train_gpt2.py --out_dir=/shared/out-gpt2': 'a cluster',
    'sbatch --nodes=4 --partition=gpu launch/slurm.sbatch config/train_gpt2.py --out_dir=/shared/out-gpt2': 'a cluster',
    'sbatch --nodes=2 launch/slurm.sbatch config/train_gpt2.py --out_dir=/fsx/out-gpt2': 'a cluster',
    'pip install aws-parallelcluster': 'a cluster',
    'pcluster create-cluster --cluster-name=plaingpt --cluster-configuration=launch/aws-cluster.yaml': 'a cluster',
    'pcluster ssh --cluster-name=plaingpt -i KEY.pem': 'a cluster',
    'pcluster delete-cluster --cluster-name=plaingpt': 'a cluster',
    'docker build -f launch/Dockerfile -t REGISTRY/plaingpt:1 . && docker push REGISTRY/plaingpt:1': 'a cluster',
    'docker buildx imagetools inspect python:3.12.12-slim-bookworm': 'a cluster',
    'docker build --build-arg=BASE=python:3.12.12-slim-bookworm@sha256:DIGEST -f launch/Dockerfile '
    '-t REGISTRY/plaingpt:1 .': 'a cluster',
    'kubectl create secret generic plaingpt --from-env-file=secrets.env': 'a cluster',
    'kubectl apply -f launch/kubernetes.yaml': 'a cluster',
    'kubectl logs -f job/plaingpt': 'a cluster',
}
SHORT_GPT2 = '--n_embd=32 --max_iters=2 --gradient_accumulation_steps=2 --eval_iters=1 --sample_tokens=5'


def tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of each table, by what its first column is called."""
    found = {}
    for table in re.findall(r'(?:^\|.*\n)+', text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip('|').split(' | ')] for line in table.splitlines())
        found[head[0].strip('| ')] = [[cell.strip('| ') for cell in row] for row in rows]
    return found


def block(language: str) -> list[str]:
    """Return the lines of the code blocks in a language."""
    blocks = re.findall(rf'^```{language}\n(.*?)^```$', GUIDE, re.MULTILINE | re.DOTALL)
    return ''.join(blocks).splitlines()


def commands() -> dict[str, str]:
    """Return every command that a page shows, without its comment, and the line that it stands in."""
    lines = {line: line for line in block('sh')}
    for line in PROSE.splitlines():
        lines |= {span: line for span in spans(line) if span.startswith(PROGRAMS)}
    return {re.sub(r'\s+# .*', '', command).strip(): line for command, line in lines.items()}


def spans(text: str) -> list[str]:
    """Return the texts in `backticks`."""
    return re.findall(r'`([^`\n]+)`', text)


def top_level_files() -> list[str]:
    return sorted(path.name for path in ROOT.glob('*.py'))


# ------------------------------------------------------------------------------------------------
# The commands


def test_every_command_is_run_by_a_test_or_is_an_exception() -> None:
    shown, run = set(commands()), {command.partition(' || ')[0] for command in RUN} | {GPT2_ON_A_CPU, VENV, ACTIVATE}
    assert not run & EXCEPTIONS.keys()
    assert shown - run - EXCEPTIONS.keys() == set(), 'run these in tests/docs/test_readme.py, or say there why not'
    assert (run | EXCEPTIONS.keys()) - shown == set(), 'README no longer shows these'


def test_readme_marks_what_needs_a_gpu_or_a_download() -> None:
    sections = re.split(r'^##?#? .*$', GUIDE, flags=re.MULTILINE)
    for command, line in commands().items():
        marks = MARKS.get(EXCEPTIONS.get(command, ''), ())
        section = next(section for section in sections if line in section)
        if '|' in line:
            assert ('†' in line) == bool(marks), line
        elif marks:
            assert any(mark in section for mark in marks), f'{line}: does not say that it needs {EXCEPTIONS[command]}'


@pytest.fixture(scope='module')
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of a clone of the repository, a .venv as README makes it, and the packages that
    these tests need in it."""
    folder = tmp_path_factory.mktemp('clone')
    for pattern in ('*.py', 'plaingpt/**/*.py', 'plaingpt/**/*.html', '*.txt', 'README.md', 'Makefile',
                    'benchmarks/*.py', 'config/*.py', 'course/*.py', 'docs/curves/*.csv', 'data/*/prepare.py'):
        for file in ROOT.glob(pattern):
            (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ROOT))
    shell(folder, VENV)
    packages = next((folder / '.venv/lib').glob('python*/site-packages'))
    (packages / 'borrowed.pth').write_text('\n'.join(site.getsitepackages()), encoding='utf-8')
    return folder


def shell(folder: Path, *lines: str) -> str:
    """Return what the lines print that a user types in a terminal; each must exit with code 0. No GPU is found, and no
    key for wandb."""
    secret = ('WANDB', 'MAKE', 'VIRTUAL_ENV')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(secret)}
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'  # that environment's python3 and torchrun
    result = subprocess.run(['sh', '-e', '-c', '\n'.join(lines)], cwd=folder, stdin=subprocess.DEVNULL, timeout=PATIENT,
                            env={**environment, 'PATH': path, 'CUDA_VISIBLE_DEVICES': '', 'NETRC': str(folder / 'no'),
                                 'WANDB_CONFIG_DIR': str(folder)},
                            capture_output=True, text=True, encoding='utf-8')
    assert result.returncode == 0, f'{lines[-1]}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}'
    assert 'Traceback' not in result.stderr, f'{lines[-1]}\n{result.stderr[-2000:]}'
    return result.stdout


@pytest.mark.slow
def test_the_commands_do_what_readme_says(clone: Path, tiny_text: str) -> None:
    """The commands run as written, except for PATH, and are made short by settings that are appended."""
    (clone / 'texts').mkdir()
    for number, text in enumerate(tiny_text.split('\nclass ')):
        (clone / f'texts/{number}.txt').write_text(text, encoding='utf-8')
    torch, model = importlib.import_module('torch'), importlib.import_module('model')
    torch.save(model.GPT(model.GPTConfig(16, 1024, 1, 4, 16)).state_dict(), clone / 'MODEL.pt')
    for command, (more, expected) in RUN.items():
        output = shell(clone, ACTIVATE, f'{command.replace("PATH", "texts")} {more}')
        found = re.search(expected, output)
        assert found, f'{command}\n{output}'
        for measured in found.groups():
            row = next(row for table in tables(README).values() for row in table if f'`{command}`' in row)
            assert float(measured) == pytest.approx(float(re.findall(r'\d+\.\d+', row[-1])[0]), abs=0.1), command

    listed = set(spans(PAGES['docs/reference.md'].partition('## Files')[2].partition('\n## ')[0]))
    left = {path.name for folder in ('data/stdlib', 'out-stdlib') for path in (clone / folder).iterdir()
            if path.is_file()} - {'prepare.py'}
    assert left - listed == set(), 'docs/reference.md lists the files of a corpus and of a run'
    assert listed - left == {'data/<name>/', 'out_dir/', 'val_000000.bin', 'train_000001.bin', '.lock', 'requeued.json'}


@pytest.mark.slow
@pytest.mark.usefixtures('gpt2_stand_in')
def test_gpt2_trains_on_a_cpu_and_continues_without_a_key_for_wandb(clone: Path, tmp_path: Path) -> None:
    (tmp_path / 'some.jsonl').write_bytes((ROOT / 'tests/data/documents.jsonl').read_bytes() * 10)
    prepare = f'python data/openwebtext/prepare.py --input={tmp_path}/some.jsonl --val_fraction=0.1'
    output = shell(clone, ACTIVATE, prepare, f'{GPT2_ON_A_CPU} {SHORT_GPT2}')
    assert len(re.findall(r'^wandb is off: .*; the run continues$', output, re.MULTILINE)) == 1
    assert re.search(r'^tokens per iteration will be: 2,048 = 8 windows of 256', output, re.MULTILINE)
    assert re.search(r'^step 2: train loss \d+\.\d+, val loss \d+\.\d+$', output, re.MULTILINE)
    assert output.endswith('python sample.py --out_dir=out\n')


# ------------------------------------------------------------------------------------------------
# README's statements


def test_no_number_is_missing() -> None:
    assert re.findall(r'.*@@[A-Z].*', GUIDE) == []


def test_the_settings_are_those_of_the_scripts_line_for_line() -> None:
    reference = runpy.run_path(str(ROOT / 'docs/reference.py'))
    assert PAGES['docs/reference.md'] == reference['page'](), 'make reference writes it anew'
    for script in reference['SCRIPTS']:
        settings = PAGES['docs/reference.md'].partition(f'### {script}\n\n```python\n')[2].partition('```')[0]
        assert re.findall(r'^(\w+): ', settings, re.MULTILINE) == list(find_settings(importlib.import_module(
            script.removesuffix('.py').replace('/', '.')))), script


def test_the_exit_codes_are_those_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = importlib.import_module('plaingpt.errors')
    sources = [path.read_text(encoding='utf-8') for pattern in ('*.py', 'plaingpt/**/*.py', 'data/*/*.py')
               for path in ROOT.glob(pattern)]
    names = [name for name, value in vars(errors).items() if type(value) is int and name.isupper()]
    used = {getattr(errors, name): name for name in set(names) & names_read(sources)}
    rows = {int(code): meaning for code, meaning in tables(GUIDE)['code']}
    assert list(rows) == sorted(used)
    for code, name in used.items():
        words = {'INTERRUPTED': 'ctrl-c'}.get(name, name.lower()).split('_')
        assert set(words) <= set(re.findall(r'[\w-]+', rows[code].lower())), f'{rows[code]!r} does not mean {name}'


def names_read(sources: list[str]) -> set[str]:
    """Return the variables and attributes that some file reads."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    read = [node for node in nodes if isinstance(getattr(node, 'ctx', None), ast.Load)]
    return {getattr(node, 'id', '') or getattr(node, 'attr', '') for node in read}


FAULTS = {  # the test in tests/ that proves each row of the table of faults
    'SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGQUIT, Ctrl-C':
        'test_watch.test_a_signal_ends_a_run_after_its_step_and_the_same_command_continues',
    'a second Ctrl-C': 'test_watch.test_a_second_interrupt_leaves_at_once',
    'the output no longer has a reader, as when Ctrl-C ends `tee` too':
        'test_watch.test_a_run_whose_output_is_closed_saves_and_ends',
    'the terminal is closed (SIGHUP), without `nohup`':
        'test_watch.test_a_run_whose_terminal_is_closed_saves_and_ends_unless_nohup_protects_it',
    '`--max_hours` has passed': 'test_watch.test_a_run_ends_when_its_time_is_up',
    'SIGKILL at any moment, also while saving or uploading': 'test_kills.test_kills_at_any_moment_change_nothing',
    'a process dies, freezes or hangs': 'test_watch.test_a_process_that_is_lost_is_named_and_the_others_end',
    'a process fails': 'test_watch.test_the_others_repeat_what_ended_a_process',
    'torchrun dies on one of two machines':
        'test_watch.test_two_agents_train_as_one_and_a_job_that_lost_an_agent_ends_and_continues',
    '`ckpt.pt` is damaged, cut off or empty':
        'test_train.test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_a_line_says_so',
    'every checkpoint is damaged': 'test_watch.test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over',
    'the disk is full': 'test_watch.test_a_full_disk_ends_the_run_and_leaves_what_was_saved',
    'the disk would become full': 'test_watch.test_a_run_that_would_fill_the_disk_does_not_begin',
    '`out_dir` is deleted': 'test_watch.test_a_run_whose_folder_is_deleted_makes_it_again',
    '`out_dir` may not be written to, a name is too long, too many files are open':
        'test_errors.test_what_else_the_system_refuses_is_not_taken_for_damage_or_a_full_disk',
    'a loss or gradient that is not finite':
        'test_watch.test_an_infinite_loss_on_one_of_two_processes_skips_the_step_on_both',
    'ten of them in a row': 'test_watch.test_ten_steps_in_a_row_that_are_not_finite_end_the_run',
    'memory runs out': 'test_watch.test_a_batch_that_is_too_large_is_answered_with_the_settings_that_fit',
    'the corpus has changed since': 'test_train.test_a_resume_on_another_corpus_is_refused_unless_asked_for',
    'the corpus is damaged':
        'test_train.test_a_corpus_that_differs_only_in_the_middle_is_another_one_and_damage_ends_the_run',
    'the corpus shrinks while it is read': 'test_folder.test_a_file_that_shrinks_while_it_is_read_ends_in_a_message',
    'a second run in the same `out_dir`, such as a requeued job whose predecessor lives':
        'test_watch.test_of_two_runs_in_one_folder_the_second_waits_for_the_first',
    'two machines do not share `out_dir`': 'test_watch.test_processes_that_do_not_share_a_folder_are_told_so',
    'processes with different settings, sources or versions of torch':
        'test_meeting.test_processes_with_different_settings_or_sources_are_all_refused',
    'processes that do not meet within `--start_timeout`; another run at their address':
        'test_meeting.test_a_process_that_does_not_meet_the_others_ends_with_code_8_in_every_phase',
    'an upload fails': 'test_watch.test_an_upload_that_fails_is_reported_and_does_not_end_the_run',
    'any file that is read is damaged, or holds what it should not':
        'test_damage.test_a_damaged_file_of_any_kind_is_refused_or_read_as_it_was',
    'a checkpoint, config or corpus that would run code': 'test_watch.test_nothing_in_a_pickled_corpus_is_run',
}


def test_the_plan_that_is_shown_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module('train').main([str(ROOT / 'config/train_gpt2.py'), '--plan=True'])
    said = capsys.readouterr().out
    [shown] = re.findall(r'```\n(  each process.*?)```', GUIDE, re.DOTALL)
    assert all(line in said for line in shown.splitlines()) and shown.count('\n') == 4


def test_every_row_of_the_table_of_faults_has_its_test() -> None:
    assert [row[0] for row in tables(GUIDE)['fault']] == list(FAULTS)
    for where in FAULTS.values():
        file, _, name = where.partition('.')
        [path] = ROOT.glob(f'tests/**/{file}.py')
        assert f'def {name}(' in path.read_text(encoding='utf-8')


def test_the_table_of_files_names_every_file_once() -> None:
    named = [span for row in tables(README)['file'] for span in spans(row[0])]
    rooms = {f'plaingpt/{path.parent.name}/' for path in ROOT.glob('plaingpt/*/__init__.py')}
    assert sorted(name for name in named if '/' not in name) == top_level_files()
    assert {name for name in named if '/' in name} == {
        'data/<name>/prepare.py', 'config/', 'course/', 'launch/', 'plaingpt/', *rooms}


@pytest.mark.parametrize('page', PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in re.findall(r'\]\(([^)\s]+)\)', PAGES[page]):
        target, _, heading = link.partition('#')
        if not link.startswith('https://'):
            file = ROOT.joinpath(page).parent / target if target else ROOT / page
            assert file.exists(), link
            headings = [re.sub(r'[^\w -]', '', line.strip('# ').lower()).replace(' ', '-')
                        for line in (file.read_text(encoding='utf-8').splitlines() if heading else ())
                        if line.startswith('#')]
            assert not heading or heading in headings, link


def test_every_file_that_is_named_exists() -> None:
    written = {'out-stdlib/', 'out_dir/', 'loss.png', 'data/<name>/', 'data/'}  # by a run, or by prepare.py
    words = [word for span in (*spans(PROSE), *block('sh')) for word in shlex.split(span, comments=True)]
    named = [word for word in words if re.fullmatch(r'[\w/<>.-]+(\.(py|md|toml|png)|/)', word)]
    assert 'config/train_gpt2.py' in named
    missing = {name for name in named if name not in written and not [*ROOT.glob(re.sub('<.*>', '*', name))]}
    assert missing == set()


def test_readme_is_read_in_one_sitting() -> None:
    assert len(README.encode()) <= 10_000


def test_readme_has_in_order_the_headings_that_a_reader_searches_for() -> None:
    assert re.findall(r'^##+ (.*)$', README, re.MULTILINE) == [
        'Understand it', 'Use it', 'Resume', 'Evaluate', 'Export', 'Memory by strategy', 'Exit codes', 'Recipes',
        'Where things are', 'Coming from nanoGPT', 'Licence and sources']


def test_readmes_ratios_follow_from_what_was_measured() -> None:
    sections = dict(re.findall(r'^## (.*)\n((?s:.*?))(?=^## |\Z)', PAGES['docs/measured.md'], re.MULTILINE))

    def ratio(cpu: str, what: str, column: str, peer: str) -> float:
        section = next(text for name, text in sections.items() if name.startswith(cpu))
        head, _, *rows = ([cell.strip() for cell in line.split('|')] for line in section.splitlines() if '|' in line)
        row = next(row for row in rows if row[1].startswith(what) and row[2] == '1')
        number, other = (float(row[head.index(name)].split()[0]) for name in (column, peer))
        return number / other

    told = tables(README)['on one core of a CPU']
    for place, cpu in enumerate(('AMD EPYC', 'Intel'), 1):
        assert [float(row[place]) for row in told] == pytest.approx([
            ratio(cpu, 'a training step, 124M, 1 x 256 tokens', 'plainGPT, fewer bits', 'nanoGPT'),
            ratio(cpu, 'most memory in a step, 2 layers, 12 x 1024 tokens', 'plainGPT', 'nanoGPT'),
            ratio(cpu, 'writing 1 x 64 tokens, gpt2', 'plainGPT, fewer bits', 'transformers')], abs=0.006)
    [percent, *_] = re.findall(r'^\| modern / GPT-2 \| +\| (\d+)% ', PAGES['docs/modern.md'], re.MULTILINE)
    [part] = re.findall(r"modern model reaches GPT-2's loss in (\S+) of the tokens", README)
    assert float(part) == pytest.approx(int(percent) / 100, abs=0.006)


def test_pictures_are_small_and_say_what_they_show() -> None:
    pictures = re.findall(r'!\[(.*?)\]\((.*?\.png)\)', README)
    assert {path for _, path in pictures} == {'docs/loss.png', 'docs/xray.png'}
    assert all(len(text) > 20 and (ROOT / path).stat().st_size < 100_000 for text, path in pictures)


def test_what_the_ladder_says_to_read_is_in_the_files_that_it_names() -> None:
    ladder = tables(README)['rung']
    pages = re.findall(r'^## (\d+)\. (.*)\n((?s:.*?))(?=^## )', PAGES['docs/ladder.md'], re.MULTILINE)
    assert [row[0] for row in ladder] == [f'{number}. {name}' for number, name, _ in pages]
    twins = ['model_trivialised.py', 'train_trivialised.py']
    for (rung, run, _), (_, _, text) in zip(ladder, pages, strict=True):
        assert '*Ask:*' in text and '*Do* exercise' in text, rung
        read = text.partition('*Read*')[2].partition('*Run*')[0]
        links = [file.removeprefix('../') for file in re.findall(r'\]\((.+?)\)', read)]
        for name in spans(read):
            assert any(has_definition((ROOT / file).read_text(encoding='utf-8'), name.split('.'))
                       for file in links or twins), f'{rung}: where is {name}?'
        assert spans(run)[0] in text.replace('\n', ' ') or 'course/' in run, rung


def has_definition(source: str, names: list[str]) -> bool:
    """Return whether a file defines a function or class of this name; with two names, the second in the first."""
    scopes: list[ast.AST] = [ast.parse(source)]
    for name in names:
        nodes = [node for scope in scopes for node in ast.walk(scope)]
        scopes = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    return scopes != []


def test_every_optimisation_has_its_row() -> None:
    marks = {name: (ROOT / name).read_text(encoding='utf-8').count('# fast: ') for name in top_level_files()}
    assert marks['model.py'] > 3
    rows = {head.partition(' in ')[2]: len(table) for head, table in tables(GUIDE).items() if 'fast:' in head}
    assert rows == {name: count for name, count in marks.items() if count}


def test_the_plain_files_are_as_short_as_readme_says() -> None:
    stated = re.search(r'Two files, (\d+) lines', README)
    names = ('model_trivialised.py', 'train_trivialised.py')
    lines = sum(len((ROOT / name).read_text(encoding='utf-8').splitlines()) for name in names)
    assert stated and lines == pytest.approx(int(stated[1]), abs=10)


def test_readme_and_the_default_run_agree() -> None:
    config = (ROOT / 'config/train_stdlib.py').read_text(encoding='utf-8')
    expected = re.search(r'expected: (\d\.\d+) bits per byte', config)
    stated = re.findall(r'(\S+) bits per byte(?: on files|\s*\|)', README)
    assert expected and stated == [expected[1]] * 2
    assert f'=== step {importlib.import_module("configurator").configure(*default_run())[0]["max_iters"]} ===' in GUIDE


def default_run() -> tuple[ModuleType, list[str]]:
    return importlib.import_module('train'), [str(ROOT / 'config/train_stdlib.py')]
