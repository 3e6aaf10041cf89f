"""Waiting in tests: for the event itself, and so long that no slow or busy machine fails them."""
import time
from collections.abc import Callable

PATIENT = 1800  # seconds; only an event that never comes takes so long


def wait_until(condition: Callable[[], object], what: str = 'what the test waits for') -> None:
    """Block until the condition holds."""
    end = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < end, f'{what} did not come in {PATIENT} s'
        time.sleep(0.01)
