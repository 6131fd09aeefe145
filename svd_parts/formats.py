"""One table of output formats: how a clip is written and read. A new format is a new entry."""

from functools import partial
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image

import svd_common as common
from svd_parts.dataset import list_frames
from svd_parts.files import replacing, write_file


def write_mp4(path, frames, fps, *options):
    common.write_video(path, frames, fps, *options)


def write_frames(path, frames, fps):
    with replacing(path, folder=True) as aside:
        for index, frame in enumerate(frames):
            write_file(aside / f"{index:05d}.png", common.encode_png(frame))


def read_frames(path):
    return np.stack([common.read_image(frame) for frame in list_frames(path)])


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
    read: Callable = (
        None  # path -> (T, H, W, 3) uint8; none where the colours are not exact, so nothing can be compared
    )
    is_file: bool = True  # --output_video may name one file of it
    is_image: bool = False  # a folder of images would take its clips for its own
    package: str = ""  # what it needs beside requirements.txt


FORMATS = {
    "mp4": Format(".mp4", write_mp4, common.read_video),
    "gif": Format(".gif", partial(write_animation, kind="gif", unit=10)),
    "webp": Format(".webp", partial(write_animation, kind="webp", unit=1), is_image=True),
    "frames": Format("", write_frames, read_frames, is_file=False, is_image=True),
    # as lerobot encodes: others cannot be joined to its own; also quick to seek in
    "lerobot": Format(
        ".mp4", lambda p, f, fps: write_mp4(p, f, fps, "-g", "2"), common.read_video, False, False, "pyarrow"
    ),
}
