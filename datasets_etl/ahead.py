"""Reading while what was read before is in use."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_END = object()


def read_ahead(items: Iterator[T], held: int = 1) -> Iterator[T]:
    """The same items, read by a thread while those before them are in use: as many as may be held.

    Who leaves early does not wait for what is being read.
    """
    pool = ThreadPoolExecutor(1)
    try:
        following: deque[Future[T | object]] = deque(pool.submit(next, items, _END) for _ in range(held))
        while (item := following.popleft().result()) is not _END:
            following.append(pool.submit(next, items, _END))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
