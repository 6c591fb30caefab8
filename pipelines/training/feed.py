"""What workers tell the driver while a stage runs: records on a queue that outlives any worker.

The driver is the only one who prints and who writes to MLflow, so workers need no tracking server, and a lost worker
leaves no half-told run behind.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_POLL_SECONDS = 0.5
# How long what was told before an error, or ^C, may take to be kept: the server may be away, and checkpoints hold the
# newest records.
_KEPT_AFTER_AN_ERROR_S = 10.0


@dataclass(frozen=True)
class Record:
    """One message.

    Attributes:
        step: steps finished when it was made.
        metrics: name → value, tracked against the step.
        line: what a person reads of it; empty where nothing is to be shown.
        pictures: file name → PNG.
        time_ms: when it was made, milliseconds since 1970: told twice, it is the same entry.
        waiting: told by who waits for workers, not by one of them.
    """

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    line: str = ""
    pictures: dict[str, bytes] = field(default_factory=dict)
    time_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    waiting: bool = False


@ray.remote(num_cpus=0)
class _Queue:
    def __init__(self) -> None:
        self._records: list[Record] = []
        self._gave_up_for: Exception | None = None
        self._arrivals = self._departures = 0

    def put(self, record: Record) -> None:
        self._records.append(record)

    def drain(self) -> list[Record]:
        records, self._records = self._records, []
        return records

    def give_up(self, error: Exception) -> None:
        self._gave_up_for = self._gave_up_for or error

    def gave_up_for(self) -> Exception | None:
        return self._gave_up_for

    def arrive(self) -> None:
        self._arrivals += 1

    def arrivals(self) -> int:
        return self._arrivals

    def depart(self) -> None:
        self._departures += 1

    def departures(self) -> int:
        return self._departures


class FeedWriter:
    """A worker's end."""

    def __init__(self, name: str) -> None:
        self._queue = ray.get_actor(name)

    def send(self, record: Record) -> None:
        """In order, without waiting for the driver."""
        self._queue.put.remote(record)

    def give_up(self, error: Exception) -> None:
        """Tell everyone that trying again would meet the same error; the first one told counts."""
        ray.get(self._queue.give_up.remote(error))

    def gave_up_for(self) -> Exception | None:
        """What somebody gave up for; None while all go on."""
        error: Exception | None = ray.get(self._queue.gave_up_for.remote())
        return error

    def arrive(self) -> None:
        """Say that workers have come up."""
        self._queue.arrive.remote()

    def arrivals(self) -> int:
        """How often workers have come up."""
        times: int = ray.get(self._queue.arrivals.remote())
        return times

    def depart(self) -> None:
        """Say that all workers leave, because a machine of theirs is about to be taken away."""
        ray.get(self._queue.depart.remote())

    def departures(self) -> int:
        """How often workers have left like that."""
        times: int = ray.get(self._queue.departures.remote())
        return times


@contextlib.contextmanager
def listening(name: str, show: Callable[[Record], None], keep: Callable[[Record], None]) -> Iterator[None]:
    """The driver's end, for the length of a `with`: every record is shown at once and kept as soon as possible.

    Args:
        name: of the queue.
        show: called with every record, in order; must be quick.
        keep: called with every record, in order, in a thread of its own: it may wait for a server. What it raises is
            shown at once. The end of the `with` waits until all is kept, and raises what `keep` raised; where the block
            raised, it waits for some seconds only. After that `keep` is not called again: a record that is told later
            than its successors would leave a gap for good.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # One that dies is started again: what it held is in the next checkpoint, and its name still leads to it.
    options = {"scheduling_strategy": here, "max_restarts": -1, "max_task_retries": -1}
    queue = _Queue.options(name=name, **options).remote()  # type: ignore[attr-defined]
    ray.get(queue.drain.remote())  # it must stand before a worker looks for it
    ended = threading.Event()
    keeper = _Keeper(keep, show)

    def listen() -> None:
        while True:
            last = ended.wait(_POLL_SECONDS)
            for record in ray.get(queue.drain.remote()):
                show(record)
                keeper.submit(record)
            if last:
                return

    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as listener:
            listening = listener.submit(listen)
            try:
                yield
            finally:
                ended.set()
                wait([listening])
                ray.kill(queue)
        listening.result()
    except BaseException:
        keeper.finish(_KEPT_AFTER_AN_ERROR_S)
        raise
    keeper.finish()
    if keeper.failure is not None:
        raise keeper.failure


class _Keeper:
    """Keeps records in order, in a thread whose end the process need not wait for."""

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
        """Wait until all is kept, or for that long; no further record is kept then."""
        self._records.put(None)
        self._thread.join(seconds)
        self._left = True

    def _run(self) -> None:
        while not self._left and (record := self._records.get()) is not None:
            try:
                self._keep(record)
            except Exception as error:  # noqa: BLE001 (raised where the driver waits)
                self.failure = error
                line = f"nothing further is tracked of this stage, which ends with this error: {error}"
                self._show(Record(record.step, line=" ".join(line.split())))
                return
