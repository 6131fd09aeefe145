"""The proof's layouts: their clips and true fingertip paths, and the judge that plays a path in the simulator.

All of it is tests/tiny/render.py's world: episode i of a seed is always the same layout.
"""

import math
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]

import svd_common as common  # isort: skip  (first: it quiets OpenCV, which reads that once)
import numpy as np
import pybullet as p
import render

FRAMES, FPS = 8, 4
HOLD = 0.5  # seconds after the path
DISC = 0.045  # its radius in metres: the cube's centre must lie within
VIDEOS = Path("videos", "chunk-000", "observation.images.front")


# Layouts


def make_clips(folder, seed, episodes, pictures=None, cameras=("front",), task="push", processes=None):
    """Simulates what is not there yet; without cameras nothing is rendered, with pictures=1 first frames alone."""
    if len(list((folder / "states").glob("*.json"))) < episodes:
        args = render.build_parser().parse_args(["--task", task, "--output_dir", str(folder)])
        args.seed, args.episodes, args.pictures, args.frames, args.cameras = seed, episodes, pictures, FRAMES, cameras
        args.workers = processes or args.workers
        render.main(args)


def read_clips(folder, episodes):
    """(N, T, H, W, 3) uint8."""
    return np.stack([common.read_video(folder / VIDEOS / f"episode_{i:06d}.mp4") for i in range(episodes)])


# The judge


def open_layout(seed, index):
    """The layout in the simulator, as render.py starts it: (client, robot, cube, goal, light)."""
    rng = random.Random(seed * 100003 + index)
    client = p.connect(p.DIRECT)
    layout = render.draw_layout(rng, "push")
    robot, cube = render.build_scene(rng, *layout)
    return client, robot, cube, layout[1], [rng.uniform(-0.4, 1.2), rng.uniform(-0.8, 0.8), 1.6]


def play(robot, path):
    """Moves the fingertip along the path: (8, 3), one position a frame, straight lines between them."""
    x, y, _ = path[-1] - path[4]
    yaw = np.clip(math.atan2(y, x), -math.pi / 2, math.pi / 2)  # the hand turns towards where the path goes
    fingers_down = p.getQuaternionFromEuler([math.pi, 0, yaw])
    for step in range(1, round(((FRAMES - 1) / FPS + HOLD) * render.STEPS_PER_SECOND) + 1):
        t = min(step / render.STEPS_PER_SECOND * FPS, FRAMES - 1)
        here = min(int(t), FRAMES - 2)
        render.move_fingertip(robot, path[here] + (t - here) * (path[here + 1] - path[here]), fingers_down)


def judge_layout(job, seed):
    """How far the centre of the cube ends from the disc's, in metres, for each of the paths (P, 8, 3)."""
    index, paths = job
    client, robot, cube, goal, _ = open_layout(seed, index)
    start, distances = p.saveState(), []
    for path in paths:
        p.restoreState(start)
        play(robot, path)
        distances.append(np.linalg.norm(np.array(p.getBasePositionAndOrientation(cube)[0][:2]) - goal))
    p.disconnect(client)
    return np.array(distances)


# Pictures


def after_playing(seed, index, path, width=288, height=192):
    """What the camera sees when the path has been played."""
    client, robot, _, _, light = open_layout(seed, index)
    if path is not None:
        play(robot, path)
    frame = render.render("front", light, width, height)
    p.disconnect(client)
    return frame


def to_pixels(path, width=288, height=192):
    """Positions (T, 3) in metres -> (T, 2) pixels of the front camera."""
    view = np.reshape(p.computeViewMatrix(*render.CAMERAS["front"], [0, 0, 1]), (4, 4)).T
    projection = np.reshape(p.computeProjectionMatrixFOV(48, width / height, 0.05, 5), (4, 4)).T
    x, y, _, w = projection @ view @ np.vstack([path.T, np.ones(len(path))])
    return np.stack([(x / w + 1) / 2 * width, (1 - y / w) / 2 * height], axis=1)
