"""What the probe computes once, and keeps."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datasets_etl.storage_retries import PATIENCE_VARIABLE
from gmflow import GMFlow
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.predict import padded_flow
from pipelines.errors import PipelineError
from pipelines.sweeping import accuracy
from pipelines.sweeping.accuracy import SharedFeatures, Weights, score_jobs
from pipelines.sweeping.settings import Setting
from pipelines.training.data_config import SetConfig
from tests.pipelines.sweeping.made import MANIFESTS, REFINE

SCORE: Any = accuracy.score_settings


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settings_that_share_their_features_are_computed_as_alone_to_the_bit(precision: Precision):
    torch.manual_seed(0)
    small = replace(REFINE, backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    models = [GMFlow(replace(small, corr_radius=(-1, r), prop_radius=(-1, p))).eval() for r, p in ((2, 1), (3, 2))]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        prepare_model(model, ExecutionConfig(precision), keep_freed_memory=False)
    pairs = [255 * torch.rand(2, 1, 3, 50, 70) for _ in range(2)]
    with torch.inference_mode():
        alone = [[padded_flow(model, *pair) for model in models] for pair in pairs]
        shared = SharedFeatures(models)
        together = [[padded_flow(model, *pair) for model in shared.each()] for pair in pairs]
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not torch.equal(*found), "the radii differ, so must the flow"


def test_a_probes_task_waits_for_storage_as_the_sweep_does(tree, load, monkeypatch):
    """On another machine, or in a process that Ray started before, it has not the driver's environment."""
    config = load(tree, "tune.machine={storage_patience_s: 33}")
    waits = []
    monkeypatch.setattr(accuracy, "_scores", lambda job, device: waits.append(os.environ[PATIENCE_VARIABLE]))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    (chosen,) = config.probe.validation
    SCORE._function(SimpleNamespace(chosen=chosen), config.probe, config.storage_patience_s)
    assert waits == ["33.0"]


def test_a_probes_figures_are_kept_by_all_that_decides_them():
    setting = Setting((2, 8), (-1, 4), (-1, 1))

    def key(version: str = "v", manifest_version: str = "m", precision: Any = "fp32", **chosen: Any) -> str:
        whole = SetConfig(**{"data": "chairs", "subset": "val"} | chosen)
        weights_of = Weights("w.safetensors", version, "w.pth")
        stored: Any = SimpleNamespace(url="c.json", version=manifest_version)
        (job,) = score_jobs(weights_of, [setting], whole, stored, precision)
        return job.key(setting)

    keys = [key(), key("w"), key(manifest_version="n"), key(precision="bf16"), key(subset="train"), key(limit=2)]
    keys += [key(only=("0*",)), key(without=("0*",)), key(only=("1*",))]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_gpu_that_is_too_small_for_the_probe_is_said_in_words(monkeypatch):
    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(accuracy, "_scores", lacks)
    chosen = SetConfig(data="chairs", subset="val")
    (job,) = score_jobs(Weights("w", "v", "w.pth"), [Setting.of(REFINE)], chosen, MANIFESTS["chairs"], "fp32")
    probe: Any = SimpleNamespace(cpus=torch.get_num_threads(), use_gpu=False)
    with pytest.raises(PipelineError, match=r"probe on chairs/val: the GPU's memory does not suffice"):
        SCORE._function(job, probe, 1.0)
