"""Connect to Ray: to the cluster this job was submitted to, or to a local Ray that lives as long as the command.

Every worker of a cluster imports this module before Ray sets how many threads it may use, so it must not import torch.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence

# Ray reads these on import. A local Ray listens on loopback only; a job's driver is part of its cluster's network.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Drivers of trials and queues reserve no CPU; on a small machine Ray would warn that they outnumber its CPUs.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(8, os.cpu_count() or 1)))
# Ray would otherwise warn about a change of defaults for workers without a GPU.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# What its node kills for memory, Ray repeats without end by default; ten times take some five minutes.
os.environ.setdefault("RAY_task_oom_retries", "10")
# Ray Train notices a finished or lost worker after this long; its default of 2 s adds up over four stages.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from pipelines.entry import OutageError, first_line, interrupted_by, last_line
from pipelines.wording import counted

Nodes = Sequence[Mapping[str, float]]
"""The resources of each node, as Ray names them."""

_MADE = "raised in its creation task"  # Ray's words
_DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20
_HEAD_PATIENCE_S = 60.0


class RayLostError(OutageError):
    """Ray, or a process of Ray's that the driver needs, is gone. With a new connection all may be well."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Ray was lost ({reason}); give the same command again")
        self.reason = reason


@contextlib.contextmanager
def connected(cpus: int | None = None, *, verbose: bool = False, dashboard: bool = False) -> Iterator[None]:
    """Connect to Ray for the length of a `with`.

    Args:
        cpus: minimum number of CPUs that a local Ray offers; None for those of the machine. A cluster offers its own.
        verbose: show the output of workers on the terminal too.
        dashboard: run the dashboard of a local Ray. Without it, Ray Train inside Tune leaks the workers' placement
            group when a trial is stopped early.

    `RAY_ADDRESS` (set by `ray job submit`) names the cluster; without it a local Ray is started and stopped. SIGTERM is
    handled like Ctrl-C. Raises OutageError if Ray does not start or answer, or a task's process died whenever it was
    tried; RayLostError if Ray is lost on the way.
    """
    if ray.is_initialized():  # by a caller or a test
        yield
        return
    remote = bool(os.environ.get("RAY_ADDRESS"))
    machine = os.cpu_count() or 1
    port = free_port() if dashboard and not remote else None
    if port is not None:
        # Without this, requests would go to the dashboard of the Ray that was started last on this machine.
        os.environ[_DASHBOARD_VARIABLE] = f"http://127.0.0.1:{port}"
    try:
        if remote:
            _wait_for_head(os.environ["RAY_ADDRESS"])
        ray.init(
            address=None if remote else "local",
            num_cpus=None if remote else max(machine, cpus or machine),
            include_dashboard=None if remote else dashboard,
            dashboard_port=port,
            object_store_memory=None if remote else _LOCAL_OBJECT_STORE_BYTES,
            runtime_env={"worker_process_setup_hook": talk_where_ray_does} if remote else None,
            configure_logging=True,
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=verbose,
        )
    except Exception as error:  # Ray's errors have no common type
        which = f"the cluster at {os.environ['RAY_ADDRESS']} does not answer" if remote else "it does not start here"
        raise OutageError(f"no Ray: {which} ({first_line(error)})") from error
    try:
        with interrupted_by(signal.SIGTERM):  # Ray's own handler prints stack traces and aborts
            yield
    except RayError as error:
        if isinstance(error, RayTaskError):
            raise  # a task failed, but Ray was not lost
        if isinstance(error, (OutOfMemoryError, WorkerCrashedError)):
            raise OutageError(_of_killed_task(error)) from error
        raise RayLostError(_reason(error)) from error
    finally:
        ray.shutdown()
        if port is not None:
            os.environ.pop(_DASHBOARD_VARIABLE, None)


def _wait_for_head(address: str) -> None:
    """Wait until a cluster's head takes connections. Ray would do so for more than ten minutes, deaf to
    signals.

    Raises OSError if it takes none for `_HEAD_PATIENCE_S`. Anything but HOST:PORT is left to Ray.
    """
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        return
    end = time.monotonic() + _HEAD_PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(1)


def _reason(error: RayError) -> str:
    """Why Ray was lost, in a line. What an actor raised when it was made stands at the end of a traceback."""
    return last_line(error) if _MADE in str(error) else first_line(error)


def _of_killed_task(error: RayError) -> str:
    """A line about a task that Ray gave up, because its process died each time."""
    if isinstance(error, WorkerCrashedError):
        return (
            "the process of a Ray task died each time it was tried, perhaps for lack of memory; Ray's logs on its node "
            "say more (session_latest/logs)"
        )
    found = re.search(r"\(IP: ([^,)]+)[^)]*\) was (\S+) used / (\S+)", str(error))
    where = "its node" if found is None else f"node {found[1]} ({found[2]} of {found[3]} in use)"
    return (
        f"Ray killed a task each time it was tried, because {where} ran out of memory; give it more, or less to do at "
        "a time, and give the same command again"
    )


def nodes() -> Nodes:
    """The resources of each live node of the connected cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def own_node() -> Mapping[str, float]:
    """The resources of the node that this process runs on."""
    here = ray.get_runtime_context().get_node_id()
    (found,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return found


def slots(nodes: Nodes, cpus: int, use_gpu: bool, *, one_a_node: bool = False) -> int:
    """How many tasks or workers fit at once, each on one node, with that many CPUs and perhaps a GPU.

    Args:
        nodes: the cluster's nodes.
        cpus, use_gpu: what each task or worker takes.
        one_a_node: place at most one on each node.
    """
    total = 0
    for resources in nodes:
        fit = int(resources.get("CPU", 0)) // cpus
        if use_gpu:
            fit = min(fit, int(resources.get("GPU", 0)))
        total += min(fit, 1) if one_a_node else fit
    return total


def listed(cpus: int, use_gpu: bool) -> str:
    """What one task or worker takes, as text for people."""
    return counted(cpus, "CPU") + (" and a GPU" if use_gpu else "")


def has_gpus() -> bool:
    """Whether any node of the connected cluster has a GPU now."""
    return bool(ray.cluster_resources().get("GPU"))


def free_port() -> int:
    """A loopback port on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def talk_where_ray_does() -> None:
    """Make gloo and NCCL use the interface by whose address Ray knows this node, unless the user chose another.

    By default gloo uses the interface that the host's own name resolves to. On many hosts that is loopback, and workers
    could then not reach those on other nodes. NCCL takes the first one that is up, which may be a bridge of virtual
    machines; what it sends over InfiniBand or EFA is not concerned.
    """
    address = ray.util.get_node_ip_address()
    for label, addresses in psutil.net_if_addrs().items():
        if address in (found.address for found in addresses):
            name = label.partition(":")[0]  # eth0:1 is another address of eth0
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # = : this name, not all that begin like it
