"""Turns a folder of videos into a dataset of frames: a folder of images for each clip, and a line in metadata.jsonl.

    python prepare_dataset.py --video_dir ./videos --output_dir ./dataset --max_frames 25

Run the same command again after a stop: what is done stays, the rest is done. Exit status 0: every video is whole in
the dataset; 1: some are not, each named with its reason; 2: nothing to do, or a wrong option.

The way of one video: `find_videos` -> `probe_video` (ffmpeg lists its packets and shows its key frames) ->
`read_opencv`, or `read_ffmpeg` where OpenCV is known to be wrong or gives fewer frames than there are -> `cut_clips`
-> `FrameWriter` (threads encode the images) -> `publish` (record, rename, then the line in metadata.jsonl).
"""

import argparse
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import functools
import io
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

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "16"  # errors, which `hear_opencv` counts. Read when cv2 is imported
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"

import svd_common as common  # isort: skip  (first: it says what to do where OpenCV cannot be loaded)

import cv2
import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = None

VIDEO_SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .apng .asf .av1 .avc .avi .dav .dif .divx .dv .evo .f4v .flv .gif .h264 .h265 .hevc .insv"
    " .ivf .lrv .m1v .m2t .m2ts .m2v .m4v .mj2 .mjpeg .mjpg .mk3d .mkv .mod .mov .mp4 .mp4v .mpe .mpeg .mpg .mpv .mts"
    " .mxf .nut .obu .ogm .ogv .qt .rm .rmvb .tod .trp .ts .vob .vvc .webm .webp .wmv .wtv .xvid .y4m".split()
)
PARTIAL_SUFFIXES = (".part", ".crdownload", ".download", ".aria2", ".ytdl")  # x.mp4.part: x.mp4 is not whole yet
JPG_OPTIONS = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
BYTES_IN_FLIGHT = 1 << 27  # decoded frames of one video that wait for an encoder


class Failure(Exception):
    """Why one video gives nothing; the others go on."""


class DecodeAgain(Exception):
    """The frames of this attempt are not the right ones: the next decoder, or one thread, has to do it."""


# ------------------------------------------------------------------------------------------------- find the videos

LEROBOT_V2 = re.compile(r"(?P<root>.*/)videos/chunk-\d+/(?P<camera>[^/]+)/(?P<episode>episode_\d+)\.\w+")
LEROBOT_V3 = re.compile(r"(?P<root>.*/)videos/(?P<camera>[^/]+)/chunk-(?P<chunk>\d+)/file-(?P<file>\d+)\.\w+")


@dataclasses.dataclass
class Video:
    path: str
    source: str  # relative to --video_dir, with slashes
    directory: str  # its folder in the dataset, and the stem of its record
    group: str  # clips of one group (the cameras of an episode) belong on one side of a held-out split
    camera: str = ""
    episodes: list = None  # LeRobot v3: (first second, end, episode, frames or None) of the episodes in this file
    lerobot: tuple = None  # what `read_lerobot` gives for the dataset that it is of


def directory_name(source):
    """A folder name that depends on the source's path alone: stable, readable, unique, and safe on every system.

    `a/x.mp4` -> `a__x`, `a/x.avi` -> `a__x.avi`. A name that had to change, or that another could hit (also on a disk
    that ignores case, or as a device of Windows), carries `+` and eight digits of a hash; no plain name has a `+`.
    """
    stem, suffix = os.path.splitext(source)
    short = stem if suffix == ".mp4" and "." not in os.path.basename(stem) else source
    parts = [re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", part)) for part in short.split("/")]
    name = "__".join(parts).lstrip(".-") or "video"
    plain = name == short.replace("/", "__") and name == name.casefold() and len(name.encode()) <= 120
    if any("__" in part or part[0] == "_" or part[-1] == "_" for part in parts):
        plain = False
    if re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE) or name in common.SYSTEM_FOLDERS:
        name, plain = "_" + name, False
    return name if plain else f"{name.encode()[:100].decode(errors='ignore')}+{common.name_digest(source)}"


def find_videos(args):
    """The videos of --video_dir that the options choose, in name order; and `{source: why}` of unfinished downloads."""
    root = os.path.abspath(args.video_dir)
    folders, left_out = common.find_folders(root)
    files = [str(Path(root, folder, name)) for folder, names in folders.items() for name in names]
    broken = [path for path in left_out if not (os.path.isdir(path) and os.access(path, os.R_OK))]  # no second ways
    files = [path for path in files if path not in left_out]
    present, videos, unfinished = set(files), [describe_video(path, root) for path in broken], {}
    for path in files:
        if os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES and not is_still_webp(path):
            video = describe_video(path, root)
            partial = next((video.source + p for p in PARTIAL_SUFFIXES if path + p in present), None)
            if partial:
                unfinished[video.source] = f"beside it lies {partial}; if it is whole nevertheless, delete that"
            else:
                videos.append(video)
    if not videos:
        hint = " but unfinished downloads: " + ", ".join(unfinished) if unfinished else ""
        if any(path.lower().endswith(common.IMAGE_SUFFIXES) for path in files):
            hint += ", but images: train_svd.py --dataset_dir takes a folder with a folder of frames for each clip"
        raise common.UserError(f"--video_dir {args.video_dir}: no video in it{hint}")
    names = [(video.source, os.path.basename(video.source)) for video in videos] + [(name,) for name in unfinished]
    if unknown := common.names_of_nothing([*args.include, *args.exclude], names):
        many = f"{len(unknown)} names of --include and --exclude"
        print(f"warning: {many} are no video of {args.video_dir}: {unknown[0]}")
    chosen = [video for video in videos if is_wanted(video, args)]
    if not chosen:
        cameras = sorted({video.camera for video in videos if video.camera})
        hint = f"; the cameras are {', '.join(cameras)}" if args.camera and cameras else ""
        raise common.UserError(f"--camera, --include and --exclude leave none of {len(videos)} videos{hint}")
    for video in chosen:
        posix = video.path.replace(os.sep, "/")
        if match := LEROBOT_V3.fullmatch(posix):
            place = match["camera"], int(match["chunk"]), int(match["file"])
            video.episodes = sorted(read_episodes(match["root"])[0].get(place, []))
        if match := match or LEROBOT_V2.fullmatch(posix):
            video.lerobot = read_lerobot(match["root"])
    return sorted(chosen, key=lambda video: common.natural_key(video.source)), unfinished


def is_still_webp(path):
    if not path.lower().endswith(".webp"):
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:  # `check_file` says why it cannot be read
        head = file.read(21)
        return head[8:12] == b"WEBP" and not (head[12:16] == b"VP8X" and head[20] & 2)


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
    names = video.source, os.path.basename(video.source)
    camera = not args.camera or any(video.camera == c or video.camera.endswith("." + c) for c in args.camera)
    included = not args.include or common.is_named(args.include, *names)
    return camera and included and not common.is_named(args.exclude, *names)


def find_twins(videos):
    """`{source: why}` of videos that seem to show what one beside them shows: a small copy, another format."""
    originals, twins = {}, {}
    for video in sorted(videos, key=lambda video: video.source.lower().endswith((".lrv", ".webm", ".gif"))):
        stem = re.sub(r"[ ._-](proxy|preview|small|low|thumb|\d{3,4}p)$", "", os.path.splitext(video.source)[0].lower())
        stem = re.sub(r"(^|/)g[xhl](\d{6})$", r"\1g\2", stem)  # GoPro: GL010001.LRV is the small GX010001.MP4
        original = originals.setdefault(stem, video.source)
        if original != video.source:
            twins[video.source] = f"the same recording as {original}? --exclude leaves one of them out"
    return twins


EPISODE_FIELDS = "chunk_index", "file_index", "from_timestamp", "to_timestamp"
EPISODE_COLUMNS = rf"videos/[^/]+/({'|'.join(EPISODE_FIELDS)})|episode_index|length|tasks"  # statistics would be large


@functools.cache
def read_episodes(root):
    """LeRobot v3: where each file's episodes lie, `{(camera, chunk, file): [(first second, end, episode, frames)]}`,
    and `{episode: its tasks}`."""
    why = f"{root} is a LeRobot v3 dataset, whose files hold several episodes each. "
    try:
        from pyarrow import parquet
    except ImportError:
        raise common.UserError(why + "pip install pyarrow, which reads where they begin") from None

    tables = sorted(Path(root, "meta", "episodes").rglob("[!.]*.parquet"))
    if not tables:
        raise common.UserError(why + "Where they begin stands in meta/episodes/*/*.parquet, which is missing")
    episodes, tasks = {}, {}
    for table in tables:
        try:
            columns = [name for name in parquet.read_schema(table).names if re.fullmatch(EPISODE_COLUMNS, name)]
            for row in parquet.read_table(table, columns=columns).to_pylist():
                tasks[int(row["episode_index"])] = row.get("tasks")
                for camera in {name.split("/")[1] for name in row if name.startswith("videos/")}:
                    chunk, file, start, end = (row[f"videos/{camera}/{field}"] for field in EPISODE_FIELDS)
                    if None not in (chunk, file, start, end):  # an episode may lack a camera
                        length = int(row.get("length") or 0) or None
                        episode = float(start), float(end), int(row["episode_index"]), length
                        episodes.setdefault((camera, int(chunk), int(file)), []).append(episode)
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are among these
            raise common.UserError(f"{table}: not the episodes of a LeRobot dataset ({error}); copy it again") from None
    return episodes, tasks


@functools.cache
def read_lerobot(root):
    """What a LeRobot dataset knows of all its clips, `{"robot_type": ...}`, and `{episode: its tasks}`."""
    meta, damaged = Path(root, "meta"), "not a JSON object; repair it, or move it away"
    text = (meta / "info.json").read_text("utf-8-sig", "replace") if (meta / "info.json").exists() else "{}"
    info = common.parse_object(text, f"{meta / 'info.json'}: {damaged}")
    lines = common.read_lines(meta / "episodes.jsonl", damaged)  # version 2
    tasks = {line["episode_index"]: line.get("tasks") for _, line in lines if type(line.get("episode_index")) is int}
    known = {key: info[key] for key in ("robot_type", "generated") if info.get(key)}
    if (meta / "episodes").is_dir():  # version 3, whatever of version 2 was left beside it
        tasks = read_episodes(root)[1]
    return known, tasks


def lerobot_fields(video, group):
    """What of it goes into the line of a clip: nothing for a video that is of no LeRobot dataset."""
    if not video.lerobot:
        return {}
    known, tasks = video.lerobot
    episode = int(group.rpartition("_")[2])
    task = tasks.get(episode) or ""
    task = "; ".join(map(str, task)) if isinstance(task, (list, tuple)) else str(task)
    return {"camera": video.camera, "episode_index": episode, **({"task": task} if task else {}), **known}


# ----------------------------------------------------------------------------------------------------------- probe

PLAIN_CODECS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "mjpeg"}
PLAIN_MATRICES = {"unknown", "bt709", "bt470bg", "smpte170m"}  # OpenCV turns these into RGB as ffmpeg does
HDR = {"smpte2084", "arib-std-b67"}  # PQ and HLG
NO_TIMESTAMP = -(1 << 62)  # what is below stands for none
LOOK = re.compile(  # what the showinfo filter says of a frame
    r" fmt:(\w+) .*sar:(\S+) s:(\d+)x(\d+) i:(\w)(?s:.*?displaymatrix: rotation of (\S+))?"
    r"(?s:.*?)color_space:(\S+) .*color_trc:(\S+)"
)
BESIDE_THE_PICTURE = re.compile(
    r"(?i)\b(sei|vui|app\d*|com|icc|exif|side data|metadata|user ?data|timecode|caption|header packet)\b"
)
Packet = collections.namedtuple("Packet", "stream dts pts duration size flags")  # times in ticks; flags: see below
MIDDLE = 640, 360  # pixels of a frame, at most, by which two decoders are compared
KEY_FRAME, UNSURE = 1, 2  # UNSURE: the container has lost something before it or in it


@dataclasses.dataclass
class Probe:
    """What a file's header, its packets and its key frames say; nothing else of it has been decoded yet."""

    codec: str
    decoder: str  # ffmpeg's name of what decodes it
    pixel_format: str
    matrix: str  # of the colours
    transfer: str
    pixel_aspect: float  # width of a pixel by its height
    sideways: bool  # a quarter turn stands in the file
    size: tuple  # width, height as shown: cropped, turned, and with square pixels
    ordinary: bool  # one video track, not turned nor cropped nor interlaced, and all key frames alike
    fps: float  # as claimed; 0 where it is not
    times: list  # seconds of every packet in display order; None where the file has none, or they run backwards
    packets: int
    middle: bytes  # the middle of the first key frame, at most 640x360, RGB; empty where it cannot be decoded
    truncated: bool = False
    problems: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)


def start_ffmpeg(video, decoder_options, output_options, **popen):
    """ffmpeg on one file, given as an open descriptor: no name can be read as a URL, a pattern or an option, and the
    whitelist lets nothing in the file open another file or the network."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info"]
    try:
        file = open(video.path, "rb")
    except OSError as error:  # gone since it was found
        raise Failure(f"cannot be read: {error.strerror}") from None
    named_so = os.path.splitext(video.path)[1].lower() in (".mjpeg", ".mjpg")
    demuxer = ["-f", "mjpeg"] * (named_so and file.read(2) == b"\xff\xd8")  # or it is taken for a still
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    command += [*demuxer, *decoder_options, "-protocol_whitelist", "fd", "-i", "fd:", "-map", "0:V:0", *output_options]
    with file:  # a session of its own: Ctrl-C must not end its video early
        popen |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        return subprocess.Popen(command, stdin=file, **popen)


def check_exit(code):
    """Raises `Failure` where ffmpeg did not end by itself. Windows gives a crash a large number instead of a signal."""
    if code == -9:
        raise Failure("ffmpeg was killed by signal 9: too little memory?")
    if code < 0 or code > 255:
        version = imageio_ffmpeg.get_ffmpeg_version()  # 7.0 crashes on every .ts
        cure = ": a newer imageio-ffmpeg is needed, and for that a newer Python, 3.10 or later"
        raise Failure(f"ffmpeg {version} crashed on it (signal {-code})" + cure * version.startswith("7.0"))


def error_messages(lines, *speakers):
    """What parts of ffmpeg, by their names, complain of in lines such as `[h264 @ 0x55d] [error] no frame!`

    Such a message may come in the middle of another's line: ffmpeg's threads all write.
    """
    names = "|".join(map(re.escape, speakers))
    pattern = re.compile(rf"\[(?:\S+ @ \S+\] \[dec:)?(?:{names})(?:/\S+)? @ \S+\] \[error\] (.*)")
    return [match[1] for match in map(pattern.search, lines) if match]


def picture_errors(lines, probe):
    """The messages that tell of damaged pictures: ffmpeg's own verdict on a frame, and what the decoder of this video
    cannot read; not those of sound, of the container, or of data beside the picture."""
    corrupt = [f"{probe.codec}: corrupt decoded frame" for line in lines if "corrupt decoded frame" in line]
    said = error_messages(lines, probe.codec, probe.decoder)
    return corrupt + [text for text in said if not BESIDE_THE_PICTURE.search(text)]


NO_VIDEOS = {  # how the file begins, in small letters: what it is
    (b"version https://git-lfs",): "a git-lfs pointer, not the video itself: run `git lfs pull`",
    (b"<!doctype html", b"<html"): "an HTML page, not a video: a failed download?",
    (b"#extm3u", b"ffconcat", b"[playlist]", b"<asx", b"<smil", b"file ", b"v=0"): (
        "a playlist, not a video: put the files that it names into --video_dir"
    ),
}


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
        raise Failure("a link to something that is not there") from None
    except OSError as error:
        raise Failure(f"cannot be read: {error.strerror}") from None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginnings, reason in NO_VIDEOS.items():
        if text.startswith(beginnings):
            raise Failure(reason)
    if not text.startswith(b"yuv4mpeg") and all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 for byte in head):
        raise Failure("a playlist, not a video" if b"<mpd" in text else "text, not a video")
    return status


def probe_video(video, max_packets=None):
    """Lists a file's packets and looks at its key frames. Raises `Failure` with the reason where there is no video."""
    rows, log, middle = list_packets(video, max_packets)
    header, _, output = "\n".join(log).partition("\n[info] Stream mapping:")
    packets = [parse_packet(row) for row in rows if row[:1].isdigit()]
    shown = [packet for packet in packets if packet.stream == 0]
    if max_packets and len(shown) < max_packets:  # a short video: all of it, for the other tracks say where it ends
        return probe_video(video)
    encrypted = any(row[:2] == "0," and "Encryption info" in row for row in rows)
    if encrypted or re.search(r"\((encv|drm\w) / |DRM protected", header):
        raise Failure("encrypted: only a copy without protection can be read")
    if not shown:
        raise Failure(why_unreadable(video, header))
    if re.search(r"^\[info\] Input #0, (\w+_pipe|image2|tty), from ", header, re.MULTILINE):
        raise Failure("a still image or text, not a video")
    fields = dict(match.groups() for row in rows if (match := re.match(r"#(\w+ \d+): (.*)", row)))
    ticks = {packet.stream: parse_ratio(fields[f"tb {packet.stream}"]) for packet in packets}
    stamps = sorted(packet.pts for packet in shown)
    if stamps[0] < NO_TIMESTAMP:  # AVI and bare streams: few presentation times or none, but steady decoding times
        stamps = sorted(packet.dts for packet in shown)
        if len(stamps) > 2:  # with B-frames the first of these comes too early
            stamps[0] = 2 * stamps[1] - stamps[2]
    steady = stamps[0] > NO_TIMESTAMP and len(set(stamps)) == len(stamps)  # ffmpeg repeats those that run backwards
    fps = re.search(r"Stream #0:0.*: Video: .*, ([\d.]+)(k?) fps", output)
    decoder = re.search(r"Stream #0:\d+ \((\w+)\) -> showinfo", output)
    frames = re.split(r"\] n: *\d+ ", "\n".join(line for line in log if "showinfo" in line))
    looks = [match.groups() for match in map(LOOK.search, frames) if match]
    stored = fields["dimensions 0"].split("x")
    unknown = ("", "1/1", *stored, "P", "", "unknown", "")
    pixel_format, aspect, *coded, scan, turn, matrix, transfer = looks[0] if looks else unknown
    aspect = parse_ratio(aspect) if 0.1 < parse_ratio(aspect) < 10 else 1
    sideways = bool(turn) and 45 < abs(float(turn)) < 135
    size = round(int(coded[0]) * aspect), int(coded[1])
    one_track = len(re.findall(r"^\[info\]   Stream #0:\d+.*?: Video: ", header, re.MULTILINE)) == 1
    alike = len(set(looks)) == 1 and coded == stored
    probe = Probe(
        codec=fields["codec_id 0"],
        decoder=decoder[1] if decoder else "",
        pixel_format=pixel_format,
        matrix=matrix,
        transfer=transfer,
        pixel_aspect=aspect,
        sideways=sideways,
        size=size[::-1] if sideways else size,
        ordinary=one_track and alike and aspect == 1 and not turn and scan == "P",
        fps=float(fps[1]) * (1000 if fps[2] else 1) if fps else 0.0,
        times=[(stamp - stamps[0]) * ticks[0] for stamp in stamps] if steady else None,
        packets=len(shown),
        middle=middle,
    )
    probe.notes += ["interlaced"] * (scan != "P") + [f"HDR ({transfer}) made SDR"] * (transfer in HDR)
    probe.notes += ["alpha dropped"] * bool(re.match(r"yuva|gbra|rgba|bgra|argb|abgr|ya\d", pixel_format))
    if re.search(r"DOVI configuration record:.*profile: 5\b", header):
        probe.notes.append("Dolby Vision profile 5: its colours are wrong without Dolby's decoder")
    if not max_packets:
        judge_ending(video, probe, packets, ticks, header)
    judge_packets(probe, shown, error_messages(log, "in#0"))
    return probe


def run_ffmpeg(video, decoder_options, output_options, **popen):
    """The lines of ffmpeg's output and of its log."""
    process = start_ffmpeg(video, decoder_options, output_options, **popen)
    rows, log = (part.decode("utf-8", "replace").splitlines() for part in process.communicate())
    check_exit(process.returncode)
    return rows, log


def list_packets(video, max_packets):
    """ffmpeg's list of packets (its framecrc format), its log with what showinfo says of up to 1000 key frames, and
    the middle of the first of these, as `Probe` has it.

    All tracks are listed, because a whole file may end later than its video does; only the first `max_packets` of the
    video where no more is wanted.
    """
    tracks, until = "-map 0:a? -map 0:s? -map 0:d? -copy_unknown", ""
    if max_packets:
        tracks, until = f"-frames:v {max_packets}", f"-t {max_packets / 5}"  # seconds: longer than these packets last
    packets = f"{tracks} -c copy -f framecrc pipe:1"
    looks = f"-map [look] -frames:v 1000 {until} -f null -"
    decoder, graph = "-threads 1 -noautorotate -skip_frame nokey".split(), "-filter_complex [0:V:0]showinfo=checksum=0"
    if os.name != "posix":  # where a process gets no third pipe
        return *run_ffmpeg(video, decoder, f"{packets} {graph}[look] {looks}".split()), b""
    crop = f"crop=min(iw\\,{MIDDLE[0]}):min(ih\\,{MIDDLE[1]}):trunc((iw-ow)/2):trunc((ih-oh)/2)"
    # One graph: what ffmpeg says of an output once its first frame is there does not fall into that frame's showinfo.
    graph += f",split[look][frame];[frame]format=rgb24,{crop}[middle]"
    receiver, sender = os.pipe()
    with open(receiver, "rb") as pipe, ThreadPoolExecutor(1) as pool:
        received = pool.submit(pipe.read)
        try:
            picture = f"-map [middle] -frames:v 1 -f rawvideo pipe:{sender}"
            output = f"{packets} {graph} {looks} {picture}".split()
            rows, log = run_ffmpeg(video, decoder, output, pass_fds=[sender])
        finally:
            os.close(sender)
        return rows, log, received.result()


def parse_packet(row):
    """`0, 512, 1024, 512, 648, 0xa299, F=0x0, S=1, ...` -> Packet."""
    parts = row.split(",")
    flags = int(parts[6][3:], 16) if len(parts) > 6 and parts[6].startswith(" F=") else KEY_FRAME
    return Packet(*map(int, parts[:5]), flags)


def parse_ratio(text):
    """`1/12288` -> a number; 1 for `0/1` and `1/0`, which say nothing."""
    n, d = map(int, text.split("/"))
    return n / d if n and d else 1


def judge_ending(video, probe, packets, ticks, header):
    """Whether the file ends where it should, by its header's duration, its own lengths and its last packet."""
    clock = re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)(?:, start: ([\d.]+))?", header, re.MULTILINE)
    if "Input #0, mpegts" in header:  # that has no duration in it: ffmpeg has estimated one
        clock = None
    hours, minutes, seconds, start = (float(part or 0) for part in (clock.groups() if clock else "0000"))
    claim = hours * 3600 + minutes * 60 + seconds - start
    timed = [(max(p.dts, p.pts), p.duration, ticks[p.stream]) for p in packets if max(p.dts, p.pts) > NO_TIMESTAMP]
    begin = min((stamp * tick for stamp, _, tick in timed), default=0)
    lasts = max(((stamp + duration) * tick - begin for stamp, duration, tick in timed), default=claim)
    size, end = os.path.getsize(video.path), container_end(video.path)
    used = sum(packet.size for packet in packets)
    if claim - lasts > max(0.5, 0.05 * claim) + 1 / (probe.fps or 25):
        probe.problems.append(f"ends after {lasts:.1f} s of the {claim:.1f} s that its header claims")
    elif end > size + 1024:
        probe.problems.append(f"ends after {size} of the {end} bytes that its header claims")
    elif packets[-1].flags & UNSURE:
        probe.problems.append("ends in the middle of a packet")
    elif 0 < end < size - 1024 and used <= end:
        probe.notes.append(f"its last {size - end} bytes of {size} belong to nothing: another file behind it?")
    elif not end and used < 0.6 * size and "Input #0, mpeg" not in header:  # MPEG streams may be stuffed
        probe.notes.append(f"{size - used} bytes of {size} belong to nothing: another file behind it?")
    probe.truncated = bool(probe.problems)


BOXES = frozenset(b"ftyp styp moov moof mdat mfra free skip wide uuid meta sidx ssix emsg prft pdin pnot udta".split())
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def container_end(path):
    """Where an MP4, an AVI or a WMV ends by the lengths that stand in it; 0 for other files.

    Beyond the file's end: the file was cut. Before it: what follows belongs to nothing, or is another file.
    """
    end, size = 0, os.path.getsize(path)
    with contextlib.suppress(OSError), open(path, "rb") as file:  # a bad disk: the decoder says what is missing
        _, wmv, properties = file.read(4096).partition(ASF_FILE_PROPERTIES)
        if wmv:
            return int.from_bytes(properties[24:32], "little")
        while end < size:
            file.seek(end)
            head = file.read(16)
            if head[:4] == b"RIFF":
                length = int.from_bytes(head[4:8], "little")
                length = 8 + length if 0 < length < 0xFFFFFFFF else 0
            elif head[4:8] in BOXES and not (end and head[4:8] == b"ftyp"):  # a second ftyp begins another file
                length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
            else:
                break
            if not length:  # to the end of the file, or never written
                return 0
            end += length
    return end


def judge_packets(probe, packets, said):
    """Whether the container lost pictures: packets that it is unsure of, or complaints that come with a gap in time.

    Right before a key frame, it is unsure because two recordings were joined; complaints alone are of other things.
    """
    for number, packet in enumerate(packets[:-1]):
        if packet.flags & UNSURE and not any(after.flags & KEY_FRAME for after in packets[number + 1 : number + 4]):
            probe.problems.append("damaged: the container has lost a part of the video")
            break
    gaps = [b - a for a, b in zip(probe.times or [], (probe.times or [])[1:])]
    broken = any(re.search("Error during demuxing|ended prematurely", text) for text in said)
    if said and (broken or probe.truncated or (gaps and max(gaps) > 1.6 * statistics.median(gaps))):
        probe.problems.append(f"damaged: {said[0]}")
    elif said:
        probe.notes.append(f"ffmpeg says: {said[0]}")


def why_unreadable(video, header):
    with open(video.path, "rb") as file:
        if not file.read(1024).strip(b"\0"):
            return "holds zeros instead of a video: an interrupted download?"
    tracks = re.findall(r"^\[info\]   Stream #0:\d+.*?: (\w+): ", header, re.MULTILINE)
    errors = re.findall(r"\[(?:error|fatal)\] (.*)", header)
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
    plain_colours = probe.matrix in PLAIN_MATRICES and probe.transfer not in HDR
    plain_frames = probe.codec in PLAIN_CODECS and probe.pixel_format in ("yuv420p", "yuvj420p") and plain_colours
    plain_name = "%" not in video.path and not re.search("[\udc80-\udcff]", video.path)  # a pattern; not UTF-8: a crash
    return probe.ordinary and plain_frames and plain_name and probe.times is not None


# ---------------------------------------------------------------------------------------------------------- decode


@dataclasses.dataclass
class Decoded:
    """What a reader has found so far."""

    frames: int = 0
    errors: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)
    said: str = ""  # the first error of whatever kind


def read_opencv(video, probe, args, threads, decoded):
    """Yields (seconds, BGR frame) as OpenCV decodes them. Raises `DecodeAgain` at the first sign of wrong ones."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    for time in probe.times:
        ok, frame = capture.read()
        if not ok or frame.shape != (*probe.size[::-1], 3):
            raise DecodeAgain("fewer frames than packets, or of another size")
        if decoded.frames == 0 and not is_alike(frame, probe.middle):
            raise DecodeAgain("not the picture that ffmpeg gives: other colours, or cropped elsewhere")
        if not frame[::16, ::16].any() and not frame.any():
            raise DecodeAgain("an all-black frame, as interlaced video gives")
        decoded.frames += 1
        yield time, frame
    if capture.grab():
        raise DecodeAgain("more frames than packets")


def is_alike(frame, middle):
    """Whether the middle of a frame, (H, W, 3) BGR, is `Probe.middle` but for rounding."""
    width, height = (min(*sizes) for sizes in zip(MIDDLE, frame.shape[1::-1]))
    if len(middle) != 3 * width * height:
        return not middle
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    shown = frame[top : top + height, left : left + width, ::-1].astype(np.int16)
    return np.abs(shown - np.frombuffer(middle, np.uint8).reshape(shown.shape)).mean() < 3


@contextlib.contextmanager
def hear_opencv():
    """Gives a function that says how many bytes of errors OpenCV's decoders, of all videos, have printed so far: the
    only sign of damage that they conceal. They print to the C library's standard output, a file meanwhile."""
    libc = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")

    def heard():
        libc.fflush(None)
        return os.fstat(file.fileno()).st_size

    sys.stdout.flush()
    terminal = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield heard
        finally:
            libc.fflush(None)
            os.dup2(terminal, 1)
            os.close(terminal)


def find_damage(video, probe, args, threads):
    """What ffmpeg says, in a pass of its own, of damaged pictures among those that are wanted: its messages in order.

    With one thread always the same ones: showinfo, whose lines they may fall into, is not there.
    """
    limit = ["-frames:v", str(args.max_frames)] if args.max_frames and not args.fps and video.episodes is None else []
    return picture_errors(run_ffmpeg(video, ["-threads", str(threads)], [*limit, "-f", "null", "-"])[1], probe)


def video_filters(probe, args):
    """ffmpeg's filters: HDR to SDR, square pixels, --width x --height (cover, then crop the centre), RGB.

    Sizes are formulas of each frame's own, since a video's size may change midway.
    """
    filters = []
    if probe.transfer in HDR:
        matrix = probe.matrix if probe.matrix.startswith("bt2020") else "bt2020nc"
        filters.append("format=yuv444p12le|gbrp12le")  # zscale cannot halve an odd size
        filters.append(f"setparams=color_primaries=bt2020:color_trc={probe.transfer}:colorspace={matrix}")
        filters.append("zscale=t=linear:npl=100,format=gbrpf32le")
        filters.append("zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p")
    aspect = "if(between(sar,0.1,10),sar,1)"
    width, height = ("iw", f"ih/{aspect}") if probe.sideways else (f"iw*{aspect}", "ih")
    if args.width:
        scale = f"max({args.width}/({width}),{args.height}/({height}))"
        width, height = f"max({args.width},round({width}*{scale}))", f"max({args.height},round({height}*{scale}))"
        smaller = max(args.width / probe.size[0], args.height / probe.size[1]) < 1
        filters.append(f"scale='{width}':'{height}':flags={'area' if smaller else 'bicubic'}")
        if probe.pixel_format == "yuv420p" and smaller:  # cheaper and truer than to scale and go to RGB in one step
            filters.append("format=yuv444p")
        filters.append(f"crop={args.width}:{args.height}")
    elif probe.pixel_aspect != 1:
        filters.append(f"scale='round({width})':'round({height})'")
    return ",".join([*filters, "setsar=1", "format=rgb24", "showinfo=checksum=0"])


def read_ffmpeg(video, probe, args, threads, decoded):
    """Yields (seconds, BGR frame) from a pipe of ffmpeg, which crops, turns and mirrors as the file says.

    Where the size changes midway, later frames are made to cover the first one's. Where timestamps begin again, in
    recordings joined into one file, they go on where they were.
    """
    output = ["-vf", video_filters(probe, args), *"-noautoscale -fps_mode passthrough -f rawvideo pipe:1".split()]
    process = start_ffmpeg(video, ["-threads", str(threads)], output)
    with contextlib.suppress(ImportError, AttributeError, OSError):  # a larger pipe, where there is such a thing
        import fcntl

        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
    announced = queue.Queue()  # (seconds or NOPTS, width, height) of each frame, before it comes; None at the end

    def read_log():
        stamp = "NOPTS"
        for line in process.stderr:  # a line of showinfo may be cut in two by a decoder's message
            line = line.decode("utf-8", "replace").rstrip()
            if match := re.search(r"\bpts_time:(\S+)", line):
                stamp = match[1]
            if match := re.search(r"\bs:(\d+)x(\d+) i:", line):
                announced.put((stamp, int(match[1]), int(match[2])))
            decoded.errors.extend(picture_errors([line], probe))
            decoded.said = decoded.said or line.partition("[error] ")[2]
        announced.put(None)

    threading.Thread(target=read_log, daemon=True).start()
    step, size, begin, last, shift = 1 / (probe.fps or 25), None, None, 0, 0
    try:
        while (coming := announced.get()) is not None:
            stamp, *own_size = coming
            frame = np.empty((*own_size[::-1], 3), np.uint8)
            view = memoryview(frame).cast("B")
            while view and (count := process.stdout.readinto(view)):
                view = view[count:]
            if view:
                break
            time = decoded.frames * step if stamp == "NOPTS" else float(stamp)
            begin, size = (time, own_size) if begin is None else (begin, size)
            if time - begin + shift < last:
                shift = last + step - (time - begin)
                decoded.notes.append(f"timestamps begin again at {last + step:.3f} s: recordings joined?")
            last = time - begin + shift
            if own_size != size:
                frame = common.fit_frame(frame, *size)
                decoded.notes.append(f"its size changes midway, to {own_size[0]}x{own_size[1]}: fitted to the first")
            decoded.frames += 1
            yield last, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR, dst=frame)  # ffmpeg's own BGR differs a little
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
SHORTEST_SHOT = 5  # frames; as many changes after a change are looked at


def measure_changes(frames):
    """Yields ((seconds, frame), change of the picture since the frame before, of 255, and seconds since it)."""
    before, last = None, None
    for time, frame in frames:
        step = max(1, min(frame.shape[:2]) // 96)
        small = cv2.resize(frame[::step, ::step], (48, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        yield (time, frame), (0 if last is None else float(np.abs(small - before).mean())), time - (last or 0)
        before, last = small, time


def number_scenes(frames):
    """Yields (scene, (seconds, frame)): the number rises where the shot changes, or where the timestamps have a hole.

    A cut is a change between two frames far larger than those before and after it: where the camera or the scene
    moves, the neighbours change as much. No shot is shorter than `SHORTEST_SHOT` frames.
    """
    scene, changes, gaps, ahead = 0, [], [], collections.deque()
    for step in itertools.chain(measure_changes(frames), [None] * SHORTEST_SHOT):
        if step:
            ahead.append(step)
        if not ahead or (step and len(ahead) <= SHORTEST_SHOT):
            continue
        pair, change, gap = ahead.popleft()
        around = max([*changes[-8:], *(later for _, later, _ in ahead)], default=0)
        long_enough = len(changes) >= SHORTEST_SHOT and len(ahead) >= SHORTEST_SHOT - 1
        cut = long_enough and change > max(CUT_LEAST, CUT_RATIO * around)
        if cut or (changes and gap > max(1, 10 * max(gaps, default=gap))):
            scene, changes, gaps = scene + 1, [0], []
        else:
            gaps = [*gaps[-7:], gap] if changes else []
            changes.append(change)
        yield scene, pair


def place_episodes(video, probe):
    """`[(first second, end, episode)]` of the episodes in a LeRobot v3 file; None for other files.

    Where their numbers of frames add up to the file's, the frames are counted: the timestamps drift from episode to
    episode. Raises `Failure` where the timestamps are not those of this file.
    """
    if video.episodes is None:
        return None
    times = probe.times or [number / (probe.fps or 25) for number in range(probe.packets)]
    twice = [episode for episode, count in collections.Counter(e[2] for e in video.episodes).items() if count > 1]
    if twice:
        raise Failure(f"meta/episodes names episode {twice[0]} twice in this file")
    half_gap = 0.5 / average_fps(times, probe.fps)[0]
    counted = sum(frames or 0 for *_, frames in video.episodes) == len(times)
    stop, places, short = 0, [], []
    for start, end, episode, frames in video.episodes:
        at = stop if counted else bisect.bisect_left(times, start - half_gap)
        stop = at + frames if frames else bisect.bisect_left(times, end - half_gap)
        if counted and at < len(times) and abs(times[at] - start) > 0.2 + 0.01 * start:
            raise Failure(f"meta/episodes: episode {episode} begins at {start:.1f} s, the frames say {times[at]:.1f} s")
        if at < len(times):
            places.append((times[at] - half_gap, times[stop] - half_gap if stop < len(times) else math.inf, episode))
        if at == len(times) or stop > len(times):
            short.append(str(episode))
    if not places:
        where = f"at {video.episodes[0][0]:.1f} s, and it ends at {times[-1]:.1f} s" if video.episodes else "nowhere"
        raise Failure(f"by meta/episodes its episodes begin {where}")
    if short:
        probe.problems.append(f"episode {', '.join(short)}: fewer frames than meta/episodes says")
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
        numbered = number_scenes(part) if args.split_scenes else ((0, pair) for pair in part)
        for _, shot in itertools.groupby(numbered, lambda pair: pair[0]):
            open_clips = []
            for index, (_, (time, frame)) in enumerate(shot):
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
    shape: tuple  # of its frames
    times: list = dataclasses.field(default_factory=list)  # seconds of each frame
    thumbnail: np.ndarray = None  # the last one that motion was measured with
    flows: list = dataclasses.field(default_factory=list)  # motion from one thumbnail to the next


class Run:
    """What the threads of a run share: options, folders, the encoders, the progress bar, the stop sign."""

    def __init__(self, args, videos, heard):
        self.args = args
        self.output = Path(args.output_dir)
        self.state = self.output / ".prepare"  # a record for each finished video, and the folders being written
        self.work = self.state / ("work" + args.shard.name)
        self.readers = max(1, min(args.num_workers, len(videos)))
        self.encoders = ThreadPoolExecutor(args.num_workers)
        self.huge, self.heard = threading.Lock(), heard
        line = "{n_fmt} of about {total_fmt} frames after {elapsed}, {remaining} left\n"
        log = {"bar_format": line, "delay": 10, "mininterval": 10, "miniters": 1}  # a line now and then for a log file
        self.bar = tqdm(unit="frame", dynamic_ncols=True, **({} if sys.stderr.isatty() else log))
        self.waiting, self.expected, self.begun = len(videos), 0, 0
        self.stop, self.lock = threading.Event(), threading.Lock()

    def expect(self, frames):
        """A video that has begun has so many frames; each that waits counts as the mean of these in the bar's total."""
        with self.lock:
            self.begun, self.expected = self.begun + 1, self.expected + frames
            self.bar.total = self.expected + round(self.waiting * self.expected / self.begun)


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
    """(H, W, 3) BGR -> bytes of a PNG or JPEG file; PNG is deflated by ISA-L where that is installed."""
    if image_format == "jpg":
        return cv2.imencode(".jpg", frame, JPG_OPTIONS)[1]
    return encode_png_fast(frame) if isal_zlib else cv2.imencode(".png", frame, common.PNG_OPTIONS)[1]


def write_image(frame, paths, image_format):
    """Encodes a frame once and writes it to each of `paths`, none where it belongs to no clip."""
    data = encode_image(frame, image_format) if paths else b""
    for path in paths:
        with common.named(path), open(path, "wb") as file:
            file.write(data)


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
    """Writes the clips of one video below `run.work` and measures their motion."""

    def __init__(self, video, stride, run):
        self.folder, self.stride, self.run = run.work / video.directory, stride, run
        self.clips, self.jobs = {}, collections.deque()

    def add(self, time, frame, names):
        """Takes a frame, (H, W, 3) uint8 BGR at `time` seconds, of the clips called `names`."""
        paths, thumbnail = [], None
        for name in names:
            if name not in self.clips:
                self.clips[name] = Clip(self.folder / name, frame.shape)
                self.clips[name].folder.mkdir(parents=True)
            clip = self.clips[name]
            paths.append(f"{clip.folder}/{len(clip.times):05d}.{self.run.args.image_format}")
            if len(clip.times) % self.stride == 0:
                thumbnail = common.motion_thumbnail(frame, cv2.COLOR_BGR2GRAY) if thumbnail is None else thumbnail
                if clip.thumbnail is not None:
                    clip.flows.append(common.flow_magnitude(clip.thumbnail, thumbnail))
                clip.thumbnail = thumbnail
            clip.times.append(time)
        if self.run.waiting:  # other videos keep the cores busy: handing over would only cost
            write_image(frame, paths, self.run.args.image_format)
        else:
            self.jobs.append(self.run.encoders.submit(write_image, frame, paths, self.run.args.image_format))
            if len(self.jobs) > max(1, min(64, BYTES_IN_FLIGHT // frame.nbytes)):
                self.jobs.popleft().result()  # raises what went wrong, such as a full disk
        self.run.bar.update()

    def finish(self):
        """Returns `{directory: Clip}` when all is written."""
        for job in self.jobs:
            job.result()
        return self.clips


def decode_video(video, probe, episodes, reader, threads, stride, run):
    """Writes a video's clips below `run.work`; returns `{directory: Clip}` and what the reader found (`Decoded`)."""
    decoded, before = Decoded(), run.heard()
    frames, writer = reader(video, probe, run.args, threads, decoded), FrameWriter(video, stride, run)
    try:
        for time, frame, names in cut_clips(frames, video, episodes, run.args):
            if run.stop.is_set():
                raise Failure("stopped, as the run is: nobody waits for this video any more")
            writer.add(time, frame, names)
        clips = writer.finish()
    finally:
        frames.close()
        wait(writer.jobs)  # nothing writes into the folders any more, whatever happened
    if reader is read_opencv and run.heard() > before and find_damage(video, probe, run.args, threads):
        raise DecodeAgain("OpenCV conceals damage")
    if reader is read_ffmpeg and threads > 1 and decoded.errors:
        raise DecodeAgain("how damage is concealed depends on the number of threads")
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
        if not changed and old["options"] == clip_options(args) and is_complete(old, run.output):
            return old
        for clip in old["clips"]:
            refuse_others(run.output / clip["directory"], clip["num_frames"])
    first_only = args.max_frames and not args.fps and video.episodes is None
    probe = probe_video(video, args.max_frames + 64 if first_only else None)
    wanted = min(args.max_frames or probe.packets, probe.packets)
    run.expect(wanted)
    episodes = place_episodes(video, probe)
    fps = average_fps(probe.times or [], probe.fps)[0]
    stride = common.motion_stride(min(fps, args.fps or fps))
    threads = max(1, args.num_workers // run.readers)
    attempts = [(read_opencv, threads)] * (opencv_is_right(video, probe) and not args.width)
    attempts += [(read_ffmpeg, threads)] * (threads > 1) + [(read_ffmpeg, 1)]
    with run.huge if math.prod(probe.size) > 1 << 24 else contextlib.nullcontext():  # one 8K video at a time
        for reader, threads in attempts:
            try:
                clips, decoded = decode_video(video, probe, episodes, reader, threads, stride, run)
                break
            except DecodeAgain:
                shutil.rmtree(run.work / video.directory, ignore_errors=True)
    if not clips:
        raise Failure("no frame of it can be decoded" + (f" ({decoded.said})" if decoded.said else ""))
    if decoded.errors and decoded.frames < wanted:
        probe.truncated = True
        probe.problems.append(f"{decoded.frames} of {wanted} frames could be decoded")
    if decoded.errors:
        probe.problems.append(f"damaged: {[*find_damage(video, probe, args, 1), *decoded.errors][0]}")
    probe.notes += dict.fromkeys(decoded.notes)
    record = {"source": video.source, **stamp, "options": clip_options(args), "clips": [], "dropped": {}}
    for directory, clip in clips.items():
        line = describe_clip(directory, clip, video, probe, stride, args)
        line["decoder"] = "opencv" if reader is read_opencv else "ffmpeg"
        line.update({key: getattr(probe, key) for key in ("codec", "truncated", "problems", "notes")})
        if line["num_frames"] < args.min_frames:
            record["dropped"][directory] = f"{line['num_frames']} frames, fewer than {args.min_frames}"
        elif line["motion"] < args.min_motion:
            record["dropped"][directory] = f"motion {line['motion']}, less than {args.min_motion}"
        else:
            record["clips"].append(line)
    publish(video, record, old, run)
    return record


def describe_clip(directory, clip, video, probe, stride, args):
    """The clip's line in metadata.jsonl, so far as it is the clip's own."""
    fps, holes = average_fps(clip.times, probe.fps, args.fps)
    if clip.flows:
        motion = statistics.fmean(clip.flows) * fps / stride
    else:  # shorter than the stride
        motion = common.clip_motion([common.read_frame(path) for path in common.list_frames(clip.folder)], fps)
    episode = re.search(r"@(episode_\d+)", directory) if video.episodes else None
    group = video.group + (episode[1] if episode else "")
    return {
        "directory": directory,
        "source": video.source,
        "group": group,
        **lerobot_fields(video, group),
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

# What .prepare/*.json says of a video, and of each of its clips, by kind: who edits one may get it wrong.
NUMBER = (int, float)
RECORD = {"source": str, "size": int, "mtime_ns": int, "options": dict, "clips": list, "dropped": dict}
CLIP = {"directory": str, "num_frames": int, "width": int, "height": int, "duration": NUMBER, "fps": NUMBER}
CLIP |= {"motion": NUMBER, "motion_bucket_id": NUMBER, "problems": list, "notes": list}
CLIP_OPTIONS = "max_frames width height fps clip_frames clip_stride min_frames min_motion split_scenes image_format"
CLIP_OPTIONS = CLIP_OPTIONS.split()


def clip_options(args):
    """The options that decide what a clip's files are: a dataset is of one kind."""
    return {name: getattr(args, name) for name in CLIP_OPTIONS}


def read_records(state):
    """What was finished so far: `{source: record}` of .prepare/*.json; a damaged one is passed over."""
    records, defaults = {}, {name: build_parser().get_default(name) for name in CLIP_OPTIONS}
    for path in state.glob("*.json"):
        with contextlib.suppress(ValueError, RecursionError, FileNotFoundError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if is_of_kind(record, RECORD) and all(is_of_kind(clip, CLIP) for clip in record["clips"]):
                record = {key: record[key] for key in RECORD}
                record["options"] = {**defaults, **record["options"]}  # an older version had fewer
                records[record["source"]] = record
    return records


def is_of_kind(found, kinds):
    """Whether this is a dict that has every field of `kinds`, {name: type}, each of its type; lists hold no numbers."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    return not any(isinstance(item, NUMBER) for name, kind in kinds.items() if kind is list for item in found[name])


def is_complete(record, output):
    """Whether every folder that the record promises is there with all its frames, none empty, as a power cut leaves it.

    Raises `Failure` for a folder that holds images of others.
    """
    for clip in record["clips"]:
        folder, count = output / clip["directory"], clip["num_frames"]
        try:
            frames = common.list_frames(folder) if folder.is_dir() else []
        except common.UserError as error:
            raise Failure(str(error)) from None
        if len(frames) > count:
            raise Failure(f"{folder} holds more images than the {count} of the clip: move away {frames[-1].name}")
        if len(frames) < count or not all(frame.stat().st_size for frame in frames):
            return False
    return True


def refuse_others(folder, num_frames):
    """Raises `Failure` where the folder of a clip that is to be made again is none, or holds what others put there."""
    ours = re.compile(r"\d{5,}\.(png|jpg)|\..*|thumbs\.db|desktop\.ini|@eadir", re.IGNORECASE)  # and what systems leave
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""] * os.path.lexists(folder)
    for name in names:
        if not ours.fullmatch(name) or (name[:5].isdecimal() and int(Path(name).stem) >= num_frames):
            raise Failure(f"{folder / name} is not of this program, and the clip is to be made again: move it away")


def dump_line(record):
    text = json.dumps(record, ensure_ascii=False)
    not_utf8 = re.search("[\ud800-\udfff]", text)  # in the name of a source
    return (json.dumps(record) if not_utf8 else text) + "\n"


def publish(video, record, old, run):
    """Makes a finished video part of the dataset: the record, then the folders, whole by a rename, then their lines.

    After a kill at any point the next run finds a record whose folders are not all there, and does that video again.
    """
    owned = {clip["directory"] for clip in (old or {}).get("clips", [])}
    for clip in record["clips"]:
        if clip["directory"] not in owned and os.path.lexists(run.output / clip["directory"]):
            raise Failure(f"{run.output / clip['directory']} exists and is not of this program: move it away")
    for directory in owned:
        if (run.output / directory).exists():
            os.replace(run.output / directory, run.work / video.directory / f"{directory}.old")
    common.write_file(run.state / f"{video.directory}.json", dump_line(record))
    for clip in record["clips"]:
        os.replace(run.work / video.directory / clip["directory"], run.output / clip["directory"])
    (run.output / "preview.jpg").unlink(missing_ok=True)  # it shows other clips; the run makes it again at its end
    if not run.args.shard.name:  # shards write the file at the end: appending is not safe between machines
        new = [clip for clip in record["clips"] if clip["directory"] not in owned]  # of the others there is a line
        with run.lock:
            for path in (run.state / "written.jsonl", run.output / "metadata.jsonl"):
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(map(dump_line, new)))


def read_lines(output, name="metadata.jsonl"):
    """A file of clips as it is: `{directory: line}`, and the lines of other kinds.

    Raises `UserError` for a line that is no JSON object, but for a last one that a killed run has not written whole.
    """
    lines, others = {}, []
    for _, line in common.read_lines(output / name, "not a JSON object; repair or delete it", cut_off=True):
        if isinstance(directory := line.get("directory"), str):
            lines[directory] = {**lines.get(directory, {}), **line}
        else:
            others.append(line)
    return lines, others


def by_name(directory):
    return common.natural_key(directory), directory


def write_metadata(output):
    """metadata.jsonl from all records, in name order. Returns the records.

    Lines and fields that somebody else wrote stay, and so do changes of ours: a value that is not what was written here
    last, as `.prepare/written.jsonl` knows, until its clip is made again and it has another one.
    """
    path, records = output / "metadata.jsonl", read_records(output / ".prepare")
    written, _ = read_lines(output / ".prepare", "written.jsonl")  # first: else another part's line would seem a change
    lines, others = read_lines(output)
    clips = {clip["directory"]: clip for record in records.values() for clip in record["clips"]}
    merged = []
    for directory in sorted({*lines, *clips}, key=by_name):
        line, clip, before = (found.get(directory, {}) for found in (lines, clips, written))
        if clip or str(line.get("source")) not in records:
            ours = {key: value for key, value in clip.items() if key not in line or before.get(key) != value}
            merged.append({**line, **ours})
    text = "".join(map(dump_line, [*merged, *others]))
    if text.encode() != (path.read_bytes() if path.exists() else b""):
        common.write_file(path, text)
    common.write_file(output / ".prepare" / "written.jsonl", "".join(map(dump_line, clips.values())))
    return records


FONTS = "NotoSansCJK-Regular.ttc wqy-zenhei.ttc wqy-microhei.ttc DroidSansFallbackFull.ttf msyh.ttc PingFang.ttc"


def write_preview(output, clips):
    """preview.jpg: a row for each clip, for up to forty of them: name, fps, motion, and four of its frames."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    high, wide, left, font = 80, 144, 300, ImageFont.load_default(12)
    for name in FONTS.split():  # fonts that show Chinese names, where the system has one
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, 12)
            break
    clips = [clips[i * len(clips) // min(40, len(clips))] for i in range(min(40, len(clips)))]
    sheet = Image.new("RGB", (left + 4 * wide, high * len(clips)), "white")
    draw = ImageDraw.Draw(sheet)

    def thumbnails(clip):
        try:
            paths = common.list_frames(output / clip["directory"])
            frames = [common.read_frame(paths[place * (len(paths) - 1) // 3]) for place in range(4 if paths else 0)]
        except (OSError, common.UserError):  # deleted since, or not only ours any more: no reason to end here
            return []
        small = [Image.fromarray(frame[:: max(1, len(frame) // 160), :: max(1, len(frame) // 160)]) for frame in frames]
        return [ImageOps.pad(image, (wide - 2, high - 2), color="white", centering=(0, 0)) for image in small]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for top, clip, pictures in zip(itertools.count(0, high), clips, pool.map(thumbnails, clips)):
            name = clip["directory"][:120]
            length = 40 if name.isascii() else 22  # letters that fit in a line
            lines = [name[i : i + length] for i in range(0, len(name), length)][:3]
            lines += [f"{clip['num_frames']} frames, {clip['fps']:g} fps"]
            lines += [f"motion {clip['motion']:g}, bucket {clip['motion_bucket_id']}"]
            draw.multiline_text((4, top + 2), "\n".join(lines), "black", font, spacing=2)
            for place, picture in enumerate(pictures):
                sheet.paste(picture, (left + place * wide, top))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=90)
    common.write_file(output / "preview.jpg", data.getvalue())


# --------------------------------------------------------------------------------------------------------- summary


def print_totals(records):
    """What was kept, and the range in which --motion_bucket_id means something."""
    clips = [clip for record in records for clip in record["clips"]]
    if not clips:
        return
    frames, hours = sum(clip["num_frames"] for clip in clips), sum(clip["duration"] for clip in clips) / 3600
    sizes = collections.Counter(f"{clip['width']}x{clip['height']}" for clip in clips)
    print(f"kept: {len(clips)} clips of {len(records)} videos, {frames} frames, {hours:.2f} hours")
    print(f"  size: {sizes.most_common(1)[0][0]}" + (f" and {len(sizes) - 1} others" if len(sizes) > 1 else ""))
    for key, title in (("fps", "fps"), ("motion", "motion, % of the longer side a second"), ("motion_bucket_id",) * 2):
        values = sorted(clip[key] for clip in clips)
        low, middle, high = (values[round(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9))
        print(f"  {title}: {values[0]:g} to {values[-1]:g}; ", end="")
        print(f"a tenth below {low:g}, half below {middle:g}, a tenth above {high:g}")


def print_reasons(title, reasons, most=math.inf):
    """A line for each of `{name: reason}`; more than `most` with the same words after the comma share one."""
    if reasons:
        print(f"{title}: {len(reasons)}")
    groups = {}
    for name, reason in reasons.items():
        name = name if name.isprintable() else ascii(name)  # one line, whatever is in it
        groups.setdefault(reason.rpartition(", ")[2], []).append(f"{name}: {reason}")
    for what, rows in groups.items():
        for row in rows if len(rows) <= most else [f"{len(rows)} clips {what}, as {rows[0]}"]:
            print(f"  {row}")


def summarize(records, failures, unfinished, twins, gone):
    """Prints what was kept, what was not and why. Returns whether all of it is whole."""
    print_totals(records)
    first = {record["source"]: record["clips"][0] for record in records if record["clips"]}
    flawed = {source: "; ".join(clip["problems"]) for source, clip in first.items() if clip["problems"]}
    noted = {source: "; ".join(clip["notes"]) for source, clip in first.items() if clip["notes"]}
    print_reasons("kept, with a note", noted)
    print_reasons("kept, but", flawed)
    print_reasons("perhaps twice", twins)
    print_reasons("in the dataset, though not in --video_dir any more", dict.fromkeys(gone, "its clips stay"))
    print_reasons("left out", unfinished)
    print_reasons("dropped", {name: why for record in records for name, why in record["dropped"].items()}, most=3)
    print_reasons("not kept", failures)
    return not (failures or flawed)


# ---------------------------------------------------------------------------------------------------- command line


def number(kind, least):
    """An argparse type: a number of at least `least`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {text}")
        return value

    return parse


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add, count = parser.add_argument, number(int, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--video_dir", required=True, help="folder of videos, searched with its subfolders; never written to")
    add("--output_dir", required=True, help="the dataset folder to make or to go on with")
    add("--max_frames", type=count, help="frames to take from each video at most (default: all)")
    add("--width", type=number(int, 16), help="pixels; with --height: cover this size, then crop the centre")
    add("--height", type=number(int, 16), help="pixels")
    add("--fps", type=number(float, 1e-5), help="frames a second to keep; slower video keeps what it has")
    add("--clip_frames", type=count, help="cut each video into clips of this many frames")
    add("--clip_stride", type=count, help="frames from one clip's start to the next (default: --clip_frames)")
    add("--min_frames", type=count, help="drop shorter clips (default: --clip_frames, or 1)")
    add("--min_motion", type=number(float, 0), default=0.0, help="drop stiller clips; %% of the longer side a second")
    add("--split_scenes", action="store_true", help="cut where the shot changes, so that no window crosses a cut")
    patterns = {"nargs": "+", "default": [], "metavar": "PATTERN"}
    add("--include", **patterns, help="take only these, as '*/left/*' or 'demo_*.mp4'; @FILE: the names in this list")
    add("--exclude", **patterns, help="leave these out; @FILE as above")
    add("--camera", nargs="+", default=[], help="take only these of a LeRobot dataset: a name or its last part")
    add("--image_format", choices=("png", "jpg"), default="png", help="png is lossless; jpg (95) a quarter the time")
    add("--fast_png", action="store_true", help="stop where isal is missing: it writes PNG in a third of the time")
    add("--num_workers", type=count, default=cores, help="encoding threads (default: one a core, here %(default)s)")
    shard = "do part I of N, on as many machines; I from 0 to N-1, or from 1 to N"
    add("--shard", metavar="I/N", type=common.parse_shard, default="0/1", help=shard)
    add("--overwrite", action="store_true", help="make again what changed since: the source, or the options")
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    video_dir, output_dir = os.path.realpath(args.video_dir), os.path.realpath(args.output_dir)
    if os.path.isfile(video_dir):
        folder, name = os.path.split(args.video_dir)
        parser.error(f"--video_dir {args.video_dir} is a file: give {folder or '.'}, and --include {name} for it alone")
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
    args.min_frames = args.min_frames or args.clip_frames or 1
    args.include = common.read_patterns(args.include, "--include")
    args.exclude = common.read_patterns(args.exclude, "--exclude")
    return args


def run_all(videos, records, args, heard):
    """Prepares the videos side by side; adds to `records`; returns `{source: reason}` of those that failed."""
    run, failures = Run(args, videos, heard), {}
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir()

    def one(video):
        with run.lock:
            run.waiting -= 1
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
            except (common.UserError, OSError):
                raise
            except Exception as error:  # a bad video never stops the others
                failures[jobs[job].source] = f"{type(error).__name__}: {error}"
    finally:
        run.stop.set()
        readers.shutdown(cancel_futures=True)
        run.encoders.shutdown()
        run.bar.close()
        shutil.rmtree(run.work, ignore_errors=True)
    return failures


def main(argv=None):
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop
    cv2.setNumThreads(1)  # the threads of this program take the cores
    videos, unfinished = find_videos(args)
    twins = find_twins(videos)
    videos = [video for video in videos if args.shard.holds(video.source)]
    if not videos:
        print("--shard {}/{}: none of the videos falls to it".format(*args.shard))
    output = Path(args.output_dir)
    state = output / ".prepare"
    state.mkdir(parents=True, exist_ok=True)
    busy = f"--output_dir {output}: another run is at work on it"
    with common.lock_shard(state, args.shard, busy):
        if not args.shard.name:  # alone here: what a killed run left half written goes
            ours = output.glob(".metadata.jsonl.*.part"), output.glob(".preview.jpg.*.part"), state.glob(".*.part")
            for left in itertools.chain(*ours):
                left.unlink()
            for left in filter(Path.is_dir, state.iterdir()):
                shutil.rmtree(left)
        read_lines(output)  # refused now, not after hours of work
        old = read_records(state)
        other = next((r["options"] for r in old.values() if r["options"] != clip_options(args)), None)
        if other and not args.overwrite:
            named = ", ".join(
                f"--{key} {value}" for key, value in other.items() if clip_options(args).get(key) != value
            )
            raise common.UserError(f"--output_dir {output} was made with {named}: do the same, or add --overwrite")
        if not args.shard.name:
            if old and not (state / "written.jsonl").exists():  # of an older version, which wrote what its records say
                clips = (clip for record in old.values() for clip in record["clips"])
                common.write_file(state / "written.jsonl", "".join(map(dump_line, clips)))
            write_metadata(output)  # what will be added must not follow half a line of a killed run
        with hear_opencv() as heard:
            failures = run_all(videos, dict(old), args, heard)
        records, before = write_metadata(output), None
        while records != before:  # another part may have ended meanwhile: the last one writes all
            clips = [clip for record in records.values() for clip in record["clips"]]
            clips.sort(key=lambda clip: by_name(clip["directory"]))
            if clips and (records != old or not (output / "preview.jpg").exists()):
                write_preview(output, clips)
            before, records = records, write_metadata(output)
    chosen = [records[video.source] for video in videos if video.source in records]
    gone = [source for source in records if not os.path.lexists(os.path.join(args.video_dir, source))]
    return 0 if summarize(chosen, failures, unfinished, twins, gone) else 1


if __name__ == "__main__":
    common.run_script(main)
