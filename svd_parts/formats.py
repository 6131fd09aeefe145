"""The table of output formats: how a clip is written and read. A new format is one new entry."""

from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

import svd_common as common
from svd_parts.dataset import list_frames
from svd_parts.files import replacing, write_file

GIF_FPS = 50  # the most: a GIF's frame lasts at least two hundredths of a second


def write_lerobot_mp4(path, frames, fps):
    """Writes an mp4 with a key frame every two frames, as lerobot does: its tools join only such files."""
    common.write_video(path, frames, fps, "-g", "2")


def write_frames(path, frames, fps):
    with replacing(path, folder=True) as aside:
        for index, frame in enumerate(frames):
            write_file(aside / f"{index:05d}.png", common.encode_png(frame))


def read_frames(path):
    return np.stack([common.read_image(frame) for frame in list_frames(path)])


def write_gif(path, frames, fps):
    """Writes a GIF, and leaves out frames over 50 fps: browsers show a frame of under 20 ms for 100 ms."""
    if fps > GIF_FPS:
        kept = [round(t * fps / GIF_FPS) for t in range(max(1, int(len(frames) * GIF_FPS / fps)))]
        frames, fps = frames[kept], GIF_FPS
    write_animation(path, frames, fps, "gif", 10)


def write_animation(path, frames, fps, kind, unit):
    """Writes a GIF or WebP. Each frame lasts a multiple of `unit` milliseconds, and the rate is right on average."""
    ends = [round(1000 * t / fps / unit) * unit for t in range(len(frames) + 1)]
    first, *rest = (Image.fromarray(frame) for frame in frames)
    options = {"save_all": True, "append_images": rest, "duration": np.diff(ends).tolist(), "loop": 0}
    with replacing(path) as aside:
        first.save(aside, kind, quality=90, **options)


class Format(NamedTuple):
    """One entry of the table of formats."""

    suffix: str  # of a clip's file; empty if a clip is a folder
    write: Callable  # (path, (T, H, W, 3) uint8 RGB, fps) writes a clip, whole or not at all
    read: Callable = None  # path -> (T, H, W, 3) uint8; None if colours are not exact, and nothing can be compared
    is_file: bool = True  # --output_video may name a single file of this format
    is_image: bool = False  # its clips would be taken for images in a folder of input images
    most_fps: float = 240  # frames over this rate are left out
    package: str = ""  # a Python package that it needs and requirements.txt lacks


FORMATS = {
    "mp4": Format(".mp4", common.write_video, common.read_video),
    "gif": Format(".gif", write_gif, most_fps=GIF_FPS),
    "webp": Format(".webp", partial(write_animation, kind="webp", unit=1), is_image=True),
    "frames": Format("", write_frames, read_frames, is_file=False, is_image=True),
    "lerobot": Format(".mp4", write_lerobot_mp4, common.read_video, is_file=False, package="pyarrow"),
}
