"""Reads LeRobot datasets of versions 2.1 and 3.0: episodes, tasks, cameras."""

import functools
import os
import re
from pathlib import Path

from svd_parts.files import UserError, parse_object, read_lines

LEROBOT_V2 = re.compile(r"(?P<root>.*/)videos/chunk-\d+/(?P<camera>[^/]+)/(?P<episode>episode_\d+)\.\w+")
LEROBOT_V3 = re.compile(r"(?P<root>.*/)videos/(?P<camera>[^/]+)/chunk-(?P<chunk>\d+)/file-(?P<file>\d+)\.\w+")
EPISODE_FIELDS = "chunk_index", "file_index", "from_timestamp", "to_timestamp"
EPISODE_COLUMNS = rf"videos/[^/]+/({'|'.join(EPISODE_FIELDS)})|data/.*_index|episode_index|length|tasks"


def lerobot_match(path):
    """The parts of a video's path in a LeRobot dataset as a match, or None. Its `root` ends with a slash."""
    path = str(path).replace(os.sep, "/")
    return LEROBOT_V3.fullmatch(path) or LEROBOT_V2.fullmatch(path)


@functools.cache
def read_episodes(root):
    """LeRobot v3: `{(camera, chunk, file): [(first second, end, episode, frames)]}`, `{episode: its tasks}`, and
    `{episode: the parquet file of data/ that has its rows}`.

    Raises `UserError` where pyarrow or the tables are missing, or a table is damaged.
    """
    why = f"{root} is a LeRobot v3 dataset, and each of its files holds several episodes. "
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(why + "To read where they begin: pip install pyarrow") from None

    tables = sorted(Path(root, "meta", "episodes").rglob("[!.]*.parquet"))
    if not tables:
        raise UserError(why + "meta/episodes/*/*.parquet says where they begin, and is missing: copy it again")
    episodes, tasks, files = {}, {}, {}
    for table in tables:
        try:
            columns = [name for name in parquet.read_schema(table).names if re.fullmatch(EPISODE_COLUMNS, name)]
            for row in parquet.read_table(table, columns=columns).to_pylist():
                tasks[int(row["episode_index"])] = row.get("tasks")
                if None not in (place := [row.get("data/chunk_index"), row.get("data/file_index")]):
                    name = "data/chunk-{:03d}/file-{:03d}.parquet".format(*place)
                    files[int(row["episode_index"])] = Path(root, name)
                for camera in {name.split("/")[1] for name in row if name.startswith("videos/")}:
                    chunk, file, start, end = (row[f"videos/{camera}/{field}"] for field in EPISODE_FIELDS)
                    if None not in (chunk, file, start, end):  # an episode may lack a camera
                        length = int(row.get("length") or 0) or None
                        episode = float(start), float(end), int(row["episode_index"]), length
                        episodes.setdefault((camera, int(chunk), int(file)), []).append(episode)
        except (OSError, ValueError, KeyError, TypeError) as error:  # these include pyarrow's errors
            raise UserError(f"{table}: not the episodes of a LeRobot dataset ({error}); copy it again") from None
    return episodes, tasks, files


@functools.cache
def read_lerobot(root):
    """The fields that all clips of a LeRobot dataset share, `{episode: its tasks}`, and `{camera: the video's info}`.

    Raises `UserError` for a file of meta/ that is damaged.
    """
    meta, damaged = Path(root, "meta"), "not a JSON object; repair it, or move it away"
    text = (meta / "info.json").read_text("utf-8-sig", "replace") if (meta / "info.json").exists() else "{}"
    info = parse_object(text, f"{meta / 'info.json'}: {damaged}")
    lines = read_lines(meta / "episodes.jsonl", damaged)  # version 2
    tasks = {line["episode_index"]: line.get("tasks") for _, line in lines if type(line.get("episode_index")) is int}
    known = {key: info[key] for key in ("robot_type", "generated") if info.get(key)}
    if (meta / "episodes").is_dir():  # version 3; files of version 2 may have been left beside it
        tasks = read_episodes(root)[1]
    features = info["features"] if isinstance(info.get("features"), dict) else {}
    videos = {name: feature.get("info") for name, feature in features.items() if isinstance(feature, dict)}
    return known, tasks, {name: found for name, found in videos.items() if isinstance(found, dict)}


def is_depth(video):
    """Whether info.json says that a video comes from a depth camera. It shows distances, of which SVD knows nothing."""
    info = video.lerobot[2].get(video.camera, {}) if video.lerobot else {}
    return any(info.get(key) is True for key in ("is_depth_map", "video.is_depth_map"))


def lerobot_fields(video, episode):
    """The fields of a LeRobot dataset that a clip's line in metadata.jsonl gets; {} for other videos.

    episode: a text that ends with its number, as `episode_000012`.
    """
    if not video.lerobot:
        return {}
    known, tasks, videos = video.lerobot
    known = {**known, **({"video_info": videos[video.camera]} if video.camera in videos else {})}
    episode = int(episode.rpartition("_")[2])
    task = tasks.get(episode) or ""
    task = "; ".join(map(str, task)) if isinstance(task, (list, tuple)) else str(task)
    return {"camera": video.camera, "episode_index": episode, **({"task": task} if task else {}), **known}
