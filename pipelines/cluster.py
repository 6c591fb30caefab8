"""Connecting to Ray: the cluster this job was submitted to, or a local one for as long as the command runs."""

import contextlib
import logging
import os
from collections.abc import Iterator

# Read when Ray is imported: a local Ray listens on loopback only. A job's driver is a part of its cluster's network.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Ray would otherwise warn about a change of defaults for workers without a GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray Train notices a finished or lost worker after this long; its default of 2 s adds up over four stages.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import ray

_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20


@contextlib.contextmanager
def connected(cpus: int | None = None, *, verbose: bool = False) -> Iterator[None]:
    """Ray for the length of a `with`.

    Args:
        cpus: CPUs a local Ray offers, at least; None for those of the machine. A cluster offers what it has.
        verbose: workers' own output goes to the terminal too.

    `RAY_ADDRESS` (set by `ray job submit`) names the cluster; without it a local Ray is started and stopped.
    """
    if ray.is_initialized():  # a caller's, or a test's
        yield
        return
    remote = bool(os.environ.get("RAY_ADDRESS"))
    machine = os.cpu_count() or 1
    ray.init(
        address=None if remote else "local",
        num_cpus=None if remote else max(machine, cpus or machine),
        include_dashboard=None if remote else False,
        object_store_memory=None if remote else _LOCAL_OBJECT_STORE_BYTES,
        configure_logging=True,
        logging_level=logging.INFO if verbose else logging.ERROR,
        log_to_driver=verbose,
    )
    try:
        yield
    finally:
        ray.shutdown()
