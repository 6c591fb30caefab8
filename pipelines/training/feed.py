"""What workers tell the driver while a stage runs: records on a queue that outlives any worker.

The driver is the only one who prints and who writes to MLflow, so workers need no tracking server, and a lost worker
leaves no half-told run behind.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Record:
    """One message.

    Attributes:
        step: steps finished when it was made.
        metrics: name → value, tracked against the step.
        line: what a person reads of it; empty where nothing is to be shown.
        pictures: file name → PNG.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    line: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)


@ray.remote(num_cpus=0)
class _Queue:
    def __init__(self) -> None:
        self._records: list[Record] = []

    def put(self, record: Record) -> None:
        self._records.append(record)

    def drain(self) -> list[Record]:
        records, self._records = self._records, []
        return records


class FeedWriter:
    """A worker's end."""

    def __init__(self, name: str) -> None:
        self._queue = ray.get_actor(name)

    def send(self, record: Record) -> None:
        """In order, without waiting for the driver."""
        self._queue.put.remote(record)


@contextlib.contextmanager
def listening(name: str, handle: Callable[[Record], None]) -> Iterator[None]:
    """The driver's end: calls `handle` with every record, in order, for the length of a `with`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = _Queue.options(name=name, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    ray.get(queue.drain.remote())  # it must stand before a worker looks for it
    ended = threading.Event()
    failures: list[Exception] = []

    def listen() -> None:
        try:
            while True:
                last = ended.wait(_POLL_SECONDS)
                for record in ray.get(queue.drain.remote()):
                    handle(record)
                if last:
                    return
        except Exception as error:  # noqa: BLE001 (raised again where the driver waits)
            failures.append(error)

    thread = threading.Thread(target=listen, name="feed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        ray.kill(queue)
    if failures:
        raise failures[0]
