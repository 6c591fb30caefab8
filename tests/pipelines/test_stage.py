"""A stage's loop as its only worker runs it, in this process: what of the config decides the weights, what is kept."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch

from datasets_etl.augment import AugmentConfig
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from gmflow import load_model
from gmflow.execution import ExecutionConfig
from gmflow.metrics import ErrorMetrics
from pipelines.config_file import load_config
from pipelines.errors import PipelineError
from pipelines.scoring import evaluate
from pipelines.training import beginning, group, interval, launch, stage, worker_log
from pipelines.training.config import CurriculumConfig
from pipelines.training.data_config import PartConfig
from pipelines.training.feed import Record
from pipelines.training.machine_config import MachineConfig
from pipelines.training.plan import plan_curriculum
from pipelines.training.watchdog import Watchdog
from tests.pipelines.conftest import Workplace

EPE = "val/chairs/val/epe"
STEPS = 3


class Trained:
    """A worker, and what it told."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config = config
        self.told: list[Record] = []
        (plan,) = plan_curriculum(config)
        beginning.provide_initial_weights(plan.folder, config.model, config.seed, None, None)
        feed: Any = SimpleNamespace(send=self.told.append)
        self.worker = stage._Worker(plan.job, feed, Watchdog(900.0, lambda step, text: None, lambda: None))

    def run(self) -> "Trained":
        stage._train(self.worker)
        return self

    def history(self, metric: str) -> list[tuple[int, float]]:
        return [(record.step, record.metrics[metric]) for record in self.told if metric in record.metrics]

    def weights(self, folder: Path) -> tuple[Path, dict[str, float]]:
        """As a stage ends: its file, and its metrics."""
        snapshot = self.worker.checkpoints.newest(pytest.fail)
        assert snapshot is not None
        return folder / "w.safetensors", launch.final_weights(snapshot, self.config.model, folder / "w.safetensors")


@pytest.fixture
def begin(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trained]:
    """The tiny curriculum's first stage, about to train, each time in a storage of its own."""
    context = SimpleNamespace(get_world_rank=lambda: 0, get_local_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(stage, "broadcast_from_rank_zero", lambda value: value)
    places = (workplace.folder / f"storage-{number}" for number in itertools.count())

    def _begin(*overrides: str) -> Trained:
        own = ["only=[chairs]", f"storage={next(places)}", "machine={micro_batch: 2}", f"stages.chairs.steps={STEPS}"]
        return Trained(load_config(CurriculumConfig, str(workplace.write()), [*own, *overrides]))

    return _begin


RECIPE = {
    "steps": "4",
    "global_batch": "3",
    "peak_lr": "2e-3",
    "crop": "[32, 64]",
    "weight_decay": "1e-2",
    "warmup": "0.5",
    "clip_norm": "0.1",
    "gamma": "0.5",
    "max_flow": "0.5",
    "ema_decay": "0.5",
    "mixture": "[{data: chairs, subset: train, min_log2_scale: -0.1, max_log2_scale: 0.3, hflip: 0.5, repeats: 2}]",
    "name": "",  # leads the folder's name
}


def test_all_that_is_in_the_recipe_decides_the_weights_and_nothing_else(begin, tmp_path: Path):
    """A value that does not reach the loop trains for weeks as if it were the usual one."""

    def bits(*overrides: str) -> bytes:
        trained = begin(*overrides).run()
        path, _ = trained.weights(tmp_path)
        return path.read_bytes()

    usual = bits()
    assert bits("machine={micro_batch: 2, checkpointing: full}", "stages.chairs.log_every=1") == usual
    changed = [f"stages.chairs.{key}={value}" for key, value in RECIPE.items() if value]
    assert [override for override in (*changed, "precision=bf16", "seed=8") if bits(override) == usual] == []
    assert set(begin().config.stages[0].recipe()) == set(RECIPE)


def test_pairs_that_are_held_out_are_not_trained_on_and_those_alone_validate(begin):
    worker = begin(
        "stages.chairs.mixture=[{data: chairs, subset: train, without: ['*1']}]",
        "stages.chairs.validation=[{data: chairs, subset: train, only: ['*1'], limit: 3}]",
        "promotion=null",
    ).worker
    (trained,), validated = worker.dataset.selections, worker.validation["chairs/train"]
    samples = validated.manifest.samples
    names = [samples[int(number)].name for number in (*trained, *validated.indices)]
    assert sorted(names) == sorted(sample.name for sample in samples if sample.subset == "train")
    assert [name.endswith("1") for name in names] == [False] * len(trained) + [True] * len(validated)


def test_a_cache_that_keeps_nothing_is_told_once(begin, tmp_path: Path):
    """Whoever pays for each request would notice by the bill."""
    (tmp_path / "file").touch()
    trained = begin(f"machine.cache={{folder: {tmp_path / 'file'}, gib: 1}}").run()
    (told,) = [record.line for record in trained.told if record.line and "machine.cache" in record.line]
    assert f"every sample is read from storage each time: {tmp_path / 'file'}: " in told
    usual = begin(f"machine.cache={{folder: {tmp_path / 'cache'}, gib: 1}}").run()
    assert not [record.line for record in usual.told if record.line and "machine.cache" in record.line]


def test_the_recipe_is_all_but_what_is_watched(begin):
    watched = {"validation", "validate_every", "checkpoint_every", "keep_last", "keep_best", "log_every", "gates"}
    chosen = begin().config.stages[0]
    assert set(type(chosen).model_fields) - set(chosen.recipe()) == watched | {"max_skipped_in_a_row"}


def test_augmentation_and_execution_are_those_of_the_config():
    part = PartConfig(data="c", subset="s", min_log2_scale=-0.2, max_log2_scale=0.6, hflip=0.5, vflip=0.1)
    manifest = Manifest("chairs", ())
    assert part.build(manifest, (32, 48)).augmentation == AugmentConfig((32, 48), -0.2, 0.6, 0.5, 0.1)
    usual = MachineConfig(checkpointing="selective").execution("bf16", ddp=True)
    assert usual == ExecutionConfig("bf16", "selective", ddp=True, replay=True, same_bits=True)
    assert MachineConfig(compile=True).execution("fp32").replay is False


def test_averaged_weights_are_what_is_validated_and_what_a_stage_ends_with(begin, tmp_path: Path):
    trained = begin("stages.chairs.ema_decay=0.5", "stages.chairs.validate_every=1", "stages.chairs.peak_lr=1e-2")
    name, mean, found = "backbone.stem.weight", None, []
    update = trained.worker.step.update

    def updated(sums: Any) -> Any:
        nonlocal mean
        told = update(sums)
        newest = trained.worker.state.model.state_dict()[name].clone()
        mean = newest if mean is None else 0.5 * mean + 0.5 * newest
        found.append(newest)
        return told

    trained.worker.step.update = updated
    trained.run()
    path, metrics = trained.weights(tmp_path)
    model = load_model(path)
    torch.testing.assert_close(model.state_dict()[name], mean)
    assert not torch.equal(model.state_dict()[name], found[-1])
    held_out = EvaluationSet(Manifest.load(trained.worker.job.data["chairs"]), "val")

    def epe(scored: Any) -> float:
        return evaluate(scored.eval(), held_out, torch.device("cpu")).pooled["epe"]

    assert metrics[EPE] == pytest.approx(epe(model), rel=1e-5)
    assert metrics[EPE] != pytest.approx(epe(trained.worker.state.model), rel=1e-5)


def test_a_skipped_step_changes_no_weight_and_is_counted_and_the_schedule_goes_on(begin):
    """Three in a row would be the end; three in all are not."""
    overrides = ("stages.chairs.steps=6", "stages.chairs.max_skipped_in_a_row=3", "stages.chairs.ema_decay=0.5")
    undisturbed = begin(*overrides).run()
    trained = begin(*overrides)
    accumulate, update = trained.worker.step.accumulate, trained.worker.step.update
    same = []

    def broken(batches: Any) -> Any:
        sums = accumulate(batches)
        return sums._replace(loss=math.nan) if trained.worker.state.step in (1, 3, 4) else sums

    def watched(sums: Any) -> Any:
        state = trained.worker.state
        before = [value.clone() for value in (*state.model.parameters(), *state.average.module.parameters())]
        told = update(sums)
        after = (*state.model.parameters(), *state.average.module.parameters())
        same.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return told

    trained.worker.step.accumulate, trained.worker.step.update = broken, watched
    trained.run()
    assert same == [False, True, False, True, True, False]
    assert trained.history("train/skipped_steps") == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert trained.history("train/lr") == undisturbed.history("train/lr")
    assert all(math.isfinite(loss) for _, loss in trained.history("train/loss"))


def test_gradients_in_16_bits_are_clipped_as_they_are_not_as_they_were_scaled(begin):
    norms = []
    for precision in ("fp32", "fp16"):
        trained = begin(f"precision={precision}")
        if precision == "fp16":
            trained.worker.state.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)  # as if the right one was found
        norms.append(trained.run().history("train/grad_norm")[0][1])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_the_best_checkpoint_stays_beside_the_newest(begin, monkeypatch: pytest.MonkeyPatch):
    epe = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    best = "stages.chairs.keep_best={data: chairs, subset: val}"
    trained = begin("stages.chairs.steps=5", "stages.chairs.validate_every=1", "stages.chairs.keep_last=1", best)

    def validate(*_: Any) -> tuple[dict[str, float], None]:
        trained.worker.writer.flush()  # the newest waits for it: a real validation takes longer than to write
        return {"epe": next(epe)}, None

    monkeypatch.setattr(stage, "validate", validate)
    trained.run()
    assert trained.worker.checkpoints.steps() == [5, 2]
    assert trained.worker.checkpoints.read(2)["validated"] == 2


def test_every_validation_set_is_told_and_only_its_first_pairs_where_limited(begin, monkeypatch: pytest.MonkeyPatch):
    sets = "[{data: chairs, subset: val}, {data: sintel, subset: training-clean, limit: 2}]"
    trained = begin(f"stages.chairs.validation={sets}")
    real, sizes = stage.validate, []

    def validate(model: Any, evaluation: EvaluationSet, *others: Any) -> Any:
        sizes.append(len(evaluation))
        return real(model, evaluation, *others)

    monkeypatch.setattr(stage, "validate", validate)
    trained.run()
    assert sizes == [3, 2]
    for name in ("chairs/val", "sintel/training-clean"):
        assert [step for step, _ in trained.history(f"val/{name}/epe")] == [STEPS]


def test_the_last_steps_are_told_though_log_every_does_not_divide_them(begin):
    trained = begin("stages.chairs.steps=5", "stages.chairs.log_every=2").run()
    assert [step for step, _ in trained.history("train/loss")] == [2, 4, 5]


class _Clock:
    """So many seconds a look."""

    def __init__(self, look_s: float = 1.0) -> None:
        self.now = 0.0
        self.look_s = look_s

    def perf_counter(self) -> float:
        self.now += self.look_s
        return self.now


def test_a_line_tells_the_time_of_the_steps_that_are_left(begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interval, "time", _Clock(look_s=5000.0))
    told = begin("stages.chairs.log_every=1", "stages.chairs.steps=4").run().told
    lines = {one.step: one.line for one in told if "train/loss" in one.metrics}
    assert " eta=" not in lines[1], "in the first step loaders start"
    assert [lines[step].partition(" eta=")[2] for step in (2, 3, 4)] == ["2:46:40", "1:23:20", "0:00:00"]


def test_a_record_tells_the_waits_of_all_its_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interval, "time", _Clock())
    told = interval.Interval()
    for waited in (0.5, 0.1, 0.2):  # in the first step loaders start
        told.add(interval.StepTotals(1.0, ErrorMetrics(), 1.0, applied=True, data_wait=waited))
    assert told.metrics(4)["time/data_wait"] == pytest.approx((0.1 + 0.2) / 2)


def test_so_many_skipped_steps_in_a_row_end_a_stage(begin):
    """One step earlier, an update that is applied begins the count anew."""
    trained = begin("stages.chairs.max_skipped_in_a_row=2", "stages.chairs.steps=9")
    bad = iter([True, False, True, False, False, True, True, False])
    real = trained.worker.step.accumulate
    trained.worker.step.accumulate = lambda batches: (
        real(batches)._replace(loss=math.nan) if next(bad) else real(batches)
    )
    with pytest.raises(PipelineError, match="2 steps in a row with a non-finite loss or gradient, the last at step 6"):
        trained.run()


@pytest.mark.parametrize(
    ("scale", "loss", "counted"), [(65536.0, 1.0, False), (1.0, 1.0, True), (65536.0, math.nan, True)]
)
def test_a_scale_that_is_still_searched_ends_no_stage(begin, monkeypatch, scale: float, loss: float, counted: bool):
    """With fp16 the first steps overflow by design, until the scale is found; a loss that is no number is no such."""
    worker = begin().worker
    monkeypatch.setattr(worker.state.scaler, "is_enabled", lambda: True)
    monkeypatch.setattr(worker.state.scaler, "get_scale", lambda: scale)
    worker.step._skip(loss, math.inf)
    assert (worker.state.skipped, worker.state.skipped_in_a_row) == (1, int(counted))


def test_a_validation_takes_no_time_of_the_steps(begin, monkeypatch: pytest.MonkeyPatch):
    clock = _Clock()
    monkeypatch.setattr(interval, "time", clock)
    trained = begin("stages.chairs.validate_every=1", "stages.chairs.log_every=1")

    def validate(*_: Any) -> tuple[dict[str, float], None]:
        clock.now += 1000
        return {"epe": 1.0}, None

    monkeypatch.setattr(stage, "validate", validate)
    trained.run()
    seconds = [value for _, value in trained.history("time/step_s")]
    assert len(seconds) == STEPS - 1, "not the first one, which loaders start in"
    assert max(seconds) < 10
    rates = [value for _, value in trained.history("time/samples_per_s")]
    assert rates == pytest.approx([4 / value for value in seconds])


def test_a_machines_loader_processes_and_cache_are_used(begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked, real = [], stage.TrainingStream
    monkeypatch.setattr(stage, "TrainingStream", lambda *a, workers, **how: asked.append(workers) or real(*a, **how))
    cache = f"{{folder: {tmp_path / 'cache'}, gib: 1}}"
    begin(f"machine={{micro_batch: 2, loader_workers: 2, cache: {cache}}}").run()
    assert asked == [2]
    assert any((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("waited", [0.2, 0.9])
def test_the_longest_wait_for_data_of_all_ranks_is_told(begin, monkeypatch: pytest.MonkeyPatch, waited: float):
    """All wait for the one whose loaders are slow."""
    worker = begin().worker
    monkeypatch.setattr(worker.group, "world_size", 2)
    monkeypatch.setattr(group.dist, "all_reduce", lambda sums: sums[-1].add_(0.7))  # what the other one adds
    found = worker.step._sum_over_ranks(torch.zeros((), dtype=torch.float64), ErrorMetrics(), waited)
    assert found.data_wait == pytest.approx(max(waited, 0.7))


def test_a_stage_that_resumes_tells_again_what_its_driver_may_have_lost(begin):
    told = begin("stages.chairs.log_every=1").run()
    again = Trained(told.config).run()
    assert [(one.step, one.metrics) for one in again.told if one.metrics] == [
        (one.step, one.metrics) for one in told.told if one.metrics
    ]


def test_a_record_carries_those_before_it_which_a_killed_queue_may_have_lost(begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_log, "_SENT_AGAIN", 2)
    told = [one for one in begin("stages.chairs.log_every=1").run().told if one.metrics]
    assert [one.step for one in told] == [1, 2, 3, 3]  # the last is the validation's
    metrics = [(one.step, one.metrics) for one in told]
    assert [one.earlier for one in told] == [(), tuple(metrics[:1]), tuple(metrics[:2]), tuple(metrics[1:3])]


@pytest.mark.parametrize("validating", [False, True])
def test_workers_with_a_notice_store_the_step_they_are_at_and_say_that_they_leave(begin, monkeypatch, validating: bool):
    """No checkpoint is due: what is not stored now is trained again. The driver must not take it for an end."""
    trained = begin("stages.chairs.validate_every=1" if validating else "stages.chairs.validate_every=2")
    left: list[int] = []
    trained.worker.feed.depart = lambda: left.append(trained.worker.state.step)
    trained.worker.group._asked = -math.inf  # long ago
    notice = SimpleNamespace(preempted_ranks=[0])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: notice)
    trained.run()
    assert left == [1]
    assert any("leaves: the machine of worker 0" in one.line for one in trained.told)
    saved = trained.worker.checkpoints.newest(pytest.fail)
    assert saved is not None
    assert (saved["step"], saved["validated"]) == (1, 0)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    again = Trained(trained.config).run()
    assert [step for step, _ in again.history(EPE)] == ([1, 2, 3] if validating else [2, 3])


def test_a_metric_of_no_pixel_is_told_as_no_value(begin, monkeypatch: pytest.MonkeyPatch):
    """MLflow and the registry would hold a figure that is none, and a decision compare with it."""
    monkeypatch.setattr(stage, "validate", lambda *_: ({"epe": 1.0, "s40_plus": math.nan}, None))
    trained = begin().run()
    assert trained.history(EPE) == [(STEPS, 1.0)]
    assert trained.history("val/chairs/val/s40_plus") == []


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda:1", True)])
def test_batches_are_pinned_for_gpus_alone(begin, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool):
    """A copy to a GPU goes on beside the pass before it only from memory that is pinned."""
    asked: list[bool] = []
    monkeypatch.setattr(stage, "TrainingStream", lambda *_, pinned, **how: asked.append(pinned) or ())
    worker = begin().worker
    monkeypatch.setattr(worker.group, "device", torch.device(device))
    assert list(worker.stream()) == []
    assert asked == [pinned]
