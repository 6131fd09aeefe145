"""Turns a folder of videos into a dataset: a folder of images for each clip, and a line for it in metadata.jsonl.

    python prepare_dataset.py --video_dir ./videos --output_dir ./dataset --max_frames 25

After a stop, run the same command again: it prepares the videos that are still missing. Exit status 0 means that every
video is whole in the dataset, or dropped as the options say. 1: some are not, and each is named with its reason. 2: an
option is wrong, or no video failed and the whole dataset holds no clip; one part of a --shard may be without clips.

The way of one video: `find_videos` -> `probe_video` (ffmpeg lists its packets and shows its key frames) ->
`read_opencv`, or `read_ffmpeg` where OpenCV is known to be wrong or misses frames -> `cut_clips` -> `FrameWriter`
(threads encode the images) -> `publish` (writes the record, moves the folders in, adds lines to metadata.jsonl).
"""

import os

os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "16"  # errors, for `hear_opencv`; cv2 reads this at its import
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"

import svd_common as common  # isort: skip  (comes first: it gives the cure where OpenCV cannot be loaded)

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
from svd_parts.cuts import average_fps, count_left_out, cut_clips, place_episodes
from svd_parts.dataset import list_frames
from svd_parts.decode import DecodeAgain, Decoded, find_damage, hear_opencv, read_ffmpeg, read_opencv
from svd_parts.ffmpeg import Failure
from svd_parts.files import UserError, counted, frozen, lock_shard, parse_shard, read_patterns, tidy, write_file
from svd_parts.find import find_twins, find_videos
from svd_parts.frame_writer import FrameWriter, has_isal
from svd_parts.lerobot import lerobot_fields
from svd_parts.lerobot_actions import check_action_key, print_actions, write_actions
from svd_parts.lerobot_images import probe_images, read_images
from svd_parts.metrics import clip_motion, motion_bucket, motion_stride
from svd_parts.probe import check_file, opencv_is_right, probe_video
from svd_parts.records import clip_options, dump_line, earlier_records, is_current, still_holds, write_tables
from svd_parts.summary import clips_there, print_left_out, print_next, print_others, print_status, summarize

# One video: decode, cut, write, publish


class Run:
    """What the threads of a run share: options, folders, encoders, the progress bar and the signal to stop."""

    def __init__(self, options, videos, heard):
        self.options = options
        self.output = Path(options.output_dir)
        self.state = self.output / ".prepare"  # a record for each finished video, and the folders being written
        self.work = self.state / ("work" + options.shard.name)
        self.readers = max(1, min(options.num_workers, len(videos)))
        self.encoders = ThreadPoolExecutor(options.num_workers)
        self.huge_video, self.heard = threading.Lock(), heard
        self.bar = progress_bar("preparing", "frame", delay=0.1)  # so a run with nothing to do shows none
        self.waiting, self.expected, self.begun = len(videos), 0, 0
        self.no_videos = {}  # {source: reason} of files that only looked like videos
        self.again = []  # the videos whose record still holds, while a folder of it does not
        self.stop, self.lock = threading.Event(), threading.Lock()

    def expect(self, frames):
        """Adds the frames of a video that begins to the bar's total. A video that still waits counts as their mean."""
        with self.lock:
            self.begun, self.expected = self.begun + 1, self.expected + frames
            self.bar.total = self.expected + round(self.waiting * self.expected / self.begun)


def decode_video(video, probe, episodes, stride, run):
    """Writes a video's clips below `run.work`. Returns `{directory: Clip}`, the reader's `Decoded` and its name.

    Tries OpenCV where it is known to be right, then ffmpeg with several threads, then ffmpeg with one.
    """
    threads = max(1, run.options.num_workers // run.readers)
    attempts = [(read_opencv, threads)] * (opencv_is_right(video, probe) and not run.options.width)
    attempts += [(read_ffmpeg, threads)] * (threads > 1) + [(read_ffmpeg, 1)]
    attempts = [(read_images, 1)] if video.images else attempts
    with run.huge_video if math.prod(probe.size) > 1 << 24 else contextlib.nullcontext():  # one 8K video at a time
        for reader, threads in attempts:
            try:
                clips, decoded = try_reader(reader, threads, video, probe, episodes, stride, run)
                return clips, decoded, "ffmpeg" if reader is read_ffmpeg else "opencv"
            except DecodeAgain:
                shutil.rmtree(run.work / video.directory, ignore_errors=True)


def try_reader(reader, threads, video, probe, episodes, stride, run):
    """Does `decode_video` by one reader. Raises `DecodeAgain` where its frames may be wrong."""
    decoded, before = Decoded(), run.heard()
    frames, writer = reader(video, probe, run.options, threads, decoded), FrameWriter(video, stride, run)
    try:
        for time, frame, names in cut_clips(frames, video, episodes, run.options):
            if run.stop.is_set():
                raise Failure("the run is stopping")
            writer.add(time, frame, names)
        clips = writer.finish()
        decoded.flaws = writer.flaws
    finally:
        frames.close()
        wait(writer.jobs)  # after an error, too, no thread may write into these folders any more
    if reader is read_opencv and run.heard() > before and find_damage(video, probe, run.options, threads):
        raise DecodeAgain("OpenCV conceals damage")
    if reader is read_ffmpeg and threads > 1 and decoded.errors:
        raise DecodeAgain("how damage is concealed depends on the number of threads")
    return clips, decoded


def prepare_video(video, run, old):
    """Prepares one video and returns its record. `old`, the record of an earlier run, is returned where it still holds.

    Raises `Failure` with the reason where the video gives no clip.
    """
    options = run.options
    status = check_file(video)
    stamp = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if old and still_holds(old, stamp, run.output, options):
        return old
    first_only = options.max_frames and not options.fps and video.episodes is None and not video.images
    if video.images:
        probe, episodes = probe_images(video)
    else:
        probe = probe_video(video, options.max_frames + 64 if first_only else None)
        episodes = place_episodes(video, probe)
    wanted = min(options.max_frames or probe.packets, probe.packets)
    run.expect(wanted)
    # Where only the first packets were listed, the last of them are not in order yet.
    times = (probe.times or [])[: options.max_frames if first_only else None]
    fps, _, uneven = average_fps(times, probe.fps)
    stride = motion_stride(min(fps, options.fps or fps))
    clips, decoded, decoder = decode_video(video, probe, episodes, stride, run)
    if not clips:
        raise Failure("no frame of it can be decoded" + (f" ({decoded.said})" if decoded.said else ""))
    if decoded.errors and decoded.frames < wanted:
        probe.truncated = True
        probe.problems.append(f"{decoded.frames} of {wanted} frames could be decoded")
    if decoded.errors:
        probe.problems.append(f"damaged: {[*find_damage(video, probe, options, 1), *decoded.errors][0]}")
    kept = average_fps(next(iter(clips.values())).times, probe.fps, options.fps)[0]
    probe.notes += dict.fromkeys([*decoded.notes, *decoded.flaws.notes(kept), *filter(None, [uneven])])
    record = {"source": video.source, **stamp, "options": clip_options(options), "clips": [], "dropped": {}}
    record["frames"], record["left_out"] = count_left_out(probe, episodes, options.fps, options.max_frames)
    record["width"], record["height"] = probe.size
    for directory, clip in clips.items():
        line = describe_clip(directory, clip, video, probe, stride, options)
        line["decoder"] = decoder
        write_actions(clip, line, video, episodes, options.action_key)
        line.update({key: getattr(probe, key) for key in ("codec", "truncated", "problems", "notes")})
        if line["num_frames"] < options.min_frames:
            frames = counted(line["num_frames"], "frame")
            record["dropped"][directory] = f"{frames}, shorter than {options.min_frames} frames"
        elif line["motion"] < options.min_motion:
            record["dropped"][directory] = f"motion {line['motion']:g}, moving less than {options.min_motion:g}"
        else:
            record["clips"].append(line)
    publish(video, record, old, run)
    if old and is_current(old, stamp, options):
        run.again.append(video.source)
    return record


def describe_clip(directory, clip, video, probe, stride, options):
    """The line of a clip in metadata.jsonl; `prepare_video` adds the fields that are the same for the whole video.

    Times are in seconds, sizes in pixels, `motion` in % of the longer side a second.
    """
    fps, holes, _ = average_fps(clip.times, probe.fps, options.fps)
    if clip.flows:
        motion = statistics.fmean(clip.flows) * fps / stride
    else:  # the clip is shorter than the stride
        motion = clip_motion([common.read_image(path) for path in list_frames(clip.folder)], fps)
    episode = re.search(r"@(episode_\d+)", directory) if video.episodes or video.images else None
    group = video.group + (episode[1] if episode else "")
    return {
        "directory": directory, "source": video.source, "group": group,
        "recording": video.digest + (episode[0] if episode else ""),  # the same wherever and however it is prepared
        **video.known, **lerobot_fields(video, group),
        "fps": fps, "num_frames": len(clip.times), "width": clip.shape[1], "height": clip.shape[0],
        "start": round(clip.times[0], 3), "duration": round(clip.times[-1] - clip.times[0] + 1 / fps, 3),
        "holes": [round(hole, 3) for hole in holes],
        "motion": round(motion, 3), "motion_bucket_id": motion_bucket(motion),
    }  # fmt: skip


def publish(video, record, old, run):
    """Makes a finished video part of the dataset: writes its record, moves its folders in, then adds their lines.

    A rename moves a folder, so a folder is whole or not there. After a kill at any point, the next run finds a record
    whose folders are not all there, and prepares that video again.
    """
    owned = {clip["directory"] for clip in (old or {}).get("clips", [])}
    for clip in record["clips"]:
        if clip["directory"] not in owned and os.path.lexists(run.output / clip["directory"]):
            raise Failure(f"{run.output / clip['directory']} exists, and this program did not make it: move it away")
    for directory in owned:
        if (run.output / directory).exists():
            os.replace(run.output / directory, run.work / video.directory / f"{directory}.old")
    write_file(run.state / f"{video.directory}.json", dump_line(record))
    for clip in record["clips"]:
        os.replace(run.work / video.directory / clip["directory"], run.output / clip["directory"])
    with contextlib.suppress(OSError):  # it shows the old clips; the end of the run makes a new one
        (run.output / "preview.jpg").unlink()
    if not run.options.shard.name:  # machines cannot safely append to one file: a shard writes it at its end
        new = [clip for clip in record["clips"] if clip["directory"] not in owned]  # the others have their lines
        with run.lock:
            for path in (run.state / "written.jsonl", run.output / "metadata.jsonl"):
                with open(path, "a", encoding="utf-8") as file:
                    file.write("".join(map(dump_line, new)))


# Command line


def build_parser():
    parser = Parser(description=__doc__.split("\n\n")[0])
    count, cores = number(int, 1), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument_group("in and out").add_argument
    add("--video_dir", required=True, help="folder of videos, searched with its subfolders; never written to")
    add("--output_dir", required=True, help="the dataset's folder, a new one or one to continue")
    add("--overwrite", action="store_true", help="prepare again what changed since: videos or options")

    add = parser.add_argument_group("which videos").add_argument
    several = {"nargs": "+", "action": "extend", "default": []}
    names = "take only these videos, as 'demo_*.mp4'; @FILE is a list of names, one a line"
    add("--include", **several, metavar="PATTERN", help=names)
    add("--exclude", **several, metavar="PATTERN", help="leave these videos out; patterns and @FILE as for --include")
    add("--camera", **several, help="take only these cameras of a LeRobot dataset, by name or its end")

    add = parser.add_argument_group("which frames make a clip").add_argument
    add("--max_frames", type=count, help="frames to take from each video at most (default: all)")
    add("--fps", type=number(float, 1e-5), help="frames a second to keep; a slower video keeps all its frames")
    add("--clip_frames", type=count, help="cut each video into clips of this many frames")
    add("--clip_stride", type=count, help="frames from one clip's start to the next (default: --clip_frames)")
    add("--split_scenes", action="store_true", help="cut where the shot changes, so that no window crosses a cut")
    add("--min_frames", type=count, help="drop shorter clips (default: --clip_frames, or 1)")
    add("--min_motion", type=number(float, 0), default=0.0, help="drop stiller clips; %% of the longer side a second")

    add = parser.add_argument_group("what a clip holds").add_argument
    add("--width", type=number(int, 16), help="pixels; with --height: cover this size, then crop the centre")
    add("--height", type=number(int, 16), help="pixels")
    add("--image_format", choices=("png", "jpg"), default="png", help="png is lossless; jpg (95) a quarter the time")
    acts = "the LeRobot column that goes into actions.npy, for train_svd.py --condition_on actions (default action)"
    add("--action_key", default="action", metavar="KEY", help=acts)

    add = parser.add_argument_group("speed, and several machines").add_argument
    add("--num_workers", type=count, default=cores, help="encoding threads (default: one a core, here %(default)s)")
    add("--fast_png", action="store_true", help="insist on isal, which writes PNG in a third of the time")
    shard = "prepare part I of N, so that N machines share the work; I from 0 to N-1, or from 1 to N"
    add("--shard", metavar="I/N", type=parse_shard, default="0/1", help=shard)
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


# The run: all videos, then the dataset's tables and the summary


def run_all(videos, records, options, heard):
    """Prepares the videos side by side and adds their records to `records`. Returns the `Run` and `{source: reason}` of
    the videos that failed."""
    run, failures = Run(options, videos, heard), {}
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir()

    def prepare(video):
        with run.lock:
            run.waiting -= 1
        try:
            return prepare_video(video, run, records.get(video.source))
        finally:
            shutil.rmtree(run.work / video.directory, ignore_errors=True)

    readers = ThreadPoolExecutor(run.readers)
    try:
        jobs = {readers.submit(prepare, video): video for video in videos}
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
    check_action_key(videos, options.action_key)
    twins, chosen = find_twins(videos), {*unfinished, *(video.source for video in videos)}
    videos = [video for video in videos if options.shard.holds(video.source)]
    if not videos:
        print("--shard {}/{}: none of the videos falls to this part".format(*options.shard))
    output = Path(options.output_dir)
    state = output / ".prepare"
    state.mkdir(parents=True, exist_ok=True)
    busy = f"--output_dir {output}: another run is at work on it"
    with lock_shard(state, options.shard, busy):
        if not options.shard.name:  # no other run is at work here: remove what a killed run left half written
            ours = output.glob(".metadata.jsonl.*.part"), output.glob(".preview.jpg.*.part"), state.glob(".*.part")
            tidy([*itertools.chain(*ours), *filter(Path.is_dir, state.iterdir())])
        old = earlier_records(output, options)
        with hear_opencv() as heard:
            run, failures = run_all(videos, dict(old), options, heard)
        records = write_tables(output, old)
    mine = [records[video.source] for video in videos if video.source in records]
    broken = summarize(mine, failures, {**unfinished, **run.no_videos}, twins, run.again)
    print_others(records.values(), chosen, options)
    print_actions(videos, records, output, options.action_key)
    print_left_out(mine, options)
    clips = [clip for record in records.values() for clip in clips_there(record, output)]
    status = print_status(broken, empty=not clips and not options.shard.name)  # the other parts may have clips
    if clips:
        print_next(options, clips)
    return status


if __name__ == "__main__":
    run_script(main)
