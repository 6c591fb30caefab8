"""What workers report to the driver while a stage runs: records on a queue that outlives any worker.

Only the driver prints and writes to MLflow, so workers need no access to the tracking server, and a lost worker leaves
no half-written run behind.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_SECONDS = 0.5
# After an error or Ctrl-C, `keep` gets this long for the records that are left. Its server may be unreachable, and the
# checkpoints hold the newest records anyway.
_KEPT_AFTER_AN_ERROR_S = 10.0


@dataclass(frozen=True)
class Record:
    """One message.

    Attributes:
        step: number of steps finished when it was made.
        metrics: name → value, tracked against the step.
        line: text to show to people; empty if there is nothing to show.
        pictures: file name → PNG.
        earlier: the metrics sent just before, as (step, metrics), because a queue that was killed may have lost them.
        time_ms: when it was made, in milliseconds since 1970; a retried write to MLflow is then the same entry.
        waiting: whether the driver made it, because it waits for workers.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    line: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)
    earlier: tuple[tuple[int, dict[str, float]], ...] = ()
    time_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    waiting: bool = False


@ray.remote(num_cpus=0)
class _Queue:
    def __init__(self) -> None:
        self._records: list[Record] = []
        self._gave_up_for: Exception | None = None
        self._departures = 0
        self._heard = time.monotonic()

    def put(self, record: Record) -> None:
        self._records.append(record)

    def drain(self) -> list[Record]:
        records, self._records = self._records, []
        return records

    def give_up(self, error: Exception) -> None:
        self._gave_up_for = self._gave_up_for or error

    def gave_up_for(self) -> Exception | None:
        return self._gave_up_for

    def live(self) -> None:
        self._heard = time.monotonic()

    def silent_s(self) -> float:
        return time.monotonic() - self._heard

    def depart(self) -> None:
        self._departures += 1

    def departures(self) -> int:
        return self._departures


class FeedWriter:
    """The sending end of the queue, for workers."""

    def __init__(self, name: str) -> None:
        self._queue: Any = ray.get_actor(name)

    def send(self, record: Record) -> None:
        """Send a record, in order, without waiting for the driver."""
        self._queue.put.remote(record)

    def give_up(self, error: Exception) -> None:
        """Tell everyone that a retry would fail with the same error; only the first error given is kept."""
        ray.get(self._queue.give_up.remote(error))

    def gave_up_for(self) -> Exception | None:
        """The error that a worker gave up for; None if no worker gave up."""
        error: Exception | None = ray.get(self._queue.gave_up_for.remote())
        return error

    def live(self) -> None:
        """Give a sign of life."""
        self._queue.live.remote()

    def silent_s(self) -> float:
        """Seconds since a worker's last sign of life, or since the queue was made."""
        seconds: float = ray.get(self._queue.silent_s.remote())
        return seconds

    def depart(self) -> None:
        """Count one departure: all workers leave because of a preemption notice for one of their machines."""
        ray.get(self._queue.depart.remote())

    def departures(self) -> int:
        """How often the workers have left because of a preemption notice."""
        times: int = ray.get(self._queue.departures.remote())
        return times


@contextlib.contextmanager
def listening(name: str, show: Callable[[Record], None], keep: Callable[[Record], None]) -> Iterator[None]:
    """The driver's end of the queue, for the length of a `with`: each record is shown at once, and kept soon after.

    Args:
        name: name of the queue.
        show: called with every record, in order; must be quick.
        keep: called with every record, in order, in a separate thread, so it may wait for a server. An error it raises
            is shown at once. The end of the `with` waits until all records are kept, and raises the error of `keep`, if
            any; after an error in the block it waits for only `_KEPT_AFTER_AN_ERROR_S`. After that `keep` is not called
            again: a record kept later than its successors would leave a permanent gap.
    """
    queue = _start_queue(name)
    keeper = _Keeper(keep, show)

    def receive(record: Record) -> None:
        show(record)
        keeper.submit(record)

    try:
        with _draining(queue, receive):
            yield
    except BaseException:
        keeper.finish(_KEPT_AFTER_AN_ERROR_S)
        raise
    keeper.finish()
    if keeper.failure is not None:
        raise keeper.failure


def _start_queue(name: str) -> Any:
    """A handle of the queue. Its type is Any, because to mypy the methods of Ray's handles never return."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray restarts a queue that dies, under the same name. The metrics it held come again with the next record.
    options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    queue = _Queue.options(name=name, **options).remote()  # type: ignore[attr-defined]
    ray.get(queue.drain.remote())  # it must exist before a worker looks for it
    return queue


@contextlib.contextmanager
def _draining(queue: Any, receive: Callable[[Record], None]) -> Iterator[None]:
    """Hand each record in the queue to `receive`, in a thread, for the length of a `with`; at its end the last ones.

    Then the queue is killed, and an error of the thread is raised, unless the block raised one.
    """
    ended = threading.Event()

    def drain() -> None:
        last = False
        while not last:
            last = ended.wait(_POLL_SECONDS)
            for record in ray.get(queue.drain.remote()):
                receive(record)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as thread:
        draining = thread.submit(drain)
        try:
            yield
        finally:
            ended.set()
            wait([draining])
            ray.kill(queue)
    draining.result()


class _Keeper:
    """Keeps records in order, in a daemon thread: the process can exit without waiting for it."""

    def __init__(self, keep: Callable[[Record], None], show: Callable[[Record], None]) -> None:
        self.failure: Exception | None = None
        self._keep, self._show = keep, show
        self._records: SimpleQueue[Record | None] = SimpleQueue()
        self._left = False
        self._thread = threading.Thread(target=self._run, name="keep", daemon=True)
        self._thread.start()

    def submit(self, record: Record) -> None:
        if self.failure is None:
            self._records.put(record)

    def finish(self, seconds: float | None = None) -> None:
        """Wait until all records are kept, at most `seconds`; after that no further record is kept."""
        self._records.put(None)
        self._thread.join(seconds)
        self._left = True

    def _run(self) -> None:
        while not self._left and (record := self._records.get()) is not None:
            try:
                self._keep(record)
            except Exception as error:  # noqa: BLE001 (the driver raises it, see `listening`)
                self.failure = error
                line = f"nothing further is tracked of this stage, which ends with this error: {error}"
                self._show(Record(record.step, line=" ".join(line.split())))
                return
