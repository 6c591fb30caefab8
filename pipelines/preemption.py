"""Pass a cloud's notice that it will take this machine away on to Ray, so that training leaves in time.

    python pipelines/preemption.py watch                # beside Ray on EC2: waits for the notice, passes it on, ends
    python pipelines/preemption.py check                # before Ray is started there: fails when the notice is given
    python pipelines/preemption.py drain --seconds 45   # passes it on now: what a Kubernetes preStop hook does

infra/ray-cluster.yaml uses `watch` and `check`; infra/kuberay/raycluster.yaml uses `drain`. Run each on the node itself
and in the environment of its Ray.
"""

import argparse
import http.client
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pipelines.arguments import Parser, positive
from pipelines.entry import OutageError, PipelineError, command_for

logger = logging.getLogger(__name__)

_POLL_S = 5  # as AWS advises; the notice comes two minutes ahead
_STARTING_S = 30  # a machine that has just come up may not have its network yet
_METADATA_ANSWERS_S = 3
_RAY_ANSWERS_S = 20  # usually 3 s; Ray would spend a minute looking for a raylet that is gone

# botocore's own variable and default.
_ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_ENDPOINT = "http://169.254.169.254"

# The metadata service is on the machine itself: a proxy from the environment would ask that of another machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Tell Ray that this machine will be taken away.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("watch", help="wait for EC2's notice, tell Ray, end")
    commands.add_parser("check", help="fail if EC2's notice is given already")
    now = commands.add_parser("drain", help="tell Ray now")
    now.add_argument("--seconds", type=positive, required=True, help="until the machine is gone")
    return parser.parse_args(argv)


@command_for(PipelineError)
def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "watch":
        watch()
    elif arguments.command == "check":
        check()
    else:
        drain(arguments.seconds, "this node is being shut down")


def watch() -> None:
    """Wait until the notice is given and Ray has accepted it.

    If the metadata service or Ray does not answer, it is asked again. Raises PipelineError if no metadata service
    answers in the first `_STARTING_S` seconds.
    """
    started, reached, warned = time.monotonic(), False, ""
    while True:
        try:
            taken_at = notice()
            reached = True
            if taken_at is not None:
                seconds = max(0, int((taken_at - datetime.now(UTC)).total_seconds()))
                drain(seconds, f"EC2 takes this spot instance at {taken_at:%H:%M:%S} UTC")
                print(f"told Ray that this machine is taken in {seconds} s", flush=True)
                return
            warned = ""
        except PipelineError as error:
            if not reached and time.monotonic() - started > _STARTING_S:
                raise PipelineError(f"{error}; is this an EC2 machine?") from error
            if str(error) != warned:  # log an error once, not every few seconds while it lasts
                warned = str(error)
                logger.warning("%s", error)
        time.sleep(_POLL_S)


def check() -> None:
    """Raises PipelineError if the notice is given already: Ray's autoscaler then replaces the machine by another."""
    try:
        taken_at = notice()
    except PipelineError as error:
        logger.warning("%s", error)  # no reason to give up the machine
        return
    if taken_at is not None:
        raise PipelineError(f"EC2 takes this spot instance at {taken_at:%H:%M:%S} UTC: no Ray is started on it")


def notice() -> datetime | None:
    """When EC2 will take this machine; None while no notice is given. Raises PipelineError without an answer.

    EC2's rebalance recommendation is ignored: it is a guess, and most machines that get it stay for hours.
    """
    # Every question gets a new token, so that none must be renewed or goes stale while a machine hibernates.
    token = _answer("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    if token is None:
        raise PipelineError(f"{_endpoint()}: this metadata service gives no tokens")
    said = _answer("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if said is None:
        return None
    try:
        return datetime.strptime(json.loads(said)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{_endpoint()}: a spot/instance-action without a time: {said[:200]!r}") from error


def drain(seconds: int, why: str) -> None:
    """Tell Ray that this node ends in `seconds`. Ray then starts nothing more here, and Ray Train tells its workers.

    Ray's command itself finds the node that it runs on and, like every Ray command, the cluster's token. Raises
    OutageError if Ray does not accept the notice.
    """
    environment = {"RAY_ADDRESS": "auto", **os.environ}  # without it, the command may start and drain its own Ray
    line = [str(Path(sys.executable).with_name("ray")), "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    line += ["--reason-message", why, "--deadline-remaining-seconds", str(seconds)]
    try:
        subprocess.run(line, env=environment, check=True, capture_output=True, text=True, timeout=_RAY_ANSWERS_S)
    except subprocess.TimeoutExpired as error:
        raise OutageError(f"the notice did not reach Ray: no answer within {_RAY_ANSWERS_S} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
        raise OutageError(f"the notice did not reach Ray: {last}") from error


def _endpoint() -> str:
    return (os.environ.get(_ENDPOINT_VARIABLE) or _ENDPOINT).rstrip("/")


def _answer(method: str, path: str, headers: Mapping[str, str]) -> str | None:
    """The metadata service's answer; None if it does not know the path. Raises PipelineError without an answer."""
    url = _endpoint() + path
    try:
        request = urllib.request.Request(url, headers=dict(headers), method=method)
        with _opener.open(request, timeout=_METADATA_ANSWERS_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.NOT_FOUND:
            return None
        raise PipelineError(f"{url}: {error}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: malformed URL or text
        raise PipelineError(f"{url}: no answer ({error})") from error


if __name__ == "__main__":
    main()
