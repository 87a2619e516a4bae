"""lib/stop.py: what processes agree on, and when they hear of it."""
import jax
import pytest

import lib.stop
from lib.stop import Stop


@pytest.fixture
def two(monkeypatch):
    """A Stop of one of two processes, of which the other asks for nothing; the clock is `now`."""
    now = [0.0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(lib.stop, "largest", lambda value, mesh: value)
    monkeypatch.setattr(lib.stop.time, "monotonic", lambda: now[0])
    stop = Stop(1.0)
    stop.begin(None, lambda: None)
    return stop, now


def heard(stop: Stop) -> tuple[bool, bool]:
    """What is to be done after one more step: (save, exit)."""
    stop.listen()
    return stop.wants_save, stop.wants_exit


def test_processes_save_by_time_a_step_late_and_once(two):
    stop, now = two
    assert heard(stop) == (False, False)
    now[0] = 61.0
    assert [heard(stop), heard(stop)] == [(False, False), (True, False)]
    stop.restart_clock()
    assert [heard(stop) for _ in range(3)] == [(False, False)] * 3


def test_an_exit_asked_while_others_save_is_not_lost(two):
    stop, now = two
    stop.signals.append("SIGTERM")
    assert heard(stop) == (False, False)
    stop.restart_clock()  # the plan saves here
    assert [heard(stop), heard(stop)] == [(False, False), (False, True)]
