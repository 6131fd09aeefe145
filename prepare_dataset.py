"""Turns a folder of videos into a dataset of frames: a folder of images for each clip, and a line in metadata.jsonl.

    python prepare_dataset.py --video_dir ./videos --output_dir ./dataset --max_frames 25

Run the same command again after a stop: what is done stays, the rest is done. Exit status 0: every video is whole in
the dataset; 1: some are not, each named with its reason; 2: nothing to do, or a wrong option.

The way of one video: `find_videos` -> `probe_video` (ffmpeg lists its packets) -> `read_opencv`, or `read_ffmpeg` where
OpenCV is known to be wrong or gives fewer frames than there are -> `cut_clips` -> `write_clips` (threads encode the
images) -> `publish` (rename, then record).
"""

import argparse
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import math
import os
import queue
import re
import shutil
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "16"  # errors: `Complaints` hears them. Read when cv2 is imported
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"

import cv2
import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

import svd_common as common

VIDEO_SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .apng .asf .av1 .avc .avi .dav .dif .divx .dv .evo .f4v .flv .gif .h264 .h265 .hevc .insv"
    " .ivf .lrv .m1v .m2t .m2ts .m2v .m4v .mj2 .mjpeg .mjpg .mk3d .mkv .mod .mov .mp4 .mp4v .mpe .mpeg .mpg .mpv .mts"
    " .mxf .nut .obu .ogm .ogv .qt .rm .rmvb .tod .trp .ts .vob .vvc .webm .webp .wmv .wtv .xvid .y4m".split()
)
PARTIAL_SUFFIXES = (".part", ".crdownload", ".download", ".aria2", ".ytdl")  # x.mp4.part: x.mp4 is not whole yet
JPG_OPTIONS = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
BYTES_IN_FLIGHT = 1 << 28  # decoded frames that wait for an encoder, all videos together


class Failure(Exception):
    """Why one video gives nothing; the others go on."""


class Distrust(Exception):
    """OpenCV's frames of this file are not the right ones: ffmpeg decodes it instead."""


class Stopped(Exception):
    """Another thread ended the run."""


# ------------------------------------------------------------------------------------------------- find the videos

LEROBOT_V2 = re.compile(r"(?P<root>.*/)videos/chunk-\d+/(?P<camera>[^/]+)/(?P<episode>episode_\d+)\.\w+")
LEROBOT_V3 = re.compile(r"(?P<root>.*/)videos/(?P<camera>[^/]+)/chunk-(?P<chunk>\d+)/file-(?P<file>\d+)\.\w+")
SYSTEM_FOLDERS = frozenset(  # of Windows, macOS and network storage: deleted files, thumbnails, snapshots
    "$recycle.bin recycler recycled #recycle @recycle @eadir @tmp #snapshot @recently-snapshot ~snapshot lost+found"
    " __macosx".split()
) | {"system volume information"}


@dataclasses.dataclass
class Video:
    path: str
    source: str  # relative to --video_dir, with slashes
    directory: str  # its folder in the dataset, and the stem of its record
    group: str  # clips of one group (the cameras of an episode) belong on one side of a held-out split
    camera: str = ""
    episodes: list = None  # LeRobot v3: (first second, end, episode, frames or None) of the episodes in this file

    @property
    def shard_key(self):
        return int(hashlib.sha256(os.fsencode(self.source)).hexdigest()[:8], 16)


def directory_name(source):
    """A folder name that depends on the source's path alone: stable, readable, unique, and safe on every system.

    `a/x.mp4` -> `a__x`, `a/x.avi` -> `a__x.avi`. A name that had to change, or that another could hit (also on a disk
    that ignores case), carries `+` and eight digits of a hash; no plain name has a `+`.
    """
    stem, suffix = os.path.splitext(source)
    short = stem if suffix == ".mp4" and "." not in os.path.basename(stem) else source
    parts = [re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", part)) for part in short.split("/")]
    name = "__".join(parts).lstrip(".-") or "video"
    plain = name == short.replace("/", "__") and name == name.casefold() and len(name.encode()) <= 120
    if any("__" in part or part[0] == "_" or part[-1] == "_" for part in parts):
        plain = False
    if re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE):  # devices of Windows
        name, plain = "_" + name, False
    if plain:
        return name
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
    return f"{name.encode()[:100].decode(errors='ignore')}+{digest}"


def list_files(root):
    """The path of every file below `root`, and of every folder and link that cannot be followed.

    Links are followed, each folder is listed once, real folders first, so that files keep their real names. Hidden
    files and the folders of operating systems are left out.
    """
    folders, links, seen, paths = [root], [], set(), []
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(folder))
        except OSError:  # `check_file` says why
            paths.append(folder)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS:
                continue
            if entry.is_symlink():
                (links if os.path.isdir(entry.path) else paths).append(entry.path)
            else:
                (folders if entry.is_dir() else paths).append(entry.path)
    return paths


def find_videos(args):
    """The videos of --video_dir that the options choose, in name order; and `{source: why}` of what is left out."""
    root = os.path.abspath(args.video_dir)
    paths = list_files(root)
    present, videos, left_out = set(paths), [], {}
    for path in paths:
        if not is_video(path):
            continue
        video = describe_video(path, root)
        partial = next((path + suffix for suffix in PARTIAL_SUFFIXES if path + suffix in present), None)
        if partial:
            name = os.path.basename(partial)
            left_out[video.source] = f"{name} lies beside it: a download under way? If it is whole, delete {name}"
        else:
            videos.append(video)
    if not videos:
        raise common.UserError(f"--video_dir {args.video_dir}: no video in it" + no_video_hint(paths, left_out))
    chosen = [video for video in videos if is_wanted(video, args)]
    if not chosen:
        cameras = sorted({video.camera for video in videos if video.camera})
        hint = f"; the cameras are {', '.join(cameras)}" if args.camera and cameras else ""
        raise common.UserError(f"--camera, --include and --exclude leave none of {len(videos)} videos{hint}")
    for video in chosen:
        if match := LEROBOT_V3.fullmatch(video.path.replace(os.sep, "/")):
            episodes = read_episodes(match["root"]).get((match["camera"], int(match["chunk"]), int(match["file"])), [])
            video.episodes = sorted(episodes)
    return sorted(chosen, key=lambda video: common.natural_key(video.source)), left_out


def no_video_hint(paths, left_out):
    """What to say of a --video_dir without videos."""
    if left_out:
        return " but unfinished downloads: " + ", ".join(left_out)
    if any(path.lower().endswith(common.IMAGE_SUFFIXES) for path in paths):
        return ", but images: a folder with a folder of frames for each clip is what train_svd.py --dataset_dir takes"
    return ""


def is_video(path):
    """Whether the name is a video's (a WebP only where it is animated), or a folder or link that leads nowhere."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".webp":
        with contextlib.suppress(OSError), open(path, "rb") as file:
            head = file.read(21)
            return head[8:12] != b"WEBP" or (head[12:16] == b"VP8X" and bool(head[20] & 2))
    return suffix in VIDEO_SUFFIXES or os.path.isdir(path) or (os.path.islink(path) and not os.path.exists(path))


def describe_video(path, root):
    source = os.path.relpath(path, root).replace(os.sep, "/")
    video = Video(path, source, directory_name(source), group=source)
    posix = path.replace(os.sep, "/")
    if match := LEROBOT_V2.fullmatch(posix) or LEROBOT_V3.fullmatch(posix):
        dataset = os.path.relpath(match["root"], root).replace(os.sep, "/")
        video.camera = match["camera"]
        video.group = "" if dataset.startswith(".") else dataset + "/"  # the episode follows
        video.group += match.groupdict().get("episode", "")
    return video


def is_wanted(video, args):
    def named(patterns):
        names = video.source, os.path.basename(video.source)
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names)

    camera = not args.camera or any(video.camera == c or video.camera.endswith("." + c) for c in args.camera)
    return camera and (not args.include or named(args.include)) and not named(args.exclude)


def find_twins(videos):
    """`{source: why}` of videos that may show the same as one beside them: a camera's small copy, another format."""
    originals, twins = {}, {}
    for video in sorted(videos, key=lambda video: video.source.lower().endswith((".lrv", ".webm", ".gif"))):
        stem = os.path.splitext(video.source)[0]
        stem = re.sub(r"(^|/)G[XHL](\d{6})$", r"\1G\2", stem)  # GoPro: GL010001.LRV is the small GX010001.MP4
        stem = re.sub(r"[ ._-](proxy|preview|small|low|lowres|lrv|thumb|\d{3,4}p)$", "", stem, flags=re.IGNORECASE)
        if stem in originals:
            twins[video.source] = f"the same recording as {originals[stem]}? --exclude leaves one out"
        originals.setdefault(stem, video.source)
    return twins


@functools.cache
def read_episodes(root):
    """LeRobot v3: where each file's episodes lie, `{(camera, chunk, file): [(first second, end, episode, frames)]}`."""
    why = f"{root} is a LeRobot v3 dataset, whose files hold several episodes each. "
    try:
        from pyarrow import parquet
    except ImportError:
        raise common.UserError(why + "pip install pyarrow, which reads where they begin") from None
    tables = sorted(Path(root, "meta", "episodes").rglob("*.parquet"))
    if not tables:
        raise common.UserError(why + "Where they begin stands in meta/episodes/*/*.parquet, which is missing")
    fields, episodes = ("chunk_index", "file_index", "from_timestamp", "to_timestamp"), {}
    for table in tables:
        names = parquet.read_schema(table).names
        cameras = [name.split("/")[1] for name in names if re.fullmatch(r"videos/[^/]+/from_timestamp", name)]
        needed = [f"videos/{camera}/{field}" for camera in cameras for field in fields]
        needed += [name for name in ("episode_index", "length") if name in names]  # statistics make the rest large
        for row in parquet.read_table(table, columns=needed).to_pylist():
            for camera in cameras:
                chunk, file, start, end = (row[f"videos/{camera}/{field}"] for field in fields)
                if chunk is not None:  # an episode may lack a camera
                    place = episodes.setdefault((camera, int(chunk), int(file)), [])
                    place.append((start, end, int(row["episode_index"]), row.get("length")))
    return episodes


# ----------------------------------------------------------------------------------------------------------- probe

PLAIN_CODECS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "mjpeg"}
PLAIN_MATRICES = {"unknown", "bt709", "bt470bg", "smpte170m"}  # OpenCV turns these into RGB as ffmpeg does
HDR = {"smpte2084", "arib-std-b67"}  # PQ and HLG
NO_TIMESTAMP = -(1 << 62)  # what is below stands for none
MOST_KEY_FRAMES = 1000  # that the probe looks at: enough for hours, and bounded where every frame is one


@dataclasses.dataclass(frozen=True)
class Look:
    """What ffmpeg says of a decoded frame."""

    pixel_format: str
    matrix: str  # of the colours
    transfer: str
    stored: tuple  # width, height, as cropped
    pixel_aspect: float
    turn: str  # degrees, "nan" for some mirrors; empty where there is no display matrix
    interlaced: bool

    @property
    def sideways(self):
        return bool(self.turn) and 45 < abs(float(self.turn)) < 135

    @property
    def size(self):
        """Width and height as shown: turned, and with square pixels."""
        size = round(self.stored[0] * self.pixel_aspect), self.stored[1]
        return size[::-1] if self.sideways else size


@dataclasses.dataclass
class Probe:
    """What a file's header, its packets and its key frames say; nothing else of it has been decoded yet."""

    codec: str
    decoders: set  # the names under which ffmpeg's decoder of this video speaks
    look: Look  # of the first key frame
    ordinary: bool  # one video track, key frames all alike, not turned, and as large as the header says
    fps: float  # as claimed; 0 where it is not
    times: list  # seconds of every packet in display order; None where the file has none, or they run backwards
    packets: int
    truncated: bool = False
    problems: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)


def start_ffmpeg(video, decoder_options, output_options):
    """ffmpeg on one file, given as an open descriptor: no name can be read as a URL, a pattern or an option, and the
    whitelist lets nothing in the file open another file or the network."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info"]
    demuxer = ["-f", "mjpeg"] * (os.path.splitext(video.path)[1].lower() in (".mjpeg", ".mjpg"))  # or it is a still
    command += [*demuxer, *decoder_options, "-protocol_whitelist", "fd", "-i", "fd:", "-map", "0:V:0", *output_options]
    with open(video.path, "rb") as file:  # a session of its own: Ctrl-C must not end its video early
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        return subprocess.Popen(command, stdin=file, **options)


def check_exit(code):
    """Raises `Failure` where ffmpeg did not end by itself. Windows gives a crash a large number instead of a signal."""
    if code == -9:
        raise Failure("ffmpeg was killed by signal 9: too little memory?")
    if code < 0 or code > 255:
        version, cure = imageio_ffmpeg.get_ffmpeg_version(), ""
        if version.startswith("7.0"):  # it crashes on every .ts
            cure = ": a newer imageio-ffmpeg is needed, and for that a newer Python, 3.10 or later"
        raise Failure(f"ffmpeg {version} crashed on it (signal {-code}){cure}")


def messages(lines, speakers, level="error"):
    """What parts of ffmpeg, by name, say in lines of `-v level+info`, as in `[h264 @ 0x5] [error] no frame!`"""
    found = (re.match(r"\[([^\]]*?) @ [^\]]*\] (?:\[dec:(\S+) @ [^\]]*\] )?\[(\w+)\] (.*)", line) for line in lines)
    return [m[4] for m in found if m and m[3] == level and (speakers & {m[1], m[2], m[1].split("/")[0]})]


def picture_errors(lines, probe):
    """The messages that tell of damaged pictures: ffmpeg's own verdict on a frame, what its decoder of the video
    cannot read; not what is said of sound, of the container or of data that lies beside the picture."""
    found = [line.split("] ")[-1] for line in lines if "corrupt decoded frame" in line]
    return found + [text for text in messages(lines, probe.decoders) if not BESIDE_THE_PICTURE.search(text)]


BESIDE_THE_PICTURE = re.compile(
    r"\b(sei|vui|app\d*|com|icc|exif|side data|metadata|user ?data|timecode|caption)\b", re.I
)


def check_file(video):
    """Raises `Failure` for what is no video at first sight; never opens what is no regular file (a pipe would hang)."""
    try:
        status = os.stat(video.path)
        if not stat.S_ISREG(status.st_mode):
            raise Failure("a folder that cannot be listed" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size == 0:
            raise Failure("an empty file (0 bytes)")
        with open(video.path, "rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise Failure("a link to a file that is not there") from None
    except OSError as error:
        raise Failure(f"cannot be read: {error.strerror}") from None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise Failure("a git-lfs pointer, not the video itself: run `git lfs pull`")
    if text.startswith((b"<!doctype html", b"<html")):
        raise Failure("an HTML page, not a video: a failed download?")
    if b"<mpd" in text or text.startswith(
        (b"#extm3u", b"ffconcat", b"[playlist]", b"<asx", b"<smil", b"file ", b"v=0")
    ):
        raise Failure("a playlist, not a video: put the files that it names into --video_dir")
    if not head.strip(b"\0"):
        raise Failure("holds zeros instead of a video: an interrupted download?")
    if not text.startswith(b"yuv4mpeg") and all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 for byte in head):
        raise Failure("text, not a video")
    return status


def probe_video(video, max_packets=None):
    """Lists a file's packets and looks at its key frames. Raises `Failure` with the reason where there is no video.

    All tracks are listed, because a whole file may end later than its video does; only the first `max_packets` of the
    video where no more is wanted.
    """
    listing, log = run_probe(video, max_packets)
    opened = list(itertools.takewhile(lambda line: not re.match(r"\[info\] (Output #0|Stream mapping)", line), log))
    header, output = "\n".join(opened), "\n".join(log[len(opened) :])
    tracks = re.findall(r"^\[info\]   Stream #0:\d+.*?: (\w+): ", header, re.MULTILINE)
    packets = [line.split(",") for line in listing if line[:1].isdigit()]  # stream, dts, pts, duration, size, checksum
    shown = [packet for packet in packets if packet[0] == "0"]
    encrypted = any("Encryption info" in field for packet in shown[:1] for field in packet)
    if encrypted or re.search(r"\((encv|drm\w) / |DRM protected", header):
        raise Failure("encrypted: only a copy without protection can be read")
    if not shown:
        raise Failure(why_unreadable(tracks, log))
    if re.search(r"^\[info\] Input #0, (\w+_pipe|image2|tty), from ", header, re.MULTILINE):
        raise Failure("a still image or text, not a video")
    fields = dict(match.groups() for row in listing if (match := re.match(r"#(\w+ \d+): (.*)", row)))
    ticks = {number: parse_ratio(fields[f"tb {number}"]) for number in {packet[0] for packet in packets}}
    stamps = sorted(int(packet[2]) for packet in shown)
    if stamps[0] < NO_TIMESTAMP:  # AVI and bare streams: no presentation times, but steady decoding times
        stamps = sorted(int(packet[1]) for packet in shown)
    steady = stamps[0] > NO_TIMESTAMP and len(set(stamps)) == len(stamps)  # ffmpeg repeats those that run backwards
    fps = re.search(r"Stream #0:0.*: Video: .*, ([\d.]+)(k?) fps", output)
    decoder = re.search(r"Stream #0:\d+ -> #1:0 \((\w+) \((\w+)\)", output)
    stored = tuple(int(n) for n in fields["dimensions 0"].split("x"))
    key_frames = describe_frames(log)
    look = key_frames[0] if key_frames else Look("unknown", "unknown", "unknown", stored, 1, "", False)
    probe = Probe(
        codec=fields["codec_id 0"],
        decoders={fields["codec_id 0"], *(decoder.groups() if decoder else ())} - {"native"},
        look=look,
        ordinary=len(set(key_frames)) == 1 and look.size == stored and not look.turn and tracks.count("Video") == 1,
        fps=float(fps[1]) * (1000 if fps[2] else 1) if fps else 0.0,
        times=[(stamp - stamps[0]) * ticks["0"] for stamp in stamps] if steady else None,
        packets=len(shown),
    )
    if look.interlaced:
        probe.notes.append("interlaced")
    if look.transfer in HDR:
        probe.notes.append(f"HDR ({look.transfer}) made SDR")
    if re.match(r"yuva|gbra|rgba|bgra|argb|abgr|ya\d", look.pixel_format):
        probe.notes.append("alpha dropped")
    if re.search(r"DOVI configuration record:.*profile: 5\b", header):
        probe.notes.append("Dolby Vision profile 5: its colours are wrong without Dolby's decoder")
    if not max_packets or len(shown) < max_packets:
        judge_ending(video, probe, packets, ticks, header)
    judge_packets(probe, shown, messages(log, {"in#0"}))
    return probe


def run_probe(video, max_packets):
    """ffmpeg's list of packets (the framecrc format), and its log with what showinfo says of the key frames."""
    tracks = ["-map", "0:a?", "-map", "0:s?", "-map", "0:d?", "-copy_unknown"]
    tracks = ["-frames:v", str(max_packets)] if max_packets else tracks
    packets = [*tracks, "-c", "copy", "-f", "framecrc", "pipe:1"]
    until = ["-t", str(max_packets / 5)] if max_packets else []  # seconds: longer than these packets last
    frames = [
        "-map",
        "0:V:0",
        "-frames:v",
        str(MOST_KEY_FRAMES),
        *until,
        "-vf",
        "showinfo=checksum=0",
        "-f",
        "null",
        "-",
    ]
    decoder = ["-threads", "1", "-noautorotate", "-skip_frame", "nokey"]
    process = start_ffmpeg(video, decoder, [*packets, *frames])
    listing, log = (part.decode("utf-8", "replace").splitlines() for part in process.communicate())
    check_exit(process.returncode)
    return listing, log


def parse_ratio(text):
    """`1/12288` -> seconds; 1 for `0/1` and `1/0`, which say nothing."""
    n, d = map(int, text.split("/"))
    return n / d if n and d else 1


def describe_frames(log):
    """What the showinfo filter says of each frame, as `Look`s."""
    text, looks = "\n".join(line for line in log if "showinfo" in line), []
    for part in re.split(r"\] n: *\d+ ", text)[1:]:
        frame = re.search(r" fmt:(\w+) .*sar:(\d+/\d+) s:(\d+)x(\d+) i:(\w)", part)
        colours = re.search(r"color_space:(\S+) .*color_trc:(\S+)", part)
        turn = re.search(r"displaymatrix: rotation of (\S+)", part)
        if frame and colours:
            aspect = parse_ratio(frame[2])
            aspect = aspect if 0.1 < aspect < 10 else 1
            stored = int(frame[3]), int(frame[4])
            looks.append(Look(frame[1], *colours.groups(), stored, aspect, turn[1] if turn else "", frame[5] != "P"))
    return looks


def judge_ending(video, probe, packets, ticks, header):
    """Whether the file ends where it should, by its header's duration, its chunks' lengths and its last packet."""
    clock = re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)(?:, start: ([\d.]+))?", header, re.MULTILINE)
    hours, minutes, seconds, start = (float(part or 0) for part in (clock.groups() if clock else "0000"))
    claim = hours * 3600 + minutes * 60 + seconds - start
    spans = [(max(int(p[1]), int(p[2])), int(p[3]), ticks[p[0]]) for p in packets]
    begins = [stamp * tick for stamp, _, tick in spans if stamp > NO_TIMESTAMP]
    ends = [(stamp + duration) * tick for stamp, duration, tick in spans if stamp > NO_TIMESTAMP]
    lasts = max(ends) - min(begins) if ends else claim
    size, end = os.path.getsize(video.path), container_end(video.path)
    if claim - lasts > max(0.5, 0.05 * claim) + 1 / (probe.fps or 25):
        probe.problems.append(f"ends after {lasts:.1f} s of the {claim:.1f} s that its header claims")
    elif end > size + 1024:
        probe.problems.append(f"ends after {size} of the {end} bytes that its header claims")
    elif is_corrupt(packets[-1]):
        probe.problems.append("ends in the middle of a packet")
    elif 0 < end < size - 1024 and sum(int(packet[4]) for packet in packets) <= end:
        probe.notes.append(f"its last {size - end} bytes of {size} belong to nothing: another file behind it?")
    probe.truncated = bool(probe.problems)


BOXES = frozenset(b"ftyp styp moov moof mdat mfra free skip wide uuid meta sidx ssix emsg prft pdin pnot udta".split())
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def container_end(path):
    """Where an MP4, an AVI or a WMV ends by the lengths that stand in it; 0 for other files.

    Beyond the file's end: the file was cut. Before it: what follows belongs to nothing, or is another file.
    """
    end, size = 0, os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(4096)
        if ASF_FILE_PROPERTIES in start:
            at = start.index(ASF_FILE_PROPERTIES) + 40
            return int.from_bytes(start[at : at + 8], "little")
        while end < size:
            file.seek(end)
            head = file.read(16)
            if head[:4] == b"RIFF":
                length = int.from_bytes(head[4:8], "little")
                length = 8 + length if length < 0xFFFFFFFF else 0
            elif head[4:8] in BOXES and not (end and head[4:8] == b"ftyp"):  # a second ftyp begins another file
                length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
            else:
                break
            if length < (9 if head[:4] == b"RIFF" else 8):  # to the end of the file, or never written
                return 0
            end += length
    return end


def packet_flags(packet):
    """1: a key frame; 2: the container is not sure of it."""
    return int(packet[6][3:], 16) if len(packet) > 6 and packet[6].startswith(" F=") else 1


def is_corrupt(packet):
    return bool(packet_flags(packet) & 2)


def judge_packets(probe, packets, said):
    """Whether the container lost pictures: packets that it marks, or complaints that come with a gap in the times.

    A mark right before a key frame is where two recordings were joined, and complaints alone are of other things.
    """
    for number, packet in enumerate(packets[:-1]):
        if is_corrupt(packet) and not any(packet_flags(after) & 1 for after in packets[number + 1 : number + 4]):
            probe.problems.append("damaged: the container has lost a part of the video")
            break
    gaps = [b - a for a, b in zip(probe.times or [], (probe.times or [])[1:])]
    if said and (probe.truncated or (gaps and max(gaps) > 1.6 * statistics.median(gaps))):
        probe.problems.append(f"damaged: {said[0]}")
    elif said:
        probe.notes.append(f"ffmpeg says: {said[0]}")


def why_unreadable(tracks, log):
    errors = re.findall(r"\[(?:error|fatal)\] (.*)", "\n".join(log))
    if any("Protocol not found" in error for error in errors):
        raise common.UserError(f"{imageio_ffmpeg.get_ffmpeg_exe()} is too old: pip install -U imageio-ffmpeg")
    if "Video" in tracks and not any("matches no streams" in error for error in errors):
        return "its video track holds no frame"
    if tracks:
        return "no video track" + (" (audio only)" if "Audio" in tracks else "")
    if any("moov atom not found" in error for error in errors):
        return "no index in it (moov atom not found): the recording or the download was cut short"
    return "not a video that ffmpeg can read" + (f" ({errors[0]})" if errors else "")


def opencv_is_right(video, probe):
    """Whether OpenCV is known to give a file's frames as a player shows them (interlaced: black; mirrored: turned)."""
    return (
        probe.ordinary
        and probe.codec in PLAIN_CODECS
        and probe.look.pixel_format in ("yuv420p", "yuvj420p")
        and probe.look.matrix in PLAIN_MATRICES
        and probe.look.transfer not in HDR
        and not probe.look.interlaced
        and probe.times is not None
        and "%" not in video.path  # could be read as a pattern
        and not any("\udc80" <= letter <= "\udcff" for letter in video.path)  # not UTF-8: OpenCV crashes
    )


# ---------------------------------------------------------------------------------------------------------- decode


@dataclasses.dataclass
class Decoded:
    """What a reader has found so far."""

    frames: int = 0
    errors: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)


def read_opencv(video, probe, args, threads, decoded):
    """Yields (seconds, BGR frame) as OpenCV decodes them. Raises `Distrust` at the first sign that they are wrong."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    for time in probe.times:
        ok, frame = capture.read()
        if not ok:
            raise Distrust("fewer frames than packets")
        if frame.shape != (*probe.look.size[::-1], 3):
            raise Distrust("another size")
        if not frame[::16, ::16].any() and not frame.any():
            raise Distrust("an all-black frame, as interlaced video gives")
        decoded.frames += 1
        yield time, frame
    if capture.grab():
        raise Distrust("more frames than packets")


class Complaints:
    """Hears whether OpenCV's decoders, of any video, print errors: the only sign of damage that they conceal.

    They print to the C library's standard output, which leads into a file meanwhile.
    """

    def __enter__(self):
        sys.stdout.flush()
        self.libc = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")
        self.file, self.terminal = tempfile.TemporaryFile(), os.dup(1)
        os.dup2(self.file.fileno(), 1)
        return self

    def size(self):
        """Grows with every error."""
        self.libc.fflush(None)
        return os.fstat(self.file.fileno()).st_size

    def __exit__(self, *_):
        self.size()
        os.dup2(self.terminal, 1)
        os.close(self.terminal)
        self.file.close()


def ffmpeg_finds_damage(video, probe, args):
    """Whether ffmpeg, in a pass of its own, finds damaged pictures among those that are wanted."""
    limit = ["-frames:v", str(args.max_frames)] if args.max_frames and not args.fps and video.episodes is None else []
    process = start_ffmpeg(video, [], [*limit, "-f", "null", "-"])
    log = process.communicate()[1].decode("utf-8", "replace").splitlines()
    return bool(picture_errors(log, probe))


def video_filters(probe, args):
    """ffmpeg's filters: HDR to SDR, square pixels, --width x --height (cover, then crop the centre), RGB.

    Sizes are formulas of each frame's own, since a video's size may change midway.
    """
    look, filters = probe.look, []
    if look.transfer in HDR:
        matrix = look.matrix if look.matrix.startswith("bt2020") else "bt2020nc"
        filters.append("format=yuv444p12le|gbrp12le")  # zscale cannot halve an odd size
        filters.append(f"zscale=min={matrix}:pin=bt2020:tin={look.transfer}:t=linear:npl=100,format=gbrpf32le")
        filters.append("zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p")
    aspect = "if(between(sar,0.1,10),sar,1)"
    width, height = ("iw", f"ih/{aspect}") if look.sideways else (f"iw*{aspect}", "ih")
    if args.width:
        scale = f"max({args.width}/({width}),{args.height}/({height}))"
        width, height = f"max({args.width},round({width}*{scale}))", f"max({args.height},round({height}*{scale}))"
        smaller = max(args.width / look.size[0], args.height / look.size[1]) < 1
        filters.append(f"scale='{width}':'{height}':flags={'area' if smaller else 'bicubic'}")
        if look.pixel_format == "yuv420p" and smaller:  # cheaper and truer than to scale and go to RGB in one step
            filters.append("format=yuv444p")
        filters.append(f"crop={args.width}:{args.height}")
    elif look.pixel_aspect != 1:
        filters.append(f"scale='round({width})':'round({height})'")
    return ",".join([*filters, "setsar=1", "format=rgb24", "showinfo=checksum=0"])


def read_ffmpeg(video, probe, args, threads, decoded):
    """Yields (seconds, BGR frame) from a pipe of ffmpeg, which crops, turns and mirrors as the file says.

    Frames of a size that changes midway come each in its own, and are made to cover the first one's. Timestamps that
    begin again, in recordings joined into one file, go on where they were.
    """
    output = ["-vf", video_filters(probe, args), *"-noautoscale -fps_mode passthrough -f rawvideo pipe:1".split()]
    process = start_ffmpeg(video, ["-threads", str(threads)], output)
    with contextlib.suppress(ImportError, AttributeError, OSError):  # a larger pipe, where there is such a thing
        import fcntl

        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
    announced = queue.Queue()  # (seconds or "NOPTS", width, height) of each frame, before it comes

    def read_log():
        for line in process.stderr:
            line = line.decode("utf-8", "replace").rstrip()
            if match := re.search(r"showinfo.*\bpts_time:(\S+) .* s:(\d+)x(\d+) ", line):
                announced.put((match[1], int(match[2]), int(match[3])))
            else:
                decoded.errors.extend(picture_errors([line], probe))
        announced.put(None)

    log = threading.Thread(target=read_log, daemon=True)
    log.start()
    step, size, begin, last, later = 1 / (probe.fps or 25), None, None, 0, 0
    try:
        while next_frame := announced.get():
            time, *own_size = next_frame
            frame = np.empty((*own_size[::-1], 3), np.uint8)
            view = memoryview(frame).cast("B")
            while view and (count := process.stdout.readinto(view)):
                view = view[count:]
            if view:
                break
            time = decoded.frames * step if time == "NOPTS" else float(time)
            begin = time if begin is None else begin
            if time - begin + later < last:
                later = last + step - (time - begin)
                decoded.notes.append(f"timestamps begin again at {last + step:.3f} s: recordings joined?")
            last = time - begin + later
            size = size or own_size
            if own_size != size:
                frame = common.fit_frame(frame, *size)
                decoded.notes.append(f"its size changes midway, to {own_size[0]}x{own_size[1]}: fitted to the first")
            decoded.frames += 1
            # ffmpeg's own RGB, turned around: its BGR is not quite equal
            yield last, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR, dst=frame)
        log.join()
        check_exit(process.wait())
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


# ---------------------------------------------------------------------------------------------------- choose frames


def resample(frames, fps):
    """The frame nearest to each tick of 1/fps seconds, by timestamps; never one twice: no copy fills a gap."""
    start, best, gap, last = None, None, 0, 0
    for time, frame in frames:
        start = time if start is None else start
        position = (time - start) * fps
        tick = math.floor(position + 0.5)
        if best and best[0] != tick:
            yield best[2:]
            best = None
        if best is None or abs(position - tick) < best[1] - 1e-6:
            best = tick, abs(position - tick), time, frame
        gap, last = position - last, position
    if best and best[0] - (best[2] - start) * fps <= gap / 2 + 1e-6:  # or the tick's own frame would come after the end
        yield best[2:]


CUT_LEAST, CUT_RATIO = 10, 2.5  # a cut changes the picture by so much of 255, and by so many times what is around it
SHORTEST_SHOT = 5  # frames; also how far around a change is looked


def number_scenes(frames):
    """Yields (scene, (seconds, frame)): the number rises where the shot changes, or where the timestamps have a hole.

    A cut is a change between two frames far larger than those before and after it: where the camera or the scene
    moves, the neighbours change as much. No shot is shorter than `SHORTEST_SHOT` frames.
    """
    scene, shot, ahead, before, gaps = 0, [], collections.deque(), None, []

    def settle():
        """Decides for the oldest waiting frame whether a shot begins with it."""
        nonlocal scene, shot, gaps
        pair, change, gap = ahead.popleft()
        around = max([*shot[-2 * SHORTEST_SHOT :], *(after for _, after, _ in ahead)], default=0)
        cut = len(ahead) >= SHORTEST_SHOT - 1 and len(shot) >= SHORTEST_SHOT and change > CUT_RATIO * around
        if (cut and change > CUT_LEAST) or gap > max(1, 10 * max(gaps, default=gap)):
            scene, shot, gaps = scene + 1, [0], []
        else:
            shot, gaps = [*shot[-2 * SHORTEST_SHOT :], change], [*gaps[-7:], gap]
        return scene, pair

    last = None
    for time, frame in frames:
        step = max(1, min(frame.shape[:2]) // 96)
        small = cv2.resize(frame[::step, ::step], (48, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        change = 0.0 if before is None else float(np.abs(small - before).mean())
        ahead.append(((time, frame), change, 0 if last is None else time - last))
        before, last = small, time
        if len(ahead) > SHORTEST_SHOT - 1:
            yield settle()
    while ahead:
        yield settle()


def place_episodes(video, probe):
    """`[(first second, end, episode)]` of the episodes in a LeRobot v3 file; None for other files.

    Where their numbers of frames add up to the file's, the frames are counted: the timestamps drift from episode to
    episode. Raises `Failure` where the timestamps are not those of this file.
    """
    if video.episodes is None:
        return None
    times = probe.times or [number / (probe.fps or 25) for number in range(probe.packets)]
    half_gap = 0.5 / average_fps(times, probe.fps)[0]
    counted = sum(frames or 0 for *_, frames in video.episodes) == len(times)
    at, places, short = 0, [], []
    for start, end, episode, frames in video.episodes:
        if not counted:
            at = bisect.bisect_left(times, start - half_gap)
        elif abs(times[at] - start) > 0.2 + 0.01 * start:
            raise Failure(
                f"meta/episodes says that episode {episode} begins at {start:.1f} s, not at {times[at]:.1f} s"
            )
        stop = at + frames if frames else bisect.bisect_left(times, end - half_gap)
        if stop > len(times) or start > times[-1] + half_gap:
            short.append(episode)
        if at < len(times):
            places.append((times[at] - half_gap, times[stop] - half_gap if stop < len(times) else math.inf, episode))
        at = stop
    if not places:
        where = f"at {video.episodes[0][0]:.1f} s, and it ends at {times[-1]:.1f} s" if video.episodes else "nowhere"
        raise Failure(f"by meta/episodes its episodes begin {where}")
    if short:
        probe.problems.append(f"episode {', '.join(map(str, short))}: fewer frames than meta/episodes says")
    return places


def cut_clips(frames, video, episodes, args):
    """Yields (seconds, frame, names) with the names of the clips that the frame belongs to: one for a whole video;
    `name@0003` for the windows of --clip_frames and the shots of --split_scenes; none between LeRobot v3's episodes.

    `frames` are pairs (seconds, (H, W, 3) uint8), `episodes` is what `place_episodes` gives.
    """
    numbers = itertools.count()

    def episode_of(pair):
        if episodes is None:
            return ""
        begin, end, episode = episodes[max(0, bisect.bisect(episodes, (pair[0], math.inf)) - 1)]
        return f"episode_{episode:06d}" if begin <= pair[0] < end else None

    for episode, part in itertools.groupby(frames, episode_of):
        if episode is None:
            continue
        part = resample(part, args.fps) if args.fps else part
        part = itertools.islice(part, args.max_frames)
        shots = itertools.groupby(number_scenes(part), lambda pair: pair[0]) if args.split_scenes else [(0, part)]
        for _, shot in shots:
            open_clips = []
            for index, pair in enumerate(shot):
                time, frame = pair[1] if args.split_scenes else pair
                if index % (args.clip_stride or args.clip_frames or math.inf) == 0:
                    number = [f"{next(numbers):04d}"] if args.split_scenes or args.clip_frames else []
                    name = "@".join([video.directory, *([episode] if episode else []), *number])
                    open_clips.append((name, index + (args.clip_frames or math.inf)))
                open_clips = [(name, end) for name, end in open_clips if index < end]
                yield time, frame, [name for name, _ in open_clips]
        if episodes is None:
            return  # --max_frames: what follows is not decoded


# ----------------------------------------------------------------------------------------------------- write clips


@dataclasses.dataclass
class Clip:
    """One folder of the dataset while it is being written."""

    folder: Path
    stride: int  # frames between the two pictures of a motion measurement
    shape: tuple
    times: list = dataclasses.field(default_factory=list)
    thumbnail: np.ndarray = None
    flows: list = dataclasses.field(default_factory=list)


class LogLines:
    """Standard error for a progress bar where it is no terminal: each state of the bar becomes a line of the log."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self):
        sys.stderr.flush()


class Run:
    """What the threads of a run share: options, folders, the encoders, the progress bar, the stop sign."""

    def __init__(self, args, videos, complaints):
        self.args = args
        self.output = Path(args.output_dir)
        self.state = self.output / ".prepare"  # a record for each finished video, and the folders being written
        self.work = self.state / ("work" + args.shard_name)
        self.readers = max(1, min(args.num_workers, len(videos)))
        self.encoders = ThreadPoolExecutor(args.num_workers)
        self.huge, self.complaints = threading.Lock(), complaints
        if sys.stderr.isatty():
            self.bar = tqdm(unit="frame", dynamic_ncols=True)
        else:
            line = "{n_fmt} of about {total_fmt} frames after {elapsed}, {remaining} left"
            self.bar = tqdm(file=LogLines(), bar_format=line, delay=10, mininterval=10, miniters=1)
        self.waiting, self.expected, self.begun = len(videos), 0, 0
        self.stop, self.error, self.lock = threading.Event(), None, threading.Lock()

    def expect(self, frames=None):
        """A video begins, or needs nothing: the bar's total is what is known, plus the mean for those that wait."""
        with self.lock:
            self.waiting -= 1
            if frames is not None:
                self.begun, self.expected = self.begun + 1, self.expected + frames
            self.bar.total = self.expected + round(self.waiting * self.expected / max(1, self.begun))


def average_fps(times, *claims):
    """The true mean rate, frames a second, of timestamps in seconds, holes left out; and the holes' lengths in seconds.

    `claims`: rates that somebody else names; the first counts where there are no timestamps.
    """
    gaps = [b - a for a, b in zip(times, times[1:])]
    longest = max(1.0, 10 * statistics.median(gaps)) if gaps else 0
    steady = [gap for gap in gaps if gap <= longest]
    if not sum(steady):
        return next((claim for claim in claims if claim), 25.0), []
    fps = len(steady) / sum(steady)
    for claim in claims:  # timestamps in whole milliseconds leave an error that the rate in the header does not have
        if claim and abs(fps - claim) <= 0.01 * min(1, fps) + fps * 0.0015 / sum(steady):
            fps = claim
    fps = round(fps, 3) if fps >= 1 else float(f"{fps:.6g}")  # a picture an hour has a rate too
    return fps, [gap for gap in gaps if gap > longest]


def encode_image(frame, image_format):
    """(H, W, 3) BGR -> bytes of a PNG or JPEG file."""
    if image_format == "jpg":
        return cv2.imencode(".jpg", frame, JPG_OPTIONS)[1]
    return encode_png_fast(frame) if isal_zlib else cv2.imencode(".png", frame, common.PNG_OPTIONS)[1]


def encode_png_fast(frame):
    """(H, W, 3) BGR -> PNG bytes, deflated by ISA-L: three to four times as fast as OpenCV's zlib, files as small."""
    (height, width), rgb = frame.shape[:2], cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).reshape(len(frame), -1)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0], rows[0, 1:] = 2, rgb[0]  # 2: filter UP, each byte is its difference to the one above
    np.subtract(rgb[1:], rgb[:-1], out=rows[1:, 1:])
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), (b"IDAT", isal_zlib.compress(rows, 1)), (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data]
        parts += [struct.pack(">I", isal_zlib.crc32(data, isal_zlib.crc32(kind)))]
    return b"".join(parts)


class FrameWriter:
    """Writes the clips of one video below `run.work`, with the encoder threads, and measures their motion."""

    def __init__(self, video, probe, run):
        fps = average_fps(probe.times or [], probe.fps)[0]
        self.stride = common.motion_stride(min(fps, run.args.fps or fps))
        self.folder, self.run = run.work / video.directory, run
        self.clips, self.batch, self.jobs, self.room = {}, [], [], None

    def add(self, time, frame, names):
        """Takes a frame, (H, W, 3) uint8 BGR at `time` seconds, of the clips called `names`."""
        if self.room is None:  # what waits for an encoder is bounded in bytes; small frames go in batches of a megabyte
            self.batch_size = min(64, 1 + (1 << 20) // frame.nbytes)
            ahead = BYTES_IN_FLIGHT // self.run.readers // (self.batch_size * frame.nbytes)
            self.room = threading.BoundedSemaphore(max(1, min(16, ahead)))
        paths, thumbnail = [], None
        for name in names:
            if name not in self.clips:
                self.clips[name] = Clip(self.folder / name, self.stride, frame.shape)
                self.clips[name].folder.mkdir(parents=True)
            clip = self.clips[name]
            paths.append(f"{clip.folder}/{len(clip.times):05d}.{self.run.args.image_format}")
            if len(clip.times) % self.stride == 0:
                thumbnail = common.motion_thumbnail(frame, cv2.COLOR_BGR2GRAY) if thumbnail is None else thumbnail
                if clip.thumbnail is not None:
                    clip.flows.append(common.flow_magnitude(clip.thumbnail, thumbnail))
                clip.thumbnail = thumbnail
            clip.times.append(time)
        self.batch.append((frame, paths))
        if len(self.batch) == self.batch_size:
            self.send()

    def send(self):
        """Hands the batch to an encoder thread; small frames only where no other video keeps the cores busy."""
        batch, self.batch = self.batch, []
        if self.batch_size > 1 and self.run.waiting:
            self.encode(batch)
        else:
            self.room.acquire()
            self.jobs.append(self.run.encoders.submit(self.encode, batch))
            self.jobs[-1].add_done_callback(lambda _: self.room.release())
        self.run.bar.update(len(batch))

    def encode(self, batch):
        try:
            for frame, paths in batch:
                data = encode_image(frame, self.run.args.image_format)
                for path in paths:
                    with open(path, "wb") as file:
                        file.write(data)
        except OSError as error:  # a full disk: no other video has room either
            self.run.error = error
            self.run.stop.set()
            raise

    def finish(self):
        """Returns `{directory: Clip}` when all is written."""
        if self.batch:
            self.send()
        for job in self.jobs:
            job.result()
        return self.clips


def decode_video(video, probe, episodes, reader, threads, run):
    """Writes a video's clips below `run.work`; returns `{directory: Clip}` and what the reader found (`Decoded`)."""
    decoded, heard = Decoded(), run.complaints.size()
    frames, writer = reader(video, probe, run.args, threads, decoded), FrameWriter(video, probe, run)
    try:
        for time, frame, names in cut_clips(frames, video, episodes, run.args):
            if run.stop.is_set():
                raise Stopped
            writer.add(time, frame, names)
        clips = writer.finish()
    finally:
        frames.close()
        wait(writer.jobs)  # nothing writes into the folders any more, whatever happened
    if reader is read_opencv and run.complaints.size() > heard and ffmpeg_finds_damage(video, probe, run.args):
        raise Distrust("damage that the decoder conceals")
    if reader is read_ffmpeg and threads > 1 and decoded.errors:
        raise Distrust("how damage is concealed depends on the number of threads")
    return clips, decoded


def prepare_video(video, run, old):
    """Does one video unless the record of an earlier run says that it is done; returns its record.

    Raises `Failure` where it gives nothing.
    """
    args = run.args
    status = check_file(video)
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if old:
        changed = any(old[key] != value for key, value in stamp.items())
        if changed and not args.overwrite:
            raise Failure("changed since it was prepared, the dataset holds what it was: --overwrite makes it again")
        if not changed and old["options"] == shaping_options(args) and is_complete(old, run.output):
            run.expect()
            return old
    first_only = args.max_frames and not args.fps and video.episodes is None
    probe = probe_video(video, args.max_frames + 64 if first_only else None)
    wanted = min(args.max_frames or probe.packets, probe.packets)
    run.expect(wanted)
    episodes = place_episodes(video, probe)
    threads = max(1, args.num_workers // run.readers)
    attempts = [(read_opencv, threads)] * (opencv_is_right(video, probe) and not args.width)
    attempts += [(read_ffmpeg, threads)] * (threads > 1) + [(read_ffmpeg, 1)]
    with run.huge if math.prod(probe.look.size) > 1 << 24 else contextlib.nullcontext():  # one 8K video at a time
        for reader, threads in attempts:
            try:
                clips, decoded = decode_video(video, probe, episodes, reader, threads, run)
                break
            except Distrust:
                shutil.rmtree(run.work / video.directory, ignore_errors=True)
    if not clips:
        raise Failure("no frame of it can be decoded" + (f" ({decoded.errors[0]})" if decoded.errors else ""))
    truncated, problems = probe.truncated, list(probe.problems)
    if decoded.errors and decoded.frames < wanted:
        truncated = True
        problems.append(f"{decoded.frames} of {wanted} frames could be decoded")
    if decoded.errors:
        problems.append(f"damaged: {decoded.errors[0]}")
    common_fields = {"decoder": reader.__name__.replace("read_", ""), "codec": probe.codec, "truncated": truncated}
    common_fields.update(problems=problems, notes=list(dict.fromkeys(probe.notes + decoded.notes)))
    record = {"source": video.source, **stamp, "options": shaping_options(args), "clips": [], "dropped": {}}
    for directory, clip in clips.items():
        line = {**describe_clip(directory, clip, video, probe, args), **common_fields}
        if line["num_frames"] < args.min_frames:
            record["dropped"][directory] = f"{line['num_frames']} frames, fewer than {args.min_frames}"
        elif line["motion"] < args.min_motion:
            record["dropped"][directory] = f"motion {line['motion']}, less than {args.min_motion}"
        else:
            record["clips"].append(line)
    if run.stop.is_set():
        raise Stopped
    publish(video, record, old, run)
    return record


def describe_clip(directory, clip, video, probe, args):
    """The clip's line in metadata.jsonl."""
    fps, holes = average_fps(clip.times, probe.fps, args.fps)
    if clip.flows:
        motion = statistics.fmean(clip.flows) * fps / clip.stride
    else:  # shorter than the stride
        motion = common.clip_motion([common.read_frame(path) for path in common.list_frames(clip.folder)], fps)
    episode = re.search(r"@(episode_\d+)", directory) if video.episodes else None
    return {
        "directory": directory,
        "source": video.source,
        "group": video.group + (episode[1] if episode else ""),
        "fps": fps,
        "num_frames": len(clip.times),
        "width": clip.shape[1],
        "height": clip.shape[0],
        "start": round(clip.times[0], 3),
        "duration": round(clip.times[-1] - clip.times[0] + 1 / fps, 3),
        "holes": [round(hole, 3) for hole in holes],
        "motion": round(motion, 3),
        "motion_bucket_id": common.motion_bucket(motion),
    }


# -------------------------------------------------------------------------------------------------- dataset folder

SHAPING = "max_frames width height fps clip_frames clip_stride min_frames min_motion split_scenes image_format".split()


def shaping_options(args):
    """The options that decide what a clip's files are: a dataset is of one kind."""
    return {name: getattr(args, name) for name in SHAPING}


def read_records(state):
    """What was finished so far: `{source: record}` of .prepare/*.json."""
    records = {}
    for path in state.glob("*.json"):
        with contextlib.suppress(json.JSONDecodeError, FileNotFoundError):
            record = json.loads(path.read_text(encoding="utf-8"))
            records[record["source"]] = record
    return records


def is_complete(record, output):
    """Whether every folder that the record promises is there with all its frames."""
    folders = [(output / clip["directory"], clip["num_frames"]) for clip in record["clips"]]
    return all(folder.is_dir() and len(common.list_frames(folder)) == count for folder, count in folders)


def dump_line(record):
    try:
        text = json.dumps(record, ensure_ascii=False)
        text.encode()
        return text + "\n"
    except UnicodeEncodeError:  # a source whose name is not UTF-8
        return json.dumps(record) + "\n"


def publish(video, record, old, run):
    """Makes a finished video part of the dataset: the record, then the folders, whole by a rename, then their lines.

    After a kill at any point the next run finds a record whose folders are not all there, and does that video again.
    """
    owned = {clip["directory"] for clip in (old or {}).get("clips", [])}
    for directory in owned:
        if (run.output / directory).exists():
            os.replace(run.output / directory, run.work / video.directory / f"{directory}.old")
    for clip in record["clips"]:
        if os.path.lexists(run.output / clip["directory"]):
            raise Failure(f"{run.output / clip['directory']} exists and is not of this program: move it away")
    path = run.state / f"{video.directory}.json"
    path.with_suffix(f".part{run.args.shard_name}").write_text(dump_line(record), encoding="utf-8")
    os.replace(path.with_suffix(f".part{run.args.shard_name}"), path)
    for clip in record["clips"]:
        os.replace(run.work / video.directory / clip["directory"], run.output / clip["directory"])
    if not run.args.shard:  # shards write the file at the end: appending is not safe between machines
        with run.lock, open(run.output / "metadata.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(map(dump_line, record["clips"])))


def write_metadata(output):
    """metadata.jsonl from all records, in name order; lines and fields that somebody else wrote stay. Returns them."""
    path, lines, records = output / "metadata.jsonl", {}, read_records(output / ".prepare")
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            line = json.loads(text)
            lines[line["directory"]] = {**lines.get(line["directory"], {}), **line}
    clips = {clip["directory"]: clip for record in records.values() for clip in record["clips"]}
    lines = {d: line for d, line in lines.items() if d in clips or line.get("source") not in records}
    merged = [{**lines.get(d, {}), **clips.get(d, {})} for d in sorted({*lines, *clips}, key=common.natural_key)]
    text = "".join(map(dump_line, merged))
    if merged and not (path.exists() and path.read_text(encoding="utf-8") == text):
        common.write_file(path, text)
    return records


def write_preview(output, clips):
    """preview.jpg: a row for each clip, for up to forty of them: name, fps, motion, and four of its frames."""
    high, wide, left = 80, 144, 300
    clips = [clips[i * len(clips) // min(40, len(clips))] for i in range(min(40, len(clips)))]
    sheet = np.full((high * len(clips), left + 4 * wide, 3), 255, np.uint8)

    def thumbnails(clip):
        pictures, paths = [], common.list_frames(output / clip["directory"])
        for place in range(4 if paths else 0):
            frame = common.read_frame(paths[place * (len(paths) - 1) // 3])
            scale = max(frame.shape[0] / (high - 2), frame.shape[1] / (wide - 2))
            size = [max(1, round(n / scale)) for n in frame.shape[1::-1]]
            step = max(1, int(scale / 2))  # every step-th pixel first: area averaging is slow
            pictures.append(cv2.resize(frame[::step, ::step], size, interpolation=cv2.INTER_AREA))
        return pictures

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(thumbnails, clips)
        for top, (clip, pictures) in zip(itertools.count(0, high), zip(clips, rows)):
            name = clip["directory"].encode("ascii", "replace").decode()
            lines = [name[i : i + 40] for i in range(0, min(len(name), 120), 40)]
            lines += [f"{clip['num_frames']} frames, {clip['fps']:g} fps"]
            lines += [f"motion {clip['motion']:g}, bucket {clip['motion_bucket_id']}"]
            for number, text in enumerate(lines, 1):
                at = (4, top + 15 * number)
                cv2.putText(sheet, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
            for place, picture in enumerate(pictures):
                x = left + place * wide
                sheet[top : top + picture.shape[0], x : x + picture.shape[1]] = picture
    data = cv2.imencode(".jpg", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    common.write_file(output / "preview.jpg", data.tobytes())


@contextlib.contextmanager
def lock_dataset(state, shard_name):
    """Refuses a second run on the same folder, or of the same shard."""
    busy = f"--output_dir {state.parent}: another run is at work on it"
    with common.lock_file(state / "lock", busy, shared=bool(shard_name)):
        with common.lock_file(state / f"lock{shard_name}", busy) if shard_name else contextlib.nullcontext():
            yield


def printable(name):
    """A file name for the terminal: one line, whatever is in it."""
    return name if name.isprintable() else ascii(name)


def summarize(records, sections):
    """Prints what was kept, what was not and why, and the range in which --motion_bucket_id means something.

    `sections`: `{title: {name: reason}}`.
    """

    def spread(key):
        values = sorted(clip[key] for clip in clips)
        low, middle, high = (values[round(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9))
        return f"{values[0]:g} to {values[-1]:g}; a tenth below {low:g}, half below {middle:g}, a tenth above {high:g}"

    clips = [clip for record in records for clip in record["clips"]]
    if clips:
        frames, hours = sum(clip["num_frames"] for clip in clips), sum(clip["duration"] for clip in clips) / 3600
        sizes = statistics.multimode(f"{clip['width']}x{clip['height']}" for clip in clips)
        others = len({(clip["width"], clip["height"]) for clip in clips}) - 1
        print(f"kept: {len(clips)} clips of {len(records)} videos, {frames} frames, {hours:.2f} hours")
        print(f"  size: {sizes[0]}" + (f" and {others} others" if others else ""))
        print(f"  fps: {spread('fps')}")
        print(f"  motion, % of the longer side a second: {spread('motion')}")
        print(f"  motion_bucket_id: {spread('motion_bucket_id')}")
    for title, reasons in sections.items():
        if reasons:
            print(f"{title}: {len(reasons)}")
        for name, reason in reasons.items():
            print(f"  {printable(name)}: {reason}")


def count_alike(reasons, most=3):
    """`{name: reason}`, where more than `most` reasons that differ only in their figures become one with a count."""
    groups = {}
    for name, reason in reasons.items():
        groups.setdefault(re.sub(r"[\d.]+", "#", reason.split(", ")[0]) + reason.partition(", ")[2], []).append(name)
    kept = {}
    for names in groups.values():
        if len(names) > most:
            what = reasons[names[0]].partition(", ")[2]
            kept[f"{len(names)} clips"] = f"{what}, as {printable(names[0])} ({reasons[names[0]].split(', ')[0]})"
        else:
            kept.update((name, reasons[name]) for name in names)
    return kept


# ---------------------------------------------------------------------------------------------------- command line


def number(kind, least, more=False):
    """An argparse type: a number of at least `least`, or above it."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
        if not (value > least if more else value >= least) or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {'above' if more else 'at least'} {least}, got {text}")
        return value

    return parse


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--video_dir", required=True, help="folder of videos, searched with its subfolders; never written to")
    add("--output_dir", required=True, help="the dataset folder to make or to go on with")
    add("--max_frames", type=number(int, 1), help="frames to take from each video at most (default: all)")
    add("--width", type=number(int, 16), help="pixels; with --height: cover this size, then crop the centre")
    add("--height", type=number(int, 16), help="pixels")
    add("--fps", type=number(float, 0, more=True), help="frames a second to keep; slower video keeps what it has")
    add("--clip_frames", type=number(int, 1), help="cut each video into clips of this many frames")
    add("--clip_stride", type=number(int, 1), help="frames from one clip's start to the next (default: --clip_frames)")
    add("--min_frames", type=number(int, 1), help="drop shorter clips (default: --clip_frames, or 1)")
    add(
        "--min_motion",
        type=number(float, 0),
        default=0.0,
        help="drop stiller clips; percent of the longer side a second",
    )
    add("--split_scenes", action="store_true", help="cut where the shot changes, so that no window crosses a cut")
    add("--include", nargs="+", default=[], metavar="PATTERN", help="take only these, as in '*/left/*' or 'demo_*.mp4'")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave these out")
    add(
        "--camera",
        nargs="+",
        default=[],
        help="take only these cameras of LeRobot datasets: full name or its last part",
    )
    add(
        "--image_format",
        choices=("png", "jpg"),
        default="png",
        help="png is lossless; jpg (quality 95) a quarter the time",
    )
    add("--fast_png", action="store_true", help="write the same pixels three times as fast; needs: pip install isal")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add(
        "--num_workers",
        type=number(int, 1),
        default=cores,
        help="encoding threads (default: one a core, here %(default)s)",
    )
    add("--shard", metavar="I/N", help="do part I of N, on as many machines; I from 0 to N-1, or from 1 to N")
    add("--overwrite", action="store_true", help="make again what changed since: the source, or the options")
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    video_dir, output_dir = os.path.realpath(args.video_dir), os.path.realpath(args.output_dir)
    if os.path.isfile(video_dir):
        folder, name = os.path.split(args.video_dir)
        parser.error(
            f"--video_dir {args.video_dir}: a file; give its folder: --video_dir {folder or '.'} --include {name}"
        )
    if not os.path.isdir(video_dir):
        parser.error(f"--video_dir {args.video_dir}: no such folder")
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        parser.error(f"--output_dir {args.output_dir}: a file of that name is in the way")
    if output_dir == video_dir or output_dir.startswith(video_dir.rstrip(os.sep) + os.sep):
        parser.error("--output_dir must lie outside --video_dir, which is never written to")
    if (args.width is None) != (args.height is None):
        parser.error("--width and --height go together")
    if args.clip_stride and not args.clip_frames:
        parser.error("--clip_stride needs --clip_frames")
    if args.fast_png and args.image_format != "png":
        parser.error("--fast_png is for --image_format png")
    if args.fast_png and not isal_zlib:
        parser.error("--fast_png needs: pip install isal")
    args.min_frames, args.shard_name = args.min_frames or args.clip_frames or 1, ""
    if args.shard:
        match = re.fullmatch(r"(\d+)/([1-9]\d*)", args.shard)
        if not match or int(match[1]) > int(match[2]):
            parser.error(f"--shard must be I/N with I at most N, as in 0/4, got {args.shard}")
        args.shard = int(match[1]) % int(match[2]), int(match[2])
        args.shard_name = f"-{args.shard[0]}-of-{args.shard[1]}"
    return args


def run_all(videos, records, args, complaints):
    """Prepares the videos side by side; adds to `records`; returns `{source: reason}` of those that failed."""
    run, failures = Run(args, videos, complaints), {}
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir()

    def one(video):
        if run.stop.is_set():
            raise Stopped
        try:
            return prepare_video(video, run, records.get(video.source))
        finally:
            shutil.rmtree(run.work / video.directory, ignore_errors=True)

    readers = ThreadPoolExecutor(run.readers)
    try:
        jobs = {readers.submit(one, video): video for video in videos}
        for job in as_completed(jobs):
            try:
                records[jobs[job].source] = job.result()
            except Failure as failure:
                failures[jobs[job].source] = str(failure)
            except Stopped:
                pass
            except (common.UserError, OSError):
                raise
            except Exception as error:  # a bad video never stops the others
                failures[jobs[job].source] = f"{type(error).__name__}: {error}"
        if run.error:
            raise run.error
    finally:
        run.stop.set()
        readers.shutdown(cancel_futures=True)
        run.encoders.shutdown()
        run.bar.close()
        shutil.rmtree(run.work, ignore_errors=True)
    return failures


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(1)  # the threads of this program take the cores
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    videos, left_out = find_videos(args)
    twins = find_twins(videos)
    if args.shard:
        videos = [video for video in videos if video.shard_key % args.shard[1] == args.shard[0]]
    output = Path(args.output_dir)
    state = output / ".prepare"
    state.mkdir(parents=True, exist_ok=True)
    with lock_dataset(state, args.shard_name):
        old = read_records(state)
        other = next((r["options"] for r in old.values() if r["options"] != shaping_options(args)), None)
        if other and not args.overwrite:
            named = ", ".join(f"--{key} {value}" for key, value in other.items() if shaping_options(args)[key] != value)
            raise common.UserError(f"--output_dir {output} was made with {named}: do the same, or add --overwrite")
        with Complaints() as complaints:
            failures = run_all(videos, dict(old), args, complaints)
        records = write_metadata(output)
        while True:  # another shard may have finished meanwhile: the last one writes all
            clips = [clip for record in records.values() for clip in record["clips"]]
            clips.sort(key=lambda clip: common.natural_key(clip["directory"]))
            if clips and (records != old or not (output / "preview.jpg").exists()):
                write_preview(output, clips)
            old, records = records, write_metadata(output)
            if records == old:
                break
    chosen = [records[video.source] for video in videos if video.source in records]
    problems = {record["source"]: record["clips"][0]["problems"] for record in chosen if record["clips"]}
    flawed = {source: "; ".join(texts) for source, texts in problems.items() if texts}
    notes = {record["source"]: "; ".join(record["clips"][0]["notes"]) for record in chosen if record["clips"]}
    gone = [source for source in records if not os.path.lexists(os.path.join(args.video_dir, source))]
    sections = {
        "kept, with a note": {source: text for source, text in notes.items() if text},
        "kept, but": flawed,
        "perhaps twice": twins,
        "left out": left_out,
        "dropped": count_alike({name: why for record in chosen for name, why in record["dropped"].items()}),
        "not kept": failures,
        "still in the dataset, though not in --video_dir any more": dict.fromkeys(gone, "its clips stay"),
    }
    summarize(chosen, sections)
    if args.shard and not videos:
        print(f"shard {args.shard[0]} of {args.shard[1]}: none of the videos falls to it")
    return 1 if failures or flawed else 0


if __name__ == "__main__":
    common.run_script(main)
