"""One table of output formats: how a clip is written and read. A new format is a new entry."""

from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

import svd_common as common
from svd_parts.dataset import list_frames
from svd_parts.files import replacing, write_file

GIF_FPS = 50  # a GIF's frames last hundredths of a second, at least two


def write_lerobot_mp4(path, frames, fps):
    """As lerobot encodes with H.264: its tools cannot join others to its own. Also quick to seek in."""
    common.write_video(path, frames, fps, "-g", "2")


def write_frames(path, frames, fps):
    with replacing(path, folder=True) as aside:
        for index, frame in enumerate(frames):
            write_file(aside / f"{index:05d}.png", common.encode_png(frame))


def read_frames(path):
    return np.stack([common.read_image(frame) for frame in list_frames(path)])


def write_gif(path, frames, fps):
    """Browsers show a GIF's frame of under 20 ms for 100 ms. So over 50 fps some frames are left out."""
    if fps > GIF_FPS:
        kept = [round(t * fps / GIF_FPS) for t in range(max(1, int(len(frames) * GIF_FPS / fps)))]
        frames, fps = frames[kept], GIF_FPS
    write_animation(path, frames, fps, "gif", 10)


def write_animation(path, frames, fps, kind, unit):
    """A GIF or WebP. Its frames last whole `unit`s of milliseconds, spread so that the rate is right on the whole."""
    ends = [round(1000 * t / fps / unit) * unit for t in range(len(frames) + 1)]
    first, *rest = (Image.fromarray(frame) for frame in frames)
    options = {"save_all": True, "append_images": rest, "duration": np.diff(ends).tolist(), "loop": 0}
    with replacing(path) as aside:
        first.save(aside, kind, quality=90, **options)


class Format(NamedTuple):
    """One entry of the table of formats."""

    suffix: str  # of a clip's file; empty for a folder
    write: Callable  # (path, (T, H, W, 3) uint8 RGB, fps): whole or not at all
    read: Callable = None  # path -> (T, H, W, 3) uint8; none where colours are not exact, so nothing can be compared
    is_file: bool = True  # --output_video may name one file of it
    is_image: bool = False  # a folder of images would take its clips for its own
    most_fps: float = 240  # of a higher rate some frames are left out
    package: str = ""  # what it needs beside requirements.txt


FORMATS = {
    "mp4": Format(".mp4", common.write_video, common.read_video),
    "gif": Format(".gif", write_gif, most_fps=GIF_FPS),
    "webp": Format(".webp", partial(write_animation, kind="webp", unit=1), is_image=True),
    "frames": Format("", write_frames, read_frames, is_file=False, is_image=True),
    "lerobot": Format(".mp4", write_lerobot_mp4, common.read_video, is_file=False, package="pyarrow"),
}
