"""The table of output formats: what is written is read back, and a new format is one entry."""

import numpy as np
import pytest
from conftest import moving_square
from PIL import Image

import infer_svd
from svd_parts import formats


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_writes_and_what_can_be_compared_is_read_back(name, tmp_path):
    frames, entry = moving_square(8), formats.FORMATS[name]
    path = tmp_path / f"clip{entry.suffix}"
    entry.write(path, frames, 8)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
    if entry.read:
        read = entry.read(path)
        assert read.shape == frames.shape and np.abs(read.astype(int) - frames).mean() < 3
    else:
        with Image.open(path) as image:
            assert image.n_frames == 8


def test_a_new_format_is_one_entry(monkeypatch, tmp_path):
    new = formats.Format(".npy", lambda path, frames, fps: np.save(path, frames), np.load)
    monkeypatch.setitem(formats.FORMATS, "numpy", new)
    command = ["--model_dir", "m", "--input_image", "i", "--output_video", str(tmp_path / "set")]
    assert infer_svd.parse_args([*command, "--output_format", "numpy"]).output_format == "numpy"


@pytest.mark.parametrize("fps, count", [(60, 11), (120, 5), (50, 14), (7, 14)])
def test_no_frame_of_a_gif_is_shorter_than_browsers_play(fps, count, tmp_path):
    formats.FORMATS["gif"].write(tmp_path / "a.gif", moving_square(14), fps)
    with Image.open(tmp_path / "a.gif") as image:
        lengths = [image.seek(index) or image.info["duration"] for index in range(image.n_frames)]
    assert len(lengths) == count and min(lengths) >= 20 and abs(sum(lengths) / 1000 - 14 / fps) < 0.02
