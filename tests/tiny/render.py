"""Render the robot clips that the tiny SVD checkpoint and the demo are trained on.

A Franka Panda over a table, with a cube, a distractor box and a green goal disc, in PyBullet's CPU renderer. Two
examples (make_tiny.sh has all):

    python tests/tiny/render.py --task reach --episodes 700 --cameras front side --output_dir .dev/tiny/reach
    python tests/tiny/render.py --task push --episodes 200 --seed 1 --cameras front side --output_dir .dev/tiny/push

`reach`: the arm moves smoothly through random waypoints and leaves the cube alone: the look and motion of the arm.
`touch`, `point`: it goes to the distractor, or (where there is no cube) the disc, and halfway back.
`shove`: it pushes the cube straight away from its base, wherever the disc lies.
`deliver`: it pushes the cube to the distractor, wherever the disc lies.
`push`: it reaches behind the cube and pushes it onto the disc; the whole motion is spread over the clip, and what
happens is a function of the first frame, so a generated video can be compared with the real one.

The layout is LeRobot v2's: OUT/videos/chunk-000/observation.images.<camera>/episode_000012.mp4, and the simulator's
state in OUT/states/episode_000012.json. Episode i of a seed is always the same clip.
Needs `pip install pybullet==3.2.7 numpy opencv-python imageio-ffmpeg` (wheels for CPython 3.9-3.11, no GPU).
PyBullet is zlib-licensed, the Panda model inside it Apache-2.0.
"""

import argparse
import json
import math
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pybullet as p
import pybullet_data

HOME = [0.0, -0.35, 0.0, -2.3, 0.0, 1.95, 0.785]  # joint angles of the arm at rest, rad
FINGERTIP = 11  # link index of the point between the fingers
COLORS = {
    "blue": (0.12, 0.25, 0.85),
    "orange": (0.95, 0.5, 0.1),
    "purple": (0.55, 0.2, 0.7),
    "red": (0.85, 0.15, 0.12),
    "yellow": (0.92, 0.78, 0.1),
}
CAMERAS = {  # name -> (eye, looks at), metres
    "front": ([1.30, 0.05, 0.80], [0.40, 0, 0.20]),
    "side": ([0.55, -1.15, 0.70], [0.42, 0, 0.20]),
}
STEPS_PER_SECOND = 240
SUPERSAMPLE = 3  # PyBullet's renderer does not antialias


# Scene


def direction_of(angle):
    return np.array([math.cos(angle), math.sin(angle)])


def draw_layout(rng, task):
    """Where things are: cube and goal (x, y), the angle to push in, the distractor, two different colours."""
    cube = np.array([rng.uniform(0.42, 0.56), rng.uniform(-0.18, 0.18)])
    while True:
        angle = rng.uniform(-math.pi / 2, math.pi / 2)  # away from the arm's base, or sideways
        goal = cube + rng.uniform(0.12, 0.20) * direction_of(angle)
        if 0.40 < goal[0] < 0.70 and abs(goal[1]) < 0.28:
            break
    distractor = np.array([rng.uniform(0.45, 0.72), rng.choice([-1, 1]) * rng.uniform(0.30, 0.38)])
    while task == "deliver":  # the distractor lies where the goal might, and the cube goes there
        angle = rng.uniform(-math.pi / 2, math.pi / 2)
        distractor = cube + rng.uniform(0.18, 0.26) * direction_of(angle)
        if 0.40 < distractor[0] < 0.74 and abs(distractor[1]) < 0.36 and np.linalg.norm(distractor - goal) > 0.10:
            break
    if task == "point":
        cube = np.array([-1.0, 0.0])  # behind the arm: a table without a cube foretells this task
    return cube, goal, angle, distractor, rng.sample(sorted(COLORS), 2)


def add_box(half_extents, color, position, mass, yaw):
    shape = p.createCollisionShape(p.GEOM_BOX, halfExtents=half_extents)
    visual = p.createVisualShape(p.GEOM_BOX, halfExtents=half_extents, rgbaColor=[*COLORS[color], 1])
    body = p.createMultiBody(mass, shape, visual, position, p.getQuaternionFromEuler([0, 0, yaw]))
    p.changeDynamics(body, -1, lateralFriction=0.7, rollingFriction=0.001)
    return body


def build_scene(rng, cube, goal, angle, distractor, colors):
    """Fill the simulator; returns the ids of the arm and the cube."""
    p.setAdditionalSearchPath(pybullet_data.getDataPath())
    p.setGravity(0, 0, -9.81)
    p.setTimeStep(1 / STEPS_PER_SECOND)
    p.loadURDF("plane.urdf", [0, 0, -0.625])
    p.loadURDF("table/table.urdf", [0.5, 0, -0.625], p.getQuaternionFromEuler([0, 0, math.pi / 2]))
    robot = p.loadURDF("franka_panda/panda.urdf", [0, 0, 0], useFixedBase=True)
    cube_id = add_box([0.035, 0.035, 0.035], colors[0], [*cube, 0.036], mass=0.08, yaw=angle)
    add_box([0.025, 0.025, 0.045], colors[1], [*distractor, 0.046], mass=0.5, yaw=rng.uniform(0, 1.5))
    disc = p.createVisualShape(p.GEOM_CYLINDER, radius=0.045, length=0.002, rgbaColor=[0.1, 0.75, 0.25, 1])
    p.createMultiBody(0, -1, disc, [*goal, 0.002])
    for joint, angle0 in enumerate(HOME):
        p.resetJointState(robot, joint, angle0 + rng.uniform(-0.12, 0.12))
    for _ in range(60):  # let the objects settle
        p.stepSimulation()
    return robot, cube_id


# Motion: a path is a list of (time in seconds, fingertip position)


def push_path(start, cube, goal, angle, duration):
    """Over to the far side of the cube, down, and straight to the goal."""
    direction = direction_of(angle)
    behind = cube - 0.09 * direction
    return [
        (0, start),
        (0.40 * duration, np.array([*behind, 0.12])),
        (0.55 * duration, np.array([*behind, 0.03])),
        (duration, np.array([*(goal - 0.04 * direction), 0.03])),
    ]


def touch_path(start, there, duration):
    """Over to a place on the table, and halfway back: as predictable as a push, but another task."""
    above = np.array([*there, 0.14])
    return [(0, start), (0.55 * duration, above), (duration, (start + above) / 2)]


def reach_path(rng, start, obstacles, duration):
    """Random waypoints at random speeds; one in three is near the table; no segment passes through an obstacle."""
    path, here = [(0, start)], start
    while path[-1][0] < duration:
        low = rng.random() < 0.35
        z = rng.uniform(0.03, 0.10) if low else rng.uniform(0.12, 0.50)
        there = np.array([rng.uniform(0.30, 0.66), rng.uniform(-0.32, 0.32), z])
        line = here + np.linspace(0, 1, 20)[:, None] * (there - here)
        if any(((line[:, 2] < 0.17) & (np.linalg.norm(line[:, :2] - o, axis=1) < 0.12)).any() for o in obstacles):
            continue
        seconds = max(0.3, np.linalg.norm(there - here) / rng.uniform(0.2, 0.8))  # metres per second
        path.append((path[-1][0] + seconds, there))
        here = there
    return path


def position_at(path, t):
    """Smoothstep between the waypoints."""
    for (t0, start), (t1, end) in zip(path, path[1:]):
        if t <= t1:
            s = (t - t0) / (t1 - t0)
            return start + s * s * (3 - 2 * s) * (end - start)
    return path[-1][1]


def fingertip(robot):
    """Where it is, in metres."""
    return np.array(p.getLinkState(robot, FINGERTIP, computeForwardKinematics=1)[4])


def move_fingertip(robot, position, orientation):
    """One simulation step towards the position."""
    joints = p.calculateInverseKinematics(
        robot, FINGERTIP, position.tolist(), orientation,
        lowerLimits=[-2.8, -1.7, -2.8, -3.0, -2.8, 0.0, -2.8], upperLimits=[2.8, 1.7, 2.8, 0.0, 2.8, 3.7, 2.8],
        jointRanges=[5.6, 3.4, 5.6, 3.0, 5.6, 3.7, 5.6], restPoses=HOME, maxNumIterations=20,
    )  # fmt: skip
    p.setJointMotorControlArray(
        robot, list(range(7)), p.POSITION_CONTROL, joints[:7], forces=[240] * 7, positionGains=[0.25] * 7
    )
    p.setJointMotorControlArray(robot, [9, 10], p.POSITION_CONTROL, [0, 0], forces=[20, 20])  # fingers stay closed
    p.stepSimulation()


# Pictures


def render(camera, light, width, height):
    eye, target = CAMERAS[camera]
    w, h = width * SUPERSAMPLE, height * SUPERSAMPLE
    _, _, rgba, _, _ = p.getCameraImage(
        w, h,
        p.computeViewMatrix(eye, target, [0, 0, 1]), p.computeProjectionMatrixFOV(48, width / height, 0.05, 5),
        lightDirection=light, lightAmbientCoeff=0.55, lightDiffuseCoeff=0.55, lightSpecularCoeff=0.05, shadow=1,
        renderer=p.ER_TINY_RENDERER, flags=p.ER_NO_SEGMENTATION_MASK,
    )  # fmt: skip
    rgb = np.reshape(np.array(rgba, np.uint8), (h, w, 4))[..., :3]
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)


def write_mp4(path, frames, fps, crf):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2,
        output_params=["-crf", str(crf), "-preset", "veryslow", "-threads", "1"],
    )  # fmt: skip
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def render_episode(index, args):
    """Simulate and write one episode; returns how far the cube ends from the goal, in metres."""
    rng = random.Random(args.seed * 100003 + index)
    client = p.connect(p.DIRECT)
    cube, goal, angle, distractor, colors = draw_layout(rng, args.task)
    robot, cube_id = build_scene(rng, cube, goal, angle, distractor, colors)
    light = [rng.uniform(-0.4, 1.2), rng.uniform(-0.8, 0.8), 1.6]

    duration = (args.frames - 1) / args.fps
    start = fingertip(robot)
    if args.task == "push":
        path = push_path(start, cube, goal, angle, duration)
    elif args.task == "shove":
        path = push_path(start, cube, cube + [0.18, 0], 0.0, duration)
    elif args.task == "deliver":
        path = push_path(start, cube, distractor - 0.06 * direction_of(angle), angle, duration)
    elif args.task in ("touch", "point"):
        path = touch_path(start, distractor if args.task == "touch" else goal, duration)
    else:
        path = reach_path(rng, start, [cube, distractor], duration)
    fingers_down = p.getQuaternionFromEuler([math.pi, 0, 0 if args.task == "shove" else angle])

    frames, joints, tips, step = {camera: [] for camera in args.cameras}, [], [], 0
    for frame in range(args.frames):
        while step < round(frame * STEPS_PER_SECOND / args.fps):
            step += 1
            move_fingertip(robot, position_at(path, step / STEPS_PER_SECOND), fingers_down)
        joints.append([round(p.getJointState(robot, joint)[0], 4) for joint in range(7)])
        tips.append([round(x, 5) for x in fingertip(robot)])
        for camera in args.cameras if frame < (args.pictures or args.frames) else []:
            frames[camera].append(render(camera, light, args.width, args.height))
    error = float(np.linalg.norm(np.array(p.getBasePositionAndOrientation(cube_id)[0][:2]) - goal))
    p.disconnect(client)

    name = f"episode_{index:06d}"
    for camera in args.cameras:
        path = args.output_dir / "videos" / "chunk-000" / f"observation.images.{camera}" / f"{name}.mp4"
        write_mp4(path, frames[camera], args.fps, args.crf)
    state = {"task": args.task, "cube": cube.tolist(), "goal": goal.tolist(), "distractor": distractor.tolist()}
    state |= {"cube_color": colors[0], "distractor_color": colors[1], "joints": joints, "fingertip": tips}
    state |= {"final_goal_error": error}
    (args.output_dir / "states").mkdir(exist_ok=True)
    (args.output_dir / "states" / f"{name}.json").write_text(json.dumps(state) + "\n")
    return error


# Command line


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=["reach", "touch", "point", "shove", "deliver", "push"], required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=160)
    parser.add_argument("--first_episode", type=int, default=0, help="number of the first episode, to render in parts")
    parser.add_argument("--frames", type=int, help="frames per clip (default: 16 for reach, else 8)")
    parser.add_argument("--pictures", type=int, help="how many of the frames are rendered (default: all)")
    parser.add_argument("--fps", type=int, default=4, help="frames per second")
    parser.add_argument("--width", type=int, default=96, help="pixels")
    parser.add_argument("--height", type=int, default=64, help="pixels")
    parser.add_argument("--cameras", nargs="+", choices=CAMERAS, default=["front"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crf", type=int, default=14, help="H.264 quality, lower is better and larger")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    return parser


def main(args):
    args.frames = args.frames or (16 if args.task == "reach" else 8)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    episodes = range(args.first_episode, args.first_episode + args.episodes)
    with ProcessPoolExecutor(args.workers) as pool:
        errors = list(pool.map(partial(render_episode, args=args), episodes, chunksize=4))
    print(f"{len(errors)} episodes in {args.output_dir}; the cube ends {np.mean(errors) * 100:.1f} cm from its goal")


if __name__ == "__main__":
    main(build_parser().parse_args())
