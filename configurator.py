"""
Settings are the annotated names at the top of a script: defaults < config file < command line.

    python train.py config/train_gpt2.py --batch_size=32

Arguments are taken from left to right, and the last word wins. A config file is parsed and never run: it holds lines
`name = value`, with literals, arithmetic, and the names of settings, which stand for their value so far.
"""
import ast
import difflib
import inspect
import math
import operator
import os
import textwrap
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from plaingpt import console
from plaingpt.errors import UserError

T = TypeVar('T')
Kinds = dict[str, list[Any]]  # what each setting may be: bool, int, float, str, and the texts that a Literal names

STARTED = time.strftime('%Y%m%d-%H%M%S')  # what '{time}' stands for in the name of a run or of a folder
LARGEST = 2**63  # no number that a config file computes needs more; 9**9**9 would take all memory
LONGEST = 100_000  # characters in a text
ARITHMETIC: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}
REMEDY = 'A config file is read, never run. Write name = value, with numbers, text, arithmetic and names of settings.'
TIME_REMEDY = "A config file is read, never run. For the time in a name, write '{time}': wandb_run_name = 'ft-{time}'"


def configure(script: types.ModuleType, args: list[str]) -> tuple[dict[str, Any], set[str]]:
    """Set the settings of `script` from `args` (as in sys.argv[1:]). Return all of them by name, and the names that a
    config file or the command line gave. UserError where an argument cannot be taken; --help prints and exits."""
    lines = find_settings(script)
    if '--help' in args or '-h' in args:
        print(manual(script, lines))
        raise SystemExit(0)
    annotations = inspect.get_annotations(script)
    kinds = {name: alternatives(annotations[name]) for name in lines}
    settings: dict[str, Any] = {}
    for name, line in lines.items():
        assert line.value, f'{name} needs a default'
        settings[name] = fit(name, evaluate(line.value, {}, script.__name__), kinds, script.__name__)

    given: dict[str, Any] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg.startswith('--'):
            given |= read_option(arg, rest, kinds, script)
        else:
            given |= read_file(arg, settings | given, kinds)
    settings |= given
    vars(script).update(settings)
    return settings, set(given)


def pick(make: Callable[..., T], script: types.ModuleType, **others: Any) -> T:
    """Call `make` with the settings of `script` that it takes by name, and with the `others`."""
    names = inspect.signature(make).parameters.keys() - others
    return make(**{name: getattr(script, name) for name in names}, **others)


def check_range(script: types.ModuleType, names: str, least: float, below: float = math.inf) -> None:
    """Refuse a setting of `script`, of those that `names` lists, that is less than `least`, or not below `below`."""
    for name in names.split():
        value = getattr(script, name)
        if not least <= value < below:
            bounds = f'{least} or more' if below == math.inf else f'at least {least} and less than {below}'
            raise UserError(f'--{name}={value}: must be {bounds}')


# ------------------------------------------------------------------------------------------------
# The script: which settings it has, and what each may be


def find_settings(script: types.ModuleType) -> dict[str, ast.AnnAssign]:
    """Return the annotated names above the first function or class; NAMES like this are constants, not settings.
    Defaults come from these lines and not from the module's values, so that a second call does not start from what the
    first set."""
    lines: dict[str, ast.AnnAssign] = {}
    for node in ast.parse(inspect.getsource(script)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.islower():
            lines[node.target.id] = node
    return lines


def alternatives(annotation: Any) -> list[Any]:
    """Turn bool | Literal['auto', 'on'] into [bool, 'auto', 'on']."""
    if get_origin(annotation) in (Union, Literal, types.UnionType):
        return [kind for part in get_args(annotation) for kind in alternatives(part)]
    is_known = isinstance(annotation, str) or annotation in (bool, int, float, str)
    assert is_known, f'a setting cannot be declared as {annotation}'
    return [annotation]


def manual(script: types.ModuleType, lines: dict[str, ast.AnnAssign]) -> str:
    """Return the docstring, and the settings as the source has them: name, type, default, meaning."""
    source = inspect.getsource(script)
    first, *_, last = lines.values()
    above = [node.end_lineno or 0 for node in ast.parse(source).body if node.lineno < first.lineno]
    block = '\n'.join(source.splitlines()[max(above, default=0) : last.end_lineno]).strip()
    return f'{inspect.getdoc(script)}\n\n{block}\n\nAny of them can be given as --name=value; the last one wins.'


# ------------------------------------------------------------------------------------------------
# Values: from what was written to what the setting declares


def fit(name: str, value: Any, kinds: Kinds, where: str) -> Any:
    """Return `value` as the type that the setting declares: 1 is as good a number as 1.0, and 1e5 as good a whole
    number."""
    is_number = type(value) in (int, float) and abs(value) < LARGEST  # not of infinity, nor of nan
    for kind in kinds[name]:
        if kind is bool and (type(value) is bool or (is_number and value in (0, 1))):
            return bool(value)
        if kind is int and is_number and value == int(value):
            return int(value)
        if kind is float and is_number:
            return float(value)
        if type(value) is str and (kind is str or kind == value):
            return value.replace('{time}', STARTED) if name.endswith(('name', 'dir')) else value
    words = {bool: 'True or False', int: 'a whole number', float: 'a number', str: "text in quotes, 'like this'"}
    wanted = ' or '.join(words[kind] if kind in words else repr(kind) for kind in kinds[name])
    raise UserError(f'{where}: {name} must be {wanted}, not {brief(repr(value))}')


def read_option(arg: str, rest: list[str], kinds: Kinds, script: types.ModuleType) -> dict[str, Any]:
    """Read --name=value, or --name and its value as the next argument, which is then taken off `rest`."""
    name, equals, text = arg[2:].partition('=')
    name = name.replace('-', '_')
    if name not in kinds:
        path = os.path.relpath(inspect.getfile(script))
        raise unknown(name, kinds, f'--{brief(name)}', '--', f'python {path} --help lists the settings.')
    if not equals and (not rest or rest[0].startswith('--')):
        examples = ('True', 'False') if bool in kinds[name] else ('...',)
        raise UserError(f'--{name} has no value: type ' + ' or '.join(f'--{name}={example}' for example in examples))
    value = fit(name, parse_text(text if equals else rest.pop(0), kinds[name]), kinds, f'--{name}')
    console.say(f'Overriding: {name} = {value}')
    return {name: value}


def parse_text(text: str, kinds: list[Any]) -> Any:
    """Read what was typed on the command line. Digits are text where text is wanted; text that brings quotes of its own
    is read as Python reads it, so that "'\\n'" is a new line."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
        try:
            unquoted = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            unquoted = None
        return unquoted if isinstance(unquoted, str) else text
    if str in kinds:
        return text
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


# ------------------------------------------------------------------------------------------------
# Config files


def read_file(path: str, settings: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """Return what the file at `path` assigns. Nothing in it is ever executed."""
    try:
        source = Path(path).read_text(encoding='utf-8-sig')
        new: dict[str, Any] = {}
        for statement in ast.parse(source).body:
            new |= read_statement(statement, settings | new, kinds, path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(explain_missing(path, error)) from None
    except UnicodeDecodeError:
        raise UserError(f'{path} is not a config file: it is not text in UTF-8') from None
    except SyntaxError as error:
        raise UserError(f'{path}, line {error.lineno or 1}: {brief(error.msg)}\n{REMEDY}') from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f'{path} is not a config file: {error or "too deeply nested"}') from None
    console.say(f'Overriding config with {path}:\n{source}')
    return new


def read_statement(statement: ast.stmt, settings: dict[str, Any], kinds: Kinds, path: str) -> dict[str, Any]:
    """Return what one statement assigns: {name: value}, or nothing for a docstring."""
    where = f'{path}, line {statement.lineno}'
    match statement:
        case ast.Expr(value=ast.Constant(value=str())):
            return {}
        case (ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as node)
              | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as node)):
            if name not in kinds:
                raise unknown(name, kinds, where)
            return {name: fit(name, evaluate(node, settings, where), kinds, where)}
    raise refused(statement, where)


def evaluate(node: ast.expr, settings: dict[str, Any], where: str) -> Any:
    """Return the value of a literal, of a setting's name, or of arithmetic on these."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in settings:
            return settings[name]
        case ast.Name(id=name):
            raise unknown(name, [*settings, 'True', 'False'], where)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in ARITHMETIC:
            operands = [evaluate(left, settings, where), evaluate(right, settings, where)]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in ARITHMETIC:
            operands = [evaluate(operand, settings, where)]
        case _:
            raise refused(node, where)
    return calculate(sign, operands, f'{where}: {brief(ast.unparse(node))}')


def calculate(sign: ast.AST, operands: list[Any], where: str) -> Any:
    """Return the result of one operation on numbers, or of text + text, where it is of a sensible size."""
    numbers = all(isinstance(operand, int | float) for operand in operands)
    texts = all(isinstance(operand, str) for operand in operands) and isinstance(sign, ast.Add)
    if not numbers and not texts:
        raise UserError(f'{where}: arithmetic takes numbers, and text + text')
    if isinstance(sign, ast.Pow) and abs(operands[1]) > 64:
        raise UserError(f'{where}: the exponent is too large')
    try:
        result = ARITHMETIC[type(sign)](*operands)
    except ArithmeticError as error:
        raise UserError(f'{where}: {error}') from None
    if isinstance(result, complex) or (len(result) > LONGEST if texts else abs(result) >= LARGEST):
        raise UserError(f'{where}: the result is too large, or no number')
    return result


# ------------------------------------------------------------------------------------------------
# What to say


def brief(text: str) -> str:
    """Return `text` on one line of at most 60 characters."""
    text = ' '.join(text.split())
    return text if len(text) <= 60 else f'{text[:57]}...'


def unknown(name: str, names: Iterable[str], where: str, dashes: str = '', otherwise: str = '') -> UserError:
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f'did you mean {dashes}{near[0]}?' if near else otherwise or 'every script lists its settings with --help.'
    return UserError(f"{where}: no setting is called '{brief(name)}'; {hint}")


def refused(node: ast.AST, where: str) -> UserError:
    """Say what a config file holds that is no setting, and what to write."""
    text = ast.unparse(node)
    return UserError(f'{where}: this is refused: {brief(text)}\n{TIME_REMEDY if "time" in text else REMEDY}')


def explain_missing(path: str, error: OSError) -> str:
    """Say what else may have been meant by a config file that cannot be read."""
    if '=' in path or path.startswith('-'):
        return f'{brief(path)}: a setting is given with two dashes, --name=value'
    if not isinstance(error, FileNotFoundError):
        return f"'{path}' cannot be read as a config file: {error.strerror}; a setting is given as --name=value"
    ours = Path(__file__).with_name('config')
    files = {file.stem: file for folder in (Path(path).parent, ours) for file in folder.glob('*.py')}
    near = [os.path.relpath(files[stem]) for stem in difflib.get_close_matches(Path(path).stem, files)]
    there = textwrap.fill('config/ has ' + ', '.join(sorted(file.stem for file in ours.glob('*.py'))), 150)
    return f'there is no config file {path}\n' + (f'did you mean {" or ".join(near)}?' if near else there)
