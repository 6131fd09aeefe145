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

import contextlib
import itertools
import math
import re
import shutil
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import cv2

from svd_parts.console import Parser, number, progress_bar, run_script
from svd_parts.cuts import average_fps, cut_clips, place_episodes
from svd_parts.dataset import list_frames
from svd_parts.decode import DecodeAgain, Decoded, find_damage, hear_opencv, read_ffmpeg, read_opencv
from svd_parts.ffmpeg import Failure
from svd_parts.files import UserError, frozen, lock_shard, parse_shard, read_patterns, tidy, write_file
from svd_parts.find import find_twins, find_videos
from svd_parts.frame_writer import FrameWriter, has_isal
from svd_parts.lerobot import lerobot_fields
from svd_parts.lerobot_actions import write_actions
from svd_parts.lerobot_images import probe_images, read_images
from svd_parts.metrics import clip_motion, motion_bucket, motion_stride
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
from svd_parts.summary import print_left_out, print_next, summarize


class Run:
    """What the threads of a run share: options, folders, the encoders, the progress bar, the stop sign."""

    def __init__(self, options, videos, heard):
        self.options = options
        self.output = Path(options.output_dir)
        self.state = self.output / ".prepare"  # a record for each finished video, and the folders being written
        self.work = self.state / ("work" + options.shard.name)
        self.readers = max(1, min(options.num_workers, len(videos)))
        self.encoders = ThreadPoolExecutor(options.num_workers)
        self.huge, self.heard = threading.Lock(), heard
        self.bar = progress_bar("preparing", "frame")
        self.waiting, self.expected, self.begun = len(videos), 0, 0
        self.found, self.no_videos = [], {}  # (frames, left out, size) of each video; what only looked like one
        self.stop, self.lock = threading.Event(), threading.Lock()

    def expect(self, frames):
        """A video that has begun has so many frames; each that waits counts as the mean of these in the bar's total."""
        with self.lock:
            self.begun, self.expected = self.begun + 1, self.expected + frames
            self.bar.total = self.expected + round(self.waiting * self.expected / self.begun)


def decode_video(video, probe, episodes, reader, threads, stride, run):
    """Writes a video's clips below `run.work`; returns `{directory: Clip}` and what the reader found (`Decoded`)."""
    decoded, before = Decoded(), run.heard()
    frames, writer = reader(video, probe, run.options, threads, decoded), FrameWriter(video, stride, run)
    try:
        for time, frame, names in cut_clips(frames, video, episodes, run.options):
            if run.stop.is_set():
                raise Failure("stopped, as the run is: nobody waits for this video any more")
            writer.add(time, frame, names)
        clips = writer.finish()
        decoded.flaws = writer.flaws
    finally:
        frames.close()
        wait(writer.jobs)  # nothing writes into the folders any more, whatever happened
    if reader is read_opencv and run.heard() > before and find_damage(video, probe, run.options, threads):
        raise DecodeAgain("OpenCV conceals damage")
    if reader is read_ffmpeg and threads > 1 and decoded.errors:
        raise DecodeAgain("how damage is concealed depends on the number of threads")
    return clips, decoded


def prepare_video(video, run, old):
    """Does one video unless the record of an earlier run says that it is done; returns its record.

    Raises `Failure` where it gives nothing.
    """
    options = run.options
    status = check_file(video)
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if old:
        changed = any(old[key] != value for key, value in stamp.items())
        if changed and not options.overwrite:
            raise Failure("changed since it was prepared, the dataset holds what it was: --overwrite makes it again")
        if not changed and old["options"] == clip_options(options) and is_complete(old, run.output):
            return old
        for clip in old["clips"]:
            refuse_others(run.output / clip["directory"], clip["num_frames"], "action_names" in clip)
    first_only = options.max_frames and not options.fps and video.episodes is None
    if video.images:
        probe, episodes = probe_images(video)
        first_only = False
    else:
        probe = probe_video(video, options.max_frames + 64 if first_only else None)
        episodes = place_episodes(video, probe)
    wanted = min(options.max_frames or probe.packets, probe.packets)
    run.expect(wanted)
    times = (probe.times or [])[: options.max_frames if first_only else None]  # of the last listed some may be missing
    fps, _, uneven = average_fps(times, probe.fps)
    stride = motion_stride(min(fps, options.fps or fps))
    threads = max(1, options.num_workers // run.readers)
    attempts = [(read_opencv, threads)] * (opencv_is_right(video, probe) and not options.width)
    attempts += [(read_ffmpeg, threads)] * (threads > 1) + [(read_ffmpeg, 1)]
    attempts = [(read_images, 1)] if video.images else attempts
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
        probe.problems.append(f"damaged: {[*find_damage(video, probe, options, 1), *decoded.errors][0]}")
    kept = average_fps(next(iter(clips.values())).times, probe.fps, options.fps)[0]
    probe.notes += dict.fromkeys([*decoded.notes, *decoded.flaws.notes(kept), *filter(None, [uneven])])
    run.found.append((probe.total, max(0, probe.total - decoded.frames) if first_only else 0, probe.size))
    record = {"source": video.source, **stamp, "options": clip_options(options), "clips": [], "dropped": {}}
    for directory, clip in clips.items():
        line = describe_clip(directory, clip, video, probe, stride, options)
        line["decoder"] = "ffmpeg" if reader is read_ffmpeg else "opencv"
        write_actions(clip, line, video, episodes, options.action_key)
        line.update({key: getattr(probe, key) for key in ("codec", "truncated", "problems", "notes")})
        if line["num_frames"] < options.min_frames:
            record["dropped"][directory] = f"{line['num_frames']} frames, shorter than {options.min_frames} frames"
        elif line["motion"] < options.min_motion:
            record["dropped"][directory] = f"motion {line['motion']:g}, moving less than {options.min_motion:g}"
        else:
            record["clips"].append(line)
    publish(video, record, old, run)
    return record


def describe_clip(directory, clip, video, probe, stride, options):
    """The clip's line in metadata.jsonl, so far as it is the clip's own."""
    fps, holes, _ = average_fps(clip.times, probe.fps, options.fps)
    if clip.flows:
        motion = statistics.fmean(clip.flows) * fps / stride
    else:  # shorter than the stride
        motion = clip_motion([common.read_image(path) for path in list_frames(clip.folder)], fps)
    episode = re.search(r"@(episode_\d+)", directory) if video.episodes or video.images else None
    group = video.known.get("group") or video.group + (episode[1] if episode else "")
    return {
        "directory": directory,
        "source": video.source,
        "group": group,
        **{key: value for key, value in video.known.items() if key != "group"},
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
    if not run.options.shard.name:  # shards write the file at the end: appending is not safe between machines
        new = [clip for clip in record["clips"] if clip["directory"] not in owned]  # of the others there is a line
        with run.lock:
            for path in (run.state / "written.jsonl", run.output / "metadata.jsonl"):
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(map(dump_line, new)))


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
    if args.fast_png and not has_isal():
        parser.error("--fast_png needs: pip install isal")
    args.min_frames = args.min_frames or args.clip_frames or 1
    args.include = read_patterns(args.include, "--include")
    args.exclude = read_patterns(args.exclude, "--exclude")
    return frozen(args)


def run_all(videos, records, options, heard):
    """Prepares the videos side by side; adds to `records`; returns the `Run`, and `{source: reason}` of failures."""
    run, failures = Run(options, videos, heard), {}
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
                video, reason = jobs[job], str(failure)
                (run.no_videos if video.guessed and "no video track" in reason else failures)[video.source] = reason
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
    return run, failures


def main(argv=None):
    options = parse_args(argv)
    cv2.setNumThreads(1)  # the threads of this program take the cores
    videos, unfinished = find_videos(options)
    twins = find_twins(videos)
    videos = [video for video in videos if options.shard.holds(video.source)]
    if not videos:
        print("--shard {}/{}: none of the videos falls to it".format(*options.shard))
    output = Path(options.output_dir)
    state = output / ".prepare"
    state.mkdir(parents=True, exist_ok=True)
    busy = f"--output_dir {output}: another run is at work on it"
    with lock_shard(state, options.shard, busy):
        if not options.shard.name:  # alone here: what a killed run left half written goes
            ours = output.glob(".metadata.jsonl.*.part"), output.glob(".preview.jpg.*.part"), state.glob(".*.part")
            tidy([*itertools.chain(*ours), *filter(Path.is_dir, state.iterdir())])
        read_clip_lines(output)  # refused now, not after hours of work
        old = read_records(state)
        other = next((r["options"] for r in old.values() if r["options"] != clip_options(options)), None)
        if other and not options.overwrite:
            named = ", ".join(
                f"--{key} {value}" for key, value in other.items() if clip_options(options).get(key) != value
            )
            raise UserError(f"--output_dir {output} was made with {named}: do the same, or add --overwrite")
        if not options.shard.name:
            write_metadata(output)  # what will be added must not follow half a line of a killed run
        with hear_opencv() as heard:
            run, failures = run_all(videos, dict(old), options, heard)
        records, before = write_metadata(output), None
        while records != before:  # another part may have ended meanwhile: the last one writes all
            clips = [clip for record in records.values() for clip in record["clips"]]
            clips.sort(key=lambda clip: by_name(clip["directory"]))
            if clips and (records != old or not (output / "preview.jpg").exists()):
                write_preview(output, clips)
            before, records = records, write_metadata(output)
    chosen = [records[video.source] for video in videos if video.source in records]
    gone = [
        source for source in records if not os.path.lexists(os.path.join(options.video_dir, source.partition("#")[0]))
    ]
    whole = summarize(chosen, failures, {**unfinished, **run.no_videos}, twins, gone)
    print_left_out(run.found, options)
    if not any(record["clips"] for record in chosen):
        return 2 if chosen and not failures else int(not whole)
    print_next(options, records.values())
    return 0 if whole else 1


if __name__ == "__main__":
    run_script(main)
