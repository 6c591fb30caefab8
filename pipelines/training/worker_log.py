"""What a worker says while it trains: to the log of its process, to the driver, and to its watchdog."""

import logging
import time

from pipelines.training.config import StageConfig
from pipelines.training.feed import FeedWriter, Record
from pipelines.training.state import TrainingState
from pipelines.training.watchdog import Watchdog

log = logging.getLogger(__name__)

# So many records are sent again with the next one: more than are made while the driver does not look at its queue.
_SENT_AGAIN = 10


def log_line(stage: StageConfig, step: int, rank: int, text: str) -> str:
    """One line about a stage, such as "stage=chairs step=50/100000 rank=0 resumes: …"."""
    return f"stage={stage.name} step={step}/{stage.steps} rank={rank} {text}"


class WorkerLog:
    """Messages of one worker; each carries the step that `state` is at."""

    def __init__(
        self, stage: StageConfig, rank: int, state: TrainingState, feed: FeedWriter, watchdog: Watchdog
    ) -> None:
        self._stage = stage
        self._rank = rank
        self._state = state
        self._feed = feed
        self._watchdog = watchdog

    def say(self, text: str, metrics: dict[str, float] | None = None, pictures: dict[str, bytes] | None = None) -> None:
        """Log a line on every rank; rank 0 also sends it to the driver, with `metrics` and `pictures` to track."""
        line = self._line(text)
        log.info(line)
        if self._rank == 0:
            earlier = tuple(self._state.records[-_SENT_AGAIN - 1 : -1]) if metrics else ()
            self._feed.send(Record(self._state.step, metrics or {}, line, pictures or {}, earlier))

    def warn(self, text: str) -> None:
        """Log a warning and send it to the driver, whatever this worker's rank."""
        line = self._line(text)
        log.warning(line)
        self._feed.send(Record(self._state.step, line=line))

    def progress(self, doing: str) -> float:
        """Tell the watchdog what this worker does next. Returns the current monotonic time, in seconds."""
        self._watchdog.progress(doing, self._state.step)
        return time.monotonic()

    def _line(self, text: str) -> str:
        return log_line(self._stage, self._state.step, self._rank, text)
