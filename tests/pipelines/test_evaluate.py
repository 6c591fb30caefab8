"""`pipelines/evaluate.py` as its user meets it: which figures of which pairs, and what a wrong input gets."""

import contextlib
import functools
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from rich.console import Console

import pipelines.curriculum
import pipelines.etl
import pipelines.evaluate
import pipelines.predict
import pipelines.registry
import pipelines.sweep
from datasets_etl.errors import DataError
from datasets_etl.etl import run_etl
from datasets_etl.manifest import Manifest
from pipelines.errors import PipelineError
from pipelines.training import mlflow_client
from tests.pipelines.commands import assert_one_line


class TestEvaluate:
    def test_the_last_line_is_json_with_the_promised_figures(self, call, weights, manifests, tmp_path):
        code, out, _ = call(
            pipelines.evaluate, "--model", weights, "--data", manifests["sintel"], "--output", tmp_path / "scores"
        )
        assert code == 0
        figures = json.loads(out.splitlines()[-1])
        promised = {"epe", "px1", "px3", "px5", "s0_10", "s10_40", "s40_plus", "f1_all", "matched", "unmatched"}
        assert promised <= set(figures)
        written = json.loads((tmp_path / "scores" / "metrics.json").read_text())
        assert written["epe"] == figures["epe"]
        assert figures["pairs"] == len(list((tmp_path / "scores").rglob("*.png"))) == 12
        # A manifest without a subset: each of its subsets, and all of them pooled.
        assert list(figures["sets"]) == ["sintel/training-clean", "sintel/training-final"]
        for name, found in written["sets"].items():
            assert len(found["images"]) == found["pairs"] == 6
            assert all(key.startswith(found["subset"]) for key in found["images"]), name
            assert found["pooled"]["epe"] == figures["sets"][name]["epe"] != figures["epe"]
        assert figures["epe"] == pytest.approx(np.mean([found["epe"] for found in figures["sets"].values()]))

    def test_several_sets_are_told_apart_and_pooled(self, call, weights, manifests, tmp_path):
        sets = ("--data", f"{manifests['sintel']}#training-clean", "--data", f"{manifests['chairs']}#val")
        code, out, _ = call(pipelines.evaluate, "--model", weights, *sets, "--output", tmp_path / "scores")
        assert code == 0
        figures = json.loads(out.splitlines()[-1])
        assert list(figures["sets"]) == ["sintel/training-clean", "chairs/val"]
        sintel, chairs = figures["sets"].values()
        assert (sintel["pairs"], chairs["pairs"], figures["pairs"]) == (6, 3, 9)
        # Frames of one size without invalid pixels: pooled over pixels is the mean by pairs.
        assert figures["epe"] == pytest.approx((6 * sintel["epe"] + 3 * chairs["epe"]) / 9)
        written = json.loads((tmp_path / "scores" / "metrics.json").read_text())
        assert len(written["sets"]["chairs/val"]["images"]) == 3
        scenes = written["sets"]["sintel/training-clean"]["scenes"]
        images = written["sets"]["sintel/training-clean"]["images"]
        for scene, found in scenes.items():
            own = [metrics["epe"] for key, metrics in images.items() if f"_{scene}_" in key]
            assert found["epe"] == pytest.approx(np.mean(own))
        assert len(list((tmp_path / "scores" / "chairs_val").glob("*.png"))) == 3
        page = (tmp_path / "scores" / "report.html").read_text()
        assert "sintel/training-clean" in page
        assert "https://" not in page.replace("http://www.w3.org/2000/svg", "")

    @pytest.mark.slow
    @pytest.mark.usefixtures("local_ray")
    def test_ray_tasks_give_the_same_figures_to_the_bit(self, call, weights, manifests, tmp_path):
        command = (pipelines.evaluate, "--model", weights, "--data", manifests["sintel"])
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as in tasks
        try:
            serial = call(*command, "--output", tmp_path / "serial")
            on_ray = call(*command, "--ray", "--output", tmp_path / "ray", "--track", "scores")
        finally:
            torch.set_num_threads(before)
        assert (serial[0], on_ray[0]) == (0, 0), on_ray[2]
        one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("serial", "ray"))
        for found in (*one["sets"].values(), *other["sets"].values()):
            found.pop("seconds_per_pair")
        assert one == other
        pictures = [sorted(path.name for path in (tmp_path / name).rglob("*.png")) for name in ("serial", "ray")]
        assert pictures[0] == pictures[1]

        client = mlflow_client.connect(None)
        (run,) = client.search_runs([client.get_experiment_by_name("scores").experiment_id])
        assert run.data.metrics["eval/sintel/training-final/epe"] == one["sets"]["sintel/training-final"]["epe"]
        assert (run.data.tags["model"], run.data.tags["precision"]) == (str(weights), "fp32")
        assert {found.path for found in client.list_artifacts(run.info.run_id)} >= {"metrics.json", "report.html"}
        assert run.info.status == "FINISHED"

    def test_tasks_on_ray_may_have_gpus_that_this_machine_has_not(self, call, weights, manifests, monkeypatch):
        asked = []
        monkeypatch.setattr(pipelines.evaluate, "connected", contextlib.nullcontext)
        monkeypatch.setattr(pipelines.evaluate, "has_gpus", lambda: True)

        def on_ray(*_: object, use_gpu: bool, **__: object) -> None:
            asked.append(use_gpu)
            raise PipelineError("enough")

        monkeypatch.setattr(pipelines.evaluate, "evaluate_on_ray", on_ray)
        command = (pipelines.evaluate, "--model", weights, "--data", manifests["chairs"])
        for device in ("auto", "cuda", "cpu"):
            assert_one_line(call(*command, "--ray", "--device", device), "enough")
        assert asked == [True, True, False]
        code, _, err = call(*command, "--ray", "--device", "cuda:1")
        assert (code, "Ray's tasks take auto, cpu or cuda" in err) == (2, True)
        if not torch.cuda.is_available():
            code, _, err = call(*command, "--no-ray", "--device", "cuda")
            assert (code, "this machine has 0 CUDA devices" in err) == (2, True)

    def test_no_such_manifest(self, call, weights, tmp_path):
        result = call(pipelines.evaluate, "--model", weights, "--data", tmp_path / "m.json")
        assert_one_line(result, str(tmp_path / "m.json"), "pipelines/etl.py")

    def test_what_is_no_manifest_is_not_printed_whole(self, call, weights, tmp_path):
        (tmp_path / "m.json").write_bytes(b"\x89" + 1000 * b"pixels")
        result = call(pipelines.evaluate, "--model", weights, "--data", tmp_path / "m.json")
        assert_one_line(result, "m.json: not a manifest of pipelines/etl.py (UnicodeDecodeError: ")
        assert len(result[2]) < 400

    def test_no_such_subset(self, call, weights, manifests):
        result = call(pipelines.evaluate, "--model", weights, "--data", manifests["chairs"], "--subset", "vall")
        assert_one_line(result, "vall", "train, val")

    @pytest.mark.parametrize(
        ("reference", "fragment"),
        [
            ("models:/gmflow@champion", "no such database"),
            ("models:/gmflow/7", "no such database"),
            ("nothing.pth", "nothing.pth"),
            ("gmflow@champion", "models:/NAME@ALIAS"),
        ],
    )
    def test_no_such_model(self, call, manifests, reference, fragment):
        result = call(pipelines.evaluate, "--model", reference, "--data", manifests["chairs"])
        assert_one_line(result, reference, fragment)

    def test_a_file_that_holds_no_model(self, call, manifests, tmp_path):
        (tmp_path / "x.safetensors").write_bytes(b"hello")
        result = call(pipelines.evaluate, "--model", tmp_path / "x.safetensors", "--data", manifests["chairs"])
        assert_one_line(result, "x.safetensors")


PUBLISHED_EPE = {
    ("chairs", "FlyingChairs_release"): {
        "train_00001": 1.977,
        "train_00002": 1.329,
        "train_00003": 0.880,
        "train_00004": 1.050,
        "val_00005": 1.358,
        "val_00006": 1.210,
    },
    ("sintel", "Sintel"): {
        "training-clean_alley_1_frame_0002": 0.328,
        "training-clean_market_5_frame_0002": 1.225,
        "training-final_alley_1_frame_0002": 0.357,
        "training-final_market_5_frame_0002": 1.597,
    },
    ("kitti", "KITTI"): {"training_000000_10": 1.860},
}


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("dataset", "folder"), PUBLISHED_EPE)
def test_published_weights_score_as_published(call, samples, reference, tmp_path, dataset, folder):
    """From the official layouts through shards, padding and metrics; and in 16 bits nearly the same.

    Rounded, a pair's error is within 0.02 px of the published one; another processor rounds otherwise, so there is a
    little room (docs/performance.md).
    """
    manifest = run_etl(dataset, str(samples / folder), str(tmp_path)).manifest_url
    command = (pipelines.evaluate, "--model", reference / "gmflow_refine_published.pth", "--data", manifest)
    scores = {}
    for precision in ("fp32", "bf16"):
        code, _, _ = call(*command, "--precision", precision, "--output", tmp_path / precision)
        assert code == 0
        scores[precision] = json.loads((tmp_path / precision / "metrics.json").read_text())
        assert scores[precision]["precision"] == precision
    epe, rounded = (epe_by_pair(found) for found in scores.values())
    assert epe == pytest.approx(PUBLISHED_EPE[dataset, folder], abs=1e-3)
    if dataset == "kitti":
        assert scores["fp32"]["pooled"]["f1_all"] == pytest.approx(5.585, abs=1e-3)

    apart = {key: rounded[key] - epe[key] for key in epe}
    print({key: round(difference, 4) for key, difference in apart.items()})
    assert max(map(abs, apart.values())) <= 0.03, apart
    assert sum(map(abs, apart.values())) / len(apart) <= 0.01, apart
    assert any(apart.values())  # it did compute in 16 bits


def epe_by_pair(written: dict[str, Any]) -> dict[str, float]:
    """Of the content of metrics.json, by the pairs' keys."""
    sets = written.get("sets", {"": written}).values()
    return {key: metrics["epe"] for found in sets for key, metrics in found["images"].items()}


def test_a_sets_own_subset_and_the_limit_hold(manifests):
    sets = [f"{manifests['sintel']}#training-clean", manifests["chairs"]]
    found = pipelines.evaluate.chosen_sets(sets, "val", 2)
    assert {name: (chosen.subset, len(chosen)) for name, chosen in found.items()} == {
        "sintel/training-clean": ("training-clean", 2),
        "chairs/val": ("val", 2),
    }
    assert len(pipelines.evaluate.chosen_sets(sets[:1], None, None)["sintel/training-clean"]) == 6
    # Without any: every subset with ground truth, of each its first pairs.
    found = pipelines.evaluate.chosen_sets([manifests["chairs"], manifests["kitti"]], None, 2)
    assert [(name, chosen.part) for name, chosen in found.items()] == [
        (name, "first 2 pairs") for name in ("chairs/train", "chairs/val", "kitti/training")
    ]
    for name, chosen in found.items():
        assert [chosen[number].subset for number in range(2)] == 2 * [name.partition("/")[2]]
        assert len(chosen) == 2


def test_a_pattern_need_not_match_in_every_subset_of_a_manifest(manifests):
    manifest = Manifest.load(manifests["chairs"])
    one, other = (manifest.samples[manifest.select(subset)[0]].name for subset in ("train", "val"))
    choose = functools.partial(pipelines.evaluate.chosen_sets, [manifests["chairs"]], None, None)
    assert {name: len(chosen) for name, chosen in choose([one]).items()} == {"chairs/train": 1}
    assert {name: len(chosen) for name, chosen in choose([other, one]).items()} == {"chairs/train": 1, "chairs/val": 1}
    left = choose((), [other])
    assert {name: len(chosen) for name, chosen in left.items()} == {
        "chairs/train": manifest.subsets["train"],
        "chairs/val": manifest.subsets["val"] - 1,
    }
    with pytest.raises(DataError, match=r"no sample of any subset matches 'x\*'"):
        choose([one, "x*"])


def test_a_pattern_need_not_match_in_every_manifest(manifests):
    choose = functools.partial(pipelines.evaluate.chosen_sets, [manifests["sintel"], manifests["kitti"]], None, None)
    clean, final = "sintel/training-clean", "sintel/training-final"
    assert {name: len(chosen) for name, chosen in choose(["scene_0000*"]).items()} == {clean: 2, final: 2}
    assert list(choose(["scene_0000*", "000001*"])) == [clean, final, "kitti/training"]
    left = choose((), ["scene_0000*"])
    assert {name: len(chosen) for name, chosen in left.items()} == {clean: 4, final: 4, "kitti/training": 4}
    assert (left["kitti/training"].part, left[clean].part) == ("", "without scene_0000*")
    with pytest.raises(
        PipelineError,
        match=r"no sample of any --data matches 'x\*'; names are such as scene_0000_frame_0001, 000000_10",
    ):
        choose(["scene_0000*"], ["x*"])


def test_pairs_are_chosen_by_name(call, weights, manifests, tmp_path):
    command = (pipelines.evaluate, "--model", weights, "--data", f"{manifests['sintel']}#training-clean")
    output = tmp_path / "scores"
    code, *_ = call(
        *command, "--only", "scene_0000*", "--only", "scene_0001*", "--without", "*1_frame_0002", "--output", output
    )
    assert code == 0
    assert sorted(path.stem for path in output.glob("*.png")) == [
        f"training-clean_scene_{rest}" for rest in ("0000_frame_0001", "0000_frame_0002", "0001_frame_0001")
    ]
    content = json.loads((output / "metrics.json").read_text())
    assert content["part"] == "only scene_0000*, scene_0001*; without *1_frame_0002"
    assert content["stands_for"].startswith(f"{weights} (sha256 ")
    assert_one_line(call(*command, "--only", "alley_*"), "no sample of training-clean matches 'alley_*'")


def test_a_set_that_is_given_twice_would_count_twice(manifests):
    once = f"{manifests['sintel']}#training-clean"
    with pytest.raises(PipelineError, match="training-clean: sintel/training-clean holds its pairs too"):
        pipelines.evaluate.chosen_sets([once, manifests["chairs"], once], "val", None)
    as_a_path = once.removeprefix("file://")
    assert as_a_path != once
    with pytest.raises(PipelineError, match="training-clean: sintel/training-clean holds its pairs too"):
        pipelines.evaluate.chosen_sets([once, as_a_path], None, None)
    for order in ([once, manifests["sintel"]], [manifests["sintel"], once]):  # without a subset: all of them
        with pytest.raises(PipelineError, match="which would count twice"):
            pipelines.evaluate.chosen_sets(order, None, None)


def test_an_mlflow_that_is_away_is_found_before_anything_is_scored(call, weights, manifests, monkeypatch):
    monkeypatch.setattr(pipelines.evaluate, "score_sets", lambda *_: pytest.fail("scored"))
    command = (pipelines.evaluate, "--model", weights, "--data", manifests["chairs"], "--subset", "val")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert_one_line(call(*command, "--track", "scores"), "MLflow at http://127.0.0.1:9 does not answer", code=1)


def test_a_deleted_experiment_is_found_before_anything_is_scored(call, weights, manifests, monkeypatch):
    client = mlflow_client.connect(None)
    client.delete_experiment(client.create_experiment("deleted"))
    monkeypatch.setattr(pipelines.evaluate, "score_sets", lambda *_: pytest.fail("scored"))
    command = (pipelines.evaluate, "--model", weights, "--data", manifests["chairs"], "--subset", "val")
    assert_one_line(call(*command, "--track", "deleted"), "experiment 'deleted' was deleted: restore it")


def test_figures_that_mlflow_does_not_take_are_printed_all_the_same(call, weights, manifests, monkeypatch):
    def refuse(*_: Any) -> None:
        raise MlflowException("the disk is full")

    monkeypatch.setattr(MlflowClient, "log_dict", refuse)
    command = (pipelines.evaluate, "--model", weights, "--data", manifests["chairs"], "--subset", "val", "--limit", 1)
    code, out, err = call(*command, "--track", "scores")
    assert code == 1
    assert "does not take the figures, which are complete without it: the disk is full" in " ".join(err.split())
    assert json.loads(out.splitlines()[-1])["pairs"] == 1


def test_places_and_ids_are_printed_on_one_line_each(call, weights, manifests, tmp_path):
    """A log is 80 columns wide; what was broken there could not be copied."""
    output = tmp_path / ("a long name " * 8).strip()
    command = (pipelines.evaluate, "--model", weights, "--data", manifests["chairs"], "--subset", "val", "--limit", 1)
    err = call(*command, "--output", output, "--track", "an experiment with quite a name")[2].splitlines()
    assert f"metrics, report and pictures: {output.as_uri()}" in err
    client = mlflow_client.connect(None)
    (run,) = client.search_runs([client.get_experiment_by_name("an experiment with quite a name").experiment_id])
    where = f"{mlflow_client.place_of(client)}, experiment an experiment with quite a name, run {run.info.run_id}"
    assert f"MLflow: {where}" in err


def test_occlusion_is_shown_where_it_was_asked_for(call, weights, manifests, tmp_path):
    command = (pipelines.evaluate, "--model", weights, "--data", manifests["chairs"], "--subset", "val", "--limit", 1)
    for asked in ((), ("--occlusion",)):
        assert call(*command, "--output", tmp_path / "s", *asked)[0] == 0
        page = (tmp_path / "s" / "report.html").read_text()
        assert ('"occlusion found": "data:' in page) == bool(asked)


def test_a_narrow_terminal_gets_whole_figures_and_names_that_can_be_read(monkeypatch):
    shown = io.StringIO()
    console = Console(width=60, file=shown)
    monkeypatch.setattr(pipelines.evaluate, "console", console)
    figures = dict.fromkeys(pipelines.evaluate._SHOWN, 12.345)
    found = SimpleNamespace(images={"training-clean_market_5_frame_0002": figures}, pooled=figures)
    pipelines.evaluate.show({"sintel/training-clean": (range(1), found)})
    lines = shown.getvalue().splitlines()
    assert sum(line.count(" 12.345") for line in lines) == 2 * len(figures)
    assert any(line.lstrip().startswith("training-c") for line in lines)
