"""The summary at the end of preparing: what was kept, what was left out and why, and what to do next."""

import collections
import math
import os
import shlex
from pathlib import Path

from svd_parts.crop import describe_crops
from svd_parts.dataset import group_clips
from svd_parts.files import counted, listed, natural_key

FRAMES, HELD_OUT, MULTIPLE = 25, 4, 64  # what is advised for training; SVD takes sizes that are multiples of 64


def duration(seconds):
    """`0.5 seconds`, `45 seconds`, `3.2 minutes`, `2.50 hours`."""
    if seconds < 120:
        return counted(round(seconds), "second") if seconds >= 1 else f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.2f} hours"


def print_totals(records):
    """Prints what was kept, and the range of the motion buckets: --motion_bucket_id means something within it."""
    clips = [clip for record in records for clip in record["clips"]]
    frames, seconds = sum(clip["num_frames"] for clip in clips), sum(clip["duration"] for clip in clips)
    kept = f"kept: {counted(len(clips), 'clip')} of {counted(len(records), 'video')}"
    if not clips:
        return print(kept)
    print(f"{kept}, {counted(frames, 'frame')}, {duration(seconds)}")
    sizes = collections.Counter(f"{clip['width']}x{clip['height']}" for clip in clips)
    more = f" and {counted(len(sizes) - 1, 'other size')}" if len(sizes) > 1 else ""
    print(f"  size: {sizes.most_common(1)[0][0]}{more}")
    for key, title in (("fps", "fps"), ("motion", "motion, % of the longer side a second"), ("motion_bucket_id",) * 2):
        values = sorted(clip[key] for clip in clips)
        low, middle, high = (values[round(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9))
        print(f"  {title}: {values[0]:g} to {values[-1]:g}; 10 % / median / 90 %: {low:g} / {middle:g} / {high:g}")


def shown(name):
    """A video's name on one line: a name may hold a line break."""
    return name if name.isprintable() else ascii(name)


def file_of(source):
    """The file that a source names: a camera of a LeRobot set may be a column of it, as in `a.parquet#front`."""
    file, column, _ = source.partition(".parquet#")
    return f"{file}.parquet" if column else source


def videos_of(names):
    """`2 videos (a.mp4, b.mp4)`: how many there are, and the names of the first of them."""
    return f"{counted(len(names), 'video')} ({listed([shown(name) for name in sorted(names, key=natural_key)])})"


def clips_there(record, output):
    """The clips of a record whose folders are in the dataset: somebody may have deleted one."""
    return [clip for clip in record["clips"] if (output / clip["directory"]).is_dir()]


def print_staying(title, records, output):
    """Prints in one line which clips of these records are in the dataset `output` all the same: training takes them."""
    there = {record["source"]: len(clips_there(record, output)) for record in records}
    if names := [name for name in there if there[name]]:
        total = sum(there.values())
        count = f"{counted(total, 'clip')} of {videos_of(names)}"
        stay = "it stays; delete its folder" if total == 1 else "they stay; delete their folders"
        print(f"{title}: {count}: {stay}, or give another --output_dir")


def print_others(records, chosen, options):
    """Prints which videos of the dataset are not among those of this run, and which are copies of another one.

    records: of the whole dataset. chosen: the sources that the options choose, those of other --shard parts, too.
    """
    output, kinds = Path(options.output_dir), ([], [])
    for record in records:
        if record["source"] not in chosen:
            kinds[os.path.lexists(Path(options.video_dir, file_of(record["source"])))].append(record)
    print_staying("in the dataset, though not in --video_dir any more", kinds[False], output)
    print_staying("in the dataset, though not chosen now", kinds[True], output)
    print_same_content(records, output)


def print_same_content(records, output):
    """Prints in one line which videos of the dataset `output` are copies: their clips name the same `recording`."""
    first, pairs = {}, []  # {recording: the first video that has it}
    for record in sorted(records, key=lambda record: natural_key(record["source"])):
        source, clips = record["source"], clips_there(record, output)
        for recording in {str(clip["recording"]).partition("@")[0] for clip in clips if clip.get("recording")}:
            other = first.setdefault(recording, source)
            if file_of(other) != file_of(source):  # two cameras in one parquet file are no copies
                pairs.append(f"{shown(other)} and {shown(source)}")
    if pairs:
        more = f" (and {counted(len(pairs) - 1, 'more pair')})" if len(pairs) > 1 else ""
        cure = "training holds them out together; train_svd.py --exclude CLIP leaves one out"
        print(f"the same content: {pairs[0]}{more}; {cure}")


def print_reasons(title, reasons, most=math.inf):
    """Prints a line for each of `{name: reason}`. More than `most` reasons that end in the same words share a line."""
    if reasons:
        print(f"{title}: {len(reasons)}")
    groups = {}
    for name, reason in reasons.items():
        groups.setdefault(reason.rpartition(", ")[2], []).append(f"{shown(name)}: {reason}")
    for what, rows in groups.items():
        for row in rows if len(rows) <= most else [f"{len(rows)} clips {what}, such as {rows[0]}"]:
            print(f"  {row}")


def summarize(records, failures, unfinished, twins, again):
    """Prints what was kept, what was left out and why. Returns how many videos are not whole in the dataset.

    again: the videos whose clips were made already, and now again.
    """
    print_totals(records)
    if again:
        print(f"made again, because a folder of it was missing or not whole: {videos_of(again)}")
    first = {record["source"]: record["clips"][0] for record in records if record["clips"]}
    flawed = {source: "; ".join(clip["problems"]) for source, clip in first.items() if clip["problems"]}
    noted = {source: "; ".join(clip["notes"]) for source, clip in first.items() if clip["notes"]}
    print_reasons("kept, with a note", noted)
    print_reasons("kept, but", flawed)
    print_reasons("perhaps twice", twins)
    print_reasons("left out", unfinished)
    print_reasons("dropped", {name: why for record in records for name, why in record["dropped"].items()}, most=3)
    print_reasons("not kept", failures)
    return len({*failures, *flawed})


def print_status(broken, empty):
    """Prints why the run ends with another exit status than 0, and returns the status.

    broken: how many videos are not whole in the dataset. empty: whether the whole dataset holds no clip.
    """
    if broken:
        are = "is" if broken == 1 else "are"
        print(f"exit status 1: {counted(broken, 'video')} {are} not whole in the dataset, see above")
    elif empty:
        print("exit status 2: the dataset holds no clip, see above")
    return 1 if broken else 2 * empty


def print_left_out(records, options):
    """Prints what --max_frames and the crop leave out of the videos with these records."""
    total, left = (sum(record[key] for record in records) for key in ("frames", "left_out"))
    if left:
        rate = f" at --fps {options.fps:g}" if options.fps else ""
        cure = "" if options.clip_frames else f"; --clip_frames {options.max_frames} cuts whole videos into clips"
        print(f"--max_frames {options.max_frames}: {left:,} of {counted(total, 'frame')}{rate} left out{cure}")
    if options.width:
        sizes = [(record["width"], record["height"]) for record in records if record["width"]]
        for line in describe_crops(sizes, options.width, options.height, MULTIPLE, "video"):
            print(f"warning: {line}")


def print_next(options, clips):
    """Prints what to look at, and the command of the next step, which works as it is: only MODEL is to be filled in.

    Where the command cannot be what one would expect, a line before it says why.
    """
    frames = min(FRAMES, max(clip["num_frames"] for clip in clips))
    look = f"look at {shlex.quote(os.path.join(options.output_dir, 'preview.jpg'))}"
    if frames < 2:
        print(f"{look}; no clip has 2 frames, and train_svd.py needs clips of that many at least")
        return
    command = ["--dataset_dir", options.output_dir, "--output_dir", "./outputs", "--num_frames", str(frames)]
    if options.width:
        size = [max(1, round(side / MULTIPLE)) * MULTIPLE for side in (options.width, options.height)]
        command += ["--width", str(size[0]), "--height", str(size[1])]
        if size != [options.width, options.height]:
            near = f"{size[0]}x{size[1]} is the nearest to {options.width}x{options.height}"
            print(f"SVD is trained at multiples of {MULTIPLE}: {near}; train_svd.py fits the frames to it")
    groups = [len(group) for group in group_clips([c for c in clips if c["num_frames"] >= frames]).values()]
    # Whole groups are held out, in a random order, and one of them must be left to train on.
    if held_out := min(HELD_OUT, sum(groups) - max(groups)):
        command += ["--num_validation_videos", str(held_out)]
    else:
        print("nothing can be held out: all clips that training can use are of one recording, or of one image")
    command = shlex.join(["python", "train_svd.py", "--pretrained_model_name", "MODEL", *command])
    print(f"{look}; next: {command}")
