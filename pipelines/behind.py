"""Writing beside a model: threads draw, encode and write the last results while it computes the next.

On a GPU a pair takes less time than its files.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

P = ParamSpec("P")

THREADS = 4


class Behind:
    """Pieces of work for threads while their giver goes on, in a `with` that ends when all are done.

    As many as there are threads are under way at a time, so that what they hold in memory is bounded, and all of those
    are ended. What one raises comes up where a later one is given, or at the end.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._under_way: deque[Future[None]] = deque()

    def do(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        while len(self._under_way) >= self._threads:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(work, *args, **kwargs))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while error is None and self._under_way:
                self._under_way.popleft().result()
        finally:
            self._pool.shutdown()
