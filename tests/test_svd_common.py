"""svd_common.py: frames, videos and metrics against independent computations."""

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import moving_square
from PIL import Image

import svd_common as common


def test_png_is_lossless_and_fit_keeps_the_aspect_ratio(tmp_path):
    frame = moving_square(1)[0]
    (tmp_path / "x.png").write_bytes(common.encode_png(frame))
    assert np.array_equal(common.read_frame(tmp_path / "x.png"), frame)
    assert np.array_equal(np.array(Image.open(tmp_path / "x.png")), frame)
    assert common.fit_frame(frame, 96, 64) is not None and np.array_equal(common.fit_frame(frame, 96, 64), frame)
    circle = cv2.circle(np.zeros((200, 400, 3), np.uint8), (200, 100), 50, (255, 255, 255), -1)
    fitted = common.fit_frame(circle, 64, 64)
    assert fitted.shape == (64, 64, 3)
    rows, columns = (np.flatnonzero(fitted[..., 0].max(axis) > 127) for axis in (1, 0))
    assert abs(len(rows) - 32) <= 1 and abs(len(columns) - 32) <= 1  # round, and half of 64


def test_frames_sort_as_numbers(tmp_path):
    for name in ("frame10.png", "frame2.png", ".hidden.png", "frame1.PNG", "note.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in common.list_frames(tmp_path)] == ["frame1.PNG", "frame2.png", "frame10.png"]


def test_images_are_read_as_people_see_them(tmp_path):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20] = 200, 30, 30
    rotated = Image.fromarray(np.rot90(picture, 1))  # stored on its side; EXIF 6 turns it upright
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(tmp_path / "exif.png", exif=exif)
    assert np.array_equal(common.read_image(tmp_path / "exif.png"), picture)
    Image.fromarray(np.dstack([picture, np.full((40, 60), 0, np.uint8)])).save(tmp_path / "alpha.png")
    assert (common.read_frame(tmp_path / "alpha.png") == 255).all()  # wholly transparent: white
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(common.read_frame(tmp_path / "grey.png")[..., 2], picture[..., 0])
    cv2.imwrite(str(tmp_path / "deep.png"), picture[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(common.read_frame(tmp_path / "deep.png")[..., 1], picture[..., 0])
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n but no more")
    with pytest.raises(common.UserError, match="bad.png: not a readable image"):
        common.read_image(tmp_path / "bad.png")


def test_written_video_plays_everywhere(tmp_path):
    frames = moving_square(10)
    common.write_video(tmp_path / "x.mp4", frames, 7)
    assert common.read_video(tmp_path / "x.mp4").shape == frames.shape
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "x.mp4"))
    info = next(reader)
    reader.close()
    assert info["codec"] == "h264" and "yuv420p" in info["pix_fmt"] and info["fps"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_metrics_agree_with_their_definitions():
    real = moving_square(6)
    noise = np.random.default_rng(0).integers(-9, 10, real.shape)
    generated = np.clip(real.astype(int) + noise, 0, 255).astype(np.uint8)
    scores = common.video_metrics(generated, real)
    error = np.mean((generated[1:].astype(float) - real[1:]) ** 2)
    assert np.isclose(scores["psnr"], cv2.PSNR(generated[1:], real[1:])) and np.isclose(
        scores["psnr"], 10 * np.log10(255**2 / error)
    )
    perfect = common.video_metrics(real, real)
    assert perfect["psnr_moving"] == float("inf") and perfect["motion_ratio"] == 1 and perfect["flow_error"] == 0
    frozen = common.video_metrics(np.repeat(real[:1], 6, axis=0), real)
    assert frozen["motion_ratio"] == 0 and frozen["psnr_moving"] < frozen["psnr"] and frozen["flow_error"] > 2
    late = common.video_metrics(np.concatenate([real[:1], real[:-1]]), real)
    assert late["psnr_moving"] < scores["psnr_moving"]


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    first, second = moving_square(2)
    reference = metrics.structural_similarity(
        first, second, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert abs(common.ssim(first, second) - reference) < 2e-3


def test_optical_flow_finds_a_known_shift():
    ground = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (128, 160), dtype=np.uint8), (0, 0), 2)
    flow = common.optical_flow(ground, np.roll(ground, 3, axis=1))
    assert abs(np.median(flow[..., 0]) - 3) < 0.2 and abs(np.median(flow[..., 1])) < 0.2
