"""Waiting for what other processes do. The limit guards against hanging only: what is slow is not wrong."""

import contextlib
import subprocess
import time
import urllib.request
from collections.abc import Callable

import psutil
import pytest

WAIT_SECONDS = 900


def wait_until(happened: Callable[[], object], told: Callable[[], object] = str, every_s: float = 0.05) -> None:
    """Until `happened()` is true, which may also fail the test; what `told()` returns is shown if it never is."""
    limit = time.monotonic() + WAIT_SECONDS
    while not happened():
        if time.monotonic() > limit:
            pytest.fail(f"did not happen within {WAIT_SECONDS} s: {told()}")
        time.sleep(every_s)


def answers(url: str) -> bool:
    """Whether a server does, over HTTP."""
    try:
        urllib.request.urlopen(url, timeout=2)
    except OSError:
        return False
    return True


def output_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process says until its end. One that hangs is ended with all below it, and what it said is shown."""
    try:
        return process.communicate(timeout=WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        pytest.fail(f"did not end within {WAIT_SECONDS} s: {process.communicate()}")


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and all below it: Ray's workers outlive their driver."""
    below = psutil.Process(process.pid).children(recursive=True)
    each: psutil.Process | subprocess.Popen[str]
    for each in (*below, process):
        with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves at any time
            each.kill()
