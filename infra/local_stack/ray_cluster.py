"""A Ray cluster of several nodes on loopback, for as long as this process lives.

`ray start` for a second node insists on an address other machines can reach, and so listens on every interface; Ray's
own `Cluster` does not. Each node has a temporary directory of its own, as if it were a machine of its own.
"""

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import Any

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: stay on loopback

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

from infra.local_stack.settings import HOST

_OBJECT_STORE_BYTES = 256 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dashboard-port", type=int, required=True)
    parser.add_argument("--agent-port", type=int, required=True, help="of the head's agent, which starts jobs' drivers")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--cpus-per-worker", type=int, required=True)
    parser.add_argument("--temp", type=Path, required=True, help="folder for the nodes' temporary directories")
    arguments = parser.parse_args()

    ended = threading.Event()
    for sent in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sent, lambda *_: ended.set())
    common: dict[str, Any] = {"node_ip_address": HOST, "object_store_memory": _OBJECT_STORE_BYTES}
    head = {
        "num_cpus": 0,  # drivers and the dashboard only: training belongs to the workers
        "gcs_server_port": arguments.port,
        "include_dashboard": True,
        "dashboard_host": HOST,
        "dashboard_port": arguments.dashboard_port,
        # Another Ray on this machine may have the agent's usual port; the head would run without it and refuse jobs.
        "dashboard_agent_listen_port": arguments.agent_port,
        "temp_dir": str(arguments.temp / "head"),
    }
    cluster = Cluster(initialize_head=True, head_node_args=common | head)
    # The job server looks here for its own cluster; otherwise it would take any other that runs on this machine.
    write_ray_address(cluster.gcs_address, head["temp_dir"])
    try:
        for number in range(arguments.workers):
            temp_dir = str(arguments.temp / f"worker{number}")
            cluster.add_node(**common, num_cpus=arguments.cpus_per_worker, temp_dir=temp_dir)
        ended.wait()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
