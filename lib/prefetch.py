"""Values made ahead by a thread."""
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prefetch(make: Callable[[int], Any], steps: range, depth: int = 2) -> Iterator[Any]:
    """make(step) for each step in turn, by a thread up to `depth` ahead; its errors are raised here."""
    ahead, pool = deque(), ThreadPoolExecutor(1)
    try:
        for step in steps:
            ahead.append(pool.submit(make, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
