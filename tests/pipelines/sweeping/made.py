"""What the tests of the sweep are made of."""

from types import SimpleNamespace
from typing import Any

from gmflow import GMFlowConfig
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.cost import Cost
from pipelines.sweeping.table import Row
from pipelines.sweeping.trials import (
    TrialPlan,
)

REFINE = GMFlowConfig.refine()
METRIC = "val/chairs/val/epe"
TINY = {"backbone_channels": [8, 8, 8], "feature_channels": 16, "num_layers": 1}
MANIFESTS: Any = {"chairs": SimpleNamespace(url="c.json", version="v1")}


def plan_of(config: SweepConfig) -> TrialPlan:
    return TrialPlan(config, None, {"chairs": "c.json"}, {"chairs": "v1"}, f"{config.storage}/trials", "feed")


def row(name: str, epe: float, latency: float, memory: float, **more: Any) -> Row:
    costs = Cost(latency, 0.75 * latency, 1.5 * latency, memory)
    return Row(name, "probe", f"key of {name}", REFINE, "finished", metrics={METRIC: epe}, cost=costs, **more)
