"""Shapes: the values that fit them, and how a value that does not fit is named."""
from typing import Any

import pytest

from plaingpt.schema import COUNT, EMPTY, faults, fits, parse

HUGE = 10**5000  # Python refuses to print it
FITTING: list[tuple[Any, Any]] = [
    (1, int), (1, float), (1.5, float), (float('inf'), float), (True, bool), (None, None), ('é', str), (0, COUNT),
    ('a', {'a', 'b'}), (3, range(4)), ([1, 'x'], [int, str]), ((1, 'x'), [int, str]), ([], [int, ...]),
    ({}, EMPTY), ({'a': 1, 'more': 2}, {'a': int}), ({}, {'a?': int}), ({'a': {'b': [1]}}, {'a': {str: [int, ...]}}),
    (None, (int, None)), ('x', (int, str)), ('7', str.isdecimal),
]
ODD: list[tuple[Any, Any, str]] = [
    (True, int, 'its content is True'), (True, float, 'its content is True'), (1, bool, 'its content is 1'),
    (1.0, range(2), 'its content is 1.0'), ('1', COUNT, "its content is '1'"), (-1, COUNT, 'its content is -1'),
    (True, range(2), 'its content is True'), (2**63, COUNT, f'its content is {2**63}'), ('\ud800', str, "'\\ud800'"),
    (HUGE, COUNT, 'its content is of the type int'), ('x\n' * 99, int, "'x\\nx\\nx"), ([1], {'a': int}, 'type list'),
    ({}, {'a': {'b': int}}, 'a is missing'), ({'a': {}}, {'a': {'b': int}}, 'a.b is missing'),
    ({'a': 'x'}, {'a?': int}, "a is 'x'"), ({'a': None}, {'a?': int}, 'a is None'),
    ({'a': {3: 1}}, {'a': {str: int}}, 'the key 3 of a'), ({'a': {'b\n': ''}}, {'a': {str: int}}, "a['b\\n'] is ''"),
    ({'a': [1, 'x']}, {'a': [int, ...]}, "a[1] is 'x'"), ([1], [int, int], '[1] is missing'),
    ([1, 2, 3], [int, int], '[2] is 3'), ({'a': 1}, EMPTY, 'is 1'), ([], {'a', 'b'}, 'the type list'),
    ({'a': 'x'}, {'a': (int, None)}, "a is 'x'"), ({'a': {'b': 1}}, {'a': (None, {'b': str})}, 'a.b is 1'),
]


@pytest.mark.parametrize('number', range(len(FITTING)))
def test_a_value_of_the_right_shape_fits(number: int) -> None:
    assert fits(*FITTING[number])


@pytest.mark.parametrize('number', range(len(ODD)))
def test_a_value_that_does_not_fit_is_named_in_one_line(number: int) -> None:
    value, shape, message = ODD[number]
    said = next(faults(value, shape, ''))
    assert message in said and '\n' not in said and len(said) < 100
    assert not fits(value, shape)


@pytest.mark.parametrize('text', ['[' * 200_000, '{"a":' * 200_000, '1' * 5000, '', '{', b'\xff', b'\xff\xfe\x00'])
def test_any_error_in_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r'nested|digits|line 1|decode'):
        parse(text)
