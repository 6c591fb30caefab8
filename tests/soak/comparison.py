"""What a disturbed curriculum must have in common with an undisturbed one: weights, metrics, versions."""

import torch

from tests.soak.scene import Scene


def differences(calm: Scene, wild: Scene) -> list[str]:
    found = []
    expected, weights = calm.weights(), wild.weights()
    if expected.keys() != weights.keys():
        found.append(f"stages {sorted(expected)} and {sorted(weights)}")
    for stage in expected.keys() & weights.keys():
        others = [name for name, value in expected[stage].items() if not torch.equal(value, weights[stage][name])]
        if others:
            found.append(f"weights of {stage}: {len(others)} of {len(expected[stage])} differ, such as {others[0]}")
    tracked, other = calm.tracked(), wild.tracked()
    return found + [
        f"MLflow's {name}: {tracked.get(name)} and {other.get(name)}"
        for name in sorted(tracked.keys() | other.keys())
        if tracked.get(name) != other.get(name)
    ]
