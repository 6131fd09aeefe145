"""What infer_svd.py wrote down about its clips: it marks those that are prepared as videos, and names their image."""

import functools
import os
from pathlib import Path

from svd_parts.files import UserError, parse_object, read_lines, same_name
from svd_parts.lerobot import lerobot_match

COMPARISONS = "side_by_side"  # the folder of a set in which its clips are shown beside others
LONGEST_RECORD = 1 << 20  # bytes; a longer JSON file beside a video is somebody's annotation


def folders_above(path, root):
    """Yields the folder of a video, the one above it, and so on up to `root`, or to the video's LeRobot dataset."""
    match, folder = lerobot_match(path), os.path.dirname(path)
    top = min(root, os.path.normpath(match["root"]) if match else root, key=len)
    while True:
        yield folder
        if folder in (top, os.path.dirname(folder)):
            return
        folder = os.path.dirname(folder)


def name_inside(path, folder):
    return same_name(os.path.relpath(path, folder).replace(os.sep, "/"))


@functools.cache
def read_set(folder):
    """{name: fields} of the clips of a set that infer_svd.py made in `folder`; {} for any other folder."""
    clips = {}
    try:
        for _, line in read_lines(Path(folder, "metadata.jsonl"), "not a JSON object"):
            name = line.get("file_name", line.get("directory"))
            if line.get("generated") is True and isinstance(name, str):
                clips[same_name(name)] = describe(line)
    except UserError as error:
        print(f"warning: {error}; the videos below it are prepared without its fields")
    return clips


def describe(record):
    """The fields of a clip's record that go with its video. The group is the input image, so that two seeds of one
    image are held out together."""
    fields = {key: record[key] for key in ("generated", "task", "source_image") if record.get(key)}
    image = record.get("source_image_sha256") or record.get("source_image")
    return {**fields, "group": f"image {image}"} if image else fields


def read_single(path):
    """The fields of a clip that was made as a single file, from its record FILE.json; {} for any other video."""
    record = Path(path).with_suffix(".json")
    try:
        text = record.read_bytes() if record.stat().st_size <= LONGEST_RECORD else b""
        found = parse_object(text, "no record of ours")
    except (OSError, UserError):
        return {}
    ours = found.get("generated") is True and found.get("file_name") == os.path.basename(path)
    return describe(found) if ours else {}


def known_fields(path, root):
    """{generated, task, source_image, group} of a video that infer_svd.py made; {} for any other video.

    Reads the nearest metadata.jsonl that names the video, in its folder or above, but not above `root`.
    """
    sets = ((read_set(folder), name_inside(path, folder)) for folder in folders_above(path, root))
    return next((clips[name] for clips, name in sets if name in clips), None) or read_single(path)


def is_comparison(path, root):
    """Whether a video shows clips of a generated set beside others, so that nobody should train on it."""
    if f"{os.sep}{COMPARISONS}{os.sep}" not in path or known_fields(path, root):
        return False
    below = (folder for folder in folders_above(path, root) if name_inside(path, folder).startswith(f"{COMPARISONS}/"))
    return any(map(read_set, below))
