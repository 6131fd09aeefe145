"""What is said at the end of preparing, and the sheet of pictures."""

import pytest
from conftest import moving_square, write_clip
from PIL import Image, ImageDraw

from svd_parts.records import SHOWN, write_preview
from svd_parts.summary import duration, print_same_content, print_totals


def clip(number, **fields):
    known = {"directory": f"clip{number}", "num_frames": 25, "width": 96, "height": 64, "duration": 5.0, "fps": 5.0}
    return {**known, "motion": 1.5, "motion_bucket_id": 100, "problems": [], "notes": [], **fields}


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.5, "0.5 seconds"),
        (1.0, "1 second"),
        (119.4, "119 seconds"),
        (120, "2.0 minutes"),
        (192, "3.2 minutes"),
        (7199, "120.0 minutes"),
        (7200, "2.00 hours"),
        (5400 * 2, "3.00 hours"),
    ],
)
def test_a_duration_has_the_unit_that_reads_best(seconds, text):
    assert duration(seconds) == text


def test_the_totals_say_how_the_clips_are_spread(capsys):
    clips = [clip(n, fps=5.0 + n, motion=n / 10, motion_bucket_id=100 + n) for n in range(11)]
    clips[3]["width"] = 128
    print_totals([{"clips": clips[6:]}, {"clips": clips[:6]}, {"clips": []}])
    assert capsys.readouterr().out.splitlines() == [
        "kept: 11 clips of 3 videos, 275 frames, 55 seconds",
        "  size: 96x64 and 1 other size",
        "  fps: 5 to 15; 10 % / median / 90 %: 6 / 10 / 14",
        "  motion, % of the longer side a second: 0 to 1; 10 % / median / 90 %: 0.1 / 0.5 / 0.9",
        "  motion_bucket_id: 100 to 110; 10 % / median / 90 %: 101 / 105 / 109",
    ]
    print_totals([{"clips": [clip(0, num_frames=1, duration=200.0)]}])
    text = capsys.readouterr().out
    assert text.startswith("kept: 1 clip of 1 video, 1 frame, 3.3 minutes\n  size: 96x64\n  fps: 5 to 5;")


def test_two_cameras_in_one_parquet_file_are_no_copies(tmp_path, capsys):
    sources, records = ("a.parquet#front", "a.parquet#wrist", "b.parquet#front"), []
    for number, source in enumerate(sources):
        (tmp_path / f"clip{number}").mkdir()
        records.append({"source": source, "clips": [clip(number, recording="ab@episode_000001")]})
    print_same_content(records[:2], tmp_path)
    assert not capsys.readouterr().out
    print_same_content(records, tmp_path)
    assert "the same content: a.parquet#front and b.parquet#front; training" in capsys.readouterr().out


@pytest.mark.parametrize("more", [0, 3])
def test_the_preview_says_how_many_of_the_clips_it_shows(tmp_path, monkeypatch, more):
    write_clip(tmp_path / "frames", moving_square(1))
    clips = [clip(number) for number in range(SHOWN + more)]
    for each in clips:
        (tmp_path / each["directory"]).symlink_to(tmp_path / "frames")
    drawn, draw_text = [], ImageDraw.ImageDraw.text

    def text(draw, place, words, *arguments, **options):
        drawn.append(str(words))
        return draw_text(draw, place, words, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    write_preview(tmp_path, clips)
    assert [words for words in drawn if " of " in words] == [f"{SHOWN} of {SHOWN + 3} clips"] * bool(more)
    assert Image.open(tmp_path / "preview.jpg").height == 80 * SHOWN + 20 * bool(more)
