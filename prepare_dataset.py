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
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "16"  # errors: `Complaints` hears them. Read when cv2 is imported
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"

import cv2
import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

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


@dataclasses.dataclass
class Video:
    path: str
    source: str  # relative to --video_dir, with slashes
    directory: str  # its folder in the dataset, and the stem of its record
    group: str  # clips of one group (the cameras of an episode) belong on one side of a held-out split
    camera: str = ""
    episodes: list = None  # LeRobot v3: (first second, end, episode) of the episodes in this file

    @property
    def number(self):
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


def find_videos(args):
    """Every video file of --video_dir, in name order. Links are followed; hidden and partial files are left out."""
    root = os.path.abspath(args.video_dir)
    folders, links, seen, videos = [root], [], set(), []
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # real folders first, so that files keep their real names
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = {e.name: e for e in os.scandir(folder) if not e.name.startswith(".") and e.name != "__MACOSX"}
        except OSError:  # named with the videos that fail
            entries = {}
            videos.append(describe_video(folder, root))
        for name, entry in entries.items():
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES and not is_still_webp(entry):
                if not any(name + partial in entries for partial in PARTIAL_SUFFIXES):
                    videos.append(describe_video(entry.path, root))
    if not videos:
        raise common.UserError(f"--video_dir {args.video_dir}: no video in it")
    chosen = [video for video in videos if is_wanted(video, args)]
    if not chosen:
        cameras = sorted({video.camera for video in videos if video.camera})
        hint = f"; the cameras are {', '.join(cameras)}" if args.camera and cameras else ""
        raise common.UserError(f"--camera, --include and --exclude leave none of {len(videos)} videos{hint}")
    for video in chosen:
        if match := LEROBOT_V3.fullmatch(video.path.replace(os.sep, "/")):
            episodes = read_episodes(match["root"]).get((match["camera"], int(match["chunk"]), int(match["file"])))
            if not episodes:
                raise common.UserError(f"{match['root']}meta/episodes names no episode of {video.source}")
            video.episodes = sorted(episodes)
    return sorted(chosen, key=lambda video: common.natural_key(video.source))


def is_still_webp(entry):
    if not entry.name.lower().endswith(".webp") or not entry.is_file():
        return False
    try:
        with open(entry.path, "rb") as file:
            head = file.read(21)
    except OSError:
        return False
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
    def named(patterns):
        return any(
            fnmatch.fnmatch(video.source, p) or fnmatch.fnmatch(os.path.basename(video.source), p) for p in patterns
        )

    camera = not args.camera or any(video.camera == c or video.camera.endswith("." + c) for c in args.camera)
    return camera and (not args.include or named(args.include)) and not named(args.exclude)


@functools.cache
def read_episodes(root):
    """LeRobot v3: where each file's episodes lie, `{(camera, chunk, file): [(first second, end, episode)]}`."""
    why = (
        f"{root} is a LeRobot v3 dataset: a file holds several episodes, and windows would cross from one to the next. "
    )
    try:
        from pyarrow import parquet
    except ImportError:
        raise common.UserError(why + "pip install pyarrow, which reads their boundaries") from None
    tables = sorted(Path(root, "meta", "episodes").rglob("*.parquet"))
    if not tables:
        raise common.UserError(why + "Their boundaries, meta/episodes/*/*.parquet, are missing") from None
    episodes = {}
    for row in itertools.chain.from_iterable(parquet.read_table(table).to_pylist() for table in tables):
        for camera in (key.split("/")[1] for key in row if re.fullmatch(r"videos/[^/]+/from_timestamp", key)):
            chunk, file, start, end = (
                row[f"videos/{camera}/{name}"]
                for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            )
            episodes.setdefault((camera, int(chunk), int(file)), []).append((start, end, int(row["episode_index"])))
    return episodes


# ----------------------------------------------------------------------------------------------------------- probe

PLAIN_CODECS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "mjpeg"}
PLAIN_MATRICES = {"", "unknown", "bt709", "bt470bg", "smpte170m"}  # OpenCV turns these into RGB as ffmpeg does
HDR = {"smpte2084", "arib-std-b67"}  # PQ and HLG
CUT_LEAST, CUT_RATIO = (
    10,
    3.5,
)  # of 255: how much a cut changes the picture, and more than the frames before by how much


@dataclasses.dataclass
class Probe:
    """What ffmpeg says of a file without decoding it. The header may lie; the packets are there."""

    codec: str
    pixel_format: str
    matrix: str  # of the colours, where it is tagged
    transfer: str
    size: tuple  # width, height as shown: turned, and with square pixels
    stored: tuple  # as coded
    turned: bool  # by the display matrix: a rotation, a mirror
    tracks: int
    fps: float
    duration: float  # as claimed; 0 where it is not, or where it may be that of the sound
    times: list  # seconds of every packet in display order; None where the file has no timestamps
    packets: int
    errors: list
    notes: list
    decoded: int = 0
    last: float = None  # seconds of the last frame, where the decoder came to the end


def start_ffmpeg(video, decoder_options, output_options):
    """ffmpeg on one file, given as an open descriptor: no name can be read as a URL, a pattern or an option, and the
    whitelist lets nothing in the file open another file or the network."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info"]
    demuxer = ["-f", "mjpeg"] * (os.path.splitext(video.path)[1].lower() in (".mjpeg", ".mjpg"))  # or it is a still
    command += [*demuxer, *decoder_options, "-protocol_whitelist", "fd", "-i", "fd:", "-map", "0:V:0", *output_options]
    with open(video.path, "rb") as file:  # a session of its own: Ctrl-C must not end its video early
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        return subprocess.Popen(command, stdin=file, **options)


def error_messages(lines):
    """The complaints in the lines of `-v level+info`."""
    found = (re.match(r"(?:\[[^\]]* @ [^\]]*\] )?\[(error|fatal|panic|warning)\] (.*)", line) for line in lines)
    return [match[2] for match in found if match and (match[1] != "warning" or "corrupt" in match[2])]


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
    """Lists a file's packets without decoding them. Raises `Failure` with the reason where there is no video in it."""
    limit = ["-frames:v", str(max_packets)] if max_packets else []
    process = start_ffmpeg(video, [], ["-c", "copy", *limit, "-f", "framecrc", "pipe:1"])
    listing, log = (part.decode("utf-8", "replace").splitlines() for part in process.communicate())
    header = list(itertools.takewhile(lambda line: not re.match(r"\[info\] (Output #0|Stream mapping)", line), log))
    output, header, errors = "\n".join(log[len(header) :]), "\n".join(header), error_messages(log)
    tracks = re.findall(r"^\[info\]   Stream #0:\d+.*?: (\w+): ", header, re.MULTILINE)
    packets = [line.split(",") for line in listing if line[:2] == "0,"]
    if not packets:
        raise Failure(why_unreadable(tracks, errors))
    if re.search(r"^\[info\] Input #0, (\w+_pipe|image2|tty), from ", header, re.MULTILINE):
        raise Failure("a still image or text, not a video")
    fields = dict(match.groups() for row in listing if (match := re.match(r"#(\w+) 0: (.*)", row)))
    track = re.search(r"^\[info\]   Stream #0:0.*: Video: .*?, (\w+)(?:\((.*?)\))?, \d+x\d+.*", output, re.MULTILINE)
    pixel_format, tags = track.groups(default="") if track else ("", "")
    colour = [tag for tag in tags.split(", ") if tag not in ("tv", "pc", "progressive") and " first" not in tag]
    matrix, transfer = colour[0].split("/")[0] if colour else "", colour[0].split("/")[-1] if colour else ""
    turn = re.search(r"Display Matrix: rotation of (-?[\d.]+)?", output)
    fps = re.search(r", ([\d.]+)(k?) fps", track[0] if track else "")
    clock = re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)(?:, start: ([\d.]+))?", header, re.MULTILINE)
    hours, minutes, seconds, start = (float(part or 0) for part in (clock.groups() if clock else "0000"))
    tick, sar = (n / d if d else 1 for n, d in (map(int, fields[name].split("/")) for name in ("tb", "sar")))
    stored = width, height = tuple(int(n) for n in fields["dimensions"].split("x"))
    width = round(width * sar) if 0.1 < sar < 10 else width
    if turn and 45 < abs(float(turn[1] or 0)) < 135:
        width, height = height, width
    stamps = [int(packet[2]) for packet in packets]
    if min(stamps) < -(1 << 62):  # AVI and bare streams: no presentation times, but steady decoding times
        stamps = [int(packet[1]) for packet in packets]
    notes = ["interlaced"] * (" first" in tags) + [f"HDR ({transfer}) made SDR"] * (transfer in HDR)
    notes += ["alpha dropped"] * bool(re.match(r"yuva|gbra|rgba|bgra|argb|abgr|ya\d", pixel_format))
    return Probe(
        codec=fields["codec_id"],
        pixel_format=pixel_format,
        matrix=matrix,
        transfer=transfer,
        size=(width, height),
        stored=stored,
        turned=bool(turn),
        tracks=tracks.count("Video"),
        fps=float(fps[1]) * (1000 if fps[2] else 1) if fps else 0.0,
        duration=0 if "Audio" in tracks else max(0, hours * 3600 + minutes * 60 + seconds - start),
        times=None if min(stamps) < -(1 << 62) else [(stamp - min(stamps)) * tick for stamp in sorted(stamps)],
        packets=len(packets),
        errors=errors,
        notes=notes,
    )


def why_unreadable(tracks, errors):
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
        probe.codec in PLAIN_CODECS
        and probe.pixel_format in ("yuv420p", "yuvj420p")
        and probe.matrix in PLAIN_MATRICES
        and probe.size == probe.stored
        and probe.tracks == 1
        and probe.times is not None
        and not (probe.turned or probe.notes)
        and "%" not in video.path  # could be read as a pattern
        and not any("\udc80" <= letter <= "\udcff" for letter in video.path)  # not UTF-8: OpenCV crashes
    )


# ---------------------------------------------------------------------------------------------------------- decode


def read_opencv(video, probe, args, threads):
    """Yields (seconds, BGR frame) as OpenCV decodes them. Raises `Distrust` at the first sign that they are wrong."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    for time in probe.times:
        ok, frame = capture.read()
        if not ok:
            raise Distrust("fewer frames than packets")
        if frame.shape != (*probe.size[::-1], 3):
            raise Distrust("another size")
        if not frame[::16, ::16].any() and not frame.any():
            raise Distrust("an all-black frame, as interlaced video gives")
        probe.decoded += 1
        yield time, frame
    if capture.grab():
        raise Distrust("more frames than packets")
    probe.last = time


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


def decoding_errors(video, args):
    """Whether ffmpeg complains of the frames that are wanted."""
    limit = ["-frames:v", str(args.max_frames)] if args.max_frames and not args.fps and not video.episodes else []
    process = start_ffmpeg(video, [], [*limit, "-f", "null", "-"])
    return error_messages(process.communicate()[1].decode("utf-8", "replace").splitlines())


def video_filters(probe, args):
    """ffmpeg's filters: HDR to SDR, square pixels, --width x --height (cover, then crop the centre), RGB."""
    filters = []
    if probe.transfer in HDR:
        matrix = probe.matrix if probe.matrix.startswith("bt2020") else "bt2020nc"
        filters.append(f"zscale=min={matrix}:pin=bt2020:tin={probe.transfer}:t=linear:npl=100,format=gbrpf32le")
        filters.append("zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p")
    if args.width:
        scale = max(args.width / probe.size[0], args.height / probe.size[1])
        size = [max(least, round(n * scale)) for n, least in zip(probe.size, (args.width, args.height))]
        kind = "area" if scale < 1 else "bicubic"
        filters += [f"scale={size[0]}:{size[1]}:flags={kind}", f"crop={args.width}:{args.height}"]
        if probe.pixel_format == "yuv420p" and scale < 1:  # cheaper and truer than to scale and go to RGB in one step
            filters.insert(-1, "format=yuv444p")
    elif probe.size not in (probe.stored, probe.stored[::-1]):
        filters.append(f"scale={probe.size[0]}:{probe.size[1]}")
    return ",".join([*filters, "setsar=1", "format=rgb24", "showinfo=checksum=0"])


def read_ffmpeg(video, probe, args, threads):
    """Yields (seconds, BGR frame) from a pipe of ffmpeg, which turns and mirrors as the display matrix says."""
    output = ["-vf", video_filters(probe, args), "-fps_mode", "passthrough", "-f", "rawvideo", "pipe:1"]
    process = start_ffmpeg(video, ["-threads", str(threads)], output)
    with contextlib.suppress(ImportError, AttributeError, OSError):  # a larger pipe, where there is such a thing
        import fcntl

        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
    times, sizes = queue.Queue(), queue.Queue()

    def read_log():
        for line in process.stderr:
            line = line.decode("utf-8", "replace").rstrip()
            if match := re.search(r"showinfo.*\bpts_time:(\S+)", line):
                times.put(None if match[1] == "NOPTS" else float(match[1]))
            elif match := re.match(r"\[info\]   Stream #0:0.*: Video: rawvideo.*?, (\d+)x(\d+)", line):
                sizes.put((int(match[2]), int(match[1]), 3))
            else:
                probe.errors.extend(error_messages([line]))
        sizes.put(None)

    log = threading.Thread(target=read_log, daemon=True)
    log.start()
    first, probe.decoded = None, 0
    try:
        shape = sizes.get()
        while shape:
            frame = np.empty(shape, np.uint8)
            view = memoryview(frame).cast("B")
            while view and (count := process.stdout.readinto(view)):
                view = view[count:]
            if view:
                break
            time = times.get()
            time = probe.decoded / (probe.fps or 25) if time is None else time
            first = time if first is None else first
            probe.decoded, last = probe.decoded + 1, time - first
            yield (
                last,
                cv2.cvtColor(frame, cv2.COLOR_RGB2BGR, dst=frame),
            )  # ffmpeg's own RGB: its BGR is not quite equal
        log.join()
        if process.wait() < 0:
            raise Failure(f"ffmpeg was killed by signal {-process.returncode}: too little memory?")
        probe.last = last if probe.decoded else None
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


def number_scenes(frames):
    """Yields (scene, (seconds, frame)): the number rises where the shot changes, or where the timestamps have a hole.

    A cut: small pictures of two frames differ by far more than those of the frames before did.
    """
    scene, before, recent, gaps, last = 0, None, [], [], None
    for time, frame in frames:
        step = max(1, min(frame.shape[:2]) // 96)
        small = cv2.resize(frame[::step, ::step], (48, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        if before is not None:
            change, gap = float(np.abs(small - before).mean()), time - last
            if change > max(CUT_LEAST, CUT_RATIO * max(recent, default=0)) or gap > max(1, 10 * max(gaps, default=gap)):
                scene, recent = scene + 1, []
            else:
                recent, gaps = [*recent[-7:], change], [*gaps[-7:], gap]
        before, last = small, time
        yield scene, (time, frame)


def cut_clips(frames, video, args):
    """Yields (seconds, frame, names) with the names of the clips that the frame belongs to: one for a whole video;
    `name@0003` for the windows of --clip_frames and the shots of --split_scenes; none between LeRobot v3's episodes."""
    numbers = itertools.count()
    starts = [start for start, _, _ in video.episodes or []]

    def episode_of(pair):
        if not starts:
            return ""
        at = max(0, bisect.bisect(starts, pair[0] + 0.005) - 1)
        start, end, episode = video.episodes[at]
        return f"episode_{episode:06d}" if start <= pair[0] + 0.005 < end else None

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
        if not starts:
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
        self.bar = tqdm(unit="frame", disable=None, dynamic_ncols=True)
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
    """True average rate of timestamps in seconds, without their holes; and the holes' lengths."""
    gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
    if not gaps:
        return next((round(claim, 3) for claim in claims if claim), 25.0), []
    longest = max(1.0, 10 * statistics.median(gaps))
    steady = [gap for gap in gaps if gap <= longest]
    fps = len(steady) / sum(steady)
    for claim in claims:  # timestamps in whole milliseconds leave an error that the rate in the header does not have
        if claim and abs(fps - claim) <= 0.01 + fps * 0.0015 / sum(steady):
            fps = claim
    return round(fps, 3), [gap for gap in gaps if gap > longest]


def encode_png_fast(frame):
    """(H, W, 3) BGR -> PNG bytes, deflated by ISA-L: three to four times as fast as OpenCV's zlib, files as small."""
    from isal import isal_zlib

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


def write_clips(video, probe, frames, run):
    """Writes the folders of a video's clips under `run.work`, with the encoder threads; returns `{directory: Clip}`."""
    suffix = run.args.image_format
    options = common.PNG_OPTIONS if suffix == "png" else JPG_OPTIONS
    fps = average_fps(probe.times or [], probe.fps)[0]
    stride = common.motion_stride(min(fps, run.args.fps or fps))
    clips, jobs, batch, room = {}, [], [], None

    def write(batch):
        try:
            flows = []
            for frame, paths, pairs in batch:
                data = encode_png_fast(frame) if run.args.fast_png else cv2.imencode(f".{suffix}", frame, options)[1]
                for path in paths:
                    with open(path, "wb") as file:
                        file.write(data)
                flows += [(clip, common.flow_magnitude(first, second)) for clip, first, second in pairs]
            return flows
        except OSError as error:  # a full disk: no other video has room either
            run.error = error
            run.stop.set()
            raise
        finally:
            room.release()

    def submit():
        room.acquire()
        if size > 1 and run.waiting:  # other videos keep the cores busy: to hand over small frames only costs
            job = Future()
            job.set_result(write(batch))
        else:
            job = run.encoders.submit(write, batch)
        jobs.append(job)
        run.bar.update(len(batch))

    try:
        for time, frame, names in cut_clips(frames, video, run.args):
            if run.stop.is_set():
                raise Stopped
            if room is None:  # what waits for an encoder is bounded in bytes; small frames go in batches of a megabyte
                size = min(64, 1 + (1 << 20) // frame.nbytes)
                ahead = BYTES_IN_FLIGHT // run.readers // (size * frame.nbytes)
                room = threading.BoundedSemaphore(max(1, min(16, ahead)))
            paths, pairs, thumbnail = [], [], None
            for name in names:
                if name not in clips:
                    clips[name] = Clip(run.work / video.directory / name, stride, frame.shape)
                    clips[name].folder.mkdir(parents=True)
                clip = clips[name]
                paths.append(f"{clip.folder}/{len(clip.times):05d}.{suffix}")
                if len(clip.times) % stride == 0:
                    thumbnail = common.motion_thumbnail(frame, cv2.COLOR_BGR2GRAY) if thumbnail is None else thumbnail
                    if clip.thumbnail is not None:
                        pairs.append((clip, clip.thumbnail, thumbnail))
                    clip.thumbnail = thumbnail
                clip.times.append(time)
            batch.append((frame, paths, pairs))
            if len(batch) == size:
                submit()
                batch = []
        if batch:
            submit()
        for job in jobs:
            for clip, flow in job.result():
                clip.flows.append(flow)
        return clips
    finally:
        frames.close()
        wait(jobs)  # nothing writes into the folders any more, whatever happened


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
    probe = probe_video(
        video, args.max_frames + 64 if args.max_frames and not args.fps and not video.episodes else None
    )
    run.expect(min(args.max_frames or probe.packets, probe.packets))
    threads = max(1, args.num_workers // run.readers)
    attempts = [(read_opencv, threads)] * (opencv_is_right(video, probe) and not args.width)
    attempts += [(read_ffmpeg, threads)] * (threads > 1 and not probe.errors) + [(read_ffmpeg, 1)]
    with run.huge if math.prod(probe.size) > 1 << 24 else contextlib.nullcontext():  # one 8K video at a time
        for reader, threads in attempts:
            heard = run.complaints.size()
            try:
                clips = write_clips(video, probe, reader(video, probe, args, threads), run)
                if reader is read_opencv and run.complaints.size() > heard and decoding_errors(video, args):
                    raise Distrust("damage that the decoder conceals")
                if reader is read_ffmpeg and threads > 1 and probe.errors:
                    raise Distrust("how damage is concealed depends on the number of threads")
                break
            except Distrust:
                shutil.rmtree(run.work / video.directory, ignore_errors=True)
    if not probe.decoded:
        raise Failure("no frame of it can be decoded" + (f" ({probe.errors[0]})" if probe.errors else ""))
    record = {"source": video.source, **stamp, "options": shaping_options(args), "clips": [], "dropped": {}}
    common_fields = {
        "decoder": reader.__name__.removeprefix("read_"),
        "codec": probe.codec,
        **what_was_wrong(probe, args),
    }
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


def what_was_wrong(probe, args):
    """Damage, which makes the exit status 1, and what is only worth knowing."""
    problems, notes = [], list(probe.notes)
    wanted = min(args.max_frames or probe.packets, probe.packets)
    truncated = probe.decoded < wanted and bool(probe.errors)
    if probe.last is not None and probe.duration - probe.last > max(0.5, 0.05 * probe.duration) + 1 / (probe.fps or 25):
        truncated = True
        problems.append(f"ends after {probe.last:.1f} s of the {probe.duration:.1f} s that its header claims")
    if truncated and probe.decoded < wanted:
        problems.append(f"{probe.decoded} of {wanted} frames could be decoded")
    if probe.errors:
        problems.append(f"damaged: {probe.errors[0]}")
    return {"truncated": truncated, "problems": problems, "notes": notes}


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


def summarize(records, failures):
    """Prints what was kept, what was not and why, and the range in which --motion_bucket_id means something."""

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
    flawed = {
        r["source"]: "; ".join(r["clips"][0]["problems"]) for r in records if r["clips"] and r["clips"][0]["problems"]
    }
    dropped = {directory: reason for record in records for directory, reason in record["dropped"].items()}
    for title, reasons in (("kept, but", flawed), ("dropped", dropped), ("not kept", failures)):
        if reasons:
            print(f"{title}: {len(reasons)}")
        for name, reason in reasons.items():
            print(f"  {printable(name)}: {reason}")
    return flawed


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
    if args.fast_png:
        try:
            import isal  # noqa: F401
        except ImportError:
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
    videos = find_videos(args)
    if args.shard:
        videos = [video for video in videos if video.number % args.shard[1] == args.shard[0]]
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
    flawed = summarize(chosen, failures)
    return 1 if failures or flawed else 0


if __name__ == "__main__":
    common.run_script(main)
