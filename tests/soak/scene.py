"""A curriculum that runs, and the machines and servers it runs on."""

import os
import random
import subprocess
import sys
import time

import psutil
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load

from tests.conftest import ROOT
from tests.mlflow_server import MlflowServer
from tests.pipelines.conftest import Workplace
from tests.pipelines.machines import Machines, actors
from tests.seaweedfs import S3Server

MACHINES = 3  # the two workers need two


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Scene:
    """A curriculum that runs, and all that it depends on.

    Args:
        workplace: its config.
        s3, mlflow: its servers.
        chance: decides what happens.
    """

    def __init__(self, workplace: Workplace, s3: S3Server, mlflow: MlflowServer, chance: random.Random) -> None:
        self.workplace, self.s3, self.mlflow, self.chance = workplace, s3, mlflow, chance
        self.log = (workplace.folder / "drivers.log").open("a")
        self.drivers = 0
        self.build()

    def build(self) -> None:
        """Start a Ray."""
        self.machines = Machines()
        self.hosts = [self.machines.add() for _ in range(MACHINES)]

    def start(self) -> None:
        """Give the command (again)."""
        self.drivers += 1
        self.driver = self.command(self.log)

    def command(self, output: object) -> subprocess.Popen[str]:
        settings = {"MLFLOW_TRACKING_URI": self.mlflow.url, "RAY_ADDRESS": self.machines.address}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "pipelines/curriculum.py"), "--config", str(self.workplace.write())],
            cwd=self.workplace.folder,
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            text=True,
        )

    def actors(self, kind: str) -> list[psutil.Process]:
        return actors(os.getpid(), kind)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Stage → its final weights, as they lie on storage."""
        client = self.s3.client()
        keys = [found["Key"] for found in client.list_objects_v2(Bucket="data", Prefix=self.prefix)["Contents"]]
        return {
            key.split("/")[1]: load(client.get_object(Bucket="data", Key=key)["Body"].read())
            for key in keys
            if key.endswith("final.safetensors")
        }

    def newest_checkpoint(self) -> str | None:
        objects = self.s3.client().list_objects_v2(Bucket="data", Prefix=self.prefix).get("Contents", [])
        found = [(each["LastModified"], each["Key"]) for each in objects if each["Key"].endswith(".pt")]
        return max(found)[1] if found else None

    @property
    def prefix(self) -> str:
        return self.workplace.config["storage"].removeprefix("s3://data/") + "/"

    def tracked(self) -> dict[str, object]:
        """What MLflow holds: the runs, every value of what does not depend on time, the registered versions."""
        client = MlflowClient(self.mlflow.url)
        runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
        found: dict[str, object] = {"runs": sorted((run.info.run_name, run.info.status) for run in runs)}
        for run in runs:
            for metric in run.data.metrics:
                if not metric.startswith(("time/", "system/")):
                    history = client.get_metric_history(run.info.run_id, metric)
                    found[f"{run.info.run_name}: {metric}"] = [(entry.step, entry.value) for entry in history]
        found["versions"] = sorted(version.version for version in client.search_model_versions("name = 'gmflow'"))
        return found
