"""Which frames make which clip: rates, shots, windows and episodes."""

import bisect
import collections
import itertools
import math
import statistics

import cv2
import numpy as np

from svd_parts.ffmpeg import Failure


def resample(frames, fps):
    """Yields the pair (seconds, frame) that is nearest to each tick of 1 / fps seconds. No frame
    is repeated to fill a gap."""
    start, best, gap, last = None, None, 0, 0
    for time, frame in frames:
        start = time if start is None else start
        position = (time - start) * fps
        tick = math.floor(position + 0.5)
        if best and best[0] != tick:
            yield best[2:]
            best = None
        if best is None or abs(position - tick) < best[1] - 1e-6:
            best = tick, abs(position - tick), time, frame
        gap, last = position - last, position
    if best and best[0] - (best[2] - start) * fps <= gap / 2 + 1e-6:  # else the nearest frame would come after the end
        yield best[2:]


CUT_LEAST, CUT_RATIO = 10, 2.5  # a cut changes the picture by 10 of 255, and 2.5 times as much as the changes near it
SHORTEST_SHOT = 5  # frames; also how many changes after a change are compared with it


def measure_changes(frames):
    """Yields ((seconds, frame), mean change since the frame before in levels of 255, seconds since that frame)."""
    before, last = None, None
    for time, frame in frames:
        step = max(1, min(frame.shape[:2]) // 96)
        small = cv2.resize(frame[::step, ::step], (48, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        yield (time, frame), (0 if last is None else float(np.abs(small - before).mean())), time - (last or 0)
        before, last = small, time


def number_scenes(frames):
    """Yields (scene, (seconds, frame)). The number rises where the shot changes, or where the timestamps have a hole.

    At a cut, the change between two frames is far larger than the changes before and after it. Where the camera or the
    scene moves, the changes near it are as large. No shot is shorter than `SHORTEST_SHOT` frames.
    """
    scene, changes, gaps, ahead = 0, [], [], collections.deque()
    for step in itertools.chain(measure_changes(frames), [None] * SHORTEST_SHOT):
        if step:
            ahead.append(step)
        if not ahead or (step and len(ahead) <= SHORTEST_SHOT):
            continue
        pair, change, gap = ahead.popleft()
        around = max([*changes[-8:], *(later for _, later, _ in ahead)], default=0)
        long_enough = len(changes) >= SHORTEST_SHOT and len(ahead) >= SHORTEST_SHOT - 1
        cut = long_enough and change > max(CUT_LEAST, CUT_RATIO * around)
        if cut or (changes and gap > max(1, 10 * max(gaps, default=gap))):
            scene, changes, gaps = scene + 1, [0], []
        else:
            gaps = [*gaps[-7:], gap] if changes else []
            changes.append(change)
        yield scene, pair


def place_episodes(video, probe):
    """Where the episodes of a LeRobot v3 file lie, `[(first second, end, episode)]`. None for other files.

    Counts frames where the episodes' lengths add up to the file's, because timestamps drift from episode to episode.
    Raises `Failure` where the timestamps in meta/episodes are not those of this file.
    """
    if video.episodes is None:
        return None
    times = probe.times or [number / (probe.fps or 25) for number in range(probe.packets)]
    twice = [episode for episode, count in collections.Counter(e[2] for e in video.episodes).items() if count > 1]
    if twice:
        raise Failure(f"meta/episodes names episode {twice[0]} twice in this file")
    half_gap = 0.5 / average_fps(times, probe.fps)[0]
    counted = sum(frames or 0 for *_, frames in video.episodes) == len(times)
    stop, places, short = 0, [], []
    for start, end, episode, frames in video.episodes:
        at = stop if counted else bisect.bisect_left(times, start - half_gap)
        stop = at + frames if frames else bisect.bisect_left(times, end - half_gap)
        if counted and at < len(times) and abs(times[at] - start) > 0.2 + 0.01 * start:
            raise Failure(f"meta/episodes: episode {episode} begins at {start:.1f} s, the frames say {times[at]:.1f} s")
        if at < len(times):
            places.append((times[at] - half_gap, times[stop] - half_gap if stop < len(times) else math.inf, episode))
        if at == len(times) or stop > len(times):
            short.append(str(episode))
    if not places:
        where = f"at {video.episodes[0][0]:.1f} s, and it ends at {times[-1]:.1f} s" if video.episodes else "nowhere"
        raise Failure(f"meta/episodes says that its episodes begin {where}")
    if short:
        probe.problems.append(f"episode {', '.join(short)}: fewer frames than meta/episodes says")
    return places


def episode_at(time, episodes):
    """The name of the episode that has the frame at `time` seconds, None between episodes; "" where there are none.

    episodes: what `place_episodes` gives.
    """
    if episodes is None:
        return ""
    begin, end, episode = episodes[max(0, bisect.bisect(episodes, (time, math.inf)) - 1)]
    return f"episode_{episode:06d}" if begin <= time < end else None


def count_left_out(probe, episodes, fps, max_frames):
    """(frames of the video at --fps, how many of them --max_frames leaves out), by the timestamps of its packets.

    episodes: what `place_episodes` gives; --max_frames is for each of them.
    """
    times = probe.times or []
    if len(times) < probe.total:  # a file without timestamps, or only its beginning was listed
        times = [number / (probe.fps or 25) for number in range(probe.total)]
    pairs, total, left_out = ((time, None) for time in times), 0, 0
    for episode, part in itertools.groupby(pairs, lambda pair: episode_at(pair[0], episodes)):
        if episode is not None:
            count = sum(1 for _ in (resample(part, fps) if fps else part))
            total, left_out = total + count, left_out + max(0, count - (max_frames or count))
    return total, left_out


def cut_clips(frames, video, episodes, options):
    """Yields (seconds, frame, names of its clips). A whole video is one clip. Windows of --clip_frames and shots of
    --split_scenes are called `name@0003`. A frame between LeRobot's episodes, or between windows, is of no clip.

    frames: pairs (seconds, (H, W, 3) uint8). episodes: what `place_episodes` gives.
    """
    numbers = itertools.count()
    for episode, part in itertools.groupby(frames, lambda pair: episode_at(pair[0], episodes)):
        if episode is None:
            continue
        part = resample(part, options.fps) if options.fps else part
        part = itertools.islice(part, options.max_frames)
        numbered = number_scenes(part) if options.split_scenes else ((0, pair) for pair in part)
        for _, shot in itertools.groupby(numbered, lambda pair: pair[0]):
            open_clips = []
            for index, (_, (time, frame)) in enumerate(shot):
                if index % (options.clip_stride or options.clip_frames or math.inf) == 0:
                    number = [f"{next(numbers):04d}"] if options.split_scenes or options.clip_frames else []
                    name = "@".join([video.directory, *([episode] if episode else []), *number])
                    open_clips.append((name, index + (options.clip_frames or math.inf)))
                open_clips = [(name, end) for name, end in open_clips if index < end]
                yield time, frame, [name for name, _ in open_clips]
        if episodes is None:
            return  # the frames after --max_frames need not be decoded


def average_fps(times, claim, chosen=None):
    """Timestamps in seconds -> (frames a second, lengths of the holes in seconds, a note or None).

    The rate is that of nearly all gaps. If the wider gaps are whole multiples of the usual gap, frames are missing, and
    the note says how many. If the gaps really vary, the rate is their mean without the holes, and the note says so.
    claim: the rate in the header, or 0. chosen: --fps, if the frames were taken at its ticks.
    """
    gaps = [b - a for a, b in zip(times, times[1:])]
    longest = max(1.0, 10 * statistics.median(gaps)) if gaps else 0
    steady, note = [gap for gap in gaps if 0 < gap <= longest], None
    if not sum(steady):
        return claim or chosen or 25.0, [], None

    def agree(fps, named):  # timestamps in whole milliseconds make the measured rate a little wrong
        return bool(named) and abs(fps - named) <= 0.01 * min(1, fps) + fps * 0.0015 / sum(steady)

    fps = len(steady) / sum(steady)
    if not agree(fps, chosen) and max(steady) > 1.5 * min(steady):
        usual = statistics.median_low(steady)
        steps = [max(1, round(gap / usual)) for gap in steady]
        missing = sum(steps) - len(steps)
        whole = sum(steps) / sum(steady)  # the rate if the wider gaps are missing frames
        likely = steps.count(1) >= 0.8 * len(steps) or agree(whole, claim)
        if likely and all(abs(gap - step * usual) < 0.2 * usual for gap, step in zip(steady, steps)):
            fps = whole
            note = f"{missing} of {len(times) + missing} frames are missing"
        else:
            note = f"its frames come {min(steady):.3g} to {max(steady):.3g} s apart, and the rate is the mean"
    fps = chosen if agree(fps, chosen) else claim if agree(fps, claim) else fps
    fps = round(fps, 3) if fps >= 1 else float(f"{fps:.6g}")  # six digits also for a picture an hour
    return fps, [gap for gap in gaps if gap > longest], note
