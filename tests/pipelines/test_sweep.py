"""The sweep as a user runs it: probed on real pairs, tuned with ASHA, killed and continued, on a cluster too small."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster

from datasets_etl.etl import run_etl
from datasets_etl.formats import decode_flo, decode_frame, encode_flo, encode_frame_ppm
from datasets_etl.storage import open_store
from gmflow import GMFlow, GMFlowConfig, save_weights
from gmflow.metrics import FlowMetrics
from pipelines.errors import PipelineError
from pipelines.references import resolve_model
from pipelines.sweeping import cost
from pipelines.sweeping.config import CostConfig
from pipelines.training import mlflow_client, registry, tracking
from tests.conftest import ROOT
from tests.pipelines.conftest import Workplace
from tests.waiting import kill_tree, output_of, wait_until

pytestmark = pytest.mark.slow

METRIC = "val/chairs/val/epe"
CROP = (slice(64, 256), slice(128, 384))  # of the reference values


def start(workplace: Workplace, *arguments: str) -> subprocess.Popen[str]:
    return workplace.start("sweep.py", "--config", str(workplace.write()), *arguments)


def run(workplace: Workplace, *arguments: str) -> str:
    process = start(workplace, *arguments)
    output, errors = output_of(process)
    assert process.returncode == 0, errors
    return output


def wait_for(process: subprocess.Popen[str], reached: Callable[[], object]) -> None:
    def reached_on_the_way() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(reached())

    wait_until(reached_on_the_way)


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


# ------------------------------------------------------------------------------ the probe, on a real pair


@pytest.fixture(scope="module")
def probed(
    tmp_path_factory: pytest.TempPathFactory, samples: Path, reference: Path, local_ray: None
) -> tuple[Workplace, str]:
    """Six settings of the published weights on the crop that reference values exist for, killed on the way."""
    folder = tmp_path_factory.mktemp("probe")
    source, raw = samples / "FlyingChairs_release" / "data", folder / "chairs"
    raw.mkdir()
    for frame in ("img1", "img2"):
        image = decode_frame((source / f"00001_{frame}.ppm").read_bytes(), "a frame")[CROP]
        (raw / f"00001_{frame}.ppm").write_bytes(encode_frame_ppm(np.ascontiguousarray(image)))
    flow = decode_flo((source / "00001_flow.flo").read_bytes(), "a flow")[CROP]
    (raw / "00001_flow.flo").write_bytes(encode_flo(np.ascontiguousarray(flow)))
    (raw / "FlyingChairs_train_val.txt").write_text("2\n")
    config = {
        "name": "probe",
        "storage": str(folder / "storage"),
        "data": {"chairs": run_etl("chairs", str(raw), str(folder / "shards")).manifest_url},
        "weights": str(reference / "gmflow_refine_published.pth"),
        "objective": {"data": "chairs", "subset": "val"},
        "probe": {
            "grid": {"attn_splits": [[1, 2, 4], [8]], "corr_radius": [4, 6]},
            "validation": [{"data": "chairs", "subset": "val"}],
        },
        "cost": {"height": 64, "width": 96, "rounds": 2},
    }
    workplace = Workplace(folder, config)
    process = start(workplace)
    wait_for(process, lambda: any((folder / "storage").glob("probe/accuracy/*.json")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in (folder / "storage").glob("probe/accuracy/*.json")}
    assert before
    output = run(workplace)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a scored setting was scored again"
    return workplace, output


def test_a_probes_figures_are_those_of_the_reference_implementation(probed, samples: Path, reference: Path):
    lines = table_of(probed[0])
    assert len(lines) == 6
    truth = torch.from_numpy(
        decode_flo((samples / "FlyingChairs_release/data/00001_flow.flo").read_bytes(), "a flow")[CROP].copy()
    ).permute(2, 0, 1)[None]
    keys = {
        "1x8-r4-p1": "refine_crop_splits1-8_radius4",
        "2x8-r6-p1": "refine_crop_splits2-8_radius6",
        "4x8-r4-p1": "refine_crop_splits4-8_radius4",
        "2x8-r4-p1": "refine_train_pred3",
    }
    with np.load(reference / "outputs.npz") as outputs:
        for name, key in keys.items():
            metrics = FlowMetrics()
            metrics.update(torch.from_numpy(outputs[key]), truth, torch.ones_like(truth[:, 0], dtype=torch.bool))
            expected = metrics.compute()
            for figure in ("epe", "px1", "s0_10", "s10_40"):
                found = float(lines[f"probe {name}"][f"val/chairs/val/{figure}"])
                assert found == pytest.approx(expected[figure], abs=1e-3 if figure != "px1" else 0.02), (name, figure)


def test_a_probe_measures_every_cost_and_marks_front_and_reference(probed):
    workplace, output = probed
    lines = table_of(workplace).values()
    assert all(float(line["latency_ms"]) > 0 and float(line["peak_mib"]) > 0 for line in lines)
    assert [line["name"] for line in lines if line["reference"] == "True"] == ["2x8-r4-p1"]
    best = min(lines, key=lambda line: float(line[METRIC]))
    assert best["front"] == "True"
    assert "reference" in output
    for kept in workplace.folder.glob("storage/probe/cost/*.json"):
        assert len(json.loads(kept.read_text())["seconds"]) == 2


def test_a_probe_is_in_mlflow_and_its_plots_are_where_the_output_says(probed):
    workplace, output = probed
    parent, children = runs_of(workplace)
    assert set(children) == set(table_of(workplace))
    assert children["probe 4x8-r6-p1"].data.params == {
        "phase": "probe", "attn_splits_1": "4", "attn_splits_2": "8", "corr_radius": "6", "prop_radius": "1"
    }  # fmt: skip
    assert all({METRIC, "latency_ms", "peak_mib"} <= set(child.data.metrics) for child in children.values())
    assert children["probe 2x8-r4-p1"].data.tags["sweep.reference"] == "true"
    files = {"sweep.csv", "sweep.json", "front.png", "front.html", "heat_map.png"}
    client = MlflowClient(workplace.tracking_uri)
    assert {Path(one.path).name for one in client.list_artifacts(parent.info.run_id, "report")} == files
    told = {Path(line.strip().removeprefix("file://")) for line in output.splitlines() if "/report/" in line}
    assert {path.name for path in told if path.exists()} == files


# --------------------------------------------------------------------- tuning, on a cluster of one trial's size


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, manifests: dict[str, str]) -> tuple[Workplace, str]:
    """A probe of two settings and four trials of two workers on two CPUs, killed in the last trial.

    They start from the champion, which the best of them then becomes.
    """
    folder = tmp_path_factory.mktemp("tune")
    small = {"backbone_channels": [8, 8, 8], "feature_channels": 16, "num_layers": 1}
    setting = {"attn_splits": [1, 2], "corr_radius": [-1, 2]}
    torch.manual_seed(0)
    weights = folder / "start.safetensors"
    save_weights(GMFlow(GMFlowConfig.from_dict(GMFlowConfig.refine().to_dict() | small | setting)), weights)
    client = mlflow_client.connect(f"sqlite:///{folder}/mlflow.db")
    given = tracking.start_run(client, "given", "start", {}).info.run_id
    registry.register(
        client, "gmflow", given, weights, registry.Lineage("start", "random", {}, "h", "sources:x", {}), None
    )
    config = {
        "name": "tune",
        "storage": str(folder / "storage"),
        "seed": 3,
        "data": {"chairs": manifests["chairs"]},
        "model": {"variant": "refine", **small, **setting},
        "weights": "models:/gmflow@champion",
        "objective": {"data": "chairs", "subset": "val"},
        "probe": {
            "grid": {"attn_splits": [[1], [1, 2]]},
            "validation": [{"data": "chairs", "subset": "val"}],
        },
        "cost": {"height": 32, "width": 48, "rounds": 1},
        "tune": {
            "stage": {
                "name": "chairs",
                "steps": 40,
                "global_batch": 2,
                "peak_lr": 3e-3,
                "crop": [96, 128],  # steps long enough to be interrupted
                "mixture": [{"data": "chairs", "subset": "train"}],
                "validation": [{"data": "chairs", "subset": "val"}],
                "validate_every": 10,
                "checkpoint_every": 10,
                "log_every": 5,
                "max_skipped_in_a_row": 2,
            },
            "machine": {"num_workers": 2, "max_failures": 0},
            "space": {"attn_splits": [[1], [1, 2]], "peak_lr": [3e-3, 1e-9, 1e30]},
            "trials": 4,
            "reduction_factor": 2,
        },
        "registration": {"best": 1},
    }
    workplace = Workplace(folder, config)
    trials = folder / "storage" / "tune" / "trials"
    process = start(workplace)
    wait_for(process, lambda: len(ended_trials(trials)) == 3 and interrupted_trial(trials))
    kill_tree(process)
    told, errors = process.communicate()
    assert "resumes" not in told
    assert "Traceback" not in told + errors, "a trial that fails is a line, not a trace"
    # As if it had been killed right after the checkpoint, unless it was.
    (interrupted_trial(trials) / "history.json").unlink(missing_ok=True)
    kept = {path: path.stat().st_mtime_ns for folder in ended_trials(trials) for path in folder.rglob("*.*")}
    output = run(workplace)
    assert output.count("resumes") == 1, "the interrupted trial did not go on from its checkpoint"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a trial that had ended was trained again"
    return workplace, output


def ended_trials(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/result.json")]


def interrupted_trial(folder: Path) -> Path | None:
    """The one that has a checkpoint and no end."""
    begun = {path.parents[1] for path in folder.glob("*/checkpoints/*.json")} - set(ended_trials(folder))
    return next(iter(begun), None)


def trials_of(workplace: Workplace) -> dict[tuple[int, float], dict[str, str]]:
    """Trials of the report by second scale's windows and learning rate."""
    lines = [line for line in table_of(workplace).values() if line["phase"] == "trial"]
    return {(int(line["attn_splits_2"]), float(line["peak_lr"])): line for line in lines}


def test_every_trial_ends_on_a_cluster_that_holds_one(tuned):
    ends = {point: line["status"] for point, line in trials_of(tuned[0]).items()}
    assert len(ends) == 4
    assert set(ends.values()) == {"finished", "stopped", "failed"}
    assert all(ends[point] == "failed" for point in ends if point[1] == 1e30)
    assert all(ends[point] != "failed" for point in ends if point[1] != 1e30)


def test_asha_stops_what_learns_nothing_and_its_metrics_stay(tuned):
    workplace = tuned[0]
    stopped = [line for line in trials_of(workplace).values() if line["status"] == "stopped"]
    assert stopped
    _, children = runs_of(workplace)
    for line in stopped:
        assert 10 <= int(line["step"]) < 40
        child = children[f"trial {line['name']}"]
        assert child.info.status == "FINISHED"
        assert child.data.tags["sweep.status"] == "stopped"
        assert child.data.metrics[METRIC] == pytest.approx(float(line[METRIC]))
        assert not list((workplace.folder / "storage/tune/trials").glob(f"*{line['name'][-6:]}*/final.safetensors"))


def test_a_failed_trial_says_why_in_the_table_and_in_mlflow(tuned):
    workplace, output = tuned
    _, children = runs_of(workplace)
    failed = [line for line in trials_of(workplace).values() if line["status"] == "failed"]
    assert failed
    for line in failed:
        assert "non-finite loss or gradient" in line["reason"]
        child = children[f"trial {line['name']}"]
        assert child.info.status == "FAILED"
        assert child.data.tags["sweep.reason"] == line["reason"]
    assert failed[0]["name"] in output


def test_a_killed_sweep_goes_on_and_tells_every_step_once(tuned):
    workplace, _ = tuned
    client = MlflowClient(workplace.tracking_uri)
    _, children = runs_of(workplace)
    for line in trials_of(workplace).values():
        steps = [one.step for one in client.get_metric_history(children[f"trial {line['name']}"].info.run_id, METRIC)]
        assert steps == sorted(set(steps))
        if line["status"] == "finished":
            assert steps == [10, 20, 30, 40]


def test_the_probes_best_is_tried_first(tuned):
    workplace, output = tuned
    probed = [line for line in table_of(workplace).values() if line["phase"] == "probe"]
    best = min(probed, key=lambda line: float(line[METRIC]))["name"]
    assert f"the probe's front seeds {best}" in output
    announced = [json.loads(path.read_text()) for path in workplace.folder.glob("storage/tune/trials/*/trial.json")]
    assert min(announced, key=lambda content: content["number"])["name"].startswith(best)


def test_the_best_trial_is_registered_with_its_setting(tuned):
    workplace = tuned[0]
    finished = [line for line in trials_of(workplace).values() if line["status"] == "finished"]
    best = min(finished, key=lambda line: float(line[METRIC]))
    model = resolve_model("models:/gmflow@tune", workplace.tracking_uri)
    assert model.config.attn_splits == (int(best["attn_splits_1"]), int(best["attn_splits_2"]))
    client = MlflowClient(workplace.tracking_uri, workplace.tracking_uri)
    version, given = client.search_model_versions("name = 'gmflow'")
    assert version.tags["parent"] == f"models:/gmflow/{given.version}"
    assert float(version.tags[METRIC.replace("/", ".")]) == pytest.approx(float(best[METRIC]), rel=1e-4)


def test_a_sweep_that_has_ended_is_told_again_without_any_training(tuned):
    workplace, output = tuned
    kept = {path: path.stat().st_mtime_ns for path in (workplace.folder / "storage/tune").glob("trials/**/*.*")}
    champion = registry.find_version(mlflow_client.connect(workplace.tracking_uri), "models:/gmflow@champion")
    assert int(champion.version) == 2, "the sweep did not move its own alias"
    again = run(workplace)
    assert "goes on with models:/gmflow/1, what models:/gmflow@champion was when this sweep began" in again
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert "resumes" not in again
    assert "starts: " not in again
    assert again.splitlines()[-1] == output.splitlines()[-1]


def test_a_dry_run_starts_nothing(tuned, tmp_path: Path):
    workplace = Workplace(tmp_path, tuned[0].config | {"storage": str(tmp_path / "storage")})
    output = run(workplace, "--dry-run", f"weights={tuned[0].folder}/start.safetensors")
    assert f"probe: 2 settings of {tuned[0].folder}/start.safetensors\n" in output
    assert "tune: 4 trials of 40 steps; the first are at most " in output
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# --------------------------------------------------------------------------------------- machines that are lost


def kill_meter() -> None:
    """SIGKILL for the process that measures, of this process's own Ray."""
    below = psutil.Process().children(recursive=True)
    (meter,) = [process for process in below if process.name().startswith("ray::_Meter")]
    meter.kill()


def test_costs_are_measured_to_the_end_though_the_process_that_measures_is_lost(local_ray, tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    tiny = GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    models = {tiny: "one", GMFlowConfig.from_dict(tiny.to_dict() | {"attn_splits": [1]}): "other"}
    told: list[str] = []

    def kill_after(timings: int, line: str) -> None:
        told.append(line)
        if len(told) == timings:
            kill_meter()

    def measure(timings: int) -> dict[GMFlowConfig, cost.Cost]:
        told.clear()
        asked = CostConfig(height=32, width=48, rounds=2)
        return cost.measure_costs(store, models, asked, "fp32", lambda line: kill_after(timings, line))

    with monkeypatch.context() as patch:
        patch.setattr(cost, "_METERS", 1)
        with pytest.raises(PipelineError, match=r"was lost 1 time\(s\), the last: .*; what it timed is kept"):
            measure(1)
    assert measure(2).keys() == models.keys()
    assert ["lost" in line for line in told] == [False, False, True, False]
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("cost/*.json")]
    assert [len(content["seconds"]) for content in kept] == [2, 2]


_WHERE_DRIVERS_GO = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
from pipelines.sweeping.tuning import driver_resources

@ray.remote(num_cpus=0)
def where():
    return ray.get_runtime_context().get_node_id()

@ray.remote(num_cpus=0)
def trials_of_a_sweep():
    groups = [driver_resources().to_placement_group() for _ in range(3)]
    places = [where.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote() for group in groups]
    return ray.get(places)

ray.init()
for node in ray.nodes():
    on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    assert ray.get(trials_of_a_sweep.options(scheduling_strategy=on).remote()) == [node["NodeID"]] * 3
print(len(ray.nodes()), "nodes")
"""


def test_trials_drivers_run_where_the_sweeps_own_does(local_ray):
    """Wherever that is, with CPUs or without: the loss of any other machine ends none of them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        told = subprocess.run(
            [sys.executable, "-c", _WHERE_DRIVERS_GO],
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert "3 nodes" in told.stdout, told.stderr
    finally:
        cluster.shutdown()
