"""A checkpoint brings back everything, to the bit, or says why not."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pipelines.errors import PipelineError
from pipelines.training.config import StageConfig
from pipelines.training.state import TrainingState, read_checkpoint

STAGE = StageConfig(
    name="s", steps=20, global_batch=2, peak_lr=1e-2, crop=(16, 16), mixture=[{"data": "d", "subset": "train"}]
)


def fresh(width: int = 3) -> TrainingState:
    model = nn.Linear(width, 2)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7 + number)
    return TrainingState.fresh(model, STAGE)


def train(state: TrainingState, until: int) -> list[float]:
    losses = []
    while state.step < until:
        inputs = torch.sin(torch.arange(6.0) + state.step).reshape(2, 3)
        loss = state.model(inputs).square().mean()
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.schedule.step()
        state.step += 1
        losses.append(loss.item())
    return losses


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path: Path):
    undisturbed = fresh()
    expected = train(undisturbed, 20)
    first = fresh()
    losses = train(first, 9)
    first.record(9, {"loss": 1.0})
    first.save(tmp_path)
    second = fresh()
    second.restore(tmp_path)
    assert (second.step, second.records) == (9, [(9, {"loss": 1.0})])
    assert losses + train(second, 20) == expected
    assert all(
        torch.equal(a, b) for a, b in zip(second.model.parameters(), undisturbed.model.parameters(), strict=True)
    )


def rates(optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("steps", [20, 90, 1000])
def test_the_schedule_is_pytorchs_one_cycle_over_steps_and_ten(steps: int):
    model = nn.Linear(3, 2)
    state = TrainingState.fresh(model, STAGE.model_copy(update={"steps": steps}))
    optimizer = torch.optim.AdamW(model.parameters())
    theirs = OneCycleLR(optimizer, STAGE.peak_lr, total_steps=steps + 10, pct_start=0.05, cycle_momentum=False)
    assert rates(state.optimizer, state.schedule, steps) == pytest.approx(rates(optimizer, theirs, steps), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_a_stage_of_few_steps_has_a_schedule_too(steps: int):
    state = TrainingState.fresh(nn.Linear(3, 2), STAGE.model_copy(update={"steps": steps}))
    found = rates(state.optimizer, state.schedule, steps)
    assert all(0 < rate <= STAGE.peak_lr for rate in found)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "facts"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, damage: str):
    fresh().save(tmp_path)
    path = tmp_path / "state.pt"
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:900] + bytes([data[900] ^ 1]) + data[901:])
    elif damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "gone":
        path.unlink()
    else:
        (tmp_path / "state.json").write_text("{")
    with pytest.raises(PipelineError, match=str(tmp_path)):
        read_checkpoint(tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path):
    fresh(width=4).save(tmp_path)
    with pytest.raises(PipelineError, match="another architecture"):
        fresh(width=3).restore(tmp_path)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "touched").touch, ())

    state = fresh()
    state.save(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "state.pt")
    import hashlib
    import json

    facts = json.loads((tmp_path / "state.json").read_text())
    facts["sha256"] = hashlib.sha256((tmp_path / "state.pt").read_bytes()).hexdigest()
    (tmp_path / "state.json").write_text(json.dumps(facts))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "touched").exists()
