"""Weight files: ours and the published ones, written whole or not at all."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gmflow import (
    GMFlow,
    GMFlowConfig,
    GMFlowError,
    load_model,
    load_weights,
    save_weights,
)
from gmflow.weights import encode_weights, replace_file, save_published, weights_digest
from tests.gmflow.models import BASE, REFINE, TINY, tiny


@pytest.mark.parametrize("config", [BASE, REFINE], ids=["base", "refine"])
def test_our_weights_rebuild_the_model(config: GMFlowConfig, tmp_path: Path) -> None:
    model = tiny(config)
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    loaded = load_model(path)
    assert loaded.config == config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["gmflow_config"]) == config.to_dict()


def test_equal_models_are_equal_files() -> None:
    model = tiny(REFINE)
    assert len({encode_weights(model) for _ in range(20)}) == 1


@pytest.mark.parametrize("bare", [False, True], ids=["in a dict", "bare"])
@pytest.mark.parametrize("config", [BASE, REFINE], ids=["base", "refine"])
def test_published_layout_both_ways(config: GMFlowConfig, bare: bool, tmp_path: Path) -> None:
    model = tiny(config)
    path = tmp_path / "model.pth"
    save_published(model, path)
    if bare:
        torch.save(torch.load(path, weights_only=True)["model"], path)
    loaded = load_model(path)
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_windows_and_radii_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(tiny(), path)
    assert load_model(path, corr_radius=(-1, 2), attn_splits=(1, 4)).size_multiple == 16
    assert load_model(path, prop_radius=(-1, 2)).config.prop_radius == (-1, 2)
    with pytest.raises(GMFlowError, match="corr_radius"):
        load_model(path, corr_radius=(4,))


def test_published_files_hold_124_and_123_tensors(reference: Path) -> None:
    for name, config in (
        ("gmflow_refine_published", GMFlowConfig.refine()),
        ("gmflow_base_random", GMFlowConfig.base()),
    ):
        model = GMFlow(config)
        load_weights(model, reference / f"{name}.pth")
        assert load_model(reference / f"{name}.pth").config == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 3}, "num_layers is 2, the model's is 3"),
        ({"feature_channels": 16}, "feature_channels is 8"),
        ({"backbone_channels": (4, 6, 10)}, "backbone_channels"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_another_architecture_is_named_in_one_line(
    change: dict[str, Any], named: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    (save_weights if suffix == ".safetensors" else save_published)(tiny(BASE), path)
    other = GMFlow(GMFlowConfig(**{**TINY, **change}))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(GMFlowError, match=named) as error:
        load_weights(other, path)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_missing_and_damaged_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(GMFlowError, match="no such weight file"):
        load_model(path)
    (save_weights if suffix == ".safetensors" else save_published)(tiny(), path)
    content = path.read_bytes()
    foreign = (b"", b"not weights at all", b"and more text", b"\x80", b"\x80\x02X\x10")
    for damaged in (content[: len(content) // 2], *foreign):
        path.write_bytes(damaged)
        with pytest.raises(GMFlowError, match="damaged") as error:
            load_model(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (None, "not written by gmflow.save_weights"),
        ({"gmflow_config": "{"}, "its gmflow_config is no model configuration"),
        ({"gmflow_config": "[1]"}, "its gmflow_config is no model configuration"),
        ({"gmflow_config": '{"num_scales": 3}'}, "no model configuration .num_scales must be 1 or 2, not 3"),
    ],
)
def test_safetensors_without_a_models_configuration_are_refused(
    metadata: dict[str, str] | None, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tiny().state_dict(), path, metadata)
    with pytest.raises(GMFlowError, match=f"^{path}: .*{told}"):
        load_model(path)


@pytest.mark.parametrize("content", [{0: torch.zeros(1)}, {"model": {0: torch.zeros(1)}}, {"a": 1}, [torch.zeros(1)]])
def test_a_checkpoint_that_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(GMFlowError, match="neither a state dict nor"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("backbone.conv2.weight", torch.zeros(6, 8, 1, 1), "feature_channels must be a multiple of 4, not 6"),
        ("transformer.layers.0.cross_attn_ffn.mlp.0.weight", torch.zeros(0, 16), "ffn_expansion must be .* not 0"),
        ("backbone.conv2.bias", torch.zeros(8, dtype=torch.int32), "must hold floating-point numbers, not torch.int32"),
        ("backbone.conv2.bias", torch.zeros(8, dtype=torch.complex64), "floating-point numbers, not torch.complex64"),
        ("backbone.conv2.bias", torch.zeros(8).to_sparse(), "floating-point numbers, not torch.float32, torch.sparse"),
        ("backbone.conv2.bias", torch.zeros(8, device="meta"), "must hold floating-point numbers, not .* on meta"),
        ("backbone.conv2.bias", torch.zeros(9), r"backbone\.conv2\.bias has shape \[9\], the model's \[8\]"),
        ("backbone.conv2.weight", torch.tensor(0.0), r"no GMFlow weights \(backbone\.conv2\.weight"),
    ],
)
def test_a_tensor_that_cannot_be_a_models_is_named_with_its_file_in_one_line(
    name: str, tensor: torch.Tensor, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pth"
    save_published(tiny(BASE), path)
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": state | {name: tensor}}, path)
    with pytest.raises(GMFlowError, match=told) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(suffix: str, value: float, tmp_path: Path) -> None:
    """A flipped bit of a .pth is not noticed otherwise, and all flow would be no number."""
    model, path = tiny(BASE), tmp_path / f"model{suffix}"
    with torch.no_grad():
        model.backbone.projection.weight[0, 0] = value
    (save_published if suffix == ".pth" else save_weights)(model, path)
    with pytest.raises(GMFlowError, match=r"damaged, or of a training that diverged: backbone\.conv2\.weight is not"):
        load_model(path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_published(tiny(), path)
    state = torch.load(path, weights_only=True)["model"]
    del state["upsampler.0.bias"]
    torch.save(state, path)
    with pytest.raises(GMFlowError, match=r"lacks 1 tensor.*upsampler\.0\.bias"):
        load_model(path)


class _Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code from a weight file ran",)


def test_no_code_from_a_weight_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": _Dangerous()}, path)
    with pytest.raises(GMFlowError, match="more than tensors"):
        load_model(path)
    assert "ran" not in capsys.readouterr().out


def test_save_refuses_other_suffixes_missing_folders_and_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(GMFlowError, match=r"\.safetensors"):
        save_weights(tiny(), tmp_path / "model.pth")
    with pytest.raises(GMFlowError, match="does not exist"):
        save_weights(tiny(), tmp_path / "missing" / "model.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (Path("/proc/model.safetensors"), tmp_path / "folder.safetensors"):
        with pytest.raises(GMFlowError, match=f"{path}: cannot be written"):
            save_weights(tiny(), path)
    with pytest.raises(GMFlowError, match=r"saved as \.pth \(save_weights"):
        save_published(tiny(), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]


@pytest.mark.parametrize(("save", "suffix"), [(save_weights, ".safetensors"), (save_published, ".pth")])
def test_where_weights_do_not_fit_the_old_file_stays(save: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(GMFlowError, match=f"{path}: cannot be written"):
            save(tiny(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_names_the_weights_and_the_configuration_whatever_the_file(tmp_path: Path) -> None:
    model = tiny()
    save_weights(model, tmp_path / "model.safetensors")
    save_published(model, tmp_path / "model.pth")
    digest = weights_digest(model)
    assert {weights_digest(load_model(path)) for path in tmp_path.iterdir()} == {digest}
    other = weights_digest(load_model(tmp_path / "model.safetensors", corr_radius=(-1, 2)))
    with torch.no_grad():
        model.upsampler.hidden.bias[0] += 1e-6
    assert len({digest, other, weights_digest(model), weights_digest(model.bfloat16())}) == 4


def test_a_file_that_could_not_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(beside: str) -> None:
        Path(beside).write_bytes(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(GMFlowError, match=r"cannot be written \(No space"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_are_on_the_disk_before_they_take_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut may leave an empty file."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    synced: list[tuple[int, bytes]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, path.read_bytes())))
    save_weights(tiny(), path)
    assert synced == [(path.stat().st_size, b"old")]


def test_weights_are_for_all_whom_other_new_files_are_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_weights(tiny(), tmp_path / "model.safetensors")
        assert os.umask(0o027) == 0o027, "the process's own setting stays"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


def test_weights_that_were_saved_from_a_parallel_model_load(tmp_path: Path) -> None:
    """As the published training scripts save them."""
    path, model = tmp_path / "model.pth", tiny()
    save_published(model, path)
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    loaded = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
