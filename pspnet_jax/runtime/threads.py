"""Work in background threads."""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def in_threads(function: Callable, items: Iterable, threads: int) -> Iterator:
    """function(item) of each, in order, some computed ahead of the one that is asked for."""
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
    """The same items, made in a thread of their own before they are asked for."""
    items, end = iter(items), object()
    made = in_threads(lambda _: next(items, end), itertools.repeat(None), 1)
    with contextlib.closing(made):
        for item in made:
            if item is end:
                return
            yield item
