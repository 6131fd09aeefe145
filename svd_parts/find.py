"""Finds the videos of a folder, names their clips, and says what is left out."""

import contextlib
import dataclasses
import functools
import os
import re
import shlex
import unicodedata
from pathlib import Path

import svd_common as common
from svd_parts.dataset import SYSTEM_FOLDERS, find_folders, read_metadata
from svd_parts.files import UserError, count_kinds, counted, is_named, name_digest, natural_key, quick_digest, unmatched
from svd_parts.generated import is_comparison, known_fields
from svd_parts.lerobot import is_depth, lerobot_match, read_episodes, read_lerobot
from svd_parts.lerobot_images import find_image_videos

VIDEO_SUFFIXES = frozenset(
    ".264 .265 .3g2 .3gp .amv .apng .asf .av1 .avc .avi .dav .dif .divx .dv .evo .f4v .flv .gif .h264 .h265 .hevc .insv"
    " .ivf .lrv .m1v .m2t .m2ts .m2v .m4v .mj2 .mjpeg .mjpg .mk3d .mkv .mod .mov .mp4 .mp4v .mpe .mpeg .mpg .mpv .mts"
    " .mxf .nut .obu .ogm .ogv .qt .rm .rmvb .tod .trp .ts .vob .vvc .webm .webp .wmv .wtv .xvid .y4m".split()
)
PARTIAL_SUFFIXES = (".part", ".crdownload", ".download", ".aria2", ".ytdl")  # x.mp4.part: x.mp4 is not whole yet


@dataclasses.dataclass
class Video:
    path: str
    source: str  # the path relative to --video_dir, with slashes
    directory: str  # the name of its folder in the dataset, and of its record
    group: str  # clips of one group, such as the cameras of an episode, stay on one side of a held-out split
    camera: str = ""
    episodes: list = None  # LeRobot v3: (first second, end, episode, frames or None) of each episode in this file
    lerobot: tuple = None  # what `read_lerobot` gives for its dataset
    images: str = ""  # the column of the parquet file that holds the frames
    guessed: bool = False  # it begins like a video, though its name does not say so
    known: dict = dataclasses.field(default_factory=dict)  # of a generated clip: `generated`, task, group

    @functools.cached_property
    def digest(self):
        return quick_digest(self.path)


def directory_name(source):
    """A folder name that depends on the source's path alone: stable, readable, unique, and safe on every system.

    `a/x.mp4` -> `a__x`, `a/x.avi` -> `a__x+avi`. `+` and eight digits of a hash follow where the name had to change, or
    where another path could get the same name, as on a disk that ignores case.
    """
    stem, suffix = os.path.splitext(source)
    short = stem if suffix.lower() in VIDEO_SUFFIXES else source
    parts = [re.sub(r"[^\w.-]", "_", unicodedata.normalize("NFC", part)) for part in short.split("/")]
    name = "__".join(parts).lstrip(".-").rstrip(".") or "video"
    plain = name == short.replace("/", "__") and name == name.casefold() and len(name.encode()) <= 120
    if suffix not in VIDEO_SUFFIXES or any("__" in part or part[0] == "_" or part[-1] == "_" for part in parts):
        plain = False
    if re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name, re.IGNORECASE) or name in SYSTEM_FOLDERS:
        name, plain = "_" + name, False
    if plain:
        return name + suffix.replace(".", "+") * (suffix != ".mp4")
    return f"{name.encode()[:100].decode(errors='ignore')}+{name_digest(source)}"


def find_videos(options):
    """The videos of --video_dir that the options choose, in the order of names, and `{source: why}` of unfinished ones.

    Prints what is left out. Raises `UserError` where no video is left.
    """
    root = os.path.abspath(options.video_dir)
    folders, left_out = find_folders(root)
    files = [str(Path(root, folder, name)) for folder, names in folders.items() for name in names]
    # A readable folder that was left out is one that was reached before. No file is reached twice.
    broken = [path for path in left_out if not (os.path.isdir(path) and os.access(path, os.R_OK))]
    files = [path for path in files if path not in left_out]
    if comparisons := {path for path in files if is_comparison(path, root)}:
        what = "of generated clips beside others, in side_by_side/"
        print(f"left out: {counted(len(comparisons), 'comparison')} {what}")
        files = [path for path in files if path not in comparisons]
    present, videos, unfinished = set(files), [describe_video(path, root) for path in broken], {}
    for path in files:
        is_named_so = os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES and not is_still_webp(path)
        if is_named_so or looks_like_video(path):
            video = describe_video(path, root)
            video.guessed = not is_named_so
            if partial := next((video.source + p for p in PARTIAL_SUFFIXES if path + p in present), None):
                unfinished[video.source] = f"{partial} lies beside it; if the video is whole, delete that"
            else:
                videos.append(video)
    videos += find_image_videos(files, root, lambda path, source, group, camera: Video(
        path, source, directory_name(source), group, camera))  # fmt: skip
    taken = {video.path for video in videos} | {os.path.join(root, source) for source in unfinished}
    others = describe_left_out([path for path in files if path not in taken], root)
    if videos and others:
        print(others)
    if not videos:
        if is_prepared(root):
            cure = f"give it to train_svd.py --dataset_dir {shlex.quote(options.video_dir)}"
            raise UserError(f"--video_dir {options.video_dir} is a prepared dataset: {cure}")
        hint = " but unfinished downloads: " + ", ".join(unfinished) if unfinished else ""
        if any(path.lower().endswith(common.IMAGE_SUFFIXES) for path in files):
            hint += ", but images: train_svd.py --dataset_dir takes a folder that has a folder of frames for each clip"
        elif others and not unfinished:
            hint += f"; {others}"
        raise UserError(f"--video_dir {options.video_dir}: no video in it{hint}")
    names = [(video.source, os.path.basename(video.source)) for video in videos] + [(name,) for name in unfinished]
    if unknown := unmatched([*options.include, *options.exclude], names):
        what = f"{counted(len(unknown), 'name')} of --include and --exclude"
        print(f"warning: no video of {options.video_dir} matches {what}: {unknown[0]}")
    chosen = [video for video in videos if is_wanted(video, options)]
    if not chosen:
        cameras = sorted({video.camera for video in videos if video.camera})
        if options.camera and not cameras:
            raise UserError("--camera: these videos have no camera, they are no LeRobot set; leave --camera out")
        hint = f"; the cameras are {', '.join(cameras)}" if options.camera and cameras else ""
        raise UserError(f"--camera, --include and --exclude leave none of {counted(len(videos), 'video')}{hint}")
    for video in chosen:
        video.known = known_fields(video.path, root)
        if match := lerobot_match(video.path):
            if "file" in match.groupdict():  # version 3: a file holds several episodes
                place = match["camera"], int(match["chunk"]), int(match["file"])
                video.episodes = sorted(read_episodes(match["root"])[0].get(place, []))
            video.lerobot = read_lerobot(match["root"])
    if depth := sorted({video.camera for video in chosen if is_depth(video)}):
        chosen = [video for video in chosen if not is_depth(video)]
        print(f"left out: depth cameras, which give distances and no pictures ({', '.join(depth)})")
        if not chosen:
            raise UserError(f"--video_dir {options.video_dir}: only depth cameras are chosen; --camera takes others")
    return sorted(chosen, key=lambda video: natural_key(video.source)), unfinished


def is_prepared(root):
    """Whether a folder is a dataset by prepare_dataset.py: its metadata.jsonl names folders that are there."""
    with contextlib.suppress(UserError):
        return any(os.path.isdir(os.path.join(root, directory)) for directory in read_metadata(root))
    return False


MAGIC = re.compile(  # how the files of video containers begin
    rb"....(ftyp(?!heic|heix|avif|mif1|M4A |M4B )|styp|moof|moov|mdat)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01"
    rb"|\x30\x26\xb2\x75|\0\0\x01\xba|\x06\x0e\x2b\x34|G(?=.{187}G)",
    re.DOTALL,
)
NO_VIDEO_SUFFIXES = frozenset(".m4a .mka .aac .mp3 .wav .flac .ogg .opus .heic .avif .txt .json .jsonl .md".split())


def looks_like_video(path):
    """Whether a file with another suffix, such as a recorder's own or `.m4s`, begins like a video."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in NO_VIDEO_SUFFIXES or suffix in common.IMAGE_SUFFIXES or suffix in PARTIAL_SUFFIXES:
        return False
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return bool(MAGIC.match(file.read(512)))
    return False


ADVICE = {
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "unpack it"),
    **dict.fromkeys((".h5", ".hdf5", ".mcap", ".bag", ".db3", ".rrd", ".npz"), "export mp4 or a LeRobot set first"),
}


def describe_left_out(paths, root):
    """One line that counts the files that are no videos, by suffix. A LeRobot dataset's own files do not count."""
    own = re.compile(r"(^|/)(meta|data)/")
    names = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    names = [name for name in names if not own.search(name) and os.path.basename(name) != "metadata.jsonl"]
    kinds = count_kinds(names)
    for suffix, advice in ADVICE.items():
        kinds = re.sub(rf"(\d+ {re.escape(suffix)})(?=,|$)", rf"\1 ({advice})", kinds)
    return f"left out, because they are not videos: {kinds}" if names else None


def is_still_webp(path):
    if not path.lower().endswith(".webp"):
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:  # `check_file` will say why it cannot be read
        head = file.read(21)
        return head[8:12] == b"WEBP" and not (head[12:16] == b"VP8X" and head[20] & 2)


def describe_video(path, root):
    source = os.path.relpath(path, root).replace(os.sep, "/")
    video = Video(path, source, directory_name(source), group=source)
    if match := lerobot_match(path):
        dataset = os.path.relpath(match["root"], root).replace(os.sep, "/")
        video.camera = match["camera"]
        video.group = "" if dataset.startswith(".") else dataset + "/"  # the episode is added to it
        video.group += match.groupdict().get("episode", "")
    return video


def is_wanted(video, options):
    names = video.source, os.path.basename(video.source)
    camera = not options.camera or any(video.camera == c or video.camera.endswith("." + c) for c in options.camera)
    included = not options.include or is_named(options.include, *names)
    return camera and included and not is_named(options.exclude, *names)


def find_twins(videos):
    """`{source: why}` of videos that seem to show what another one shows: a small copy, or another format."""
    originals, twins = {}, {}
    for video in sorted(videos, key=lambda video: video.source.lower().endswith((".lrv", ".webm", ".gif"))):
        stem = re.sub(r"[ ._-](proxy|preview|small|low|thumb|\d{3,4}p)$", "", os.path.splitext(video.source)[0].lower())
        stem = re.sub(r"(^|/)g[xhl](\d{6})$", r"\1g\2", stem)  # GoPro: GL010001.LRV is a small copy of GX010001.MP4
        original = originals.setdefault(stem, video.source)
        if original != video.source:
            twins[video.source] = f"the same recording as {original}? --exclude leaves one of them out"
    return twins
