"""infer_svd.py: its frames against the stock pipeline's, on the small real checkpoint; what it writes and refuses."""

import json
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import SIZE, TINY, moving_square, run
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

import infer_svd
import svd_common as common

STEPS = ["--num_inference_steps", "2"]
FAST = [*SIZE, *STEPS]


def infer(capsys, *arguments, ok=True):
    """Runs infer_svd.py in this process, as `python infer_svd.py` would; returns what it printed."""
    with pytest.raises(SystemExit) as end:
        common.run_script(lambda: infer_svd.main([str(argument) for argument in arguments]))
    printed = "".join(capsys.readouterr())
    assert (end.value.code in (0, None)) == ok, printed
    return printed


def stock_frames(model, image, seed=0, **options):
    """What diffusers' own pipeline gives, with nothing of ours: (T, H, W, 3) uint8."""
    cuda = torch.cuda.is_available()
    pipe = StableVideoDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float16 if cuda else torch.float32)
    pipe.to("cuda" if cuda else "cpu").set_progress_bar_config(disable=True)
    options = {"width": 96, "height": 64, "num_frames": 8, "num_inference_steps": 2, **options}
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(Image.fromarray(image), generator=generator, output_type="np", **options).frames[0]
    return (frames * 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A first frame of exactly the size that is asked for."""
    path = tmp_path_factory.mktemp("picture") / "first.png"
    path.write_bytes(common.encode_png(moving_square(1)[0]))
    return path


# ------------------------------------------------------------------------------------------------ the stock frames


def test_frames_are_those_of_the_stock_pipeline(picture, tmp_path, capsys):
    infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", tmp_path / "ours.mp4", *FAST,
        "--seed", 5, "--fps", 9, "--motion_bucket_id", 60, "--noise_aug_strength", 0.1, "--min_guidance_scale", 1.5,
        "--max_guidance_scale", 2.5, "--decode_chunk_size", 3)  # fmt: skip
    stock = stock_frames(TINY, moving_square(1)[0], seed=5, fps=9, motion_bucket_id=60, noise_aug_strength=0.1,
        min_guidance_scale=1.5, max_guidance_scale=2.5, decode_chunk_size=3)  # fmt: skip
    common.write_video(tmp_path / "stock.mp4", stock, 9)
    assert np.array_equal(common.read_video(tmp_path / "ours.mp4"), common.read_video(tmp_path / "stock.mp4"))


def test_every_option_is_recorded_and_the_video_plays_everywhere(picture, tmp_path, capsys):
    target = tmp_path / "new" / "folder" / "video.mp4"
    infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", target, *FAST, "--fps", 11)
    record = json.loads(target.with_suffix(".json").read_text())
    options = vars(
        infer_svd.build_parser().parse_args(["--model_dir", "m", "--input_image", "i", "--output_video", "o"])
    )
    assert options.keys() <= record.keys()
    assert all(record[name] is not None for name in ("width", "height", "num_frames", "fps", "decode_chunk_size"))
    assert record["model_dir"] == str(TINY) and record["seed"] == 0 and record["motion_bucket_id"] == 127
    assert record["versions"].keys() >= {"python", "torch", "diffusers"}
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    described = subprocess.run([ffmpeg, "-i", target], stderr=subprocess.PIPE, text=True, errors="replace").stderr
    assert "h264" in described and "yuv420p" in described and "96x64" in described and " 11 fps" in described
    assert len(common.read_video(target)) == 8 and sorted(p.suffix for p in target.parent.iterdir()) == [
        ".json",
        ".mp4",
    ]


def test_the_real_script_runs_and_says_where(picture, tmp_path):
    target = tmp_path / "v.mp4"
    done = run("infer_svd.py", "--model_dir", TINY, "--input_image", picture, "--output_video", target, *FAST)
    assert ("the GPU in fp16" if torch.cuda.is_available() else "the CPU in fp32") in done.stdout
    assert "seed 0" in done.stdout and target.exists() and target.with_suffix(".json").exists()


# ------------------------------------------------------------------------------------------------------- the image


def test_any_still_image_is_read_as_people_see_it(tmp_path):
    ground = (moving_square(1)[0] // 2 + 60).astype(np.uint8)  # no extremes: JPEG stays close
    upright = Image.fromarray(ground)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.rotate(90, expand=True).save(tmp_path / "rotated.jpg", exif=exif, quality=100, subsampling=0)
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    rgba = np.dstack([ground, np.full(ground.shape[:2], 255, np.uint8)])
    rgba[:, 48:, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    grey = np.asarray(upright.convert("L"))
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    upright.quantize(64).save(tmp_path / "palette.gif")
    for name, expected, tolerance in (
        ("rotated.jpg", ground, 3),
        ("cmyk.jpg", ground, 4),
        ("grey.png", grey[..., None].repeat(3, 2), 0),
        ("grey16.png", grey[..., None].repeat(3, 2), 0),
        ("palette.gif", ground, 12),
    ):
        image = common.read_image(tmp_path / name)
        assert image.shape == (64, 96, 3) and image.dtype == np.uint8, name
        assert np.abs(image.astype(int) - expected).mean() <= tolerance, name
    alpha = common.read_image(tmp_path / "alpha.png")
    assert np.array_equal(alpha[:, :48], ground[:, :48]) and (alpha[:, 48:] == 255).all()


def test_image_of_another_shape_is_fitted_as_training_fits_it(tmp_path, capsys):
    big = moving_square(1, width=200, height=200)[0]
    (tmp_path / "big.png").write_bytes(common.encode_png(big))
    target = tmp_path / "ours.mp4"
    infer(capsys, "--model_dir", TINY, "--input_image", tmp_path / "big.png", "--output_video", target, *FAST)
    common.write_video(tmp_path / "stock.mp4", stock_frames(TINY, common.fit_frame(big, 96, 64)), 7)
    assert np.array_equal(common.read_video(target), common.read_video(tmp_path / "stock.mp4"))


# ------------------------------------------------------------------------------------------------------- the model


def test_fine_tuned_folder_and_checkpoints_load_with_the_defaults_of_the_training(trained, picture, tmp_path, capsys):
    videos = {}
    for name, model in (("result", trained), ("new", trained / "checkpoint-6"), ("old", trained / "checkpoint-3")):
        target = tmp_path / f"{name}.mp4"
        infer(capsys, "--model_dir", model, "--input_image", picture, "--output_video", target, *STEPS)
        videos[name] = common.read_video(target)
        record = json.loads(target.with_suffix(".json").read_text())
        assert [record[key] for key in ("width", "height", "num_frames", "fps")] == [96, 64, 8, 7]
    assert not np.array_equal(videos["new"], videos["old"])
    result, checkpoint = (
        common.load_pipeline(model, torch.float16)[0].unet for model in (trained, trained / "checkpoint-6")
    )
    for (name, ours), theirs in zip(checkpoint.named_parameters(), result.parameters()):
        assert torch.equal(ours, theirs), name


# ------------------------------------------------------------------------------------------------ users' mistakes


def test_users_mistakes_get_one_line_and_nothing_is_written(picture, tmp_path, capsys):
    output = tmp_path / "out" / "video.mp4"

    def refused(*flags, image=picture, target=output, model=TINY):
        printed = infer(capsys, "--model_dir", model, "--input_image", image, "--output_video", target,
            "--num_inference_steps", 1, *SIZE, *flags, ok=False)  # fmt: skip
        assert "Traceback" not in printed and not (tmp_path / "out").exists()
        lines = [line for line in printed.splitlines() if "error: " in line]
        assert len(lines) == 1, printed
        return printed

    assert "no such image" in refused(image=tmp_path / "nothing.png")
    for name, data in (("empty.png", b""), ("text.jpg", b"hello"), ("cut.png", picture.read_bytes()[:200])):
        (tmp_path / name).write_bytes(data)
        assert f"{name}: not a readable image" in refused(image=tmp_path / name)
    assert "--width must be a multiple of 16 for this model, got 100; the nearest is 96" in refused("--width", 100)
    assert "--height must be a multiple of 16" in refused("--height", 30)
    assert "--num_frames must be at least 2" in refused("--num_frames", 1)
    assert "--fps must be" in refused("--fps", 0) and "--fps must be" in refused("--fps", "nan")
    assert "--motion_bucket_id must be 0..255, got 256" in refused("--motion_bucket_id", 256)
    assert "--noise_aug_strength must be 0..10" in refused("--noise_aug_strength", -1)
    assert "--noise_aug_strength must be 0..10" in refused("--noise_aug_strength", "nan")
    assert "--num_inference_steps must be 1..1000" in refused("--num_inference_steps", 0)
    assert "--num_inference_steps must be 1..1000" in refused("--num_inference_steps", 1001)
    assert "--decode_chunk_size must be at least 1" in refused("--decode_chunk_size", 0)
    assert "--min_guidance_scale 4 must not be over" in refused("--min_guidance_scale", 4)
    assert "--max_guidance_scale must be" in refused("--max_guidance_scale", "inf")
    assert "--seed must be" in refused("--seed", 2**64) and "--seed must be" in refused("--seed", -1)
    assert "no such model folder" in refused(model=tmp_path / "nothing")
    assert "not a folder" in refused(target=picture / "video.mp4")
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "download it into this folder" in refused(model=broken)
    (broken / "training_settings.json").write_text("{")
    shutil.copytree(TINY / "vae", broken / "vae", dirs_exist_ok=True)
    assert "training_settings.json: damaged" in refused(model=broken)
    assert "HF_ENDPOINT" in refused(model="stabilityai/stable-video-diffusion-img2vid-xt")


def test_what_exists_is_not_overwritten(picture, tmp_path, capsys):
    for name in ("video.mp4", "video.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        printed = infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", folder / "video.mp4",
            ok=False)  # fmt: skip
        assert (
            "exists already" in printed and (folder / name).read_text() == "mine" and len(list(folder.iterdir())) == 1
        )
