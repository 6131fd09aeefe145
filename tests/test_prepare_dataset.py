"""prepare_dataset.py on small files made here with imageio-ffmpeg's binary: each test launches the real script."""

import json
import os
import random
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
    "vfr.mp4": ([*LIBX264, "-vf", "setpts='(N+floor(N/5))/25/TB'", "-fps_mode", "passthrough"], {"fps": 21.429}),
    "hole.mp4": (
        [*LIBX264, "-vf", "setpts='if(lt(N,10),N,N+125)/25/TB'", "-fps_mode", "passthrough"],
        {"fps": 25, "holes": [5.04], "num_frames": 25},
    ),
    "odd.avi": (["-vf", "crop=95:63:exact=1", "-c:v", "mjpeg", "-pix_fmt", "yuvj420p"], {"width": 95, "height": 63}),
    "tiny.mkv": (["-vf", "scale=2:2,setsar=1", "-c:v", "ffv1"], {"width": 2}),
    "black.mp4": ([*LIBX264, "-vf", "drawbox=t=fill:color=black"], {"motion": 0}),
    "one.mp4": ([*LIBX264, "-frames:v", "1"], {"num_frames": 1, "motion": 0, "fps": 25}),
}


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
    make(tmp_path / "small.ts", *LIBX264), make(tmp_path / "large.ts", "-s", "192x96", *LIBX264)
    joined = (tmp_path / "small.ts").read_bytes() + (tmp_path / "large.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(joined)
    ffmpeg("-i", tmp_path / "joined.ts", "-c", "copy", videos / "size_changes.h264")
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


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv", "h264", "ts", "mpg"])
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


def test_fast_png_writes_the_same_pixels(tmp_path):
    pytest.importorskip("isal")
    make(tmp_path / "videos/odd.mkv", "-c:v", "ffv1", picture="testsrc2=s=99x33:d=0.2")
    plain = prepare(tmp_path / "videos", tmp_path / "plain")[1]["odd.mkv"]
    fast = prepare(tmp_path / "videos", tmp_path / "fast", "--fast_png")[1]["odd.mkv"]
    assert fast == plain
    assert np.array_equal(frames_of(tmp_path / "fast", fast), frames_of(tmp_path / "plain", plain))
    assert tree(tmp_path / "fast") != tree(tmp_path / "plain")  # and it was another encoder


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
    uneven = ["-vf", "setpts='if(lt(N,30),N,30+(N-30)*3)/30/TB'", "-fps_mode", "passthrough"]  # 30 a second, then 10
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
    assert "dropped: 1" in text and "x@0004: 5 frames, fewer than 10" in text
    second, third = (svd_common.list_frames(tmp_path / "out" / f"x@000{n}") for n in (1, 2))
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
    assert "still: motion 0" in text and "short: 4 frames, fewer than 5" in text


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


def test_lerobot_v3_is_cut_at_its_episodes(tmp_path):
    lerobot_v3(tmp_path / "videos")
    key, rows = "videos/observation.images.top/", []
    for episode, (start, end) in enumerate([(0.0, 0.8), (0.8, 2.1), (2.1, 3.0)]):
        row = {"episode_index": episode, key + "chunk_index": 0, key + "file_index": 0}
        rows.append({**row, key + "from_timestamp": start, key + "to_timestamp": end})
    (tmp_path / "fake/pyarrow").mkdir(parents=True)  # what the script uses of pyarrow
    (tmp_path / "fake/pyarrow/__init__.py").touch()
    code = f"class Table:\n    def to_pylist(self): return {rows}\ndef read_table(path): return Table()\n"
    (tmp_path / "fake/pyarrow/parquet.py").write_text(code)
    prepare(tmp_path / "videos", tmp_path / "out", env={**os.environ, "PYTHONPATH": str(tmp_path / "fake")})
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [(line["group"], line["num_frames"]) for line in lines] == [
        ("episode_000000", 8),
        ("episode_000001", 13),
        ("episode_000002", 9),
    ]


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
    sheet = svd_common.read_image(tmp_path / "out/preview.jpg")[:, 300:444].astype(int)
    for row, (width, height) in enumerate([(44, 78), (104, 78), (142, 1)]):
        red = sheet[80 * row : 80 * row + 80, :, 1] < 100
        assert abs(red.any(0).sum() - width) <= 2 and abs(red.any(1).sum() - height) <= 2, row


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
    make(tmp_path / "videos/av1.mp4", "-c:v", "libsvtav1", picture="testsrc2=s=320x240:d=1")
    options = ["--clip_frames", "8", "--num_workers", "2"]
    begun = time.monotonic()
    prepare(tmp_path / "videos", tmp_path / "whole", *options)
    took = time.monotonic() - begun
    random.seed(0)
    for _ in range(int(os.environ.get("KILLS", 8))):
        process = start(tmp_path / "videos", tmp_path / "out", *options)
        try:
            process.wait(random.uniform(0.5, 1) * took)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for line in read_lines(tmp_path / "out").values():
            assert len(frames_of(tmp_path / "out", line)) == line["num_frames"]
    prepare(tmp_path / "videos", tmp_path / "out", *options)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_shards_make_the_same_dataset(tmp_path):
    for number in range(7):
        make(tmp_path / f"videos/{number}.mp4", "-frames:v", "5")
    prepare(tmp_path / "videos", tmp_path / "whole")
    shards = [start(tmp_path / "videos", tmp_path / "out", "--shard", f"{n}/3") for n in (1, 2, 3)]
    assert [shard.wait() for shard in shards] == [0, 0, 0]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert "--shard" in prepare(tmp_path / "videos", tmp_path / "out", "--shard", "4/3", status=2)[0]


def test_two_runs_at_once_are_refused(tmp_path):
    make(tmp_path / "videos/x.mp4", picture="testsrc2=s=1280x720:d=4")
    first = start(tmp_path / "videos", tmp_path / "out")
    while not (tmp_path / "out/.prepare/work").exists():
        time.sleep(0.01)
    assert "another run" in prepare(tmp_path / "videos", tmp_path / "out", status=2)[0]
    assert first.wait() == 0


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
    for name, codec in {"a": "libsvtav1", "b": "libx264"}.items():
        make(tmp_path / f"videos/{name}.mp4", "-c:v", codec, picture="testsrc2=s=960x540:d=3")
    process = start(tmp_path / "videos", tmp_path / "out", "--num_workers", "2")
    while not any((tmp_path / "out/.prepare/work").rglob("*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and b"Traceback" not in process.stderr.read()
    assert not (tmp_path / "out/.prepare/work").exists()
    lines = prepare(tmp_path / "videos", tmp_path / "out")[1]
    assert [len(frames_of(tmp_path / "out", line)) for line in lines.values()] == [75, 75]


def test_nothing_is_written_to_the_videos(tmp_path):
    lerobot_v2(tmp_path / "videos")
    before = {p: p.stat().st_mtime_ns for p in [tmp_path / "videos", *(tmp_path / "videos").rglob("*")]}
    prepare(tmp_path / "videos", tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in [tmp_path / "videos", *(tmp_path / "videos").rglob("*")]} == before
