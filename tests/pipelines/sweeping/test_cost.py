"""How latency and memory are measured, and kept."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from datasets_etl.storage import open_store
from gmflow import GMFlowConfig, execution
from gmflow.execution import runs_in
from pipelines.errors import OutageError, PipelineError
from pipelines.sweeping import cost
from pipelines.sweeping.config import CostConfig
from pipelines.sweeping.cost import _allocated_on_cpu
from tests.pipelines.sweeping.made import REFINE

METER: Any = cost._Meter

MODELS = {replace(REFINE, attn_splits=(splits, 8)): name for splits, name in ((1, "a"), (2, "b"), (4, "c"))}


class NoStartError(ActorDiedError):
    """Of an actor whose constructor fails."""

    actor_init_failed = True


class Meters:
    """In the place of the processes that measure. `lost_at` tells by the count of timings at which each is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost_at: dict[int, Exception] | None = None) -> None:
        self.lost_at = lost_at or {}
        self.timed: list[str] = []
        self.running = 0
        fakes: dict[str, Any] = {"machine": lambda: {"device": "CPU"}, "measure": self.measure}
        meter = SimpleNamespace(**{name: SimpleNamespace(remote=run) for name, run in fakes.items()})
        monkeypatch.setattr(
            cost, "_Meter", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.start(meter)))
        )
        monkeypatch.setattr(cost.ray, "get", lambda found: found)
        monkeypatch.setattr(cost, "fetched", lambda found: found)
        monkeypatch.setattr(cost.ray, "kill", self.end)

    def start(self, meter: object) -> Any:
        def started(*_: object) -> object:
            self.running += 1
            return meter

        return started

    def end(self, meter: object) -> None:
        self.running -= 1

    def measure(self, model: GMFlowConfig) -> tuple[int, float]:
        if (error := self.lost_at.pop(len(self.timed), None)) is not None:
            raise error
        self.timed.append(MODELS[model])
        return 2**20, float(len(self.timed))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_costs_model_runs_as_others_do_but_leaves_the_allocator_it_measures_alone(precision, monkeypatch):
    ran = []
    monkeypatch.setattr(cost, "padded_flow", lambda model, *images: ran.append(runs_in(model, None)))
    monkeypatch.setattr(
        execution, "keep_freed_memory_for_reuse", lambda: pytest.fail("the process keeps what is freed")
    )
    measured = CostConfig(height=32, width=32, cpus=torch.get_num_threads())
    meter = METER.__ray_metadata__.modified_class(measured, precision)
    meter.measure(replace(REFINE, backbone_channels=(4, 4, 4), feature_channels=4, num_layers=1))
    assert ran == [precision] * 2


def test_the_peak_is_what_was_held_at_once():
    def hold() -> None:
        first = torch.empty(2**20)  # 4 MiB
        second = torch.empty(2**20)
        del first, second
        torch.empty(2**19)

    assert _allocated_on_cpu(hold) == 8 * 2**20


def test_a_cost_is_kept_by_how_and_where_it_was_measured_and_is_the_median(tmp_path):
    model, here = GMFlowConfig.refine(), {"device": "CPU", "torch": "2"}
    usual = CostConfig()
    others = [{"height": 64}, {"width": 64}, {"cpus": 2}, {"clock": "cpu"}]
    keys = [cost._key(model, CostConfig(**other), "fp32", here) for other in others]
    keys += [cost._key(model, usual, "bf16", here), cost._key(model, usual, "fp32", here | {"device": "GPU"})]
    keys += [cost._key(replace(model, attn_splits=(1, 4)), usual, "fp32", here)]
    first = cost._key(model, usual, "fp32", here)
    assert len({first, *keys}) == len(keys) + 1
    assert cost._key(model, CostConfig(rounds=9), "fp32", here) == first
    store = open_store(str(tmp_path))
    for seconds in (0.3, 9.0, 0.1, 0.2, 0.1):
        record = cost._Record.load(store, first)
        record.add(store, 3 * 2**20, seconds, model, here)
    assert record.cost() == cost.Cost(*map(pytest.approx, (200.0, 100.0, 300.0, 3.0)))


def test_a_gpu_that_is_too_small_is_said_in_words(monkeypatch):
    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cost, "padded_flow", lacks)
    measured = CostConfig(height=32, width=48, cpus=torch.get_num_threads())
    meter = METER.__ray_metadata__.modified_class(measured, "fp32")
    with pytest.raises(PipelineError, match=r"cost at 32×48: the GPU's memory does not suffice; try .*cost\.height"):
        meter.measure(replace(REFINE, backbone_channels=(4, 4, 4), feature_channels=4, num_layers=1))


def test_settings_take_turns_forwards_and_backwards_and_none_is_timed_twice(tmp_path, monkeypatch):
    """A machine that slows down makes none look slower than the others."""
    store, told = open_store(str(tmp_path)), []
    meters = Meters(monkeypatch, {5: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        cost.measure_costs(store, MODELS, CostConfig(rounds=3), "fp32", told.append)
    found = cost.measure_costs(store, MODELS, CostConfig(rounds=3), "fp32", told.append)
    assert "".join(meters.timed) == "abccbaabc"
    assert meters.running == 0, "they hold CPUs and a GPU"
    assert [found[model].latency_ms for model in MODELS] == [6000.0, 5000.0, 4000.0]
    assert told[-1] == "cost round 3/3 3/3 c 9000 ms"
    more = cost.measure_costs(store, MODELS, CostConfig(rounds=2), "fp32", pytest.fail)
    assert more == found


def test_a_measuring_process_is_replaced_a_few_times_but_not_if_none_can_start(tmp_path, monkeypatch):
    store, told = open_store(str(tmp_path)), []
    meters = Meters(monkeypatch, {n: ActorDiedError() for n in range(3)})
    assert cost.measure_costs(store, MODELS, CostConfig(rounds=2), "fp32", told.append).keys() == MODELS.keys()
    assert sum("was lost" in line for line in told) == 3
    meters.lost_at = {n: ActorDiedError() for n in range(6, 10)}
    with pytest.raises(OutageError, match="was lost 4 times"):
        cost.measure_costs(store, MODELS, CostConfig(rounds=9), "fp32", told.append)
    meters.lost_at = {9: NoStartError()}
    with pytest.raises(NoStartError):
        cost.measure_costs(store, MODELS, CostConfig(rounds=9), "fp32", pytest.fail)
    assert meters.running == 0


@pytest.mark.parametrize(("clock", "seconds"), [("wall", 3.0), ("cpu", 2.0)])
def test_a_pass_is_timed_by_the_clock_that_was_asked_for_and_warms_up_once(monkeypatch, clock, seconds):
    passed = []
    fakes = {"perf_counter": lambda: 3.0 * len(passed), "process_time": lambda: 2.0 * len(passed)}
    monkeypatch.setattr(cost, "time", SimpleNamespace(**fakes))
    monkeypatch.setattr(cost, "padded_flow", lambda model, *images: passed.append(images[0].shape[-2:]))
    measured = CostConfig(height=32, width=48, cpus=torch.get_num_threads(), clock=clock)
    meter = METER.__ray_metadata__.modified_class(measured, "fp32")
    model = replace(REFINE, backbone_channels=(4, 4, 4), feature_channels=4, num_layers=1)
    assert [meter.measure(model)[1] for _ in range(2)] == [seconds] * 2
    assert passed == [(32, 48)] * 3
    assert meter.machine()["torch"] == torch.__version__, "another one may be faster"
