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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.mlflow_server import mlflow_running
from tests.seaweedfs import running
from tests.soak.comparison import differences
from tests.soak.curriculum import shards, small_curriculum
from tests.soak.faults import FAULTS
from tests.soak.scene import Scene, say

DRIVERS = 100  # a curriculum that has not ended by then never will
TWO_AT_ONCE = 0.3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="Train a small curriculum under random faults, and compare."
    )
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


if __name__ == "__main__":
    main()
