"""A sweep whose processes or machines are lost."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from ray.cluster_utils import Cluster

from datasets_etl.storage import open_store
from gmflow import GMFlowConfig
from pipelines.errors import PipelineError
from pipelines.sweeping import cost
from pipelines.sweeping.config import CostConfig
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def kill_meter() -> None:
    """SIGKILL for the process that measures, of this process's own Ray."""
    below = psutil.Process().children(recursive=True)
    (meter,) = [process for process in below if process.name().startswith("ray::_Meter")]
    meter.kill()


def test_costs_are_measured_to_the_end_though_the_process_that_measures_is_lost(local_ray, tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    tiny = GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    models = {tiny: "one", GMFlowConfig.from_dict(tiny.to_dict() | {"attn_splits": [1]}): "other"}
    told: list[str] = []

    def kill_after(timings: int, line: str) -> None:
        told.append(line)
        if len(told) == timings:
            kill_meter()

    def measure(timings: int) -> dict[GMFlowConfig, cost.Cost]:
        told.clear()
        asked = CostConfig(height=32, width=48, rounds=2)
        return cost.measure_costs(store, models, asked, "fp32", lambda line: kill_after(timings, line))

    with monkeypatch.context() as patch:
        patch.setattr(cost, "_METERS", 1)
        with pytest.raises(PipelineError, match=r"was lost 1 time, the last: .*; what it timed is kept"):
            measure(1)
    assert measure(2).keys() == models.keys()
    assert ["lost" in line for line in told] == [False, False, True, False]
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("cost/*.json")]
    assert [len(content["seconds"]) for content in kept] == [2, 2]


DRIVERS_NODES = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from pipelines.sweeping.tuning import driver_resources

@ray.remote(num_cpus=0)
def where():
    return ray.get_runtime_context().get_node_id()

@ray.remote(num_cpus=0)
def trials_of_a_sweep():
    groups = [driver_resources().to_placement_group() for _ in range(3)]
    places = [where.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote() for group in groups]
    return ray.get(places)

ray.init()
for node in ray.nodes():
    on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    assert ray.get(trials_of_a_sweep.options(scheduling_strategy=on).remote()) == [node["NodeID"]] * 3
print(len(ray.nodes()), "nodes")
"""


def test_trials_drivers_run_where_the_sweeps_own_does(local_ray):
    """Wherever that is, with CPUs or without: the loss of any other machine ends none of them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        told = subprocess.run(
            [sys.executable, "-c", DRIVERS_NODES],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert "3 nodes" in told.stdout, told.stderr
    finally:
        cluster.shutdown()
