"""Values made ahead by a thread, so that whoever uses them need not wait."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lib.errors import InputError


class Prefetch:
    """make(step) for each of `steps` in turn, by a thread up to `depth` ahead.

    Its errors are raised where the value is taken.

    decided: the last step that can be made yet; the thread goes no further until it grows.
    stopped: after an InputError, whether it came of a stop that was asked for; then the steps end.
    """

    def __init__(
        self,
        make: Callable[[int], Any],
        steps: Iterable[int],
        depth: int = 2,
        decided: Callable[[], float] = lambda: float("inf"),
        stopped: Callable[[], bool] = lambda: False,
    ):
        self.make, self.steps, self.depth = make, iter(steps), depth
        self.decided, self.stopped = decided, stopped
        self.ahead, self.pool = deque(), ThreadPoolExecutor(1)
        self.next = next(self.steps, None)  # the first step that the thread was not asked for
        self.waited = 0.0  # seconds that the user of these values has waited for them

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)

    def ask(self):
        """Give the thread what it may make by now."""
        while self.next is not None and len(self.ahead) <= self.depth:
            if self.next > self.decided():
                break
            self.ahead.append(self.pool.submit(self.make, self.next))
            self.next = next(self.steps, None)

    def __iter__(self) -> Iterator[Any]:
        try:
            self.ask()
            while self.ahead:
                begun = time.perf_counter()
                value = self.ahead.popleft().result()
                self.waited += time.perf_counter() - begun
                yield value
                self.ask()
        except InputError:
            if not self.stopped():
                raise
        finally:
            self.pool.shutdown(cancel_futures=True)


def prefetch(make: Callable[[int], Any], steps: Iterable[int], depth: int = 2) -> Iterator[Any]:
    """The values of a `Prefetch` as a generator, which ends its thread when it is closed."""
    with Prefetch(make, steps, depth) as values:
        yield from values
