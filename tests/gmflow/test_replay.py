"""Recorded passes, as far as no GPU is needed: what is recorded when, and whose memory the results are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gmflow import GMFlow, GMFlowConfig, GMFlowError
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.model import FlowOutput
from gmflow.replay import KEPT, Recordings, _aliases, replay_passes


def tiny() -> GMFlow:
    torch.manual_seed(0)
    config = GMFlowConfig.base().to_dict()
    config |= {"backbone_channels": (8, 8, 8), "feature_channels": 16, "num_layers": 2}
    return GMFlow(GMFlowConfig.from_dict(config))


def images(height: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    pair = 255 * torch.rand(2, 1, 3, height, 64, generator=torch.Generator().manual_seed(seed))
    return pair[0], pair[1]


def test_what_is_seen_twice_is_recorded_and_what_was_used_last_is_kept() -> None:
    recorded: list[int] = []
    recordings = Recordings()

    def ask(key: int) -> Any:
        def record() -> Any:
            recorded.append(key)
            return key

        found = recordings.of(key, record)
        recordings.saw(key)
        return found

    assert [ask(0), ask(0), ask(0)] == [None, 0, 0]
    assert recorded == [0]
    for key in range(1, KEPT):
        assert [ask(key), ask(key)] == [None, key]
    ask(0)  # used again, so that 1 is the one to go
    assert [ask(KEPT), ask(KEPT)] == [None, KEPT]
    assert recorded == [*range(KEPT + 1)]
    assert [ask(0), ask(1)] == [0, 1]
    assert recorded == [*range(KEPT + 1), 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])  # noqa: S301
def test_a_copy_has_no_recordings(copied: Callable[[Recordings], Recordings]) -> None:
    recordings = Recordings()
    recordings.saw("key")
    assert recordings.of("key", lambda: lambda *_: None) is not None  # type: ignore[arg-type,return-value]
    assert copied(recordings).of("key", lambda: pytest.fail("recorded at once")) is None


class Again:
    """Stands for a graph: asked to replay, computes once more and puts what it finds where it was."""

    def __init__(self, pool: Any) -> None:
        self.replays = 0

    def record(self, compute: Callable[[], FlowOutput]) -> FlowOutput:
        self.compute, self.out = compute, compute()
        return self.out

    def replay(self) -> None:
        self.replays += 1
        found = self.compute()
        for own, new in zip((self.out.flow, self.out.backward_flow), (found.flow, found.backward_flow), strict=True):
            if own is not None and new is not None:
                own.copy_(new)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    made: list[Again] = []
    monkeypatch.setattr("gmflow.replay._Graph", lambda pool: made.append(Again(pool)) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


@pytest.mark.parametrize("bidirectional", [False, True])
def test_replayed_inference_keeps_what_it_gave(bidirectional: bool, graphs: list[Again]) -> None:
    plain, replayed = tiny().eval(), tiny().eval()
    replay_passes(replayed)
    pairs = [images(seed=seed) for seed in range(4)] + [images(height=96)]
    with torch.inference_mode():
        wanted = [plain(*pair, bidirectional=bidirectional) for pair in pairs]
        found = [replayed(*pair, bidirectional=bidirectional) for pair in pairs]
    assert [graph.replays for graph in graphs] == [3]  # of four pairs of a size the first ran as it is
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.flow, other.flow)
        assert one.predictions[-1] is one.flow
        assert (one.backward_flow is None) == (not bidirectional)
        if one.backward_flow is not None:
            assert torch.equal(one.backward_flow, other.backward_flow)


def test_what_differs_in_more_than_values_is_not_replayed(graphs: list[Again]) -> None:
    """Replayed it would be wrong: rounded, of other parameters, or without the gradients that were asked for."""
    model = tiny().eval()
    replay_passes(model)
    image0, image1 = images()
    with torch.inference_mode():
        model(image0, image1)
        model(image0.double(), image1.double())
    with torch.no_grad():
        model(image0, image1)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # as `model.to` does
        model(image0, image1)
    for _ in range(3):
        assert model(image0, image1, bidirectional=True).backward_flow.requires_grad
        wanted = image0.clone().requires_grad_()
        model(wanted, image1).flow.sum().backward()
        assert wanted.grad is not None
    assert not graphs


def test_what_fails_is_not_recorded(graphs: list[Again]) -> None:
    model = tiny().eval()
    replay_passes(model)
    for _ in range(3):
        with torch.inference_mode(), pytest.raises(GMFlowError, match="divisible"):
            model(*images(height=65))
    assert not graphs


def test_aliases_share_memory_and_take_the_gradients() -> None:
    model = tiny().train()
    own = dict(model.named_parameters())
    with _aliases(model) as aliases:
        loss = model(*images()).flow.abs().mean()
        assert {id(one) for one in model.parameters()}.isdisjoint(map(id, own.values()))
        loss.backward()
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    for parameter in own.values():
        alias = aliases[parameter]
        assert alias.data_ptr() == parameter.data_ptr()
        assert parameter.grad is None
        assert alias.grad is not None


def test_aliases_go_whatever_happens() -> None:
    model = tiny()
    own = list(model.parameters())
    with pytest.raises(ZeroDivisionError), _aliases(model):
        raise ZeroDivisionError
    assert all(one is other for one, other in zip(model.parameters(), own, strict=True))


def test_on_a_cpu_nothing_is_replayed() -> None:
    """So that commands need not ask where they are."""
    plain, prepared = tiny().eval(), prepare_model(tiny(), ExecutionConfig(replay=True, same_bits=True)).eval()
    assert not torch.are_deterministic_algorithms_enabled()
    with torch.inference_mode():
        for seed in range(3):
            pair = images(seed=seed)
            assert torch.equal(plain(*pair).flow, prepared(*pair).flow)


def test_what_is_compiled_is_not_replayed() -> None:
    with pytest.raises(GMFlowError, match="choose it or compile"):
        ExecutionConfig(compile=True, replay=True)
