"""Numbers that look random, and are a pure function of their key: the same on every machine, with nothing to save."""
from typing import Any, TypeVar

import numpy.typing as npt

Bits = TypeVar('Bits', int, npt.NDArray[Any])  # a number, or an array of uint64

MASK = 2**64 - 1


def mix(x: Bits) -> Bits:
    """Turn each 64-bit number into one that looks unrelated to it (splitmix64, Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def draw(*key: int) -> int:
    """Return a 63-bit number that depends on nothing but the key."""
    state = 0
    for number in key:  # plus splitmix64's own constant, without which mix would leave 0 as it is
        state = mix(state + number + 0x9E3779B97F4A7C15 & MASK)
    return state >> 1  # a signed integer holds it
