"""`pipelines/curriculum.py` and the other scripts as their user meets them: what a wrong input gets."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import pipelines.curriculum
import pipelines.etl
import pipelines.evaluate
import pipelines.export
import pipelines.predict
import pipelines.registry
import pipelines.report
import pipelines.submission
import pipelines.sweep
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from datasets_etl.synthetic import write_dataset
from gmflow import GMFlow, GMFlowConfig, save_weights
from pipelines.errors import PipelineError
from pipelines.training import mlflow_client
from tests.conftest import ROOT
from tests.pipelines.commands import TINY, assert_one_line
from tests.scripts import MODULES


@pytest.mark.usefixtures("local_ray")
class TestCurriculum:
    @pytest.mark.parametrize(
        ("override", "fragments"),
        [
            ("stages.chairs.stepz=3", ("unknown key", "did you mean steps?")),
            ("data.chairs=/no/manifest.json", ("/no/manifest.json", "pipelines/etl.py")),
            ("stages.chairs.mixture.0.subset=trian", ("no subset 'trian'", "train, val")),
            ("init_from=models:/gmflow@champion", ("models:/gmflow@champion", "no such model")),
            ("init_from=/no/weights.pth", ("/no/weights.pth",)),
            ("machine.min_workers=3", ("min_workers 3 is above num_workers 2",)),
            ("machine={num_workers: 2, min_workers: 1, placement: strict_spread}", ("placement pack or spread",)),
            (
                "stages.chairs.gates=[{data: chairs, subset: val, metric: matched, below: 3}]",
                ("gates: val/chairs/val/matched will have no value", "chairs does not tell"),
            ),
            ("promotion.metric=unmatched", ("promotion: val/chairs/val/unmatched will have no value",)),
            ("machine.hang_timeout_s=60", ("hang_timeout_s 60 must be above twice storage_patience_s 120",)),
        ],
    )
    def test_a_wrong_config(self, call, workplace, override, fragments):
        result = call(pipelines.curriculum, "--config", workplace.write(), override)
        assert_one_line(result, *fragments)
        assert not list((workplace.folder / "storage").rglob("*.safetensors"))

    def test_a_job_does_not_train_into_the_folder_it_was_uploaded_into(self, call, workplace, tmp_path, monkeypatch):
        """Ray unpacks an upload anew after every change of a file: the same command would find nothing of before."""
        uploaded = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
        uploaded.mkdir(parents=True)
        monkeypatch.chdir(uploaded)
        result = call(pipelines.curriculum, "--config", workplace.write(), "--dry-run", "storage=runs/base")
        assert_one_line(result, "storage runs/base", "would be lost", "s3://")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
        with pytest.raises(PipelineError, match=r"runs/mlflow\.db: lies in the folder .* MLFLOW_TRACKING_URI"):
            mlflow_client.connect(None)
        with pytest.raises(PipelineError, match=r"mine\.db: .*; give mlflow\.tracking_uri=null, and set MLFLOW_"):
            mlflow_client.connect("sqlite:///runs/mine.db")  # the config's, which comes before the environment's
        assert not list(uploaded.iterdir())

    @pytest.mark.parametrize("start", ["models:/gmflow@champion", "/no/weights.pth"])
    def test_a_dry_run_misses_the_weights_to_start_from(self, call, workplace, start):
        result = call(pipelines.curriculum, "--config", workplace.write(), "--dry-run", f"init_from={start}")
        assert_one_line(result, start)

    def test_initial_weights_of_another_architecture(self, call, workplace, tmp_path):
        other = tmp_path / "other.safetensors"
        save_weights(GMFlow(GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=32, num_layers=1)), other)
        result = call(pipelines.curriculum, "--config", workplace.write(), f"init_from={other}")
        assert_one_line(result, "other.safetensors")
        assert not list((workplace.folder / "storage").rglob("*.safetensors"))


def test_a_sweeps_dry_run_misses_its_weights(call, manifests, tmp_path):
    sets = [{"data": "chairs", "subset": "val"}]
    config = {
        "name": "probe",
        "storage": str(tmp_path / "storage"),
        "data": {"chairs": manifests["chairs"]},
        "model": {"variant": "refine", "attn_splits": [1, 2]},
        "weights": "/no/weights.pth",
        "objective": sets[0],
        "probe": {"grid": {"attn_splits": [[1], [2]]}, "validation": sets},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config))
    assert_one_line(call(pipelines.sweep, "--config", path, "--dry-run"), "/no/weights.pth: no such file")


@pytest.mark.parametrize(
    "arguments",
    [
        (pipelines.evaluate, "--model", "{weights}", "--data", "s3://data/manifest-0.json"),
        (pipelines.evaluate, "--model", "models:/gmflow@champion", "--data", "{manifest}"),
        (pipelines.etl, "--dataset", "chairs", "--source", "{raw}", "--target", "s3://data/chairs"),
        (pipelines.registry, "list"),
        (pipelines.report, "--run", "0123"),
        (pipelines.curriculum, "--config", "{config}", "mlflow.tracking_uri=http://127.0.0.1:9"),
        (pipelines.curriculum, "--config", "{config}", "storage=s3://data/training"),
    ],
)
@pytest.mark.usefixtures("local_ray", "fresh_client")
def test_after_an_outage_the_exit_code_says_that_the_same_command_may_do_later(
    call, weights, manifests, workplace, tmp_path, monkeypatch, arguments
):
    """A script that starts a command again must tell it from a mistake, which would be met again."""
    write_dataset("chairs", tmp_path / "raw", pairs=2, held_out=1, height=48, width=64, seed=1)
    for variable in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    known = {"weights": weights, "manifest": manifests["chairs"], "raw": tmp_path / "raw", "config": workplace.write()}
    module, *rest = arguments
    result = call(module, *(each.format(**known) for each in rest))
    assert_one_line(result, "127.0.0.1:9", code=1)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_sample_that_was_damaged_on_storage_is_named_in_a_line(call, workplace, weights, manifests, tmp_path):
    source = Path(manifests["chairs"].removeprefix("file://"))
    folder = tmp_path / "chairs"
    shutil.copytree(source.parent, folder)
    (shard,) = (folder / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    for at in range(5000, len(data), 10_000):
        data[at] ^= 1
    shard.write_bytes(bytes(data))
    damaged = (f"data.chairs={folder / source.name}", "machine.loader_workers=1")
    result = call(pipelines.curriculum, "--config", workplace.write(), *damaged)
    code, out, err = result
    assert code == 2, err
    assert out.count("starts: ") == 1, "it would meet the same sample again"
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "DataLoader" not in line, "a trace within the line"
    assert shard.name in line
    assert "damaged" in line
    assert "delete this shard and run pipelines/etl.py again" in line
    assert "Traceback" not in err
    scored = (pipelines.evaluate, "--model", weights, "--data", folder / source.name, "--subset", "train", "--ray")
    assert_one_line(call(*scored), shard.name, "damaged")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_losses_that_are_not_finite_are_skipped_by_all_ranks_and_end_the_stage(call, workplace, tmp_path):
    model = GMFlow(TINY)
    with torch.no_grad():
        model.backbone.stem.weight.fill_(1e38)
    save_weights(model, tmp_path / "large.safetensors")
    result = call(
        pipelines.curriculum,
        *("--config", workplace.write(), f"init_from={tmp_path / 'large.safetensors'}"),
        *("stages.chairs.max_skipped_in_a_row=3", "machine.max_failures=0"),
    )
    code, out, err = result
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "stage chairs: 3 steps in a row with a non-finite loss or gradient, the last at step 2" in line
    assert out.count("skipped: loss nan") == 3
    assert not list((workplace.folder / "storage").rglob("final.safetensors"))


def test_a_script_run_by_itself_prints_the_line_and_exits_with_2(tmp_path: Path):
    command = [
        sys.executable,
        str(ROOT / "pipelines/predict.py"),
        "--model",
        "no.pth",
        "--output",
        "o",
        "no.png",
        "no2.png",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no.png: no such file or folder\n"


@pytest.mark.parametrize("script", MODULES)
def test_a_wrong_command_line_is_said_in_a_line(call, script):
    code, out, err = call(script, "--no-such-option")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]*; [^\n]* --help shows what there is\n", err)


INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name in ("cv2", "mlflow", "numpy", "ray", "rich", "torch"):
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("script", ["demo", *(module.__name__.rpartition(".")[2] for module in MODULES)])
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_trace(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)  # Python imports it first
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / f"{script}.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
