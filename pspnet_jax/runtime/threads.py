"""Background threads: compute items ahead, yield the results in order."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Yield function(item) in order, computing up to `threads` items ahead."""
    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def prefetched(items: Iterable) -> Iterator:
    """Yield the same items, computed one ahead in a background thread."""
    items, end = iter(items), object()
    made = in_threads(lambda _: next(items, end), itertools.repeat(None), 1)
    with contextlib.closing(made):
        for item in made:
            if item is end:
                return
            yield item
