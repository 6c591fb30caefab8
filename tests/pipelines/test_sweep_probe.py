"""The probe of a sweep on a real pair, as a user runs it: killed and continued."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from datasets_etl.etl import run_etl
from datasets_etl.formats import decode_flo, decode_frame, encode_flo, encode_frame_ppm
from gmflow.metrics import FlowMetrics
from tests.pipelines.conftest import Workplace
from tests.pipelines.sweeps import METRIC, run, runs_of, start, table_of, wait_for

pytestmark = pytest.mark.slow

CROP = (slice(64, 256), slice(128, 384))  # of the reference values


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
