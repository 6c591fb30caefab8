"""What may happen to a curriculum on its way."""

import signal
import subprocess
import threading
import time
from collections.abc import Callable

from tests.soak.scene import Scene, say

Fault = Callable[[Scene], None]

FAULTS: dict[str, Fault] = {}
"""Name → fault, in the order in which they stand here."""


def fault(happens: Fault) -> Fault:
    FAULTS[happens.__name__] = happens
    return happens


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
