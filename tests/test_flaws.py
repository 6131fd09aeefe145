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


def framed(top=0, bottom=0, left=0, right=0, count=3):
    """Frames of 100x100 pixels, grey within black bars of these many pixels, which are not quite black."""
    for number in range(count):
        frame = np.full((100, 100, 3), 9, np.uint8)
        frame[top : 100 - bottom, left : 100 - right] = 120 + number
        yield frame


@pytest.mark.parametrize(
    "bars, said",
    [
        ({"top": 12}, ["12% of the height"]),
        ({"bottom": 12}, ["12% of the height"]),
        ({"top": 12, "bottom": 8}, ["20% of the height"]),
        ({"left": 12}, ["12% of the width"]),
        ({"right": 12}, ["12% of the width"]),
        ({"left": 20, "right": 20}, ["40% of the width"]),
        ({"top": 10, "right": 30}, ["10% of the height", "30% of the width"]),
        ({"top": 3, "left": 5}, []),
        ({}, []),
    ],
)
def test_black_bars_of_any_side_are_measured(bars, said):
    flaws = Flaws()
    for frame in framed(**bars):
        flaws.add(frame)
    assert flaws.notes(25) == [f"black bars: {what}; cut them off first (ffmpeg -vf crop)" for what in said]


def test_a_side_that_is_lit_in_one_frame_alone_is_no_bar():
    flaws = Flaws()
    for frame in [*framed(left=20), *framed(left=0, count=1)]:
        flaws.add(frame)
    assert flaws.notes(25) == []
