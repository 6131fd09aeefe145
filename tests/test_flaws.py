"""Flaws of a video that its header does not tell."""

import numpy as np
import pytest

from svd_parts.flaws import Flaws


@pytest.mark.parametrize("steps, said", [([3] * 23, False), ([3, 0, 0] * 8, True), ([9] + [0.6, 1, 5] * 7, False)])
def test_slow_pictures_are_no_repeated_ones(steps, said):
    """Where pictures move at all speeds, none is called a repeat; steps: how far each is from the one before."""
    flaws, rng = Flaws(), np.random.default_rng(0)
    texture = rng.integers(0, 8, (64, 96, 3))
    for level in np.cumsum([0, *steps]):
        flaws.add((texture + level).clip(0, 255).astype(np.uint8))
    assert bool(flaws.repeats(24)) == said
