"""prepare_dataset.py on small files made here with imageio-ffmpeg's binary: each test launches the real script."""

import contextlib
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from conftest import TINY, moving_square, run

import svd_common
from svd_parts.dataset import list_frames
from svd_parts.find import directory_name
from svd_parts.metrics import clip_motion, motion_bucket

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
PICTURE = "testsrc2=size=96x64:rate=25:duration=1"
OLD = imageio_ffmpeg.get_ffmpeg_version().startswith("7.0")  # the newest for Python 3.9
unless_old = functools.partial(pytest.mark.skipif, OLD)
reads_ts = unless_old(reason="ffmpeg 7.0 crashes on every .ts")
# Timestamps as they are; an edit list of ffmpeg 7.0 ends where an uneven video's last frame begins
UNEVEN_MP4 = ["-fps_mode", "passthrough", "-use_editlist", "0"]


def ffmpeg(*arguments):
    subprocess.run([FFMPEG, "-nostdin", "-v", "error", "-y", *map(os.fspath, arguments)], check=True)


def make(path, *options, picture=PICTURE):
    """A small video of a moving test picture."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    ffmpeg("-f", "lavfi", "-i", picture, *options, path)
    return path


def prepare(video_dir, output_dir, *options, status=0, **popen):
    """Runs the script; returns its output and the lines of metadata.jsonl by source."""
    done = prepare_only(video_dir, output_dir, *options, **popen)
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == status, text
    assert "Traceback" not in text
    return text, read_lines(output_dir)


def prepare_only(video_dir, output_dir, *options, **popen):
    command = [sys.executable, ROOT / "prepare_dataset.py", "--video_dir", video_dir, "--output_dir", output_dir]
    command += ["--num_workers", "2", *options]
    return subprocess.run(list(map(os.fspath, command)), capture_output=True, timeout=120, **popen)


def prepare_on_terminal(video_dir, output_dir, *options, **popen):
    """What a terminal of 120 columns shows of a run."""
    import fcntl
    import pty
    import struct
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, ROOT / "prepare_dataset.py", "--video_dir", video_dir, "--output_dir", output_dir]
    command = list(map(os.fspath, [*command, "--num_workers", "2", *options]))
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, **popen)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the last process has closed it
        while data := os.read(screen, 1 << 16):
            shown += data
    os.close(screen)
    assert process.wait(120) == 0, shown
    return shown.decode()


def read_lines(output_dir):
    path = Path(output_dir) / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []
    return {line.get("source", line["directory"]): line for line in lines if "directory" in line}


def check_lines(output_dir):
    """Every clip that metadata.jsonl names is there, whole; returns how many there are."""
    path = Path(output_dir) / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        assert len(frames_of(output_dir, line)) == line["num_frames"], line["directory"]
    return len(lines)


def frames_of(output_dir, line):
    return [svd_common.read_image(p) for p in list_frames(Path(output_dir) / line["directory"])]


def extract(path, folder):
    """The frames as ffmpeg itself extracts them."""
    folder.mkdir(parents=True)
    ffmpeg("-i", path, "-map", "0:V:0", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", folder / "%05d.png")
    return [svd_common.read_image(p) for p in list_frames(folder)]


def tree(folder):
    """Every file of a dataset with its bytes, of a PNG its pixels (ISA-L may pack them otherwise the next time), but
    not the records and locks."""
    files = [p for p in Path(folder).rglob("*") if p.is_file() and ".prepare" not in p.parts]
    read = {p: svd_common.read_image(p).tobytes() if p.suffix == ".png" else p.read_bytes() for p in files}
    return {p.relative_to(folder).as_posix(): data for p, data in read.items()}


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
    assert "kept: 1 clip of 1 video, 7 frames" in text


def test_all_frames_by_default(tmp_path):
    make(tmp_path / "videos/x.mp4")
    assert prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]["num_frames"] == 25


def test_what_others_wrote_into_the_dataset_stays(tmp_path):
    make(tmp_path / "videos/x.mp4")
    flags = [tmp_path / "videos", tmp_path / "out", "--max_frames", "2"]
    prepare(*flags)
    record, metadata, clip = (tmp_path / "out" / name for name in (".prepare/x.json", "metadata.jsonl", "x"))
    line = {**json.loads(metadata.read_text()), "caption": "a\u2028b"}
    other = {"file_name": "y.mp4"}  # of a set of another kind
    half = json.dumps({"directory": "z"})[:9]  # as a kill leaves it
    metadata.write_text(f"{json.dumps(line, ensure_ascii=False)}\n{json.dumps(other)}\n{half}", encoding="utf-8-sig")
    prepare(*flags)
    assert [json.loads(text) for text in metadata.read_text("utf-8").split("\n")[:-1]] == [line, other]

    saved, whole = record.read_text(), metadata.read_text("utf-8")
    old = json.loads(saved)
    kinds = [{"source": 3}, {"dropped": None}, {"clips": ["a"]}, {"clips": [{**old["clips"][0], "fps": "25"}]}]
    for damaged in ('{"source": "x.mp4"}', "[]", "", "[" * 100_000, *(json.dumps({**old, **kind}) for kind in kinds)):
        record.write_text(damaged)
        assert "exists, and this program did not make it: move it away" in prepare(*flags, status=1)[0]
    record.write_text(saved)
    for text in (whole.encode("utf-16"), b"{}\n{\n" + whole.encode()):
        metadata.write_bytes(text)
        done = prepare_only(*flags)
        assert done.returncode == 2 and b"metadata.jsonl" in done.stderr and b"Traceback" not in done.stderr
        assert metadata.read_bytes() == text
    metadata.write_text(whole, "utf-8")

    (clip / "caption.txt").write_text("mine")
    (clip / "00001.png").unlink()
    assert "caption.txt: this program did not make it" in prepare(*flags, status=1)[0]
    (clip / "caption.txt").unlink()
    prepare(*flags)
    shutil.rmtree(clip)
    clip.write_text("mine")
    assert "this program did not make it" in prepare(*flags, status=1)[0] and clip.read_text() == "mine"


def test_changes_of_our_lines_stay_until_the_clip_is_made_again(tmp_path):
    for name in "xy":
        make(tmp_path / f"videos/{name}.mp4", "-frames:v", "3")
    metadata = tmp_path / "out/metadata.jsonl"
    x, y = prepare(tmp_path / "videos", tmp_path / "out")[1].values()
    changed = {**x, "fps": 30, "task": "push"}
    metadata.write_text(f"{json.dumps(changed)}\n{json.dumps(y)}\n")
    make(tmp_path / "videos/z.mp4", "-frames:v", "3")
    for _ in range(2):
        lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
        assert lines["x.mp4"] == changed and lines["y.mp4"] == y and len(lines) == 3
    make(tmp_path / "videos/x.mp4", "-frames:v", "4")
    for part in ("0/2", "1/2"):  # parts do not append their lines
        prepare(tmp_path / "videos", tmp_path / "out", "--overwrite", "--shard", part)
    again = read_lines(tmp_path / "out")["x.mp4"]
    assert [again[key] for key in ("num_frames", "duration", "fps", "task")] == [4, 0.16, 30, "push"]
    shutil.rmtree(tmp_path / "out/x")
    assert prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"] == again  # the same values: the change stays
    typo = metadata.read_text() + '{"directory": "mine", "fps": 3,}'
    metadata.write_text(typo)
    done = prepare_only(tmp_path / "videos", tmp_path / "out")
    assert done.returncode == 2 and b"metadata.jsonl line 4" in done.stderr and metadata.read_text() == typo


def test_a_folder_that_somebody_changed_stops_no_other(tmp_path):
    for name in ("gone", "mask", "more", "x"):
        make(tmp_path / f"videos/{name}.mp4", "-frames:v", "3")
    prepare(tmp_path / "videos", tmp_path / "out")
    (tmp_path / "videos/gone.mp4").unlink()
    shutil.rmtree(tmp_path / "out/gone")
    shutil.copy(tmp_path / "out/x/00000.png", tmp_path / "out/mask/mask.png")
    shutil.copy(tmp_path / "out/x/00000.png", tmp_path / "out/more/00003.png")
    (tmp_path / "out/x/00001.png").write_bytes(b"")  # as a power cut leaves it
    make(tmp_path / "videos/y.mp4", "-frames:v", "3")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert "mask.png beside" in text and "move away 00003.png" in text and "kept: 4 clips of 4 videos" in text
    assert len(frames_of(tmp_path / "out", lines["x.mp4"])) == len(frames_of(tmp_path / "out", lines["y.mp4"])) == 3
    assert (tmp_path / "out/mask/mask.png").exists() and (tmp_path / "out/more/00003.png").exists()
    assert not list((tmp_path / "out/.prepare").glob("work*"))


def test_clips_stay_where_new_ones_find_their_name_taken(tmp_path):
    make(tmp_path / "videos/x.mp4")
    prepare(tmp_path / "videos", tmp_path / "out")
    (tmp_path / "out/x@0001").mkdir()
    mine = shutil.copy(tmp_path / "out/x/00000.png", tmp_path / "out/x/00025.png")
    options = ["--clip_frames", "9", "--overwrite"]
    assert "00025.png: this program did not" in prepare(tmp_path / "videos", tmp_path / "out", *options, status=1)[0]
    os.unlink(mine)
    assert "x@0001 exists" in prepare(tmp_path / "videos", tmp_path / "out", "--clip_frames", "9", "--overwrite",
        status=1)[0]  # fmt: skip
    assert len(os.listdir(tmp_path / "out/x")) == 25 and check_lines(tmp_path / "out") == 1


def test_a_name_like_a_folder_of_ours_is_resumed(tmp_path):
    make(tmp_path / "videos/workshop.mp4", "-frames:v", "2")
    for _ in range(2):
        assert prepare(tmp_path / "videos", tmp_path / "out")[1]["workshop.mp4"]["num_frames"] == 2


def test_never_imports_torch(tmp_path):
    make(tmp_path / "videos/x.mp4")
    for name in ("torch", "diffusers", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert prepare(tmp_path / "videos", tmp_path / "out", "--fps", "5", env=environment)[1]["x.mp4"]["num_frames"] == 5


def test_a_log_file_gets_a_line_of_progress_now_and_then(tmp_path):
    code = "import sys, prepare_dataset as p; args = p.parse_args(sys.argv[1:]); run = p.Run(args, [None] * 4, None)\n"
    code += "run.bar.start_t -= 60; run.bar.last_print_t -= 60; run.waiting -= 1; run.expect(100);"
    code += "run.bar.update(10); run.bar.close()"
    command = [sys.executable, "-c", code, "--video_dir", tmp_path, "--output_dir", tmp_path.parent / "out"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr.split("\n")
    assert any(line.strip().startswith("preparing: 10 of 400 frames after 01:00") for line in lines), lines


@pytest.mark.skipif(sys.platform == "win32", reason="has no pty")
def test_a_warning_on_a_terminal_is_shown_and_is_no_damage(tmp_path):
    """What OpenCV prints goes into a file while videos are prepared; what this program prints must not."""
    lerobot_v2(tmp_path / "videos")
    (tmp_path / "videos/meta").mkdir()
    features = {"action": {"dtype": "float32", "shape": [2]}}
    (tmp_path / "videos/meta/info.json").write_text(json.dumps({"features": features}))
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text("import sys; sys.modules['pyarrow'] = None")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "without")}
    text = prepare_on_terminal(tmp_path / "videos", tmp_path / "out", env=environment)
    assert "get no actions: pip install pyarrow" in text and "kept: 4 clips of 4 videos" in text

    code = "import os\nfrom svd_parts.decode import hear_opencv\nwith hear_opencv() as heard:\n    print('said')\n"
    code += "    os.write(1, b'damage')\n    count = heard()\nprint(count)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "said\n6\n"  # bytes of "damage"


@pytest.mark.skipif(sys.platform == "win32", reason="has no pty")
def test_a_terminal_shows_a_bar_only_where_there_is_something_to_do(tmp_path):
    make(tmp_path / "videos/x.mp4", picture="testsrc2=s=640x480:d=4")
    assert "preparing: " in prepare_on_terminal(tmp_path / "videos", tmp_path / "out")
    text = prepare_on_terminal(tmp_path / "videos", tmp_path / "out")
    assert text.startswith("kept: 1 clip of 1 video"), text


def test_names_do_not_collide(tmp_path):
    for name in ("a/x.mp4", "b/x.mp4", "a/x.avi", "a__x.mp4", "A/X.mp4"):
        make(tmp_path / "videos" / name, "-frames:v", "2")
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert len({line["directory"].casefold() for line in lines.values()}) == 5
    assert lines["a/x.mp4"]["directory"] == "a__x" and lines["a/x.avi"]["directory"] == "a__x+avi"


@pytest.mark.parametrize(
    "source, name",
    [("a/x.webm", "a__x+webm"), ("x.mp4", "x"), ("2024.05.01.mp4", "2024.05.01"), ("X.MP4", "X+"), ("x.mov", "x+mov")]
    + [("x.y.MOV", "x.y+"), ("e..mp4", "e+"), ("rec.xyz", "rec.xyz+"), ("x", "x+"), ("x_.webm", "x_+")],
)
def test_folder_names_have_no_suffix_of_a_video(source, name):
    found = directory_name(source)
    assert re.fullmatch(re.escape(name) + (r"[0-9a-f]{8}" if name.endswith("+") else ""), found), found


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
    motion = clip_motion(frames_of(tmp_path / "out", line), line["fps"])
    assert line["motion"] == pytest.approx(motion, abs=2e-3)
    assert line["motion_bucket_id"] == motion_bucket(motion)
    assert [motion_bucket(m) for m in (0, 1.5, 1e9)] == [0, 128, 255]


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


def test_what_is_made_again_is_named(tmp_path):
    for number in range(7):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "3")
    said = "made again, because a folder of it was missing or not whole: "
    assert said not in prepare(tmp_path / "videos", tmp_path / "out")[0]
    shutil.rmtree(tmp_path / "out/3")
    assert f"{said}1 video (3.mp4)\n" in prepare(tmp_path / "videos", tmp_path / "out")[0]
    for number in range(7):
        (tmp_path / f"out/{number}/00001.png").unlink()
    text = prepare(tmp_path / "videos", tmp_path / "out")[0]
    assert f"{said}7 videos (0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 2 more)\n" in text
    make(tmp_path / "videos/0.mp4", "-frames:v", "2")
    for options in (["--overwrite"], [], ["--overwrite", "--fps", "5"]):  # changed, as it was, other options
        assert said not in prepare(tmp_path / "videos", tmp_path / "out", *options)[0]


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


# ------------------------------------------------------------------------------------------------------ every file

LIBX264 = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
FILES = {  # name: encoder options, what the record must say
    "hevc.mkv": (["-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p"], {"decoder": "opencv"}),
    "ten.mp4": (["-c:v", "libx264", "-pix_fmt", "yuv420p10le"], {"decoder": "ffmpeg"}),
    "444.mp4": (["-c:v", "libx264", "-pix_fmt", "yuv444p"], {"decoder": "ffmpeg"}),
    "gray.mp4": (["-c:v", "libx264", "-pix_fmt", "gray"], {"num_frames": 25}),
    "alpha.mov": (["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"], {"notes": ["alpha dropped"]}),
    "vp8.webm": (["-c:v", "libvpx", "-auto-alt-ref", "1", "-lag-in-frames", "16"], {"decoder": "opencv"}),
    "vp9.webm": (["-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p"], {"decoder": "opencv"}),
    "mpeg2.mpg": (["-c:v", "mpeg2video", "-bf", "2"], {"codec": "mpeg2video"}),
    "mpeg4.avi": (["-c:v", "mpeg4", "-bf", "2"], {"codec": "mpeg4"}),
    "mjpeg.avi": (["-c:v", "mjpeg", "-pix_fmt", "yuvj420p"], {"codec": "mjpeg"}),
    "ffv1.mkv": (["-c:v", "ffv1"], {"codec": "ffv1"}),
    "anim.gif": ([], {"codec": "gif"}),
    "anim.webp": (["-c:v", "libwebp_anim"], {"num_frames": 25}),
    "bare.h264": (LIBX264, {"fps": 25}),
    "bare.hevc": (["-c:v", "libx265", "-x265-params", "log-level=none"], {"fps": 25}),
    "bare.m2v": (["-c:v", "mpeg2video", "-bf", "2"], {"fps": 25}),
    "bare.mjpeg": (["-c:v", "mjpeg"], {"num_frames": 25}),
    "box.ts": (LIBX264, {"fps": 25}),
    "box.flv": (LIBX264, {"fps": 25}),
    "box.avi": (LIBX264, {"fps": 25}),
    "fragments.mp4": ([*LIBX264, "-movflags", "frag_keyframe+empty_moov", "-g", "5"], {"num_frames": 25}),
    "bframes.mp4": ([*LIBX264, "-bf", "8", "-x264-params", "b-pyramid=2"], {"decoder": "opencv"}),
    "bt709.mp4": ([*LIBX264, "-vf", "setparams=colorspace=bt709", "-colorspace", "bt709"], {"decoder": "opencv"}),
    "full.mp4": ([*LIBX264, "-vf", "setparams=range=pc", "-color_range", "pc"], {"decoder": "opencv"}),
    "2020.mp4": ([*LIBX264, "-vf", "setparams=colorspace=bt2020nc", "-colorspace", "bt2020nc"], {"decoder": "ffmpeg"}),
    "tff.mp4": ([*LIBX264, "-vf", "setfield=tff", "-x264opts", "tff=1"], {"notes": ["interlaced"]}),
    "vfr.mp4": ([*LIBX264, "-vf", "setpts='(N+floor(N/5))/25/TB'", *UNEVEN_MP4], {"fps": 25.0}),
    "hole.mp4": (
        [*LIBX264, "-vf", "setpts='if(lt(N,10),N,N+125)/25/TB'", *UNEVEN_MP4],
        {"fps": 25, "holes": [5.04], "num_frames": 25},
    ),
    "odd.avi": (["-vf", "crop=95:63:exact=1", "-c:v", "mjpeg", "-pix_fmt", "yuvj420p"], {"width": 95, "height": 63}),
    "tiny.mkv": (["-vf", "scale=2:2,setsar=1", "-c:v", "ffv1"], {"width": 2}),
    "black.mp4": ([*LIBX264, "-vf", "drawbox=t=fill:color=black"], {"motion": 0}),
    "one.mp4": ([*LIBX264, "-frames:v", "1"], {"num_frames": 1, "motion": 0, "fps": 25}),
}
if OLD:  # which cannot read them: `reads_ts`, and animated WebP
    del FILES["box.ts"], FILES["anim.webp"]


def test_every_kind_of_file_as_ffmpeg_extracts_it(tmp_path):
    videos = tmp_path / "videos"
    for name, (options, _) in FILES.items():
        make(videos / name, *options)
    ffmpeg("-ss", "0.5", "-i", videos / "bframes.mp4", "-c", "copy", videos / "edit.mp4")
    two = ["-i", videos / "ffv1.mkv", "-i", videos / "vp9.webm", "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*two, videos / "two_tracks.mkv")
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", "1", tmp_path / "cover.png")
    cover = ["-i", videos / "bframes.mp4", "-i", tmp_path / "cover.png", "-map", "1", "-map", "0", "-c", "copy"]
    ffmpeg(*cover, "-disposition:v:0", "attached_pic", videos / "cover.mp4")
    for name, options in {"turned": ["-display_rotation", "90"], "mirrored": ["-display_hflip"]}.items():
        ffmpeg(*options, "-i", videos / "bframes.mp4", "-c", "copy", videos / f"{name}.mp4")
    small, large = make(tmp_path / "small.h264", *LIBX264), make(tmp_path / "large.h264", "-s", "192x96", *LIBX264)
    joined(videos / "size_changes.h264", small, large)
    lines = prepare(videos, tmp_path / "out")[1]
    for path in sorted(videos.iterdir()):
        line = lines[path.name]
        expected = FILES.get(path.name, (None, {}))[1]
        assert {key: line[key] for key in expected} == expected, path.name
        frames, reference = frames_of(tmp_path / "out", line), extract(path, tmp_path / "ffmpeg" / path.name)
        assert len(frames) == len(reference) == line["num_frames"], path.name
        assert len({frame.shape for frame in frames}) == 1, path.name
        if path.name != "size_changes.h264":
            assert all(np.array_equal(a, b) for a, b in zip(frames, reference)), path.name
    assert lines["edit.mp4"]["num_frames"] < 20 and lines["size_changes.h264"]["num_frames"] == 50
    assert (lines["turned.mp4"]["width"], lines["turned.mp4"]["height"]) == (64, 96)


def test_square_pixels(tmp_path):
    for name, ratio in {"wide.mp4": "2/1", "narrow.avi": "1/2"}.items():
        make(tmp_path / "videos" / name, "-vf", f"setsar={ratio}")
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert (lines["wide.mp4"]["width"], lines["wide.mp4"]["height"]) == (192, 64)
    assert (lines["narrow.avi"]["width"], lines["narrow.avi"]["height"]) == (48, 64)


def test_hdr_is_made_sdr(tmp_path):
    tags = "log-level=none:colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
    make(tmp_path / "videos/x.mp4", "-c:v", "libx265", "-x265-params", tags, "-pix_fmt", "yuv420p10le")
    line = prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]
    assert line["notes"] == ["HDR (smpte2084) made SDR"]
    assert 40 < np.mean(frames_of(tmp_path / "out", line)) < 220


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv", "h264", pytest.param("ts", marks=reads_ts), "mpg"])
def test_damage_does_not_end_the_video(tmp_path, suffix):
    make(tmp_path / f"whole.{suffix}", "-g", "10", "-movflags", "+faststart", picture="testsrc2=s=320x240:d=3")
    data = bytearray((tmp_path / f"whole.{suffix}").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    (tmp_path / "videos").mkdir()
    (tmp_path / f"videos/x.{suffix}").write_bytes(data)
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    line = lines[f"x.{suffix}"]
    assert 60 <= line["num_frames"] <= 75 and "damaged" in " ".join(line["problems"]) and "kept, but: 1" in text
    before = tree(tmp_path / "out")
    prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert tree(tmp_path / "out") == before


def test_a_playlist_is_never_followed(tmp_path):
    make(tmp_path / "secret.mp4")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_text(f"\n \nffconcat version 1.0\nfile {tmp_path}/secret.mp4\n")
    (tmp_path / "videos/b.mkv").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/secret.mp4\n")
    (tmp_path / "videos/c.mp4").write_text('<?xml version="1.0"?><MPD type="static"><Period/></MPD>')
    (tmp_path / "videos/d.mp4").write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert not lines and text.count("playlist") == 4


NAMES = ["a b.mp4", "'q\"uote.mp4", "new\nline.mp4", "100%d.mp4", "-dash.mp4", "http:x.mp4", "CON.mp4", "con.mp4"]
NAMES += ["Straße 机器人.mp4", "pipe:1.mp4", "x" * 251 + ".mp4", "c\\d.mp4", "e..mp4", "%05d.gif", "f.MP4", "F.mp4"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that other systems do not allow")
def test_any_name(tmp_path):
    make(tmp_path / "x.mp4", "-frames:v", "2")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in [*NAMES, os.fsdecode(b"not\xffutf8.mp4")]:
        (videos / name).write_bytes((tmp_path / "x.mp4").read_bytes())
    lines = prepare(videos, tmp_path / "out")[1]
    assert set(lines) == {*NAMES, os.fsdecode(b"not\xffutf8.mp4")}
    folders = [line["directory"] for line in lines.values()]
    assert len({folder.casefold() for folder in folders}) == len(folders)
    for folder in folders:
        assert all(c.isalnum() or c in "._-+" for c in folder) and folder[0] not in ".-" and len(folder.encode()) < 150
        assert folder.split(".")[0].lower() != "con"
    assert all(len(frames_of(tmp_path / "out", line)) == 2 for line in lines.values())


def test_hidden_partial_and_looping_paths(tmp_path):
    videos = tmp_path / "videos"
    for name in (
        "a/x.mp4",
        ".hidden/x.mp4",
        "a/._x.mp4",
        "__MACOSX/x.mp4",
        "b/half.mp4",
        "b/half.mp4.part",
        "b/y.mp4.part",
    ):
        make(videos / name, "-frames:v", "1", "-f", "mp4")
    (videos / "a/loop").symlink_to(videos)
    (videos / "elsewhere").symlink_to(videos / "a")
    assert set(prepare(videos, tmp_path / "out")[1]) == {"a/x.mp4"}


# -------------------------------------------------------------------------------------------- what a dataset needs


def test_size_covers_and_crops(tmp_path):
    make(tmp_path / "videos/wide.mp4", picture="testsrc2=s=400x100:d=0.2")
    make(tmp_path / "videos/tall.mp4", picture="testsrc2=s=100x300:d=0.2")
    make(tmp_path / "videos/small.mp4", picture="testsrc2=s=32x32:d=0.2")
    lines = prepare(tmp_path / "videos", tmp_path / "out", "--width", "64", "--height", "48")[1]
    for name, line in lines.items():
        frame = frames_of(tmp_path / "out", line)[2]
        whole = extract(tmp_path / "videos" / name, tmp_path / name)[2]
        assert frame.shape == (48, 64, 3)
        assert np.abs(frame.astype(int) - svd_common.fit_frame(whole, 64, 48)).mean() < 6, name


def test_isal_writes_the_same_pixels_where_it_is_installed(tmp_path):
    pytest.importorskip("isal")
    make(tmp_path / "videos/odd.mkv", "-c:v", "ffv1", picture="testsrc2=s=99x33:d=0.2")
    (tmp_path / "no").mkdir()
    (tmp_path / "no/isal.py").write_text("raise ImportError")
    without = {**os.environ, "PYTHONPATH": str(tmp_path / "no")}
    plain = prepare(tmp_path / "videos", tmp_path / "plain", env=without)[1]["odd.mkv"]
    unasked = prepare(tmp_path / "videos", tmp_path / "unasked")[1]["odd.mkv"]
    first = next((tmp_path / "plain").rglob("*.png")).relative_to(tmp_path / "plain")
    packed = [(tmp_path / "plain" / first).read_bytes()]
    assert unasked == plain and (tmp_path / "unasked" / first).read_bytes() not in packed
    fast = prepare(tmp_path / "videos", tmp_path / "fast", "--fast_png")[1]["odd.mkv"]
    assert fast == plain
    assert np.array_equal(frames_of(tmp_path / "fast", fast), frames_of(tmp_path / "plain", plain))
    assert (tmp_path / "fast" / first).read_bytes() not in packed  # and it was another encoder


def test_fast_png_is_refused_for_jpg_and_without_isal(tmp_path):
    (tmp_path / "videos").mkdir()
    text = prepare(tmp_path / "videos", tmp_path / "out", "--fast_png", "--image_format", "jpg", status=2)[0]
    assert "--fast_png is for --image_format png" in text
    (tmp_path / "isal.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    text = prepare(tmp_path / "videos", tmp_path / "out", "--fast_png", status=2, env=environment)[0]
    assert "--fast_png needs: pip install isal" in text


def test_fps_by_timestamps(tmp_path):
    make(tmp_path / "videos/thirty.mp4", picture="testsrc2=s=96x64:r=30:d=2")
    make(tmp_path / "videos/slow.mp4", picture="testsrc2=s=96x64:r=5:d=2")
    uneven = ["-vf", "setpts='if(lt(N,30),N,30+(N-30)*3)/30/TB'", *UNEVEN_MP4]  # 30 a second, then 10
    make(tmp_path / "videos/uneven.mp4", *uneven, picture="testsrc2=s=96x64:r=30:d=2")
    lines = prepare(tmp_path / "videos", tmp_path / "out", "--fps", "10")[1]
    assert {name: (line["fps"], line["num_frames"]) for name, line in lines.items()} == {
        "thirty.mp4": (10, 20),
        "slow.mp4": (5, 10),
        "uneven.mp4": (10, 40),
    }
    frames, whole = (
        frames_of(tmp_path / "out", lines["thirty.mp4"]),
        extract(tmp_path / "videos/thirty.mp4", tmp_path / "f"),
    )
    assert np.array_equal(frames, whole[::3])


def test_clips_and_stride(tmp_path):
    make(tmp_path / "videos/x.mp4")
    command = ["--clip_frames", "10", "--clip_stride", "5", "--image_format", "jpg"]
    text = prepare(tmp_path / "videos", tmp_path / "out", *command)[0]
    assert sorted(d for d in os.listdir(tmp_path / "out") if d[0] == "x") == [f"x@{n:04d}" for n in range(4)]
    assert "dropped: 1" in text and "x@0004: 5 frames, shorter than 10 frames" in text
    second, third = (list_frames(tmp_path / "out" / f"x@000{n}") for n in (1, 2))
    assert second[5].read_bytes() == third[0].read_bytes() and second[0].suffix == ".jpg"
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [line["start"] for line in lines] == [0, 0.2, 0.4, 0.6]
    prepare(tmp_path / "videos", tmp_path / "out", *command)  # what was dropped is not done again


def test_min_motion_and_min_frames(tmp_path):
    make(tmp_path / "videos/moves.mp4")
    make(tmp_path / "videos/still.mp4", picture="color=gray:s=96x64:d=1")
    make(tmp_path / "videos/short.mp4", "-frames:v", "4")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", "--min_motion", "0.5", "--min_frames", "5")
    assert set(lines) == {"moves.mp4"}
    assert "still: motion 0" in text and "short: 4 frames, shorter than 5 frames" in text


def test_split_scenes(tmp_path):
    shots = ["testsrc2=s=160x120:d=1", "smptebars=s=160x120:d=1", "mandelbrot=s=160x120,trim=duration=1"]
    inputs = [part for shot in shots for part in ("-f", "lavfi", "-i", shot)]
    (tmp_path / "videos").mkdir()
    ffmpeg(
        *inputs,
        "-filter_complex",
        "[0]fps=25[a];[1]fps=25[b];[2]fps=25[c];[a][b][c]concat=n=3",
        tmp_path / "videos/x.mp4",
    )
    make(tmp_path / "videos/one.mp4", picture="testsrc2=s=160x120:d=3")
    prepare(tmp_path / "videos", tmp_path / "out", "--split_scenes")
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [line["directory"] for line in lines] == ["one@0000", "x@0000", "x@0001", "x@0002"]
    assert [line["num_frames"] for line in lines[1:]] == [25, 25, 25]


def test_include_exclude(tmp_path):
    for name in ("a/x.mp4", "a/y.mp4", "b/x.mp4"):
        make(tmp_path / "videos" / name, "-frames:v", "1")
    lines = prepare(tmp_path / "videos", tmp_path / "out", "--include", "a/*", "--exclude", "y*")[1]
    assert set(lines) == {"a/x.mp4"}
    assert "leave none" in prepare(tmp_path / "videos", tmp_path / "out2", "--include", "z*", status=2)[0]


def test_clips_that_are_no_longer_chosen_are_named_while_they_stay(tmp_path):
    for number in range(9):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "2")
    videos, out, title = tmp_path / "videos", tmp_path / "out", "in the dataset, though not chosen now: "
    (tmp_path / "kept.txt").write_text("0.mp4\n1.mp4\n")
    assert title not in prepare(videos, out, "--include", f"@{tmp_path / 'kept.txt'}")[0]
    (tmp_path / "kept.txt").write_text("1.mp4\n2.mp4\n")
    text, lines = prepare(videos, out, "--include", f"@{tmp_path / 'kept.txt'}")
    cure = "it stays; delete its folder, or give another --output_dir\n"
    assert f"{title}1 clip of 1 video (0.mp4): {cure}" in text and len(lines) == 3
    assert f"{title}1 clip of 1 video (0.mp4): {cure}" in prepare(videos, out, "--exclude", "0.mp4", "--overwrite")[0]
    names = "0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 3 more"
    assert f"{title}8 clips of 8 videos ({names}): they stay; delete" in prepare(videos, out, "--include", "8.mp4")[0]
    for part in ("0/2", "1/2"):  # the other part's videos are chosen
        assert title not in prepare(videos, out, "--shard", part)[0]
    shutil.rmtree(out / "0")
    assert title not in prepare(videos, out, "--exclude", "0.mp4")[0]


def test_files_with_the_same_content_are_named_once(tmp_path):
    videos, said = tmp_path / "all/videos", "the same content: "
    for number in range(3):
        make(videos / f"{number}.mp4", "-frames:v", "9", picture=f"testsrc2=s={96 + 16 * number}x64")
    assert said not in prepare(videos, tmp_path / "out", "--clip_frames", "3")[0]
    (videos / "b").mkdir()
    shutil.copy(videos / "0.mp4", videos / "b/copy#1.mp4")
    cure = "; training holds them out together; train_svd.py --exclude CLIP leaves one out\n"
    text = prepare(videos, tmp_path / "out", "--clip_frames", "3")[0]
    assert f"{said}0.mp4 and b/copy#1.mp4{cure}" in text and "any more" not in text
    shutil.rmtree(videos / "b")
    text = prepare(tmp_path / "all", tmp_path / "out", "--clip_frames", "3")[0]
    assert f"{said}0.mp4 and b/copy#1.mp4 (and 3 more pairs){cure}" in text and text.count(said) == 1
    for folder in (tmp_path / "out").glob("[0-9b]*"):
        shutil.rmtree(folder)
    assert said not in prepare(tmp_path / "all", tmp_path / "out", "--clip_frames", "3")[0]


def lerobot_v2(folder):
    for camera in ("observation.images.top", "observation.images.wrist"):
        for episode in (0, 1):
            make(folder / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4", "-frames:v", "3")


def test_lerobot_v2_groups_and_camera(tmp_path):
    lerobot_v2(tmp_path / "videos/pusht")
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert len(lines) == 4
    assert {line["group"] for line in lines.values()} == {"pusht/episode_000000", "pusht/episode_000001"}
    lines = prepare(tmp_path / "videos/pusht", tmp_path / "out2", "--camera", "wrist")[1]
    assert {line["group"] for line in lines.values()} == {"episode_000000", "episode_000001"} and len(lines) == 2
    text = prepare(tmp_path / "videos", tmp_path / "out3", "--camera", "left", status=2)[0]
    assert "observation.images.top" in text


LEROBOT_FIELDS = ("camera", "episode_index", "task", "robot_type", "generated")


def test_lerobot_v2_tasks_and_robot_are_carried(tmp_path):
    videos, meta = tmp_path / "videos", tmp_path / "videos/pusht/meta"
    lerobot_v2(videos / "pusht")
    make(videos / "plain.mp4", "-frames:v", "3")
    meta.mkdir()
    (meta / "info.json").write_text('{"codebase_version": "v2.1", "robot_type": "so100"}')
    rows = [{"episode_index": 0, "tasks": ["推 the T", "go home"]}, {"episode_index": 1, "tasks": []}]
    (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = prepare(videos, tmp_path / "out", "--camera", "", "top")[1]
    found = {source: [line.get(field) for field in LEROBOT_FIELDS] for source, line in lines.items()}
    top = "observation.images.top"
    assert list(found.values()) == [
        [None] * 5,
        [top, 0, "推 the T; go home", "so100", None],
        [top, 1, None, "so100", None],
    ]
    (meta / "info.json").write_text("{")
    assert "info.json: not a JSON object" in prepare(videos, tmp_path / "out2", status=2)[0]


def lerobot_v3(folder):
    make(folder / "videos/observation.images.top/chunk-000/file-000.mp4", picture="testsrc2=s=96x64:r=10:d=3")
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (folder / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"PAR1")


def test_lerobot_v3_is_refused_without_pyarrow(tmp_path):
    lerobot_v3(tmp_path / "videos")
    (tmp_path / "no/pyarrow").mkdir(parents=True)
    (tmp_path / "no/pyarrow/__init__.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "no")}
    text = prepare(tmp_path / "videos", tmp_path / "out", status=2, env=environment)[0]
    assert "pyarrow" in text and "several episodes" in text


def fake_pyarrow(folder, rows):
    """What the script uses of pyarrow, with `rows` in every table; reading a table with all its columns is a fault."""
    (folder / "pyarrow").mkdir(parents=True)
    (folder / "pyarrow/__init__.py").touch()
    code = f"class Schema:\n    names = {[*rows[0], 'stats/action/max']}\n"
    code += "class Table:\n    def __init__(self, columns): self.columns = columns\n"
    code += f"    def to_pylist(self): return [{{key: row[key] for key in self.columns}} for row in {rows}]\n"
    code += "def read_schema(path): return Schema\ndef read_table(path, columns): return Table(columns)\n"
    (folder / "pyarrow/parquet.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(folder)}


def prepare_v3(folder, episodes, *flags, **options):
    """A LeRobot v3 file of 30 frames at 10 a second whose metadata names `episodes`: [(first second, end, frames)]."""
    lerobot_v3(folder / "videos")
    key, rows = "videos/observation.images.top/", []
    for episode, (start, end, length) in enumerate(episodes):
        row = {"episode_index": episode, key + "chunk_index": 0, key + "file_index": 0, "tasks": [f"task {episode}"]}
        row.update({} if length is None else {"length": length})
        rows.append({**row, key + "from_timestamp": start, key + "to_timestamp": end})
    (folder / "videos/meta/info.json").write_text('{"robot_type": "so100", "generated": true}')
    text, _ = prepare(folder / "videos", folder / "out", *flags, env=fake_pyarrow(folder / "fake", rows), **options)
    path = folder / "out/metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        found, number = [line.get(field) for field in LEROBOT_FIELDS], line["episode_index"]
        assert found == ["observation.images.top", int(line["group"][-6:]), f"task {number}", "so100", True]
    return text, {line["group"]: line["num_frames"] for line in lines}


@pytest.mark.parametrize("drift", [0, 0.02], ids=["by timestamps", "by numbers of frames"])
def test_lerobot_v3_is_cut_at_its_episodes(tmp_path, drift):
    lengths = [None] * 3 if not drift else [8, 13, 9]
    ends = [0.8 + drift, 2.1 + 5 * drift, 3.0 + 6 * drift]
    groups = prepare_v3(tmp_path, list(zip([0.0, *ends], ends, lengths)))[1]
    assert groups == {"episode_000000": 8, "episode_000001": 13, "episode_000002": 9}


def test_lerobot_metadata_that_is_damaged_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    lerobot_v3(tmp_path / "videos")
    for name, data in (("file-000.parquet", b"PAR1"), ("._file-000.parquet", b"of macOS")):
        path = tmp_path / "videos/meta/episodes/chunk-000" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    text, _ = prepare(tmp_path / "videos", tmp_path / "out", status=2)
    assert text.count("\n") == 1 and "file-000.parquet: not the episodes of a LeRobot dataset" in text
    assert not (tmp_path / "out").exists()
    lerobot_v2(tmp_path / "old")
    (tmp_path / "old/meta").mkdir()
    (tmp_path / "old/meta/episodes.jsonl").write_text(
        '{"episode_index": [0]}\n{"episode_index": 0, "tasks": "push it"}\n'
    )
    _, lines = prepare(tmp_path / "old", tmp_path / "out")
    assert {line.get("task") for line in lines.values()} >= {"push it"}


def test_lerobot_v3_that_does_not_fit_is_named(tmp_path):
    text, groups = prepare_v3(tmp_path / "a", [(460.4, 461.4, 10), (461.4, 463.4, 20)], status=1)
    assert not groups and "file-000.mp4: meta/episodes" in text and "460.4 s" in text
    text, groups = prepare_v3(tmp_path / "b", [(460.4, 461.4, None), (461.4, 463.4, None)], status=1)
    assert not groups and "file-000.mp4: meta/episodes says" in text
    text, groups = prepare_v3(tmp_path / "c", [(0, 2, 20), (2, 4, 20)], status=1)
    assert groups == {"episode_000000": 20, "episode_000001": 10} and "episode 1: fewer frames" in text


def test_preview_and_summary(tmp_path):
    for name in ("x", "y"):
        make(tmp_path / f"videos/{name}.mp4")
    text = prepare(tmp_path / "videos", tmp_path / "out")[0]
    assert svd_common.read_image(tmp_path / "out/preview.jpg").shape[0] == 160
    for word in ("2 clips of 2 videos, 50 frames", "fps: 25 to 25", "motion_bucket_id:", "96x64"):
        assert word in text


def test_preview_keeps_the_aspect_ratio(tmp_path):
    for name, size in (("1", "320x568"), ("2", "640x480"), ("3", "1920x16")):
        make(tmp_path / f"videos/{name}.mkv", "-c:v", "ffv1", picture=f"color=red:s={size}:d=0.2")
    prepare(tmp_path / "videos", tmp_path / "out")
    sheet = svd_common.read_image(tmp_path / "out/preview.jpg").astype(int)
    sheet = sheet[:, -4 * 144 : -3 * 144]  # the first of four pictures, right of the names
    for row, (width, height) in enumerate([(44, 78), (104, 78), (142, 1)]):
        red = sheet[80 * row : 80 * row + 80, :, 1] < 100
        assert abs(red.any(0).sum() - width) <= 2 and abs(red.any(1).sum() - height) <= 2, row


@pytest.mark.parametrize(
    "name, videos, options, ending",
    [
        ("out one", 1, "--width 64 --height 64 --clip_frames 8", "--num_frames 8 --width 64 --height 64"),
        ("two", 2, "--width 70 --height 40 --clip_frames 8", "--width 64 --height 64 --num_validation_videos 3"),
        ("three", 3, "--width 64 --height 64 --max_frames 3", "--num_frames 3 --width 64 --height 64 --num_valida"),
    ],
)
def test_the_next_command_that_is_printed_works(tmp_path, name, videos, options, ending):
    for number in range(videos):  # of different content: copies are held out together
        make(tmp_path / f"videos/{number}.mp4", picture=f"testsrc2=s={96 + 16 * number}x64:d=1")
    text, _ = prepare(tmp_path / "videos", tmp_path / name, *options.split())
    command = text.rpartition("next: ")[2].strip()
    assert ending in command, text
    python, *words = shlex.split(command.replace("MODEL", shlex.quote(str(TINY))))
    assert python == "python"
    steps = ["--max_train_steps", "1", "--validation_inference_steps", "1"]
    done = run(*words, *steps, "--output_dir", tmp_path / "trained")
    assert ("held out" in done.stdout) == (videos > 1)
    if videos == 1:
        assert "nothing can be held out" in text
    assert ("64x64 is the nearest to 70x40" in text) == (videos == 2)


def test_the_next_command_counts_copies_once_and_deleted_clips_not_at_all(tmp_path):
    make(tmp_path / "videos/0.mp4", "-frames:v", "3")
    shutil.copy(tmp_path / "videos/0.mp4", tmp_path / "videos/copy.mp4")
    text = prepare(tmp_path / "videos", tmp_path / "out")[0]
    assert "nothing can be held out" in text and "--num_validation_videos" not in text
    for number in (1, 2):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "3", picture=f"testsrc2=s={96 + 16 * number}x64")
    assert prepare(tmp_path / "videos", tmp_path / "out")[0].endswith(" --num_validation_videos 2\n")
    shutil.rmtree(tmp_path / "out/2")
    assert prepare(tmp_path / "videos", tmp_path / "out", "--exclude", "2*")[0].endswith(" --num_validation_videos 1\n")


def test_clips_of_one_frame_are_not_sent_to_training(tmp_path):
    make(tmp_path / "videos/x.mp4")
    text, _ = prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "1")
    assert "no clip has 2 frames" in text and "next:" not in text


# ------------------------------------------------------------------------------------- awkward files, and what is right


def joined(path, *parts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_recordings_joined_into_one_file(tmp_path, suffix):
    codec = ["-c:v", "libvpx" if suffix == "webm" else "libx264", "-pix_fmt", "yuv420p"]
    first = make(tmp_path / f"a.{suffix}", *codec)
    second = make(tmp_path / f"b.{suffix}", *codec, picture="testsrc=size=96x64:rate=25:duration=0.8")
    path = joined(tmp_path / f"videos/x.{suffix}", first, second)
    whole = extract(path, tmp_path / "ffmpeg")
    for options in ([], ["--fps", "25"]):
        line = prepare(tmp_path / "videos", tmp_path / f"out{len(options)}", *options)[1][path.name]
        assert line["num_frames"] == len(whole) == 45 and line["fps"] == 25 and line["duration"] == 1.8
        assert np.array_equal(frames_of(tmp_path / f"out{len(options)}", line), whole)


def test_a_joined_flash_video_of_which_ffmpeg_reads_the_first_is_noted(tmp_path):
    one = make(tmp_path / "one.flv", *LIBX264, picture=PICTURE + ",noise=alls=30:allf=t")
    joined(tmp_path / "videos/two.flv", one, one)
    joined(tmp_path / "videos/one.flv", one)
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert not lines["one.flv"]["notes"] and lines["one.flv"]["num_frames"] == 25
    assert lines["two.flv"]["num_frames"] == 50 or "belong to nothing" in lines["two.flv"]["notes"][-1]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "avi"])
def test_bytes_that_belong_to_nothing_are_noted(tmp_path, suffix):
    one = make(tmp_path / f"one.{suffix}", "-pix_fmt", "yuv420p")
    joined(tmp_path / f"videos/one.{suffix}", one)
    if suffix != "avi":  # of which ffmpeg reads both
        joined(tmp_path / f"videos/two.{suffix}", one, one)
    (tmp_path / f"videos/padded.{suffix}").write_bytes(one.read_bytes() + os.urandom(5000))
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert {line["num_frames"] for line in lines.values()} == {25} and not lines[f"one.{suffix}"]["notes"]
    assert suffix == "avi" or f"last {one.stat().st_size} bytes" in lines[f"two.{suffix}"]["notes"][0]
    assert "last 5000 bytes" in lines[f"padded.{suffix}"]["notes"][0]


SOUND = ["-f", "lavfi", "-i", "sine=duration=4", "-c:a", "aac"]


@pytest.mark.parametrize("options", [[], ["--max_frames", "25"], ["--max_frames", "9"]])
def test_sound_that_lasts_longer_is_no_damage(tmp_path, options):
    make(tmp_path / "videos/x.mp4", *SOUND, *LIBX264)
    assert prepare(tmp_path / "videos", tmp_path / "out", *options)[1]["x.mp4"]["problems"] == []


@pytest.mark.parametrize(
    "options",
    [
        ["-bsf:v", "h264_metadata=crop_left=10:crop_right=6:crop_top=4:crop_bottom=2"],
        ["-vf", "format=yuv420p,setparams=range=tv:color_primaries=smpte432:color_trc=bt709:colorspace=bt709"],
    ],
)
def test_where_opencv_gives_another_picture_ffmpeg_decodes(tmp_path, options):
    make(tmp_path / "videos/x.mp4", *LIBX264, *options, picture="testsrc2=size=320x192:rate=25:duration=0.2")
    line = prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]
    expected = extract(tmp_path / "videos/x.mp4", tmp_path / "expected")
    assert np.array_equal(frames_of(tmp_path / "out", line), expected)


@reads_ts
def test_joined_and_padded_streams_are_whole(tmp_path):
    """Timestamps that jump, and zeros before the file."""
    for name, start in {"a": "0", "b": "1000"}.items():
        make(tmp_path / f"{name}.ts", *LIBX264, "-output_ts_offset", start)
    parts = [(tmp_path / f"{name}.ts").read_bytes() for name in "ab"]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/jump.ts").write_bytes(b"".join(parts))
    (tmp_path / "videos/zeros.ts").write_bytes(bytes(1880) + parts[0])
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert {name: (line["num_frames"], line["fps"]) for name, line in lines.items()} == {
        "jump.ts": (50, 25), "zeros.ts": (25, 25),
    }  # fmt: skip


def test_hdr_whose_primaries_nobody_named(tmp_path):
    picture = f"{PICTURE},format=yuv420p10le,setparams=color_trc=smpte2084"
    make(tmp_path / "videos/x.mp4", "-c:v", "libx265", "-x265-params", "log-level=none", picture=picture)
    line = prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "2")[1]["x.mp4"]
    assert line["num_frames"] == 2 and line["notes"] == ["HDR (smpte2084) made SDR"]


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi", "x.flv", "x.wmv", "fragments.mp4"])
def test_truncated_with_sound_is_named(tmp_path, name):
    fragments = ["-movflags", "frag_keyframe+empty_moov" if "fragments" in name else "+faststart"]
    options = [*SOUND, *fragments, "-g", "10", "-b:v", "300k", "-bf", "0"]
    whole = make(tmp_path / name, *options, picture="testsrc2=s=160x96:r=25:d=4,noise=alls=20:allf=t")
    joined(tmp_path / "videos/whole" / name, whole)
    (tmp_path / "videos" / name).write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
    lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)[1]
    assert lines[name]["truncated"] and lines[name]["problems"] and lines[name]["num_frames"] < 80
    assert lines["whole/" + name]["num_frames"] == 100 and not lines["whole/" + name]["problems"]


def test_a_last_frame_that_lasts_and_a_longer_track_are_no_truncation(tmp_path):
    videos, hold = tmp_path / "videos", ["-vf", "setpts='if(lt(N,24),N,N+100)/25/TB'", *UNEVEN_MP4]
    make(tmp_path / "short.mp4", "-pix_fmt", "yuv420p")
    make(videos / "held.mp4", *hold, "-frames:v", "25", picture="testsrc2=size=96x64:rate=25:duration=2")
    make(videos / "held.gif", "-final_delay", "400")
    (tmp_path / "x.srt").write_text("1\n00:00:00,000 --> 00:00:06,000\nhello\n")
    for name, codec in {"subtitles.mkv": "srt", "subtitles.mp4": "mov_text"}.items():
        ffmpeg("-i", tmp_path / "short.mp4", "-i", tmp_path / "x.srt", "-c:v", "copy", "-c:s", codec, videos / name)
    ffmpeg("-i", tmp_path / "short.mp4", *SOUND, "-c:v", "copy", videos / "sound.mp4")
    ffmpeg("-i", tmp_path / "short.mp4", "-c", "copy", "-timecode", "01:00:00:00", videos / "timecode.mov")
    lines = prepare(videos, tmp_path / "out")[1]
    assert {line["num_frames"] for line in lines.values()} == {25} and len(lines) == 6


def insert_box(data, parents, box):
    """Puts `box` at the end of an MP4's innermost `parents` box and corrects the lengths around it."""
    data, at = bytearray(data), 0
    for kind in parents:
        at = data.index(kind, at) - 4
        data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + len(box)).to_bytes(4, "big")
    end = at + int.from_bytes(data[at : at + 4], "big") - len(box)
    return bytes(data[:end] + box + data[end:])


SAMPLE_ENTRY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")


@pytest.mark.parametrize(
    "name, size",
    [
        pytest.param("aperture.mov", (120, 80), marks=unless_old(reason="ffmpeg 7.0 shows what a clap box cuts off")),
        ("rotate=90.mp4", (96, 160)),
        ("flip=horizontal.mp4", (160, 96)),
    ],
)
def test_cropping_and_turning_that_the_header_or_the_frames_say(tmp_path, name, size):
    path, plain = tmp_path / "videos" / name, make(tmp_path / "x.mp4", *LIBX264, picture="testsrc2=s=160x96:d=0.4")
    path.parent.mkdir()
    if path.suffix == ".mov":
        numbers = (120, 1, 80, 1, 0, 1, 0, 1)  # width, height, and how far the centre is off, as fractions
        aperture = b"\0\0\0\x28clap" + b"".join(number.to_bytes(4, "big") for number in numbers)
        path.write_bytes(insert_box(plain.read_bytes(), SAMPLE_ENTRY, aperture))
    else:
        ffmpeg("-i", plain, "-c", "copy", "-bsf:v", f"h264_metadata=display_orientation=insert:{path.stem}", path)
    line = prepare(path.parent, tmp_path / "out")[1][name]
    frames = frames_of(tmp_path / "out", line)
    assert (line["width"], line["height"]) == size and line["decoder"] == "ffmpeg"
    assert np.array_equal(frames, extract(path, tmp_path / "ffmpeg"))
    line = prepare(path.parent, tmp_path / "small", "--width", "48", "--height", "48")[1][name]
    frame = frames_of(tmp_path / "small", line)[3].astype(int)
    assert np.abs(frame - svd_common.fit_frame(frames[3], 48, 48)).mean() < 6


@pytest.mark.parametrize(
    "suffix, codec",
    [
        pytest.param("ts", ["-c:v", "libx264", "-g", "10"], marks=reads_ts),
        ("webm", ["-c:v", "libvpx"]),
        pytest.param("ts", ["-c:v", "mpeg2video"], marks=reads_ts),
    ],
)
def test_a_size_that_changes_midway_keeps_the_aspect(tmp_path, suffix, codec):
    circle = "color=gray:s={0}:d=0.4,format=yuv420p,geq=lum='if(lt(hypot(X-W/2,Y-H/2),30),235,16)':cb=128:cr=128"
    wide = make(tmp_path / f"wide.{suffix}", *codec, picture=circle.format("160x96"))
    tall = make(tmp_path / f"tall.{suffix}", *codec, picture=circle.format("96x160"))
    path = joined(tmp_path / f"videos/x.{suffix}", wide, tall)
    for options, radius in (([], 50), (["--width", "80", "--height", "48"], 25), (["--max_frames", "18"], 50)):
        line = prepare(tmp_path / "videos", tmp_path / "out", *options, "--overwrite")[1][path.name]
        frames = frames_of(tmp_path / "out", line)
        assert (
            len(frames) in ((18,) if "--max_frames" in options else (19, 20))
            and len({frame.shape for frame in frames}) == 1
        )
        bright = frames[-1][:, :, 1] > 128  # the circle, enlarged until 96 pixels cover 160, and cut at top and bottom
        assert bright[len(bright) // 2].sum() == pytest.approx(2 * radius, abs=4), options
        assert bright.all() or bright.any(1).sum() == min(len(bright), 2 * radius), options


@pytest.mark.parametrize("picture", ["yuv420p10le", "yuv422p10le"])
def test_hdr_of_an_odd_size(tmp_path, picture):
    tags = ["-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc", "-pix_fmt", picture]
    source = f"testsrc2=s=96x64:d=0.2,scale=97:65,setsar=1,format={picture},setparams=color_primaries=bt2020"
    make(tmp_path / "videos/x.mkv", "-c:v", "ffv1", *tags, picture=source + ":colorspace=bt2020nc:color_trc=smpte2084")
    line = prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mkv"]
    assert (line["width"], line["height"], line["num_frames"]) == (97, 65, 5) and "made SDR" in line["notes"][0]
    assert 40 < np.mean(frames_of(tmp_path / "out", line)) < 220


def test_messages_that_are_not_of_the_pictures(tmp_path):
    videos = tmp_path / "videos"
    sound = make(tmp_path / "sound.mp4", *SOUND, "-pix_fmt", "yuv420p", picture=PICTURE + ",format=yuv420p")
    data = bytearray(sound.read_bytes())
    adts = make(tmp_path / "x.mp4", *LIBX264)
    tref = b"\0\0\0\x14tref\0\0\0\x0cchap\0\0\0\x09"  # names a chapter track that is not there
    videos.mkdir()
    (videos / "chapters.mp4").write_bytes(insert_box(adts.read_bytes(), (b"moov", b"trak"), tref))
    listing = [FFMPEG, "-v", "error", "-i", sound, "-map", "0:a", "-c", "copy", "-f", "adts", "-"]
    frame = subprocess.run(listing, capture_output=True, check=True).stdout
    for start in range(0, len(frame) - 200, 199):  # every sound packet that is found again is spoilt
        at = data.find(frame[start + 7 : start + 40])
        if at > 0:
            data[at : at + 12] = b"\xff" * 12
    (videos / "sound.mp4").write_bytes(data)
    webcam = make(tmp_path / "webcam.avi", "-c:v", "mjpeg", "-pix_fmt", "yuvj420p", "-huffman", "0").read_bytes()
    (videos / "webcam.avi").write_bytes(webcam.replace(b"JFIF", b"\0\0\0\0"))
    lines = prepare(videos, tmp_path / "out")[1]
    assert {name: line["num_frames"] for name, line in lines.items()} == {
        "chapters.mp4": 25, "sound.mp4": 25, "webcam.avi": 25,
    }  # fmt: skip


@reads_ts
def test_joined_transport_streams_are_whole(tmp_path):
    one = make(tmp_path / "1.ts", *LIBX264)
    joined(tmp_path / "videos/x.ts", one, one)
    assert prepare(tmp_path / "videos", tmp_path / "out")[1]["x.ts"]["num_frames"] == 50


def test_the_outcome_does_not_depend_on_the_neighbours(tmp_path):
    names = ("damaged.mp4", "two.webm", "vfr.mp4", "plain.mp4")
    data = bytearray(make(tmp_path / "d.mp4", *LIBX264, picture="testsrc2=s=320x240:d=3").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    one = make(tmp_path / "one.webm", "-c:v", "libvpx")
    joined(tmp_path / "videos/two.webm", one, one)
    (tmp_path / "videos/damaged.mp4").write_bytes(data)
    make(tmp_path / "videos/vfr.mp4", *FILES["vfr.mp4"][0]), make(tmp_path / "videos/plain.mp4", *LIBX264)
    together = prepare(tmp_path / "videos", tmp_path / "together", status=1)[1]
    for name in names:
        status = int(name == "damaged.mp4")
        alone = prepare(tmp_path / "videos", tmp_path / name[:3], "--include", name, status=status)[1]
        assert alone[name] == together[name]


@pytest.mark.parametrize("seconds", [600, 3600])
def test_time_lapse_has_its_true_rate(tmp_path, seconds):
    slow = ["-vf", f"setpts=N*{seconds}/TB", "-fps_mode", "passthrough", "-frames:v", "6"]
    make(tmp_path / "videos/x.mkv", *slow), make(tmp_path / "videos/x.mp4", *slow, *UNEVEN_MP4)
    for line in prepare(tmp_path / "videos", tmp_path / "out")[1].values():
        assert line["fps"] == pytest.approx(1 / seconds, rel=1e-4) and line["num_frames"] == 6
        assert line["duration"] == pytest.approx(6 * seconds, rel=1e-4)


def test_split_scenes_leaves_a_moving_camera_whole(tmp_path):
    pan = "color=gray:s=1200x120:r=10:d=4,noise=alls=100:all_seed=1,gblur=2,eq=contrast=4,crop=160:120:x={}:y=0"
    make(tmp_path / "videos/pan.mp4", picture=pan.format("'n*20'"))
    make(tmp_path / "videos/starts.mp4", picture=pan.format("'max(0,n-10)*20'"))
    make(tmp_path / "videos/stutters.mp4", picture=pan.format("'floor(n/2)*40'"))
    flash = "testsrc2=s=160x120:r=25:d=2,drawbox=t=fill:color=white:enable='eq(n,20)'"
    make(tmp_path / "videos/flash.mp4", picture=flash)
    lines = prepare(tmp_path / "videos", tmp_path / "out", "--split_scenes")[1]
    assert {name: line["num_frames"] for name, line in lines.items()} == {
        "pan.mp4": 40, "starts.mp4": 40, "stutters.mp4": 40, "flash.mp4": 50,
    }  # fmt: skip


def test_names_that_the_terminal_cannot_print(tmp_path):
    make(tmp_path / "videos/机器人.mp4", "-frames:v", "1")
    (tmp_path / "videos/坏的.mp4").touch()
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1, env=environment)
    assert r"\u574f\u7684.mp4: an empty file" in text and set(lines) == {"机器人.mp4"}


def test_system_folders_twins_and_unfinished_downloads(tmp_path):
    videos, one = tmp_path / "videos", make(tmp_path / "x.mp4", "-frames:v", "1")
    system = ["$RECYCLE.BIN/S-1", "#recycle", "@Recycle", "a/@eaDir/x.mp4", "System Volume Information", "lost+found"]
    for folder in system:
        joined(videos / folder / "old.mp4", one)
    for name in ("a/x.mp4", "GX010001.MP4", "GL010001.LRV", "b.mp4", "b_proxy.mp4", "half.mp4", "half.mp4.crdownload"):
        joined(videos / name, one)
    text, lines = prepare(videos, tmp_path / "out")
    assert set(lines) == {"a/x.mp4", "GX010001.MP4", "GL010001.LRV", "b.mp4", "b_proxy.mp4"}
    assert "GL010001.LRV: the same recording as GX010001.MP4?" in text and "b_proxy.mp4: the same" in text
    assert "perhaps twice: 2" in text and "half.mp4: half.mp4.crdownload lies beside it" in text


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_what_cannot_be_looked_at_is_named_and_the_rest_goes_on(tmp_path):
    make(tmp_path / "videos/x.mp4", "-frames:v", "1")
    for name in ("loop", "loop.mp4"):
        (tmp_path / "videos" / name).symlink_to(name)
    (tmp_path / "videos/unplugged").symlink_to(tmp_path / "nowhere")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert set(lines) == {"x.mp4"} and text.count("Too many levels") == 2 and "unplugged: a link" in text


@unless_old(reason="ffmpeg 7.0 does not say what is encrypted: its frames are broken ones")
def test_encrypted_is_named(tmp_path):
    key = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "76a6c65c5ea762046bd749a2e632ccbb"]
    make(tmp_path / "videos/locked.mp4", *LIBX264, *key, "-encryption_kid", "a7e61c373e219033c21091fa607bf3b8")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert "locked.mp4: encrypted" in text and not lines


def test_dolby_vision_is_named(tmp_path):
    plain = make(tmp_path / "x.mp4", "-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "hvc1")
    record = b"\0\0\0\x20dvcC\x01\0" + bytes([5 << 1, 6 << 3 | 5, 0]) + bytes(19)  # profile 5, level 6
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/dolby.mp4").write_bytes(insert_box(plain.read_bytes(), (*SAMPLE_ENTRY[:-1], b"hvc1"), record))
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert "Dolby Vision profile 5" in lines["dolby.mp4"]["notes"][0]


def fake_ffmpeg(folder, then):
    """An environment in which ffmpeg is a small program of ours."""
    folder.mkdir()
    (folder / "ffmpeg").write_text("#!/bin/sh\n" + then)
    (folder / "ffmpeg").chmod(0o755)
    return {**os.environ, "IMAGEIO_FFMPEG_EXE": str(folder / "ffmpeg")}


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_killed_ffmpeg_is_not_a_bad_video(tmp_path):
    make(tmp_path / "videos/x.ts", "-frames:v", "1")
    text = prepare(tmp_path / "videos", tmp_path / "a", status=1, env=fake_ffmpeg(tmp_path / "1", "kill -9 $$\n"))[0]
    assert "x.ts: ffmpeg was killed by signal 9" in text
    old = 'case "$*" in *-version*) echo ffmpeg version 7.0.2-static;; *) kill -11 $$;; esac\n'
    text = prepare(tmp_path / "videos", tmp_path / "b", status=1, env=fake_ffmpeg(tmp_path / "2", old))[0]
    assert "newer imageio-ffmpeg" in text and "newer Python" in text


def test_a_video_dir_that_is_none(tmp_path):
    make(tmp_path / "videos/x.mp4", "-frames:v", "1")
    text = prepare(tmp_path / "videos/x.mp4", tmp_path / "out", status=2)[0]
    assert f"--video_dir {tmp_path / 'videos'}" in text.replace("give ", "--video_dir ") and "--include x.mp4" in text
    make(tmp_path / "frames/00000.png", "-frames:v", "1")
    assert "train_svd.py --dataset_dir" in prepare(tmp_path / "frames", tmp_path / "out", status=2)[0]


def test_options_for_lerobot_sets_are_refused_for_plain_videos(tmp_path):
    make(tmp_path / "videos/x.mp4", "-frames:v", "1")
    text = prepare(tmp_path / "videos", tmp_path / "out", "--camera", "front", status=2)[0]
    assert "--camera: these videos have no camera, they are no LeRobot set" in text and text.count("\n") == 1
    text = prepare(tmp_path / "videos", tmp_path / "out", "--action_key", "state", status=2)[0]
    assert "--action_key state: these videos have no columns" in text and text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_prepared_dataset_is_sent_to_training(tmp_path):
    make(tmp_path / "videos/x.mp4", "-frames:v", "2")
    prepare(tmp_path / "videos", tmp_path / "out")
    text = prepare(tmp_path / "out", tmp_path / "out2", status=2)[0]
    assert (
        f"{tmp_path / 'out'} is a prepared dataset: give it to train_svd.py --dataset_dir {tmp_path / 'out'}\n" in text
    )
    assert not (tmp_path / "out2").exists()


def test_summary_counts_what_is_alike_and_names_what_is_gone(tmp_path):
    make(tmp_path / "videos/x.mp4"), make(tmp_path / "videos/gone.mp4", "-frames:v", "3")
    text = prepare(tmp_path / "videos", tmp_path / "out", "--split_scenes", "--min_frames", "30", status=2)[0]
    assert "dropped: 2" in text and "kept: 0 clips of 2 videos" in text
    for number in range(5):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", str(2 + number))
    text = prepare(tmp_path / "videos", tmp_path / "out2", "--min_frames", "20")[0]
    assert "dropped: 6\n  6 clips shorter than 20 frames, such as" in text and text.count("shorter than") == 2
    prepare(tmp_path / "videos", tmp_path / "out3")
    (tmp_path / "videos/gone.mp4").unlink()
    text, lines = prepare(tmp_path / "videos", tmp_path / "out3")
    said = "\nin the dataset, though not in --video_dir any more: "
    cure = "it stays; delete its folder, or give another --output_dir\n"
    assert f"{said}1 clip of 1 video (gone.mp4): {cure}" in text and "gone.mp4" in lines
    for name in ("x", 0, 1, 2, 3, 4):
        (tmp_path / f"videos/{name}.mp4").unlink()
    make(tmp_path / "videos/new.mp4", "-frames:v", "2")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out3")
    names = "0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 2 more"
    assert f"{said}7 clips of 7 videos ({names}): they stay; delete their folders" in text and len(lines) == 8


def test_a_shard_without_videos_says_so(tmp_path):
    make(tmp_path / "videos/x.mp4", "-frames:v", "1")
    texts = [prepare(tmp_path / "videos", tmp_path / "out", "--shard", f"{n}/2")[0] for n in (0, 1)]
    assert sum("none of the videos falls to this part" in text for text in texts) == 1


def test_an_exit_status_that_is_not_0_is_explained_before_the_next_command(tmp_path):
    for number in range(2):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "9", picture=f"testsrc2=s={96 + 16 * number}x64")
    assert "exit status" not in prepare(tmp_path / "videos", tmp_path / "out")[0]
    (tmp_path / "videos/bad.mp4").write_bytes(b"no video")
    text = prepare(tmp_path / "videos", tmp_path / "out", status=1)[0]
    why, after = text.rstrip().rsplit("\n", 1)
    assert why.endswith("\nexit status 1: 1 video is not whole in the dataset, see above") and after.startswith(
        "look at"
    )
    (tmp_path / "videos/worse.mp4").write_bytes(b"no video")
    text = prepare(tmp_path / "videos", tmp_path / "out2", "--min_frames", "10", status=1)[0]
    assert text.endswith("\nexit status 1: 2 videos are not whole in the dataset, see above\n")
    text = prepare(tmp_path / "videos", tmp_path / "out2", "--min_frames", "10", "--include", "0.mp4", status=2)[0]
    assert text.endswith("\nexit status 2: the dataset holds no clip, see above\n")


def test_what_keeps_no_clip_fails_only_where_the_whole_dataset_is_empty(tmp_path):
    for number in range(6):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "20" if number == 3 else "2")
    options = ["--min_frames", "9"]
    texts = [prepare(tmp_path / "videos", tmp_path / "out", *options, "--shard", f"{n}/3")[0] for n in range(3)]
    assert sum("kept: 0 clips of" in text for text in texts) == 2
    text = prepare(tmp_path / "videos", tmp_path / "out", *options, "--include", "0.mp4")[0]
    assert "kept: 0 clips of 1 video\n" in text and "dropped: 1" in text and "next: " in text
    text = prepare(tmp_path / "videos", tmp_path / "out2", *options, "--include", "0.mp4", status=2)[0]
    assert "kept: 0 clips of 1 video\n" in text and "next: " not in text


# ------------------------------------------------------------------------------------------------- kills and crowds


def start(video_dir, output_dir, *options):
    command = [
        sys.executable,
        ROOT / "prepare_dataset.py",
        "--video_dir",
        video_dir,
        "--output_dir",
        output_dir,
        *options,
    ]

    def hear_ctrl_c():  # where the tests run in the background, their children would ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = list(map(os.fspath, command))
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)


def test_kills_at_any_moment_give_the_same_tree(tmp_path):
    for number in range(6):
        make(tmp_path / f"videos/{number}.mp4", picture="testsrc2=s=320x240:d=1")
    make(tmp_path / "videos/ffmpeg.mp4", "-pix_fmt", "yuv420p10le", picture="testsrc2=s=320x240:d=1")  # decodes it
    options = ["--clip_frames", "8", "--num_workers", "2"]
    begun = time.monotonic()
    prepare(tmp_path / "videos", tmp_path / "whole", *options)
    took = time.monotonic() - begun
    random.seed(0)
    for _ in range(int(os.environ.get("KILLS", 6))):
        process = start(tmp_path / "videos", tmp_path / "out", *options)
        try:
            process.wait(random.uniform(0.5, 1) * took)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        check_lines(tmp_path / "out")
    prepare(tmp_path / "videos", tmp_path / "out", *options)
    assert check_lines(tmp_path / "out") == 21  # three windows of each of seven videos
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_shards_make_the_same_dataset(tmp_path):
    for number in range(7):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "5")
    prepare(tmp_path / "videos", tmp_path / "whole")
    shards = [start(tmp_path / "videos", tmp_path / "out", "--shard", f"{n}/3") for n in (1, 2, 3)]
    assert [shard.wait(120) for shard in shards] == [0, 0, 0]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert "--shard" in prepare(tmp_path / "videos", tmp_path / "out", "--shard", "4/3", status=2)[0]


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process for a while")
def test_two_runs_at_once_are_refused(tmp_path):
    make(tmp_path / "videos/x.mp4", picture="testsrc2=s=1280x720:d=1")
    first = start(tmp_path / "videos", tmp_path / "out")
    wait_until((tmp_path / "out/.prepare/work").exists)
    first.send_signal(signal.SIGSTOP)  # or it may be through before the second one has begun
    assert "another run" in prepare(tmp_path / "videos", tmp_path / "out", status=2)[0]
    first.send_signal(signal.SIGCONT)
    assert first.wait(120) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_full_disk_stops_with_one_line(tmp_path):
    make(tmp_path / "videos/a.mp4", "-frames:v", "3")
    make(tmp_path / "videos/b.mp4", picture="testsrc2=s=640x480:d=1,noise=alls=60:allf=t")
    limit = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000)); sys.argv = sys.argv[1:];"
    limit += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limit, str(ROOT / "prepare_dataset.py")]
    command += ["--video_dir", str(tmp_path / "videos"), "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert sorted(d for d in os.listdir(tmp_path / "out") if d != ".prepare") == ["a", "metadata.jsonl"]
    assert not (tmp_path / "out/.prepare/work").exists()


def test_ctrl_c_stops_and_the_next_run_goes_on(tmp_path):
    for name, pixels in {"ffmpeg": "yuv420p10le", "opencv": "yuv420p"}.items():  # what decodes it
        make(tmp_path / f"videos/{name}.mp4", "-pix_fmt", pixels, picture="testsrc2=s=640x360:d=3")
    process = start(tmp_path / "videos", tmp_path / "out", "--num_workers", "2")
    wait_until(lambda: any((tmp_path / "out/.prepare/work").rglob("*.png")))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and b"Traceback" not in process.stderr.read()
    assert not (tmp_path / "out/.prepare/work").exists()
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert [len(frames_of(tmp_path / "out", line)) for line in lines.values()] == [75, 75]


def test_nothing_is_written_to_the_videos(tmp_path):
    lerobot_v2(tmp_path / "videos")
    before = {p: p.stat().st_mtime_ns for p in [tmp_path / "videos", *(tmp_path / "videos").rglob("*")]}
    prepare(tmp_path / "videos", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in [tmp_path / "videos", *(tmp_path / "videos").rglob("*")]} == before


# ------------------------------------------------------------------------------------------------- nothing in silence


def test_missing_frames_change_no_rate_and_are_counted(tmp_path):
    make(tmp_path / "videos/cut.mp4", *LIBX264, "-vf", "setpts='(N+gt(N,11))/25/TB'", *UNEVEN_MP4)
    text, lines = prepare(tmp_path / "videos", tmp_path / "out")
    assert lines["cut.mp4"]["fps"] == 25 and "cut.mp4: 1 of 26 frames are missing" in text


@pytest.mark.parametrize(
    "filters, note",
    [
        ("fps=8,fps=24", "each picture stands for 3 frames: --fps 8 takes each once"),
        ("fps=24,fps=30", "--fps 24"),
        ("", ""),
    ],
)
def test_repeated_pictures_are_named_with_the_cure(filters, note, tmp_path):
    options = ["-vf", filters] if filters else []
    make(tmp_path / "videos/x.mp4", *LIBX264, *options, picture="testsrc2=s=96x64:r=24:d=4")
    text = prepare(tmp_path / "videos", tmp_path / "out")[0]
    assert (note in text) if note else ("with a note" not in text), text


def test_black_bars_and_the_crop_are_named(tmp_path):
    bars = ["-vf", "pad=96:96:0:16:black"]
    make(tmp_path / "videos/bars.mp4", *LIBX264, *bars, picture="testsrc2=s=96x64:r=8:d=2")
    text = prepare(tmp_path / "videos", tmp_path / "out")[0]
    assert "bars.mp4: black bars: 33% of the height" in text
    make(tmp_path / "sides/x.mp4", *LIBX264, "-vf", "pad=128:64:32:0:black", picture="testsrc2=s=96x64:r=8:d=2")
    text = prepare(tmp_path / "sides", tmp_path / "out1")[0]  # on the left side alone
    assert "x.mp4: black bars: 25% of the width" in text and "of the height" not in text
    text = prepare(tmp_path / "videos", tmp_path / "out2", "--width", "96", "--height", "48")[0]
    crop = "some 50% of the picture is lost to the crop to 96x48; --width 64 --height 64 would fit"
    assert f"96x96 (1 video): {crop}" in text
    assert f"look at {tmp_path}/out2/preview.jpg; next: python train_svd.py" in text


def test_frames_that_max_frames_leaves_out_are_counted(tmp_path):
    make(tmp_path / "videos/x.mp4", *LIBX264, picture="testsrc2=s=96x64:r=25:d=8")
    text = prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "25")[0]
    assert "--max_frames 25: 175 of 200 frames left out; --clip_frames 25 cuts whole videos into clips" in text
    again = ["--max_frames", "4", "--fps", "7"]
    text = prepare(tmp_path / "videos", tmp_path / "out2", *again)[0]
    assert "--max_frames 4: 52 of 56 frames at --fps 7 left out" in text
    # A run that goes on counts what the runs before it left out, too, and says so again where it has nothing to do.
    make(tmp_path / "videos/y.mp4", *LIBX264, picture="testsrc2=s=96x64:r=25:d=1")
    for _ in range(2):
        text = prepare(tmp_path / "videos", tmp_path / "out2", *again)[0]
        assert "--max_frames 4: 55 of 63 frames at --fps 7 left out; --clip_frames 4 cuts" in text
    assert (
        "--max_frames 4: 3 of 7 frames" in prepare(tmp_path / "videos", tmp_path / "out2", *again, "--include", "y*")[0]
    )
    assert "left out" not in prepare(tmp_path / "videos", tmp_path / "out3", "--max_frames", "200")[0]


def test_frames_that_max_frames_leaves_out_of_episodes_are_counted(tmp_path):
    episodes = [(0, 0.8, None), (0.8, 2.1, None), (2.1, 3.0, None)]
    text, groups = prepare_v3(tmp_path, episodes, "--max_frames", "9")
    assert groups == {"episode_000000": 8, "episode_000001": 9, "episode_000002": 9}
    assert "--max_frames 9: 4 of 30 frames left out; --clip_frames 9 cuts" in text


def test_what_the_crop_loses_is_said_again_by_the_next_run(tmp_path):
    make(tmp_path / "videos/x.mp4", picture="testsrc2=s=96x96:r=8:d=1")
    for _ in range(2):
        text = prepare(tmp_path / "videos", tmp_path / "out", "--width", "96", "--height", "48")[0]
        assert "warning: 96x96 (1 video): some 50% of the picture is lost" in text


def test_videos_of_any_name_are_read_and_the_rest_is_counted(tmp_path):
    make(tmp_path / "videos/a.mp4"), make(tmp_path / "videos/b.mp4")
    (tmp_path / "videos/b.mp4").rename(tmp_path / "videos/30080.m4s")
    for name in ("x.json", "y.json", "z.zip", "r.mcap"):
        (tmp_path / "videos" / name).write_bytes(b"{}")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out")
    assert set(lines) == {"a.mp4", "30080.m4s"}
    assert (
        "2 .json, 1 .mcap (export mp4 or a LeRobot set first), 1 .zip (unpack it)" in text or ".zip (unpack it)" in text
    )


def test_chosen_clips_of_a_generated_set_stay_generated_and_seeds_stay_together(tmp_path):
    records = []
    for seed in range(2):
        make(tmp_path / f"set/c_seed{seed}.mp4")
        more = {"generated": True, "task": "push", "source_image": "c.png", "source_image_sha256": "ab" * 32}
        records.append({"file_name": f"c_seed{seed}.mp4", **more})
    (tmp_path / "set/metadata.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = prepare(tmp_path / "set", tmp_path / "out")[1]
    assert all(line["generated"] is True and line["task"] == "push" for line in lines.values())
    assert len({line["group"] for line in lines.values()}) == 1


def generated_set(folder, names):
    """A set by infer_svd.py as far as preparing reads it: {name of a clip: its image}."""
    lines = []
    for number, (name, image) in enumerate(names.items()):  # of different content: copies are held out together
        make(folder / name, "-frames:v", "9", picture=f"testsrc2=s={96 + 16 * number}x64")
        lines.append({"file_name": name, "generated": True, "source_image": image, "source_image_sha256": image * 9})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_clips_in_subfolders_of_a_set_keep_their_image_and_comparisons_are_left_out(tmp_path):
    from svd_parts.samples import hold_out

    names = {f"{image}/x_seed{seed}_motion84.mp4": image for image in "ab" for seed in (0, 1)}
    generated_set(tmp_path / "videos/set", names)
    for name in ("a/x_seed0_motion84.mp4", "a/x_seed1_motion84.mp4"):
        make(tmp_path / "videos/set/side_by_side" / name, "-frames:v", "9")
    make(tmp_path / "videos/side_by_side/real.mp4", "-frames:v", "9")  # of no set
    text, lines = prepare(tmp_path / "videos", tmp_path / "out")
    assert "left out: 2 comparisons of generated clips beside others, in side_by_side/" in text
    real = lines.pop("side_by_side/real.mp4")
    assert "generated" not in real and set(lines) == {f"set/{name}" for name in names}
    assert all(line["generated"] and line["source_image"] == names[source[4:]] for source, line in lines.items())
    for seed in range(4):
        training, held_out = hold_out([real, *lines.values()], 2, seed)
        images = [{clip.get("source_image") for clip in side} for side in (training, held_out)]
        assert not images[0] & images[1], "two seeds of one image are on both sides"
    # Without the clips, nothing is left.
    shutil.rmtree(tmp_path / "videos/set/a"), shutil.rmtree(tmp_path / "videos/set/b")
    text = prepare(tmp_path / "videos/set", tmp_path / "out2", status=2)[0]
    assert "left out: 2 comparisons" in text and "no video in it" in text


def test_a_single_generated_clip_keeps_its_mark_and_another_json_file_is_nothing(tmp_path):
    for name in ("one", "other", "odd"):
        make(tmp_path / f"videos/{name}.mp4", "-frames:v", "9")
    record = {"file_name": "one.mp4", "generated": True, "task": "push", "source_image": "a", "prompt": ["x"]}
    (tmp_path / "videos/one.json").write_text(json.dumps(record))
    (tmp_path / "videos/other.json").write_text(json.dumps(record))  # names another file
    (tmp_path / "videos/odd.json").write_text("[1")
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    one = lines.pop("one.mp4")
    assert (one["generated"], one["task"], one["source_image"], one["group"]) == (True, "push", "a", "image a")
    assert len(lines) == 2 and not any("generated" in line for line in lines.values())


def test_what_a_set_knows_is_looked_for_inside_video_dir_alone(tmp_path):
    generated_set(tmp_path, {"videos/x.mp4": "a"})
    assert "generated" not in prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mp4"]
    assert prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}_out")[1]["videos/x.mp4"]["generated"]


def test_deep_grey_is_named(tmp_path):
    make(tmp_path / "videos/depth.mkv", "-c:v", "ffv1", "-pix_fmt", "gray16le")
    assert "more than 8 bits a channel (gray16le) made 8" in prepare(tmp_path / "videos", tmp_path / "out")[0]


def test_a_record_that_leads_outside_touches_nothing(tmp_path):
    make(tmp_path / "videos/a.mp4")
    prepare(tmp_path / "videos", tmp_path / "out", "--max_frames", "3")
    shutil.copytree(tmp_path / "out/a", tmp_path / "victim")
    path = tmp_path / "out/.prepare/a.json"
    record = json.loads(path.read_text())
    record["clips"].append({**record["clips"][0], "directory": "../victim"})
    path.write_text(json.dumps(record))
    (tmp_path / "videos/a.mp4").touch()
    done = prepare_only(tmp_path / "videos", tmp_path / "out", "--max_frames", "3", "--overwrite")
    assert done.returncode == 2 and b"which is not inside its folder" in done.stderr
    assert len(list((tmp_path / "victim").iterdir())) == 3


def test_a_second_video_track_that_is_longer_makes_no_cut_file(tmp_path):
    make(tmp_path / "videos/two.mkv", *LIBX264, picture="testsrc2=s=96x64:r=12:d=2")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", tmp_path / "videos/two.mkv"]
    command += ["-f", "lavfi", "-i", "testsrc=s=64x64:r=12:d=6", "-map", "0", "-map", "1", *LIBX264]
    subprocess.run([*command, tmp_path / "videos/both.mkv"], check=True)
    text, lines = prepare(tmp_path / "videos", tmp_path / "out")
    assert lines["both.mkv"]["num_frames"] == 24 and "ends after" not in text


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_lerobot_set_of_images_in_parquet_files_gives_a_clip_an_episode(version, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root, frames = tmp_path / "set", moving_square(6)
    episodes = [[0, 0, 0, 0, 1, 1]] if version == "v3.0" else [[0] * 4, [1] * 2]
    feature = {"dtype": "image", "shape": [64, 96, 3]}
    (root / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "fps": 10, "robot_type": "arm", "features": {"observation.image": feature}}
    info["features"]["action"] = {"dtype": "float32", "shape": [2]}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/episodes.jsonl").write_text(
        "".join(f'{{"episode_index": {e}, "tasks": ["task {e}"]}}\n' for e in (0, 1))
    )
    cells, row = [{"bytes": svd_common.encode_png(frame), "path": None} for frame in frames], 0
    for number, rows in enumerate(episodes):
        name = f"episode_{number:06d}" if version == "v2.1" else f"file-{number:03d}"
        path = root / f"data/chunk-000/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"observation.image": cells[row : row + len(rows)], "episode_index": rows}
        parquet.write_table(pyarrow.table(table), path)
        row += len(rows)
    done = prepare_only(root, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"actions: none of 2 clips (of cameras that are images in parquet files they are not read)" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [(line["num_frames"], line["fps"], line["task"], line["episode_index"]) for line in lines] == [
        (4, 10, "task 0", 0), (2, 10, "task 1", 1)]  # fmt: skip
    read = [svd_common.read_image(path) for line in lines for path in list_frames(tmp_path / "out" / line["directory"])]
    assert np.array_equal(np.stack(read), frames)
    assert prepare_only(root, tmp_path / "out").returncode == 0
    assert "--max_frames 3: 1 of 6 frames left out" in prepare(root, tmp_path / "short", "--max_frames", "3")[0]


def test_a_folder_without_videos_says_what_is_in_it(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/take.mcap").write_bytes(b"x")
    text = prepare(tmp_path / "videos", tmp_path / "out", status=2)[0]
    assert "no video in it; left out, because they are not videos: 1 .mcap (export mp4 or a LeRobot set first)" in text


def test_a_preview_that_cannot_be_written_ends_nothing(tmp_path):
    make(tmp_path / "videos/a.mp4")
    (tmp_path / "out/preview.jpg").mkdir(parents=True)
    text, lines = prepare(tmp_path / "videos", tmp_path / "out")
    assert set(lines) == {"a.mp4"} and "preview.jpg cannot be written (Is a directory); the clips are whole" in text
