"""Registered models from the shell: what there is, what differs, where the aliases are."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.store.entities.paged_list import PagedList
from mlflow.tracking import MlflowClient

import pipelines.export
import pipelines.registry
from datasets_etl.errors import DataError
from datasets_etl.objects import file_sha256
from gmflow import GMFlow, GMFlowError, load_model, save_weights
from pipelines import references
from pipelines.errors import PipelineError
from pipelines.training import aliases, mlflow_client, model_versions, registration, tracking
from pipelines.training.data_config import MetricConfig
from tests.pipelines.commands import TINY


@pytest.fixture
def tracked_in(registered: Path) -> Path:
    return registered


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of two stages, each better than the one before: champion is the last."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow_client.connect(uri)
    for number, (stage, epe) in enumerate([("chairs", 3.0), ("chairs", 2.5), ("things", 2.0)], start=1):
        torch.manual_seed(number)
        save_weights(GMFlow(TINY), folder / f"{number}.safetensors")
        parent = "random" if number == 1 else f"models:/gmflow/{number - 1}"
        lineage = registration.Lineage(
            stage, parent, {"chairs": f"file:///c{number}"}, f"h{number}", "sources:x", {"val/c/val/epe": epe}
        )
        stage_run = tracking.start_run(client, "r", stage, {}).info.run_id
        rule = MetricConfig(data="c", subset="val")
        registration.register(client, "gmflow", stage_run, folder / f"{number}.safetensors", lineage, rule)
    return folder


def champion(call) -> str:
    _, out, _ = call(pipelines.registry, "show", "models:/gmflow@champion")
    return next(line for line in out.splitlines() if "reference" in line).split("/")[-1].strip(" │")


def test_versions_are_listed_with_stage_metrics_lineage_and_aliases(call):
    code, out, _ = call(pipelines.registry, "list")
    assert code == 0
    third, second, first = (line for line in out.splitlines() if line.strip().startswith("gmflow/"))
    assert [word in third for word in ("gmflow/3", "things", "champion", "gmflow/2", "c.val 2.000")] == [True] * 5
    assert "chairs" in second
    assert "random" in first
    # By its day alone, no version could be told from another of the same day.
    assert re.search(r" \d{4}-\d\d-\d\d$", third.rstrip())
    assert len(re.findall(r" \d\d:\d\d UTC *$", out, re.MULTILINE)) >= 3


def test_a_registry_without_models_says_so(call, monkeypatch, tmp_path):
    uri = f"sqlite:///{tmp_path}/empty.db"
    mlflow_client.connect(uri).search_experiments()  # makes the database
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    code, out, _ = call(pipelines.registry, "list")
    assert (code, " ".join(out.split())) == (0, f"no model is registered at {uri}")


def test_comparing_shows_metrics_with_their_difference_and_lineage_that_differs(call):
    code, out, _ = call(pipelines.registry, "compare", "models:/gmflow/1", "models:/gmflow/3")
    assert code == 0
    (metric,) = (line for line in out.splitlines() if "val.c.val.epe" in line)
    assert metric.replace("│", " ").split()[1:] == ["3", "2", "-1"]
    assert "file:///c1" in out
    assert "code_version" not in out  # the same


def test_nothing_is_cut_in_a_terminal_of_80_columns(call, monkeypatch, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client.connect(uri)
    weights = tmp_path / "w.safetensors"
    save_weights(GMFlow(TINY), weights)
    name, run_ids = "sintel.training-clean", []
    for number in ("1", "2"):
        lineage = registration.Lineage(
            *("sintel", f"models:/gmflow/{number}", {"sintel": f"s3://bucket/sets/sintel/manifest-{number * 16}.json"}),
            *(number * 12, "git:" + number * 40, {"val/sintel/training-clean/epe": 2.5}),
        )
        run_ids.append(tracking.start_run(client, "r", "sintel", {}).info.run_id)
        registration.register(client, "gmflow", run_ids[-1], weights, lineage, None)
    monkeypatch.setattr(mlflow_client, "tracking_uri", lambda configured: uri)

    def told(*arguments: str) -> str:
        code, out, _ = call(pipelines.registry, *arguments)
        assert code == 0
        assert "…" not in out
        return out

    monkeypatch.setenv("COLUMNS", "80")
    newest = next(line for line in told("list").splitlines() if line.strip().startswith("gmflow/2"))
    assert all(word in newest.split() for word in ("gmflow/2", "sintel", "gmflow/2", name, "2.500"))
    compared = told("compare", "models:/gmflow/1", "models:/gmflow/2")
    assert all(word in compared for word in (*run_ids, "1" * 12, "2" * 12, f"val.{name}.epe"))
    path = "/data/weights/gmflow_sintel.pth (sha256 0123456789abcdef)"
    run = tracking.start_run(client, "r", "chairs", {}).info.run_id
    registration.register(client, "gmflow", run, weights, registration.Lineage("chairs", path, {}, "h", "c", {}), None)
    listed = told("list").split()
    assert all(
        word in listed for word in ("gmflow/3", "champion", "gmflow_sintel.pth", f"{datetime.now(UTC):%Y-%m-%d}")
    )


def test_champion_rolls_back_by_one_command_step_by_step_and_is_promoted_again(call):
    assert champion(call) == "3"
    assert call(pipelines.registry, "rollback")[1] == "models:/gmflow@champion is version 2, was 3\n"
    assert champion(call) == "2"
    assert call(pipelines.registry, "rollback", "gmflow")[0] == 0
    assert champion(call) == "1"
    code, _, err = call(pipelines.registry, "rollback")
    assert (code, "no earlier version is left; it is on 1" in err) == (2, True)
    call(pipelines.registry, "promote", "models:/gmflow/3")
    assert champion(call) == "3"
    assert call(pipelines.registry, "rollback")[1] == "models:/gmflow@champion is version 1, was 3\n"
    call(pipelines.registry, "promote", "models:/gmflow/3")
    call(pipelines.registry, "promote", "models:/gmflow/3")  # no move: nothing to remember
    call(pipelines.registry, "rollback")
    assert champion(call) == "1"
    call(pipelines.registry, "promote", "models:/gmflow/3")


def test_versions_that_were_deleted_are_rolled_back_over(call, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise MlflowException("not now")

    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("gmflow")
    for number in "1234":
        client.create_model_version("gmflow", f"file://{tmp_path}")
        aliases.move_alias(client, "gmflow", "champion", number)
    with monkeypatch.context() as patch:
        patch.setattr(client, "get_model_version", refuse)
        with pytest.raises(MlflowException, match="not now"):  # and does not pass for deleted
            aliases.roll_back(client, "gmflow", "champion")
    for number in "32":
        client.delete_model_version("gmflow", number)
    assert call(pipelines.registry, "rollback")[1] == "models:/gmflow@champion is version 1, was 4\n"
    aliases.move_alias(client, "gmflow", "champion", "4")
    client.delete_model_version("gmflow", "1")
    code, _, err = call(pipelines.registry, "rollback")
    assert (code, "no earlier version is left; it is on 4" in err) == (2, True)


def test_models_beyond_the_first_page_are_listed(monkeypatch):
    pages = {None: PagedList(["a", "b"], "next"), "next": PagedList(["c"], None)}
    client = SimpleNamespace(search_registered_models=lambda page_token: pages[page_token])
    assert list(model_versions.registered_models(client)) == ["a", "b", "c"]


@pytest.mark.parametrize("alias", ["v3", "latest", "a b"])
def test_an_alias_that_mlflow_does_not_take_is_said(call, alias):
    code, out, err = call(pipelines.registry, "promote", "models:/gmflow/1", "--alias", alias)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --alias {alias}: ")
    assert len(err.splitlines()) == 1


def test_a_move_that_was_killed_halfway_leaves_one_step_to_roll_back(tmp_path, monkeypatch):
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("m")
    run = tracking.start_run(client, "r", "chairs", {}).info.run_id
    for _ in range(3):
        client.create_model_version("m", f"file://{tmp_path}", run)
    aliases.move_alias(client, "m", "champion", "1")
    aliases.move_alias(client, "m", "champion", "2")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "set_registered_model_alias", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            aliases.move_alias(client, "m", "champion", "3")
    monkeypatch.undo()
    aliases.move_alias(client, "m", "champion", "3")
    monkeypatch.setattr(aliases, "_remember", killed)
    with pytest.raises(KeyboardInterrupt):
        aliases.roll_back(client, "m", "champion")  # has moved, and not forgotten yet
    monkeypatch.undo()
    assert aliases.roll_back(client, "m", "champion") == ("2", "1"), "3 was remembered once"
    with pytest.raises(PipelineError, match="no earlier version is left; it is on 1"):
        aliases.roll_back(client, "m", "champion")


def test_files_are_not_written_to_a_url_as_if_it_were_a_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        (pipelines.registry, "pull", "models:/gmflow/2", "s3://bucket/pulled"),
        (pipelines.export, "--model", "models:/gmflow/2", "s3://bucket/model.pth"),
    ):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert "is a URL; give a path on this machine" in err
    assert not (tmp_path / "s3:").exists()


def test_files_are_not_written_into_a_jobs_upload(call, registered, tmp_path):
    upload = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    for command in (
        (pipelines.registry, "pull", "models:/gmflow/2", upload / "pulled"),
        (pipelines.export, "--model", "models:/gmflow/2", upload / "model.pth"),
    ):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert "lies in the folder that this job was uploaded into" in err
    assert not upload.exists()


def test_a_version_is_pulled_with_its_lineage(call, registered, tmp_path):
    code, out, _ = call(pipelines.registry, "pull", "models:/gmflow/2", tmp_path / "pulled")
    assert (code, out.strip()) == (0, str(tmp_path / "pulled" / "model.safetensors"))
    pulled, original = load_model(tmp_path / "pulled" / "model.safetensors"), load_model(registered / "2.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(pulled.parameters(), original.parameters(), strict=True))
    lineage = json.loads((tmp_path / "pulled" / "lineage.json").read_text())
    assert lineage["parent"] == "models:/gmflow/1"
    assert lineage["data chairs"] == "file:///c2"
    assert lineage["metrics"] == {"val.c.val.epe": 2.5}


@pytest.mark.parametrize("reference", ["models:/gmflow@best", "models:/gmflow/9", "models:/other/1"])
def test_a_missing_model_names_those_there_are(call, reference):
    code, out, err = call(pipelines.registry, "show", reference)
    assert (code, out) == (2, "")
    assert f"{reference}: no such model" in err
    assert "models:/gmflow@champion" in err


def test_a_mistyped_database_is_said_and_not_made(call, tmp_path, monkeypatch):
    missing = tmp_path / "mlfow.db"
    uri = f"sqlite:///{missing}"
    monkeypatch.setattr(mlflow_client, "tracking_uri", lambda configured: uri)
    for task in (["list"], ["show", "models:/gmflow/1"]):
        code, _, err = call(pipelines.registry, *task)
        assert (code, f"MLflow at {uri}: no such database" in err) == (2, True)
    with pytest.raises(PipelineError, match="no such database"):
        references.resolve_model("models:/gmflow/1", uri)
    assert not missing.exists()


def test_a_damaged_weights_file_is_named_as_it_was_given(tmp_path):
    given = tmp_path / "given.safetensors"
    given.write_bytes(b"no weights")
    with pytest.raises(GMFlowError, match=f"^{re.escape(str(given))}: damaged"):
        references.resolve_model(str(given))


@pytest.mark.parametrize("look_up", [references.stands_for, references.check_reference, references.resolve_named])
def test_a_model_is_looked_up_in_the_mlflow_that_was_given(registered, tmp_path, monkeypatch, look_up):
    """A config may name another one than the environment does."""
    other = f"sqlite:///{tmp_path}/other.db"
    mlflow_client.connect(other).create_registered_model("gmflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    with pytest.raises(PipelineError):
        look_up("models:/gmflow/1")
    look_up("models:/gmflow/1", f"sqlite:///{registered}/mlflow.db")


@pytest.mark.parametrize(
    "error", [MlflowException("denied"), PipelineError("no such model"), DataError("no such file")], ids=type
)
def test_what_cannot_be_looked_up_is_not_said_to_have_moved(monkeypatch, error):
    """Who pinned it has what it needs, and goes on."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(references, "stands_for", fail)
    assert not references.has_moved("models:/gmflow@champion", "models:/gmflow/1")
    monkeypatch.setattr(references, "stands_for", lambda *_: "models:/gmflow/2")
    assert references.has_moved("models:/gmflow@champion", "models:/gmflow/1")
    assert not references.has_moved("models:/gmflow@champion", "models:/gmflow/2")


def test_a_version_whose_files_were_deleted_says_so(registered, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client.connect(uri)
    lineage = registration.Lineage("chairs", "random", {}, "h", "sources:x", {})
    stage_run = tracking.start_run(client, "r", "chairs", {}).info.run_id
    version = registration.register(client, "gmflow", stage_run, registered / "1.safetensors", lineage, None)
    for file in (tmp_path / "mlflow-artifacts").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(PipelineError, match=f"models:/gmflow/{version.version}: .*its files were deleted"):
        references.resolve_model(f"models:/gmflow/{version.version}", uri)


def test_what_is_no_reference_is_said(call):
    assert "write models:/NAME@ALIAS" in call(pipelines.registry, "show", "gmflow/1")[2]
    assert "no model 'other'" in call(pipelines.registry, "list", "other")[2]


def test_a_registered_model_is_exported_to_the_published_layout_and_back(call, registered, tmp_path):
    published = tmp_path / "in" / "a new folder" / "a.pth"
    code, out, _ = call(pipelines.export, "--model", "models:/gmflow/1", published, tmp_path / "a.safetensors")
    assert (code, out.splitlines()) == (0, [str(published), str(tmp_path / "a.safetensors")])
    assert set(torch.load(published, weights_only=True)) == {"model"}
    assert call(pipelines.export, "--model", published, tmp_path / "b.safetensors")[0] == 0
    original = load_model(registered / "1.safetensors")
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        back = load_model(path)
        assert back.config == original.config
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), original.parameters(), strict=True))


def test_unknown_forms_are_refused_before_anything_is_written(call, tmp_path):
    code, _, err = call(pipelines.export, "--model", "models:/gmflow/1", tmp_path / "a.pth", tmp_path / "a.h5")
    assert (code, ".onnx" in err, list(tmp_path.iterdir())) == (2, True, [])


def test_places_that_cannot_be_written_are_said(call, registered, tmp_path):
    weights = registered / "1.safetensors"
    (tmp_path / "a.pth").mkdir()
    assert (
        f"{tmp_path}/a.pth: a folder; name a file" in call(pipelines.export, "--model", weights, tmp_path / "a.pth")[2]
    )
    for path in ("/dev/null/t.onnx", "/proc/x/t.pth", "/proc/t.safetensors"):
        code, out, err = call(pipelines.export, "--model", weights, path)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {path}: ")
        assert err.endswith("give another path\n")


def test_missing_packages_for_onnx_are_told_before_the_model_is_traced(call, registered, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines.export, "export_model", lambda _: pytest.fail("traced"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call(pipelines.export, "--model", registered / "1.safetensors", tmp_path / "a.onnx")
    assert (code, "pip install 'gmflow-ray[export]'" in err) == (2, True)


def test_windows_that_the_published_layout_does_not_hold_are_told(call, tmp_path):
    given, written = tmp_path / "a.safetensors", tmp_path / "a.pth"
    for splits, told in (
        ((4,), f"{written}: this layout holds no windows and radii; load it with attn_splits=(4,)\n"),
        ((2,), ""),
    ):
        save_weights(GMFlow(replace(TINY, attn_splits=splits)), given)
        code, _, err = call(pipelines.export, "--model", given, written)
        assert (code, err) == (0, told)


def test_aliases_other_than_champion_move_and_roll_back(call, tmp_path):
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("gmflow")
    for _ in range(2):
        client.create_model_version("gmflow", f"file://{tmp_path}")
    client.set_registered_model_alias("gmflow", "champion", "1")

    def aliases() -> dict[str, str]:
        return {name: str(version) for name, version in client.get_registered_model("gmflow").aliases.items()}

    for number in ("1", "2"):
        assert call(pipelines.registry, "promote", f"models:/gmflow/{number}", "--alias", "served")[0] == 0
    assert aliases() == {"champion": "1", "served": "2"}
    told = call(pipelines.registry, "rollback", "--alias", "served")[1]
    assert told == "models:/gmflow@served is version 1, was 2\n"
    assert aliases() == {"champion": "1", "served": "1"}


def test_a_rollback_that_mlflow_refuses_is_said(call, monkeypatch):
    def refuse(*_: object) -> None:
        raise MlflowException("not yours")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", refuse)
    code, _, err = call(pipelines.registry, "rollback", "gmflow")
    assert (code, err) == (2, "error: --alias champion: MLflow does not move it: not yours\n")


def test_storage_that_is_away_is_said(call, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
    }
    for name, value in {**settings, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    client = mlflow_client.connect(uri)
    client.create_registered_model("elsewhere")
    client.create_model_version("elsewhere", "s3://bucket/model")
    code, _, err = call(pipelines.registry, "pull", "models:/elsewhere/1", tmp_path / "pulled")
    assert code == 1
    assert re.fullmatch(r"error: models:/elsewhere/1: its files cannot be had from .*127\.0\.0\.1:9.*\n", err)


def test_others_models_are_listed_however_they_are_named(call, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow_client.connect(uri)
    client.create_registered_model("o'neil")
    client.create_model_version("o'neil", f"file://{tmp_path}")
    code, out, _ = call(pipelines.registry, "list")
    assert code == 0
    assert "o'neil/1" in out


def test_a_champion_is_no_better_by_what_tags_do_not_hold(tmp_path):
    """Its figure is that of a tag: the third here is better than the first by less than a tag's last digit."""
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    save_weights(GMFlow(TINY), tmp_path / "w.safetensors")
    rule = MetricConfig(data="c", subset="val")
    for number, epe in enumerate([2.50000049, 2.50000001, 2.49999951]):
        lineage = registration.Lineage("chairs", "random", {}, f"h{number}", "sources:x", {"val/c/val/epe": epe})
        run = tracking.start_run(client, "r", "chairs", {}).info.run_id
        registration.register(client, "gmflow", run, tmp_path / "w.safetensors", lineage, rule)
    assert str(client.get_model_version_by_alias("gmflow", "champion").version) == "1"


def test_it_is_said_whether_a_new_version_is_the_champion(tmp_path):
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    save_weights(GMFlow(TINY), tmp_path / "w.safetensors")
    rule = MetricConfig(data="c", subset="val")
    told = []
    for number, epe in enumerate([None, 3.0, 3.5, 2.5]):
        metrics = {} if epe is None else {"val/c/val/epe": epe}
        lineage = registration.Lineage("chairs", "random", {}, f"h{number}", "sources:x", metrics)
        run = tracking.start_run(client, "r", "chairs", {}).info.run_id
        version = registration.register(client, "gmflow", run, tmp_path / "w.safetensors", lineage, rule)
        told.append(registration.standing(client, version, rule))
    assert told == [
        "registered as models:/gmflow/1; there is no champion yet",
        "registered as models:/gmflow/2, now the champion, val/c/val/epe 3",
        "registered as models:/gmflow/3; the champion is still version 2, val/c/val/epe 3",
        "registered as models:/gmflow/4, now the champion, val/c/val/epe 2.5 (before: version 2)",
    ]


def test_a_model_whose_upload_was_cut_off_is_logged_again(tmp_path):
    """It has a record and the weights' tag already, and no files: its version could not be loaded."""
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    save_weights(GMFlow(TINY), tmp_path / "w.safetensors")
    run = tracking.start_run(client, "r", "chairs", {}).info
    tags = {"weights_sha256": file_sha256(tmp_path / "w.safetensors")}
    client.create_logged_model(run.experiment_id, source_run_id=run.run_id, tags=tags)  # which is not READY
    lineage = registration.Lineage("chairs", "random", {}, "h", "sources:x", {})
    version = registration.register(client, "gmflow", run.run_id, tmp_path / "w.safetensors", lineage, None)
    assert model_versions.version_weights(client, version) == (tmp_path / "w.safetensors").read_bytes()


def test_a_runs_weights_under_two_names_are_a_version_of_each(tmp_path):
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    save_weights(GMFlow(TINY), tmp_path / "w.safetensors")
    run = tracking.start_run(client, "r", "chairs", {}).info.run_id
    lineage = registration.Lineage("chairs", "random", {}, "h", "sources:x", {})
    for name in ("first", "second", "first"):
        assert registration.register(client, name, run, tmp_path / "w.safetensors", lineage, None).name == name
    assert [len(model_versions.versions_of(client, name)) for name in ("first", "second")] == [1, 1]
