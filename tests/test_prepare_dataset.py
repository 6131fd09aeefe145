"""prepare_dataset.py on small files made here with imageio-ffmpeg's binary: each test launches the real script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import svd_common

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
PICTURE = "testsrc2=size=96x64:rate=25:duration=1"


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-nostdin", "-v", "error", "-y", *map(os.fspath, arguments)], check=True)


def make(path, *options, picture=PICTURE):
    """A small video of a moving test picture."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    ffmpeg("-f", "lavfi", "-i", picture, *options, path)
    return path


def prepare(video_dir, output_dir, *options, status=0, **popen):
    """Runs the script; returns its output and the lines of metadata.jsonl by source."""
    command = [sys.executable, ROOT / "prepare_dataset.py", "--video_dir", video_dir, "--output_dir", output_dir]
    command += ["--num_workers", "2", *options]
    done = subprocess.run(list(map(os.fspath, command)), capture_output=True, timeout=120, **popen)
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == status, text
    assert "Traceback" not in text
    return text, read_lines(output_dir)


def read_lines(output_dir):
    path = Path(output_dir) / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line.get("source", line["directory"]): line for line in lines}


def frames_of(output_dir, line):
    return [svd_common.read_frame(p) for p in svd_common.list_frames(Path(output_dir) / line["directory"])]


def extract(path, folder):
    """The frames as ffmpeg itself extracts them."""
    folder.mkdir(parents=True)
    ffmpeg("-i", path, "-map", "0:V:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", folder / "%05d.png")
    return [svd_common.read_frame(p) for p in svd_common.list_frames(folder)]


def tree(folder):
    """Every file of a dataset with its bytes, but not the records and locks."""
    files = (p for p in Path(folder).rglob("*") if p.is_file() and ".prepare" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# ------------------------------------------------------------------------------------------------------ the basics


def test_fields_and_frames(tmp_path):
    make(tmp_path / "videos/sub/x.MP4", "-pix_fmt", "yuv420p")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "7")
    line = lines["sub/x.MP4"]
    assert line["fps"] == 25 and line["num_frames"] == 7 and (line["width"], line["height"]) == (96, 64)
    assert line["decoder"] == "opencv" and line["codec"] == "h264" and line["group"] == "sub/x.MP4"
    assert line["motion"] > 0 and 0 < line["motion_bucket_id"] < 255 and line["problems"] == []
    names = sorted(os.listdir(tmp_path / "out" / line["directory"]))
    assert names == [f"{n:05d}.png" for n in range(7)]
    expected = extract(tmp_path / "videos/sub/x.MP4", tmp_path / "ffmpeg")[:7]
    assert np.array_equal(frames_of(tmp_path / "out", line), expected)
    assert "kept: 1 clips of 1 videos, 7 frames" in text


def test_all_frames_by_default(tmp_path):
    make(tmp_path / "videos/x.mp4")
    assert prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]["num_frames"] == 25


def test_never_imports_torch(tmp_path):
    code = "import sys, prepare_dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_names_do_not_collide(tmp_path):
    for name in ("a/x.mp4", "b/x.mp4", "a/x.avi", "a__x.mp4", "A/X.mp4"):
        make(tmp_path / "videos" / name, "-frames:v", "2")
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert len({line["directory"].casefold() for line in lines.values()}) == 5
    assert lines["a/x.mp4"]["directory"] == "a__x" and lines["a/x.avi"]["directory"] == "a__x.avi"


def test_av1_goes_through_ffmpeg(tmp_path):
    make(tmp_path / "videos/x.mp4", "-c:v", "libaom-av1", "-cpu-used", "8", "-frames:v", "5", "-pix_fmt", "yuv420p")
    line = prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]
    assert line["decoder"] == "ffmpeg" and line["codec"] == "av1" and line["num_frames"] == 5
    assert np.array_equal(frames_of(tmp_path / "out", line), extract(tmp_path / "videos/x.mp4", tmp_path / "ffmpeg"))


def test_motion_does_not_depend_on_the_fps(tmp_path):
    for fps in (10, 30, 60):
        moving = f"color=gray:s=256x128:r={fps}:d=1,noise=alls=60:all_seed=1,gblur=3,crop=160:96:x='t*40':y=8"
        make(tmp_path / f"videos/{fps}.mp4", "-qp", "4", picture=moving)
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    motions = [lines[f"{fps}.mp4"]["motion"] for fps in (10, 30, 60)]
    assert motions == pytest.approx([25] * 3, rel=0.1)  # 40 of 160 pixels a second


def test_motion_is_that_of_clip_motion(tmp_path):
    make(tmp_path / "videos/x.mp4")
    line = prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]
    motion = svd_common.clip_motion(frames_of(tmp_path / "out", line), line["fps"])
    assert line["motion"] == pytest.approx(motion, abs=2e-3)
    assert line["motion_bucket_id"] == svd_common.motion_bucket(motion)
    assert [svd_common.motion_bucket(m) for m in (0, 1.5, 1e9)] == [0, 128, 255]


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_bad_files_are_named_and_the_others_go_on(tmp_path):
    videos = tmp_path / "videos"
    make(videos / "good.mp4")
    (videos / "empty.mp4").touch()
    (videos / "text.avi").write_text("this is not a video\n" * 99)
    (videos / "page.mp4").write_text("<!DOCTYPE html><html>404</html>")
    (videos / "pointer.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    (videos / "noise.mkv").write_bytes(os.urandom(5000))
    make(videos / "sound.mp4", "-c:a", "aac", picture="sine=duration=1")
    (videos / "cut.mp4").write_bytes((videos / "good.mp4").read_bytes()[:4000])
    (videos / "list.avi").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (videos / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\ngood.mp4\n")
    ffmpeg("-f", "lavfi", "-i", PICTURE, "-frames:v", "1", "-f", "image2", "-c:v", "png", videos / "still.mp4")
    os.mkfifo(videos / "pipe.mp4")
    (videos / "gone.mp4").symlink_to("nowhere.mp4")
    text, lines = prepare(videos, tmp_path / "out", status=1)
    assert set(lines) == {"good.mp4"}
    for name, reason in {
        "empty.mp4": "0 bytes",
        "text.avi": "text",
        "page.mp4": "HTML",
        "pointer.mp4": "git-lfs",
        "noise.mkv": "not a video",
        "sound.mp4": "audio only",
        "cut.mp4": "moov",
        "list.avi": "playlist",
        "list.mp4": "playlist",
        "still.mp4": "still image",
        "pipe.mp4": "not a regular file",
        "gone.mp4": "a link",
    }.items():
        assert any(name in row and reason in row for row in text.splitlines()), (name, text)
    assert sorted(os.listdir(tmp_path / "out")) == [".prepare", "good", "metadata.jsonl", "preview.jpg"]


def test_truncated_is_kept_and_marked(tmp_path):
    make(
        tmp_path / "whole.mp4", "-movflags", "+faststart", "-g", "5", picture="testsrc2=size=320x240:rate=25:duration=4"
    )
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/x.mp4").write_bytes(data[: len(data) * 6 // 10])
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert lines["x.mp4"]["truncated"] and 40 < lines["x.mp4"]["num_frames"] < 80
    assert "kept, but: 1" in text


@pytest.mark.parametrize(
    "options, words",
    [
        (["--max_frames", "0"], "--max_frames"),
        (["--max_frames", "x"], "--max_frames"),
        (["--image_format", "gif"], "--image_format"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_options(tmp_path, options, words):
    make(tmp_path / "videos/x.mp4", "-frames:v", "1")
    assert words in prepare(tmp_path / "videos", tmp_path / "out", *options, status=2)[0]
    assert not (tmp_path / "out").exists()


def test_nothing_to_do(tmp_path):
    assert "no such folder" in prepare(tmp_path / "nowhere", tmp_path / "out", status=2)[0]
    (tmp_path / "videos").mkdir()
    assert "no video" in prepare(tmp_path / "videos", tmp_path / "out", status=2)[0]
    make(tmp_path / "videos/x.mp4", "-frames:v", "1")
    assert "outside" in prepare(tmp_path / "videos", tmp_path / "videos/out", status=2)[0]
    assert sorted(os.listdir(tmp_path / "videos")) == ["x.mp4"]


# ---------------------------------------------------------------------------------------------------- nothing lost


def test_second_run_does_only_what_is_missing(tmp_path):
    make(tmp_path / "videos/x.mp4")
    prepare(tmp_path / "videos", tmp_path / "out")
    before = (tmp_path / "out/x/00000.png").stat().st_mtime_ns
    make(tmp_path / "videos/y.mp4")
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert set(lines) == {"x.mp4", "y.mp4"}
    assert (tmp_path / "out/x/00000.png").stat().st_mtime_ns == before
    (tmp_path / "out/y/00003.png").unlink()
    prepare(tmp_path / "videos", tmp_path / "out")
    assert len(os.listdir(tmp_path / "out/y")) == 25


def test_changed_source_is_named_then_redone(tmp_path):
    make(tmp_path / "videos/x.mp4")
    prepare(tmp_path / "videos", tmp_path / "out")
    make(tmp_path / "videos/x.mp4", "-frames:v", "9")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert "changed" in text and lines["x.mp4"]["num_frames"] == 25
    assert prepare(tmp_path / "videos", tmp_path / "out", "--overwrite")[1]["x.mp4"]["num_frames"] == 9
    assert len(os.listdir(tmp_path / "out/x")) == 9


def test_other_options_are_refused_then_redone(tmp_path):
    make(tmp_path / "videos/x.mp4")
    prepare(tmp_path / "videos", tmp_path / "out")
    assert "--overwrite" in prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "3", status=2)[0]
    lines = prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "3", "--overwrite")[1]
    assert lines["x.mp4"]["num_frames"] == 3


def test_what_is_not_ours_stays(tmp_path):
    make(tmp_path / "videos/x.mp4")
    make(tmp_path / "videos/y.mp4")
    (tmp_path / "out/x").mkdir(parents=True)
    (tmp_path / "out/x/mine.txt").write_text("mine")
    (tmp_path / "out/metadata.jsonl").write_text('{"directory": "other", "caption": "mine"}\n')
    assert "move it away" in prepare(tmp_path / "videos", tmp_path / "out", status=1)[0]
    assert (tmp_path / "out/x/mine.txt").read_text() == "mine" and os.listdir(tmp_path / "out/x") == ["mine.txt"]
    assert set(read_lines(tmp_path / "out")) == {"other", "y.mp4"}
