"""The experiment's clips: rendered, with their true paths, as folders of frames with actions.npy beside them."""

import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tiny")]

import svd_common as common  # isort: skip  (first: it quiets OpenCV, which reads that once)
import numpy as np
import pybullet as p
import render
from paths import bend, read_paths

FRAMES, FPS, SIZE = 8, 4, (96, 64)
NAMES = ["fingertip.x", "fingertip.y", "fingertip.z"]  # metres
VIDEOS = Path("videos", "chunk-000", "observation.images.front")
BUNDLED = ROOT / "tests" / "data" / "robot_push"


def render_clips(folder, task, seed, episodes, cameras=("front",)):
    """Simulates and renders what is not there yet; without cameras the true paths alone."""
    if len(list((folder / "states").glob("*.json"))) < episodes:
        args = render.build_parser().parse_args(["--task", task, "--output_dir", str(folder)])
        args.seed, args.episodes, args.frames, args.cameras = seed, episodes, FRAMES, cameras
        render.main(args)


def read_clips(videos, states, episodes):
    """(N, T, H, W, 3) uint8, and the fingertip's path (N, T, 3) in metres."""
    names = [f"episode_{i:06d}" for i in range(episodes)]
    frames = np.stack([common.read_video(videos / VIDEOS / f"{name}.mp4") for name in names])
    return frames, read_paths(states, episodes).astype(np.float32)


def write_dataset(folder, clips, with_actions=True):
    """clips: {name: (frames, paths)} -> a dataset as prepare_dataset.py's, the actions beside the frames."""
    lines = []
    for name, (videos, paths) in clips.items():
        for index, (frames, path) in enumerate(zip(videos, paths)):
            directory = f"{name}_{index:03d}"
            (folder / directory).mkdir(parents=True, exist_ok=True)
            for t, frame in enumerate(frames):
                (folder / directory / f"{t:05d}.png").write_bytes(common.encode_png(frame))
            if with_actions:
                np.save(folder / directory / "actions.npy", path)
            lines.append({"directory": directory, "fps": FPS, "motion_bucket_id": 127, "action_names": NAMES})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# Paths that nobody demonstrated, played in the simulator: the truth that a generated clip is held against


def play(job, seed, task):
    """Moves the fingertip of a layout along a path (8, 3), one position a frame: (frames, where it really was)."""
    index, path = job
    rng = random.Random(seed * 100003 + index)
    client = p.connect(p.DIRECT)
    cube, goal, angle, distractor, colors = render.draw_layout(rng, task)
    robot, _ = render.build_scene(rng, cube, goal, angle, distractor, colors)
    light = [rng.uniform(-0.4, 1.2), rng.uniform(-0.8, 0.8), 1.6]
    fingers_down = p.getQuaternionFromEuler([np.pi, 0, angle])
    frames, tips, step = [], [], 0
    for frame in range(FRAMES):
        while step < round(frame * render.STEPS_PER_SECOND / FPS):
            step += 1
            t = min(step / render.STEPS_PER_SECOND * FPS, FRAMES - 1)
            here = min(int(t), FRAMES - 2)
            render.move_fingertip(robot, path[here] + (t - here) * (path[here + 1] - path[here]), fingers_down)
        tips.append(render.fingertip(robot))
        frames.append(render.render("front", light, *SIZE))
    p.disconnect(client)
    return np.stack(frames), np.array(tips, np.float32)


def play_all(paths, seed, task="reach"):
    """`play` for a path of each layout: (N, T, H, W, 3) uint8, (N, T, 3)."""
    with ProcessPoolExecutor() as pool:
        played = list(pool.map(partial(play, seed=seed, task=task), enumerate(paths)))
    return tuple(map(np.stack, zip(*played)))


def bent_pushes(folder, seed, episodes):
    """Pushes whose paths are bent at random, by some 5 cm sideways half-way and at the end, so that many miss.

    Returns what `play_all` does: (N, T, H, W, 3) uint8, (N, T, 3).
    """
    render_clips(folder, "push", seed, episodes, cameras=())
    rng = np.random.default_rng(seed)
    bent = [bend(path, [0.05, 0.05, 0.005], rng) for path in read_paths(folder, episodes)]
    return play_all(bent, seed, "push")


def other_paths(paths):
    """{how: (N, T, 3)}: recorded paths, changed as no recording has them."""
    half = np.minimum(np.arange(FRAMES) / 2, FRAMES - 1)
    low = half.astype(int)
    slower = paths[:, low] + (half - low)[:, None] * (paths[:, np.minimum(low + 1, FRAMES - 1)] - paths[:, low])
    mirrored = paths.copy()
    mirrored[..., 1] = np.clip(2 * paths[:, :1, 1] - paths[..., 1], -0.34, 0.34)
    return {"mirrored": mirrored, "half speed": slower, "stopped half-way": paths[:, np.minimum(np.arange(FRAMES), 3)]}


def to_pixels(path, width, height):
    """Positions (T, 3) in metres -> (T, 2) pixels of the front camera."""
    view = np.reshape(p.computeViewMatrix(*render.CAMERAS["front"], [0, 0, 1]), (4, 4)).T
    projection = np.reshape(p.computeProjectionMatrixFOV(48, width / height, 0.05, 5), (4, 4)).T
    x, y, _, w = projection @ view @ np.vstack([path.T, np.ones(len(path))])
    return np.stack([(x / w + 1) / 2 * width, (1 - y / w) / 2 * height], axis=1)
