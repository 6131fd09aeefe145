"""Writes the tables of a generated LeRobot dataset, version 3.0, from the records of its clips: one mp4 an episode."""

import json
import re
from pathlib import Path

import numpy as np

from svd_parts.files import UserError, read_json, replacing, write_file

DEFAULT_CAMERA, EPISODES_A_FOLDER = "observation.images.image", 1000  # the camera for images that no LeRobot clip has
LEROBOT_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
COLUMNS = {"timestamp": "float32", **dict.fromkeys(["frame_index", "episode_index", "index", "task_index"], "int64")}


def lerobot_info(clip):
    """What meta/info.json says of a set with this clip, given as a record or a job.

    lerobot merges only sets with equal robot_type, fps and features, which hold the `info` of the videos. Our `info` is
    what lerobot's `get_video_info` says of our mp4, with the keys of the real set, if the clip comes from one:
    version 0.4 has `video.is_depth_map`, and 0.6 has `is_depth_map`. Version 0.6 ignores the settings of the encoder.
    """
    shape = {"height": clip["height"], "width": clip["width"], "channels": 3}
    video = {**shape, "codec": "h264", "pix_fmt": "yuv420p", "fps": int(clip["fps"])}
    info = {**{f"video.{key}": value for key, value in video.items()}, "has_audio": False}
    real = clip.get("video_info") or {"is_depth_map": False}
    info |= {key: value for key, value in real.items() if key not in info and not ENCODER.fullmatch(key)}
    camera = {"dtype": "video", "shape": list(shape.values()), "names": list(shape), "info": info}
    columns = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in COLUMNS.items()}
    if rows := clip.get("action_rows"):
        columns["action"] = {"dtype": "float32", "shape": [len(rows[0])], "names": clip.get("action_names")}
    return {
        "codebase_version": "v3.0", "generated": True, "robot_type": clip.get("robot_type"), "fps": clip["fps"],
        "features": {clip.get("camera") or DEFAULT_CAMERA: camera, **columns},
        "chunks_size": EPISODES_A_FOLDER, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200,
        "data_path": f"data/{LEROBOT_FILE}.parquet", "video_path": f"videos/{{video_key}}/{LEROBOT_FILE}.mp4",
    }  # fmt: skip


ENCODER = re.compile(r"video\.(g|crf|preset|fast_decode|extra_options|video_backend)|audio\..*")


def warn_of_codec(images):
    """Warns where the real set's videos have another codec, because lerobot will not merge the two sets."""
    infos = (image["video_info"] for image in images if isinstance(image["video_info"], dict))
    codecs = {info.get("video.codec", "h264") for info in infos} - {"h264"}
    for codec in sorted(map(str, codecs)):
        cure = "lerobot-edit-dataset --operation.type reencode_videos --operation.rgb_encoder.vcodec h264"
        print(f"warning: the real videos are {codec}, these H.264; to merge the sets, re-encode the real one: {cure}")


def is_line(text):
    """Whether this is one line of text that can be written as UTF-8."""
    return isinstance(text, str) and text.splitlines() == [text] == [text.encode("utf-8", "ignore").decode()]


def check_lerobot(folder, jobs, records, settings):
    """Raises `UserError` where the clips of `jobs` and `records` cannot be one LeRobot set, or lack a field for it."""
    if settings.task and not is_line(settings.task):
        raise UserError("--task must be one line of text")
    for job in jobs:
        if not is_line(job["task"]):
            cure = 'give --task, as in --task "push the cube"'
            raise UserError(f"--output_format lerobot needs a task, one line of text, for {job['path']}: {cure}")
        if not isinstance(job["video_info"] or {}, dict):
            raise UserError(f"{job['path']}: its video_info in metadata.jsonl is no object; prepare the dataset again")
        for field in ("camera", "robot_type"):
            if job[field] and not (isinstance(job[field], str) and re.fullmatch(r"\w[\w. -]*", job[field])):
                raise UserError(f"{job['path']}: its {field} in metadata.jsonl is no name: {json.dumps(job[field])}")
    infos = [lerobot_info({**settings._asdict(), **job}) for job in jobs]
    infos += [lerobot_info(record) for record in records if record.get("output_format") == "lerobot"]
    if (path := folder / "meta" / "info.json").exists():
        infos.append(read_json(path, "give another --output_video"))
    different = [key for key, value in infos[0].items() if any(info.get(key) != value for info in infos)]
    if different:
        cure = "give another --output_video; prepare_dataset.py --camera takes one of several cameras"
        raise UserError(f"{folder}: all clips of a LeRobot set must have the same {' and '.join(different)}; {cure}")


def image_stats(frames):
    """(T, H, W, 3) uint8 -> LeRobot's statistics of an episode's colours, from 0 to 1, each of shape (3, 1, 1)."""
    pixels = np.ascontiguousarray(frames.reshape(-1, 3).T)
    stats = {name: getattr(pixels, name)(1) / 255 for name in ("min", "max", "mean", "std")}
    quantiles = np.percentile(pixels[:, ::7], [1, 10, 50, 90, 99], axis=1) / 255  # of every seventh pixel, for speed
    stats |= dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles))
    return {**{name: v.round(6).reshape(3, 1, 1).tolist() for name, v in stats.items()}, "count": [len(frames)]}


def table_stats(rows):
    """(T, A) numbers -> LeRobot's statistics of an episode's rows, each of shape (A,)."""
    rows = np.array(rows, np.float64)
    stats = {name: getattr(rows, name)(0) for name in ("min", "max", "mean", "std")}
    stats |= dict(zip(("q01", "q10", "q50", "q90", "q99"), np.percentile(rows, [1, 10, 50, 90, 99], axis=0)))
    return {**{name: value.round(6).tolist() for name, value in stats.items()}, "count": [len(rows)]}


def total_stats(episodes, lengths):
    """The statistics of a whole set, joined from those of its episodes (of `lengths` frames) as lerobot does it."""
    each = {name: np.array([episode[name] for episode in episodes]) for name in episodes[0]}  # (N, ...)
    each["std"] = each["std"] ** 2 + each["mean"] ** 2
    total = {name: np.average(values, axis=0, weights=lengths) for name, values in each.items()}
    total |= {"min": each["min"].min(0), "max": each["max"].max(0), "count": each["count"].sum(0)}
    total["std"] = np.sqrt(np.maximum(total["std"] - total["mean"] ** 2, 0))
    return {name: values.tolist() for name, values in total.items()}


def write_lerobot(folder, records):
    """Writes data/ and meta/ of a LeRobot set. records: of its clips, in the order of the episodes."""
    import pyarrow
    from pyarrow import parquet

    def write(path, columns, metadata=None):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(folder / path) as aside:
            parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), aside)

    tasks, stats = [record["task"] for record in records], [record["stats"] for record in records]
    names, info = list(dict.fromkeys(tasks)), lerobot_info(records[0])
    camera, count = next(iter(info["features"])), len(records)
    lengths = np.array([episode["count"][0] for episode in stats])
    ends = lengths.cumsum()
    episode, index = np.arange(count).repeat(lengths), np.arange(ends[-1])
    frame, task = index - (ends - lengths)[episode], np.array([names.index(text) for text in tasks])[episode]
    values = zip(COLUMNS.items(), (frame / info["fps"], frame, episode, index, task))
    table = {name: column.astype(dtype) for (name, dtype), column in values}
    measured = {camera: stats}
    if "action" in info["features"]:
        rows = np.concatenate([record["action_rows"] for record in records]).astype("float32")
        flat = pyarrow.array(rows.ravel())
        width = rows.shape[1]
        table["action"] = pyarrow.FixedSizeListArray.from_arrays(flat, width) if width > 1 else flat
        measured["action"] = [record["action_stats"] for record in records]
    write("data/chunk-000/file-000.parquet", table)

    videos, zeros = [Path(record["file_name"]) for record in records], np.zeros(count, int)
    columns = {"episode_index": np.arange(count), "tasks": [[text] for text in tasks], "length": lengths}
    columns |= {"dataset_from_index": ends - lengths, "dataset_to_index": ends, "generated": zeros == 0}
    columns |= {f"{part}/{name}_index": zeros for part in ("data", "meta/episodes") for name in ("chunk", "file")}
    columns[f"videos/{camera}/chunk_index"] = [int(path.parent.name[len("chunk-") :]) for path in videos]
    columns[f"videos/{camera}/file_index"] = [int(path.stem[len("file-") :]) for path in videos]
    columns |= {f"videos/{camera}/from_timestamp": zeros / 1, f"videos/{camera}/to_timestamp": lengths / info["fps"]}
    for key, episodes in measured.items():
        columns |= {f"stats/{key}/{name}": [episode[name] for episode in episodes] for name in episodes[0]}
    write("meta/episodes/chunk-000/file-000.parquet", columns)

    total = {key: total_stats(episodes, lengths) for key, episodes in measured.items()}
    write_file(folder / "meta/stats.json", json.dumps(total))

    # Readers look up a task by its text, so pandas must be told that this column is the index.
    column = {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = json.dumps({"index_columns": ["task"], "column_indexes": [], "columns": [column]})
    write("meta/tasks.parquet", {"task_index": np.arange(len(names)), "task": names}, {"pandas": pandas})
    info |= {"total_episodes": count, "total_frames": len(index), "total_tasks": len(names)}
    write_file(folder / "meta/info.json", json.dumps({**info, "splits": {"train": f"0:{count}"}}, indent=1))
