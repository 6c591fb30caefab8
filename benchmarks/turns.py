"""Let programs take turns on a machine's CPUs, so that anything else that slows the machine down slows all of them.

A program and all its descendant processes are stopped while another program has its turn. Only the seconds in which a
program was running count; a machine that is faster in one minute than in the next favours no program.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil


class Mark(NamedTuple):
    """`step` steps were done at the time `at` (seconds since 1970)."""

    step: int
    at: float


@dataclass
class Program:
    """A program that runs in separate processes and reports when it has done how many steps.

    Attributes:
        pids: its processes; their descendants belong to it as well.
        marks: returns all marks so far, in order.
        turns: start and end time of each turn in which it was running.
    """

    pids: Sequence[int]
    marks: Callable[[], list[Mark]]
    turns: list[tuple[float, float]] = field(default_factory=list)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill all its processes."""
        self.resume()
        gone = self._processes()
        for process in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(gone)

    def step_s(self, turns: slice = slice(None)) -> float:
        """Seconds per step within these turns."""
        within = self.turns[turns]
        marks = [mark for mark in self.marks() if any(start <= mark.at <= end for start, end in within)]
        if len(marks) < 2:
            raise RuntimeError("no two marks within these turns; make them longer")
        running = self._running(marks[-1].at) - self._running(marks[0].at)
        return running / (marks[-1].step - marks[0].step)

    def within_a_turn(self, since: float, until: float) -> bool:
        return any(start <= since and until <= end for start, end in self.turns)

    def _running(self, at: float) -> float:
        """Seconds of its turns before the time `at`."""
        return sum(max(0.0, min(end, at) - start) for start, end in self.turns)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(pid)
                found += [top, *top.children(recursive=True)]
        return found


def warmed_up(programs: Sequence[Program], steps: int, patience_s: float = 300.0) -> None:
    """Wait until each program has done `steps` steps, while all run at the same time."""
    deadline = time.monotonic() + patience_s
    while any(not (marks := program.marks()) or marks[-1].step < steps for program in programs):
        if not all(
            psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for program in programs for pid in program.pids
        ):
            raise RuntimeError("a program has ended")
        if time.monotonic() > deadline:
            raise RuntimeError(f"a program has not done {steps} steps in {patience_s:.0f} s")
        time.sleep(1)


def take_turns(programs: Sequence[Program], rounds: int, turn_s: float) -> Iterator[int]:
    """Let each program run alone for `turn_s` seconds per round; yield the rounds done. At the end all are stopped."""
    for program in programs:
        program.pause()
    for number in range(rounds):
        # The order alternates: a machine that becomes slower during a round favours no program either.
        for program in programs[:: 1 if number % 2 == 0 else -1]:
            program.resume()
            start = time.time()
            time.sleep(turn_s)
            program.turns.append((start, time.time()))
            program.pause()
        yield number + 1
