"""Turns a folder of videos into a dataset of frames: a folder of images for each clip, and a line in metadata.jsonl.

    python prepare_dataset.py --video_dir ./videos --output_dir ./dataset --max_frames 25

Run the same command again after a stop: what is done stays, the rest is done. Exit status 0: every video is whole in
the dataset; 1: some are not, each named with its reason; 2: nothing to do, or a wrong option.

The way of one video: `find_videos` -> `probe_video` (ffmpeg lists its packets and shows its key frames) ->
`read_opencv`, or `read_ffmpeg` where OpenCV is known to be wrong or gives fewer frames than there are -> `cut_clips`
-> `FrameWriter` (threads encode the images) -> `publish` (record, rename, then the line in metadata.jsonl).
"""

import os

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "16"  # errors, which `hear_opencv` counts. Read when cv2 is imported
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"

import svd_common as common  # isort: skip  (first: it says what to do where OpenCV cannot be loaded)

import collections
import contextlib
import dataclasses
import itertools
import math
import re
import shutil
import statistics
import struct
import sys
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from svd_parts.console import Parser, number, run_script
from svd_parts.cuts import average_fps, cut_clips, place_episodes
from svd_parts.dataset import SYSTEM_FOLDERS, find_folders, list_frames
from svd_parts.decode import DecodeAgain, Decoded, find_damage, hear_opencv, read_ffmpeg, read_opencv
from svd_parts.ffmpeg import Failure
from svd_parts.files import (
    UserError,
    is_named,
    lock_shard,
    name_digest,
    named,
    names_of_nothing,
    natural_key,
    parse_shard,
    read_patterns,
    tidy,
    write_file,
)
from svd_parts.lerobot import LEROBOT_V2, LEROBOT_V3, lerobot_fields, read_episodes, read_lerobot
from svd_parts.lerobot_actions import write_actions
from svd_parts.metrics import clip_motion, flow_magnitude, motion_bucket, motion_stride, motion_thumbnail
from svd_parts.probe import check_file, opencv_is_right, probe_video
from svd_parts.records import (
    by_name,
    clip_options,
    dump_line,
    is_complete,
    read_clip_lines,
    read_records,
    refuse_others,
    write_metadata,
    write_preview,
)

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
    if re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE) or name in SYSTEM_FOLDERS:
        name, plain = "_" + name, False
    return name if plain else f"{name.encode()[:100].decode(errors='ignore')}+{name_digest(source)}"


def find_videos(args):
    """The videos of --video_dir that the options choose, in name order; and `{source: why}` of unfinished downloads."""
    root = os.path.abspath(args.video_dir)
    folders, left_out = find_folders(root)
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
        raise UserError(f"--video_dir {args.video_dir}: no video in it{hint}")
    names = [(video.source, os.path.basename(video.source)) for video in videos] + [(name,) for name in unfinished]
    if unknown := names_of_nothing([*args.include, *args.exclude], names):
        many = f"{len(unknown)} names of --include and --exclude"
        print(f"warning: {many} are no video of {args.video_dir}: {unknown[0]}")
    chosen = [video for video in videos if is_wanted(video, args)]
    if not chosen:
        cameras = sorted({video.camera for video in videos if video.camera})
        hint = f"; the cameras are {', '.join(cameras)}" if args.camera and cameras else ""
        raise UserError(f"--camera, --include and --exclude leave none of {len(videos)} videos{hint}")
    for video in chosen:
        posix = video.path.replace(os.sep, "/")
        if match := LEROBOT_V3.fullmatch(posix):
            place = match["camera"], int(match["chunk"]), int(match["file"])
            video.episodes = sorted(read_episodes(match["root"])[0].get(place, []))
        if match := match or LEROBOT_V2.fullmatch(posix):
            video.lerobot = read_lerobot(match["root"])
    return sorted(chosen, key=lambda video: natural_key(video.source)), unfinished


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
    included = not args.include or is_named(args.include, *names)
    return camera and included and not is_named(args.exclude, *names)


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


def encode_image(frame, image_format):
    """(H, W, 3) BGR -> bytes of a PNG or JPEG file; PNG is deflated by ISA-L where that is installed."""
    if image_format == "jpg":
        return cv2.imencode(".jpg", frame, JPG_OPTIONS)[1]
    return encode_png_fast(frame) if isal_zlib else cv2.imencode(".png", frame, common.PNG_OPTIONS)[1]


def write_image(frame, paths, image_format):
    """Encodes a frame once and writes it to each of `paths`, none where it belongs to no clip."""
    data = encode_image(frame, image_format) if paths else b""
    for path in paths:
        with named(path), open(path, "wb") as file:
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
                thumbnail = motion_thumbnail(frame, cv2.COLOR_BGR2GRAY) if thumbnail is None else thumbnail
                if clip.thumbnail is not None:
                    clip.flows.append(flow_magnitude(clip.thumbnail, thumbnail))
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
            refuse_others(run.output / clip["directory"], clip["num_frames"], "action_names" in clip)
    first_only = args.max_frames and not args.fps and video.episodes is None
    probe = probe_video(video, args.max_frames + 64 if first_only else None)
    wanted = min(args.max_frames or probe.packets, probe.packets)
    run.expect(wanted)
    episodes = place_episodes(video, probe)
    fps = average_fps(probe.times or [], probe.fps)[0]
    stride = motion_stride(min(fps, args.fps or fps))
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
        write_actions(clip, line, video, episodes, run.args.action_key)
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
        motion = clip_motion([common.read_frame(path) for path in list_frames(clip.folder)], fps)
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
        "motion_bucket_id": motion_bucket(motion),
    }


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
    write_file(run.state / f"{video.directory}.json", dump_line(record))
    for clip in record["clips"]:
        os.replace(run.work / video.directory / clip["directory"], run.output / clip["directory"])
    (run.output / "preview.jpg").unlink(missing_ok=True)  # it shows other clips; the run makes it again at its end
    if not run.args.shard.name:  # shards write the file at the end: appending is not safe between machines
        new = [clip for clip in record["clips"] if clip["directory"] not in owned]  # of the others there is a line
        with run.lock:
            for path in (run.state / "written.jsonl", run.output / "metadata.jsonl"):
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(map(dump_line, new)))


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


def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0])
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
    acts = "the LeRobot column that goes into actions.npy, for train_svd.py --condition_on actions (default action)"
    add("--action_key", default="action", metavar="KEY", help=acts)
    add("--image_format", choices=("png", "jpg"), default="png", help="png is lossless; jpg (95) a quarter the time")
    add("--fast_png", action="store_true", help="stop where isal is missing: it writes PNG in a third of the time")
    add("--num_workers", type=count, default=cores, help="encoding threads (default: one a core, here %(default)s)")
    shard = "do part I of N, on as many machines; I from 0 to N-1, or from 1 to N"
    add("--shard", metavar="I/N", type=parse_shard, default="0/1", help=shard)
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
    args.include = read_patterns(args.include, "--include")
    args.exclude = read_patterns(args.exclude, "--exclude")
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
            except (UserError, OSError):
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
    with lock_shard(state, args.shard, busy):
        if not args.shard.name:  # alone here: what a killed run left half written goes
            ours = output.glob(".metadata.jsonl.*.part"), output.glob(".preview.jpg.*.part"), state.glob(".*.part")
            tidy([*itertools.chain(*ours), *filter(Path.is_dir, state.iterdir())])
        read_clip_lines(output)  # refused now, not after hours of work
        old = read_records(state)
        other = next((r["options"] for r in old.values() if r["options"] != clip_options(args)), None)
        if other and not args.overwrite:
            named = ", ".join(
                f"--{key} {value}" for key, value in other.items() if clip_options(args).get(key) != value
            )
            raise UserError(f"--output_dir {output} was made with {named}: do the same, or add --overwrite")
        if not args.shard.name:
            if old and not (state / "written.jsonl").exists():  # of an older version, which wrote what its records say
                clips = (clip for record in old.values() for clip in record["clips"])
                write_file(state / "written.jsonl", "".join(map(dump_line, clips)))
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
    run_script(main)
