"""Programs that take turns run alone, and only their turns count."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.turns import Mark, Program, take_turns, warmed_up

# A process and one below it; each writes a line every few milliseconds.
COUNTING = """
import subprocess, sys
tell = '''
import time
step = 0
while True:
    step += 1
    print(step, time.time(), flush=True)
    time.sleep(0.005)
'''
with open(sys.argv[1] + ".below", "w") as below:
    subprocess.Popen([sys.executable, "-c", tell], stdout=below)
exec(tell)
"""


def marks_of(path: Path) -> Callable[[], list[Mark]]:
    def read() -> list[Mark]:
        lines = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [Mark(int(step), float(at)) for step, at in lines]

    return read


def test_seconds_between_turns_do_not_count() -> None:
    marks = [Mark(step, step if step <= 10 else step + 100.0) for step in range(1, 21)]  # a second each, and a pause
    program = Program([], lambda: marks, turns=[(0.0, 10.5), (110.5, 121.0)])
    assert program.step_s() == pytest.approx(1.0)
    assert program.step_s(slice(1, 2)) == pytest.approx(1.0)
    assert program.within_a_turn(2.0, 9.0)
    assert not program.within_a_turn(9.0, 112.0)
    with pytest.raises(RuntimeError, match="longer"):
        Program([], lambda: marks, turns=[(0.0, 1.5)]).step_s()


def test_a_program_stands_still_with_all_its_processes_while_another_runs(tmp_path: Path) -> None:
    logs = [tmp_path / name for name in ("one", "other")]
    programs = []
    for path in logs:
        with path.open("w") as out:
            process = subprocess.Popen([sys.executable, "-c", COUNTING, str(path)], stdout=out)
        programs.append(Program([process.pid], marks_of(path)))
    try:
        warmed_up(programs, steps=5)
        began = time.time()
        assert list(take_turns(programs, rounds=3, turn_s=0.4)) == [1, 2, 3]
        time.sleep(0.2)
        for program, path in zip(programs, logs, strict=True):
            assert len(program.turns) == 3
            for marks in (program.marks(), marks_of(path.with_name(path.name + ".below"))()):
                counted = [mark for mark in marks if mark.at > began + 0.1]
                inside = [any(s <= mark.at <= e + 0.1 for s, e in program.turns) for mark in counted]
                assert len(inside) > 10
                # One line may have been under way when its process was stopped, at each turn's end.
                assert inside.count(False) <= len(program.turns)
    finally:
        processes = [process for program in programs for process in program._processes()]
        for program in programs:
            program.end()
    assert len(processes) == 4
    assert not any(psutil.pid_exists(process.pid) and process.status() != "zombie" for process in processes)


def test_a_program_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "none").touch()
    process = subprocess.Popen([sys.executable, "-c", ""])
    with pytest.raises(RuntimeError, match="ended"):
        warmed_up([Program([process.pid], marks_of(tmp_path / "none"))], steps=1, patience_s=60)
    process.wait()
