"""A small sweep: its config, and what holds it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from datasets_etl.storage import open_store
from pipelines.config_file import load_config
from pipelines.sweep import Sweep
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.view import SweepView
from tests.pipelines.sweeping.made import MANIFESTS, TINY


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    stage = {"name": "chairs", "steps": 30, "global_batch": 4, "peak_lr": 1e-4, "crop": [64, 96], "validate_every": 10}
    stage |= {"mixture": [{"data": "chairs", "subset": "train"}], "validation": [{"data": "chairs", "subset": "val"}]}
    return {
        "name": "small",
        "storage": str(tmp_path),
        "data": {"chairs": "c.json"},
        "weights": "w.pth",
        "objective": {"data": "chairs", "subset": "val"},
        "probe": {
            "grid": {"attn_splits": [[1, 2], [4, 8]], "corr_radius": [2, 3]},
            "validation": [{"data": "chairs", "subset": "val"}],
        },
        "tune": {"stage": stage, "space": {"attn_splits": [[1, 2], [4, 8]], "corr_radius": [2, 3]}},
    }


@pytest.fixture
def load(tmp_path: Path):
    def _load(tree: dict[str, Any], *overrides: str) -> SweepConfig:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(SweepConfig, str(path), overrides)

    return _load


@pytest.fixture
def tracked(tree, load, tmp_path):
    """Makes a sweep of a tiny model, tracked in a database of its own."""
    tree |= {"model": {"variant": "refine", **TINY}, "registration": {"best": 1}}
    tree |= {"mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}}

    def _tracked(*overrides: str) -> Sweep:
        config = load(tree, *overrides)
        store = open_store(f"{config.storage}/{config.name}")
        return Sweep(config, MANIFESTS, store, SweepView(config.metric))

    return _tracked
