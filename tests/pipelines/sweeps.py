"""A sweep as a user runs it, and what it leaves: its table, and its runs in MLflow."""

import csv
import io
import subprocess
from collections.abc import Callable
from typing import Any

from mlflow.tracking import MlflowClient

from tests.pipelines.conftest import Workplace
from tests.waiting import output_of, wait_until

METRIC = "val/chairs/val/epe"
"""The objective."""


def start(workplace: Workplace, *arguments: str) -> subprocess.Popen[str]:
    return workplace.start("sweep.py", "--config", str(workplace.write()), *arguments)


def run(workplace: Workplace, *arguments: str) -> str:
    process = start(workplace, *arguments)
    output, errors = output_of(process)
    assert process.returncode == 0, errors
    return output


def wait_for(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    def check() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(reached())

    wait_until(check)


def table_of(workplace: Workplace) -> dict[str, dict[str, str]]:
    """The report's CSV by (phase and) name."""
    text = (workplace.folder / "storage" / workplace.config["name"] / "report" / "sweep.csv").read_text()
    return {f"{line['phase']} {line['name']}": line for line in csv.DictReader(io.StringIO(text))}


def runs_of(workplace: Workplace) -> tuple[Any, dict[str, Any]]:
    """MLflow's parent run and its children by "phase name"."""
    client = MlflowClient(workplace.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    (parent,) = [found for found in runs if "mlflow.parentRunId" not in found.data.tags]
    children = [found for found in runs if found is not parent]
    assert all(child.data.tags["mlflow.parentRunId"] == parent.info.run_id for child in children)
    named = {f"{child.data.params['phase']} {child.info.run_name}": child for child in children}
    assert len(named) == len(children), "a setting or trial has two runs"
    return parent, named
