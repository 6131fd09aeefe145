"""svd_common.py: frames, videos and metrics against independent computations."""

import http.server
import io
import json
import shutil
import subprocess
import threading

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from conftest import TINY, moving_square, run, write_clip
from PIL import Image

import svd_common as common
from svd_parts.dataset import list_clips, list_frames, read_metadata, sort_frames
from svd_parts.files import UserError, natural_key, replacing, write_file
from svd_parts.metrics import optical_flow, ssim, video_metrics
from svd_parts.weights import CHECKPOINT_STATE, resolve_model


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


def test_metrics_agree_with_their_definitions():
    real = moving_square(6)
    noise = np.random.default_rng(0).integers(-9, 10, real.shape)
    generated = np.clip(real.astype(int) + noise, 0, 255).astype(np.uint8)
    scores = video_metrics(generated, real)
    error = np.mean((generated[1:].astype(float) - real[1:]) ** 2)
    assert np.isclose(scores["psnr"], cv2.PSNR(generated[1:], real[1:])) and np.isclose(
        scores["psnr"], 10 * np.log10(255**2 / error)
    )
    perfect = video_metrics(real, real)
    assert perfect["psnr_moving"] == float("inf") and perfect["motion_ratio"] == 1 and perfect["flow_error"] == 0
    frozen = video_metrics(np.repeat(real[:1], 6, axis=0), real)
    assert frozen["motion_ratio"] == 0 and frozen["psnr_moving"] < frozen["psnr"] and frozen["flow_error"] > 2
    late = video_metrics(np.concatenate([real[:1], real[:-1]]), real)
    assert late["psnr_moving"] < scores["psnr_moving"]


def test_ssim_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    first, second = moving_square(2)
    reference = metrics.structural_similarity(
        first, second, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert abs(ssim(first, second) - reference) < 2e-3


def test_optical_flow_finds_a_known_shift():
    ground = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (128, 160), dtype=np.uint8), (0, 0), 2)
    flow = optical_flow(ground, np.roll(ground, 3, axis=1))
    assert abs(np.median(flow[..., 0]) - 3) < 0.2 and abs(np.median(flow[..., 1])) < 0.2


# ------------------------------------------------------------------------------------------ what a script can meet


@pytest.mark.parametrize("script", ["infer_svd.py", "prepare_dataset.py", "train_svd.py"])
def test_an_opencv_that_cannot_be_loaded_is_one_line(script, tmp_path):
    why = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({why!r})")
    done = run(script, "--help", ok=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout.count("\n") == 1 and "libGL" in done.stdout and "opencv-python-headless" in done.stdout


# ----------------------------------------------------------------------------------------------------------- models


def test_what_is_no_pipeline_is_called_what_it_is(trained, tmp_path):
    from safetensors.numpy import save_file

    def refused(path):
        with pytest.raises(UserError) as error:
            resolve_model(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    one = {"a": np.zeros(1, np.float32)}
    comfy = tmp_path / "comfy" / "models" / "checkpoints"
    comfy.mkdir(parents=True)
    save_file({"model.diffusion_model.x": one["a"]}, comfy / "svd_xt.safetensors")
    for path in (comfy / "svd_xt.safetensors", comfy, tmp_path / "comfy"):
        assert "weights in one file, as ComfyUI takes them (svd_xt.safetensors)" in refused(path)
    (tmp_path / "old.ckpt").write_bytes(b"x")
    assert "pickled" in refused(tmp_path / "old.ckpt")
    (tmp_path / "lora").mkdir()
    save_file({"unet.lora_A.weight": one["a"]}, tmp_path / "lora" / "adapter_model.safetensors")
    assert "a LoRA" in refused(tmp_path / "lora")
    shutil.copytree(TINY / "unet", tmp_path / "bare" / "unet")
    assert "one part of a model" in refused(tmp_path / "bare" / "unet")
    assert f"one part of a pipeline; give the whole folder, {TINY}" in refused(TINY / "unet")
    shutil.copytree(TINY, tmp_path / "sd15")
    index = tmp_path / "sd15" / "model_index.json"
    assert f"give {tmp_path / 'sd15'}" in refused(tmp_path)
    index.write_text(index.read_text().replace("StableVideo", "Stable"))
    assert "a StableDiffusionPipeline, not a StableVideoDiffusionPipeline" in refused(tmp_path / "sd15")
    index.write_text("[]")
    assert "damaged" in refused(tmp_path / "sd15")
    assert "--resume_from_checkpoint" in refused(trained / "checkpoint-3")
    (tmp_path / "empty").mkdir()
    assert "no diffusers pipeline here" in refused(tmp_path / "empty")


@pytest.fixture
def hub(tmp_path):
    """A hub that knows a gated model, another pipeline and a repository of single files, and no other."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, code, body = 401, "RepoNotFound", b""
            if self.path.startswith("/stabilityai/gated/"):
                status, code = 403, "GatedRepo"
            elif self.path.startswith("/stabilityai/files/"):
                status, code = 404, "EntryNotFound"
            elif self.path.startswith("/stabilityai/sd15/"):
                status, code, body = 200, "", b'{"_class_name": "StableDiffusionPipeline"}'
            self.send_response(status)
            for name, value in {"X-Error-Code": code, "Content-Length": len(body), "ETag": '"a"'}.items():
                self.send_header(name, str(value))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
    }
    server.shutdown()


@pytest.mark.parametrize(
    "name, message",
    [
        ("stabilityai/stable-video-difusion-img2vid", "is it stabilityai/stable-video-diffusion-img2vid?"),
        ("stabilityai/gated", "licence"),
        ("stabilityai/files", "no diffusers pipeline"),
        ("stabilityai/sd15", "a StableDiffusionPipeline, not a StableVideoDiffusionPipeline"),
        ("https://huggingface.co/stabilityai/gated", "owner/name"),
    ],
)
def test_what_the_hub_answers_is_told_rightly(name, message, hub, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "x.png")
    arguments = ["--input_image", tmp_path / "x.png", "--output_video", tmp_path / "x.mp4", "--model_dir", name]
    done = run("infer_svd.py", *arguments, ok=False, env=hub)
    assert message in done.stdout and ("HF_ENDPOINT" in done.stdout) == (name == "stabilityai/gated")


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_finds_its_base_after_a_move(trained, tmp_path):
    """The base lies elsewhere: beside the run, where the option says, or nowhere, which is one line."""
    checkpoint = tmp_path / "models" / "run" / "checkpoint-6"
    shutil.copytree(trained / "checkpoint-6", checkpoint)
    state_file = checkpoint / CHECKPOINT_STATE
    state = json.loads(state_file.read_text())
    state["settings"]["pretrained_model_name"] = str(tmp_path / "before" / "models" / "svd")
    state_file.write_text(json.dumps(state))
    shutil.copytree(trained, tmp_path / "models" / "run" / "svd")  # the right name, and other weights
    with pytest.raises(UserError, match=r"before/models/svd.*--base_model"):
        common.resolve_checkpoint(checkpoint)
    assert common.resolve_checkpoint(checkpoint, base=TINY)[0] == TINY
    with pytest.raises(UserError, match="another base.*--base_model"):
        common.resolve_checkpoint(checkpoint, base=trained)
    shutil.copytree(TINY, tmp_path / "models" / "svd")
    assert common.resolve_checkpoint(checkpoint)[0] == tmp_path / "models" / "svd"


# ---------------------------------------------------------------------------------------------------------- writing


def test_what_is_written_is_whole_or_as_it_was(tmp_path):
    write_file(tmp_path / "x", "before")
    (tmp_path / ".f.part").mkdir()
    (tmp_path / ".f.part" / "half").write_bytes(b"left by a killed run")
    for path, folder in ((tmp_path / "x", False), (tmp_path / "f", True)):
        with pytest.raises(OSError, match="full"), replacing(path, folder) as aside:
            assert not path.is_dir() and not (aside / "half").exists()
            (aside / "y" if folder else aside).write_bytes(b"after")
            raise OSError("full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"
    with replacing(tmp_path / "f", folder=True) as aside:
        (aside / "y").write_bytes(b"after")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "y").read_bytes() == b"after"


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
