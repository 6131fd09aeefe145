"""Paths of the fingertip, (8, 3) in metres: reading those that render.py wrote, and bending them."""

import json

import numpy as np


def read_paths(folder, episodes):
    """(N, T, 3): where the fingertip really is at each frame, as render.py wrote it into folder/states."""
    states = [folder / "states" / f"episode_{i:06d}.json" for i in range(episodes)]
    return np.array([json.loads(state.read_text())["fingertip"] for state in states])


def bend(path, spread, rng):
    """Moves a path (8, 3) aside, by a normal draw of this spread (3,) at frame 4 and another at the end."""
    middle, end = rng.normal(0, [spread, spread], (2, 3))
    frames = np.arange(len(path))
    return path + np.stack([np.interp(frames, [0, 4, frames[-1]], [0, m, e]) for m, e in zip(middle, end)], 1)
