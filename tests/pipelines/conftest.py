"""A curriculum small enough to run in a test: synthetic shards, a tiny model, an embedded MLflow."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from datasets_etl import formats
from datasets_etl.etl import run_etl
from datasets_etl.synthetic import synthetic_pair, write_dataset
from gmflow import GMFlow, save_weights
from tests.conftest import ROOT
from tests.pipelines.commands import TINY

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def manifests(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[str, str]:
    """Data name → manifest URL."""
    root = tmp_path_factory.mktemp("data")
    found = {}
    for seed, (name, pairs, held_out) in enumerate([("chairs", 12, 3), ("sintel", 6, 0), ("kitti", 4, 0)]):
        write_dataset(name, root / name, pairs=pairs, held_out=held_out, height=48, width=64, seed=seed)
        found[name] = run_etl(name, str(root / name), str(root / "shards")).manifest_url
    return found


@dataclass(frozen=True)
class Workplace:
    """A folder with a config; `config` may be changed before it is written."""

    folder: Path
    config: dict[str, Any]

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def write(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def start(self, script: str, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        """A pipeline as a user starts it, with `settings` in its environment."""
        return subprocess.Popen(
            [sys.executable, str(ROOT / "pipelines" / script), *arguments],
            cwd=self.folder,
            env={**os.environ, "MLFLOW_TRACKING_URI": self.tracking_uri, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def workplace(tmp_path: Path, manifests: dict[str, str]) -> Workplace:
    return workplace_in(tmp_path, manifests)


def workplace_in(folder: Path, manifests: dict[str, str]) -> Workplace:
    """Two stages of a tiny model on two workers."""
    stage = {"steps": 40, "global_batch": 4, "peak_lr": 1e-3, "crop": [32, 48], "checkpoint_every": 5, "log_every": 2}
    augmented = {"min_log2_scale": -0.1, "max_log2_scale": 0.3, "hflip": 0.5}
    validation = [{"data": "chairs", "subset": "val"}]
    config = {
        "name": "tiny",
        "storage": str(folder / "storage"),
        "seed": 7,
        "data": dict(manifests),
        "model": {"backbone_channels": [8, 8, 8], "feature_channels": 16, "num_layers": 1},
        "machine": {"num_workers": 2, "micro_batch": 1},
        "promotion": {"data": "chairs", "subset": "val"},
        "stages": [
            {
                "name": "chairs",
                "mixture": [{"data": "chairs", "subset": "train", **augmented}],
                "validation": validation,
                **stage,
            },
            {
                "name": "mix",
                "mixture": [
                    {"data": "sintel", "subset": "training-clean", "repeats": 2, **augmented},
                    {"data": "kitti", "subset": "training", "repeats": 3},
                ],
                "validation": validation,
                **stage,
            },
        ],
    }
    return Workplace(folder, config)


@pytest.fixture
def tracked_in(tmp_path: Path) -> Path:
    """Where the embedded MLflow of `call` lies."""
    return tmp_path


@pytest.fixture
def call(tracked_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command's main() with arguments; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracked_in}/mlflow.db")
    monkeypatch.setenv("COLUMNS", "200")

    def _call(module: ModuleType, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        try:
            module.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _call


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model's."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(GMFlow(TINY), path)
    return path


@pytest.fixture
def frames(tmp_path: Path) -> list[str]:
    """Three frames of a size no network likes."""
    pair = synthetic_pair(3, 45, 70)
    paths = []
    for number, image in enumerate([pair.image0, pair.image1, pair.image0]):
        path = tmp_path / f"frame_{number:04d}.png"
        path.write_bytes(formats.encode_frame_png(image))
        paths.append(str(path))
    return paths
