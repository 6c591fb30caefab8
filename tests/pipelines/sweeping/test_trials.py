"""What a trial is, in which order trials come, and what storage keeps of them."""

import json
from dataclasses import replace

import pytest

from pipelines.sweeping.accuracy import Weights
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.trials import (
    TrialRecords,
    TrialResult,
    announce,
    announced,
    listed_points,
    retry_failed,
    seed_points,
)
from tests.pipelines.sweeping.made import METRIC, plan_of


def test_a_trials_name_follows_from_what_decides_it(tree, load):
    plan = plan_of(load(tree))
    point = {"attn_splits_1": 1, "attn_splits_2": 4, "corr_radius": 3}
    trial = plan.trial(point)
    assert plan.trial(dict(reversed(point.items()))) == replace(trial, point=dict(point))
    assert trial.model.build().attn_splits == (1, 4)
    assert trial.model.build().corr_radius == (-1, 3)
    others = [
        plan.trial(point | {"corr_radius": 2}),
        plan_of(load(tree, "seed=1")).trial(point),
        plan_of(load(tree, "tune.stage.steps=40")).trial(point),
        replace(plan, versions={"chairs": "v2"}).trial(point),
    ]
    assert len({trial.key, *(other.key for other in others)}) == 5
    same = plan_of(load(tree, "tune.machine.num_workers=2", "tune.max_concurrent=1", "storage=/elsewhere"))
    assert same.trial(point).key == trial.key


def test_seeds_come_first_and_nothing_is_lost(tree, load):
    config = load(tree)
    seeds = [Setting((2, 4), (-1, 3), (-1, 1)), Setting((1, 16), (-1, 3), (-1, 1)), Setting((1, 8), (-1, 2), (-1, 1))]
    points = listed_points(config, seeds)
    assert points[:2] == [
        {"attn_splits_1": 2, "attn_splits_2": 4, "corr_radius": 3},
        {"attn_splits_1": 1, "attn_splits_2": 8, "corr_radius": 2},
    ]
    assert sorted(map(str, points)) == sorted(map(str, listed_points(config, [])))
    assert len(points) == 8


@pytest.mark.parametrize("searcher", ["grid", "random"])
def test_what_was_tried_stays_in_the_list_whatever_the_seeds_are_now(tree, load, searcher):
    """Seeds follow from measured costs: on another machine, or with another torch, they may be others."""
    config = load(tree, f"tune.searcher={searcher}", "tune.trials=3")
    seeds = [Setting((2, 4), (-1, 3), (-1, 1)), Setting((1, 8), (-1, 2), (-1, 1))]
    known = listed_points(config, seeds)
    for now in (seeds, [Setting((2, 8), (-1, 2), (-1, 1))]):
        assert sorted(map(str, listed_points(config, now, known))) == sorted(map(str, known))
    more = listed_points(load(tree, f"tune.searcher={searcher}", "tune.trials=4"), seeds, known)
    assert [point for point in more if point in known] == more[:3]
    assert len({str(point) for point in more}) == 4


def test_random_points_are_distinct_inside_the_space_and_the_same_every_time(tree, load):
    overrides = ["tune.searcher=random", "tune.trials=20", "tune.space.peak_lr={low: 1e-5, high: 1e-3}"]
    config = load(tree, *overrides)
    seed = Setting((1, 8), (-1, 3), (-1, 1))
    points = listed_points(config, [seed])
    assert points == listed_points(config, [seed])
    assert points != listed_points(load(tree, *overrides, "seed=5"), [seed])
    assert len({json.dumps(point) for point in points}) == 20
    assert points[0] == {"attn_splits_1": 1, "attn_splits_2": 8, "corr_radius": 3, "peak_lr": 1e-4}
    rates = [point["peak_lr"] for point in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert min(rates) < 5e-5 < 2e-4 < max(rates)
    finite = load(tree, "tune.searcher=random", "tune.trials=50")
    assert len(listed_points(finite, [])) == 8  # there are no more


def test_storage_remembers_trials_in_order_and_only_those_of_the_config(tree, load):
    plan = plan_of(load(tree))
    points = listed_points(plan.config, [])
    for number, point in enumerate(points[:3]):
        announce(plan.trial(point), 2 - number)
    announce(plan.trial(points[2]), 9)  # as a trial that goes on
    assert [trial.point for trial in announced(plan)] == points[2::-1]
    assert announced(plan_of(load(tree, "seed=9"))) == []
    narrowed = [value for value in (2, 3) if value != points[0]["corr_radius"]]
    left = announced(plan_of(load(tree, f"tune.space.corr_radius={narrowed}")))
    assert [trial.point for trial in left] == [p for p in points[2::-1] if p["corr_radius"] in narrowed]

    records = TrialRecords.open(plan.trial(points[0]).folder)
    records.add(10, {METRIC: 3.0})
    records.end(TrialResult("failed", "no luck", 10))
    again = TrialRecords.open(plan.trial(points[0]).folder)
    assert (again.history, again.result) == ([(10, {METRIC: 3.0})], TrialResult("failed", "no luck", 10))
    TrialRecords.open(plan.trial(points[1]).folder).end(TrialResult("finished", "", 30))
    assert retry_failed(plan) == 1
    retried = TrialRecords.open(plan.trial(points[0]).folder)
    assert retried.result is None
    assert retried.end(TrialResult("finished", "", 30)) == retried.result == TrialResult("finished", "", 30)
    assert TrialRecords.open(plan.trial(points[1]).folder).result == TrialResult("finished", "", 30)


def test_a_trial_is_another_with_other_weights_precision_or_validation(tree, load):
    """Else a sweep goes on with figures that were measured of something else."""
    plan = plan_of(load(tree))
    point = {"attn_splits_1": 1, "attn_splits_2": 4, "corr_radius": 3}
    limited = ["tune.stage.validation.0.limit=2", "probe.validation.0.limit=2"]
    plans = [
        plan,
        *(replace(plan, weights=Weights("w.safetensors", version, "w.pth")) for version in ("v1", "v2")),
        *(
            plan_of(load(tree, *overrides))
            for overrides in (["precision=bf16"], limited, ["tune.stage.validate_every=5"])
        ),
    ]
    assert len({one.trial(point).key for one in plans}) == len(plans)


def test_random_search_takes_as_many_points_as_it_is_asked_for(tree, load):
    many = load(tree, "tune.searcher=random", "tune.trials=1500", "tune.space.peak_lr={low: 1e-5, high: 1e-3}")
    assert len(listed_points(many, [])) == 1500
    tree["tune"]["space"] = {"peak_lr": [1e-5 * number for number in range(1, 301)]}
    points = listed_points(load(tree, "tune.searcher=random", "tune.trials=300"), [])
    assert len({point["peak_lr"] for point in points}) == 300
    rates = [point["peak_lr"] for point in listed_points(load(tree, "tune.searcher=random", "tune.trials=250"), [])]
    assert rates[-20:] != sorted(rates[-20:]), "the last are drawn as the first are"


def test_seeds_are_as_near_to_the_stage_as_the_space_has_it_and_inside(tree, load):
    seed = Setting((1, 8), (-1, 3), (-1, 1))

    def rates(space: str) -> list[float]:
        config = load(tree, "tune.searcher=random", "tune.trials=3", f"tune.space.peak_lr={space}")
        return [point["peak_lr"] for point in seed_points(config, [seed])]

    assert rates("{low: 1e-6, high: 5e-5}") == [5e-5]
    assert rates("{low: 2e-4, high: 5e-4}") == [2e-4]
    assert rates("[1e-6, 2e-4, 9e-4]") == [2e-4]
    assert seed_points(load(tree), [replace(seed, prop_radius=(-1, 2))]) == []


def test_trials_may_differ_in_their_layers_and_channels(tree, load):
    space = {"num_layers": [1, 2], "feature_channels": [16, 32]}
    tree |= {"model": {"variant": "refine", "num_layers": 2, "feature_channels": 32}}
    tree["tune"] |= {"space": {"attn_splits": [[1], [8]], **space}, "start": "random"}
    plan = plan_of(load(tree))
    (usual,) = seed_points(plan.config, [Setting((1, 8), (-1, 4), (-1, 1))])
    assert usual == {"attn_splits_1": 1, "attn_splits_2": 8, "num_layers": 2, "feature_channels": 32}
    trials = [plan.trial(point) for point in listed_points(plan.config, [])]
    built = [trial.model.build() for trial in trials]
    assert {(one.num_layers, one.feature_channels) for one in built} == {(1, 16), (1, 32), (2, 16), (2, 32)}
    assert len({trial.key for trial in trials}) == 4
