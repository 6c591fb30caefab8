"""Runs and registered models on a real MLflow server whose artifacts lie on S3."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import psutil
import pytest
import requests
import torch
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    PERMISSION_DENIED,
    RESOURCE_DOES_NOT_EXIST,
    TEMPORARILY_UNAVAILABLE,
    UNAUTHENTICATED,
)

from gmflow import GMFlow, predict_flow, save_weights
from pipelines import references
from pipelines.errors import OutageError, PipelineError
from pipelines.training import aliases, feed, mlflow_client, mlflow_patience, registration, tracking
from pipelines.training.config import MlflowConfig, shown_uri
from pipelines.training.data_config import MetricConfig, SetConfig
from pipelines.training.feed import FeedWriter, Record, listening
from pipelines.training.registration import Lineage
from tests.faulty_proxy import faulty_proxy
from tests.mlflow_server import MlflowServer, mlflow_running
from tests.pipelines.commands import TINY
from tests.seaweedfs import S3Server
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def mlflow_server(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_running(tmp_path_factory.mktemp("mlflow"), s3) as server:
        yield server


@pytest.fixture
def server(mlflow_server: MlflowServer) -> str:
    """Its URL."""
    return mlflow_server.url


def curriculum_run(
    server: str,
    key: str,
    tell: Callable[[str], None] = pytest.fail,
    patience_s: float = 300.0,
    experiment: str = "gmflow",
) -> tracking.CurriculumRun:
    config = MlflowConfig(tracking_uri=server, patience_s=patience_s, experiment=experiment)
    return tracking.CurriculumRun(mlflow_client.connect(server), config, "test", key, tell)


@pytest.fixture
def stage_run(server: str, request: pytest.FixtureRequest) -> tracking.TrackedRun:
    return curriculum_run(server, request.node.name).child("chairs", key=f"{request.node.name}/chairs")


def lineage(stage: str, config_hash: str, epe: float) -> Lineage:
    return Lineage(stage, "random", {"chairs": "file:///c"}, config_hash, "sources:x", {"val/c/val/epe": epe})


def history(run: tracking.TrackedRun, metric: str) -> list[tuple[int, float]]:
    return [(entry.step, entry.value) for entry in run.client.get_metric_history(run.run_id, metric)]


def test_a_second_attempt_finds_the_same_runs(server, stage_run, request):
    again = curriculum_run(server, request.node.name)
    assert again.child("chairs", key=f"{request.node.name}/chairs").run_id == stage_run.run_id
    other = curriculum_run(server, "another config")
    assert other.run_id != again.run_id


def test_a_lost_answer_makes_no_run_version_or_experiment_twice(server, tmp_path: Path):
    """The server did what it was asked for. Whoever asks again without looking has it done twice."""
    weights = tmp_path / "model.safetensors"
    save_weights(GMFlow(TINY), weights)
    told: list[str] = []
    with faulty_proxy(server) as between:
        met: set[str] = set()

        def is_first(method: str, path: str) -> bool:
            new = method == "POST" and path.endswith("/create") and path not in met
            met.update([path] if new else [])
            return new

        between.applies, between.faults = is_first, ["cut"] * 9
        run = curriculum_run(between.endpoint, "lost", told.append, experiment="lost answers")
        stage = run.child("chairs", key="lost/chairs")
        found = lineage("chairs", "h1", 3.0)
        version = run.patience(registration.register, run.client, "lost", stage.run_id, weights, found, None)
    assert {path.rpartition("2.0/mlflow/")[2] for path in met} == {
        *("experiments/create", "runs/create", "registered-models/create", "model-versions/create")
    }
    assert [line.partition(" (")[0] for line in told] == ["MLflow is away", "MLflow answers again"] * 3
    client = mlflow_client.connect(server)
    experiment = client.get_experiment_by_name("lost answers").experiment_id
    assert {each.info.run_id for each in client.search_runs([experiment])} == {run.run_id, stage.run_id}
    assert [each.version for each in client.search_model_versions("name = 'lost'")] == [version.version]
    assert len(client.search_logged_models([experiment])) == 1


def test_an_mlflow_that_answered_before_is_not_asked_first(server):
    """Where the driver connects to Ray anew, MLflow may be away; what asks it next waits."""
    with pytest.raises(OutageError, match="does not answer"):
        mlflow_client.connect("http://127.0.0.1:9")
    assert mlflow_client.connect("http://127.0.0.1:9", answered=True).tracking_uri == "http://127.0.0.1:9"
    mlflow_client.connect(server)


def test_a_driver_that_was_taken_over_writes_no_more_to_mlflow(server, stage_run, request):
    """It stood still, and wakes with records that the other driver has logged long since."""
    held = True
    config = MlflowConfig(tracking_uri=server)
    run = tracking.CurriculumRun(stage_run.client, config, "test", request.node.name, pytest.fail, lambda: held)
    old = run.child("chairs", key=f"{request.node.name}/chairs")
    old.log(Record(2, {"train/loss": 1.0}))

    def work() -> None:
        nonlocal held
        with run.running(old.run_id):
            held = False
            stage_run.log(Record(4, {"train/loss": 2.0}))
            old.log(Record(4, {"train/loss": 2.0}))
            old.log(Record(6, {"train/loss": 3.0}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert history(stage_run, "train/loss") == [(2, 1.0), (4, 2.0)]
    assert stage_run.client.get_run(old.run_id).info.status == "RUNNING"


def test_a_driver_that_was_taken_over_while_it_waited_for_mlflow_writes_no_more(server, request, monkeypatch):
    """Its machine was suspended meanwhile: the other driver may be at an earlier step, or has told the same."""
    held = True
    client, config = mlflow_client.connect(server), MlflowConfig(tracking_uri=server)
    run = tracking.CurriculumRun(client, config, "test", request.node.name, lambda line: None, lambda: held)

    def refuse(*_: object) -> None:
        nonlocal held
        held = False
        monkeypatch.setattr(client, "log_batch", real)
        raise MlflowException("away", TEMPORARILY_UNAVAILABLE)

    real = client.log_batch
    monkeypatch.setattr(client, "log_batch", refuse)
    run.own.log(Record(2, {"train/loss": 1.0}))
    assert history(run.own, "train/loss") == []


def test_an_end_waits_only_a_moment_for_an_mlflow_that_is_silent(stage_run, monkeypatch):
    monkeypatch.setattr(tracking, "_MOMENT_S", 0.1)
    silence = threading.Event()
    silent = SimpleNamespace(update_run=lambda *_, **__: None, set_terminated=lambda *_: silence.wait())
    with pytest.raises(KeyboardInterrupt), tracking.run_status(silent, "run"):
        raise KeyboardInterrupt
    silence.set()


def test_steps_told_again_after_a_resume_are_not_told_twice(server, stage_run, request):
    for step in (2, 4, 6):
        stage_run.log(Record(step, {"train/loss": step / 10}))
    resumed = curriculum_run(server, request.node.name).child("chairs", key=f"{request.node.name}/chairs")
    for step in (4, 6, 8):
        resumed.log(Record(step, {"train/loss": step / 10, "val/epe": 1.0}))
    assert history(stage_run, "train/loss") == [(2, 0.2), (4, 0.4), (6, 0.6), (8, 0.8)]
    assert history(stage_run, "val/epe") == [(4, 1.0), (6, 1.0), (8, 1.0)]


def test_a_registered_model_is_the_same_one_and_opens_no_pickle(server, stage_run, tmp_path: Path, monkeypatch):
    model = GMFlow(TINY).eval()
    save_weights(model, tmp_path / "model.safetensors")
    version = registration.register(
        stage_run.client, "pulled", stage_run.run_id, tmp_path / "model.safetensors", lineage("chairs", "h1", 3.0), None
    )
    pulled = references.resolve_model("models:/pulled@champion", server)
    assert pulled.config == TINY
    assert all(torch.equal(tensor, pulled.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert version.tags["config_hash"] == "h1"

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 56, 3), dtype=np.uint8)
    (flow,) = mlflow.pyfunc.load_model("models:/pulled/1").predict([{"image0": frames[0], "image1": frames[1]}])
    np.testing.assert_array_equal(flow, predict_flow(model, frames[0], frames[1]))
    local = Path(mlflow.artifacts.download_artifacts("models:/pulled/1", dst_path=str(tmp_path / "local")))
    assert not [path for path in local.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_registering_again_gives_the_first_version_and_champion_moves_only_when_better(stage_run, tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    save_weights(GMFlow(TINY), weights)
    rule = MetricConfig(data="c", subset="val")

    def register(stage: str, config_hash: str, epe: float) -> str:
        found = lineage(stage, config_hash, epe)
        return registration.register(stage_run.client, "ruled", stage_run.run_id, weights, found, rule).version

    def alias(name: str) -> str:
        return stage_run.client.get_model_version_by_alias("ruled", name).version

    first = register("chairs", "h1", 3.0)
    assert register("chairs", "h1", 3.0) == first
    torch.manual_seed(1)  # retrained after a change of the code
    save_weights(GMFlow(TINY), weights)
    retrained = register("chairs", "h1", 3.0)
    assert retrained != first
    assert (alias("chairs"), alias("champion")) == (retrained, first)
    first = retrained
    stage_run.client.set_registered_model_alias("ruled", "champion", first)
    unmeasured = replace(lineage("chairs", "h9", 0.0), metrics={})
    registration.register(stage_run.client, "ruled", stage_run.run_id, weights, unmeasured, rule)
    assert alias("champion") == first
    stage_run.client.set_registered_model_alias("ruled", "chairs", first)
    worse = register("things", "h2", 3.5)
    assert worse != first
    assert (alias("things"), alias("champion")) == (worse, first)
    better = register("kitti", "h3", 2.5)
    assert (alias("champion"), alias("chairs")) == (better, first)


def test_figures_of_other_pairs_dethrone_no_champion(stage_run, tmp_path: Path, caplog):
    weights = tmp_path / "model.safetensors"
    save_weights(GMFlow(TINY), weights)
    rule = MetricConfig(data="c", subset="val")
    versions = {"c": "0123456789abcdef"}

    def register(config_hash: str, epe: float, limit: int | None) -> str:
        measured = registration.measured_on([SetConfig(data="c", subset="val", limit=limit)], versions)
        found = replace(lineage("chairs", config_hash, epe), measured=measured)
        return registration.register(stage_run.client, "measured", stage_run.run_id, weights, found, rule).version

    def champion() -> str:
        return stage_run.client.get_model_version_by_alias("measured", "champion").version

    whole = register("h1", 3.0, None)
    register("h2", 1.0, 20)
    assert champion() == whole
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("pipelines")]
    assert "c/val was measured on other pairs (0123456789abcdef, not 0123456789abcdef[:20])" in told
    assert champion() != register("h3", 3.5, None)
    stage_run.client.delete_model_version_tag("measured", whole, "measured.c.val")  # of before there was such a tag
    assert champion() == whole
    assert register("h4", 2.5, None) == champion()


def test_a_champion_that_the_server_did_not_tell_of_is_not_dethroned(server, stage_run, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    weights = tmp_path / "model.safetensors"
    save_weights(GMFlow(TINY), weights)
    best, worse = lineage("chairs", "h1", 1.0), lineage("things", "h2", 99.0)

    def register(run: tracking.CurriculumRun, found: Lineage) -> str:
        rule = MetricConfig(data="c", subset="val")
        return run.patience(registration.register, run.client, "busy", stage_run.run_id, weights, found, rule).version

    champion = register(curriculum_run(server, "busy"), best)
    other = register(curriculum_run(server, "busy"), worse)
    with faulty_proxy(server) as proxy:
        run = curriculum_run(proxy.endpoint, "busy", tell=lambda line: None)
        proxy.applies = lambda method, path: method == "GET" and "alias=champion" in path
        proxy.faults = ["503"]
        assert register(run, worse) == other  # as an attempt that ended before it said so
        assert not proxy.faults
    assert stage_run.client.get_model_version_by_alias("busy", "champion").version == champion


def test_a_missing_model_names_those_there_are(server, stage_run, tmp_path: Path):
    save_weights(GMFlow(TINY), tmp_path / "model.safetensors")
    registration.register(
        stage_run.client, "named", stage_run.run_id, tmp_path / "model.safetensors", lineage("chairs", "h1", 1.0), None
    )
    with pytest.raises(PipelineError, match=r"models:/named@best: no such model.*models:/named@champion"):
        references.resolve_model("models:/named@best", server)


def test_a_server_that_is_away_for_a_while_gets_everything_in_order_and_once(mlflow_server, server):
    told: list[str] = []
    run = curriculum_run(server, "away", told.append).child("chairs", key="away/chairs")
    run.log(Record(2, {"train/loss": 2.0}))
    mlflow_server.kill()
    back = threading.Timer(4, mlflow_server.start)
    back.start()
    for step in range(4, 20, 2):
        run.log(Record(step, {"train/loss": float(step)}, pictures={f"{step}.png": b"png"} if step == 8 else {}))
    back.join()
    assert history(run, "train/loss") == [(step, float(step)) for step in range(2, 20, 2)]
    assert [artifact.path for artifact in run.client.list_artifacts(run.run_id, "pictures")] == ["pictures/8.png"]
    away, back_again = told
    assert away.startswith("MLflow is away (")
    assert "kept and sent when it answers" in away
    assert back_again == "MLflow answers again"


def test_a_run_is_asked_for_the_history_only_of_what_it_was_told(server):
    with faulty_proxy(server) as proxy:

        def histories() -> int:
            return sum("get-history" in path for _, path, _ in proxy.seen)

        run = curriculum_run(proxy.endpoint, "fresh", tell=lambda line: None).child("chairs", key="fresh")
        for step in (2, 4):
            run.log(Record(step, {f"train/{number}": 1.0 for number in range(20)}))
        assert proxy.seen
        assert histories() == 0
        resumed = curriculum_run(proxy.endpoint, "fresh", tell=lambda line: None).child("chairs", key="fresh")
        resumed.log(Record(4, {"train/0": 1.0, "val/epe": 1.0}))
        assert histories() == 20
        assert history(run, "train/0") == [(2, 1.0), (4, 1.0)]
        assert history(run, "val/epe") == [(4, 1.0)]


def test_what_was_heard_but_not_answered_is_not_told_twice(server):
    with faulty_proxy(server) as proxy:
        proxy.applies = lambda method, path: path.endswith("log-batch")
        run = curriculum_run(proxy.endpoint, "unanswered", tell=lambda line: None).child("chairs", key="unanswered")
        proxy.faults = ["cut"]
        run.log(Record(2, {"train/loss": 2.0}))
        proxy.faults += ["cut", "503", "drop"]
        for step in (4, 6):
            run.log(Record(step, {"train/loss": float(step)}))
        assert not proxy.faults
        assert history(run, "train/loss") == [(2, 2.0), (4, 4.0), (6, 6.0)]


def test_patience_ends(server):
    with faulty_proxy(server) as proxy:
        run = curriculum_run(proxy.endpoint, "impatient", tell=lambda line: None, patience_s=2.0)
        stage = run.child("chairs", key="impatient/chairs")
        proxy.applies = lambda method, path: path.endswith("log-batch")
        proxy.faults = ["503"] * 1000
        with pytest.raises(OutageError, match=r"longer than mlflow\.patience_s 2 .*the same command goes on"):
            stage.log(Record(2, {"train/loss": 2.0}))


def refused(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} for the model", response=response)


def failed_upload(status: int) -> S3UploadFailedError:
    answer = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = S3UploadFailedError(f"upload: {status}")
    error.__cause__ = ClientError(answer, "PutObject")
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (requests.ConnectionError("refused"), True),
        (requests.Timeout("silent"), True),
        *((refused(status), status in (429, 500, 503)) for status in (401, 403, 404, 413, 429, 500, 503)),
        *((failed_upload(status), status in (429, 503)) for status in (403, 404, 429, 503)),
        (EndpointConnectionError(endpoint_url="http://s3"), True),
        (NoCredentialsError(), False),
        (MlflowException("busy", error_code=TEMPORARILY_UNAVAILABLE), True),
        (MlflowException("no", error_code=PERMISSION_DENIED), False),
        (MlflowException("no such name", error_code=INVALID_PARAMETER_VALUE), False),
        (MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST), False),
    ],
    ids=str,
)
def test_only_what_may_pass_is_waited_for(error: Exception, passes: bool):
    """A proxy that allows no large body, or credentials that lack: waiting for an hour would mend neither."""
    attempts = []

    def work() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            raise error
        return "done"

    patience = mlflow_patience.Patience(3600.0, lambda line: None)
    if passes:
        assert patience(work) == "done"
    else:
        is_an_answer = "no such run" in str(error)
        with pytest.raises(MlflowException if is_an_answer else mlflow_patience.RefusedError) as told:
            patience(work)
        assert str(error) in str(told.value)
        assert len(attempts) == 1


def test_a_server_that_refuses_to_answer_does_not_hold_nothing(server, monkeypatch):
    """A run that is not there is trained again; one that nobody may see, for now, is not."""
    curriculum = curriculum_run(server, "holds")
    assert curriculum.holds(curriculum.run_id)
    assert not curriculum.holds("0" * 32)

    def refuse(run_id: str) -> None:
        raise MlflowException("not yours", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(curriculum.client, "get_run", refuse)
    with pytest.raises(mlflow_patience.RefusedError, match="not yours"):
        curriculum.holds(curriculum.run_id)


def test_a_picture_that_is_refused_keeps_no_metric_back(server, monkeypatch):
    told: list[str] = []
    run = curriculum_run(server, "picture", told.append).child("chairs", key="picture/chairs")

    def refuse(*_: object) -> None:
        raise refused(413)

    monkeypatch.setattr(run.client, "log_artifact", refuse)
    for step in (2, 4):
        run.log(Record(step, {"train/loss": 1.0}, pictures={f"{step}.png": b"png"} if step == 2 else {}))
    assert history(run, "train/loss") == [(2, 1.0), (4, 1.0)]
    (line,) = told
    assert line.startswith("2.png is not kept: ")
    assert "413" in line


def test_a_stage_that_was_interrupted_is_one_run_whatever_changed_after_it(server, request):
    """A later stage's config decides the curriculum's run, not the run of the stage before it."""
    first = curriculum_run(server, f"{request.node.name}, later stage long")
    first.client.update_run(first.run_id, status="RUNNING")
    begun = first.child("chairs", key="file:///storage/chairs-1")
    second = curriculum_run(server, f"{request.node.name}, later stage short")
    gone_on = second.child("chairs", key="file:///storage/chairs-1")
    assert gone_on.run_id == begun.run_id
    assert second.client.get_run(begun.run_id).data.tags["mlflow.parentRunId"] == second.run_id
    assert second.client.get_run(first.run_id).info.status == "KILLED", "nobody would ever end it"


@pytest.mark.usefixtures("local_ray")
def test_after_a_record_that_could_not_be_kept_none_is_kept_before_it():
    """A resume tells what is newer than the newest kept one: the gap would stay."""
    kept: list[int] = []

    def keep(record: Record) -> None:
        if record.step == 4:
            raise PipelineError("MLflow was away for too long")
        kept.append(record.step)

    shown: list[str] = []

    def tell() -> None:
        with listening("feed-gap", lambda record: shown.append(record.line), keep):
            for step in (2, 4, 6, 8):
                FeedWriter("feed-gap").send(Record(step))
            wait_until(lambda: any("nothing further is tracked" in line for line in shown))  # while the stage goes on

    with pytest.raises(PipelineError, match="too long"):
        tell()
    assert kept == [2]


@pytest.mark.usefixtures("local_ray")
def test_an_error_does_not_wait_for_a_server_that_is_away(monkeypatch):
    """Nor does ^C, which would else seem to do nothing for an hour."""
    monkeypatch.setattr(feed, "_KEPT_AFTER_AN_ERROR_S", 0.2)
    back, kept = threading.Event(), []

    def keep(record: Record) -> None:
        kept.append(record.step)
        back.wait()

    def interrupted() -> None:
        with listening("feed-away", lambda record: None, keep):
            for step in (2, 4):
                FeedWriter("feed-away").send(Record(step))
            wait_until(lambda: kept)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    back.set()
    for thread in threading.enumerate():
        if thread.name == "keep":
            thread.join()
    assert kept == [2], "the next would be told behind the back of whoever goes on"


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (MlflowException("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_is_marked_as_running_and_then_by_how_it_ended(server, error: BaseException | None, status: str):
    run = curriculum_run(server, f"ends {status}")

    def marked() -> str:
        return str(run.client.get_run(run.run_id).info.status)

    run.client.set_terminated(run.run_id, "FAILED")  # an earlier attempt
    with contextlib.suppress(MlflowException, KeyboardInterrupt), run.running(run.run_id):
        assert marked() == "RUNNING"
        if error is not None:
            raise error
    assert marked() == status


def test_a_server_that_is_away_is_said_in_a_line(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(OutageError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer"):
        mlflow_client.connect("http://127.0.0.1:9")


@pytest.mark.parametrize("error", [UNAUTHENTICATED, PERMISSION_DENIED])
def test_wrong_credentials_are_no_silence(server, monkeypatch, error: int):
    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("You are not authenticated", error)

    monkeypatch.setattr(mlflow_client.MlflowClient, "search_experiments", refuse)
    with pytest.raises(PipelineError, match="refuses the credentials; check MLFLOW_TRACKING_USERNAME") as told:
        mlflow_client.connect(server)
    assert not isinstance(told.value, OutageError)


@pytest.mark.usefixtures("local_ray")
def test_what_is_told_last_is_kept():
    """Right before the end, when nobody will ask the queue in time any more."""
    told: list[int] = []
    with listening("feed-last", lambda record: None, lambda record: told.append(record.step)):
        writer = FeedWriter("feed-last")
        for step in range(20):
            writer.send(Record(step))
        writer.departures()  # answers after what was sent before
    assert told == list(range(20))


def test_a_database_without_a_server_has_no_place_for_models():
    """MLflow would keep them in the working folder, which for a job is the folder it was uploaded into."""
    refused = r"MLflow at postgresql\+psycopg2://db/runs: .* no place for models"
    with pytest.raises(PipelineError, match=refused) as told:
        mlflow_client._place_of_artifacts("postgresql+psycopg2://me:secret@db/runs")
    assert "secret" not in str(told.value)
    assert mlflow_client._place_of_artifacts("http://mlflow:5000") is None


def test_an_experiment_that_cannot_be_used_is_said(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client.connect(uri)
    uploaded = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123" / "mlruns"
    client.create_experiment("lost", artifact_location=str(uploaded))
    with pytest.raises(PipelineError, match=r"experiment 'lost' keeps its files in .*, where a job was uploaded"):
        tracking.start_run(client, "lost", "r", {})
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(PipelineError, match=r"experiment 'old' was deleted: restore it \(mlflow experiments restore"):
        curriculum_run(uri, "k", experiment="old")


def test_no_password_is_shown_or_kept():
    shown = MlflowConfig(tracking_uri="https://me:secret@mlflow.example/x").model_dump(mode="json")
    assert shown["tracking_uri"] == "https://mlflow.example/x"
    assert MlflowConfig(tracking_uri="https://me:secret@h").tracking_uri == "https://me:secret@h", "it is used"


@pytest.mark.usefixtures("local_ray")
def test_a_sign_of_life_ends_the_silence():
    with listening("feed-alive", lambda record: None, lambda record: None):
        writer = FeedWriter("feed-alive")
        wait_until(lambda: writer.silent_s() > 1)
        writer.live()
        assert writer.silent_s() < 1


@pytest.mark.usefixtures("local_ray")
def test_a_queue_whose_process_is_killed_is_there_again():
    told: list[int] = []
    with listening("feed-killed", lambda record: None, lambda record: told.append(record.step)):
        writer = FeedWriter("feed-killed")
        writer.send(Record(1))
        wait_until(lambda: told == [1])
        (queue,) = [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::_Queue")]
        queue.kill()
        wait_until(lambda: not queue.is_running())
        writer.send(Record(2))
        wait_until(lambda: told == [1, 2])


@pytest.mark.usefixtures("local_ray")
def test_what_a_killed_queue_held_comes_again(server, monkeypatch):
    monkeypatch.setattr(feed, "_POLL_SECONDS", 3.0)  # so that it is killed with a record in it
    run = curriculum_run(server, "queue").child("chairs", key="queue")
    with listening("feed-lost", lambda record: None, run.log):
        writer = FeedWriter("feed-lost")
        writer.send(Record(2, {"train/loss": 0.5}))
        writer.departures()  # answers after what was sent before
        (queue,) = [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::_Queue")]
        queue.kill()
        wait_until(lambda: not queue.is_running())
        writer.send(Record(4, {"train/loss": 0.25}, earlier=((2, {"train/loss": 0.5}),)))
        writer.send(Record(6, {"train/loss": 0.125}, earlier=((2, {"train/loss": 0.5}), (4, {"train/loss": 0.25}))))
    assert history(run, "train/loss") == [(2, 0.5), (4, 0.25), (6, 0.125)]


def test_a_link_that_cannot_be_looked_up_is_the_runs_id(server, monkeypatch):
    """At the end of a command whose work is done and registered."""
    run = curriculum_run(server, "linked")
    page = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert mlflow_client.run_link(server, "gmflow", run.run_id) == page
    assert mlflow_client.run_link(server, "no such experiment", run.run_id) == f"run {run.run_id}"

    def away(*_: object) -> None:
        raise MlflowException("away")

    monkeypatch.setattr(mlflow_client.MlflowClient, "get_experiment_by_name", away)
    assert mlflow_client.run_link(server, "gmflow", run.run_id) == f"run {run.run_id}"


def test_who_may_not_see_an_alias_is_not_told_that_there_is_none(stage_run, monkeypatch):
    """A model would take the place of a champion that was never compared with it."""
    assert aliases.version_by_alias(stage_run.client, "gmflow", "nobody") is None
    assert aliases.version_by_alias(stage_run.client, "no such model", "champion") is None

    def refuse(*_: object) -> None:
        raise MlflowException("not yours", error_code=PERMISSION_DENIED)

    monkeypatch.setattr(stage_run.client, "get_model_version_by_alias", refuse)
    with pytest.raises(MlflowException, match="not yours"):
        aliases.version_by_alias(stage_run.client, "gmflow", "champion")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000", "http://host:5000"),
        ("postgresql://user:p@ss@host/mlflow", "postgresql://host/mlflow"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_no_password_is_shown(uri, shown):
    assert shown_uri(uri) == shown


def test_a_finished_curriculum_stays_finished_when_another_takes_its_stage_over(server):
    first = curriculum_run(server, "over")
    first.child("chairs", key="stage/handed-on")
    first.client.set_terminated(first.run_id, "FINISHED")
    curriculum_run(server, "next").child("chairs", key="stage/handed-on")
    assert first.client.get_run(first.run_id).info.status == "FINISHED"


def test_of_a_finished_stage_the_curriculum_has_what_was_validated(server):
    run = curriculum_run(server, "stages")
    run.log_stage(2, {"val/chairs/val/epe": 1.5, "train/loss": 3.0})
    logged = run.client.get_run(run.run_id).data.metrics
    assert logged == {"val/chairs/val/epe": 1.5}
