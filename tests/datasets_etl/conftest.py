"""Small synthetic datasets, raw and sharded."""

from pathlib import Path

import pytest

from datasets_etl.etl import EtlResult, run_etl
from datasets_etl.synthetic import write_dataset


@pytest.fixture(scope="session")
def raw_chairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw") / "chairs"
    write_dataset("chairs", root, pairs=6, held_out=2, height=48, width=64, seed=11)
    return root


@pytest.fixture(scope="session")
def raw_kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw") / "kitti"
    write_dataset("kitti", root, pairs=3, held_out=1, height=48, width=64, seed=12)
    return root


@pytest.fixture(scope="session")
def sharded_chairs(raw_chairs: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> EtlResult:
    """Eight pairs in three shards."""
    return run_etl("chairs", str(raw_chairs), str(tmp_path_factory.mktemp("shards")), shard_bytes=100_000)


@pytest.fixture(scope="session")
def sharded_kitti(raw_kitti: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> EtlResult:
    return run_etl("kitti", str(raw_kitti), str(tmp_path_factory.mktemp("shards")))
