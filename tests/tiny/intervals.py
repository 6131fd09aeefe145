"""Intervals of what the experiments measure."""

import numpy as np


def interval(values, draws=10_000):
    """[mean, low, high]: 95 % bootstrap; values (N,), those that are not numbers left out; None where none is left."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    means = values[np.random.default_rng(0).integers(0, len(values), (draws, len(values)))].mean(1)
    return [float(values.mean()), *np.percentile(means, (2.5, 97.5)).tolist()]
