"""What Ray Tune is given to choose trials by: the searcher, and the scheduler that stops them early."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from pipelines.sweeping.config import RangeConfig
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.trials import Point, TrialPlan, all_points, dimensions, listed_points, seed_points

OBJECTIVE = "objective"
"""The metric by which Tune compares trials: the config's objective, lower is better."""

STEP = "step"
"""Tune's clock: the step of the stage that a result is of."""

REPLAYED = "replayed"
"""Whether a result was reported by an earlier attempt already."""

_REDRAWS = 100


def search_of(
    plan: TrialPlan, seeds: Sequence[Setting], known: Sequence[Point]
) -> tuple[dict[str, Any] | None, Searcher | None, int]:
    """(param space, searcher, number of samples), as Tune takes them.

    Args:
        plan: has the space.
        seeds: settings to try first.
        known: points of earlier attempts; they come before the seeds.
    """
    if plan.tune.searcher != "optuna":
        return {"point": tune.grid_search(listed_points(plan.config, seeds, known))}, None, 1
    first = [*known, *(point for point in seed_points(plan.config, seeds) if point not in known)]
    return None, DistinctOptuna(plan, first, len(known)), plan.tune.trials or 1


class DistinctOptuna(OptunaSearch):
    """Optuna's TPE over the space, without repeats: a repeated point would be the same stage in the same folder.

    Args:
        plan: has the space.
        first: points to begin with.
        drawn: number of points of earlier attempts. It is added to the sampler's seed; otherwise the sampler would draw
            those points again.
    """

    def __init__(self, plan: TrialPlan, first: Sequence[Point], drawn: int) -> None:
        import optuna  # imported only if it is used

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space: dict[str, Any] = {}
        for name, values in dimensions(plan.tune).items():
            space[f"point/{name}"] = (
                optuna.distributions.FloatDistribution(values.low, values.high, log=True)
                if isinstance(values, RangeConfig)
                else optuna.distributions.CategoricalDistribution(values)
            )
        self._failed_state = optuna.trial.TrialState.FAIL
        self._seen: list[Point] = []
        self._all = all_points(plan.tune)
        self._generator = np.random.default_rng(plan.config.seed + drawn)
        super().__init__(
            space,
            metric=OBJECTIVE,
            mode="min",
            points_to_evaluate=[{f"point/{name}": value for name, value in point.items()} for point in first],
            seed=(plan.config.seed + drawn) % 2**32,  # Optuna takes no larger one
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Tune takes the text too
        """A point that was not suggested before; `Searcher.FINISHED` if none is found."""
        study: Any = self._ot_study
        for _ in range(_REDRAWS):
            found: dict[str, Any] | None = super().suggest(trial_id)
            if found is None or found["point"] not in self._seen:
                if found is not None:
                    self._seen.append(found["point"])
                return found
            study.tell(self._ot_trials.pop(trial_id), state=self._failed_state)
            if left := [point for point in self._all if point not in self._seen]:
                # TPE would draw its favourites again and again, and the search would end with most points untried.
                point = left[int(self._generator.integers(len(left)))]
                study.enqueue_trial({f"point/{name}": value for name, value in point.items()})
        return str(Searcher.FINISHED)


def scheduler_of(plan: TrialPlan) -> TrialScheduler:
    """ASHA by validation steps, or none: then every trial trains to its end."""
    if plan.tune.scheduler == "none":
        return FIFOScheduler()
    return RememberingASHA(
        time_attr=STEP,
        max_t=plan.tune.stage.steps,
        grace_period=plan.tune.grace,
        reduction_factor=plan.tune.reduction_factor,
        stop_last_trials=False,
    )


class RememberingASHA(ASHAScheduler):
    """ASHA that does not judge a trial by replayed results: an earlier attempt already did.

    Results arrive in another order now, so that a trial that went on then could be stopped. Others are still compared
    with what is replayed.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result[REPLAYED] else decision
