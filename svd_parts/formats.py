"""One table of output formats: how a clip is written and read."""

import numpy as np
from PIL import Image

import svd_common as common
from svd_parts.dataset import list_frames
from svd_parts.files import replacing, write_file

FORMATS = {"mp4": ".mp4", "gif": ".gif", "webp": ".webp", "frames": "", "lerobot": ".mp4"}


def write_clip(path, frames, fps, output_format):
    """Writes (T, H, W, 3) uint8 RGB as mp4, gif, webp or a folder of PNG; whole or not at all."""
    if output_format == "mp4":
        common.write_video(path, frames, fps)
    elif output_format == "lerobot":  # as lerobot encodes: others cannot be joined to its own; also quick to seek in
        common.write_video(path, frames, fps, "-g", "2")
    elif output_format == "frames":
        with replacing(path, folder=True) as aside:
            for index, frame in enumerate(frames):
                write_file(aside / f"{index:05d}.png", common.encode_png(frame))
    else:  # whole milliseconds, hundredths in a GIF: spread so that the frame rate is right on the whole
        unit = 10 if output_format == "gif" else 1
        ends = [round(1000 * t / fps / unit) * unit for t in range(len(frames) + 1)]
        first, *rest = (Image.fromarray(frame) for frame in frames)
        options = {"save_all": True, "append_images": rest, "duration": np.diff(ends).tolist(), "loop": 0}
        with replacing(path) as aside:
            first.save(aside, output_format, quality=90, **options)


def read_clip(path):
    """What `write_clip` wrote as mp4 or frames."""
    if not path.is_dir():
        return common.read_video(path)
    return np.stack([common.read_image(frame) for frame in list_frames(path)])
