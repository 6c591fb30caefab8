"""Whether many draws follow the distribution that they should."""

import numpy as np
import numpy.typing as npt


def kolmogorov_smirnov(values: npt.ArrayLike, low: float, high: float) -> float:
    """Largest distance between the values' distribution and the uniform one, in units of its 0.1 % critical value."""
    ordered = np.sort((np.asarray(values, float) - low) / (high - low))
    steps = np.arange(ordered.size + 1) / ordered.size
    distance = max(np.abs(ordered - steps[:-1]).max(), np.abs(ordered - steps[1:]).max())
    return float(distance * np.sqrt(ordered.size) / 1.95)


def assert_rate(hits: npt.ArrayLike, expected: float) -> None:
    observed = np.asarray(hits, bool)
    tolerance = 4 * np.sqrt(max(expected * (1 - expected), 1e-9) / observed.size)
    assert abs(observed.mean() - expected) <= tolerance
