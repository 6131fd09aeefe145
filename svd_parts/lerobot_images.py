"""Reads LeRobot datasets whose cameras are images inside the parquet files of data/. An episode becomes a clip."""

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
    """The names of the cameras that are images, and the frames a second, by meta/info.json of the dataset at `root`."""
    try:
        info = json.loads(Path(root, "meta", "info.json").read_text("utf-8-sig"))
        features, fps = info["features"], float(info["fps"])
        return [name for name, feature in features.items() if feature.get("dtype") == "image"], fps
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # this is no LeRobot dataset
        return [], 0.0


def find_image_videos(files, root, make):
    """A `Video` for each camera that is images, in each parquet file of data/. files: all paths below `root`.

    make: (path, source, group, camera) -> Video. Raises `UserError` as `read_lerobot` does.
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
    """Yields the rows of a parquet file, 16 at a time. Raises `UserError` without pyarrow, `Failure` for a bad file."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{video.path} holds images in a parquet file; to read it: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(video.path).iter_batches(batch_size=16, columns=columns)
    except (OSError, ValueError) as error:  # these include pyarrow's errors
        raise Failure(f"cannot be read ({str(error).splitlines()[0]})") from None


def probe_images(video):
    """A `Probe` of a parquet file whose rows are the frames, and its episodes as `place_episodes` gives them."""
    batches = open_table(video, ["episode_index"])
    episodes = [episode for batch in batches for episode in batch.column(0).to_pylist()]
    if not episodes:
        raise Failure("a parquet file without rows")
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
        raise Failure("its images lie beside the parquet file: export the dataset with its images embedded")
    return common.decode_image(io.BytesIO(data).getvalue(), video.path)[..., ::-1]


def read_images(video, probe, options, threads, decoded):
    """Yields (seconds, (H, W, 3) uint8 BGR) of every row, as `read_ffmpeg` does for the frames of a video."""
    row = 0
    for batch in open_table(video, [video.images]):
        for value in batch.column(0).to_pylist():
            frame = decode(value, video)
            if options.width:
                frame = common.fit_frame(frame, options.width, options.height)
            decoded.frames += 1
            yield row / probe.fps, np.ascontiguousarray(frame)
            row += 1
