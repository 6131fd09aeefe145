"""The actions of a LeRobot dataset, versions 2.1 and 3.0, at the times of a clip's frames."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from svd_parts.ffmpeg import Failure
from svd_parts.files import UserError, read_json
from svd_parts.lerobot import lerobot_match

ACTIONS_FILE = "actions.npy"


@functools.cache
def action_feature(root, key):
    """What meta/info.json says of the column `key`: {"shape", "names", ...}; None where there is none to read."""
    info = Path(root, "meta", "info.json")
    feature = (read_json(info, "repair it").get("features") or {}).get(key) if info.is_file() else None
    if feature is None and key != "action":
        raise UserError(f"--action_key {key}: {info} has no such feature")
    if feature and (len(feature.get("shape") or []) != 1 or feature.get("dtype") in ("video", "image", "string")):
        raise UserError(f"--action_key {key}: {info} says that it is no row of numbers")
    if feature and importlib.util.find_spec("pyarrow") is None:
        print(f"warning: the clips of {root} go without their actions: pip install pyarrow, which reads them")
        return None
    return feature


@functools.lru_cache(maxsize=4)
def read_rows(path, key):
    """A parquet file of data -> (episode, seconds, rows): (N,), (N,), (N, A) float32."""
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=["episode_index", "timestamp", key])
        columns = [table[name].combine_chunks() for name in table.column_names]
        rows = np.array(columns[2].to_pylist(), np.float32)
        return np.array(columns[0]), np.array(columns[1], np.float64), rows.reshape(len(rows), -1)
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are among these
        raise UserError(f"{path}: its {key} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


@functools.cache
def data_files(root):
    """LeRobot v3: {episode: the parquet file of its rows}."""
    from pyarrow import parquet

    files, columns = {}, ["episode_index", "data/chunk_index", "data/file_index"]
    for table in sorted(Path(root, "meta", "episodes").rglob("[!.]*.parquet")):
        for row in parquet.read_table(table, columns=columns).to_pylist():
            episode, chunk, file = row.values()
            files[episode] = Path(root, "data", f"chunk-{chunk:03d}", f"file-{file:03d}.parquet")
    return files


def actions_at(root, episode, times, key, early=0.0):
    """The rows of an episode at `times`, seconds since its first frame: (T, A) float32, and the names of the columns.

    early: by how many frames the clock starts before the first frame. None where the dataset has no actions. Raises
    `UserError` where it says that it has, and they are not there.
    """
    feature = action_feature(root, key)
    if feature is None:
        return None
    path = next(Path(root, "data").glob(f"chunk-*/episode_{episode:06d}.parquet"), None)  # version 2
    if path is None:
        path = data_files(root).get(episode)
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
        raise UserError(
            f"{path}: episode {episode} has {key} for {seconds[-1]:.1f} s, its video lasts {times[-1]:.1f} s"
        )
    return rows[place], feature.get("names")


def write_actions(clip, line, video, places, key):
    """Writes actions.npy into the folder of a clip, where its dataset has actions, and their names into its line.

    clip: with `folder` and `times`, seconds in its video; places: what `place_episodes` gives for the video.
    """
    match = lerobot_match(video.path)
    if not match:
        return
    episode = line["episode_index"]
    start = next((begin for begin, _, number in places or [] if number == episode), 0.0)
    try:
        times = np.array(clip.times) - start  # a place begins half a frame before its first one
        found = actions_at(match["root"], episode, times, key, early=0.5 if places else 0)
    except UserError as error:
        raise Failure(str(error)) from None
    if found is not None:
        np.save(clip.folder / ACTIONS_FILE, found[0])
        line["action_names"] = found[1]
