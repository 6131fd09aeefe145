"""Writes the frames of a video's clips as images, in threads, and measures their motion."""

import collections
import dataclasses
import struct
from pathlib import Path

import cv2
import numpy as np

import svd_common as common
from svd_parts.files import named
from svd_parts.flaws import Flaws
from svd_parts.metrics import flow_magnitude, motion_thumbnail

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

JPG_OPTIONS = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
BYTES_IN_FLIGHT = 1 << 27  # most bytes of one video's decoded frames that wait for an encoder


@dataclasses.dataclass
class Clip:
    """A clip while its folder is being written."""

    folder: Path
    shape: tuple  # (H, W, 3) of its frames
    times: list = dataclasses.field(default_factory=list)  # seconds of each frame
    thumbnail: np.ndarray = None  # the last small grey frame that motion was measured with
    flows: list = dataclasses.field(default_factory=list)  # motion from one thumbnail to the next


def has_isal():
    """Whether isal is installed, which writes PNG in a third of the time."""
    return isal_zlib is not None


def encode_image(frame, image_format):
    """(H, W, 3) uint8 BGR -> bytes of a PNG or JPEG file. ISA-L compresses the PNG where it is installed."""
    if image_format == "jpg":
        return cv2.imencode(".jpg", frame, JPG_OPTIONS)[1]
    return encode_png_fast(frame) if isal_zlib else cv2.imencode(".png", frame, common.PNG_OPTIONS)[1]


def write_image(frame, paths, image_format):
    """Encodes a frame once and writes it to each of `paths`, of which there may be none."""
    data = encode_image(frame, image_format) if paths else b""
    for path in paths:
        with named(path), open(path, "wb") as file:
            file.write(data)


def encode_png_fast(frame):
    """(H, W, 3) uint8 BGR -> PNG bytes by ISA-L: three to four times as fast as OpenCV's zlib, and files as small."""
    (height, width), rgb = frame.shape[:2], cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).reshape(len(frame), -1)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0], rows[0, 1:] = 2, rgb[0]  # 2 is the filter UP: a byte holds the difference to the one above
    np.subtract(rgb[1:], rgb[:-1], out=rows[1:, 1:])
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), (b"IDAT", isal_zlib.compress(rows, 1)), (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data]
        parts += [struct.pack(">I", isal_zlib.crc32(data, isal_zlib.crc32(kind)))]
    return b"".join(parts)


class FrameWriter:
    """Writes the clips of one video below `run.work` and measures their motion."""

    def __init__(self, video, stride, run):
        self.folder, self.stride, self.run = run.work / video.directory, stride, run
        self.clips, self.jobs, self.flaws = {}, collections.deque(), Flaws()

    def add(self, time, frame, names):
        """Writes a frame, (H, W, 3) uint8 BGR at `time` seconds, into the clips called `names`."""
        paths, thumbnail = [], None
        self.flaws.add(frame)
        for name in names:
            if name not in self.clips:
                self.clips[name] = Clip(self.folder / name, frame.shape)
                self.clips[name].folder.mkdir(parents=True)
            clip = self.clips[name]
            paths.append(f"{clip.folder}/{len(clip.times):05d}.{self.run.options.image_format}")
            if len(clip.times) % self.stride == 0:
                thumbnail = motion_thumbnail(frame, cv2.COLOR_BGR2GRAY) if thumbnail is None else thumbnail
                if clip.thumbnail is not None:
                    clip.flows.append(flow_magnitude(clip.thumbnail, thumbnail))
                clip.thumbnail = thumbnail
            clip.times.append(time)
        if self.run.waiting:  # the readers of other videos keep the cores busy, so a thread would not help
            write_image(frame, paths, self.run.options.image_format)
        else:
            self.jobs.append(self.run.encoders.submit(write_image, frame, paths, self.run.options.image_format))
            if len(self.jobs) > max(1, min(64, BYTES_IN_FLIGHT // frame.nbytes)):
                self.jobs.popleft().result()  # raises what went wrong, such as a full disk
        self.run.bar.update()

    def finish(self):
        """Waits until all is written and returns `{directory: Clip}`."""
        for job in self.jobs:
            job.result()
        return self.clips
