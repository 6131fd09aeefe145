"""dataset.py: what the crop takes away."""

from PIL import Image

from svd_parts.dataset import sort_frames, warn_of_crop


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
