"""What a video file says of itself: where it ends, what is cut away, where recordings were joined."""

import pytest
from test_prepare_dataset import LIBX264, ffmpeg, joined, make, prepare

from svd_parts.probe import container_end

CODECS = {"mkv": LIBX264, "webm": ["-c:v", "libvpx"], "mxf": ["-c:v", "mpeg2video"], "mp4": LIBX264, "avi": LIBX264}


@pytest.mark.parametrize("suffix", CODECS)
def test_a_file_ends_where_its_own_lengths_say(tmp_path, suffix):
    whole = make(tmp_path / f"x.{suffix}", *CODECS[suffix])
    size, data = whole.stat().st_size, whole.read_bytes()
    assert container_end(whole) == size
    if suffix != "avi":  # the parts of a long AVI look like this too
        assert container_end(joined(tmp_path / f"two.{suffix}", whole, whole)) == size
    if suffix != "mp4":  # its index comes first or last
        (tmp_path / f"cut.{suffix}").write_bytes(data[: size * 7 // 10])
        assert container_end(tmp_path / f"cut.{suffix}") > size - 2048


def test_lengths_that_were_never_written_say_nothing(tmp_path):
    assert container_end(make(tmp_path / "x.mkv", *LIBX264, "-live", "1")) == 0
    for data in (b"\x1a\x45\xdf\xa3" + bytes(60), b"\x06\x0e\x2b\x34", b"\x1a\x45\xdf\xa3", b"no video", b""):
        (tmp_path / "x").write_bytes(data)
        assert container_end(tmp_path / "x") < 20


@pytest.mark.parametrize("suffix", ["mkv", "mxf"])
def test_a_short_file_cut_between_two_packets_is_named(tmp_path, suffix):
    """Nothing is torn there, so ffmpeg says nothing, and two fifths of two seconds are less than clocks may differ."""
    clusters = ["-g", "5", "-cluster_time_limit", "200"] if suffix == "mkv" else []
    whole = make(tmp_path / f"x.{suffix}", *CODECS[suffix], *clusters)
    data = whole.read_bytes()
    ends = [at for at in range(len(data)) if data.startswith(PARTS[suffix], at)]
    (tmp_path / "videos").mkdir()
    (tmp_path / f"videos/x.{suffix}").write_bytes(data[: ends[len(ends) * 7 // 10]])
    text, lines = prepare(tmp_path / "videos", tmp_path / "out", status=1)
    assert lines[f"x.{suffix}"]["truncated"] and f"x.{suffix}: ends after" in text


PARTS = {"mkv": b"\x1f\x43\xb6\x75", "mxf": bytes.fromhex("060e2b34010201010d01030115")}


def test_a_joined_mxf_has_all_its_frames_at_its_rate(tmp_path):
    one = make(tmp_path / "one.mxf", *CODECS["mxf"])
    joined(tmp_path / "videos/x.mxf", one, one)
    line = prepare(tmp_path / "videos", tmp_path / "out")[1]["x.mxf"]
    assert (line["num_frames"], line["fps"], line["duration"], line["problems"]) == (50, 25, 2, [])
    assert sum("timestamps begin again at 1.000 s" in note for note in line["notes"]) == 1


def test_what_an_edit_list_cuts_away_is_not_missing(tmp_path):
    whole = make(tmp_path / "whole.mp4", *LIBX264, "-g", "250")
    (tmp_path / "videos").mkdir()
    ffmpeg("-ss", "0.4", "-i", whole, "-c", "copy", tmp_path / "videos/x.mp4")
    text, lines = prepare(tmp_path / "videos", tmp_path / "out")
    assert lines["x.mp4"]["num_frames"] == 15 and lines["x.mp4"]["fps"] == 25 and not lines["x.mp4"]["problems"], text
