"""Reads the actions of a LeRobot dataset, versions 2.1 and 3.0, at the times of a clip's frames."""

import contextlib
import functools
import importlib.util
import os
from pathlib import Path

import numpy as np

from svd_parts.actions import FILE, read_actions
from svd_parts.ffmpeg import Failure
from svd_parts.files import UserError, counted, listed, read_json
from svd_parts.lerobot import lerobot_match, read_episodes


def root_of(video):
    """The folder of the LeRobot dataset that a video is of, with a slash at its end; "" for any other video."""
    if video.images:
        return video.path.replace(os.sep, "/").rpartition("/data/")[0] + "/"
    match = lerobot_match(video.path)
    return match["root"] if match else ""


@functools.cache
def find_feature(root, key):
    """What meta/info.json says of the column `key`, {"shape", "names", ...}, and why the clips get no actions, or "".

    Raises `UserError` where another key than `action` names no column, or one that is no row of numbers.
    """
    info = Path(root, "meta", "info.json")
    features = read_json(info, "repair it").get("features") if info.is_file() else {}
    features = features if isinstance(features, dict) else {}
    feature, why = features.get(key), ""
    if not info.is_file():
        why = f"{info} is missing: copy it again"
    elif not isinstance(feature, dict):
        kinds = {name: str(found.get("dtype")) for name, found in features.items() if isinstance(found, dict)}
        rows = [name for name, kind in kinds.items() if kind.startswith("float")]
        why = f"{info} has no such feature" + (f"; these are rows of numbers: {listed(rows)}" if rows else "")
    elif len(feature.get("shape") or []) != 1 or feature.get("dtype") in ("video", "image", "string"):
        why = f"{info} says that this is no row of numbers"
    if why and key != "action":  # somebody asked for it
        raise UserError(f"--action_key {key}: {why}")
    if why:
        return None, f"{key}: {why}"
    if importlib.util.find_spec("pyarrow") is None:
        print(f"warning: the clips of {root} get no actions: pip install pyarrow, which reads them")
        return None, "pip install pyarrow, which reads them"
    if not any(Path(root, "data").rglob("*.parquet")):
        return None, f"no .parquet in {Path(root, 'data')}"
    return feature, ""


def check_action_key(videos, key):
    """Raises `UserError`, before anything is decoded, where the LeRobot datasets of the videos have no column `key`."""
    roots = set(filter(None, map(root_of, videos)))
    if key != "action" and not roots:
        raise UserError(f"--action_key {key}: these videos have no columns, they are no LeRobot set; leave it out")
    for root in sorted(roots):
        find_feature(root, key)


@functools.lru_cache(maxsize=4)
def read_rows(path, key):
    """A parquet file of data/ -> its rows' episodes (N,), seconds (N,), `key` (N, A) float32. Raises `UserError`."""
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["episode_index", "timestamp", key])
        columns = [table[name].combine_chunks() for name in table.column_names]
        rows = np.array(columns[2].to_pylist(), np.float32)
        return np.array(columns[0]), np.array(columns[1], np.float64), rows.reshape(len(rows), -1)
    except (OSError, ValueError, KeyError, TypeError) as error:  # these include pyarrow's errors
        raise UserError(f"{path}: its {key} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


def actions_at(root, episode, times, key, early=0.0):
    """An episode's actions at `times`, seconds since its first frame: (T, A) float32, and the names of the columns.

    Returns None where the dataset has no actions. Raises `UserError` where it should have some and they are not there.
    early: by how many frames `times` begin before the first frame.
    """
    feature, _ = find_feature(root, key)
    if feature is None:
        return None
    path = next(Path(root, "data").glob(f"chunk-*/episode_{episode:06d}.parquet"), None)  # version 2
    if path is None and Path(root, "meta", "episodes").is_dir():
        path = read_episodes(root)[2].get(episode)
    if path is None:
        raise UserError(f"{root}: no file in data/ has the actions of episode {episode}; copy the dataset again")
    episodes, seconds, rows = read_rows(path, key)
    mine = episodes == episode
    seconds, rows = seconds[mine], rows[mine]
    if not len(rows):
        raise UserError(f"{path}: has no row of episode {episode}; copy it again")
    if not np.isfinite(rows).all():
        raise UserError(f"{path}: {key} of episode {episode} has values that are no numbers")
    gap = np.median(np.diff(seconds)) if len(seconds) > 1 else np.inf
    times = np.asarray(times) - (early * gap if early else 0)
    place = np.abs(np.subtract.outer(times, seconds)).argmin(1)  # the nearest
    if np.abs(seconds[place] - times).max() > 1.5 * gap:
        lasts = f"has {key} for {seconds[-1]:.1f} s, its video lasts {times[-1]:.1f} s"
        raise UserError(f"{path}: episode {episode} {lasts}")
    return rows[place], feature.get("names")


def write_actions(clip, line, video, places, key):
    """Writes actions.npy into the folder of a clip whose dataset has actions, and puts their names into its line.

    clip: its `folder` and its `times` in the video, in seconds, count. places: what `place_episodes` gives.
    Raises `Failure` where the actions cannot be read.
    """
    match = lerobot_match(video.path)
    if not match:
        return
    episode = line["episode_index"]
    start = next((begin for begin, _, number in places or [] if number == episode), 0.0)
    try:
        times = np.array(clip.times) - start  # a place begins half a frame before its first frame
        found = actions_at(match["root"], episode, times, key, early=0.5 if places else 0)
    except UserError as error:
        raise Failure(str(error)) from None
    if found is not None:
        np.save(clip.folder / FILE, found[0])
        line["action_names"] = found[1]


def print_actions(videos, records, output, key):
    """Prints in one line how many clips of LeRobot datasets have actions, and why the others have none."""
    clips = {}  # {a clip's file of actions: its video}
    for video in videos:
        if not any(root_of(video) and Path(root_of(video), part).is_dir() for part in ("meta", "data")):
            continue  # videos alone, though in LeRobot's folders, promise no actions
        found = records[video.source]["clips"] if video.source in records else []
        clips.update({output / clip["directory"] / FILE: video for clip in found})
    have = [path for path in clips if path.is_file()]
    without = sorted(clips.keys() - have)
    why = why_without(clips[without[0]], key) if without else ""
    if not have:
        return print(f"actions: none of {counted(len(clips), 'clip')} ({why})") if clips else None
    columns = ""
    with contextlib.suppress(UserError):  # somebody put another file there: training says what is wrong with it
        columns = ", " + counted(read_actions(have[0]).shape[1], "column")
    rest = f"; the others have none ({why}), and training needs them for all" if why else ""
    use = "train_svd.py --condition_on actions uses them"
    print(f"actions: {len(have)} of {counted(len(clips), 'clip')}{columns}{rest or '; ' + use}")


def why_without(video, key):
    """Why a clip of this video has no actions."""
    images = "of cameras that are images in parquet files they are not read" if video.images else ""
    older = "prepared before they were there: another --output_dir gets them"
    return find_feature(root_of(video), key)[1] or images or older
