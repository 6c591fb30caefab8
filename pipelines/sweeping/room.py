"""Whether a cluster has room for what a sweep asks of it: what never fits would wait for ever."""

from collections.abc import Mapping

from pipelines.cluster import Nodes, listed, slots
from pipelines.errors import PipelineError
from pipelines.sweeping.config import SweepConfig
from pipelines.training.launch import room_for_workers

# Of a trial's driver and Ray Train's controller, which sits beside it.
_DRIVER_BYTES = 2**30


def check_room(config: SweepConfig, nodes: Nodes) -> None:
    """Every phase, before the first begins. Raises PipelineError naming what does not fit."""
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
    """How many trials' drivers the memory of a node is enough for, by its resources; one in any case."""
    return max(1, int(node.get("memory", 0) // _DRIVER_BYTES))


def concurrent_trials(config: SweepConfig, nodes: Nodes) -> int:
    """How many trials to run at once: as many as fit on the cluster, and no more than asked for.

    A trial's driver needs no CPU beside its workers'. Raises PipelineError where not even one fits on a cluster that
    does not grow.
    """
    tune = config.tune
    assert tune is not None
    if config.cluster_grows and tune.max_concurrent is not None:
        return tune.max_concurrent
    machine = tune.machine
    room, each = room_for_workers(machine, nodes)
    if room < machine.num_workers:
        raise PipelineError(
            f"tune.machine: a trial needs {machine.num_workers} worker(s) with {each}; the cluster has room for "
            f"{room}. Lower it or, where the cluster adds machines on demand, give cluster_grows=true and "
            "tune.max_concurrent"
        )
    fitting = room // machine.num_workers
    return min(fitting, tune.max_concurrent or fitting)
