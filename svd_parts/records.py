"""The records of a prepared dataset, and what is made from them: metadata.jsonl and preview.jpg."""

import contextlib
import io
import itertools
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import svd_common as common
from svd_parts.dataset import list_frames
from svd_parts.ffmpeg import Failure
from svd_parts.files import UserError, fits, inside, natural_key, read_lines, write_file

# The fields of a record in .prepare/*.json and of each clip in it, with their types: somebody may have edited one.
NUMBER = (int, float)
RECORD = {"source": str, "size": int, "mtime_ns": int, "options": dict, "clips": list, "dropped": dict}
# Of the video: its frames at --fps, how many --max_frames left out, its size in pixels. 0 in records without them.
COUNTS = dict.fromkeys(("frames", "left_out", "width", "height"), 0)
RECORD |= dict.fromkeys(COUNTS, int)
CLIP = {"directory": str, "num_frames": int, "width": int, "height": int, "duration": NUMBER, "fps": NUMBER}
CLIP |= {"motion": NUMBER, "motion_bucket_id": NUMBER, "problems": list, "notes": list}
CLIP_OPTIONS = "max_frames width height fps clip_frames clip_stride min_frames min_motion split_scenes image_format"
CLIP_OPTIONS = [*CLIP_OPTIONS.split(), "action_key"]


def clip_options(options):
    """The options that decide what the files of a clip hold. They are the same for the whole dataset."""
    return {name: getattr(options, name) for name in CLIP_OPTIONS}


def read_records(state):
    """{source: record} of finished videos, from .prepare/*.json. Passes over damaged ones. Raises `UserError` for one
    that names a folder outside the dataset."""
    records = {}
    for path in state.glob("*.json"):
        with contextlib.suppress(ValueError, RecursionError, FileNotFoundError):
            found = json.loads(path.read_text(encoding="utf-8"))
            record = {**COUNTS, **found} if isinstance(found, dict) else found
            if fits(record, RECORD) and all(fits(clip, CLIP) for clip in record["clips"]):
                for clip in record["clips"]:
                    if "/" in inside(clip["directory"], path):  # else a link could lead outside
                        raise UserError(f"{path} names {clip['directory']}, and a clip's folder is one name; delete it")
                record = {key: record[key] for key in RECORD}
                records[record["source"]] = record
    return records


def earlier_records(output, options):
    """`read_records` of the earlier runs. Raises `UserError` where these had other options, or left damaged files."""
    records, now = read_records(output / ".prepare"), clip_options(options)
    other = next((record["options"] for record in records.values() if record["options"] != now), None)
    if other and not options.overwrite:
        named = ", ".join(f"--{key} {value}" for key, value in other.items() if now.get(key) != value)
        raise UserError(f"--output_dir {output} was made with {named}: give the same, or add --overwrite")
    # Both refuse a damaged metadata.jsonl now, not after hours. Writing also mends a last line that a kill cut off.
    read_clip_lines(output) if options.shard.name else write_metadata(output)
    return records


def is_current(record, stamp, options):
    """Whether a record is of the video's file as it is now, and of these options."""
    same = all(record[key] == value for key, value in stamp.items())
    return same and record["options"] == clip_options(options)


def still_holds(record, stamp, output, options):
    """Whether an earlier run's record of a video still holds. stamp: {"size", "mtime_ns"} of the video's file now.

    Raises `Failure` where it does not, and the clips may not be made again.
    """
    changed = any(record[key] != value for key, value in stamp.items())
    if changed and not options.overwrite:
        raise Failure("changed since it was prepared, the dataset holds its old frames: --overwrite renews them")
    if is_current(record, stamp, options) and is_complete(record, output):
        return True
    for clip in record["clips"]:
        refuse_others(output / clip["directory"], clip["num_frames"], "action_names" in clip)
    return False


def is_complete(record, output):
    """Whether every folder of the record is there with all its frames, none of them empty (a power cut leaves such).

    Raises `Failure` for a folder that holds more images than the clip has frames.
    """
    for clip in record["clips"]:
        folder, count = output / clip["directory"], clip["num_frames"]
        try:
            frames = list_frames(folder) if folder.is_dir() else []
        except UserError as error:
            raise Failure(str(error)) from None
        if len(frames) > count:
            raise Failure(f"{folder} holds more images than the {count} of the clip: move away {frames[-1].name}")
        if len(frames) < count or not all(frame.stat().st_size for frame in frames):
            return False
    return True


def refuse_others(folder, num_frames, has_actions=False):
    """Raises `Failure` where the folder of a clip to make again holds files of others, or is no folder."""
    ours = re.compile(r"\d{5,}\.(png|jpg)|\..*|thumbs\.db|desktop\.ini|@eadir", re.IGNORECASE)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""] * os.path.lexists(folder)
    for name in names:
        if has_actions and name == "actions.npy":
            continue
        if not ours.fullmatch(name) or (name[:5].isdecimal() and int(Path(name).stem) >= num_frames):
            raise Failure(f"{folder / name}: this program did not make it, and its clip is made again: move it away")


def dump_line(record):
    text = json.dumps(record, ensure_ascii=False)
    not_utf8 = re.search("[\ud800-\udfff]", text)  # in the name of a source
    return (json.dumps(record) if not_utf8 else text) + "\n"


def read_clip_lines(output, name="metadata.jsonl"):
    """Reads a file of clips: `{directory: line}`, and the lines that name no directory.

    Raises `UserError` for a line that is no JSON object. A last line that a kill cut off is passed over.
    """
    lines, others = {}, []
    for _, line in read_lines(output / name, "not a JSON object; repair or delete it", cut_off=True):
        if isinstance(directory := line.get("directory"), str):
            lines[directory] = {**lines.get(directory, {}), **line}
        else:
            others.append(line)
    return lines, others


def by_name(directory):
    return natural_key(directory), directory


def write_tables(output, old):
    """Writes metadata.jsonl and preview.jpg, and again where another shard has ended meanwhile. Returns all records.
    preview.jpg stays as it is where the records are still `old`, those at the start of the run."""
    records, before = write_metadata(output), None
    while records != before:
        clips = [clip for record in records.values() for clip in record["clips"]]
        if clips and (records != old or not (output / "preview.jpg").exists()):
            write_preview(output, sorted(clips, key=lambda clip: by_name(clip["directory"])))
        before, records = records, write_metadata(output)
    return records


def write_metadata(output):
    """Writes metadata.jsonl from all records, in the order of names. Returns the records.

    Lines and fields that somebody else added stay. A value of ours that somebody changed stays, too, until its clip is
    made again with another value. `.prepare/written.jsonl` holds what was written last, so a change can be seen.
    """
    path, records = output / "metadata.jsonl", read_records(output / ".prepare")
    # In this order: another shard may write between the two, and its new line must not look like somebody's change.
    written, _ = read_clip_lines(output / ".prepare", "written.jsonl")
    lines, others = read_clip_lines(output)
    clips = {clip["directory"]: clip for record in records.values() for clip in record["clips"]}
    merged = []
    for directory in sorted({*lines, *clips}, key=by_name):
        line, clip, before = (found.get(directory, {}) for found in (lines, clips, written))
        if clip or str(line.get("source")) not in records:
            ours = {key: value for key, value in clip.items() if key not in line or before.get(key) != value}
            merged.append({**line, **ours})
    text = "".join(map(dump_line, [*merged, *others]))
    if text.encode() != (path.read_bytes() if path.exists() else b""):
        write_file(path, text)
    write_file(output / ".prepare" / "written.jsonl", "".join(map(dump_line, clips.values())))
    return records


SHOWN = 40  # clips in preview.jpg, at most
FONTS = "NotoSansCJK-Regular.ttc wqy-zenhei.ttc wqy-microhei.ttc DroidSansFallbackFull.ttf msyh.ttc PingFang.ttc"


def write_preview(output, clips):
    """Writes preview.jpg: a row for each of up to `SHOWN` clips, with its name, fps, motion and four of its frames.

    The column of names is as wide as they need. If there are more clips, a line at the top says so.
    """
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    high, wide, font, total = 80, 144, ImageFont.load_default(12), len(clips)
    for name in FONTS.split():  # these show Chinese names, where the system has one of them
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, 12)
            break
    clips = [clips[i * len(clips) // min(SHOWN, len(clips))] for i in range(min(SHOWN, len(clips)))]

    def label(clip):
        name = clip["directory"]
        length = 40 if name.isascii() else 22  # letters that fit into a line
        lines = [name[i : i + length] for i in range(0, len(name), length)][:4]
        lines += [f"{clip['num_frames']} frames, {clip['fps']:g} fps, motion {clip['motion']:g}, bucket"]
        return "\n".join(lines) + f" {clip['motion_bucket_id']}"

    labels = [label(clip) for clip in clips]
    head = 20 * (total > len(clips))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 12 + math.ceil(max(draw.multiline_textbbox((0, 0), text, font, spacing=2)[2] for text in labels))
    sheet = Image.new("RGB", (left + 4 * wide, head + high * len(clips)), "white")
    draw = ImageDraw.Draw(sheet)
    if head:
        draw.text((4, 3), f"{len(clips)} of {total} clips", "black", font)

    def thumbnails(clip):
        try:
            paths = list_frames(output / clip["directory"])
            frames = [common.read_image(paths[place * (len(paths) - 1) // 3]) for place in range(4 if paths else 0)]
        except (OSError, UserError):  # deleted meanwhile, or mixed with others' images: no run ends for it
            return []
        small = [Image.fromarray(frame[:: max(1, len(frame) // 160), :: max(1, len(frame) // 160)]) for frame in frames]
        return [ImageOps.pad(image, (wide - 2, high - 2), color="white", centering=(0, 0)) for image in small]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for top, text, pictures in zip(itertools.count(head, high), labels, pool.map(thumbnails, clips)):
            draw.multiline_text((4, top + 2), text, "black", font, spacing=2)
            for place, picture in enumerate(pictures):
                sheet.paste(picture, (left + place * wide, top))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=90)
    try:
        write_file(output / "preview.jpg", data.getvalue())
    except OSError as error:
        print(f"warning: {output / 'preview.jpg'} cannot be written ({error.strerror}); the clips are whole")
