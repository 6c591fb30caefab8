"""A worker that hangs is ended, with its reason; one that is slow says what it waits for; others are left alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.waiting import WAIT_SECONDS

SCRIPT = """
import sys, threading, time
from pipelines.training.watchdog import Watchdog

def tell(step, text):
    if sys.argv[1] == "hangs, with nobody to tell":
        raise RuntimeError("Ray is gone")
    print(step, text, flush=True)

def live():
    if sys.argv[1] == "hangs, with nobody to tell":
        raise RuntimeError("Ray is gone")
    if sys.argv[1].startswith("lives"):
        print("lives", flush=True)

import pipelines.training.watchdog
pipelines.training.watchdog._LIFE_S = 1000.0 if sys.argv[1] == "lives for a moment" else 0.5
watchdog = Watchdog(1000.0 if sys.argv[1] == "lives" else 4.0, tell, live)
with watchdog.watching():
    if sys.argv[1] == "hangs at once":
        threading.Event().wait()
    if sys.argv[1].startswith("lives"):
        time.sleep(2.6)
    for step in range(5):
        watchdog.progress("computing", step)
        time.sleep(2.5 if sys.argv[1] == "is slow" and step == 3 else 0.1)
    if sys.argv[1].startswith("hangs"):
        watchdog.progress("waiting for the other workers", 5)
        threading.Event().wait()
print("done")
"""


def run(case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), case]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("case", "step", "doing"), [("hangs", 5, "waiting for the other workers"), ("hangs at once", 0, "starting")]
)
def test_a_hang_ends_the_process_and_says_where(case: str, step: int, doing: str, tmp_path: Path):
    ended = run(case, tmp_path)
    assert ended.returncode == 70
    slow, hangs = ended.stdout.splitlines()
    assert re.fullmatch(rf"{step} no progress for [12] s while {doing}; is ended at 4 s", slow)
    assert hangs == f"{step} hangs: no progress for 4 s while {doing}; ended, to resume"
    assert "script.py" in ended.stderr, "the stacks of all threads"


def test_a_hang_ends_the_process_though_nobody_can_be_told(tmp_path: Path):
    assert run("hangs, with nobody to tell", tmp_path).returncode == 70


def test_what_takes_long_is_told_once(tmp_path: Path):
    ended = run("is slow", tmp_path)
    slow, done = ended.stdout.splitlines()
    assert re.fullmatch(r"3 no progress for [12] s while computing; is ended at 4 s", slow)
    assert (ended.returncode, done) == (0, "done")


def test_progress_keeps_a_process_alive(tmp_path: Path):
    ended = run("works", tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


def test_a_worker_gives_signs_of_life_even_without_progress(tmp_path: Path):
    """It is there, and nothing else is waited for, however long it may take."""
    *lives, done = run("lives", tmp_path).stdout.splitlines()
    assert (lives, done) == (["lives"] * len(lives), "done")
    assert len(lives) >= 2


def test_a_worker_gives_a_sign_of_life_at_once_and_the_next_half_a_minute_later(tmp_path: Path):
    ended = run("lives for a moment", tmp_path)
    lines = ended.stdout.splitlines()
    assert (lines.count("lives"), lines[-1]) == (1, "done")
