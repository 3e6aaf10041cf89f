"""
Settings are the annotated names at the top of a script: defaults < config file < command line.

    python train.py config/train_gpt2.py --batch_size=32

Arguments are read from left to right, and the last one wins. A config file is parsed and never run: it holds lines
`name = value`, with literals, f-strings, arithmetic, a few functions, and the names of settings, which stand for their
value so far. Any other name may hold a value for later lines of its file.
"""
import ast
import difflib
import errno
import inspect
import math
import operator
import os
import re
import textwrap
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from plaingpt import console
from plaingpt.errors import UserError, command, typed
from plaingpt.paths import here_or_installed

T = TypeVar('T')
Kinds = dict[str, list[Any]]  # the types that each setting may have: bool, int, float, str; and the texts of a Literal

STARTED = time.time()  # the value of time.time() in a config file, and of '{time}' in the name of a run or a folder
CLOCK = 'time.time()'
MANY = 2**31  # windows, layers, seconds ...: a number from here on is a mistake, and would take too much memory
LARGEST = 2**63  # beyond any number that a config file needs; 9**9**9 would take all memory
LONGEST = 100_000  # characters in a text, and in a config file
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, of a file
MOST_DIGITS = 64  # the largest exponent, and the most digits that a number is rounded or written to
NEAR = 0.75  # how much of two names must agree, by difflib's measure, for one to be a misspelling of the other
ARITHMETIC: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {'int': int, 'float': float, 'round': round, 'min': min, 'max': max}
QUOTED = re.compile(r'(["\'])(?:(?!\1)[^\\]|\\.)*\1', re.DOTALL)  # one string of Python, with its quotes
EMPTY = ast.Constant('')
REMEDY = ('A config file is read, never run. Write name = value, with numbers, text, arithmetic, names of settings, '
          f'{", ".join(FUNCTIONS)}, str.')
TIME_REMEDY = "A config file is read, never run. For the time in a name, write '{time}': wandb_run_name = 'ft-{time}'"


def configure(script: types.ModuleType, args: list[str], clock: float = STARTED) -> tuple[dict[str, Any], set[str]]:
    """Set the settings of `script` from `args` (as in sys.argv[1:]). Return all of them by name, for records, which
    keep no secret of a URL, and the names that a config file or the command line gave. `clock` is the time that these
    may name, in seconds since 1970. Raise UserError if an argument cannot be taken; --help prints and exits."""
    lines = find_settings(script)
    if '--help' in args or '-h' in args:
        console.say(manual(script, lines))
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
            given |= read_file(arg, settings | given | {CLOCK: clock}, kinds)
    stamp = time.strftime('%Y%m%d-%H%M%S', time.localtime(clock))
    for name in given:
        if isinstance(given[name], str) and name.endswith(('name', 'dir')):
            given[name] = given[name].replace('{time}', stamp)
    settings |= given
    vars(script).update(settings)
    return record(script), set(given)


def record(script: types.ModuleType) -> dict[str, Any]:
    """Return the settings of `script` by name, for records, which keep no secret of a URL."""
    values = {name: getattr(script, name) for name in find_settings(script)}
    return {name: console.shown(value) if isinstance(value, str) else value for name, value in values.items()}


def pick(make: Callable[..., T], script: types.ModuleType, **others: Any) -> T:
    """Call `make` with the settings of `script` that it takes by name, and with the `others`."""
    names = inspect.signature(make).parameters.keys() - others
    return make(**{name: getattr(script, name) for name in names}, **others)


def check_range(script: types.ModuleType, names: str, least: float, below: float = math.inf) -> None:
    """Raise UserError if a setting of `script` that `names` lists is less than `least`, or not below `below`."""
    for name in names.split():
        value = getattr(script, name)
        if not least <= value < below:
            least_or_most = f'{least} or more' if value < least else f'less than {below}'
            bounds = least_or_most if below >= MANY else f'at least {least} and less than {below}'
            raise UserError(f'--{name}={value}: must be {bounds}')


# ------------------------------------------------------------------------------------------------
# The script: which settings it has, and which values each may have


def find_settings(script: types.ModuleType) -> dict[str, ast.AnnAssign]:
    """Return the annotated names above the first function or class; NAMES LIKE THESE are constants, not settings.
    Defaults come from these lines and not from the module's values, so that a second call does not start from the
    values of the first."""
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
    """Return the docstring of a script, and its settings as they stand in the source: name, type, default, meaning."""
    source, nodes = inspect.getsource(script), list(lines.values())
    if not nodes:
        return f'{inspect.getdoc(script)}\n\nIt has no settings.'
    first, last = nodes[0], nodes[-1]
    above = [node.end_lineno or 0 for node in ast.parse(source).body if node.lineno < first.lineno]
    block = '\n'.join(source.splitlines()[max(above, default=0) : last.end_lineno]).strip()
    return f'{inspect.getdoc(script)}\n\n{block}\n\nAny of them can be given as --name=value; the last one wins.'


# ------------------------------------------------------------------------------------------------
# Values: from the text that was written to the type that the setting declares


def fit(name: str, value: Any, kinds: Kinds, where: str) -> Any:
    """Return `value` as the type that the setting declares: 1 will do for 1.0, and 1e5 for a whole number."""
    is_number = type(value) in (int, float) and abs(value) < LARGEST  # False for infinity and NaN
    for kind in kinds[name]:
        if kind is bool and (type(value) is bool or (is_number and value in (0, 1))):
            return bool(value)
        if kind is int and is_number and value == int(value):
            return int(value)
        if kind is float and is_number:
            return float(value)
        if type(value) is str and (kind is str or kind == value):
            refuse_odd_text(name, value, where)
            return value
    words = {bool: 'True or False', int: 'a whole number', float: 'a number', str: "text in quotes, 'like this'"}
    wanted = ' or '.join(words[kind] if kind in words else repr(kind) for kind in kinds[name])
    raise UserError(f'{where}: {name} must be {wanted}, not {brief(repr(value))}')


def refuse_odd_text(name: str, text: str, where: str) -> None:
    """Raise UserError for what is not text, and for what cannot be the name of a file, unless it is a prompt or a
    URL."""
    if '\0' in text or text.encode('utf-8', 'replace').decode() != text:
        raise UserError(f'{where}: {name} must be text in UTF-8, without the character NUL')
    path = '' if name.endswith('start') or '://' in text else text
    if len(path.encode()) > LONGEST_PATH or any(len(part.encode()) > LONGEST_NAME for part in path.split('/')):
        raise UserError(f'{where}: {name}={brief(text)}: {os.strerror(errno.ENAMETOOLONG)}')


def read_option(arg: str, rest: list[str], kinds: Kinds, script: types.ModuleType) -> dict[str, Any]:
    """Read --name=value, or --name and its value as the next argument, which is then taken off `rest`."""
    name, equals, text = arg[2:].partition('=')
    name = name.replace('-', '_')
    if name not in kinds:
        lists = f'this lists the settings: {command(inspect.getfile(script))} --help'
        raise unknown(name, kinds, f'--{brief(name)}', '--', lists)
    if not equals and (not rest or rest[0].startswith('--')):
        examples = ('True', 'False') if bool in kinds[name] else ('...',)
        raise UserError(f'--{name} has no value: type ' + ' or '.join(f'--{name}={example}' for example in examples))
    value = fit(name, parse_text(text if equals else rest.pop(0), kinds[name]), kinds, f'--{name}')
    console.say(f'Overriding: {name} = {value}')
    return {name: value}


def parse_text(text: str, kinds: list[Any]) -> Any:
    """Read a value that was typed on the command line. Digits are text if the setting takes text; text within quotes of
    its own is read as Python reads it: "'\\n'" is a new line, and '"Hello" and "world"' is not one such text."""
    if QUOTED.fullmatch(text):
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


def read_file(path: str, names: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """Return the settings that the file at `path` assigns, given the values of `names`. Nothing in it is executed."""
    try:
        with open(here_or_installed(path), encoding='utf-8-sig') as file:
            source = file.read(LONGEST + 1)
        if len(source) > LONGEST:
            raise ValueError(f'it is longer than {LONGEST:,} characters')
        new = read_statements(ast.parse(source).body, dict(names), kinds, path)
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
    if helpers := new.keys() - kinds:
        console.say(f'{path}: for its own lines only, as no setting has this name: {", ".join(sorted(helpers))}')
    return {name: value for name, value in new.items() if name in kinds}


def read_statements(body: list[ast.stmt], names: dict[str, Any], kinds: Kinds, path: str) -> dict[str, Any]:
    """Return what the statements assign, and add it to `names`: settings, and helpers, which are other names that later
    statements read."""
    new: dict[str, Any] = {}
    last_read = {node.id: number for number, statement in enumerate(body) for node in ast.walk(statement)
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for number, statement in enumerate(body):
        where = f'{path}, line {statement.lineno}'
        targets, node = assignment(statement, where)
        for name in targets:
            is_helper = last_read.get(name, -1) > number and not near(name, kinds)
            if name not in kinds and not is_helper:
                raise unknown(name, kinds, where)
        value = evaluate(node, names, where)
        for name in targets:
            names[name] = new[name] = fit(name, value, kinds, where) if name in kinds else value
    return new


def assignment(statement: ast.stmt, where: str) -> tuple[list[str], ast.expr]:
    """Return the names that a statement assigns to, and the value; no names for a docstring, and for `import time`,
    which nanoGPT's own files have."""
    match statement:
        case ast.Expr(value=ast.Constant(value=str())) | ast.Import(names=[ast.alias(name='time', asname=None)]):
            return [], EMPTY
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as node):
            return [name], node
        case ast.Assign(targets=targets, value=node) if all(isinstance(target, ast.Name) for target in targets):
            return [ast.unparse(target) for target in targets], node
    raise refused(statement, where)


def evaluate(node: ast.expr, names: dict[str, Any], where: str) -> Any:
    """Return the value of a literal, a name, a calculation or an f-string."""
    function: Callable[..., Any]
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name):
            raise unknown(name, [*names, 'True', 'False'], where)
        case ast.JoinedStr(values=parts):
            function, operands = join, parts
        case ast.FormattedValue(value=operand, conversion=-1, format_spec=form):
            function, operands = format, [operand, form or EMPTY]
        case ast.Call() if ast.unparse(node) == CLOCK and CLOCK in names:
            return names[CLOCK]
        case ast.Call(func=ast.Name(id='str'), args=[operand], keywords=[]):
            function, operands = format, [operand, EMPTY]
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as operands, keywords=[]) if name in FUNCTIONS:
            function = FUNCTIONS[name]
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in ARITHMETIC:
            function, operands = ARITHMETIC[type(sign)], [left, right]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in ARITHMETIC:
            function, operands = ARITHMETIC[type(sign)], [operand]
        case _:
            raise refused(node, where)
    values = [evaluate(operand, names, where) for operand in operands]
    return calculate(function, values, f'{where}: {brief(ast.unparse(node))}')


def join(*texts: str) -> str:
    return ''.join(texts)


def calculate(function: Callable[..., Any], values: list[Any], where: str) -> Any:
    """Return the result of one operation on numbers or texts. Raise UserError if it, or a number in it, is too
    large."""
    numbers = [value for value in values if isinstance(value, int | float)]
    texts = [value for value in values if isinstance(value, str)]
    takes_text = function in (join, operator.add)
    if function is not format and len(texts if takes_text and texts else numbers) < len(values):
        raise UserError(f'{where}: arithmetic takes numbers, and text + text')
    digits = map(int, re.findall(r'\d+', values[1])) if function is format else values[1:]
    if function in (operator.pow, round, format) and any(abs(number) > MOST_DIGITS for number in digits):
        raise UserError(f'{where}: an exponent, or a number of digits, is above {MOST_DIGITS}')
    try:
        result = function(*values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f'{where}: {error}') from None
    if isinstance(result, complex) or (len(result) > LONGEST if isinstance(result, str) else abs(result) >= LARGEST):
        raise UserError(f'{where}: the result is too large, or not a number')
    return result


# ------------------------------------------------------------------------------------------------
# Messages


def brief(text: str) -> str:
    """Return `text` on one line of at most 60 characters."""
    text = ' '.join(text.split())
    return text if len(text) <= 60 else f'{text[:57]}...'


def near(name: str, names: Iterable[str]) -> list[str]:
    """Return the one of `names` that the user may have meant by `name`, if there is one."""
    return difflib.get_close_matches(name.lower(), names, 1, NEAR)


def unknown(name: str, names: Iterable[str], where: str, dashes: str = '', otherwise: str = '') -> UserError:
    found = near(name, names)
    hint = f'did you mean {dashes}{found[0]}?' if found else otherwise or 'every script lists its settings with --help.'
    return UserError(f"{where}: no setting is called '{brief(name)}'; {hint}")


def refused(node: ast.AST, where: str) -> UserError:
    """Return an error that says what a config file may not hold, and what to write instead."""
    text = ast.unparse(node)
    return UserError(f'{where}: this is refused: {brief(text)}\n{TIME_REMEDY if "time" in text else REMEDY}')


def explain_missing(path: str, error: OSError) -> str:
    """Return a message about a config file that cannot be read, with what the user may have meant."""
    if '=' in path or path.startswith('-'):
        return f'{brief(path)}: a setting is given with two dashes, --name=value'
    if not isinstance(error, FileNotFoundError):
        return f"'{path}' cannot be read as a config file: {error.strerror}; a setting is given as --name=value"
    shipped = Path(__file__).with_name('config')
    files = {file.stem: file for folder in (Path(path).parent, shipped) for file in folder.glob('*.py')}
    near = [typed(files[stem]) for stem in difflib.get_close_matches(Path(path).stem, files)]
    known = textwrap.fill('config/ has ' + ', '.join(sorted(file.stem for file in shipped.glob('*.py'))), 150)
    return f'there is no config file {path}\n' + (f'did you mean {" or ".join(near)}?' if near else known)
