"""Trials of a sweep as a user runs them, on a cluster of one trial's size: tuned with ASHA, killed and continued."""

import json
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from gmflow import GMFlow, GMFlowConfig, save_weights
from pipelines.references import resolve_model
from pipelines.training import mlflow_client, model_versions, registration, tracking
from tests.pipelines.conftest import Workplace
from tests.pipelines.sweeps import METRIC, run, runs_of, start, table_of, wait_for
from tests.waiting import kill_tree

pytestmark = pytest.mark.slow


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
    registration.register(
        client, "gmflow", given, weights, registration.Lineage("start", "random", {}, "h", "sources:x", {}), None
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
    champion = model_versions.find_version(mlflow_client.connect(workplace.tracking_uri), "models:/gmflow@champion")
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
