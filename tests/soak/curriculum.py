"""The small curriculum that is trained, and the shards it is trained on."""

import subprocess
import sys
from pathlib import Path

from datasets_etl.synthetic import write_dataset
from tests.conftest import ROOT
from tests.pipelines.conftest import Workplace, workplace_in


def shards(folder: Path) -> dict[str, str]:
    """Data name → manifest URL."""
    manifests = {}
    for seed, (name, pairs, held_out) in enumerate([("chairs", 12, 3), ("sintel", 6, 0), ("kitti", 4, 0)]):
        write_dataset(name, folder / name, pairs=pairs, held_out=held_out, height=128, width=160, seed=seed)
        command = [sys.executable, str(ROOT / "pipelines/etl.py"), "--dataset", name, "--source", str(folder / name)]
        command += ["--target", "s3://data/sets"]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        manifests[name] = said.stdout.splitlines()[-1]
    return manifests


def small_curriculum(folder: Path, manifests: dict[str, str], steps: int) -> Workplace:
    folder.mkdir()
    workplace = workplace_in(folder, manifests)
    workplace.config["storage"] = f"s3://data/{folder.name}"
    workplace.config["machine"] |= {"loader_workers": 1, "storage_patience_s": 30, "hang_timeout_s": 70}
    every = {"checkpoint_every": 10, "log_every": 2, "validate_every": 50}
    for stage in workplace.config["stages"]:
        stage |= {"steps": steps, "crop": [96, 128], "peak_lr": 2e-4, **every}
        stage["keep_best"] = {"data": "chairs", "subset": "val"}
    workplace.config["stages"][1]["ema_decay"] = 0.99
    return workplace
