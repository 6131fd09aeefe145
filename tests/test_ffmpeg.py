"""ffmpeg's log: which of its lines are whole."""

import subprocess

import imageio_ffmpeg
import pytest
from test_prepare_dataset import LIBX264, make

from svd_parts.ffmpeg import is_cut

SAID = "[Parsed_showinfo_2 @ 0x7] [info] "
CUT = ["color_range:pc color_space:gbr color_primaries:unknownco located POCs unavailable", " color_trc:unknown"]
CUT += ["n:   4 pts: 192000 pts_time:0.16 fmt:rgb24error while decoding MB 3 4"]
CUT += ["color_range:pc color_space:gbr color_primaries:unknown color_trc:unknownno frame!"]


@pytest.mark.parametrize("line", CUT)
def test_a_line_with_a_message_in_its_middle_is_no_whole_one(line):
    assert is_cut(SAID + line)


@pytest.mark.parametrize("more", [LIBX264, ["-c:v", "libx265"], ["-c:v", "mpeg2video"], ["-c:v", "mjpeg"]])
def test_all_lines_of_a_log_are_whole(tmp_path, more):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *"-v level+info -threads 1 -i".split(), make(tmp_path / "x.mkv", *more)]
    command += "-vf setsar=1,format=rgb24,showinfo=checksum=0 -f null -".split()
    log = subprocess.run(command, stderr=subprocess.PIPE, check=True, text=True).stderr.splitlines()
    assert sum("] n:" in line for line in log) > 2
    assert not [line for line in log if is_cut(line)]
