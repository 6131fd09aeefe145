"""Section 3 of the proof: policies and paths inside an action-conditioned video model (`make actions` trains it).

A first frame and a path become a clip, and a colour test on its last frame says whether the cube lies on the disc. So
paths can be tried, and policies judged, without a robot. What the test says is held against the simulator.
"""

import json

import clips
import numpy as np
from paths import bend

import svd_common as common
from svd_parts.files import write_file

NAMES = ["fingertip.x", "fingertip.y", "fingertip.z"]  # metres, as tests/actions/data.py has them
WINDOW, NEAR, LEAST = 8, 3.75, 8  # pixels around the disc; of the cube's centre from its place there; its own


# Clips that follow paths


def write_commands(folder, firsts, paths):
    """First frames (N, H, W, 3) and paths (N, T, 3) as a prepared dataset, which infer_svd.py reads."""
    lines = []
    for index, (frame, path) in enumerate(zip(firsts, paths)):
        directory = f"clip_{index:06d}"
        (folder / directory).mkdir(parents=True, exist_ok=True)
        write_file(folder / directory / "00000.png", common.encode_png(frame))
        np.save(folder / directory / "actions.npy", path.astype(np.float32))
        lines.append(json.dumps({"directory": directory, "fps": clips.FPS, "action_names": NAMES}))
    write_file(folder / "metadata.jsonl", "\n".join(lines) + "\n")


# The colour test


def greenness(frames):
    frames = frames.astype(float)
    return np.clip((frames[..., 1] - np.maximum(frames[..., 0], frames[..., 2])) / 60, 0, 1)


def colour(frames):
    """How much a pixel has the colour of a box: saturated, and not the disc's green."""
    frames = frames.astype(float)
    highest, lowest = frames.max(-1), frames.min(-1)
    boxes = (frames[..., 1] < highest) & (highest > 40)
    return np.clip(((highest - lowest) / np.maximum(highest, 1) - 0.5) / 0.2, 0, 1) * boxes


def on_disc(firsts, lasts):
    """(N,) whether the last picture shows the cube on the disc, whose place the first picture (N, H, W, 3) shows.

    The box whose pixels lie near the disc is the cube: the other box stands too far away. Its centre must be where it
    is in pictures of cubes on the disc: 1.4 pixels above, for a cube is higher than a disc.
    """
    y, x = np.mgrid[: firsts.shape[1], : firsts.shape[2]]
    found = []
    for disc, box in zip(greenness(firsts), colour(lasts)):
        dx, dy = x - (disc * x).sum() / disc.sum(), y - (disc * y).sum() / disc.sum() + 1.4
        box = box * (np.hypot(dx, 1.2 * dy) < WINDOW)
        away = np.hypot((box * dx).sum(), 1.3 * (box * dy).sum()) / max(box.sum(), 1e-3)
        found.append(box.sum() >= LEAST and away <= NEAR)
    return np.array(found)


# Arm j: paths that are tried inside the model


def propose(answers, count, seed=0):
    """Answers of several policies (P, N, T, 3) -> (N * count, T, 3): mixtures of two of them, bent at random."""
    rng = np.random.default_rng(seed)
    paths = []
    for layout in np.repeat(np.arange(answers.shape[1]), count):
        one, other = answers[rng.choice(len(answers), 2, replace=False), layout]
        paths.append(bend(one + rng.uniform() * (other - one), [0.02, 0.02, 0.004], rng))
    return np.array(paths)


# Policies judged inside the model


def rank(values):
    """Ranks, those of equal values shared."""
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1] if np.std(x) and np.std(y) else np.nan


def compare(predicted, true, draws=10000):
    """Success inside the model and in the simulator, both (policies, layouts) -> numbers with their 95 % intervals.

    Policies and layouts are drawn again, both, the same in the model and in the simulator.
    """
    rng, found = np.random.default_rng(0), []
    policies, layouts = predicted.shape
    for draw in range(draws + 1):  # first all of them, once
        p, n = [rng.integers(0, count, count) if draw else np.arange(count) for count in (policies, layouts)]
        a, b = predicted[p][:, n].mean(1), true[p][:, n].mean(1)
        found.append([correlation(a, b), correlation(rank(a), rank(b)), a.mean() - b.mean()])
    found = np.array(found)
    numbers = {}
    for name, column in zip(("pearson", "spearman", "optimism"), found.T):
        low, high = np.percentile(column[np.isfinite(column)], [2.5, 97.5]) if np.isfinite(column[0]) else [np.nan] * 2
        numbers[name] = {"mean": column[0], "low": low, "high": high}
    yes, really = predicted.astype(bool), true.astype(bool)
    cells = {"both": yes & really, "model alone": yes & ~really}
    cells |= {"simulator alone": ~yes & really, "neither": ~yes & ~really}
    return numbers | {"rollouts": {name: int(cell.sum()) for name, cell in cells.items()}}


def sentences(results):
    """The lines of section 3 in the table's file."""
    lines, tried, found = [], results["tried"], results["inside"]
    if tried:
        lines += [
            "",
            f"Tried inside the model: {tried['tried']} paths, {tried['kept']} kept, of {tried['layouts']} layouts.",
        ]
        for name, key in (("all", "succeed_of_tried"), ("those kept", "succeed_of_kept")):
            if tried[key]:
                lines[-1] += " Of {} {:.1%} ({:.1%} to {:.1%}) succeed in the simulator.".format(name, *tried[key])
    if found:
        numbers = [f"{name} {found[name]['mean']:.2f} ({found[name]['low']:.2f} to {found[name]['high']:.2f})"
            for name in ("pearson", "spearman", "optimism")]  # fmt: skip
        rollouts = ", ".join(f"{name} {count}" for name, count in found["rollouts"].items())
        lines += ["", f"Policies judged inside the model: {', '.join(numbers)}. Rollouts that succeed: {rollouts}."]
    return lines
