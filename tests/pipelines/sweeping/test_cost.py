"""How latency and memory are measured, and kept."""

from dataclasses import replace

import pytest
import torch

from datasets_etl.storage import open_store
from gmflow import GMFlowConfig, execution
from gmflow.execution import runs_in
from pipelines.errors import PipelineError
from pipelines.sweeping import cost
from pipelines.sweeping.config import CostConfig
from pipelines.sweeping.cost import _allocated_on_cpu
from tests.pipelines.sweeping.made import REFINE


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_costs_model_runs_as_others_do_but_leaves_the_allocator_it_measures_alone(precision, monkeypatch):
    ran = []
    monkeypatch.setattr(cost, "padded_flow", lambda model, *images: ran.append(runs_in(model, None)))
    monkeypatch.setattr(
        execution, "keep_freed_memory_for_reuse", lambda: pytest.fail("the process keeps what is freed")
    )
    measured = CostConfig(height=32, width=32, cpus=torch.get_num_threads())
    meter = cost._Meter.__ray_metadata__.modified_class(measured, precision)
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
    for seconds in (0.1, 9.0, 0.2, 0.1, 0.3):
        record = cost._Record.load(store, first)
        record.add(store, 3 * 2**20, seconds, model, here)
    assert record.cost() == cost.Cost(*map(pytest.approx, (200.0, 100.0, 300.0, 3.0)))


def test_a_gpu_that_is_too_small_is_said_in_words(monkeypatch):
    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cost, "padded_flow", lacks)
    measured = CostConfig(height=32, width=48, cpus=torch.get_num_threads())
    meter = cost._Meter.__ray_metadata__.modified_class(measured, "fp32")
    with pytest.raises(PipelineError, match=r"cost at 32×48: the GPU's memory does not suffice; try .*cost\.height"):
        meter.measure(replace(REFINE, backbone_channels=(4, 4, 4), feature_channels=4, num_layers=1))
