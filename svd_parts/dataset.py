"""A dataset's folder: its clips, their frames in order, and metadata.jsonl."""

import contextlib
import datetime
import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import svd_common as common
from svd_parts.crop import describe_crop
from svd_parts.files import UserError, count_kinds, counted, inside, listed, natural_key, read_lines, same_name

DATE = re.compile(r"(?<!\d)(\d{4})\D?(\d\d)\D?(\d\d)\D{0,2}(\d\d)\D?(\d\d)\D?(\d\d)(?:\D?(\d{1,6})(?!\d))?")


def read_time(name):
    """The time in seconds of a name with date and time of day, `2024-05-01_12-59-58.png`; None for other names."""
    if found := DATE.search(name):
        with contextlib.suppress(ValueError):
            moment = datetime.datetime(*map(int, found.groups()[:6]), tzinfo=datetime.timezone.utc)
            return moment.timestamp() + float(f"0.{found[7] or 0}")
    return None


def sort_frames(names, folder):
    """Sorts the image names of one clip folder: (names in frame order, the two names around the widest gap or None).

    Frames of one clip have the same name but for the case, the suffix and one running number: `00000.png`,
    `img (1).jpg`, `2024-05-01_cam2_0001.png`. The running number differs in every frame. If several numbers do, a
    regular one wins (its usual step is its smallest), then the one with the evenest steps. `1305031102.175.png` also
    counts as one number, and so does a ROS stamp, `1305031102_175304000.png`. The step may be any. A gap is a step of
    more than one and a half times the usual step. Raises `UserError` if the order would be wrong: a number occurs
    twice, there is no number, there is a second kind of name (masks, thumbnails, another series), or no number is
    regular and the evenest contradicts the order of the names.
    """
    if len(names) < 2:
        return list(names), None
    shapes = {}  # a name without its suffix, every number as 0 -> the names that look like this
    for name in names:
        shapes.setdefault(re.sub(r"\d+", "0", name[: name.rindex(".")].lower()), []).append(name)
    if len(shapes) > 1:
        by_number_of_names = sorted(shapes, key=lambda shape: (-len(shapes[shape]), len(shape.replace("0", ""))))
        usual, *_, odd = (min(shapes[shape], key=natural_key) for shape in by_number_of_names)
        raise UserError(
            f"{folder}: {odd} beside {usual}; the frames of a clip must have the same name but for one running number:"
            " move all other images (masks, thumbnails, another series) to a folder of their own"
        )
    columns = [[int(text) for text in column] for column in zip(*(re.findall(r"\d+", name) for name in names))]
    stamps = [re.sub(r"(\d)[_-](\d{9})(?!\d)", r"\1.\2", name) for name in names]  # seconds and nanoseconds
    decimals = (re.findall(r"(?<!\d)(?=(\d+\.\d+))", name) for name in stamps)
    columns += [[float(text) for text in column] for column in zip(*decimals)]
    columns += [times] if len(times := [found for found in map(read_time, names) if found]) == len(names) else []
    orders = []  # (is irregular, unevenness, names in order, place of the widest step)
    for column in columns:
        values, ordered = zip(*sorted(zip(column, names)))
        steps = [later - earlier for earlier, later in zip(values, values[1:])]
        if min(steps) > 0:
            usual = sorted(steps)[(len(steps) - 1) // 2]
            orders.append((usual != min(steps), max(steps) / usual, ordered, steps.index(max(steps))))
    if not orders:
        by_number = sorted(([int(number) for number in re.findall(r"\d+", name)], name) for name in names)
        for (first, name), (second, other) in zip(by_number, by_number[1:]):
            if first == second:
                raise UserError(f"{folder}: {name} and {other} are the same frame; move one of each pair away")
        raise UserError(f"{folder}: {name} to {other} are several series; give each a folder of its own")
    irregular, unevenness, ordered, place = min(orders, key=lambda order: order[:2])

    def by_name(number):
        return sorted(names, key=lambda name: [float(text) for text in re.findall(number, name)])

    if irregular and list(ordered) not in (by_name(r"\d+"), by_name(r"\d+(?:\.\d+)?")):
        first, second = sorted(ordered[:2])
        what = f"it is unclear which number of {first} and {second} counts the frames"
        raise UserError(f"{folder}: {what}; rename the frames so that they have one number")
    return list(ordered), ordered[place : place + 2] if unevenness > 1.5 else None


def list_frames(folder):
    """The image files of one clip folder, in frame order. Raises `UserError` as `sort_frames` does."""
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    names, _ = sort_frames([name for name in names if name.lower().endswith(common.IMAGE_SUFFIXES)], folder)
    return [Path(folder) / name for name in names]


def read_metadata(dataset_dir):
    """Reads `metadata.jsonl` of a prepared dataset: `{same_name(directory): record}`; {} if there is no such file.

    Lines without `directory` (sets of mp4) and fields that are null are ignored. Raises a `UserError` that names file,
    line and field of a value that makes no sense, and as `read_lines` does.
    """
    root, records = Path(dataset_dir), {}
    damaged = "not a JSON object; repair it or prepare the dataset again"
    for where, line in read_lines(root / "metadata.jsonl", damaged):
        record = {field: value for field, value in line.items() if value is not None}
        if "directory" not in record:
            continue
        for field, types, (low, high), wanted in (
            ("directory", str, ("", "\U0010ffff"), "the path of a clip's folder"),
            ("fps", (int, float), (1e-6, 1e6), "a number above 0"),
            ("motion_bucket_id", (int, float), (0, 255), "a number from 0 to 255"),
        ):
            value = record.get(field, low)
            if not isinstance(value, types) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"{where}: {field} is {json.dumps(value)[:60]}; it must be {wanted}")
        directory = inside(record["directory"], where)
        if "\\" in directory and not (root / directory).is_dir():  # written on Windows
            directory = directory.replace("\\", "/")
        records[same_name(PurePosixPath(directory).as_posix())] = record
    return records


DEFAULT_FPS, DEFAULT_BUCKET = 7, 127  # SVD's defaults, for clips that metadata.jsonl does not describe
SYSTEM_FOLDERS = frozenset(  # deleted files, thumbnails and snapshots of Windows, macOS and network storage
    "$recycle.bin|recycler|recycled|#recycle|@recycle|@eadir|@tmp|#snapshot|@recently-snapshot|~snapshot|lost+found"
    "|system volume information|__macosx".split("|")
)


def find_folders(root):
    """Finds all folders below `root`, also through links: ({directory: names of its files}, {path: why left out}).

    A folder with several paths is taken once, by a path without a link if there is one. Hidden files and folders, and
    the system folders of NAS, Windows and macOS are ignored. A broken link to an image stays, as a gap in the clip.
    """
    found, left_out, seen, tops = {}, {}, set(), [str(root)]

    def cannot_look(error):
        left_out[error.filename] = f"cannot be looked at, {error.strerror}"

    for top in tops:  # links are appended during the walk, so that real folders come first
        real_top = os.path.realpath(top)
        homes = [Path(os.path.realpath(folder)) for folder in (root, os.path.dirname(top))]
        if top is not tops[0] and any(home.is_relative_to(real_top) for home in homes):
            left_out[top] = "a link to a folder above it"
            continue
        for folder, subfolders, files in os.walk(top, onerror=cannot_look):
            real = real_top + folder[len(top) :]
            if real in seen:
                left_out[folder] = "a link to what is in the dataset already"
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = [s for s in subfolders if not s.startswith(".") and s.casefold() not in SYSTEM_FOLDERS]
            paths = sorted((os.path.join(folder, name) for name in subfolders), key=natural_key)
            tops += filter(os.path.islink, paths)
            files = [name for name in files if not name.startswith(".")]
            found[Path(folder).relative_to(root).as_posix()] = files
            for name in files:
                path, is_image = os.path.join(folder, name), name.lower().endswith(common.IMAGE_SUFFIXES)
                if not is_image and os.path.islink(path) and not os.path.exists(path):
                    left_out[path] = "a link to nowhere"
    return found, left_out


def list_clips(dataset_dir):
    """Lists the clips of a dataset folder in name order: records with `directory`, `frames` (paths) and `root`.

    A clip is any folder that holds images. A record also has the fields of the folder's line in `metadata.jsonl`, such
    as fps and motion. Raises `UserError` if there is no such folder or no clip in it, and as `sort_frames` does. Warns
    of gaps between frames and of files and folders that are left out.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise UserError(f"--dataset_dir {root}: no such folder; make it with prepare_dataset.py")
    metadata, clips, wrong, others = read_metadata(root), [], [], []
    found, left_out = find_folders(root)
    warnings = [f"{path}: {why}; left out" for path, why in left_out.items()]
    for directory in sorted(found, key=lambda name: ([natural_key(part) for part in name.split("/")], name)):
        try:
            images = [name for name in found[directory] if name.lower().endswith(common.IMAGE_SUFFIXES)]
            names, gap = sort_frames(images if directory != "." else [], root / directory)
        except UserError as error:
            wrong.append(str(error))
            continue
        if gap:
            warnings.append(f"{root / directory}: {gap[1]} follows {gap[0]}; the clip jumps where frames are missing")
        if names:
            others += set(found[directory]) - {*names, "actions.npy"}
            known, frames = metadata.get(same_name(directory), {}), [root / directory / name for name in names]
            clips.append({**known, "directory": directory, "frames": frames, "root": root})
    if wrong:
        raise UserError(wrong[0] + (f" (and {len(wrong) - 1} more such folders)" if len(wrong) > 1 else ""))
    warnings[5:] = [f"and {len(warnings) - 5} more like these"] if len(warnings) > 5 else []
    if others:
        warnings.append(f"left out, as these files beside the frames are no images: {count_kinds(others)}")
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    if not clips:
        what = f"{root}: holds no folder of frames; expected <video>/00000.png, from prepare_dataset.py"
        suffixes = {Path(name).suffix.lower() for name in found["."]}
        if suffixes & set(common.IMAGE_SUFFIXES):
            what = f"{root} is the folder of one clip; give the folder above it, {Path(os.path.abspath(root)).parent}"
        elif suffixes & set(common.VIDEO_SUFFIXES):
            what += f" --video_dir {root}, for it holds videos"
        raise UserError(what)
    return clips


def warn_of_crop(clips, width, height, multiple):
    """Prints how much of the picture the crop to `width` x `height` removes, one line for each size of clips.

    Reads the header of every first frame. multiple: width and height must be multiples of this number.
    """
    from PIL import Image

    sizes = {}
    for clip in clips:
        # A damaged frame is reported later, with a cure.
        with contextlib.suppress(OSError, ValueError), Image.open(clip["frames"][0]) as image:
            turned = image.getexif().get(274, 1) >= 5
            sizes.setdefault(image.size[::-1] if turned else image.size, []).append(clip["directory"])
    for size, names in sizes.items():
        if crop := describe_crop(size, width, height, multiple):
            print(f"warning: {counted(len(names), 'clip')} of {size[0]}x{size[1]} ({listed(names)}): {crop}")


def add_digests(clips):
    """Fills `clip["digest"]`, 16 hex digits that tell the clip's frames from others, wherever they lie.

    The digest covers the size and the last 4 KB of each file: a PNG ends with a checksum of its pixels, and other
    compressed files change in length. Of all but PNG files the first 4 KB count too, as EXIF there turns a picture. A
    BMP is read whole. Raises `OSError` if a file cannot be read.
    """

    def digest(clip):
        hashed = hashlib.sha256()
        for path in clip["frames"]:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(4096) if path.suffix.lower() not in (".png", ".bmp") else b""
                file.seek(0 if path.suffix.lower() == ".bmp" else max(0, size - 4096))
                hashed.update(head + size.to_bytes(8, "little") + file.read())
        return hashed.hexdigest()[:16]

    with ThreadPoolExecutor(16) as pool:
        for clip, found in zip(clips, pool.map(digest, clips)):
            clip["digest"] = found


def clip_group(clip):
    """A name for the clips that are held out together: all cameras of one LeRobot episode, or all clips of a video."""
    source = str(clip.get("group") or clip.get("source") or clip["directory"])
    episode = re.match(r"(.*?)videos/(chunk-\d+)/[^/]+/(episode_\d+)", source)
    return "/".join(episode.groups()) if episode else source


def group_clips(clips):
    """{group: its clips}. Clips of one episode or recording, or with the same frames (copies), are of one group."""
    parents, marks = {}, []

    def root(mark):
        while parents.setdefault(mark, mark) != mark:
            mark = parents[mark]
        return mark

    for clip in clips:
        known = (("recording", clip.get("recording")), ("digest", clip.get("digest")))
        marks.append([("episode", clip_group(clip)), *(mark for mark in known if isinstance(mark[1], str))])
        for mark in marks[-1]:
            parents[root(mark)] = root(marks[-1][0])
    groups = {}
    for clip, (episode, *_) in zip(clips, marks):
        groups.setdefault(root(episode), []).append(clip)
    return groups
