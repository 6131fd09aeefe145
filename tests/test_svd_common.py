"""svd_common.py: frames and videos against independent computations."""

import io
import subprocess

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import moving_square, run, write_clip
from PIL import Image

import svd_common as common
from svd_parts.dataset import list_frames
from svd_parts.files import UserError


def test_png_is_lossless_and_fit_keeps_the_aspect_ratio(tmp_path):
    frame = moving_square(1)[0]
    (tmp_path / "x.png").write_bytes(common.encode_png(frame))
    assert np.array_equal(common.read_image(tmp_path / "x.png"), frame)
    assert np.array_equal(np.array(Image.open(tmp_path / "x.png")), frame)
    assert common.fit_frame(frame, 96, 64) is not None and np.array_equal(common.fit_frame(frame, 96, 64), frame)
    circle = cv2.circle(np.zeros((200, 400, 3), np.uint8), (200, 100), 50, (255, 255, 255), -1)
    fitted = common.fit_frame(circle, 64, 64)
    assert fitted.shape == (64, 64, 3)
    rows, columns = (np.flatnonzero(fitted[..., 0].max(axis) > 127) for axis in (1, 0))
    assert abs(len(rows) - 32) <= 1 and abs(len(columns) - 32) <= 1  # round, and half of 64


def test_images_are_read_as_people_see_them(tmp_path):
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:20] = 200, 30, 30
    rotated = Image.fromarray(np.rot90(picture, 1))  # stored on its side; EXIF 6 turns it upright
    exif = rotated.getexif()
    exif[0x0112] = 6
    for suffix, tolerance in ((".png", 0), (".jpg", 1), (".webp", 2)):
        rotated.save(tmp_path / f"exif{suffix}", exif=exif, quality=100, subsampling=0)
        if suffix == ".png":  # moved behind the picture, where it may stand too
            data = (tmp_path / "exif.png").read_bytes()
            at = data.index(b"eXIf") - 4
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            (tmp_path / "exif.png").write_bytes(data[:at] + data[end:-12] + data[at:end] + data[-12:])
        read = common.read_image(tmp_path / f"exif{suffix}")
        assert read.shape == picture.shape and np.abs(read.astype(int) - picture).mean() <= tolerance
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(common.read_image(tmp_path / "cmyk.jpg").astype(int) - picture).max() <= 9
    Image.fromarray(picture).save(tmp_path / "key.png", transparency=(0, 0, 0))
    assert (common.read_image(tmp_path / "key.png")[30] == 255).all()
    Image.fromarray(picture).convert("P").save(tmp_path / "palette.png")
    assert common.read_image(tmp_path / "palette.png").shape == picture.shape
    Image.fromarray(np.dstack([picture, np.full((40, 60), 0, np.uint8)])).save(tmp_path / "alpha.png")
    assert (common.read_image(tmp_path / "alpha.png") == 255).all()  # wholly transparent: white
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(common.read_image(tmp_path / "grey.png")[..., 2], picture[..., 0])
    cv2.imwrite(str(tmp_path / "deep.png"), picture[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(common.read_image(tmp_path / "deep.png")[..., 1], picture[..., 0])
    for data in (b"\x89PNG\r\n but no more", b"", (tmp_path / "exif.jpg").read_bytes()[:900]):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(UserError, match="bad.png: not a readable image"):
            common.read_image(tmp_path / "bad.png")
    with pytest.raises(UserError, match="not a readable image .Is a directory"):
        common.read_image(tmp_path)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}, {"quality": 30}])
def test_the_fast_reader_sees_what_pil_sees(options):
    """Pictures of 8-bit RGB without orientation: OpenCV decodes them for speed, and must not change a pixel."""
    picture = Image.fromarray(cv2.GaussianBlur(moving_square(1, 121, 83)[0], (0, 0), 2))
    for format in ("JPEG", "PNG"):
        file = io.BytesIO()
        picture.save(file, format, **options)
        assert common.is_plain(file.getvalue())
        decoded = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(decoded[..., ::-1], np.array(Image.open(file)))


def test_written_video_plays_everywhere(tmp_path):
    frames = moving_square(10)
    common.write_video(tmp_path / "x.mp4", frames, 7)
    assert common.read_video(tmp_path / "x.mp4").shape == frames.shape
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "x.mp4"))
    info = next(reader)
    reader.close()
    assert info["codec"] == "h264" and "yuv420p" in info["pix_fmt"] and info["fps"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


# ------------------------------------------------------------------------------------------ what a script can meet


@pytest.mark.parametrize("script", ["infer_svd.py", "prepare_dataset.py", "train_svd.py"])
def test_an_opencv_that_cannot_be_loaded_is_one_line(script, tmp_path):
    why = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({why!r})")
    done = run(script, "--help", ok=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.count("\n") == 1 and "libGL" in done.stdout and "opencv-python-headless" in done.stdout


# ----------------------------------------------------------------------------------------------------------- models


# ------------------------------------------------------------------------------------------------------ checkpoints


# ---------------------------------------------------------------------------------------------------------- writing


def test_frames_become_the_pipelines_pixels(tmp_path):
    from diffusers.image_processor import VaeImageProcessor

    write_clip(tmp_path / "clip", moving_square(3, 120, 64))
    frames = common.read_frames(list_frames(tmp_path / "clip"), 96, 64)
    assert frames.shape == (3, 64, 96, 3) and np.array_equal(frames, moving_square(3, 120, 64)[:, :, 12:108])
    pixels = VaeImageProcessor(do_resize=False).preprocess([Image.fromarray(frame) for frame in frames])
    assert common.to_pixels(frames).equal(pixels)


def test_a_video_says_which_matrix_its_colours_were_made_by(tmp_path):
    common.write_video(tmp_path / "x.mp4", moving_square(4), 5)
    header = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "x.mp4"], capture_output=True, text=True)
    assert "yuv420p(tv, smpte170m" in header.stderr
