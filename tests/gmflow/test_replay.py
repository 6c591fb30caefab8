"""Recorded passes, as far as no GPU is needed: what is recorded when, and whose memory the results are."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gmflow import GMFlow, GMFlowConfig, GMFlowError
from gmflow.execution import ExecutionConfig, prepare_model
from gmflow.model import FlowOutput
from gmflow.replay import KEPT, PASSES_AFTER_LACK, Recordings, _aliases, _Graph, _TrainingPass, replay_passes


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
    assert recordings.of("key", lambda: lambda *_: None) is not None
    assert copied(recordings).of("key", lambda: pytest.fail("recorded at once")) is None


class Again:
    """Stands for a graph: asked to replay, computes once more and puts what it finds where it was."""

    def __init__(self, pool: Any, device: torch.device) -> None:
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
    monkeypatch.setattr("gmflow.replay._can_record", lambda device: True)
    monkeypatch.setattr("gmflow.replay._Graph", lambda *how: made.append(Again(*how)) or made[-1])
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
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                model(image0, image1)
    with torch.no_grad():
        model(image0, image1)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # as `model.to` does
        model(image0, image1)
    for _ in range(3):
        assert model(image0, image1, bidirectional=True).backward_flow.requires_grad
        for of_one in range(2):
            pair = [image0.clone(), image1.clone()]
            model(*pair[:of_one], pair[of_one].requires_grad_(), *pair[of_one + 1 :]).flow.sum().backward()
            assert pair[of_one].grad is not None
    assert not graphs


def test_what_was_recorded_in_evaluation_is_not_replayed_in_training_mode(graphs: list[Again]) -> None:
    """Which gives every supervised prediction, with or without gradients."""
    model = tiny().eval()
    replay_passes(model)
    with torch.no_grad():
        assert [len(model(*images()).predictions) for _ in range(3)] == [1, 1, 1]
        assert len(graphs) == 1
        assert len(model.train()(*images()).predictions) == 2


class Kept:
    """Stands for a graph that always finds the same: replayed, it leaves its memory as it was recorded."""

    def __init__(self, pool: Any, device: torch.device) -> None:
        pass

    def record(self, compute: Callable[[], Any]) -> Any:
        return compute()

    def replay(self) -> None:
        pass


@pytest.fixture
def recorded(graphs: list[Again], monkeypatch: pytest.MonkeyPatch) -> list[_TrainingPass]:
    """The training passes that were recorded."""
    made: list[_TrainingPass] = []
    monkeypatch.setattr("gmflow.replay._Graph", Kept)
    monkeypatch.setattr("gmflow.replay._TrainingPass", lambda *how: made.append(_TrainingPass(*how)) or made[-1])
    return made


def test_a_backward_pass_after_the_next_forward_pass_is_refused(recorded: list[_TrainingPass]) -> None:
    """Its memory holds the next pass's values by then: the gradients would be wrong."""
    model = tiny().train()
    replay_passes(model)
    _, earlier, later = [model(*images()).flow.sum() for _ in range(3)]
    assert len(recorded) == 1
    with pytest.raises(GMFlowError, match="do each backward pass before the next forward pass"):
        earlier.backward()
    later.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_of_a_replayed_pass_stay_when_the_next_one_is_replayed(recorded: list[_TrainingPass]) -> None:
    model = tiny().train()
    replay_passes(model)
    for _ in range(2):
        model.zero_grad()
        model(*images()).flow.sum().backward()
    kept = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    recorded[0].gradients.fill_(7.0)
    assert len(kept) == len(list(model.parameters()))
    assert all(torch.equal(parameter.grad, one) for parameter, one in zip(model.parameters(), kept, strict=True))


def test_away_from_a_gpu_nothing_is_recorded() -> None:
    """Also if the model was prepared on one, and was then moved or loaded elsewhere."""
    model = tiny().eval()
    replay_passes(model)
    flows = [model(*images()).flow for _ in range(3)]
    assert torch.equal(flows[0], flows[2])


def test_parameters_that_learn_from_now_on_get_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is frozen for some steps, as in fine-tuning; a recording knows only what learned when it was made."""
    recorded: list[int] = []
    model = tiny()
    forward = model.forward

    def training_pass(images: Any, compute: Any, parameters: list[Any], aliases: Any) -> Any:
        recorded.append(len(parameters))
        return forward

    monkeypatch.setattr("gmflow.replay._can_record", lambda device: True)
    monkeypatch.setattr("gmflow.replay._TrainingPass", training_pass)
    replay_passes(model)
    of_all, of_backbone = (len(list(part.parameters())) for part in (model, model.backbone))
    for frozen in (True, False):
        model.backbone.requires_grad_(not frozen)
        for _ in range(3):
            model(*images())
    assert recorded == [of_all - of_backbone, of_all]


def test_a_frozen_model_within_another_that_learns_is_replayed(graphs: list[Again]) -> None:
    plain, model = (tiny().eval().requires_grad_(False) for _ in range(2))
    replay_passes(model)
    flows = [model(*images(seed=seed), bidirectional=True) for seed in range(3)]
    assert [graph.replays for graph in graphs] == [2]
    assert not flows[2].flow.requires_grad
    assert torch.equal(flows[2].flow, plain(*images(seed=2), bidirectional=True).flow)
    with torch.no_grad():  # where other operations may be chosen, as in `gmflow.execution`
        model(*images(), bidirectional=True)
    assert [graph.replays for graph in graphs] == [2]
    wanted = images()[0].requires_grad_()
    model(wanted, images()[1]).flow.sum().backward()
    assert wanted.grad is not None


class Casts(TorchDispatchMode):
    """Counts changes of type."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_a_recording_reads_no_parameters_that_an_autocast_around_it_keeps(
    graphs: list[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are freed with the autocast, and the recording would go on reading their memory."""
    monkeypatch.setattr(Again, "replay", lambda graph: None)  # it would compute again
    model = tiny().eval()
    replay_passes(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with Casts() as alone:
            model(*images())
        assert not graphs
        with Casts() as recorded:
            model(*images())
        assert len(graphs) == 1
        with Casts() as after:
            model(*images(height=96))
    assert alone.count > 10
    assert recorded.count == alone.count
    assert after.count == alone.count, "those of the recording are not for others"


def test_what_fails_is_not_recorded(graphs: list[Again]) -> None:
    model = tiny().eval()
    replay_passes(model)
    for _ in range(3):
        with torch.inference_mode(), pytest.raises(GMFlowError, match="divisible"):
            model(*images(height=65))
    assert not graphs


@pytest.mark.parametrize("failing", ["pass", "recording", "replay"])
def test_where_memory_runs_out_all_recordings_go_and_their_passes_run_as_they_are(
    failing: str, graphs: list[Again], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = False
    plain, replayed = tiny().eval(), tiny().eval()
    forward = replayed.forward

    def allocate(*given: Any, **how: Any) -> FlowOutput:
        if full:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(*given, **how)

    def empty_cache() -> None:
        nonlocal full
        full = False

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    replayed.forward = allocate
    replay_passes(replayed)
    recorded, large, other = images(), images(height=96), images(height=128)

    def same_flow(pair: tuple[torch.Tensor, torch.Tensor]) -> bool:
        return torch.equal(replayed(*pair).flow, plain(*pair).flow)

    with torch.inference_mode():
        assert [same_flow(recorded) for _ in range(2)] == [True] * 2
        failed = recorded if failing == "replay" else large
        if failing == "recording":
            assert same_flow(large)
        full = True
        assert same_flow(failed)
        made = len(graphs)
        assert [same_flow(pair) for pair in (failed, recorded) * 3] == [True] * 6
        assert len(graphs) == made, "recorded again, it would run out of memory again"
        assert [same_flow(other) for _ in range(3)] == [True] * 3
        assert len(graphs) == made + 1

        full = True
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        with pytest.raises(torch.cuda.OutOfMemoryError):  # of the pass itself
            replayed(*large)


def test_memory_that_runs_out_takes_the_recordings_of_all_models() -> None:
    """A validation of averaged weights may need what the training's recording holds. Training goes on for days."""
    validated, trained = Recordings(), Recordings()

    def asks(recordings: Recordings, key: str) -> Any:
        found = recordings.of(key, lambda: f"{key}, recorded")
        if found is None:
            recordings.saw(key)
        return found

    assert [asks(trained, "a step") for _ in range(2)] == [None, "a step, recorded"]
    for _ in range(2):
        assert not validated.lacked_memory("a pass")
        for recordings, key in ((trained, "a step"), (validated, "a pass")):
            assert [asks(recordings, key) for _ in range(PASSES_AFTER_LACK + 1)][-2:] == [None, f"{key}, recorded"]


def test_a_pass_that_is_too_large_by_itself_is_never_recorded() -> None:
    recordings = Recordings()
    recordings.saw("a pass")
    assert recordings.lacked_memory("a pass")
    for _ in range(2 * PASSES_AFTER_LACK):
        assert recordings.of("a pass", pytest.fail) is None
        recordings.saw("a pass")


def test_a_pass_is_recorded_and_replayed_on_the_gpu_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one: `--device cuda:1`."""
    other, current, used = torch.device("cuda:1"), [torch.device("cuda:0")], []

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    @contextlib.contextmanager
    def recording(*_: Any, stream: Any, **how: Any) -> Iterator[None]:
        used.append((current[-1], stream))
        yield

    class Graph:
        def replay(self) -> None:
            used.append((current[-1], None))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr("gmflow.replay._stream", lambda of: ("stream", of))
    graph = _Graph(None, other)
    assert graph.record(lambda: "found") == "found"
    graph.replay()
    assert used == [(other, ("stream", other)), (other, None)]
    assert not graph.record(gc.isenabled), "collecting another model's recordings would break this one"
    assert gc.isenabled()


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
