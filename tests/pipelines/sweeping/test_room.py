"""What a cluster holds."""

import pytest

from pipelines.errors import PipelineError
from pipelines.sweeping.room import check_room, concurrent_trials, driver_memory_lack, drivers_at_once


def test_no_more_trials_run_at_once_than_the_cluster_holds(tree, load):
    pairs = load(tree, "tune.machine={num_workers: 2, cpus_per_worker: 3}")
    assert concurrent_trials(pairs, [{"CPU": 12.0}]) == 2
    assert concurrent_trials(pairs, [{"CPU": 5.0}, {"CPU": 5.0}, {"CPU": 5.0}]) == 1  # 1 worker a node; not 15 / 6 = 2
    with pytest.raises(PipelineError, match=r"2 workers with 3 CPUs each; the cluster has room for 1"):
        concurrent_trials(pairs, [{"CPU": 5.0}])
    apart = load(tree, "tune.machine={num_workers: 2, placement: strict_spread}")
    assert concurrent_trials(apart, [{"CPU": 8.0}, {"CPU": 8.0}]) == 1
    with pytest.raises(PipelineError, match=r"each on a node of its own; the cluster has room for 1\."):
        concurrent_trials(apart, [{"CPU": 8.0}])
    gpu = load(tree, "tune.machine={num_workers: 1, use_gpu: true}")
    assert concurrent_trials(gpu, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}]) == 2


def test_as_many_trials_run_as_are_asked_for_where_they_fit_or_machines_come(tree, load):
    asked = load(tree, "tune.max_concurrent=3")
    assert [concurrent_trials(asked, [{"CPU": cpus}]) for cpus in (1.0, 8.0)] == [1, 3]
    with pytest.raises(PipelineError, match="the cluster has room for 0"):
        concurrent_trials(asked, [{"CPU": 0.0}])
    assert concurrent_trials(load(tree, "tune.max_concurrent=3", "cluster_grows=true"), [{"CPU": 0.0}]) == 3


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["probe.cpus=4"], r"probe: no node of the cluster has 4 CPUs; lower probe.cpus"),
        (["cost={cpus: 1, use_gpu: true}"], r"cost: no node of the cluster has 1 CPU and a GPU"),
        (["tune.machine={num_workers: 4}"], r"the cluster has room for 3"),
    ],
)
def test_what_never_fits_is_said_before_anything_starts(tree, load, overrides, complaint):
    nodes = [{"CPU": 2.0}, {"CPU": 1.0}]
    check_room(load(tree), nodes)
    with pytest.raises(PipelineError, match=complaint):
        check_room(load(tree, *overrides), nodes)


def test_a_cluster_that_grows_may_have_no_room_yet(tree, load):
    check_room(load(tree, "cluster_grows=true", "tune.max_concurrent=2"), [{"memory": 1e9}])
    with pytest.raises(PipelineError, match="cluster_grows=true"):
        check_room(load(tree), [{"memory": 1e9}])
    with pytest.raises(PipelineError, match=r"tune\.max_concurrent is missing"):
        load(tree, "cluster_grows=true")


def test_as_many_trials_run_as_their_drivers_fit_beside_the_sweeps():
    assert drivers_at_once({"CPU": 0.0, "memory": 7.9 * 2**30}) == 5
    assert drivers_at_once({"memory": 2.0**29}) == 1


def test_fewer_trials_at_once_than_asked_for_are_told(tree, load):
    config = load(tree, "tune.max_concurrent=4")
    cluster = [{"CPU": 8.0}]
    assert driver_memory_lack(config, cluster, {"memory": 6.0 * 2**30}) == ""
    told = driver_memory_lack(config, cluster, {"memory": 5.9 * 2**30})
    assert told.startswith("runs 3 trials at once, not 4: their drivers run on this node, which has 5.9 GiB")
