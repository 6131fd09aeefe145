"""The actions of LeRobot datasets, versions 2.1 and 3.0, at the times of a clip's frames."""

import json

import numpy as np
import pytest
from conftest import moving_square, run

import svd_common as common
from svd_parts.files import UserError
from svd_parts.lerobot_actions import actions_at

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

NAMES = {"motors": ["x", "y", "grip"]}


def rows_of(episode, count=20):
    return np.stack([np.full(count, episode), np.arange(count), np.arange(count) / 10], 1).astype(np.float32)


def write_table(path, episodes, key="action", fps=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.concatenate([rows_of(episode) for episode in episodes])
    columns = {"episode_index": np.repeat(episodes, 20), "timestamp": np.tile(np.arange(20) / fps, len(episodes))}
    columns["timestamp"] = columns["timestamp"].astype(np.float32)
    parquet.write_table(
        pyarrow.table({**columns, key: list(map(list, rows)), "frame_index": np.arange(len(rows))}), path
    )


@pytest.fixture(params=["v2.1", "v3.0"])
def lerobot(request, tmp_path):
    """Three episodes of 20 rows at 10 fps; of version 3.0 all in one file."""
    root = tmp_path / "set"
    features = {"action": {"dtype": "float32", "shape": [3], "names": NAMES}, "task": {"dtype": "string", "shape": [1]}}
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps({"codebase_version": request.param, "features": features}))
    if request.param == "v2.1":
        for episode in range(3):
            write_table(root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet", [episode])
    else:
        write_table(root / "data" / "chunk-000" / "file-000.parquet", range(3))
        (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        places = {"episode_index": [0, 1, 2], "data/chunk_index": [0] * 3, "data/file_index": [0] * 3}
        parquet.write_table(pyarrow.table(places), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    return str(root)


def test_each_frame_gets_the_row_of_its_time(lerobot):
    for times in (np.arange(20) / 10, np.arange(0, 20, 3) / 10, np.array([0.52, 0.68])):  # all, --fps, in between
        rows, names = actions_at(lerobot, 1, times, "action")
        assert names == NAMES and rows.dtype == np.float32
        assert np.array_equal(rows, rows_of(1)[np.rint(times * 10).astype(int)])


def test_what_is_wrong_is_said_in_a_line(lerobot, tmp_path):
    for episode, times, key, said in (
        (1, [0.1], "observation.state", "has no such feature"),
        (1, [0.1], "task", "no row of numbers"),
        (7, [0.1], "action", "episode 7"),
        (1, [0.1, 9.0], "action", "its video lasts 9.0 s"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            actions_at(lerobot, episode, times, key)
        assert "\n" not in str(raised.value)
    (tmp_path / "none").mkdir()
    assert actions_at(str(tmp_path / "none"), 0, [0.1], "action") is None


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_preparing_carries_the_actions_of_the_frames_that_it_keeps(version, tmp_path):
    root = tmp_path / "set"
    features = {key: {"dtype": "float32", "shape": [3], "names": NAMES} for key in ("action", "observation.state")}
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps({"codebase_version": version, "features": features}))
    videos, camera = root / "videos", "observation.images.front"
    if version == "v2.1":
        for episode in range(2):
            path = videos / "chunk-000" / camera / f"episode_{episode:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_video(path, moving_square(20, seed=episode), 10)
            write_table(root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet", [episode])
    else:
        path = videos / camera / "chunk-000" / "file-000.mp4"
        path.parent.mkdir(parents=True)
        common.write_video(path, np.concatenate([moving_square(20, seed=episode) for episode in range(2)]), 10)
        write_table(root / "data" / "chunk-000" / "file-000.parquet", range(2))
        places = {"episode_index": [0, 1], "length": [20, 20], "data/chunk_index": [0, 0], "data/file_index": [0, 0]}
        places |= {f"videos/{camera}/{name}_index": [0, 0] for name in ("chunk", "file")}
        places |= {f"videos/{camera}/from_timestamp": [0.0, 2.0], f"videos/{camera}/to_timestamp": [2.0, 4.0]}
        (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        parquet.write_table(pyarrow.table(places), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    for name, more, kept in (
        ("all", [], [range(20)]),
        ("slow", ["--fps", 5], [range(0, 20, 2)]),
        ("cut", ["--clip_frames", 8], [range(8), range(8, 16)]),
    ):
        done = run("prepare_dataset.py", "--video_dir", root, "--output_dir", tmp_path / name, *more)
        lines = [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * len(kept)
        count = f"{len(lines)} of {len(lines)} clips, 3 columns"
        assert f"\nactions: {count}; train_svd.py --condition_on actions uses them\n" in done.stdout
        for place, line in enumerate(lines):
            rows = np.load(tmp_path / name / line["directory"] / "actions.npy")
            expected = rows_of(line["episode_index"])[list(kept[place % len(kept)])]
            assert line["action_names"] == NAMES and rows.dtype == np.float32 and len(rows) == line["num_frames"]
            assert np.abs(rows - expected).max() <= (1 if more else 0) and np.array_equal(rows[:, 0], expected[:, 0])
    done = run(
        "prepare_dataset.py", "--video_dir", root, "--output_dir", tmp_path / "x", "--action_key", "no", ok=False
    )
    assert "has no such feature" in done.stdout
    assert "these are rows of numbers: action, observation.state" in done.stdout and done.stdout.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_clips_without_actions_are_counted_with_the_reason(tmp_path):
    root, camera, out = tmp_path / "videos/set", "observation.images.front", tmp_path / "out"
    for episode in range(2):
        path = root / "videos" / "chunk-000" / camera / f"episode_{episode:06d}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        common.write_video(path, moving_square(20, seed=episode), 10)
    info = root / "meta" / "info.json"

    def said(output, *more):
        done = run("prepare_dataset.py", "--video_dir", tmp_path / "videos", "--output_dir", output, *more)
        return [line for line in done.stdout.splitlines() if line.startswith("actions: ")]

    assert not said(out)  # videos alone, in LeRobot's folders
    (root / "meta").mkdir()
    assert said(out) == [f"actions: none of 2 clips (action: {info} is missing: copy it again)"]
    for features in (["action"], {"action": 3}, {}):  # somebody edited it
        info.write_text(json.dumps({"codebase_version": "v2.1", "features": features}))
        assert said(out) == [f"actions: none of 2 clips (action: {info} has no such feature)"]
    features = {"action": {"dtype": "float32", "shape": [8, 3]}}
    info.write_text(json.dumps({"codebase_version": "v2.1", "features": features}))
    assert said(out) == [f"actions: none of 2 clips (action: {info} says that this is no row of numbers)"]
    features = {"action": {"dtype": "float32", "shape": [3], "names": NAMES}}
    info.write_text(json.dumps({"codebase_version": "v2.1", "features": features}))
    assert said(out) == [f"actions: none of 2 clips (no .parquet in {root / 'data'})"]
    for episode in range(2):
        write_table(root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet", [episode])
    why = "prepared before they were there: another --output_dir gets them"
    assert said(out) == [f"actions: none of 2 clips ({why})"]
    np.save(out / min(path.name for path in out.glob("*episode_*")) / "actions.npy", rows_of(0))
    [line] = said(out)
    assert line == f"actions: 1 of 2 clips, 3 columns; the others have none ({why}), and training needs them for all"
    assert said(tmp_path / "new") == ["actions: 2 of 2 clips, 3 columns; train_svd.py --condition_on actions uses them"]
    common.write_video(tmp_path / "videos" / "plain.mp4", moving_square(4), 10)
    assert not said(tmp_path / "plain", "--include", "plain.mp4")


@pytest.mark.parametrize("key", ["is_depth_map", "video.is_depth_map"])
def test_a_depth_camera_is_left_out_by_name(key, tmp_path):
    root, cameras = tmp_path / "set", ("observation.images.front", "observation.images.depth")
    for camera in cameras:
        path = root / "videos" / "chunk-000" / camera / "episode_000000.mp4"
        path.parent.mkdir(parents=True)
        common.write_video(path, moving_square(8), 10)
    (root / "meta").mkdir()
    features = {
        camera: {"dtype": "video", "shape": [64, 96, 3], "info": {key: camera == cameras[1]}} for camera in cameras
    }
    (root / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v2.1", "features": features}))
    done = run("prepare_dataset.py", "--video_dir", root, "--output_dir", tmp_path / "out")
    assert "left out: depth cameras, which give distances and no pictures (observation.images.depth)" in done.stdout
    [line] = map(json.loads, (tmp_path / "out" / "metadata.jsonl").read_text().splitlines())
    assert line["camera"] == cameras[0] and "action_names" not in line
    assert not (tmp_path / "out" / line["directory"] / "actions.npy").exists()
    done = run("prepare_dataset.py", "--video_dir", root, "--output_dir", tmp_path / "x", "--camera", "depth", ok=False)
    assert "only depth cameras are chosen" in done.stdout
