"""What a second script calls: frames and videos, a dataset's folder, motion and video metrics, SVD's parts.

No command line, no loss, no loop. Importing it touches no disk, GPU or network; torch and diffusers are imported inside
the functions that use them, so that preparing a dataset needs neither.
"""

import contextlib
import difflib
import errno
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Read once, when cv2, torch and transformers are imported; what the user has set stays.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # no decoder chatter
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait: 10 times slower on a busy CPU
if "PYTORCH_ALLOC_CONF" not in os.environ:  # its new name
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer fragments: 14.5 GiB, not 14.9
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # else: "should be kept in float32: []", several times a clip
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else: torchvision is missing, which SVD does not use


def end_quietly(kind, error, trace):
    """Ctrl-C while the scripts still import is no error of theirs: one line, as `run_script` prints it later."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped; run the same command again to go on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly

try:
    import cv2
except ImportError as error:  # most often libGL, which a server without a screen lacks
    sys.exit(
        f"error: OpenCV cannot be loaded ({error}). On a server without a screen: pip uninstall opencv-python, then"
        " pip install opencv-python-headless; where it is missing: pip install -r requirements.txt"
    )
import numpy as np

if not hasattr(cv2, "IMWRITE_PNG_ZLIBBUFFER_SIZE"):
    sys.exit(f"error: OpenCV {cv2.__version__} is older than 4.13: pip install -U opencv-python (of its packages, one)")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
PNG_OPTIONS += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]  # the fastest lossless settings measured
PNG_OPTIONS += [cv2.IMWRITE_PNG_ZLIBBUFFER_SIZE, 1 << 16]


class UserError(Exception):
    """A mistake of the user or of a file: one line that says what is wrong, where, and the cure."""


def run_script(main):
    """Runs `main()`; a `UserError` or any `OSError` becomes one line and exit status 2 or 1, Ctrl-C 130.

    A name that the terminal's encoding lacks is printed with backslashes. `~` is the home folder in `--flag=~/x` and
    `@~/x` too, where the shell leaves it.
    """
    home = re.compile(r"^(--\w+=|@|)(~[^/]*)")
    sys.argv[1:] = [home.sub(lambda found: found[1] + os.path.expanduser(found[2]), text) for text in sys.argv[1:]]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print("error:", where + " ".join((error.strerror or str(error)).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------- frames


def natural_key(name):
    """Sorts `frame2` before `frame10`: digits compare as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))]


def sort_frames(names, folder):
    """Image names of one clip folder -> (names in frame order, the two names around a gap or None).

    Frames of one clip have the same name but for the case, the suffix and one running number, as in `00000.png`,
    `img (1).jpg`, `2024-05-01_cam2_0001.png`. Of several numbers the one that runs has another value in every frame;
    where more than one has, a regular one, whose usual step is its smallest, or the evenest; `1305031102.175.png`
    counts as one number too, and so does a ROS stamp, `1305031102_175304000.png`. Its step may be any: a gap is a step
    of more than one and a half times the usual one. Raises `UserError` where the frames would be wrong: one number
    twice, names without a number, a second kind of name (masks, thumbnails, another series), or no regular number, and
    the evenest contradicts the order of the names.
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
            f"{folder}: {odd} beside {usual}; frames of a clip have the same name but for one running number: move"
            " what is no frame of it (a mask, a thumbnail, another series) into a folder of its own"
        )
    columns = [[int(text) for text in column] for column in zip(*(re.findall(r"\d+", name) for name in names))]
    stamps = [re.sub(r"(\d)[_-](\d{9})(?!\d)", r"\1.\2", name) for name in names]  # seconds and nanoseconds
    decimals = (re.findall(r"(?<!\d)(?=(\d+\.\d+))", name) for name in stamps)
    columns += [[float(text) for text in column] for column in zip(*decimals)]
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
        raise UserError(f"{folder}: which number of {first} and {second} runs cannot be told; rename them to have one")
    return list(ordered), ordered[place : place + 2] if unevenness > 1.5 else None


def list_frames(folder):
    """The image files of one clip folder, in frame order. Raises `UserError` as `sort_frames` does."""
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    names, _ = sort_frames([name for name in names if name.lower().endswith(IMAGE_SUFFIXES)], folder)
    return [Path(folder) / name for name in names]


def is_plain(data):
    """Whether these bytes are a PNG or JPEG of 8-bit RGB that nothing turns or makes transparent.

    OpenCV decodes such a file to the same pixels as PIL does, in half the time.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:26] == b"\x08\x02":
        at = 8
        while at < len(data):  # a chunk: size, kind, content, checksum
            if re.match(rb"eXIf|tRNS|acTL|[tzi][ET]Xt(Raw|XML)", data[at + 4 : at + 11]):  # the texts hold EXIF, XMP
                return False
            at += int.from_bytes(data[at : at + 4], "big") + 12
        return True
    if data[:2] != b"\xff\xd8":
        return False
    header, picture, _ = data.partition(b"\xff\xda")
    is_rgb = re.search(rb"\xff[\xc0-\xc2]\0\x11\x08.{4}\x03", header, re.DOTALL)
    is_special = re.search(rb"\xff[\xe1\xee]", header)  # EXIF or XMP, which may turn it; Adobe's colour spaces
    return bool(picture and is_rgb and not is_special)


def read_image(path):
    """Reads any still image as people see it: EXIF rotation applied, alpha over white, grey and CMYK to RGB.

    Returns (H, W, 3) uint8 RGB. Raises `UserError` for a file that is no readable image.
    """
    from PIL import Image, ImageOps

    try:
        with open(path, "rb") as file:
            data = file.read()
        frame = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if is_plain(data) else None
        if frame is not None:
            return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: PIL would clip, not scale
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except Exception as error:  # of a damaged file PIL raises errors of many kinds
        reason = getattr(error, "strerror", None) or re.sub(" <.*>", "", str(error))
        raise UserError(f"{path}: not a readable image ({reason})") from None


read_frame = read_image  # one reader for frames and single images: two would disagree on some file


def read_frames(paths, width, height):
    """Image files -> (T, height, width, 3) uint8 RGB, each fitted as `fit_frame` does."""
    return np.stack([fit_frame(read_image(path), width, height) for path in paths])


def to_pixels(frames):
    """(T, H, W, 3) uint8 -> (T, 3, H, W) float32 in [-1, 1]; by way of [0, 1], as in the pipeline, to the last bit."""
    import torch

    return torch.from_numpy(frames.astype(np.float32) / 255.0 * 2.0 - 1.0).permute(0, 3, 1, 2)


def fit_frame(frame, width, height):
    """Resizes (H, W, 3) so that it covers `width` x `height`, keeping the aspect ratio, then crops the centre.

    Area averaging when shrinking (no aliasing), bicubic when enlarging. A frame of the right size is returned as it is.
    """
    h, w = frame.shape[:2]
    scale = max(width / w, height / h)
    if scale != 1:
        size = max(width, round(w * scale)), max(height, round(h * scale))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return np.ascontiguousarray(frame[top : top + height, left : left + width])


@contextlib.contextmanager
def named(path):
    """Puts the name of this file into an `OSError` that has none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path, folder=False):
    """Gives a name beside `path` to write a file to, or an empty folder to fill; at the end it is renamed to `path`.

    A file is flushed to disk before. So `path` is whole or as it was, and after an error (a full disk) nothing stays;
    what a killed run left of a folder goes first.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.part" if folder else f".{path.name}.{os.urandom(4).hex()}.part")
    if folder:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        with named(path):
            yield aside
        if not folder:
            with open(aside, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True) if folder else aside.unlink(missing_ok=True)


def write_file(path, data):
    """Writes bytes or text: the file is whole or as it was."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def lock_file(path, busy, shared=False):
    """Holds a lock on the file `path`, made where it is missing, until the block or the process ends in whatever way.

    Raises `UserError(busy)` where another process holds it, and waits where `busy` is None; `shared` locks bear each
    other.
    """
    with open(path, "a+") as file:  # NFS gives a shared lock only to who may read
        with contextlib.suppress(ImportError):  # no such locks on Windows
            import fcntl

            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise UserError(busy) from None
            except OSError:  # a file system without locks
                pass
        yield


class Shard(NamedTuple):
    """A part of so many parts that processes or machines share; 0 of 1 is all, and has no name."""

    part: int
    parts: int

    @property
    def name(self):
        return f"-{self.part}-of-{self.parts}" if self.parts > 1 else ""

    def holds(self, name):
        """Whether what has this name falls to this part: by a hash, so to the same part in every run."""
        return int(name_digest(name), 16) % self.parts == self.part


def parse_shard(text, what="--shard"):
    """I/N -> Shard; I from 0 to N - 1, or from 1 to N, which is part 0. Raises `UserError` that says `what` it was."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) <= int(parts) > 0):
        raise UserError(f"{what} must be I/N with I at most N, as in 0/4, got {text}")
    return Shard(int(part) % int(parts), int(parts))


def printable(name):
    """A file's name as UTF-8 text: what is not UTF-8 in it becomes question marks."""
    return os.fsencode(name).decode(errors="replace")


def plain_name(name):
    """The name of a file that is made of `name`: UTF-8, for safetensors reads no other path, and not too long.

    255 bytes are the most that a name can have, with its suffix and with what is added while it is written.
    """
    text = printable(name)
    if text == name and len(text.encode()) <= 200:
        return name
    return f"{text.encode()[:150].decode(errors='ignore')}+{name_digest(name)}"


def name_digest(name):
    """Eight hexadecimal digits that depend on the name alone."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def read_patterns(texts, flag):
    """The values of --include or --exclude: patterns as they are; for @FILE its lines, a frozenset of names.

    Raises `UserError` where there is no such file, and as `read_text` does.
    """

    def read(text):
        if not (path := Path(text[1:])).exists():
            raise UserError(f"{flag} {text}: no such file; give a text file of names, one a line")
        return frozenset(read_text(path).split("\n")) - {""}

    return [read(text) if text.startswith("@") else text for text in texts]


def is_named(patterns, *names):
    """Whether a pattern stands for one of `names`, or a list of `read_patterns` holds the first of them."""
    listed = any(names[0] in pattern for pattern in patterns if not isinstance(pattern, str))
    globs = [pattern for pattern in patterns if isinstance(pattern, str)]
    return listed or any(name == glob or fnmatch.fnmatch(name, glob) for glob in globs for name in names)


def names_of_nothing(patterns, known):
    """The patterns, and the lines of lists, that stand for nothing in `known`: [the names of one thing], as above."""
    found, whole = [], {names[0] for names in known}
    for pattern in patterns:
        if not isinstance(pattern, str):
            found += sorted(pattern - whole)
        elif not any(is_named([pattern], *names) for names in known):
            found.append(pattern)
    return found


@contextlib.contextmanager
def lock_shard(folder, shard, busy):
    """Holds the locks of a set in `folder`: all of it, or a part beside the others of as many.

    Raises `UserError(busy)` where that is held, or a part of another number.
    """
    with contextlib.ExitStack() as locks:
        locks.enter_context(lock_file(folder / "lock", busy, shared=shard.parts > 1))
        if shard.parts > 1:
            locks.enter_context(lock_file(folder / f"lock-of-{shard.parts}", busy, shared=True))
            for other in set(folder.glob("lock-of-*")) - {folder / f"lock-of-{shard.parts}"}:
                with lock_file(other, busy):
                    pass
            locks.enter_context(lock_file(folder / f"lock{shard.name}", busy))
        yield


def file_digest(path, before=b""):
    """SHA-256 of a file's bytes, as hex, and of what is put `before` them."""
    digest = hashlib.sha256(before)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def encode_png(frame):
    """(H, W, 3) RGB -> PNG bytes."""
    return cv2.imencode(".png", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), PNG_OPTIONS)[1].tobytes()


def write_video(path, frames, fps, *options):
    """Writes (T, H, W, 3) uint8 RGB as H.264 yuv420p mp4 that browsers and phones play; whole or not at all.

    An odd width or height loses its last column or row: H.264 with 4:2:0 has even sizes only. `options` are ffmpeg's.
    """
    import imageio_ffmpeg

    frames = np.asarray(frames)[:, : frames[0].shape[0] // 2 * 2, : frames[0].shape[1] // 2 * 2]
    size, options = frames.shape[2:0:-1], ["-crf", "14", *options, "-movflags", "+faststart", "-f", "mp4"]
    codec = {"codec": "libx264", "pix_fmt_out": "yuv420p", "macro_block_size": 2, "output_params": options}
    with replacing(path) as aside:
        writer = imageio_ffmpeg.write_frames(str(aside), size, fps=fps, **codec)
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        with contextlib.suppress(UserError):
            if len(read_video(aside)) == len(frames):  # ffmpeg does not tell of a disk that fills up at the end
                return
        raise OSError(errno.ENOSPC, "not written whole; is the disk full?", str(path))


def read_video(path):
    """Decodes a short, well-behaved video (one that `write_video` wrote) to (T, H, W, 3) uint8 RGB."""
    capture, frames = cv2.VideoCapture(os.fsencode(path)), []  # a str that is not UTF-8 crashes it
    while (frame := capture.read()[1]) is not None:
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    if not frames:
        raise UserError(f"{path}: no frame could be read")
    return np.stack(frames)


def label_frames(frames, text):
    """Puts a white strip with `text` above every frame of (T, H, W, 3)."""
    frames = np.asarray(frames)
    strip = np.full((24, frames.shape[2], 3), 255, np.uint8)
    width = max(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)[0][0], 1)
    scale = min(0.5, 0.5 * (frames.shape[2] - 8) / width)
    cv2.putText(strip, text, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)
    return np.stack([np.concatenate([strip, frame]) for frame in frames])


def side_by_side(videos, min_width=256):
    """`{label: (T, H, W, 3)}` -> one labelled video, the shortest's length; small ones enlarged to be seen."""
    length = min(len(video) for video in videos.values())
    scale = max(1, -(-min_width // next(iter(videos.values())).shape[2]))
    columns = []
    for text, video in videos.items():
        big = [cv2.resize(f, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for f in video[:length]]
        columns.append(label_frames(big, text))
    return np.concatenate(columns, axis=2)


# ------------------------------------------------------------------------------------------------- dataset folder


def parse_object(text, damaged):
    """A JSON object as a dict; raises `UserError(damaged)` for any other text."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(text), dict):
            return found
    raise UserError(damaged)


def read_text(path):
    """The text of a UTF-8 file, with its mark or without; empty where there is none. Raises `UserError` for others."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark reads as UTF-8 with these
        raise UserError(f"{path}: not UTF-8 text; open it in an editor and save it as UTF-8")
    return text


def read_lines(path, damaged, cut_off=False):
    """The objects of a JSON Lines file, none where there is no file: yields (`FILE line N`, dict).

    Raises `UserError` for a line that is no JSON object, what it is says `damaged`, and as `read_text` does. With
    `cut_off` the last line may be broken off, where it ends in neither a brace nor a newline.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = parse_object(line, f"{path} line {number}: {damaged}")
        except UserError:
            if cut_off and number == len(lines) and not line.rstrip().endswith("}"):
                return
            raise
        yield f"{path} line {number}", found


def read_metadata(dataset_dir):
    """`metadata.jsonl` of a prepared dataset as `{directory, by same_name: record}`; empty where there is none.

    Lines without `directory` (sets of mp4) are passed over, and so are fields that are null. Raises `UserError` that
    names file, line and field for no sensible value, and as `read_lines` does.
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
        directory = record["directory"]
        if "\\" in directory and not (root / directory).is_dir():  # written on Windows
            directory = directory.replace("\\", "/")
        records[same_name(PurePosixPath(directory).as_posix())] = record
    return records


def same_name(name):
    """A name as all systems write it: macOS takes letters with accents apart, here they are one character."""
    return unicodedata.normalize("NFC", name)


SYSTEM_FOLDERS = frozenset(  # deleted files, thumbnails and snapshots of Windows, macOS and network storage
    "$recycle.bin|recycler|recycled|#recycle|@recycle|@eadir|@tmp|#snapshot|@recently-snapshot|~snapshot|lost+found"
    "|system volume information|__macosx".split("|")
)


def find_folders(root):
    """Every folder below `root`, links followed: `{directory: names of its files}`, and `{path: why it is left out}`.

    A folder that can be reached by two ways is taken once, by the one without a link if there is one. What is hidden
    and the folders of NAS, Windows and macOS are passed over. A link to an image that is not there stays: a gap.
    """
    found, left_out, seen, tops = {}, {}, set(), [str(root)]

    def cannot_look(error):
        left_out[error.filename] = f"cannot be looked at, {error.strerror}"

    for top in tops:  # the links, which are added while walking: real folders come first
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
                path = os.path.join(folder, name)
                if not name.lower().endswith(IMAGE_SUFFIXES) and os.path.islink(path) and not os.path.exists(path):
                    left_out[path] = "a link to nowhere"
    return found, left_out


def list_clips(dataset_dir):
    """Every clip of a dataset folder: records with `directory`, `frames` (paths) and `root`, in name order.

    A clip is any folder that holds images. `metadata.jsonl` gives fps and motion where it has a line for the folder.
    Raises `UserError` where there is no such folder, no clip in it, or where images are not a clip's frames; warns of
    gaps between frames and of what cannot be looked at.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise UserError(f"--dataset_dir {root}: no such folder; make it with prepare_dataset.py")
    metadata, clips, wrong = read_metadata(root), [], []
    found, left_out = find_folders(root)
    warnings = [f"{path}: {why}; left out" for path, why in left_out.items()]
    for directory in sorted(found, key=lambda name: ([natural_key(part) for part in name.split("/")], name)):
        try:
            images = [name for name in found[directory] if name.lower().endswith(IMAGE_SUFFIXES)]
            names, gap = sort_frames(images if directory != "." else [], root / directory)
        except UserError as error:
            wrong.append(str(error))
            continue
        if gap:
            warnings.append(f"{root / directory}: {gap[1]} follows {gap[0]}; the clip jumps where frames are missing")
        if names:
            known, frames = metadata.get(same_name(directory), {}), [root / directory / name for name in names]
            clips.append({**known, "directory": directory, "frames": frames, "root": root})
    if wrong:
        raise UserError(wrong[0] + (f" (and {len(wrong) - 1} more such folders)" if len(wrong) > 1 else ""))
    warnings[5:] = [f"and {len(warnings) - 5} more like these"] if len(warnings) > 5 else []
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    if not clips:
        raise UserError(f"{root}: holds no folder of frames; expected <video>/00000.png, from prepare_dataset.py")
    return clips


# ---------------------------------------------------------------------------------------------- motion and metrics


def optical_flow(first, second, preset=cv2.DISOPTICAL_FLOW_PRESET_MEDIUM):
    """Dense flow (H, W, 2) in pixels between two uint8 images, RGB or grey: OpenCV's DIS."""
    first, second = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) if f.ndim == 3 else f for f in (first, second))
    return cv2.DISOpticalFlow_create(preset).calc(first, second, None)


MOTION_SIZE = 128  # pixels of the longer side at which motion is measured, so that it does not depend on the resolution
MOTION_MIDDLE, MOTION_EXPONENT = 1.5, 0.5  # the motion in the middle of the buckets, and how they spread around it


def motion_stride(fps):
    """Frames between the two pictures of a motion measurement: about a tenth of a second, whatever the fps."""
    return max(1, round(fps / 10))


def motion_thumbnail(frame, to_grey=cv2.COLOR_RGB2GRAY):
    """(H, W, 3) -> grey, the longer side at most `MOTION_SIZE`: what `flow_magnitude` compares."""
    step = max(1, max(frame.shape[:2]) // (2 * MOTION_SIZE))  # every step-th pixel first: area averaging is slow
    frame = frame[::step, ::step]
    scale = MOTION_SIZE / max(frame.shape[:2])
    if scale < 1:
        size = (max(8, round(frame.shape[1] * scale)), max(8, round(frame.shape[0] * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, to_grey)


def flow_magnitude(first, second):
    """Mean length of the optical flow between two thumbnails, in percent of the longer side: DIS, fast preset."""
    h, w = first.shape
    if min(h, w) < 32:  # DIS needs some room
        pad = (0, max(0, 32 - h), 0, max(0, 32 - w), cv2.BORDER_REPLICATE)
        first, second = cv2.copyMakeBorder(first, *pad), cv2.copyMakeBorder(second, *pad)
    flow = optical_flow(first, second, cv2.DISOPTICAL_FLOW_PRESET_FAST)[:h, :w]
    return 100 * float(np.nan_to_num(np.hypot(flow[..., 0], flow[..., 1])).mean()) / max(h, w)


def clip_motion(frames, fps):
    """How much a clip (T, H, W, 3) RGB moves: mean optical flow in percent of the longer side per second."""
    stride = min(motion_stride(fps), max(1, len(frames) - 1))
    thumbnails = [motion_thumbnail(frame) for frame in frames[::stride]]
    flows = [flow_magnitude(first, second) for first, second in zip(thumbnails, thumbnails[1:])]
    return float(np.mean(flows)) * fps / stride if flows else 0.0


def motion_bucket(motion):
    """`clip_motion` -> motion_bucket_id: 255 * m^p / (m^p + middle^p). The scale is ours: Stability's is not public."""
    powered = max(motion, 0.0) ** MOTION_EXPONENT
    return round(255 * powered / (powered + MOTION_MIDDLE**MOTION_EXPONENT))


def ssim(first, second):
    """Structural similarity of two (H, W, 3) uint8 images: Gaussian window, sigma 1.5 (Wang et al. 2004)."""
    x, y = first.astype(np.float64), second.astype(np.float64)

    def mean(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score[5:-5, 5:-5].mean())  # the border has no full window


def psnr(squared_error):
    """Decibels of a mean squared error on the 0..255 scale; infinite for equal pictures."""
    return float(10 * np.log10(255**2 / squared_error)) if squared_error > 0 else float("inf")


def video_metrics(generated, real):
    """Scores a generated continuation against the real one of the same first frame, frames 1..T-1.

    generated, real: (T, H, W, 3) uint8 RGB. Returns
      psnr, ssim     over whole frames: a static background wins these, they prove little alone
      psnr_moving    dB over moving pixels (|real - frame 0| > 20 of 255 in any channel, dilated 3x3)
      motion_ratio   mean |frame difference|, generated over real: 0 is a frozen video, 1 moves as much
      flow_error     end-point error of DIS flow on moving pixels, pixels a frame; flow_cosine its direction
    Values are None where the real clip does not move.
    """
    length = min(len(generated), len(real))
    generated, real = np.asarray(generated)[:length], np.asarray(real)[:length]
    error = (generated[1:].astype(np.float64) - real[1:]) ** 2
    moving = np.abs(real[1:].astype(np.int16) - real[0]).max(axis=3) > 20
    moving = np.stack([cv2.dilate(m.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for m in moving])
    step, real_step = (np.abs(np.diff(video.astype(np.float64), axis=0)).mean() for video in (generated, real))
    scores = dict.fromkeys(("psnr", "ssim", "psnr_moving", "motion_ratio", "flow_error", "flow_cosine"))
    scores["psnr"] = psnr(error.mean())
    scores["ssim"] = float(np.mean([ssim(g, r) for g, r in zip(generated[1:], real[1:])]))
    if real_step > 0:
        scores["motion_ratio"] = float(step / real_step)
    if moving.any():
        flow, truth = (
            np.concatenate([optical_flow(video[t], video[t + 1])[moving[t]] for t in range(length - 1)])
            for video in (generated, real)
        )
        dot, norms = (flow * truth).sum(1), np.linalg.norm(flow, axis=1) * np.linalg.norm(truth, axis=1)
        scores["psnr_moving"] = psnr(error[moving].mean())
        scores["flow_error"] = float(np.linalg.norm(flow - truth, axis=1).mean())
        scores["flow_cosine"] = float(dot.sum() / max(norms.sum(), 1e-9))
    return scores


def sharpness(frame):
    """Variance of the Laplacian of (H, W, 3) RGB: falls when a picture blurs."""
    return float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def clip_measures(frames, image, fps):
    """Measures of a generated clip (T, H, W, 3) RGB that need no real one; image: its input, at the clip's size.

    motion            as `clip_motion`; measured_motion_bucket_id is its bucket
    sharpness_ratio   `sharpness`, mean of the last quarter of the frames over frame 0: below 1 it blurs
    psnr_first_frame  dB of frame 0 to the image; at most 100, which stands for equal
    flicker           mean |change| of a frame's mean brightness to the next, in levels of 255; what only moves within
                      the picture hardly changes that mean, so motion is not compensated
    """
    motion, start = clip_motion(frames, fps), sharpness(frames[0])
    end = np.mean([sharpness(frame) for frame in frames[-max(1, len(frames) // 4) :]])
    brightness = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() for frame in frames]
    return {
        "motion": round(motion, 4),
        "measured_motion_bucket_id": motion_bucket(motion),
        "sharpness_ratio": round(float(end / start), 4) if start else None,  # none where frame 0 is of one colour
        "psnr_first_frame": round(min(psnr(((frames[0] - image.astype(np.float64)) ** 2).mean()), 100.0), 2),
        "flicker": round(float(np.abs(np.diff(brightness)).mean()), 4),
    }


def write_page(path, data):
    """Writes a page that shows `data`: page.html beside the scripts, with the data put in as JSON.

    No page where that template is missing, or cannot be written: no run fails for it. A page of another maker stays.
    """
    with contextlib.suppress(OSError):
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        if not path.exists() or b'content="SVD trio"' in path.read_bytes():
            write_file(path, template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c")))


# ---------------------------------------------------------------------------------------------------- SVD's parts

PARTS = ("unet", "vae", "image_encoder", "scheduler", "feature_extractor")
MODEL_PARTS = PARTS[:3]
CLIP_CONFIG = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
VAE_CONFIG = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2}
SVD_XT_CONFIG = {  # as published, where it differs from the classes' defaults; a plan needs nothing else
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024, "num_frames": 25},
    "vae": {"down_block_types": ["DownEncoderBlock2D"] * 4, **VAE_CONFIG},
    "image_encoder": {"patch_size": 14, "projection_dim": 1024, **CLIP_CONFIG},
}
SVD_NAMES = [f"stabilityai/stable-video-diffusion-img2vid{kind}" for kind in ("", "-xt", "-xt-1-1")]
CHECKPOINT_STATE = "training_state.json"  # what makes a folder a checkpoint of train_svd.py
SETTINGS = "training_settings.json"  # beside every result: what it was trained with
SETTINGS_EXAMPLE = {"width": 512, "height": 320, "num_frames": 14, "median_fps": 7, "median_motion_bucket_id": 127}
SETTINGS_EXAMPLE |= {"motion_bucket_id_range": [0, 255], "pretrained_model_name": "", "base_fingerprint": ""}
SETTINGS_EXAMPLE |= {"use_ema": False, "lora_rank": 0, "lora_alpha": 0}

HUB_HELP = """{what}. Three ways to get the weights:
  1. accept the licence at https://huggingface.co/{name} , then: pip install -U huggingface_hub && hf auth login
  2. in mainland China: export HF_ENDPOINT=https://hf-mirror.com HF_TOKEN=hf_... , then run the same command again
  3. download the folder on another machine (hf download {name} --exclude "svd*.safetensors"), copy it here whole,
     and give the folder's path in place of the name (infer_svd.py, for a checkpoint: as --base_model)"""
NEEDED = (
    "what is needed is a whole diffusers folder of Stable Video Diffusion (model_index.json, unet/, vae/, ...): hf"
    " download stabilityai/stable-video-diffusion-img2vid-xt --exclude 'svd*.safetensors' --local-dir svd"
)


def resolve_model(name):
    """A hub name or local folder -> the local folder of a complete diffusers pipeline in safetensors.

    Raises `UserError` that says exactly what is missing and how to get it. Never reads pickled weights.
    """
    folder = local_folder(name) or download_model(str(name))
    for part in PARTS:
        if part in MODEL_PARTS:
            read_config(folder, part)
            weight_files(folder, part)
        elif not list((folder / part).glob("*.json")):
            raise UserError(f"{folder}: {part}/ has no configuration (.json); copy the folder again, whole")
        for file in (folder / part).glob("*.json"):
            read_json(file)
    return folder


def resolve_config(name):
    """A model name -> a folder (or, for SVD itself, a dict) with the configuration of its parts; needs no weights."""
    from huggingface_hub import hf_hub_download

    if folder := local_folder(name):
        return folder
    known = str(name) in SVD_NAMES  # what the cache has, or what we know: no network needed to plan
    try:
        with hub_errors(name):
            paths = [hf_hub_download(str(name), f"{part}/config.json", local_files_only=known) for part in MODEL_PARTS]
        return Path(paths[0]).parent.parent
    except UserError:
        if known:
            return SVD_XT_CONFIG
        raise


def local_folder(name):
    """The pipeline folder that `name` is, or None for a name of the hub. Raises `UserError` for any other thing."""
    path = Path(name)
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) != 2
    if not (looks_local or path.exists() or path.parent.is_dir()):
        return None
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path}: {describe(path)}")
    check_pipeline(path / "model_index.json", path)
    return path


def check_pipeline(index, name):
    """Refuses the model_index.json of another pipeline (Stable Diffusion 1.5, SDXL, ...)."""
    found = read_json(index).get("_class_name") or "pipeline without a name"
    if not str(found).startswith("StableVideoDiffusion"):
        raise UserError(f"{name}: a {found}, no StableVideoDiffusionPipeline; {NEEDED}")


def describe(path):
    """What a path that is no pipeline folder is, and what to give instead."""
    if not path.exists():
        return "no such model folder (and not a hub name, which has the form owner/name)"
    if (path / CHECKPOINT_STATE).is_file():
        return "a checkpoint of train_svd.py, not a whole model; go on from it with --resume_from_checkpoint"
    patterns = ("*", "snapshots/*", "*/snapshots/*")  # the latter two: the hub's cache
    for index in sorted(found for pattern in patterns for found in path.glob(f"{pattern}/model_index.json")):
        return f"no pipeline, but there is one in it: give {index.parent}"
    if (path.resolve().parent / "model_index.json").is_file():
        return f"one part of a pipeline; give the whole folder, {path.parent}"
    for newest in sorted(path.glob("checkpoint-*"), key=lambda folder: natural_key(folder.name))[-1:]:
        return f"no finished diffusers pipeline here (model_index.json is missing); its newest checkpoint is {newest}"
    files = [path] if path.is_file() else [f for pattern in ("*", "*/*", "*/*/*") for f in sorted(path.glob(pattern))]
    weights = [file for file in files if file.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin")]
    if not weights:
        return f"no diffusers pipeline here (model_index.json is missing); {NEEDED}"
    if weights[0].suffix != ".safetensors":
        return f"pickled weights ({weights[0].name}), which are never loaded: unpickling runs code; {NEEDED}"
    names, what = "".join(safetensors_header(weights[0])), "the weights of one part of a model"
    if "lora" in names:
        what = "a LoRA, which adds to a model and is none: infer_svd.py takes it as --lora"
    elif "diffusion_model." in names:
        what = "weights in one file, as ComfyUI takes them"
    return f"{what} ({weights[0].name}); {NEEDED}"


def download_model(name):
    """Downloads (or finds in the cache) a pipeline of the hub: full precision, or fp16 if it has no other."""
    from huggingface_hub import hf_hub_download

    with hub_errors(name):
        check_pipeline(Path(hf_hub_download(name, "model_index.json")), name)  # before gigabytes of another model
        from diffusers import DiffusionPipeline

        try:
            return Path(DiffusionPipeline.download(name, use_safetensors=True))
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            return Path(DiffusionPipeline.download(name, variant="fp16", use_safetensors=True))


@contextlib.contextmanager
def hub_errors(name):
    """Makes what goes wrong at the hub a `UserError` that says what to do; a full or read-only disk stays what it is.

    The hub's own errors are among Python's, those of its httpx are not.
    """
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, getattr(sys.modules.get("httpx"), "HTTPError", OSError)) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EACCES):
            raise
        near = difflib.get_close_matches(str(name), SVD_NAMES, n=1, cutoff=0.8)
        unknown = "no folder here and no model of the hub, or a private one and no login"
        gated = "the weights are gated: no login, or its licence is not accepted yet"
        away = f"the hub cannot be reached, and the model is not in the cache ({type(error).__name__})"
        for kind, text in (
            (errors.GatedRepoError, HUB_HELP.format(name=name, what=gated)),
            (errors.RepositoryNotFoundError, unknown + (f"; is it {near[0]}?" if near else "")),
            (errors.LocalEntryNotFoundError, HUB_HELP.format(name=name, what=away)),
            (errors.EntryNotFoundError, f"on the hub, but no diffusers pipeline; {NEEDED}"),
            (ValueError, "not usable from the hub ({})".format(str(error).partition("\n")[0])),
            (Exception, HUB_HELP.format(name=name, what=away)),
        ):
            if isinstance(error, kind):
                raise UserError(f"{name}: {text}") from None


def read_json(path, cure="copy the model folder again, whole"):
    """A file that holds a JSON object, as a dict; raises `UserError` with the cure for any other."""
    return parse_object(path.read_bytes(), f"{path}: damaged; {cure}")


def read_config(folder, part):
    """`<folder>/<part>/config.json` as a dict, readable before any weight is loaded."""
    if isinstance(folder, dict):
        return folder[part]
    try:
        config = read_json(Path(folder) / part / "config.json")
    except FileNotFoundError:
        raise UserError(f"{folder}: {part}/config.json is missing; copy the model folder again, whole") from None
    if part in ("unet", "vae") and not isinstance(config.get("block_out_channels"), list):
        raise UserError(f"{folder}: {part}/config.json is not whole; copy the model folder again")
    return config


def weight_files(folder, part):
    """The safetensors files of a part, full precision first, the fp16 files where the folder has only those.

    Raises `UserError` for missing, pickled-only, git-lfs-pointer and cut-off files.
    """
    folder, stem = Path(folder) / part, "model" if part == "image_encoder" else "diffusion_pytorch_model"
    for variant in ("", ".fp16"):
        single, index = f"{stem}{variant}.safetensors", folder / f"{stem}.safetensors.index{variant}.json"
        files = [folder / single] if (folder / single).exists() else []
        if index.exists():
            names = read_json(index, "download it again").get("weight_map")
            files = [folder / name for name in sorted(set(map(str, names.values())))] if isinstance(names, dict) else []
        for file in files:
            safetensors_header(file)
        if files:
            return files
    pickled = [file.name for file in folder.glob("*.bin")]
    why = f"only pickled weights ({pickled[0]}), which are never loaded: unpickling runs code" if pickled else "no"
    raise UserError(f"{folder}: {why} {stem}.safetensors or {stem}.fp16.safetensors; download it into this folder")


def safetensors_header(file):
    """The header of a safetensors file: `{tensor name: {dtype, shape, data_offsets}}`, offsets from the file's start.

    Raises `UserError` where the file is missing, a git-lfs pointer, damaged, or shorter than its header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size.to_bytes(8, "little") == b"version ":
                raise UserError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`, or download the file")
            with safe_open(file, "np"):  # checks the whole header, and the file's length against it
                header = json.loads(opened.read(size))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; download it into this folder") from None
    except SafetensorError as error:
        raise UserError(f"{file}: cut off or damaged ({error}); download it again") from None
    header.pop("__metadata__", None)
    for tensor in header.values():
        tensor["data_offsets"] = [8 + size + offset for offset in tensor["data_offsets"]]
    return header


def weights_fingerprint(folder, part):
    """A hash that tells two sets of weights apart, without reading gigabytes: the head of every tensor.

    The bytes are read by their offsets, for safetensors has no bf16 without torch, and a refusal need not wait for it.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder, part):
        with open(file, "rb") as opened:
            for name, tensor in sorted(safetensors_header(file).items()):
                start, end = tensor["data_offsets"]
                opened.seek(start)
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                digest.update(opened.read(min(end - start, 4096)))
    return digest.hexdigest()[:16]


def latent_factor(vae_config):
    """How many pixels a latent's side stands for: 8 for SVD."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def size_multiple(folder):
    """What width and height must be multiples of: the VAE's factor times the UNet's downsampling; 64 for SVD."""
    return latent_factor(read_config(folder, "vae")) * 2 ** (len(read_config(folder, "unet")["block_out_channels"]) - 1)


def check_sizes(args, folder):
    """Refuses `--width` and `--height` that the model cannot take, from its configuration alone."""
    multiple = size_multiple(folder)
    for flag, value in (("--width", args.width), ("--height", args.height)):
        if value > 16384:
            raise UserError(f"{flag} must be at most 16384, got {value}")
        if value % multiple:
            near = max(multiple, round(value / multiple) * multiple)
            takes = f"must be a multiple of {multiple} for this model, got {value}; the nearest is {near}"
            raise UserError(f"{flag} {takes}")


def convolve(module, x, weight, bias):
    """The forward pass of a convolution with these weights; in half precision SVD's 3-D ones become 2-D, equal.

    All of SVD's 3-D kernels are (3, 1, 1): over (B, C, T, H * W) they are 2-D. cuDNN 9.8 to 9.14 has no fast 3-D
    convolution in half precision (pytorch#166122), and oneDNN's bf16 backward pass on a CPU does not come to its end.
    """
    import torch

    if x.ndim < 5 or x.dtype in (torch.float32, torch.float64) or module.kernel_size[1:] != (1, 1):
        return module._conv_forward(x, weight, bias)
    out = torch.nn.functional.conv2d(x.flatten(3), weight.flatten(3), bias, padding=(module.padding[0], 0))
    return out.unflatten(3, x.shape[3:])


def avoid_conv3d(model):
    """Lets the 3-D convolutions of a UNet or VAE go through `convolve`, in place."""
    from torch.nn import Conv3d

    for module in model.modules():
        if isinstance(module, Conv3d):
            module.forward = lambda x, module=module: convolve(module, x, module.weight, module.bias)


class SingleTokenAttention:
    """Cross-attention over SVD's one token: softmax over one key is 1, so the output is to_out(to_v(token)).

    It is computed once for all queries: equal to the stock result but for rounding, and bitwise in the CPU tests.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        assert encoder_hidden_states.shape[1] == 1, "the shortcut holds for one token only"
        hidden = attn.to_out[0](attn.to_v(encoder_hidden_states))  # (B, 1, C)
        return hidden.expand(-1, hidden_states.shape[1], -1)


def compile_blocks(unet):
    """Compiles each large block by itself, in place: the names in the state dict stay as they are."""
    import torch._dynamo
    from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
    from diffusers.models.resnet import SpatioTemporalResBlock

    torch._dynamo.config.cache_size_limit = 64  # the blocks come in more shapes than the default 8
    for module in unet.modules():
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock, SpatioTemporalResBlock)):
            module.compile()


def usable_memory(device, size=None):
    """GiB that a run may use of `size` bytes, or of what is free now: less what no forecast sees, which is CUDA's
    context and workspaces (0.6), and fragments (5 %; 12 % on Windows, where torch has no expandable segments)."""
    import psutil
    import torch

    is_cuda = device.type == "cuda"
    size = size or (torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available)
    return size / 2**30 * (0.88 if is_cuda and os.name == "nt" else 0.95) - 0.6


def is_out_of_memory(error):
    """Whether the GPU's memory was not enough, which torch, cuBLAS and cuDNN say in different words."""
    import torch

    words = "out of memory|CUBLAS_STATUS_ALLOC_FAILED|ALLOCATION_FAILED|unable to find an engine"
    told = isinstance(error, RuntimeError) and re.search(words, str(error))
    return bool(told) or isinstance(error, torch.cuda.OutOfMemoryError)


def load_part(folder, part, dtype):
    """One model part in `dtype`, on the CPU, in eval mode, from safetensors alone."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        if part == "scheduler":
            return EulerDiscreteScheduler.from_pretrained(folder, subfolder=part)
        if part == "feature_extractor":
            return CLIPImageProcessor.from_pretrained(folder, subfolder=part)
        variant = "fp16" if ".fp16" in weight_files(folder, part)[0].name else None
        options = {"subfolder": part, "variant": variant, "use_safetensors": True, "local_files_only": True}
        if part == "image_encoder":
            return CLIPVisionModelWithProjection.from_pretrained(folder, dtype=dtype, **options).eval()
        cls = UNetSpatioTemporalConditionModel if part == "unet" else AutoencoderKLTemporalDecoder
        return cls.from_pretrained(folder, torch_dtype=dtype, **options).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}/{part}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error


def load_pipeline(name, dtype, base=None):
    """A stock `StableVideoDiffusionPipeline` on the CPU in `dtype`, and what it was trained with.

    name: a hub name, a pipeline folder, or a checkpoint of train_svd.py, which is laid over the base that it names, or
    over `base`. Returns (pipeline, settings); settings is {} for a model that was not trained here.
    """
    from diffusers import StableVideoDiffusionPipeline
    from safetensors.torch import load_file

    folder, settings, trained = resolve_checkpoint(name, base)
    parts = {part: load_part(folder, part, dtype) for part in PARTS}
    if trained is not None:
        load_trained_weights(dict(parts["unet"].named_parameters()), load_file(trained), settings)
    return StableVideoDiffusionPipeline(**parts), settings


def resolve_checkpoint(name, base=None):
    """A model name -> (pipeline folder, training settings, trained-weights file or None): reads no weights.

    base: hub name or folder in place of the base that a checkpoint names; a whole pipeline needs none.
    """
    folder = Path(name)
    state_file = folder / CHECKPOINT_STATE
    if not state_file.is_file():
        folder = resolve_model(name)
        file = folder / SETTINGS
        return folder, read_settings(file, "delete it, or copy the folder again") if file.is_file() else {}, None
    settings = read_settings(state_file, "use another checkpoint")
    trained = folder / ("ema.safetensors" if settings["use_ema"] else "trained.safetensors")
    if not trained.is_file():
        raise UserError(f"{trained}: missing; use another checkpoint")
    safetensors_header(trained)
    fingerprint = settings["base_fingerprint"]
    found = resolve_model(base or find_base(folder, settings["pretrained_model_name"], fingerprint))
    if weights_fingerprint(found, "unet") != fingerprint:
        raise UserError(f"{folder}: was trained on another base than what is in {found}; give that one as --base_model")
    return found, settings, trained


def read_settings(path, cure):
    """What a model was trained with, beside a result or in a checkpoint; raises `UserError` for what none writes."""

    def kind(value):
        return [kind(one) for one in value] if isinstance(value, list) else {int: float}.get(type(value), type(value))

    settings = read_json(path, cure)
    if path.name == CHECKPOINT_STATE:  # what is needed to find its base must be there
        found, needed = settings.get("settings"), ("pretrained_model_name", "base_fingerprint", "use_ema")
        settings = {"step": settings.get("step"), **dict.fromkeys(needed), **(found if isinstance(found, dict) else {})}
    for field in settings.keys() & SETTINGS_EXAMPLE:
        if kind(settings[field]) != kind(SETTINGS_EXAMPLE[field]):
            value = json.dumps(settings[field])[:60]
            raise UserError(f"{path}: damaged, its {field} is {value}; {cure}")
    return settings


def find_base(folder, recorded, fingerprint):
    """The base that a checkpoint names, or where it lies now: what was moved together keeps the end of its path.

    recorded: a hub name, or the folder's path when the run began. Candidates are judged by their weights, so a
    fine-tuned result of the same name is not taken. Raises `UserError` where there is none.
    """
    if os.path.isdir(recorded) or re.fullmatch(r"[\w.-]+/[\w.-]+", recorded):
        return recorded
    parts = [part for part in re.split(r"[\\/]", recorded) if part]
    for parent in (*folder.resolve().parents, Path.cwd()):
        for start in range(len(parts)):
            candidate = parent.joinpath(*parts[start:])
            with contextlib.suppress(UserError):
                if os.path.isdir(candidate / "unet") and weights_fingerprint(candidate, "unet") == fingerprint:
                    return candidate
    where = f"neither in {recorded} any more nor beside the run"
    raise UserError(f"{folder}: its base model is {where}; give its folder or hub name as --base_model")


def load_trained_weights(weights, trained, settings):
    """Puts trained tensors in the place of the base's, whatever dtype these have; a LoRA is added to them.

    weights: {name: tensor} of a UNet or of one of its files, changed in place; settings: what it was trained with.
    """
    import torch

    if settings.get("lora_rank"):
        return add_adapter(weights, trained, lora_scale(settings))
    with torch.no_grad():
        for name in trained.keys() & weights.keys():
            weights[name].copy_(trained[name])


def add_adapter(weights, adapter, scale):
    """Adds scale * B A of a LoRA (Hu et al. 2021) to the weights that it is for, in place; the sum is made in fp32.

    weights: {"<layer>.weight": (out, in)} of a UNet or of one of its files; adapter: {"<layer>.lora_A.weight": (r, in),
    "<layer>.lora_B.weight": (out, r)}, named as in peft's files or as in a model that peft has adapters in.
    """
    import torch

    adapter = {re.sub(r"^base_model\.model\.|\.default(?=\.)", "", name): tensor for name, tensor in adapter.items()}
    with torch.no_grad():
        for name in adapter:
            weight = weights.get(name.replace(".lora_A", "")) if ".lora_A" in name else None
            if weight is not None:
                update = adapter[name.replace("lora_A", "lora_B")].float() @ adapter[name].float()
                weight.copy_(weight.float() + scale * update.to(weight.device))


def lora_scale(config):
    """What B A is multiplied by, from training_settings.json or from peft's adapter_config.json."""
    rank = config.get("lora_rank") or config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


# -------------------------------------------------------------------------------------------------------- Forecast


def memory_tracker():
    """A context that counts the bytes of all storages alive, `now` and at the `peak`, of every tensor made in it."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class MemoryTracker(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now, self.peak, self.alive = 0, 0, {}

        def track(self, tensor):
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _: self.free(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

        def free(self, key, size):
            self.now -= size
            del self.alive[key]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.track(leaf)
            return out

    return MemoryTracker()
