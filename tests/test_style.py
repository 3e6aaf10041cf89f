"""The house style, as far as a program can check it: rules that ruff and mypy do not know."""
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAIN = sorted([*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py'), *ROOT.glob('data/*/*.py'),
               *ROOT.glob('course/[!0-9]*.py')])
OTHERS = sorted(file for files in ('benchmarks/*', 'config/*', 'tests/**/*', 'course/[0-9]*')
                for file in ROOT.glob(f'{files}.py'))

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
UNSAFE_MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'marshal', 'shelve'}
UNSAFE_CALLS = {'eval', 'exec', 'os.system', 'os.popen', 'yaml.load'}
UNSAFE_ARGUMENTS = {'shell=True', 'weights_only=False', 'trust_remote_code=True', 'trust_remote_code=False'}
SUPPRESSIONS = re.compile(r'type: *ignore|noqa|pylint:|pyright:|mypy:|pragma:|\b(TODO|FIXME|XXX)\b', re.IGNORECASE)
OPTIONAL = ['PIL', 'aiohttp', 'datasets', 'fsspec', 'gguf', 'huggingface_hub', 'matplotlib', 'pyarrow', 'requests',
            's3fs', 'safetensors', 'tiktoken', 'tokenizers', 'transformers', 'wandb']
SLOW = ['torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.optim', 'torch.distributed.tensor']  # to import
TEXT_METHODS = {'read_text', 'write_text'}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def long_functions(source: str, tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > 60:
            yield f'line {function.lineno}: {function.name} has {lines} lines'


def depth(node: ast.AST) -> int:
    """Return how many blocks are nested in `node`, itself included. A function starts anew; an elif is no deeper."""
    children = {child: depth(child) for child in ast.iter_child_nodes(node) if not isinstance(child, FUNCTIONS)}
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        children[node.orelse[0]] -= 1
    return isinstance(node, BLOCKS) + max(children.values(), default=0)


def deep_nesting(source: str, tree: ast.Module) -> Iterator[str]:
    for scope in (tree, *functions(tree)):
        if depth(scope) >= 4:
            yield f'{getattr(scope, "name", "the file")} has blocks {depth(scope)} deep'


def wide_lines(source: str, tree: ast.Module) -> Iterator[str]:
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > 120:
            yield f'line {number}: {len(line)} columns'


def functions_in_the_loop(source: str, tree: ast.Module) -> Iterator[str]:
    """Find definitions inside the training loop, which is read from top to bottom."""
    for train in (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == 'train'):
        if any(isinstance(node, (*FUNCTIONS, ast.ClassDef)) for node in ast.walk(train) if node is not train):
            yield f'line {train.lineno}: train defines a function or a class inside itself'


def missing_types(source: str, tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        a = function.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        for argument in given:
            if argument.annotation is None and argument.arg not in ('self', 'cls'):
                yield f'line {function.lineno}: {argument.arg} has no type'
        if function.returns is None:
            yield f'line {function.lineno}: {function.name} does not say what it returns'


def missing_docstrings(source: str, tree: ast.Module) -> Iterator[str]:
    """Find files without a docstring, and functions and classes without one that are too long to be read just to know
    what they give."""
    if tree.body and not ast.get_docstring(tree):
        yield 'the file does not say what it is'
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name == 'main':
            continue
        if (node.end_lineno or 0) - node.lineno >= 9 and not ast.get_docstring(node):
            yield f'line {node.lineno}: {node.name} has no docstring'


def module_level_actions(source: str, tree: ast.Module) -> Iterator[str]:
    """Find whatever importing the file would do, except what prepare.py and an installed package need, the folder of
    the stages in sys.path, and what a stage does so that it is imported faster."""
    declarations = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    for node in tree.body:
        text = ast.unparse(node).splitlines()[0]
        is_doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = text in ("if __name__ == '__main__':", 'if TYPE_CHECKING:',
                            "if IS_INSTALLED and sys.argv[:1] == ['-m']:",
                            'if Path(*sys.argv[:1]).resolve().parent == STAGES:')
        if not (isinstance(node, declarations) or is_doc or is_guard or text.startswith('sys.path.')):
            yield f'line {node.lineno}: importing this does {text}'


def imported(node: ast.AST) -> set[str]:
    """Return the packages, by the first part of their names, that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split('.')[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ['UnpicklingError']:
        return {(node.module or '').split('.')[0]}  # the class of an error that torch raises executes nothing
    return set()


def unsafe_code(source: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in imported(node) & UNSAFE_MODULES:
            yield f'{name} executes what it reads'
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            yield f'line {node.lineno}: a function takes arguments and returns results'
    for call in calls(tree):
        if ast.unparse(call.func) in UNSAFE_CALLS:
            yield f'line {call.lineno}: {ast.unparse(call.func)} executes what it is given'
        for keyword in call.keywords:
            argument = f'{keyword.arg}={ast.unparse(keyword.value)}'
            if argument in UNSAFE_ARGUMENTS:
                yield f'line {call.lineno}: {argument}'


def unnamed_encodings(source: str, tree: ast.Module) -> Iterator[str]:
    """Find text files that are not read and written as UTF-8, on Windows too."""
    for call in calls(tree):
        keywords = {keyword.arg for keyword in call.keywords}
        modes = [ast.unparse(node) for node in (*call.args[1:2], *(k.value for k in call.keywords if k.arg == 'mode'))]
        is_open = isinstance(call.func, ast.Name) and call.func.id == 'open' and not any('b' in mode for mode in modes)
        is_text = isinstance(call.func, ast.Attribute) and call.func.attr in TEXT_METHODS
        if (is_open or is_text) and 'encoding' not in keywords:
            yield f'line {call.lineno}: {ast.unparse(call)} does not name the encoding'


def hand_made_writes(source: str, tree: ast.Module) -> Iterator[str]:
    """Find the work of files.py in other files: syncing a file, and names of files that are not whole yet."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith('.tmp'):
            yield f'line {node.lineno}: {node.value!r} is written by files.written_whole'
        if isinstance(node, ast.Name | ast.Attribute | ast.alias) and ast.unparse(node).endswith('fsync'):
            yield f'line {node.lineno}: {ast.unparse(node)} is called by files.written_whole'


def prints(source: str, tree: ast.Module) -> Iterator[str]:
    """Find the work of console.py in other files: text on its way to a terminal. Its own functions escape what may
    steer one."""
    for call in calls(tree):
        function, arguments = ast.unparse(call.func), ' '.join(map(ast.unparse, call.args))
        to_console = re.search(r'\bsys\.(__)?std(out|err)', f'{function} {arguments}')
        is_raw = re.search(r'\.(write|writelines)$', function) and not re.search(r'console\.(write|printable)\(',
                                                                                ast.unparse(call))
        if function in ('print', 'pprint', 'tqdm.write') or (to_console and is_raw):
            yield f'line {call.lineno}: {ast.unparse(call)} is printed by console.say, note or write'


def suppressions(source: str, tree: ast.Module) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and SUPPRESSIONS.search(token.string):
            yield f'line {token.start[0]}: {token.string}'


Check = Callable[[str, ast.Module], Iterator[str]]
EVERYWHERE: list[Check] = [wide_lines, long_functions, missing_types, unnamed_encodings, suppressions]
IN_MAIN_FILES: list[Check] = [*EVERYWHERE, functions_in_the_loop, deep_nesting, missing_docstrings,
                              unsafe_code, module_level_actions]


@pytest.mark.parametrize('path', [*MAIN, *OTHERS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_keeps_the_house_style(path: Path) -> None:
    source = path.read_text(encoding='utf-8')
    tree = ast.parse(source)
    checks = IN_MAIN_FILES if path in MAIN else EVERYWHERE
    complaints = list(chain.from_iterable(check(source, tree) for check in checks))
    assert not complaints, '\n'.join(complaints)


@pytest.mark.parametrize('path', [path for path in MAIN if path.name != 'console.py'],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_console_py_prints_and_no_other_file(path: Path) -> None:
    source = path.read_text(encoding='utf-8')
    assert not list(prints(source, ast.parse(source)))


@pytest.mark.parametrize('path', [path for path in MAIN if path.name != 'files.py'],
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_written_whole_by_files_py_and_by_no_other(path: Path) -> None:
    source = path.read_text(encoding='utf-8')
    assert not list(hand_made_writes(source, ast.parse(source)))


def test_importing_every_file_or_a_model_without_numbers_loads_nothing_that_few_need_and_prints_nothing() -> None:
    files = (path.relative_to(ROOT).with_suffix('') for path in (*ROOT.glob('*.py'), *ROOT.glob('plaingpt/**/*.py')))
    modules = ['.'.join(path.parts) for path in files if path.name != 'plot']  # only log.py imports plot.py, to draw
    code = (f'import sys, {", ".join(modules)}; model.GPT.on_meta(model.GPTConfig()); '
            f'sys.exit(" ".join(sys.modules.keys() & {OPTIONAL + SLOW}))')
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, encoding='utf-8')
    assert (result.stdout, result.stderr.strip()) == ('', '')


def nested(*heads: str) -> str:
    return '\n'.join(' ' * level + head for level, head in enumerate([*heads, 'pass']))


@pytest.mark.parametrize(('check', 'source'), [
    (long_functions, 'def f():\n' + ' x = 1\n' * 60),
    (long_functions, 'class A:\n async def f(self):\n' + '  x = 1\n' * 60),
    (functions_in_the_loop, 'def train():\n def save(): pass'),
    (deep_nesting, nested('for a in b:', 'while a:', 'with a:', 'if a:')),
    (deep_nesting, nested('def f():', 'try:', 'if a:', 'if b:', 'if c:') + '\n finally:\n  pass'),
    (deep_nesting, nested('class A:', 'def f():', 'for a in b:', 'for c in d:', 'match c:', 'case 1:', 'if a:')),
    (deep_nesting, 'if a:\n pass\nelif b:\n' + nested('', 'for b in c:', 'for d in e:', 'with f:')),
    (deep_nesting, 'for a in b:\n try:\n  pass\n except E:\n  if a:\n   with c:\n    pass'),
    (wide_lines, 'x = "' + 'é' * 116 + '"'),
    (missing_types, 'def f(a) -> int: pass'),
    (missing_types, 'def f(*a) -> int: pass'),
    (missing_types, 'def f(*, a=1) -> int: pass'),
    (missing_types, 'class A:\n def f(self, **a) -> int: pass'),
    (missing_types, 'def f(a: int): pass'),
    (missing_docstrings, 'x = 1'),
    (missing_docstrings, '"""A file."""\ndef f() -> int:\n' + ' x = 1\n' * 9),
    (missing_docstrings, '"""A file."""\nclass A:\n' + ' x = 1\n' * 9),
    (module_level_actions, 'print(1)'),
    (module_level_actions, 'for a in b: pass'),
    (module_level_actions, 'if a: pass'),
    (module_level_actions, 'with a: pass'),
    (unsafe_code, 'import pickle'),
    (unsafe_code, 'def f():\n from pickle import loads'),
    (unsafe_code, 'eval(text)'),
    (unsafe_code, 'exec(open("a").read())'),
    (unsafe_code, 'os.system("ls")'),
    (unsafe_code, 'subprocess.run("ls", shell=True)'),
    (unsafe_code, 'torch.load(path, weights_only=False)'),
    (unsafe_code, 'load_dataset("a", trust_remote_code=True)'),
    (unsafe_code, 'def f():\n global x'),
    (unnamed_encodings, 'open("a")'),
    (unnamed_encodings, 'open("a", "w")'),
    (unnamed_encodings, 'open("a", mode="w")'),
    (unnamed_encodings, 'path.read_text()'),
    (unnamed_encodings, 'Path("a").write_text(text)'),
    (hand_made_writes, 'os.fsync(file.fileno())'),
    (hand_made_writes, 'from os import fsync'),
    (hand_made_writes, "open('train.bin.tmp', 'wb')"),
    (hand_made_writes, "path.with_name(f'{path.name}.tmp')"),
    (prints, 'print(1)'),
    (prints, 'print(1, file=sys.stderr)'),
    (prints, 'sys.stdout.write(text)'),
    (prints, 'sys.stderr.buffer.write(text)'),
    (prints, 'os.write(sys.stderr.fileno(), text)'),
    (prints, 'tqdm.write(text)'),
    (suppressions, 'x = 1  # type: ignore[misc]'),
    (suppressions, 'import a  # noqa: F401'),
    (suppressions, '# TODO: later'),
    (suppressions, 'x = 1  # pragma: no cover'),
])
def test_each_check_sees_what_it_is_for(check: Check, source: str) -> None:
    assert list(check(source, ast.parse(source)))


def test_no_check_complains_of_what_is_fine() -> None:
    source = '''"""A file. Its text may say pickle, eval(x), noqa or TODO."""
import sys
from typing import TYPE_CHECKING

sys.path.insert(0, '..')

if TYPE_CHECKING:
    import wandb

size: int = 3  # tokens


def train(model: Module, *texts: str) -> None:
''' + '    size = 1\n' * 59 + '''

def choose(self, a: int) -> int:
    """One of many, none nested in another."""
    import matplotlib
    model.eval()
    torch.load(path, weights_only=True)
    from pickle import UnpicklingError
    subprocess.run(['ls'], shell=False)
    if a == 1:
        return 1
    elif a == 2:
        return 2
    elif a == 3:
        return 3
    elif a == 4:
        return 4
    else:
        with open('a', 'rb') as file, open('b', mode='wb'), open('c', encoding='utf-8') as other:
            for line in file:
                return Path('a').read_text(encoding='utf-8')


def outer() -> None:
    """A function in a function counts for itself."""
    for a in b:
        for c in d:
            def inner() -> None:
                for e in f:
                    for g in h:
                        pass


class Plain:
    """A class."""

    def _method(self) -> None: ...


if __name__ == '__main__':
    main()
'''
    tree = ast.parse(source)
    complaints = list(chain.from_iterable(check(source, tree) for check in IN_MAIN_FILES))
    assert complaints == ['line 13: train has no docstring']
