"""LeRobot datasets whose cameras are images inside the parquet files of data/: one clip an episode."""

import functools
import io
import json
import os
from pathlib import Path

import numpy as np

import svd_common as common
from svd_parts.ffmpeg import Failure
from svd_parts.files import UserError
from svd_parts.lerobot import read_lerobot
from svd_parts.probe import Probe


@functools.cache
def image_features(root):
    """(names of the cameras that are images, frames a second) of the dataset at `root`, by its meta/info.json."""
    try:
        info = json.loads(Path(root, "meta", "info.json").read_text("utf-8-sig"))
        features, fps = info["features"], float(info["fps"])
        return [name for name, feature in features.items() if feature.get("dtype") == "image"], fps
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no LeRobot dataset
        return [], 0.0


def find_image_videos(files, root, make):
    """What takes the place of videos in `files` (paths below `root`): a parquet file of data/ and a camera each.

    make: (path, source, group, camera) -> Video. Raises `UserError` where pyarrow is missing.
    """
    videos = []
    for info in (path for path in files if path.replace(os.sep, "/").endswith("/meta/info.json")):
        dataset = os.path.dirname(os.path.dirname(info))
        for camera in image_features(dataset)[0]:
            for path in sorted(path for path in files if path.startswith(os.path.join(dataset, "data") + os.sep)):
                if path.endswith(".parquet"):
                    source = os.path.relpath(path, root).replace(os.sep, "/")
                    below = os.path.relpath(dataset, root).replace(os.sep, "/")
                    video = make(path, f"{source}#{camera}", "" if below == "." else below + "/", camera)
                    video.images, video.lerobot = camera, read_lerobot(dataset.replace(os.sep, "/") + "/")
                    videos.append(video)
    return videos


def open_table(video, columns):
    """The rows of a parquet file. Raises `UserError` or `Failure` where they cannot be read."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{video.path}: its images are in a parquet file: pip install pyarrow, which reads it"
        ) from None
    try:
        return parquet.ParquetFile(video.path).iter_batches(batch_size=16, columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's own are among these
        raise Failure(f"cannot be read ({str(error).splitlines()[0]})") from None


def probe_images(video):
    """The file's rows as a `Probe`, and its episodes as `place_episodes` gives them."""
    batches = open_table(video, ["episode_index"])
    episodes = [episode for batch in batches for episode in batch.column(0).to_pylist()]
    if not episodes:
        raise Failure("holds no row")
    fps = image_features(video.path.replace(os.sep, "/").rpartition("/data/")[0])[1] or 25.0
    first = decode(next(iter(open_table(video, [video.images]))).column(0)[0].as_py(), video)
    probe = Probe(
        codec="image", decoder="", pixel_format="rgb24", matrix="", transfer="", pixel_aspect=1, sideways=False,
        size=first.shape[1::-1], ordinary=False, fps=fps, times=[row / fps for row in range(len(episodes))],
        packets=len(episodes), total=len(episodes), middle=b"",
    )  # fmt: skip
    starts = [row for row, episode in enumerate(episodes) if row == 0 or episode != episodes[row - 1]]
    ends = [*starts[1:], len(episodes)]
    return probe, [((start - 0.5) / fps, (end - 0.5) / fps, episodes[start]) for start, end in zip(starts, ends)]


def decode(value, video):
    """A cell of an image column, {"bytes", "path"} or bytes -> (H, W, 3) uint8 BGR."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise Failure("its images are not inside the parquet file, but beside it: copy the dataset with them embedded")
    return common.decode_image(io.BytesIO(data).getvalue(), video.path)[..., ::-1]


def read_images(video, probe, options, threads, decoded):
    """Yields (seconds, BGR frame) of every row, as `read_ffmpeg` does of a video."""
    row = 0
    for batch in open_table(video, [video.images]):
        for value in batch.column(0).to_pylist():
            frame = decode(value, video)
            if options.width:
                frame = common.fit_frame(frame, options.width, options.height)
            decoded.frames += 1
            yield row / probe.fps, np.ascontiguousarray(frame)
            row += 1
