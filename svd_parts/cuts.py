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
    """The frame nearest to each tick of 1/fps seconds, by timestamps; never one twice: no copy fills a gap."""
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
    if best and best[0] - (best[2] - start) * fps <= gap / 2 + 1e-6:  # or the tick's own frame would come after the end
        yield best[2:]


CUT_LEAST, CUT_RATIO = 10, 2.5  # a cut changes the picture by so much of 255, and by so many times what is around it
SHORTEST_SHOT = 5  # frames; as many changes after a change are looked at


def measure_changes(frames):
    """Yields ((seconds, frame), change of the picture since the frame before, of 255, and seconds since it)."""
    before, last = None, None
    for time, frame in frames:
        step = max(1, min(frame.shape[:2]) // 96)
        small = cv2.resize(frame[::step, ::step], (48, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
        yield (time, frame), (0 if last is None else float(np.abs(small - before).mean())), time - (last or 0)
        before, last = small, time


def number_scenes(frames):
    """Yields (scene, (seconds, frame)): the number rises where the shot changes, or where the timestamps have a hole.

    A cut is a change between two frames far larger than those before and after it: where the camera or the scene
    moves, the neighbours change as much. No shot is shorter than `SHORTEST_SHOT` frames.
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
    """`[(first second, end, episode)]` of the episodes in a LeRobot v3 file; None for other files.

    Where their numbers of frames add up to the file's, the frames are counted: the timestamps drift from episode to
    episode. Raises `Failure` where the timestamps are not those of this file.
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
        raise Failure(f"by meta/episodes its episodes begin {where}")
    if short:
        probe.problems.append(f"episode {', '.join(short)}: fewer frames than meta/episodes says")
    return places


def cut_clips(frames, video, episodes, options):
    """Yields (seconds, frame, names) with the names of the clips that the frame belongs to: one for a whole video;
    `name@0003` for the windows of --clip_frames and the shots of --split_scenes; none between LeRobot v3's episodes.

    `frames` are pairs (seconds, (H, W, 3) uint8), `episodes` is what `place_episodes` gives.
    """
    numbers = itertools.count()

    def episode_of(pair):
        if episodes is None:
            return ""
        begin, end, episode = episodes[max(0, bisect.bisect(episodes, (pair[0], math.inf)) - 1)]
        return f"episode_{episode:06d}" if begin <= pair[0] < end else None

    for episode, part in itertools.groupby(frames, episode_of):
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
            return  # --max_frames: what follows is not decoded


def average_fps(times, claim, chosen=None):
    """(rate, lengths of the holes in seconds, note or None) of timestamps in seconds.

    The rate is that of nearly all gaps: where all are whole multiples of the usual gap, frames are missing, and the
    note says how many. Where the gaps really vary, the rate is their mean, holes left out, and the note says so.
    claim: the rate in the header, 0 where there is none; chosen: --fps, to whose ticks the frames were taken.
    """
    gaps = [b - a for a, b in zip(times, times[1:])]
    longest = max(1.0, 10 * statistics.median(gaps)) if gaps else 0
    steady, note = [gap for gap in gaps if 0 < gap <= longest], None
    if not sum(steady):
        return claim or chosen or 25.0, [], None

    def agree(fps, named):  # timestamps in whole milliseconds leave an error that a named rate does not have
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
    fps = round(fps, 3) if fps >= 1 else float(f"{fps:.6g}")  # a picture an hour has a rate too
    return fps, [gap for gap in gaps if gap > longest], note
