"""Draw, encode and write results in background threads while the model computes the next ones.

On a GPU, computing a pair takes less time than writing its files.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

P = ParamSpec("P")

THREADS = 4


class Behind:
    """Runs pieces of work in threads while the caller goes on.

    At most `threads` pieces are under way at once, which bounds the memory that they hold. Leaving the `with` waits for
    all of them, even after an error. An error in a piece is raised by a later `do` or at the end of the `with`.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._under_way: deque[Future[None]] = deque()

    def do(self, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Begin a piece of work, once fewer than `threads` are under way. Raises the error of one that failed."""
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
