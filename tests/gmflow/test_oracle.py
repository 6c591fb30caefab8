"""The fast paths compute what the oracle computes, forward and backward."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

from gmflow import GMFlow, GMFlowConfig
from gmflow.attention import (
    ROWS,
    SCORES,
    TOKENS,
    attention,
    chunk_size,
    cuts_windows,
    fused_attention,
    neighbourhood_attention,
)
from gmflow.convolution import narrow_backward
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.feedforward import feed_forward
from gmflow.folded_attention import folded_window_attention
from gmflow.geometry import pixel_grid
from gmflow.matching import match
from gmflow.position import position_encoding
from gmflow.projected_attention import projected_window_attention
from gmflow.summation import SummationOrder
from gmflow.transformer import AttentionLayer, FeedForward
from gmflow.upsampling import convex_upsample
from gmflow.windows import permute_tokens, window_grid
from tests.gmflow import oracle

CHANNELS = 8


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    upper = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, upper), torch.autograd.grad(theirs, inputs, upper), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@given(
    splits=st.integers(1, 4),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    maps=st.sampled_from([2, 4]),
    shifted=st.booleans(),
    cross=st.booleans(),
    onto_source=st.booleans(),
    to_itself=st.booleans(),
    cut=st.booleans(),
    any_order=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_window_attention(
    splits: int,
    window: tuple[int, int],
    maps: int,
    shifted: bool,
    cross: bool,
    onto_source: bool,
    to_itself: bool,
    cut: bool,
    any_order: bool,
) -> None:
    height, width = splits * window[0], splits * window[1]
    shifted = shifted and splits > 1
    layer = AttentionLayer(CHANNELS).double()
    layer.summation = SummationOrder.FREE if any_order and cut else SummationOrder.REFERENCE  # which knows no regions
    source, target = (random(maps, height, width, CHANNELS, seed=seed) for seed in (1, 2))
    grid = window_grid(maps, height, width, splits, shifted=shifted, cut=cut, device=source.device)
    ordered = [permute_tokens(x.view(-1, CHANNELS), grid.order, grid.inverse) for x in (source, target)]
    if to_itself:
        target, ordered[1] = source, ordered[0]
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)

    def run() -> Tensor:
        out = layer(*ordered, grid.groups, cross=cross, onto_source=onto_source)
        return permute_tokens(out, grid.inverse, grid.order).view_as(source)

    seen = target.roll(maps // 2, 0) if cross else target
    parameters = {f"layer.{name}": value for name, value in layer.named_parameters()}
    theirs = oracle.attention_layer(parameters, "layer", source, seen, splits, shifted)
    if onto_source:
        theirs = source + theirs
    assert_same(run(), theirs, [source, *([] if to_itself else [target]), *layer.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(run(), theirs, rtol=1e-9, atol=1e-9)


def test_attention_over_more_scores_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = random(3, 7, CHANNELS), random(3, 11, CHANNELS), random(3, 11, 2)
    monkeypatch.setattr("gmflow.attention.ROWS", 1)
    for chunk in (1, 20, 80, 200, 1 << 20):
        monkeypatch.setattr("gmflow.attention.SCORES", chunk)
        theirs = (query @ key.transpose(1, 2) / CHANNELS**0.5).softmax(-1) @ value
        assert_same(attention(query, key, value), theirs, [query, key, value])


@given(queries=st.integers(1, 5000), keys=st.integers(1, 5000), threads=st.sampled_from([1, 2, 3, 16]))
@settings(deadline=None)
def test_chunks_of_attention_are_bounded_and_of_even_size(queries: int, keys: int, threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        windows, rows = chunk_size(queries, keys, torch.device("cpu"))
    assert windows * rows * keys <= SCORES or (windows == 1 and rows <= ROWS)
    assert windows == 1 or windows * queries <= TOKENS
    if rows < queries:
        assert windows == 1
        parts = -(-queries // rows)
        assert rows * parts - queries < parts  # the last part lacks less than a row for each part
        assert -(-queries // (parts - 1)) > max(ROWS, SCORES // keys)  # one part less would be too much
    else:
        assert windows < threads or windows % threads == 0
        assert (
            windows > min(SCORES // (queries * keys), TOKENS // queries) - threads
        )  # no more left out than evenness takes


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("to_itself", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("chunk", [1, 30, 100, 1 << 20])
def test_window_attention_in_chunks_of_any_size(
    chunk: int, cut: bool, to_itself: bool, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gmflow.attention.ROWS", 1)
    monkeypatch.setattr("gmflow.attention.SCORES", chunk)
    test_window_attention.hypothesis.inner_test(2, (2, 3), 4, True, cross, True, to_itself, cut, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize(
    ("summation", "dtype"),
    [
        (SummationOrder.REFERENCE, torch.float32),
        (SummationOrder.FREE, torch.float32),
        (SummationOrder.FREE, torch.bfloat16),
    ],
)
def test_the_number_of_threads_may_change_between_forward_and_backward_pass(
    summation: SummationOrder,
    dtype: torch.dtype,
    before: int,
    after: int,
    recomputed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks depend on it; also where the forward pass is computed again, as activation checkpointing does."""
    monkeypatch.setattr("gmflow.attention.SCORES", 5 * 6 * 6)  # five windows of 6 tokens, or as many as threads share
    grid = window_grid(2, 8, 12, 4, shifted=True, cut=summation is SummationOrder.FREE, device=torch.device("cpu"))
    torch.manual_seed(0)
    layer = AttentionLayer(16)
    layer.summation = summation
    inputs = [random(192, 16, seed=seed).detach().float().requires_grad_() for seed in (1, 2)]
    upper = torch.randn(192, 16, generator=torch.Generator().manual_seed(3))

    def gradients(threads: int) -> list[Tensor]:
        torch.set_num_threads(before)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            run = partial(checkpoint, layer, use_reentrant=False) if recomputed else layer
            out = run(*inputs, grid.groups, cross=True, onto_source=True)
        torch.set_num_threads(threads)
        return list(torch.autograd.grad(out, [*inputs, *layer.parameters()], upper))

    usual = torch.get_num_threads()
    try:
        for one, other in zip(gradients(after), gradients(before), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(usual)


def test_windows_of_an_exported_program_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    assert [cuts_windows(device, any_order=False) for device in devices] == [False, True]
    assert all(cuts_windows(device, any_order=True) for device in devices)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not any(cuts_windows(device, any_order=free) for device in devices for free in (False, True))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("to_itself", [False, True])
def test_long_windows_in_any_order(to_itself: bool, cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their forward pass is fused: here that of windows of at least 6 tokens, so not that of regions cut off them."""
    monkeypatch.setattr("gmflow.folded_attention.FUSED_LENGTH", 6)
    lengths: list[int] = []

    def fused(query: Tensor, *others: Any) -> Tensor:
        lengths.append(query.shape[1])
        return fused_attention(query, *others)

    monkeypatch.setattr("gmflow.folded_attention.fused_attention", fused)
    test_window_attention.hypothesis.inner_test(2, (2, 3), 4, True, cross, True, to_itself, True, True)  # type: ignore[attr-defined]
    assert set(lengths) == {6}


@given(size=st.tuples(st.integers(1, 19), st.integers(1, 19)), radius=st.integers(1, 6), batch=st.integers(1, 2))
@settings(max_examples=40, deadline=None)
def test_local_matching(size: tuple[int, int], radius: int, batch: int) -> None:
    feature0, feature1 = (random(batch, CHANNELS, *size, seed=seed) for seed in (1, 2))
    ours = match(feature0.permute(0, 2, 3, 1), feature1.permute(0, 2, 3, 1), radius)
    theirs = oracle.match_locally(feature0, feature1, radius).float()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    positions = pixel_grid(*size).double().expand(batch, -1, -1, -1)
    exact = neighbourhood_attention(
        feature0.permute(0, 2, 3, 1), feature1.permute(0, 2, 3, 1), positions, radius, exclude_outside=True
    )
    exact = exact.permute(0, 3, 1, 2) - oracle.grid_like(feature0)
    assert_same(exact, oracle.match_locally(feature0, feature1, radius), [feature0, feature1])


@given(size=st.tuples(st.integers(1, 19), st.integers(1, 19)), radius=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_local_propagation(size: tuple[int, int], radius: int) -> None:
    query, key, flow = random(2, *size, CHANNELS, seed=1), random(2, *size, CHANNELS, seed=2), random(2, *size, 2)
    ours = neighbourhood_attention(query, key, flow, radius, exclude_outside=False)
    keys, flows = (oracle.gather(x.permute(0, 3, 1, 2), radius) for x in (key, flow))
    scores = (query.flatten(1, 2).unsqueeze(2) * keys).sum(-1) / CHANNELS**0.5
    theirs = (scores.softmax(-1).unsqueeze(-1) * flows).sum(2).view_as(flow)
    assert_same(ours, theirs, [query, key, flow])


@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_feed_forward(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmflow.feedforward.CPU_CHUNK", 64 * 8 * CHANNELS)
    source, message = random(tokens, CHANNELS, seed=1), random(tokens, CHANNELS, seed=2)
    expand, contract = random(8 * CHANNELS, 2 * CHANNELS), random(CHANNELS, 8 * CHANNELS)
    hidden = torch.nn.functional.gelu(torch.cat([source, message], -1) @ expand.T)
    scale, shift = random(CHANNELS, seed=1), random(CHANNELS, seed=2)
    theirs = source + torch.nn.functional.layer_norm(hidden @ contract.T, (CHANNELS,), scale, shift)
    inputs = [source, message, expand, contract, scale, shift]
    assert_same(feed_forward(*inputs), theirs, inputs)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(*inputs), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("any_order", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 64, 65])
def test_a_feed_forward_in_float32(tokens: int, any_order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass takes convolutions, and in any order the forward pass does, too.

    Autocast may be on by the time of the backward pass: the types were chosen in the forward pass.
    """
    monkeypatch.setattr("gmflow.feedforward.CPU_CHUNK", 64 * 8 * CHANNELS)
    products: list[torch.dtype] = []
    of_matrices: list[torch.dtype] = []

    def counted(tokens: Tensor, matrix: Tensor) -> Tensor:
        products.append(tokens.dtype)
        return convolve(tokens, matrix)

    def counted_gradient(tokens: Tensor, shape: list[int], gradient: Tensor) -> Tensor:
        of_matrices.append(tokens.dtype)
        return gradient_of_matrix(tokens, shape, gradient)

    convolve, gradient_of_matrix = torch.conv2d, conv2d_weight
    monkeypatch.setattr("gmflow.feedforward.F.conv2d", counted)
    monkeypatch.setattr("gmflow.feedforward.conv2d_weight", counted_gradient)
    torch.manual_seed(0)
    layer = FeedForward(CHANNELS, expansion=4)
    exactly = copy.deepcopy(layer).double()
    layer.summation = SummationOrder.FREE if any_order else SummationOrder.REFERENCE
    exact = [random(tokens, CHANNELS, seed=seed) for seed in (1, 2)]
    inputs = [one.detach().float().requires_grad_() for one in exact]
    upper = random(tokens, CHANNELS, seed=7).detach()
    wanted, found = exactly(*exact), layer(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(found, [*inputs, *layer.parameters()], upper.float())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(wanted, [*exact, *exactly.parameters()], upper), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert products == [torch.float32] * (2 + 2 * any_order) * (1 + (tokens > 64))
    assert of_matrices == [torch.float32] * 2 * (1 + (tokens > 64))
    with torch.no_grad():
        assert torch.equal(layer(*inputs), found)


@pytest.mark.parametrize("factor", [1, 4, 8])
def test_convex_upsampling(factor: int) -> None:
    flow, logits = random(2, 2, 3, 5), random(2, 9 * factor**2, 3, 5)
    weights = logits.view(2, 1, 9, factor, factor, 3, 5).softmax(2)
    columns = torch.nn.functional.unfold(factor * flow, 3, padding=1).view(2, 2, 9, 1, 1, 3, 5)
    theirs = (weights * columns).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 3 * factor, 5 * factor)
    assert_same(convex_upsample(flow, logits, factor), theirs, [flow, logits])


def test_position_encoding() -> None:
    theirs = oracle.position(7, 5, 16, torch.float32).permute(1, 2, 0)
    torch.testing.assert_close(position_encoding(7, 5, 16), theirs)


SMALL = {"backbone_channels": (4, 6, 8), "feature_channels": CHANNELS, "num_layers": 2}
CONFIGS = [
    GMFlowConfig(**SMALL),
    GMFlowConfig(**SMALL, attn_splits=(1,), corr_radius=(2,), prop_radius=(1,)),
    GMFlowConfig(
        num_scales=2,
        **SMALL,
        attn_splits=(2, 4),
        corr_radius=(-1, 3),
        prop_radius=(-1, 1),
    ),
    GMFlowConfig(
        num_scales=2,
        **SMALL,
        attn_splits=(1, 2),
        corr_radius=(2, -1),
        prop_radius=(2, -1),
    ),
]


def images(height: int = 48, width: int = 64, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image0, image1 = torch.rand(2, batch, 3, height, width, generator=generator) * 255
    return image0, image1


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize(
    ("execution", "pixels"),
    [
        (None, 1e-2),
        *((ExecutionConfig("fp32", checkpointing), 1e-2) for checkpointing in ("none", "selective", "full")),
        *((ExecutionConfig("tf32", checkpointing), 5e-2) for checkpointing in ("none", "selective", "full")),
    ],
    ids=lambda value: f"{value.precision}-{value.checkpointing}" if isinstance(value, ExecutionConfig) else str(value),
)
def test_whole_model_and_its_gradients(
    config: GMFlowConfig, bidirectional: bool, execution: ExecutionConfig | None, pixels: float
) -> None:
    """Other partial sums, as of "tf32" on a CPU, are magnified by the model."""
    assert_near_oracle(config, bidirectional, execution, pixels)


def assert_near_oracle(
    config: GMFlowConfig, bidirectional: bool, execution: ExecutionConfig | None, pixels: float
) -> None:
    torch.manual_seed(0)
    model = GMFlow(config).train()
    image0, image1 = images(64, 96)
    if execution is not None:
        prepare_model(model, execution)
    out = model(image0, image1, bidirectional=bidirectional)
    theirs = oracle.predictions(
        dict(model.named_parameters()), config, image0, image1, training=True, bidirectional=bidirectional
    )
    assert len(out.predictions) == 2 * config.num_scales
    for ours, other in zip(out.predictions, theirs, strict=True):
        torch.testing.assert_close(ours, other[:2], rtol=1e-3, atol=pixels)
    if bidirectional:
        torch.testing.assert_close(out.backward_flow, theirs[-1][2:], rtol=1e-3, atol=pixels)

    parameters = list(model.parameters())
    ours_grad = torch.autograd.grad(sum(p.abs().mean() for p in out.predictions), parameters)
    theirs_grad = torch.autograd.grad(sum(p[:2].abs().mean() for p in theirs), parameters)
    ours_flat, theirs_flat = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours_grad, theirs_grad))
    assert (ours_flat - theirs_flat).norm() <= 5e-3 * theirs_flat.norm()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_same_input_same_bits(precision: Any) -> None:
    torch.manual_seed(0)
    model = prepare_model(GMFlow(CONFIGS[2]).train(), ExecutionConfig(precision))
    runs = []
    for _ in range(2):
        model.zero_grad()
        out = model(*images(64, 96))
        out.flow.abs().mean().backward()
        runs.append([out.flow.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_fp32_on_a_cpu_keeps_the_references_order_but_where_it_learns() -> None:
    """Without gradients it is the model as it was built, to the bit; with them the features still are."""
    built = GMFlow(CONFIGS[2])
    fp32, tf32 = (prepare_model(copy.deepcopy(built), ExecutionConfig(precision)) for precision in ("fp32", "tf32"))
    pair = images(64, 96)
    with torch.no_grad():
        in_order, inferred, in_any_order = (model(*pair).flow for model in (built, fp32, tf32))
    assert torch.equal(inferred, in_order)
    assert not torch.equal(in_any_order, in_order)
    assert not torch.equal(fp32(*pair).flow, in_order)
    for features, others in zip(*(model.backbone(pair[0]) for model in (built, fp32)), strict=True):
        assert torch.equal(features, others)


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that accelerators take, through the fused kernels, here on the CPU."""
    for module in ("attention", "folded_attention", "summation", "window_attention", "window_chunks"):
        monkeypatch.setattr(f"gmflow.{module}.runs_eagerly_on_cpu", lambda device: False)
    monkeypatch.setattr("gmflow.window_attention.ACCELERATOR_DTYPE", torch.float64)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_accelerators_path_computes_the_same(config: GMFlowConfig, precision: Any) -> None:
    assert_near_oracle(config, True, ExecutionConfig(precision), pixels=2e-2 if precision == "fp32" else 5e-2)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("window", [(2, 5), (5, 3), (4, 6), (1, 4), (1, 1)])
@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("to_itself", [False, True])
@pytest.mark.parametrize("any_order", [False, True])
@pytest.mark.parametrize("scores", [20, 1 << 26])
def test_the_accelerators_window_attention_is_the_oracles(
    scores: int,
    any_order: bool,
    to_itself: bool,
    cross: bool,
    shifted: bool,
    splits: int,
    window: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gmflow.attention.ACCELERATOR_SCORES", scores)
    how = splits, window, 4, shifted, cross, not cross, to_itself, True, any_order
    test_window_attention.hypothesis.inner_test(*how)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("window", "groups"), [((4, 6), 4), ((5, 6), 6), ((5, 7), 9)])
def test_cut_windows_have_no_regions_and_few_shapes(window: tuple[int, int], groups: int) -> None:
    """Each group of windows is a call of a kernel; halves of an even window are alike."""
    height, width = 3 * window[0], 3 * window[1]
    grid = window_grid(2, height, width, 3, shifted=True, cut=True, device=torch.device("cpu"))
    assert len(grid.groups) == groups
    assert all(group.regions is None for group in grid.groups)
    assert torch.equal(grid.order.sort().values, torch.arange(2 * height * width))


@pytest.mark.parametrize("chunks", ["whole windows", "parts of a window"])
@pytest.mark.parametrize("onto_source", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_window_attention_in_16_bits(
    chunks: str, onto_source: bool, cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tokens have much in common: rounding what every key of a window shares would swamp what differs.

    In training the forward pass is in float32, to the bit, and the gradients alone are rounded.
    """
    monkeypatch.setattr("gmflow.window_chunks.FUSED_TOKENS", 48)
    if chunks == "parts of a window":
        monkeypatch.setattr("gmflow.attention.ROWS", 1)
        monkeypatch.setattr("gmflow.attention.SCORES", 5 * 24)
    grid = window_grid(2, 8, 12, 2, shifted=True, cut=True, device=torch.device("cpu"))
    torch.manual_seed(0)
    layer = AttentionLayer(64)
    layer.summation = SummationOrder.FREE
    source, target = (random(192, 64, seed=seed).detach().float() for seed in (1, 2))
    inputs = [source.requires_grad_(), (target + 10 * random(64).detach().float()).requires_grad_()]
    upper = torch.randn(source.shape, generator=torch.Generator().manual_seed(3))

    def run() -> list[Tensor]:
        out = layer(*inputs, grid.groups, cross=cross, onto_source=onto_source)
        with torch.no_grad():
            inferred = layer(*inputs, grid.groups, cross=cross, onto_source=onto_source)
        assert out.dtype == inferred.dtype == torch.float32
        return [out, inferred, *torch.autograd.grad(out, [*inputs, *layer.parameters()], upper)]

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    apart = [(one - other).norm() / other.norm() for one, other in zip(found[1:], wanted[1:], strict=True)]
    assert max(apart) < 0.015
    assert min(apart[:-1]) > 0  # it did compute in 16 bits; the last, LayerNorm's shift, has the sum of `upper`


@pytest.mark.parametrize(
    ("precision", "inference", "training"),
    [
        ("fp32", "projected", "folded"),
        ("tf32", "folded", "folded"),
        ("bf16", "projected, fused in bfloat16", "folded"),
        ("fp16", "projected, fused in float16", "folded"),
    ],
)
@pytest.mark.parametrize("learns", [False, True])
def test_which_way_windows_are_attended_on_a_cpu(
    precision: Any, inference: str, training: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: set[str] = set()

    def told(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **how: Any) -> Tensor:
            ways.add(name)
            return function(*args, **how)

        return call

    def fused(query: Tensor, *others: Any) -> Tensor:
        ways.discard("projected")
        ways.add(f"projected, fused in {str(query.dtype).removeprefix('torch.')}")
        return fused_attention(query, *others)

    for name, function in (("folded", folded_window_attention), ("projected", projected_window_attention)):
        monkeypatch.setattr(f"gmflow.window_attention.{name}_window_attention", told(name, function))
    monkeypatch.setattr("gmflow.projected_attention.fused_attention", fused)
    model = prepare_model(GMFlow(CONFIGS[2]).train(learns), ExecutionConfig(precision))
    with torch.set_grad_enabled(learns):
        model(*images(64, 96))
    assert ways == {training if learns else inference}


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(
    ("precision", "back"),
    [("fp32", None), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_which_way_windows_are_attended_elsewhere(
    precision: Any, back: torch.dtype | None, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except in fp32: folded, with a forward pass in one type and a backward pass in that of the precision."""
    types: set[tuple[torch.dtype, torch.dtype]] = set()

    def told(*tokens: Any, forth: torch.dtype, back: torch.dtype, **how: Any) -> Tensor:
        types.add((forth, back))
        return folded_window_attention(*tokens, forth=forth, back=back, **how)

    monkeypatch.setattr("gmflow.window_attention.folded_window_attention", told)
    monkeypatch.setattr("gmflow.window_attention.ACCELERATOR_DTYPE", torch.float16)
    model = prepare_model(GMFlow(CONFIGS[2]).train(learns), ExecutionConfig(precision))
    with torch.set_grad_enabled(learns):
        model(*images(64, 96))
    assert types == (set() if back is None else {(torch.float16, back)})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolutions_backward_pass_in_16_bits(biased: bool, stride: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(16, 24, 3, stride=stride, padding=1, bias=biased)
    x = torch.randn(2, 16, 11, 14, requires_grad=True)
    upper = torch.randn(convolution(x).shape)

    def run() -> list[Tensor]:
        out = convolution(x)
        return [out, *torch.autograd.grad(out, [x, *convolution.parameters()], upper)]

    wanted = run()
    narrow_backward(convolution, torch.bfloat16)
    found = run()
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.01 * other.norm()
    with torch.no_grad():
        torch.testing.assert_close(convolution(x), wanted[0], rtol=0, atol=0)


def test_the_feed_forwards_backward_pass_in_16_bits() -> None:
    """In training the forward pass is that of float32, to the bit; only the gradients are rounded."""
    torch.manual_seed(0)
    layer = FeedForward(16, expansion=4)
    inputs = [random(50, 16, seed=seed).detach().float().requires_grad_() for seed in (1, 2)]
    upper = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))

    def run() -> list[Tensor]:
        out = layer(*inputs)
        return [out, *torch.autograd.grad(out, [*inputs, *layer.parameters()], upper)]

    wanted = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
        with torch.no_grad():
            inferred = layer(*inputs)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    for one, other in zip(found[1:-2], wanted[1:-2], strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).norm() < 0.01 * other.norm()
    torch.testing.assert_close(found[-2:], wanted[-2:], rtol=0, atol=0)  # LayerNorm's
    assert 0 < (inferred - wanted[0]).norm() < 0.01 * wanted[0].norm()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_maps_of_few_channels_are_learned_from_on_one_thread(precision: str) -> None:
    """oneDNN writes past its memory there, if it is let: in a process of its own, which that may end."""
    code = f"""
import copy, torch
from gmflow import GMFlow, GMFlowConfig
from gmflow.execution import ExecutionConfig, prepare_model
torch.set_num_threads(1)
torch.manual_seed(0)
built = GMFlow(GMFlowConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)).train()
prepared = prepare_model(copy.deepcopy(built), ExecutionConfig({precision!r}))
images = torch.rand(2, 2, 3, 192, 256) * 255
gradients = []
for model in (built, prepared, prepared, prepared):
    model.zero_grad()
    model(*images).flow.abs().mean().backward()
    gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
print(max(((other - gradients[0]).norm() / gradients[0].norm()).item() for other in gradients))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 0.03
