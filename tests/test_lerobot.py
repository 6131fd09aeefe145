"""LeRobot datasets: real clips (version 2.1) -> prepare -> a generated set (version 3.0) -> lerobot, prepare."""

import json
import shutil

import numpy as np
import pytest
from conftest import SIZE, TINY, moving_square, run
from test_infer_svd import infer, lines_of

import infer_svd
import svd_common as common
from svd_parts.console import run_script
from svd_parts.lerobot_writer import image_stats, lerobot_info, warn_of_codec

parquet = pytest.importorskip("pyarrow.parquet")
CAMERA, OTHER = "observation.images.front", "observation.images.wrist"
TASKS = ["push the red cube", "推 the blue cube"]
# what lerobot 0.4.4 says of a video; 0.6.1 has another key and adds the encoder's settings, which it does not compare
VIDEO_INFO = {"video.height": 64, "video.width": 96, "video.codec": "h264", "video.pix_fmt": "yuv420p",
    "video.is_depth_map": False, "video.fps": 8, "video.channels": 3, "has_audio": False}  # fmt: skip
NEWER = {key: value for key, value in VIDEO_INFO.items() if key != "video.is_depth_map"} | {"is_depth_map": False}
FLAGS = ["--model_dir", TINY, "--output_format", "lerobot", *SIZE, "--num_inference_steps", "1", "--fps", "8"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A prepared dataset of two episodes, each seen by two cameras."""
    root = tmp_path_factory.mktemp("real")
    for seed, camera in enumerate((CAMERA, OTHER)):
        for episode in range(2):
            path = root / f"lerobot/videos/chunk-000/{camera}/episode_{episode:06d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            common.write_video(path, moving_square(10, seed=2 * seed + episode), 8)
    (root / "lerobot/meta").mkdir()
    features = {camera: {"dtype": "video", "info": VIDEO_INFO} for camera in (CAMERA, OTHER)}
    info = {"codebase_version": "v2.1", "robot_type": "panda", "features": features}
    (root / "lerobot/meta/info.json").write_text(json.dumps(info))
    rows = (json.dumps({"episode_index": number, "tasks": [task]}) for number, task in enumerate(TASKS))
    (root / "lerobot/meta/episodes.jsonl").write_text("\n".join(rows))
    run("prepare_dataset.py", "--video_dir", root / "lerobot", "--output_dir", root / "front", "--camera", "front")
    run("prepare_dataset.py", "--video_dir", root / "lerobot", "--output_dir", root / "both")
    return root


@pytest.fixture(scope="module")
def made(real):
    """Two clips of each episode."""
    arguments = ["--input_image", real / "front", "--output_video", real / "set", "--num_videos_per_image", 2]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: infer_svd.main(list(map(str, FLAGS + arguments))))
    assert not end.value.code
    return real / "set"


def bytes_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_laid_out_as_version_3_says(made):
    info = json.loads((made / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["robot_type"] == "panda" and info["fps"] == 8
    assert info["generated"] is True and info["splits"] == {"train": "0:4"}
    assert [info[f"total_{what}"] for what in ("episodes", "frames", "tasks")] == [4, 32, 2]
    assert info["features"][CAMERA]["shape"] == [64, 96, 3] and info["features"][CAMERA]["dtype"] == "video"
    file = {"chunk_index": 0, "file_index": 0}
    data = parquet.read_table(made / info["data_path"].format(**file))
    assert {field.name: str(field.type).replace("float", "float32") for field in data.schema} == {
        name: feature["dtype"] for name, feature in info["features"].items() if name != CAMERA
    }
    data = data.to_pydict()
    assert data["index"] == list(range(32)) and data["frame_index"] == list(range(8)) * 4
    assert np.array_equal(data["timestamp"], np.tile(np.arange(8) / 8, 4))
    assert data["episode_index"] == np.repeat(range(4), 8).tolist()
    assert data["task_index"] == [0] * 16 + [1] * 16
    tasks = parquet.read_table(made / "meta/tasks.parquet")
    assert tasks.schema.pandas_metadata["index_columns"] == ["task"] and tasks.column("task").to_pylist() == TASKS

    episodes = parquet.read_table(made / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    frames = []
    for number, (episode, record) in enumerate(zip(episodes, lines_of(made))):
        place = {name: episode[f"videos/{CAMERA}/{name}"] for name in ("chunk_index", "file_index")}
        assert record["file_name"] == info["video_path"].format(video_key=CAMERA, **place)
        assert episode[f"videos/{CAMERA}/from_timestamp"] == 0 and episode[f"videos/{CAMERA}/to_timestamp"] == 1
        assert episode["episode_index"] == number and episode["tasks"] == [record["task"]] and episode["generated"]
        span = [episode["length"], episode["dataset_from_index"], episode["dataset_to_index"]]
        assert span == [8, 8 * number, 8 * number + 8]
        frames.append(common.read_video(made / record["file_name"]) / 255)
        assert np.allclose(np.ravel(episode[f"stats/{CAMERA}/mean"]), frames[-1].mean((0, 1, 2)), atol=0.02)
    frame = moving_square(1)
    exact = image_stats(frame)  # H.264 moves extremes
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(np.ravel(exact[name]), getattr(frame / 255, name)((0, 1, 2)), atol=1e-6), name
    stats = json.loads((made / "meta/stats.json").read_text())[CAMERA]
    pixels = np.concatenate(frames).reshape(-1, 3)
    for name, expected, tolerance in (
        ("mean", pixels.mean(0), 0.01), ("std", pixels.std(0), 0.01), ("max", pixels.max(0), 0.15),
        ("min", pixels.min(0), 0.15), ("q50", np.median(pixels, axis=0), 0.1),
    ):  # fmt: skip
        assert np.shape(stats[name]) == (3, 1, 1) and np.allclose(np.ravel(stats[name]), expected, atol=tolerance), name
    assert stats["count"] == [32] and all(np.shape(stats[f"q{q}"]) == (3, 1, 1) for q in ("01", "10", "90", "99"))


@pytest.mark.parametrize("real_info, expected", [
    (VIDEO_INFO, VIDEO_INFO), (None, NEWER), ({**NEWER, "video.g": 2, "video.crf": 30, "video.codec": "av1"}, NEWER),
])  # fmt: skip
def test_the_info_of_the_real_set_s_videos_is_taken_over(real_info, expected):
    clip = {"height": 64, "width": 96, "fps": 8, "camera": CAMERA, "video_info": real_info}
    assert lerobot_info(clip)["features"][CAMERA]["info"] == expected


def test_the_info_goes_through_prepare_and_another_codec_is_warned_of(made, real, capsys):
    assert json.loads((made / "meta/info.json").read_text())["features"][CAMERA]["info"] == VIDEO_INFO
    image = {"video_info": {**VIDEO_INFO, "video.codec": "av1"}}
    warn_of_codec([image, image, {"video_info": VIDEO_INFO}, {"video_info": None}])
    printed = capsys.readouterr().out
    assert printed.count("warning: the real videos are av1, these H.264") == 1 and "reencode_videos" in printed


def test_prepare_reads_the_set_and_knows_that_it_is_generated(made, tmp_path):
    run("prepare_dataset.py", "--video_dir", made, "--output_dir", tmp_path / "again")
    lines = [json.loads(line) for line in (tmp_path / "again/metadata.jsonl").read_text().splitlines()]
    fields = ("camera", "episode_index", "task", "robot_type", "generated", "num_frames")
    assert [[line[field] for field in fields] for line in lines] == [
        [CAMERA, number, TASKS[number // 2], "panda", True, 8] for number in range(4)
    ]


def test_a_set_that_is_prepared_again_holds_out_all_seeds_of_an_image(made, tmp_path):
    from svd_parts.dataset import list_clips
    from svd_parts.samples import hold_out

    for video_dir in (made, made / "videos"):
        output = tmp_path / video_dir.name
        run("prepare_dataset.py", "--video_dir", video_dir, "--output_dir", output)
        clips = list_clips(output)
        assert len(clips) == 4 and all(clip["generated"] for clip in clips)
        for seed in range(4):
            training, held_out = hold_out(clips, 1, seed)
            images = [{clip["source_image"] for clip in side} for side in (training, held_out)]
            assert len(training) == 2 and not images[0] & images[1], "two seeds of one image are on both sides"


def test_a_killed_run_is_gone_on_with_and_added_clips_come_after(made, real, tmp_path, capsys):
    """Killed between a clip's record and the clip, with none of the set's own files written yet, or half."""
    folder, before = shutil.copytree(made, tmp_path / "set"), bytes_in(made)
    last = max(folder.glob("videos/*/*/*.mp4"))
    last.unlink()
    lines = [line for line in (folder / "metadata.jsonl").read_text().splitlines(True) if last.name not in line]
    (folder / "metadata.jsonl").write_text("".join(lines))
    shutil.rmtree(folder / "data")
    (folder / "meta/tasks.parquet").unlink()
    (folder / "meta/.stats.json.4711.part").write_text("{")
    flags = [*FLAGS, "--input_image", real / "front", "--output_video", folder, "--num_videos_per_image"]
    assert "1 clip to make" in infer(capsys, *flags, 2)
    after, ours = bytes_in(folder), ("videos/", "data/", "meta/")
    assert after.keys() == before.keys()
    assert all(after[name] == data for name, data in before.items() if name.startswith(ours))

    assert "2 clips to make" in infer(capsys, *flags, 3)
    assert all(bytes_in(folder)[name] == data for name, data in before.items() if name.endswith(".mp4"))
    found = [(line["file_name"][-7:-4], line["task"], line["seed"]) for line in lines_of(folder)]
    kinds = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]  # (episode, seed)
    assert found == [(f"{number:03d}", TASKS[episode], seed) for number, (episode, seed) in enumerate(kinds)]
    assert json.loads((folder / "meta/info.json").read_text())["splits"] == {"train": "0:6"}

    (folder / lines_of(folder)[1]["file_name"]).unlink()  # a person did not like it
    assert "nothing to make: all " in infer(capsys, *flags, 3)
    episodes = parquet.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [episode["episode_index"] for episode in episodes] == [0, 1, 2, 3, 4]
    assert [episode[f"videos/{CAMERA}/file_index"] for episode in episodes] == [0, 2, 3, 4, 5]
    for path in folder.glob("videos/*/*/*.mp4"):
        path.unlink()
    assert "nothing to make: all " in infer(capsys, *flags, 3)
    assert not lines_of(folder) and not (folder / "meta").exists() and not (folder / "data").exists()


def test_parts_make_the_set_that_one_process_makes(made, real, tmp_path, capsys):
    flags = [*FLAGS, "--input_image", real / "front", "--output_video", tmp_path / "set", "--num_videos_per_image", 2]
    for part in ("2/3", "1/3", "0/3"):
        infer(capsys, *flags, "--shard", part)
    whole, parts = bytes_in(made), bytes_in(tmp_path / "set")
    same = [name for name in whole if name.startswith(("videos/", "data/", "meta/"))]
    assert len(same) > 8 and all(parts[name] == whole[name] for name in same)
    assert len(lines_of(tmp_path / "set")) == 4 and not list((tmp_path / "set").rglob(".making*/*"))


def test_what_cannot_be_one_set_is_refused_before_anything_is_made(made, real, tmp_path, capsys, monkeypatch):
    image = next((real / "front").glob("*/00000.png"))
    foreign, labelled = tmp_path / "foreign", shutil.copytree(made, tmp_path / "labelled")
    shutil.copytree(real / "lerobot", foreign)
    info = json.loads((labelled / "meta/info.json").read_text())
    info["features"]["action"] = {"dtype": "float32", "shape": [7], "names": None}
    (labelled / "meta/info.json").write_text(json.dumps(info))
    for field, value in (("camera", "../../else"), ("task", ["a", "b"])):
        shutil.copytree(real / "front", real / f"odd-{field}")
        lines = map(json.loads, (real / "front/metadata.jsonl").read_text().splitlines())
        text = "".join(json.dumps({**line, field: value}) + "\n" for line in lines)
        (real / f"odd-{field}/metadata.jsonl").write_text(text)
    theirs = tmp_path / "theirs"
    (theirs / "meta").mkdir(parents=True)
    (theirs / "meta/stats.json").write_text("mine")
    before = bytes_in(tmp_path) | bytes_in(made)
    for arguments, words in (
        (["--input_image", image, "--output_video", tmp_path / "a"], "give --task"),
        (["--input_image", image, "--output_video", tmp_path / "a", "--task", "two\nlines"], "must be one line"),
        (["--input_image", real / "odd-camera", "--output_video", tmp_path / "a"], "its camera in metadata.jsonl"),
        (["--input_image", real / "odd-task", "--output_video", tmp_path / "a"], "give --task"),
        (["--input_image", real / "front", "--output_video", theirs], "meta is not of a set that was made here"),
        (["--input_image", image, "--output_video", tmp_path / "a.mp4"], "one file holds one clip in its own format"),
        (["--input_image", real / "both", "--output_video", tmp_path / "a"], "must have the same features"),
        (["--input_image", real / "front", "--output_video", foreign], "generated"),
        (["--input_image", real / "front", "--output_video", labelled], "must have the same features"),
        (["--input_image", real / "front", "--output_video", made, "--seed", 9, "--fps", 9], "fps and features"),
        (["--input_image", real / "front", "--output_video", made, "--task", "other"], "task was push the red cube"),
    ):
        printed = infer(capsys, *FLAGS, *arguments, ok=False)
        assert words in printed and printed.count("error: ") == 1, printed
    monkeypatch.setattr(infer_svd, "find_spec", lambda name: None)
    printed = infer(capsys, *FLAGS, "--input_image", image, "--output_video", tmp_path / "a", "--task", "t", ok=False)
    assert "pip install pyarrow" in printed and bytes_in(tmp_path) | bytes_in(made) == before


def test_the_real_lerobot_loads_the_set_and_merges_it_with_a_real_one(made, tmp_path):
    pytest.importorskip("lerobot")
    from lerobot.datasets.aggregate import aggregate_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    def check(dataset, first):
        """The episodes from `first` on are the set's: its frames at their times, by lerobot's own decoder."""
        for number, record in enumerate(lines_of(made), first):
            video, start = (
                common.read_video(made / record["file_name"]),
                dataset.meta.episodes[number]["dataset_from_index"],
            )
            assert dataset.meta.episodes[number]["length"] == len(video) and dataset.meta.episodes[number]["generated"]
            for t, frame in enumerate(video):
                item = dataset[start + t]
                assert item["episode_index"] == number and item["frame_index"] == t and item["task"] == record["task"]
                assert abs(item["timestamp"].item() - t / 8) < 1e-6
                assert np.abs(item[CAMERA].permute(1, 2, 0).numpy() * 255 - frame).max() <= 1

    check(LeRobotDataset("local/made", root=made, video_backend="pyav"), 0)
    shape = {"dtype": "video", "shape": (64, 96, 3), "names": ["height", "width", "channels"]}
    options = {"fps": 8, "robot_type": "panda", "features": {CAMERA: shape}, "root": tmp_path / "real"}
    recorded = LeRobotDataset.create("local/real", vcodec="h264", **options)
    for episode, task in enumerate([TASKS[1], "another"]):
        for frame in moving_square(10, seed=episode):
            recorded.add_frame({CAMERA: frame, "task": task})
        recorded.save_episode()
    recorded.finalize()
    for name, roots in (("after", [tmp_path / "real", made]), ("before", [made, tmp_path / "real"])):
        aggregate_datasets(["a", "b"], "local/merged", roots=roots, aggr_root=tmp_path / name)
        merged = LeRobotDataset("local/merged", root=tmp_path / name, video_backend="pyav")
        check(merged, 2 if name == "after" else 0)
        assert merged.num_episodes == 6 and len(merged) == 52 and set(merged.meta.tasks.index) == {*TASKS, "another"}
        assert sorted(map(bool, merged.meta.episodes["generated"])) == [False] * 2 + [True] * 4
