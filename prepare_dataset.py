"""Turns a folder of videos into a dataset of frames: a folder of images for each clip, and a line in metadata.jsonl.

    python prepare_dataset.py --video_dir ./videos --output_dir ./dataset --max_frames 25

Run the same command again after a stop: what is done stays, the rest is done. Exit status 0: every video is whole in
the dataset; 1: some are not, each named with its reason; 2: nothing to do, or a wrong option.

The way of one video: `find_videos` -> `probe_video` (ffmpeg lists its packets) -> `read_opencv`, or `read_ffmpeg` where
OpenCV is known to be wrong or gives fewer frames than there are -> `write_clips` (threads encode images) -> `publish`.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import re
import shutil
import stat
import statistics
import subprocess
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import svd_common as common  # before cv2: it silences the decoders' messages

# isort: split
import cv2
import imageio_ffmpeg
import numpy as np
from tqdm import tqdm

VIDEO_SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .apng .asf .av1 .avc .avi .dav .dif .divx .dv .evo .f4v .flv .gif .h264 .h265 .hevc .insv"
    " .ivf .lrv .m1v .m2t .m2ts .m2v .m4v .mj2 .mjpeg .mjpg .mk3d .mkv .mod .mov .mp4 .mp4v .mpe .mpeg .mpg .mpv .mts"
    " .mxf .nut .obu .ogm .ogv .qt .rm .rmvb .tod .trp .ts .vob .vvc .webm .wmv .wtv .xvid .y4m".split()
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


@dataclasses.dataclass
class Video:
    """One file. `group`: clips of one group (the cameras of an episode) belong on one side of a held-out split."""

    path: str
    source: str  # relative to --video_dir, with slashes
    directory: str  # its folder in the dataset, and the stem of its record
    group: str
    camera: str = ""


LEROBOT_V2 = re.compile(r"(?P<root>.*/)videos/chunk-\d+/(?P<camera>[^/]+)/(?P<episode>episode_\d+)\.\w+")


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


def find_videos(video_dir):
    """Every video file under `video_dir`, in name order. Links are followed, hidden and partial files left out."""
    root = os.path.abspath(video_dir)
    folders, links, seen, videos = [root], [], set(), []
    while folders or links:
        folder = folders.pop() if folders else links.pop()  # real folders first, so that files keep their real names
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = {e.name: e for e in os.scandir(folder) if not e.name.startswith(".") and e.name != "__MACOSX"}
        for name, entry in entries.items():
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(entry.path)
            elif os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
                if not any(name + partial in entries for partial in PARTIAL_SUFFIXES):
                    videos.append(describe_video(entry.path, root))
    return sorted(videos, key=lambda video: common.natural_key(video.source))


def describe_video(path, root):
    source = os.path.relpath(path, root).replace(os.sep, "/")
    video = Video(path, source, directory_name(source), group=source)
    if match := LEROBOT_V2.fullmatch(path.replace(os.sep, "/")):
        dataset = os.path.relpath(match["root"], root).replace(os.sep, "/")
        video.group = match["episode"] if dataset.startswith(".") else f"{dataset}/{match['episode']}"
        video.camera = match["camera"]
    return video


# ----------------------------------------------------------------------------------------------------------- probe

PLAIN_CODECS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "mjpeg"}  # of 8-bit 4:2:0 video
PLAIN_MATRICES = {"", "bt709", "bt470bg", "smpte170m"}  # colour matrices that OpenCV turns into RGB as ffmpeg does


@dataclasses.dataclass
class Probe:
    """What ffmpeg says of a file before decoding. The header may lie; the packets are there."""

    demuxer: str
    codec: str
    pixel_format: str
    colour: list  # of the stream line: range, matrix/primaries/transfer, field order, where known
    width: int
    height: int
    square: bool
    oriented: bool  # a display matrix: rotation or mirror
    video_tracks: int
    fps: float
    duration: float
    times: list  # seconds, of every packet in display order; None where the file has no timestamps
    packets: int
    errors: list


def start_ffmpeg(video, decoder_options, output_options):
    """ffmpeg on one file, given as an open descriptor: no name can be read as a URL, a pattern or an option, and the
    whitelist lets nothing in the file open another file or the network."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info"]
    command += [*decoder_options, "-protocol_whitelist", "fd", "-i", "fd:", "-map", "0:V:0", *output_options]
    with open(video.path, "rb") as file:
        return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def error_messages(lines):
    """The decoder's complaints in a stream of `-v level+info` lines."""
    found = (re.match(r"(?:\[[^\]]* @ [^\]]*\] )?\[(?:error|fatal|panic)\] (.*)", line) for line in lines)
    return [match[1] for match in found if match]


def check_file(video):
    """Raises `Failure` for what is no video at first sight; never opens what is no regular file (a pipe would hang)."""
    try:
        status = os.stat(video.path)
        if not stat.S_ISREG(status.st_mode):
            raise Failure("not a regular file")
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
    if all(byte in b"\t\n\r\f\x1b" or byte >= 32 for byte in head):
        with contextlib.suppress(UnicodeDecodeError):
            head[:1000].decode()
            if not text.startswith(b"yuv4mpeg"):
                raise Failure("text, not a video")
    return status


def probe_video(video, max_packets=None):
    """Lists a file's packets without decoding them. Raises `Failure` with the reason where there is no video in it."""
    limit = ["-frames:v", str(max_packets)] if max_packets else []
    process = start_ffmpeg(video, [], ["-c", "copy", *limit, "-f", "framecrc", "pipe:1"])
    listing, log = (part.decode("utf-8", "replace").splitlines() for part in process.communicate())
    errors = error_messages(log)
    header = list(itertools.takewhile(lambda line: not re.match(r"\[info\] (Output #0|Stream mapping)", line), log))
    demuxer = next((m[1] for line in header if (m := re.match(r"\[info\] Input #0, (.+), from ", line))), "")
    streams = [m[1] for line in header if (m := re.match(r"\[info\]   Stream #0:\d+.*?: (\w+): ", line))]
    packets = [line.split(",") for line in listing if line[:2] == "0,"]
    if not packets:
        if any("Protocol not found" in error for error in errors):
            raise common.UserError(f"{imageio_ffmpeg.get_ffmpeg_exe()} is too old: pip install -U imageio-ffmpeg")
        raise Failure(why_unreadable(demuxer, streams, errors))
    if "_pipe" in demuxer or demuxer in ("image2", "tty"):
        raise Failure("a still image or text, not a video")
    output = log[len(header) :]
    line = next((line for line in output if re.match(r"\[info\]   Stream #0:0.*: Video: ", line)), "")
    pixel = re.search(r", (\w+)(?:\(([^)]*)\))?, \d+x\d+", line)
    fps = re.search(r", ([\d.]+)(k?) fps", line)
    clock = re.search(r"Duration: (\d+):(\d+):([\d.]+)", "\n".join(header))
    fields = dict(m.groups() for row in listing if (m := re.match(r"#(\w+) 0: (.*)", row)))
    width, height = (int(n) for n in fields["dimensions"].split("x"))
    tick = eval_ratio(fields["tb"])
    stamps = [int(packet[2]) for packet in packets]
    if min(stamps) < -(1 << 62):  # AVI and bare streams: no presentation times, but steady decoding times
        stamps = [int(packet[1]) for packet in packets]
    return Probe(
        demuxer=demuxer,
        codec=fields["codec_id"],
        pixel_format=pixel[1] if pixel else "",
        colour=[part.strip() for part in (pixel[2] or "").split(",")] if pixel else [],
        width=width,
        height=height,
        square=eval_ratio(fields["sar"]) in (0, 1),
        oriented=any("Display Matrix" in row for row in output),
        video_tracks=streams.count("Video"),
        fps=float(fps[1]) * (1000 if fps[2] else 1) if fps else 0.0,
        duration=int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else 0.0,
        times=None if min(stamps) < -(1 << 62) else [stamp * tick for stamp in sorted(stamps)],
        packets=len(packets),
        errors=errors,
    )


def eval_ratio(text):
    over, under = (int(n) for n in text.split("/"))
    return over / under if under else 0


def why_unreadable(demuxer, streams, errors):
    if "Video" in streams and not any("matches no streams" in error for error in errors):
        return "its video track holds no frame"
    if streams:
        return "no video track" + (" (audio only)" if "Audio" in streams else "")
    if any("moov atom not found" in error for error in errors):
        return "no index in it (moov atom not found): the recording or the download was cut short"
    return "not a video that ffmpeg can read" + (f" ({errors[0]})" if errors else "")


def opencv_is_right(probe, video):
    """Whether OpenCV is known to give this file's frames as a player shows them."""
    matrix = next((part for part in probe.colour if "/" in part or part in PLAIN_MATRICES), "").split("/")[0]
    interlaced = any("first" in part or "coded" in part for part in probe.colour)  # reads as black frames
    plain_name = "%" not in video.path and not any("\udc80" <= letter <= "\udcff" for letter in video.path)
    return (
        probe.codec in PLAIN_CODECS
        and probe.pixel_format in ("yuv420p", "yuvj420p")
        and matrix.replace("unknown", "") in PLAIN_MATRICES
        and probe.square
        and not probe.oriented
        and not interlaced
        and probe.video_tracks == 1
        and probe.times is not None
        and plain_name
    )


# ---------------------------------------------------------------------------------------------------------- decode


def read_opencv(video, probe, args, threads):
    """Yields (seconds, BGR frame) as OpenCV decodes them. Raises `Distrust` at the first sign that they are wrong."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    for time in probe.times:
        ok, frame = capture.read()
        if not ok:
            raise Distrust("fewer frames than packets")
        if frame.shape != (probe.height, probe.width, 3):
            raise Distrust("another size")
        if not frame[::16, ::16].any() and not frame.any():
            raise Distrust("an all-black frame, as interlaced video gives")
        yield time, frame


def read_ffmpeg(video, probe, args, threads):
    """Yields (seconds, BGR frame) from a pipe of ffmpeg, which turns, mirrors, squares the pixels and scales."""
    filters = []
    if not probe.square:
        filters += ["scale=iw*sar:ih", "setsar=1"]
    filters += ["format=bgr24", "showinfo=checksum=0"]
    options = ["-vf", ",".join(filters), "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "bgr24", "pipe:1"]
    process = start_ffmpeg(video, ["-threads", str(threads)], options)
    with contextlib.suppress(ImportError, AttributeError, OSError):  # a larger pipe, where there is such a thing
        import fcntl

        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
    times, size = queue.Queue(), queue.Queue()

    def read_log():
        for line in process.stderr:
            line = line.decode("utf-8", "replace").rstrip()
            if match := re.search(r"_showinfo_.*\bpts_time:(\S+)", line):
                times.put(float(match[1]) if match[1] != "NOPTS" else None)
            elif match := re.match(r"\[info\]   Stream #0:0.*: Video: rawvideo.*?, (\d+)x(\d+)", line):
                size.put((int(match[2]), int(match[1]), 3))
            else:
                probe.errors.extend(error_messages([line]))
        size.put(None)

    log = threading.Thread(target=read_log, daemon=True)
    log.start()
    try:
        shape = size.get()
        for number in itertools.count() if shape else ():
            frame = np.empty(shape, np.uint8)
            if not read_exactly(process.stdout, memoryview(frame).cast("B")):
                break
            time = times.get()
            yield time if time is not None else number / (probe.fps or 25), frame
        log.join()
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def read_exactly(file, view):
    """Fills `view` from an unbuffered pipe; False at the end of it."""
    while len(view):
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


# ----------------------------------------------------------------------------------------------------- write clips


@dataclasses.dataclass
class Clip:
    """One folder of the dataset while it is being written."""

    directory: str
    stride: int  # frames between the two pictures of a motion measurement
    times: list = dataclasses.field(default_factory=list)
    shape: tuple = ()
    thumbnail: np.ndarray = None
    flows: list = dataclasses.field(default_factory=list)


class Run:
    """What the threads of a run share: options, folders, the pool of encoders, the progress bar, the stop sign."""

    def __init__(self, args, videos):
        self.args = args
        self.output = Path(args.output_dir)
        self.state = self.output / ".prepare"  # a record for each finished video, and the folders being written
        self.work = self.state / "work"
        self.readers = min(args.num_workers, max(1, len(videos)))
        self.pool = ThreadPoolExecutor(args.num_workers)
        self.bar = tqdm(unit="frame", disable=None, dynamic_ncols=True)
        self.waiting, self.expected = len(videos), 0
        self.stop = threading.Event()
        self.error = None
        self.lock = threading.Lock()

    def expect(self, frames):
        """A video begins: the bar's total is what is known, plus the mean for those that wait."""
        with self.lock:
            self.waiting -= 1
            self.expected += frames
            started = self.readers if self.readers > self.waiting else 1
            self.bar.total = self.expected + round(self.waiting * self.expected / max(1, started))
            self.bar.refresh()


def encode_frame(frame, image_format):
    """BGR frame -> the bytes of its image file. PNG is lossless, with the fastest settings measured."""
    options = common.PNG_OPTIONS if image_format == "png" else JPG_OPTIONS
    return cv2.imencode(f".{image_format}", frame, options)[1].tobytes()


def average_fps(times, claimed):
    """True average rate of timestamps in seconds, without their holes; and the holes, as (start, length)."""
    gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
    if not gaps:
        return claimed or 25.0, []
    longest = max(1.0, 10 * statistics.median(gaps))
    holes = [(a, b - a) for a, b in itertools.pairwise(times) if b - a > longest]
    steady = [gap for gap in gaps if gap <= longest]
    fps = len(steady) / sum(steady)
    # timestamps in whole milliseconds leave an error that the rate in the header does not have
    return round(claimed if abs(fps - claimed) <= 0.01 + fps * 0.0015 / sum(steady) else fps, 3), holes


def write_clips(video, probe, frames, run):
    """Takes (seconds, frame) pairs to folders of images under `run.work`; returns the clips, all written."""
    jobs = []
    try:
        clips = submit_clips(video, probe, frames, run, jobs)
        for job in jobs:
            job.result()
        return clips
    finally:
        frames.close()
        wait(jobs)  # nothing writes into the folder any more, whatever happened


def submit_clips(video, probe, frames, run, jobs):
    args, clips = run.args, []
    fps = average_fps(probe.times, probe.fps)[0] if probe.times else probe.fps or 25.0
    room = None

    def work(frame, paths, thumbnails):
        try:
            data = encode_frame(frame, args.image_format)
            for path in paths:
                path.write_bytes(data)
            return common.flow_magnitude(*thumbnails) if thumbnails else None
        except OSError as error:  # a full disk: no other video has room either
            run.error = error
            run.stop.set()
            raise
        finally:
            room.release()
            run.bar.update()

    clip = Clip(video.directory, common.motion_stride(fps))
    for time, frame in itertools.islice(frames, args.max_frames):
        if run.stop.is_set():
            raise Stopped
        if room is None:
            room = threading.BoundedSemaphore(max(1, min(16, BYTES_IN_FLIGHT // run.readers // frame.nbytes)))
            folder = run.work / clip.directory
            folder.mkdir(parents=True)
            clip.shape = frame.shape
            clips.append(clip)
        thumbnails = None
        if len(clip.times) % clip.stride == 0:
            previous, clip.thumbnail = clip.thumbnail, common.motion_thumbnail(frame, cv2.COLOR_BGR2GRAY)
            thumbnails = None if previous is None else (previous, clip.thumbnail)
        room.acquire()
        job = run.pool.submit(work, frame, [folder / f"{len(clip.times):05d}.{args.image_format}"], thumbnails)
        if thumbnails:
            clip.flows.append(job)
        jobs.append(job)
        clip.times.append(time)
    return clips


def prepare_video(video, run):
    """Decodes and writes one video; returns its record. Raises `Failure` where it gives nothing."""
    args = run.args
    status = check_file(video)
    probe = probe_video(video, max_packets=args.max_frames and args.max_frames + 64)  # 64: frames out of order
    run.expect(min(args.max_frames or probe.packets, probe.packets))
    threads = max(1, args.num_workers // run.readers)
    for reader in [read_opencv] * opencv_is_right(probe, video) + [read_ffmpeg]:
        try:
            clips = write_clips(video, probe, reader(video, probe, args, threads), run)
            break
        except Distrust:
            shutil.rmtree(run.work / video.directory, ignore_errors=True)
    if not clips:
        raise Failure("no frame of it can be decoded" + (f" ({probe.errors[0]})" if probe.errors else ""))
    decoder = "opencv" if reader is read_opencv else "ffmpeg"
    lines = [describe_clip(clip, video, probe, decoder, run) for clip in clips]
    return {
        "source": video.source,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "options": shaping_options(args),
        "clips": lines,
    }


def describe_clip(clip, video, probe, decoder, run):
    """The clip's line in metadata.jsonl."""
    fps, holes = average_fps(clip.times, probe.fps)
    problems = [f"a hole of {length:.1f} s in the timestamps" for _, length in holes]
    flows = [job.result() for job in clip.flows]
    if flows:
        motion = statistics.fmean(flows) * fps / clip.stride
    else:  # shorter than the stride
        motion = common.clip_motion([common.read_frame(p) for p in common.list_frames(run.work / clip.directory)], fps)
    wanted = min(run.args.max_frames or probe.packets, probe.packets)
    truncated = len(clip.times) < wanted and bool(probe.errors)
    if truncated:
        problems.append(f"{len(clip.times)} of {wanted} frames could be decoded")
    if probe.errors:
        problems.append(f"damaged: {probe.errors[0]}")
    end = clip.times[-1] + 1 / fps
    if not run.args.max_frames and end < probe.duration - max(0.5, 0.05 * probe.duration) and not truncated:
        truncated = True
        problems.append(f"ends after {end:.1f} s of the {probe.duration:.1f} s that its header claims")
    return {
        "directory": clip.directory,
        "source": video.source,
        "group": video.group,
        "fps": fps,
        "num_frames": len(clip.times),
        "width": clip.shape[1],
        "height": clip.shape[0],
        "motion": round(motion, 3),
        "motion_bucket_id": common.motion_bucket(motion),
        "decoder": decoder,
        "codec": probe.codec,
        "start": round(clip.times[0], 3),
        "duration": round(clip.times[-1] - clip.times[0] + 1 / fps, 3),
        "truncated": truncated,
        "problems": problems,
    }


# -------------------------------------------------------------------------------------------------- dataset folder


def shaping_options(args):
    """The options that decide what a clip's files are: a dataset is of one kind."""
    return {name: getattr(args, name) for name in ("max_frames", "image_format")}


def read_records(state):
    """What earlier runs finished: `{source: record}` of .prepare/*.json."""
    records = {}
    for path in state.glob("*.json"):
        with contextlib.suppress(json.JSONDecodeError):
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
        return text
    except UnicodeEncodeError:  # a source whose name is not UTF-8
        return json.dumps(record)


def publish(video, record, old, run):
    """Makes a finished video part of the dataset: the record, then the folders, whole by a rename, then their lines.

    After a kill at any point the next run finds a record whose folders are not all there, and does that video again.
    """
    for clip in (old or {}).get("clips", []):
        if (run.output / clip["directory"]).exists():
            os.replace(run.output / clip["directory"], run.work / f"{clip['directory']}.old")
    path = run.state / f"{video.directory}.json"
    aside = path.with_suffix(".part")
    aside.write_text(dump_line(record) + "\n", encoding="utf-8")
    os.replace(aside, path)
    for clip in record["clips"]:
        os.replace(run.work / clip["directory"], run.output / clip["directory"])
    with run.lock, open(run.output / "metadata.jsonl", "a", encoding="utf-8") as file:
        file.write("".join(dump_line(clip) + "\n" for clip in record["clips"]))


def write_metadata(output, records):
    """metadata.jsonl from the records, in name order; lines and fields that somebody else wrote stay."""
    path = output / "metadata.jsonl"
    lines = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError):
            line = json.loads(line)
            lines[line["directory"]] = {**lines.get(line["directory"], {}), **line}
    clips = {clip["directory"]: clip for record in records.values() for clip in record["clips"]}
    kept = {d: line for d, line in lines.items() if d in clips or line.get("source") not in records}
    merged = {d: {**kept.get(d, {}), **clips.get(d, {})} for d in {*kept, *clips}}
    if merged:
        common.write_file(path, "".join(dump_line(merged[d]) + "\n" for d in sorted(merged, key=common.natural_key)))
    return clips


@contextlib.contextmanager
def lock_folder(path):
    """Refuses a second run on the same folder; the lock ends with the process, however it ends."""
    with open(path, "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise common.UserError(f"{path.parent.parent}: another run is at work on this folder") from None
        except (ImportError, OSError):  # no such locks here
            pass
        yield


def printable(name):
    """A file name for the terminal: one line, whatever is in it."""
    return name if name.isprintable() else ascii(name)


def summarize(clips, failures, out=sys.stdout):
    """What was kept, what was not and why, and the range in which --motion_bucket_id means something."""

    def spread(values):
        return f"{min(values):g} to {max(values):g}, median {statistics.median(values):g}"

    if clips:
        frames, seconds = sum(c["num_frames"] for c in clips), sum(c["duration"] for c in clips)
        sizes = sorted({f"{c['width']}x{c['height']}" for c in clips}, key=common.natural_key)
        print(f"kept: {len(clips)} clips, {frames} frames, {seconds / 3600:.2f} hours", file=out)
        print(f"  size    {', '.join(sizes[:8])}{' ...' if len(sizes) > 8 else ''}", file=out)
        print(f"  fps     {spread([c['fps'] for c in clips])}", file=out)
        print(f"  motion  {spread([c['motion'] for c in clips])} % of the longer side per second", file=out)
        print(f"  motion_bucket_id  {spread([c['motion_bucket_id'] for c in clips])}", file=out)
    flawed = {clip["directory"]: "; ".join(clip["problems"]) for clip in clips if clip["problems"]}
    for title, reasons in (("kept, but", flawed), ("not kept", failures)):
        if reasons:
            print(f"{title}: {len(reasons)}", file=out)
        for name, reason in reasons.items():
            print(f"  {printable(name)}: {reason}", file=out)


# ---------------------------------------------------------------------------------------------------- command line


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return int(text)


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--video_dir", required=True, help="folder of videos, searched with its subfolders; never written to"
    )
    parser.add_argument("--output_dir", required=True, help="the dataset folder to make or to go on with")
    parser.add_argument("--max_frames", type=positive, help="frames to take from each video at most (default: all)")
    parser.add_argument(
        "--image_format", choices=("png", "jpg"), default="png", help="png is lossless; jpg is quality 95"
    )
    parser.add_argument(
        "--num_workers",
        type=positive,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="encoding threads (default: one for each core, here %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="make clips again whose source or options changed")
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    video_dir, output_dir = os.path.realpath(args.video_dir), os.path.realpath(args.output_dir)
    if not os.path.isdir(video_dir):
        parser.error(f"--video_dir {args.video_dir}: no such folder")
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        parser.error(f"--output_dir {args.output_dir}: a file of that name is in the way")
    if os.path.commonpath([video_dir, output_dir]) == video_dir:
        parser.error("--output_dir must lie outside --video_dir, which is never written to")
    return args


def plan(videos, records, args, output):
    """Divides the videos into those to do and those that fail at once; what is done and unchanged is in neither."""
    todo, failures = [], {}
    for video in videos:
        record = records.get(video.source)
        if record is None:
            if os.path.lexists(output / video.directory):
                failures[video.source] = f"{output / video.directory} exists and is not of this program: move it away"
            else:
                todo.append(video)
            continue
        status = os.stat(video.path)
        changed = (status.st_size, status.st_mtime_ns) != (record["size"], record["mtime_ns"])
        if record["options"] != shaping_options(args) and not args.overwrite:
            raise common.UserError(
                f"{output} holds clips made with {record['options']}, not {shaping_options(args)}: "
                "use the same options, --overwrite, or another --output_dir"
            )
        if changed and not args.overwrite:
            failures[video.source] = "changed since it was prepared; the dataset holds the older one: --overwrite"
        elif changed or record["options"] != shaping_options(args) or not is_complete(record, output):
            todo.append(video)
    return todo, failures


def main(argv=None):
    args = parse_args(argv)
    cv2.setNumThreads(1)  # the threads of this program take the cores
    videos = find_videos(args.video_dir)
    if not videos:
        raise common.UserError(f"--video_dir {args.video_dir}: no video in it")
    output = Path(args.output_dir)
    (output / ".prepare").mkdir(parents=True, exist_ok=True)
    with lock_folder(output / ".prepare" / "lock"):
        records = read_records(output / ".prepare")
        todo, failures = plan(videos, records, args, output)
        failures.update(run_all(todo, records, args))
        clips = write_metadata(output, records)
    sources = {video.source for video in videos}
    clips = [clip for clip in clips.values() if clip["source"] in sources]
    summarize(clips, failures)
    return 1 if failures or any(clip["problems"] for clip in clips) else 0


def run_all(todo, records, args):
    """Prepares the videos side by side; adds to `records`; returns `{source: reason}` of those that failed."""
    run, failures = Run(args, todo), {}
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir()

    def one(video):
        if run.stop.is_set():
            raise Stopped
        record = prepare_video(video, run)
        publish(video, record, records.get(video.source), run)
        return record

    readers = ThreadPoolExecutor(run.readers)
    try:
        jobs = {readers.submit(one, video): video for video in todo}
        for job in as_completed(jobs):
            try:
                records[jobs[job].source] = job.result()
            except Failure as failure:
                failures[jobs[job].source] = str(failure)
            except Stopped:
                pass
        if run.error:
            raise run.error
    finally:
        run.stop.set()
        readers.shutdown(cancel_futures=True)
        run.pool.shutdown()
        run.bar.close()
        shutil.rmtree(run.work, ignore_errors=True)
    return failures


if __name__ == "__main__":
    common.run_script(main)
