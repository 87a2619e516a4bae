"""lib/prefetch.py: values made ahead by a thread, in order, and no further ahead than told."""
import threading

import pytest

from lib.errors import InputError
from lib.prefetch import prefetch


def same_number(step):
    """The step itself."""
    return step


def test_values_come_in_order():
    def square(step):
        return step * step

    assert list(prefetch(square, range(1, 50))) == [step * step for step in range(1, 50)]
    assert list(prefetch(str, range(3, 3))) == []


def test_an_error_is_raised_in_its_turn():
    def make(step):
        if step == 3:
            raise InputError("step three")
        return step

    stream = prefetch(make, range(1, 10))
    assert next(stream) == 1
    assert next(stream) == 2
    with pytest.raises(InputError, match="step three"):
        next(stream)


def test_the_thread_works_no_further_ahead_than_told():
    made = []

    def make(step):
        made.append(step)
        return step

    stream = prefetch(make, range(100), depth=2)
    for step in stream:
        assert len(made) <= step + 1 + 2 + 1  # taken, waiting in the queue, in the worker's hand
        if step == 20:
            stream.close()
    assert len(made) < 30


def test_the_thread_ends_when_the_values_are_closed():
    before = threading.active_count()
    stream = prefetch(same_number, range(10**9))
    assert next(stream) == 0
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
