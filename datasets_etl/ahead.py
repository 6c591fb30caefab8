"""Read ahead in a background thread."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_END = object()


def read_ahead(items: Iterator[T], held: int = 1) -> Iterator[T]:
    """Yield the same items; a thread reads up to `held` of them ahead while the caller uses an earlier one.

    A caller that stops early does not wait for the read in progress.
    """
    pool = ThreadPoolExecutor(1)
    try:
        following: deque[Future[T | object]] = deque(pool.submit(next, items, _END) for _ in range(held))
        while (item := following.popleft().result()) is not _END:
            following.append(pool.submit(next, items, _END))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
