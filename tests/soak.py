"""A curriculum under random faults, run by hand: `python -m tests.soak --seed 1`.

The same small curriculum is trained twice, on a Ray of several machines with real S3 and MLflow servers: once
undisturbed, and once while something dies, stands still or is damaged every few seconds. Whenever its driver ends, the
same command is given again. In the end weights, metrics and registered versions must be the same; the exit code is 1 if
they are not. The seed decides which faults come when; what they meet differs from run to run.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load

from datasets_etl.synthetic import write_dataset
from tests.conftest import ROOT
from tests.mlflow_server import MlflowServer, mlflow_running
from tests.pipelines.conftest import Workplace, workplace_in
from tests.pipelines.machines import Machines, actors
from tests.seaweedfs import S3Server, running

Fault = Callable[["Scene"], None]

MACHINES = 3  # the two workers need two
DRIVERS = 100  # a curriculum that has not ended by then never will
TWO_AT_ONCE = 0.3
FAULTS: dict[str, Fault] = {}


def fault(happens: Fault) -> Fault:
    FAULTS[happens.__name__] = happens
    return happens


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
        told: dict[str, object] = {"runs": sorted((run.info.run_name, run.info.status) for run in runs)}
        for run in runs:
            for metric in run.data.metrics:
                if not metric.startswith(("time/", "system/")):
                    history = client.get_metric_history(run.info.run_id, metric)
                    told[f"{run.info.run_name}: {metric}"] = [(entry.step, entry.value) for entry in history]
        told["versions"] = sorted(found.version for found in client.search_model_versions("name = 'gmflow'"))
        return told


# ------------------------------------------------------------------------------------------------ what may happen


@fault
def a_worker_dies(scene: Scene) -> None:
    if workers := scene.actors("RayTrainWorker"):
        scene.chance.choice(workers).kill()


@fault
def all_workers_die(scene: Scene) -> None:
    for worker in scene.actors("RayTrainWorker"):
        worker.kill()


@fault
def a_loader_process_dies(scene: Scene) -> None:
    if loaders := [child for worker in scene.actors("RayTrainWorker") for child in worker.children()]:
        scene.chance.choice(loaders).kill()


@fault
def the_controller_dies(scene: Scene) -> None:
    for controller in scene.actors("TrainController"):
        controller.kill()


@fault
def the_queue_dies(scene: Scene) -> None:
    for queue in scene.actors("_Queue"):
        queue.kill()


@fault
def the_driver_dies(scene: Scene) -> None:
    scene.driver.kill()


@fault
def the_driver_is_told_to_end(scene: Scene) -> None:
    scene.driver.send_signal(scene.chance.choice([signal.SIGINT, signal.SIGTERM]))


@fault
def the_driver_stands_still(scene: Scene) -> None:
    scene.driver.send_signal(signal.SIGSTOP)
    time.sleep(scene.chance.choice([2, 6, 15]))
    scene.driver.send_signal(signal.SIGCONT)


@fault
def a_worker_stands_still(scene: Scene) -> None:
    if workers := scene.actors("RayTrainWorker"):
        worker = scene.chance.choice(workers)
        worker.suspend()
        time.sleep(scene.chance.choice([3, 8]))
        worker.resume()


@fault
def the_command_is_given_twice(scene: Scene) -> None:
    def second() -> None:
        process = scene.command(subprocess.PIPE)
        output, _ = process.communicate()
        say(f"  the second driver: exit code {process.returncode}, {output.strip().splitlines()[-1:]}")

    threading.Thread(target=second, daemon=True).start()


@fault
def storage_is_away(scene: Scene) -> None:
    scene.s3.kill()
    time.sleep(scene.chance.choice([1, 4, 10, 20]))
    scene.s3.start()


@fault
def mlflow_is_away(scene: Scene) -> None:
    scene.mlflow.kill()
    time.sleep(scene.chance.choice([1, 4, 10, 20]))
    scene.mlflow.start()


@fault
def both_are_away(scene: Scene) -> None:
    scene.s3.kill()
    mlflow_is_away(scene)
    scene.s3.start()


@fault
def the_newest_checkpoint_is_damaged(scene: Scene) -> None:
    """By one bit, and somebody has to read it."""
    if (key := scene.newest_checkpoint()) is not None:
        client = scene.s3.client()
        content = bytearray(client.get_object(Bucket="data", Key=key)["Body"].read())
        content[len(content) // 2] ^= 1
        client.put_object(Bucket="data", Key=key, Body=bytes(content))
        a_worker_dies(scene)


@fault
def a_machine_is_lost(scene: Scene) -> None:
    if busy := scene.machines.at_work(scene.hosts):
        _replace(scene, scene.chance.choice(busy))


@fault
def a_machine_is_taken_after_a_notice(scene: Scene) -> None:
    if busy := scene.machines.at_work(scene.hosts):
        machine = scene.chance.choice(busy)
        scene.machines.give_notice(machine)
        time.sleep(scene.chance.choice([2, 12]))
        _replace(scene, machine)


def _replace(scene: Scene, machine: object) -> None:
    scene.hosts.remove(machine)
    scene.machines.lose(machine)
    scene.hosts.append(scene.machines.add())


@fault
def all_of_ray_dies(scene: Scene) -> None:
    scene.machines.die()
    scene.driver.wait()
    scene.build()


# ------------------------------------------------------------------------------------------------ the run


def undisturbed(scene: Scene) -> None:
    scene.start()
    assert scene.driver.wait() == 0, f"the undisturbed run failed: see {scene.log.name}"


def disturbed(scene: Scene, names: list[str], every_s: float) -> Counter[str]:
    """Until the curriculum has ended: all kinds of faults in turn, each time in another order."""
    happened: Counter[str] = Counter()
    ahead: list[str] = []
    scene.start()
    while (code := _ends_within(scene.driver, scene.chance.uniform(0.3, 1.7) * every_s)) != 0:
        if code is not None:
            assert scene.drivers < DRIVERS, "the curriculum does not come to its end"
            say(f"the driver ended with {code}; the same command again")
            scene.start()
            continue
        for _ in range(1 + (scene.chance.random() < TWO_AT_ONCE)):
            ahead = ahead or scene.chance.sample(names, len(names))
            name = ahead.pop()
            say(name.replace("_", " "))
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself in the meantime
                FAULTS[name](scene)
            happened[name] += 1
    return happened


def _ends_within(process: subprocess.Popen[str], seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def differences(calm: Scene, wild: Scene) -> list[str]:
    found = []
    expected, weights = calm.weights(), wild.weights()
    if expected.keys() != weights.keys():
        found.append(f"stages {sorted(expected)} and {sorted(weights)}")
    for stage in expected.keys() & weights.keys():
        others = [name for name, value in expected[stage].items() if not torch.equal(value, weights[stage][name])]
        if others:
            found.append(f"weights of {stage}: {len(others)} of {len(expected[stage])} differ, such as {others[0]}")
    tracked, told = calm.tracked(), wild.tracked()
    return found + [
        f"MLflow's {name}: {tracked.get(name)} and {told.get(name)}"
        for name in sorted(tracked.keys() | told.keys())
        if tracked.get(name) != told.get(name)
    ]


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small curriculum under random faults, and compare.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500, help="of each of the two stages")
    parser.add_argument("--every", type=float, default=14.0, metavar="SECONDS", help="from one fault to the next")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    os.environ |= {"RAY_health_check_period_ms": "500", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    folder = Path(tempfile.mkdtemp(prefix="gmflow-soak-"))
    say(f"what the drivers say is in {folder}/*/drivers.log")
    with contextlib.ExitStack() as stack:
        servers = [folder / name for name in ("s3", "mlflow-calm", "mlflow-wild")]
        for server in servers:
            server.mkdir()
        s3 = stack.enter_context(running(servers[0]))
        os.environ |= s3.settings  # of every process below, Ray's included
        trackers = [stack.enter_context(mlflow_running(server, s3)) for server in servers[1:]]
        manifests = shards(folder / "raw")
        scenes = []
        for name, tracker in zip(("calm", "wild"), trackers, strict=True):
            workplace = small_curriculum(folder / name, manifests, arguments.steps)
            scene = Scene(workplace, s3, tracker, random.Random(arguments.seed))
            scenes.append(scene)
            began = time.monotonic()
            if name == "calm":
                undisturbed(scene)
                say(f"undisturbed: {time.monotonic() - began:.0f} s")
            else:
                happened = disturbed(scene, arguments.faults, arguments.every)
                say(f"disturbed: {time.monotonic() - began:.0f} s, {happened.total()} faults, {scene.drivers} drivers")
            scene.machines.cluster.shutdown()
        found = differences(*scenes)
    for line in found:
        say(f"differs: {line[:2000]}")
    say(f"{len(found)} differences" if found else "the same weights, metrics and versions")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
