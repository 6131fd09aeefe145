"""dataset.py: frames in order, metadata, and what the crop takes away."""

import json

import pytest
from conftest import moving_square, write_clip
from PIL import Image

from svd_parts.dataset import list_clips, list_frames, read_metadata, sort_frames, warn_of_crop
from svd_parts.files import UserError, natural_key


def test_what_the_crop_takes_away_is_one_line_for_all_clips_of_one_size(tmp_path, capsys):
    clips = []
    for name, size, turned in (("a", (320, 568), 1), ("b", (568, 320), 6), ("c", (512, 320), 1), ("d", (256, 256), 1)):
        path = tmp_path / f"{name}.jpg"
        exif = Image.Exif()
        exif[274] = turned
        Image.new("RGB", size).save(path, exif=exif)
        clips.append({"directory": name, "frames": [path]})
    clips.append({"directory": "gone", "frames": [tmp_path / "gone.png"]})
    warn_of_crop(clips, 512, 320, 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "warning: 2 clips of 320x568 (a, b): some 65% of the picture is lost to the crop to 512x320;"
        " --width 320 --height 512 would fit",
        "warning: 1 clip of 256x256 (d): some 40% of the picture is lost to the crop to 512x320;"
        " --width 384 --height 384 would fit",
    ]


def test_frames_named_by_date_and_time_are_in_order_over_midnight():
    names = [f"cam_20240131_2359{second}.png" for second in (57, 58, 59)] + ["cam_20240201_000000.png"]
    assert sort_frames(names[::-1], "x") == (names, None)
    names = ["2024-05-01 12.59.58.jpg", "2024-05-01 12.59.59.jpg", "2024-05-01 13.00.00.jpg"]
    assert sort_frames(names, "x") == (names, None)


def test_frames_sort_as_numbers(tmp_path):
    for name in ("frame10.png", "frame2.png", ".hidden.png", "frame1.PNG", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_frames(tmp_path)] == ["frame1.PNG", "frame2.png", "frame10.png"]


@pytest.mark.parametrize(
    "names",
    [
        ["frame_000002.jpg", "Frame_000003.JPG"],
        [f"{number}.png" for number in range(1, 12)],
        ["img (1).png", "img (2).png", "img (3).png"],
        ["00000.png", "00005.png", "00010.png"],
        ["2024-05-01_cam2_0001.png", "2024-05-01_cam2_0002.png"],
        ["f_0001_90210.png", "f_0002_90911.png", "f_0003_99000.png"],
        ["v2.0009.png", "v2.0010.png", "v2.0011.png"],
        ["1305031102.97.png", "1305031103.00.png", "1305031103.03.png"],
        [f"{n // 10**9}_{n % 10**9:09d}.png" for n in range(17 * 10**17 + 5, 17 * 10**17 + 4 * 10**9, 66700013)],
        ["only.png"],
    ],
)
def test_frames_are_one_running_number(names, tmp_path):
    assert sort_frames(names[::-1], tmp_path) == (sorted(names, key=lambda n: natural_key(n.lower())), None)


def test_a_regular_number_runs_whatever_stands_before_it(tmp_path):
    for names in (
        ["49274526_0009.png", "14486288_0010.png", "90210_0011.png", "7_0014.png"],
        ["id2932574_007.png", "id23268959_008.png", "id5_009.png"],
        ["0.0436_019.png", "0.0101_020.png", "0.5000_021.png", "0.3000_022.png"],
    ):
        assert sort_frames(sorted(names), tmp_path)[0] == names


@pytest.mark.parametrize(
    "names, message",
    [
        (["0.png", "0.jpg", "1.png", "1.jpg"], "0.jpg and 0.png are the same frame"),
        (["01.png", "1.png"], "are the same frame"),
        (["f_1.png", "f_2.png", "f_2_mask.png", "f_1_mask.png"], "f_1_mask.png beside f_1.png"),
        (["0.png", "1.png", "thumbnail.jpg"], "thumbnail.jpg beside 0.png"),
        (["a.png", "b.png"], "one running number"),
        (["img.png", "img (1).png", "img (2).png"], "img.png beside"),
        ([f"cam{c}_{i:04d}.png" for c in (1, 2) for i in range(4)], "are several series"),
        (
            [f"{sec}_{ms}.png" for sec, ms in ((7, 10), (7, 405), (7, 790), (8, 202), (8, 611))],
            "it is unclear which number",
        ),
    ],
)
def test_what_is_no_frame_is_refused_by_its_folder(names, message, tmp_path):
    for name in names:
        path = tmp_path / "data" / "clip" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 64)).save(path)
    with pytest.raises(UserError, match=message) as error:
        list_clips(tmp_path / "data")
    assert str(tmp_path / "data" / "clip") in str(error.value)


def test_a_gap_between_frames_is_a_warning(tmp_path, capsys):
    write_clip(tmp_path / "data" / "clip", moving_square(6))
    (tmp_path / "data" / "clip" / "00003.png").unlink()
    assert len(list_clips(tmp_path / "data")[0]["frames"]) == 5
    assert "clip: 00004.png follows 00002.png" in capsys.readouterr().err


def test_links_are_followed_once_and_loops_end(tmp_path, capsys):
    write_clip(tmp_path / "elsewhere" / "deep" / "clip", moving_square(3))
    (tmp_path / "elsewhere" / "deep" / "home").symlink_to(tmp_path / "data")
    write_clip(tmp_path / "data" / "z", moving_square(3))
    for name, target in {"a": "z", "far": "../elsewhere", "up": "..", "me": "me", "gone": "nowhere"}.items():
        (tmp_path / "data" / name).symlink_to(target)
    write_clip(tmp_path / "data" / "@eaDir" / "z", moving_square(3))
    assert [clip["directory"] for clip in list_clips(tmp_path / "data")] == ["far/deep/clip", "z"]
    warnings = capsys.readouterr().err
    for name in (
        "a: a link to what is",
        "up: a link to a folder above",
        "me: a link to nowhere",
        "gone: a link to nowhere",
    ):
        assert f"/data/{name}" in warnings


def test_metadata_is_read_whatever_wrote_it(tmp_path):
    write_clip(tmp_path / "a" / "b\u2028", moving_square(2))
    line = json.dumps({"directory": "a\\b\u2028", "fps": 9, "motion_bucket_id": None}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + line + "\r\n\r\n" + '{"directory": "gone"}', encoding="utf-8")
    (clip,) = list_clips(tmp_path)
    assert clip["fps"] == 9 and "motion_bucket_id" not in clip


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"directory": "a"}'.encode("utf-16"), "not UTF-8"),
        ('{"directory": "a"}'.encode("utf-16-le"), "not UTF-8"),
        ('{"directory": "\u89c6\u9891"}'.encode("gbk"), "not UTF-8"),
        (b'{"directory": "a"}\n[1]', "line 2: not a JSON object"),
        (b'{"directory": "a"', "line 1: not a JSON object"),
        (b'{"directory": 5}', "directory is 5"),
        (b'{"directory": "a", "fps": -7}', "fps is -7"),
        (b'{"directory": "a", "fps": NaN}', "fps is NaN"),
        (b'{"directory": "a", "fps": 0}', "fps is 0"),
        (b'{"directory": "a", "fps": "7"}', 'fps is "7"'),
        (b'{"directory": "a", "fps": true}', "fps is true"),
        (b'{"directory": "a", "motion_bucket_id": 256}', "motion_bucket_id is 256"),
        (b'{"directory": "a", "motion_bucket_id": [1]}', "motion_bucket_id is"),
    ],
)
def test_nonsense_in_metadata_is_named(text, message, tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(text)
    with pytest.raises(UserError, match="metadata.jsonl.*" + message.replace("[", r"\[")):
        read_metadata(tmp_path)
