"""Whether a cluster has room for a sweep: work that never fits would wait for ever."""

from collections.abc import Mapping

from pipelines.cluster import Nodes, listed, slots
from pipelines.errors import PipelineError
from pipelines.sweeping.config import SweepConfig
from pipelines.training.launch import room_for_workers
from pipelines.wording import counted

# Memory of a trial's driver together with Ray Train's controller, which runs on the same node; and of what is there
# once: the sweep's own driver, Ray's head and its dashboard.
_DRIVER_BYTES = 2**30
_ONCE_BYTES = 2 * 2**30


def check_room(config: SweepConfig, nodes: Nodes) -> None:
    """Check every phase before the first begins. Raises PipelineError, which names what does not fit."""
    if config.cluster_grows:
        return
    tasks = [("cost", config.cost.cpus, config.cost.use_gpu)]
    if config.probe is not None:
        tasks.append(("probe", config.probe.cpus, config.probe.use_gpu))
    for name, cpus, use_gpu in tasks:
        if not slots(nodes, cpus, use_gpu):
            raise PipelineError(
                f"{name}: no node of the cluster has {listed(cpus, use_gpu)}; lower {name}.cpus, give "
                f"{name}.use_gpu=false or, where the cluster adds machines on demand, cluster_grows=true"
            )
    if config.tune is not None:
        concurrent_trials(config, nodes)


def drivers_at_once(node: Mapping[str, float]) -> int:
    """How many trials' drivers fit into the memory of a node with these resources; at least one."""
    return max(1, int((node.get("memory", 0) - _ONCE_BYTES) // _DRIVER_BYTES))


def driver_memory_lack(config: SweepConfig, nodes: Nodes, own: Mapping[str, float]) -> str:
    """A line if fewer trials run at once than the cluster has room for, or `tune.max_concurrent` says; else empty."""
    wanted, fitting = concurrent_trials(config, nodes), drivers_at_once(own)
    if fitting >= wanted:
        return ""
    return (
        f"runs {counted(fitting, 'trial')} at once, not {wanted}: their drivers run on this node, which has "
        f"{own.get('memory', 0) / 2**30:.1f} GiB for Ray; each takes {_DRIVER_BYTES / 2**30:g} GiB, and "
        f"{_ONCE_BYTES / 2**30:g} GiB are left to what is there once"
    )


def concurrent_trials(config: SweepConfig, nodes: Nodes) -> int:
    """How many trials to run at once: as many as fit on the cluster, but at most `tune.max_concurrent`.

    A trial's driver needs no CPU besides those of its workers. Raises PipelineError if not even one trial fits on a
    cluster that does not grow.
    """
    tune = config.tune
    assert tune is not None
    if config.cluster_grows and tune.max_concurrent is not None:
        return tune.max_concurrent
    machine = tune.machine
    room, each = room_for_workers(machine, nodes)
    if room < machine.num_workers:
        raise PipelineError(
            f"tune.machine: a trial needs {counted(machine.num_workers, 'worker')} with {each}; the cluster has room "
            f"for {room}. Lower it or, where the cluster adds machines on demand, give cluster_grows=true and "
            "tune.max_concurrent"
        )
    fitting = room // machine.num_workers
    return min(fitting, tune.max_concurrent or fitting)
