"""Whether a recorded process is still the same one: pids are reused, and clocks can be changed."""

from pathlib import Path

import psutil


def this_machine() -> str:
    """Identifies this boot of this machine and the PID namespace of this process; empty if they are unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """Start time of a process of this machine, by the kernel's clock; empty if it does not exist or has ended.

    The kernel counts from the boot on. Times of day, as psutil tells them, move when the system's clock is set.
    """
    try:
        state, *_, started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except OSError:
        return "" if Path("/proc/self").exists() else _time_of_day(pid)
    return "" if state == "Z" else started


def _time_of_day(pid: int) -> str:
    """The same where the kernel has no /proc."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return ""
