"""
Shapes that the content of a file must have before any of it is used. A shape looks like what it describes:

    {'a': int, 'b?': str}     a dict with an int under 'a' and, if it has a 'b', a str there; other keys do not matter
    {str: int}                a dict in which each key is a str, and each value an int
    [int, str]  [int, ...]    a list of these two; a list of any number of ints
    (int, None)               either of these
    {'a', 'b'}  range(9)      one of these values; one of these whole numbers
    int                       a value of this type: an int is a float, too; True is not an int, and half a surrogate
                              pair, which JSON may have and UTF-8 cannot, is not a str
    a function                a value for which it returns True
"""
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from plaingpt.errors import UserError

COUNT = range(2**63)  # any number of things
EMPTY: dict[Any, Any] = {str: ()}  # a dict without entries
PLAIN = (str, bool, int, float, None)
MISSING = object()  # in place of a part that is missing, or of a shape that a part lacks
SURROGATE = re.compile('[\ud800-\udfff]')


def damaged(path: Path, fault: object, code: int, remedy: str = '') -> UserError:
    return UserError('\n'.join(filter(None, (f'{path} is damaged: {fault}', remedy))), code)


def refuse(content: object, shape: Any, path: Path, code: int, remedy: str = '') -> None:
    """Raise UserError, which names the key, if the content of a file does not have that shape."""
    if fault := next(faults(content, shape, ''), None):
        raise damaged(path, fault, code, remedy)


def read_json(path: Path, shape: Any, code: int, remedy: str = '') -> Any:
    """Return what a file of JSON holds. Raise UserError if it is not JSON, or does not have that shape."""
    try:
        content = parse(path.read_bytes())
    except ValueError as error:
        raise damaged(path, f'it is not JSON: {error}', code, remedy) from None
    refuse(content, shape, path, code, remedy)
    return content


def parse(text: str | bytes) -> Any:
    """Return what is written in JSON. Raise ValueError for anything that can be wrong with it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError('its brackets are nested too deeply') from None


def fits(content: object, shape: Any) -> bool:
    return not any(faults(content, shape, ''))


def faults(value: Any, shape: Any, name: str) -> Iterator[str]:
    """Yield each part that does not have that shape, such as "best.loss is 'x'"; `name` is the value's."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for entry in entries(value, shape, name):
            yield from faults(*entry)
    elif isinstance(shape, list) and isinstance(value, list | tuple):
        shapes = shape[:1] * len(value) if shape[-1] is ... else shape
        for number, (part, of) in enumerate(zip_longest(value, shapes, fillvalue=MISSING)):
            yield from faults(part, of, f'{name}[{number}]')
    elif isinstance(shape, tuple):
        if not any(fits(value, one) for one in shape):
            # the shape of the same kind tells best which part is wrong
            alike = (one for one in shape if isinstance(one, dict) and isinstance(value, dict))
            yield from faults(value, next(alike, set()), name)
    elif not is_one(value, shape):
        yield f'{name or "its content"} is {shown(value)}'


def entries(value: dict[Any, Any], shape: dict[Any, Any], name: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield the entries of a dict that its shape names: the value, shape and name of each."""
    for key, of in shape.items():
        if isinstance(key, type):
            for one, part in value.items():
                yield one, key, f'the key {shown(one)} of {name}'
                yield part, of, f'{name}[{shown(one)}]'
        elif (bare := key.removesuffix('?')) == key or bare in value:
            yield value.get(bare, MISSING), of, f'{name}.{bare}'.removeprefix('.')


def is_one(value: Any, shape: Any) -> bool:
    """Return whether the value has a shape that has no parts."""
    if isinstance(shape, set | range):
        return type(value) in ((int,) if isinstance(shape, range) else (int, str)) and value in shape
    if isinstance(shape, type):
        is_type = type(value) is shape or (shape, type(value)) == (float, int)
        return is_type and not (shape is str and SURROGATE.search(value))
    return bool(shape(value)) if callable(shape) else value is shape


def shown(value: object) -> str:
    """Return a value in a few words, on one line."""
    is_short = value is None or isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 99)
    return 'missing' if value is MISSING else repr(value)[:80] if is_short else f'of the type {type(value).__name__}'
