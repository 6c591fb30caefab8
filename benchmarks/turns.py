"""Programs that take turns at a machine's processors, so that whatever else slows the machine down slows all of them.

A program is stopped, with every process below it, while another has its turn. Compared are steps done in seconds in
which a program was running; a machine that is faster in one minute than in the next favours none.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import psutil


class Mark(NamedTuple):
    """So many steps were done at this time (seconds since 1970)."""

    step: int
    at: float


@dataclass
class Program:
    """Something that runs in processes of its own and tells when it has done how many steps.

    Attributes:
        pids: its processes; those below them belong to it as well.
        marks: all so far, in order.
        turns: when it was running, once programs take turns: first and last second of each turn.
    """

    pids: Sequence[int]
    marks: Callable[[], list[Mark]]
    turns: list[tuple[float, float]] = field(default_factory=list)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Nothing of it is left."""
        self.resume()
        gone = self._processes()
        for process in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(gone)

    def step_s(self, turns: slice = slice(None)) -> float:
        """Seconds a step takes within these turns."""
        within = self.turns[turns]
        told = [mark for mark in self.marks() if any(start <= mark.at <= end for start, end in within)]
        if len(told) < 2:
            raise RuntimeError("no two marks within these turns; make them longer")
        running = self._running(told[-1].at) - self._running(told[0].at)
        return running / (told[-1].step - told[0].step)

    def within_a_turn(self, since: float, until: float) -> bool:
        return any(start <= since and until <= end for start, end in self.turns)

    def _running(self, at: float) -> float:
        """Seconds of its turns before a time."""
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
    """Wait until each program has done so many steps, all running at once."""
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
    """Let each program run alone for a while, round after round; yields the rounds done. All are stopped at the end."""
    for program in programs:
        program.pause()
    for number in range(rounds):
        # To and fro: a machine that becomes slower through a round favours none either.
        for program in programs[:: 1 if number % 2 == 0 else -1]:
            program.resume()
            start = time.time()
            time.sleep(turn_s)
            program.turns.append((start, time.time()))
            program.pause()
        yield number + 1
