"""infer_svd.py: its frames against the stock pipeline's, on the small real checkpoint; what it writes and refuses."""

import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import SIZE, TINY, Launched, moving_square, run, train_arguments
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline
from PIL import Image

import infer_svd
import svd_common as common
from svd_parts.console import run_script
from svd_parts.dataset import list_clips, read_metadata
from svd_parts.files import file_digest, lock_file
from svd_parts.metrics import clip_motion, motion_bucket, video_metrics
from svd_parts.shortcuts import avoid_conv3d, wrap_unet

STEPS = ["--num_inference_steps", "2"]
FAST = [*SIZE, *STEPS]
QUICK = [*SIZE, "--num_inference_steps", "1"]


def infer(capsys, *arguments, ok=True):
    """Runs infer_svd.py in this process, as `python infer_svd.py` would; returns what it printed."""
    with pytest.raises(SystemExit) as end:
        run_script(lambda: infer_svd.main([str(argument) for argument in arguments]))
    printed = "".join(capsys.readouterr())
    assert (end.value.code in (0, None)) == ok, printed
    return printed


def stock_frames(model, image, generator=None, seed=0, **options):
    """What diffusers' own pipeline gives, with nothing of ours: (T, H, W, 3) uint8."""
    cuda = torch.cuda.is_available()
    dtype = common.dtype_option(torch.float16 if cuda else torch.float32)
    pipe = StableVideoDiffusionPipeline.from_pretrained(model, **dtype)
    pipe.to("cuda" if cuda else "cpu").set_progress_bar_config(disable=True)
    options = {"width": 96, "height": 64, "num_frames": 8, "num_inference_steps": 2, **options}
    generator = generator or torch.Generator().manual_seed(seed)
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
    assert options.keys() - {"shard"} <= record.keys()  # a clip is the same whichever process made it
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
    """On a terminal that knows ASCII alone, with names that are not even UTF-8."""
    target, image = tmp_path / os.fsdecode(b"caf\xe9.mp4"), tmp_path / "\u673a\u5668.png"
    shutil.copy(picture, image)
    done = run("infer_svd.py", "--model_dir", TINY, "--input_image", image, "--output_video", target, *FAST,
        env={"PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert ("the GPU in fp16" if torch.cuda.is_available() else "the CPU in fp32") in done.stdout
    assert ("pytorch.org" in done.stdout) == (torch.version.cuda is None) and "float32: []" not in done.stdout
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


def test_what_an_image_loses_is_said_once_for_all_images_of_its_kind(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("tall", "taller", "tallest"):
        Image.new("RGB", (90, 160)).save(folder / f"{name}.png")
    Image.new("RGB", (96, 64)).save(folder / "fits.png")
    Image.new("RGBA", (96, 64), (1, 2, 3, 255)).save(folder / "opaque.png")
    Image.new("RGBA", (96, 64), (1, 2, 3, 9)).save(folder / "glass.png")
    Image.new("CMYK", (96, 64)).save(folder / "print.jpg")
    Image.fromarray(np.zeros((64, 96), np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (96, 64)).save(folder / "pages.tif", save_all=True, append_images=[Image.new("RGB", (96, 64))])
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)
    first, *rest = map(Image.fromarray, noise)
    first.save(folder / "cut.tif", save_all=True, append_images=rest)  # cut behind its first picture
    data = (folder / "cut.tif").read_bytes()
    (folder / "cut.tif").write_bytes(data[: len(data) * 2 // 3])
    flags = ["--model_dir", TINY, "--input_image", folder, "--output_video", tmp_path / "set", *SIZE, "--dry_run"]
    printed = infer(capsys, *flags)
    crop = "some 60% of the picture is lost to the crop to 96x64; --width 64 --height 112 would fit"
    assert f"tall.png and 2 more: {crop}" in printed
    assert "glass.png: what is transparent becomes white" in printed and "print.jpg: CMYK becomes RGB" in printed
    assert "deep.png: more than 8 bits" in printed and "pages.tif: an animation" not in printed
    assert "cut.tif and 1 more: an animation or a stack of pages" in printed
    assert "fits.png" not in printed and "opaque.png" not in printed and printed.count("warning: ") == 5
    assert "the run goes on with --decode_chunk_size 4 --low_vram: " in printed
    fitting = [*flags, "--width", 64, "--height", 112]
    assert "tall.png" not in infer(capsys, *fitting)


def test_brackets_in_names_are_names_and_links_are_followed(picture, tmp_path, capsys):
    """Where a name is there as it is written, no part of it is a pattern."""
    folder = tmp_path / "clips [1]" / "day [a-z]"
    folder.mkdir(parents=True)
    (tmp_path / "clips 1").mkdir()
    (tmp_path / "link").symlink_to(folder)
    (folder / "round").symlink_to(tmp_path)  # a circle
    for path in (folder / "x[0].png", folder / "x0.png", tmp_path / "clips 1" / "wrong.png"):
        shutil.copy(picture, path)
    find = infer_svd.find_images
    both = {"x[0]": folder / "x[0].png", "x0": folder / "x0.png"}
    assert find(str(folder)) == find(str(folder / "*.png")) == find(str(folder / "x*")) == both
    assert find(str(folder / "x[0].png")) == {"x[0]": folder / "x[0].png"}
    assert set(find(str(tmp_path / "clips [1]" / "*" / "*.png"))) == {"day [a-z]/x[0]", "day [a-z]/x0"}
    assert set(find(str(tmp_path / "clips*" / "day [a-z]" / "x[0].png"))) == {"clips [1]/day [a-z]/x[0]"}
    assert set(find(str(tmp_path / "link"))) == set(find(str(tmp_path / "link" / "*.png"))) == {"x[0]", "x0"}
    assert sorted(path.name for path in find(str(tmp_path / "**" / "*.png")).values()) == [
        "wrong.png", "x0.png", "x[0].png",
    ]  # fmt: skip
    target = tmp_path / "clips [1]" / "video [2].mp4"
    infer(capsys, "--model_dir", TINY, "--input_image", folder / "x[0].png", "--output_video", target, *QUICK)
    assert len(common.read_video(target)) == 8


def test_a_pattern_that_the_shell_expanded_is_told_to_be_quoted(picture, tmp_path):
    images = []
    for number in range(5):
        images.append(shutil.copy(picture, tmp_path / f"image{number}.png"))
    for flags in (["--input_image", *images], ["--input_image", *images[:2]]):
        done = run("infer_svd.py", *flags, "--model_dir", TINY, "--output_video", tmp_path / "set", ok=False)
        line = done.stdout.splitlines()[-1]
        assert "error: unrecognized arguments: " + str(images[1]) in line and "quote a pattern" in line
        assert not (tmp_path / "set").exists()
    done = run("infer_svd.py", "--input_image", picture, "--modle_dir", TINY, "--model_dir", TINY, "--output_video",
        tmp_path / "set", ok=False)  # fmt: skip
    assert "--modle_dir" in done.stdout and "quote" not in done.stdout


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


def test_checkpoints_are_found_a_base_that_moved(trained, picture, tmp_path, capsys):
    """A run and its base moved together, then apart."""
    shutil.copytree(TINY, tmp_path / "new" / "tiny_svd")
    shutil.copytree(trained / "checkpoint-3", tmp_path / "new" / "run" / "checkpoint-3")
    state = tmp_path / "new" / "run" / "checkpoint-3" / "training_state.json"
    state.write_text(state.read_text().replace(str(TINY), "/gone/tiny_svd"))
    flags = ["--input_image", picture, *QUICK, "--model_dir", state.parent, "--output_video"]
    infer(capsys, *flags, tmp_path / "beside.mp4")
    shutil.move(tmp_path / "new" / "tiny_svd", tmp_path / "apart")
    printed = infer(capsys, *flags, tmp_path / "apart.mp4", ok=False)
    assert printed.count("error: ") == 1 and "--base_model" in printed and "/gone/tiny_svd" in printed
    infer(capsys, *flags, tmp_path / "apart.mp4", "--base_model", tmp_path / "apart")
    assert (tmp_path / "apart.mp4").read_bytes() == (tmp_path / "beside.mp4").read_bytes()


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
    assert "--lora_scale needs --lora" in refused("--lora_scale", 0.5)
    assert "--lora_scale must be" in refused("--lora", tmp_path, "--lora_scale", "nan")
    assert "no such image" in refused(image="~nobody/x.png")
    assert "--seed must be" in refused("--seed", 2**64) and "--seed must be" in refused("--seed", -1)
    assert "no such model folder" in refused(model=tmp_path / "nothing")
    assert "not a folder" in refused(target=picture / "video.mp4")
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    said = refused(model=broken)
    assert "vae: no weights; download diffusion_pytorch_model.safetensors" in said and "into this folder" in said
    (broken / "training_settings.json").write_text("{")
    shutil.copytree(TINY / "vae", broken / "vae", dirs_exist_ok=True)
    assert "training_settings.json: damaged" in refused(model=broken)
    for field, value in (("median_fps", "7"), ("width", None), ("motion_bucket_id_range", [0]), ("num_frames", True)):
        (broken / "training_settings.json").write_text(json.dumps({field: value}))
        assert f"training_settings.json: damaged, its {field} is {json.dumps(value)}" in refused(model=broken)
    assert "HF_ENDPOINT" in refused(model="stabilityai/stable-video-diffusion-img2vid-xt")


def test_what_exists_is_not_overwritten(picture, tmp_path, capsys):
    for name in ("video.mp4", "video.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        printed = infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", folder / "video.mp4",
            ok=False)  # fmt: skip
        assert (
            ("exists already" in printed or "is not the record of a clip" in printed or "damaged" in printed)
            and (folder / name).read_text() == "mine"
            and len(list(folder.iterdir())) == 1
        )


# --------------------------------------------------------------------------------------------------- many at once


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Two pictures that can be read and one that cannot."""
    folder = tmp_path_factory.mktemp("images")
    for seed in range(2):
        (folder / f"image{seed}.png").write_bytes(common.encode_png(moving_square(1, seed=seed)[0]))
    (folder / "image10.jpg").write_bytes(b"broken")
    return folder


MANY = ["--num_videos_per_image", 2, "--motion_bucket_id", 60, 180]


@pytest.fixture(scope="session")
def made(images, tmp_path_factory):
    """The set of those pictures, two seeds and two amounts of motion, made in one run by the real script."""
    folder = tmp_path_factory.mktemp("made") / "set"
    done = run(
        "infer_svd.py", "--model_dir", TINY, "--input_image", images, "--output_video", folder, *QUICK, *MANY, ok=False
    )
    assert done.returncode == 1 and "image10.jpg: not a readable image" in done.stdout
    return folder


def test_a_folder_of_images_becomes_a_documented_set(images, made):
    records = lines_of(made)
    names = {f"image{i}_seed{s}_motion{m}.mp4" for i in range(2) for s in range(2) for m in (60, 180)}
    assert {record["file_name"] for record in records} == names == {path.name for path in made.glob("*.mp4")}
    assert {path.name for path in made.iterdir()} == names | {"metadata.jsonl", "index.html", ".infer"}
    hidden = {f"{name}.json" for name in names} | {"lock", ".making"}
    hidden |= {f"{file_digest(images / f'image{number}.png')}.jpg" for number in range(2)}
    assert {path.name for path in (made / ".infer").iterdir()} == hidden
    for record in records:
        assert (
            record["generated"] is True and record["model_dir"] == str(TINY) and len(record["model_fingerprint"]) == 16
        )
        assert (
            record["file_name"]
            == f"image{record['source_image'][-5]}_seed{record['seed']}_motion{record['motion_bucket_id']}.mp4"
        )
        assert record["source_image_sha256"] == hashlib.sha256(Path(record["source_image"]).read_bytes()).hexdigest()
        assert record["motion"] >= 0 and record["num_inference_steps"] == 1 and "torch" in record["versions"]


def test_a_clip_is_the_same_alone_and_in_a_batch(images, made, tmp_path, capsys):
    infer(capsys, "--model_dir", TINY, "--input_image", images / "image1.png", "--output_video", tmp_path / "alone.mp4",
        *QUICK, "--seed", 1, "--motion_bucket_id", 180)  # fmt: skip
    assert (tmp_path / "alone.mp4").read_bytes() == (made / "image1_seed1_motion180.mp4").read_bytes()


def everything_in(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_kill_and_resume_give_the_same_set(images, made, tmp_path, capsys):
    folder = tmp_path / "set"
    command = ["--model_dir", TINY, "--input_image", images / "image?.png", "--output_video", folder, *QUICK, *MANY]
    process = Launched("infer_svd.py", *command)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and len(list(folder.glob("[!.]*.mp4"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # alive: nobody else may touch what it writes
    before = everything_in(folder)
    printed = infer(capsys, *command, ok=False)
    assert printed.count("error: ") == 1 and "another infer_svd.py is writing here" in printed
    assert everything_in(folder) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*.mp4")}
    assert 3 <= len(before) < 8
    # and the moments that a kill seldom meets: a clip that is half written, one not yet listed, one not yet there
    parts = folder / ".infer" / ".making"
    parts.mkdir(exist_ok=True)
    (parts / ".image1_seed1_motion180.4711.part.mp4").write_bytes(b"half")
    (folder / ".index.html.4711.part").write_bytes(b"half")
    lines = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    gone = max(before)
    (folder / "metadata.jsonl").write_text("".join(line for line in lines[:2] if gone.name not in line))
    gone.unlink()
    del before[gone]
    printed = infer(capsys, *command)
    assert f"{8 - len(before)} clips to make" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none made again
    assert sorted(path.name for path in folder.rglob("*")) == sorted(path.name for path in made.rglob("*"))
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in made.glob("*.mp4"))
    assert [line["file_name"] for line in lines_of(folder)] == [line["file_name"] for line in lines_of(made)]
    assert "nothing to make: all " in infer(capsys, *command)


def test_the_compared_set_has_one_writer_too(picture, tmp_path, capsys):
    flags = ["--model_dir", TINY, "--input_image", picture, *QUICK, "--output_video"]
    (tmp_path / "set" / ".compare" / ".infer").mkdir(parents=True)
    with lock_file(tmp_path / "set" / ".compare" / ".infer" / "lock", "taken"):
        printed = infer(capsys, *flags, tmp_path / "set", "--compare_with", TINY, ok=False)
        assert "another infer_svd.py is writing here" in printed and not list(tmp_path.rglob("*.mp4"))


def test_a_single_clip_is_no_set_and_is_made_once(picture, tmp_path, capsys):
    flags = ["--model_dir", TINY, "--input_image", picture, *QUICK, "--output_video", tmp_path / "video.mp4"]
    infer(capsys, *flags)
    before = everything_in(tmp_path)
    assert set(path.name for path in tmp_path.iterdir()) >= {"video.mp4", "video.json"} and len(before) == 2
    assert "video.mp4 is there already" in infer(capsys, *flags)
    printed = infer(capsys, *flags, "--seed", 3, ok=False)
    assert "seed was 0, is 3" in printed and "video.mp4 was made with other settings" in printed
    assert everything_in(tmp_path) == before
    (tmp_path / "video.mp4").unlink()  # its record is ours, and is written again
    infer(capsys, *flags)
    assert (tmp_path / "video.mp4").exists() and len(everything_in(tmp_path)) == 2


def test_a_clip_that_was_deleted_stays_away_until_its_record_goes_too(images, made, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path / "set")
    flags = ["--model_dir", TINY, "--input_image", images / "image?.png", "--output_video", folder, *QUICK, *MANY]
    dropped = folder / "image0_seed1_motion60.mp4"
    dropped.unlink()
    for _ in range(2):
        printed = infer(capsys, *flags)
        assert "nothing to make: all " in printed and f"delete {folder}/.infer/{dropped.name}.json" in printed
        assert dropped.name not in (folder / "metadata.jsonl").read_text() and len(lines_of(folder)) == 7
    (folder / ".infer" / f"{dropped.name}.json").unlink()
    assert "1 clip to make" in infer(capsys, *flags)
    assert dropped.read_bytes() == (made / dropped.name).read_bytes() and len(lines_of(folder)) == 8


def test_fields_that_a_user_added_stay_and_clips_without_a_record_are_refused(images, made, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path / "set")
    flags = ["--model_dir", TINY, "--input_image", images / "image?.png", "--output_video", folder, *QUICK, *MANY]
    lines = [{**line, "text": f"clip {number}"} for number, line in enumerate(lines_of(folder))]
    text = "\ufeff" + "".join(json.dumps(line) + "\n" for line in lines)  # as Windows' editors save it
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    infer(capsys, *flags)
    assert [line.get("text") for line in lines_of(folder)] == [f"clip {number}" for number in range(8)]
    (folder / "metadata.jsonl").write_text(text[1:-9], encoding="utf-8")
    before = everything_in(folder)
    assert "line 8: damaged" in infer(capsys, *flags, ok=False) and everything_in(folder) == before
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    shutil.rmtree(folder / ".infer")
    before = everything_in(folder)
    assert f"has no record in {folder}/.infer" in infer(capsys, *flags, ok=False)
    assert everything_in(folder) == before


def test_nonsense_in_a_sets_metadata_is_one_line(picture, tmp_path, capsys):
    flags = ["--model_dir", TINY, "--input_image", picture, *QUICK, "--output_video", tmp_path / "set"]
    path = tmp_path / "set" / "metadata.jsonl"
    path.parent.mkdir()
    ours = b'{"file_name": "x.mp4", "generated": true}'
    for data, words in (
        (ours.decode().encode("utf-16"), "UTF-8"), (ours + b"\n\xff\n", "UTF-8"), (b"[1]\n" + ours, "line 1"),
        (ours + b'\n{"file_name": 5, "generated": true}\n', "line 2"), (ours + b"\nnull\n", "line 2"),
        (b'{"file_name": "../x", "generated": true}\n', "line 1"), (b"[" * 9999 + b"\n", "line 1"),
        (b'{"file_name": "first_seed0_motion127.mp4", "generated": true, "requested": 3}\n', "line 1"),
    ):  # fmt: skip
        path.write_bytes(data)
        printed = infer(capsys, *flags, ok=False)
        assert printed.count("error: ") == 1 and words in printed.split("metadata.jsonl")[1], printed
        assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


def test_datasets_reads_the_set(made):
    datasets = pytest.importorskip("datasets")
    read = datasets.load_dataset("videofolder", data_dir=str(made), split="train")
    assert len(read) == 8 and {"video", "seed", "source_image", "motion_bucket_id", "versions"} <= set(
        read.column_names
    )


def test_other_settings_and_other_peoples_folders_are_refused(images, made, dataset, tmp_path, capsys):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in made.iterdir())
    arguments = ["--model_dir", TINY, "--input_image", images / "image?.png", "--output_video"]
    printed = infer(capsys, *arguments, made, *SIZE, *MANY, "--num_inference_steps", 3, ok=False)
    assert "num_inference_steps was 1, is 3" in printed
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in made.iterdir())
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "image0_seed0_motion127.mp4").write_text("mine")
    assert "and has no record in " in infer(capsys, *arguments, folder, *FAST, ok=False)
    (folder / "metadata.jsonl").write_text('{"directory": "clip0", "fps": 7}\n')
    assert "not written by infer_svd.py" in infer(capsys, *arguments, folder, *FAST, ok=False)
    assert (folder / "image0_seed0_motion127.mp4").read_text() == "mine" and len(list(folder.iterdir())) == 2
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "metrics.json").write_text("mine")
    printed = infer(capsys, *arguments, tmp_path / "scores", *FAST, "--compare_with", TINY, ok=False)
    assert "metrics.json is not of a set that was made here" in printed
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert "metrics.jsonl is not of a set that" in infer(capsys, *arguments, tmp_path / "run", *FAST, ok=False)
    printed = infer(capsys, *arguments, made, *SIZE, *MANY, "--output_format", "frames", ok=False)
    assert "a set of mp4, not of frames" in printed


def test_names_come_from_the_path_so_that_nothing_collides(tmp_path, dataset):
    for name in ("a/x.png", "b/x.png", "b/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert set(infer_svd.find_images(str(tmp_path / "*" / "x.*"))) == {"a/x", "b/x.png", "b/x.jpg"}
    assert set(infer_svd.find_images(str(tmp_path / "b"))) == {"x.png", "x.jpg"}
    (tmp_path / "b/x.png.png").write_bytes(b"")
    assert set(infer_svd.find_images(str(tmp_path / "b"))) == {"x.png", "x.jpg", "x.png.png"}
    assert {n: p.name for n, p in infer_svd.find_images(str(dataset)).items()} == {
        f"clip{i}": "00000.png" for i in range(3)
    }


def test_images_of_other_formats_are_read_and_what_is_no_image_is_counted(tmp_path, capsys):
    picture = Image.fromarray(moving_square(1)[0])
    for name, kind in (("a.png", "PNG"), ("b.jfif", "JPEG"), ("c.jp2", "JPEG2000"), ("d.TIF", "TIFF")):
        picture.save(tmp_path / name, kind)
    for name in ("x.txt", "y.txt", "z", ".hidden.txt"):
        (tmp_path / name).write_text("no image")
    assert set(infer_svd.find_images(str(tmp_path))) == {"a", "b", "c", "d"}
    assert capsys.readouterr().out == "left out, because they are not images: 2 .txt, 1 without a suffix\n"
    assert set(infer_svd.find_images(str(tmp_path / "?.*"))) == {"a", "b", "c", "d"}
    assert "2 .txt" in capsys.readouterr().out


@pytest.mark.parametrize("output_format", ["gif", "webp"])
def test_gif_and_webp_play_at_the_true_rate(output_format, picture, tmp_path, capsys):
    target = tmp_path / f"clip.{output_format}"
    infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", target, *SIZE,
        "--num_inference_steps", 1, "--fps", 7)  # fmt: skip
    with Image.open(target) as animation:
        durations = []
        for index in range(animation.n_frames):
            animation.seek(index)
            animation.load()
            durations.append(animation.info["duration"])
    assert len(durations) == 8 and abs(sum(durations) - 8000 / 7) <= 5
    assert json.loads(target.with_suffix(".json").read_text())["output_format"] == output_format


def test_a_generated_set_of_frames_trains(made, images, tmp_path, capsys):
    folder = tmp_path / "synthetic"
    infer(capsys, "--model_dir", TINY, "--input_image", images / "image0.png", "--output_video", folder, *FAST,
        "--output_format", "frames", "--motion_bucket_id", 60, 180, "--fps", 9)  # fmt: skip
    clips = list_clips(folder)
    assert len(clips) == 2
    for clip in clips:
        frames = np.stack([common.read_image(path) for path in clip["frames"]])
        assert clip["generated"] is True and clip["fps"] == 9 and clip["num_frames"] == len(frames) == 8
        assert clip["motion_bucket_id"] == motion_bucket(clip_motion(frames, 9))  # what it shows
        assert clip["requested"]["motion_bucket_id"] in (60, 180)  # what was asked for
    stock = stock_frames(TINY, moving_square(1)[0], fps=9, motion_bucket_id=180)
    assert np.array_equal([common.read_image(p) for p in clips[1]["frames"]], stock)  # exactly: PNG loses nothing
    run("train_svd.py", *train_arguments(folder, tmp_path / "trained"), "--max_train_steps", 1)
    again = infer(capsys, "--model_dir", TINY, "--input_image", images / "image0.png", "--output_video", folder, *FAST,
        "--output_format", "frames", "--motion_bucket_id", 60, 180, "--fps", 9)  # fmt: skip
    assert "nothing to make: all " in again


# ------------------------------------------------------------------------------------------------ longer, smaller


def test_segments_join_without_a_repeated_frame(picture, tmp_path, capsys):
    arguments = [
        "--model_dir",
        TINY,
        "--input_image",
        picture,
        *QUICK,
        "--output_format",
        "frames",
        "--num_segments",
        2,
    ]
    videos = []
    for name, flags in (("corrected", []), ("raw", ["--no-color_correction"])):
        printed = infer(capsys, *arguments, "--output_video", tmp_path / name, *flags)
        assert "segment 2: sharpness x" in printed
        clip = list_clips(tmp_path / name)[0]
        assert len(clip["segments"]) == 2 and clip["segments"][0].keys() == {"sharpness", "color", "motion"}
        videos.append(np.stack([common.read_image(path) for path in clip["frames"]]))
    # the stock pipeline, started again from the last frame; the second segment's own first frame is dropped
    generator = torch.Generator().manual_seed(0)
    first = stock_frames(TINY, moving_square(1)[0], generator, num_inference_steps=1)
    second = stock_frames(TINY, first[-1], generator, num_inference_steps=1)
    assert np.array_equal(videos[1], np.concatenate([first, second[1:]]))
    corrected = np.concatenate([first, infer_svd.match_colors(second, first[-1])[1:]])
    assert np.array_equal(videos[0], corrected) and len(corrected) == 15


def test_color_correction_removes_a_known_drift_and_leaves_the_rest():
    frames = (moving_square(5) * 0.6 + 40).astype(np.uint8)
    drifted = (frames * np.array([1.06, 0.97, 1.0]) + np.array([6, -4, 0])).round().astype(np.uint8)
    assert np.abs(infer_svd.match_colors(drifted, frames[0]).astype(int) - frames).max() <= 2
    assert np.array_equal(infer_svd.match_colors(frames, frames[0]), frames)


def test_low_vram_frames_equal_the_ordinary_ones_within_rounding(picture, tmp_path, capsys):
    videos = []
    for name, flags in (("low", ["--low_vram"]), ("ordinary", ["--decode_chunk_size", 4])):
        infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", tmp_path / name, *FAST, *flags,
            "--output_format", "frames")  # fmt: skip
        clip = list_clips(tmp_path / name)[0]
        assert clip["decode_chunk_size"] == 4
        videos.append(np.stack([common.read_image(path) for path in clip["frames"]]).astype(int))
    assert np.abs(videos[0] - videos[1]).max() <= (3 if torch.cuda.is_available() else 1)


def test_out_of_memory_falls_back_and_says_so(images, tmp_path, capsys, monkeypatch):
    original, calls = infer_svd.generate, []

    def short_of_memory(pipe, image, options, *more):
        calls.append(options["decode_chunk_size"])
        if len(calls) in (1, 2):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(pipe, image, options, *more)

    monkeypatch.setattr(infer_svd, "generate", short_of_memory)
    folder = tmp_path / "set"
    arguments = ["--model_dir", TINY, "--input_image", images / "image?.png", "--output_video", folder, *FAST]
    printed = infer(capsys, *arguments, "--num_frames", 9)
    assert calls == [9, 8, 4, 4] and "out of GPU memory: going on with --low_vram --decode_chunk_size 4" in printed
    assert all(line["decode_chunk_size"] == 4 and line["low_vram"] and line["fallback"] for line in lines_of(folder))
    assert "nothing to make: all " in infer(capsys, *arguments, "--num_frames", 9)
    monkeypatch.setattr(infer_svd, "generate", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("CUDA")))
    assert "with the smallest settings" in infer(capsys, *arguments, "--seed", 7, ok=False)


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUDNN_STATUS_ALLOCATION_FAILED"])
def test_out_of_memory_within_the_fp32_encode_leaves_no_fp32_vae(words, picture, tmp_path, capsys, monkeypatch):
    """In half precision the pipeline encodes with the VAE in fp32, and an exception there passes by its way back."""
    load, encode, dtypes = common.load_pipeline, AutoencoderKLTemporalDecoder.encode, []

    def load_half(name, dtype, *more):
        return load(name, torch.float16, *more)

    def encode_later(vae, *given, **options):
        dtypes.append(vae.dtype)
        if len(dtypes) == 1:
            raise RuntimeError(words)
        return encode(vae, *given, **options)

    monkeypatch.setattr(common, "load_pipeline", load_half)
    monkeypatch.setattr(AutoencoderKLTemporalDecoder, "encode", encode_later)
    target = tmp_path / "set" / "first_seed0_motion127.mp4"
    flags = ["--model_dir", TINY, "--input_image", picture, "--output_video", target.parent, *QUICK, "--num_frames", 2]
    assert "out of GPU memory: going on with --low_vram" in infer(capsys, *flags)
    assert dtypes == [torch.float32] * 2 and len(common.read_video(target)) == 2


def test_half_precision_uses_no_3d_convolution_and_gives_the_stock_frames(picture, monkeypatch):
    """torch 2.8 to 2.10 bring a cuDNN without half-precision Conv3d. Frames of the stock pipeline, within a level."""
    image = Image.fromarray(moving_square(1)[0])

    def frames(pipe):
        pipe.set_progress_bar_config(disable=True)
        options = {"width": 48, "height": 32, "num_frames": 4, "num_inference_steps": 1}  # slow on a CPU
        return pipe(image, generator=torch.Generator().manual_seed(0), output_type="np", **options).frames[0]

    stock, ours = (common.load_pipeline(TINY, torch.float16)[0] for _ in range(2))
    expected = frames(stock)
    wrap_unet(ours.unet)
    avoid_conv3d(ours.vae)
    monkeypatch.setattr(torch.nn.Conv3d, "_conv_forward", None)
    assert np.abs(frames(ours) - expected).max() <= 1 / 255


def test_single_token_shortcut_gives_the_same_bits():
    pipes = [common.load_pipeline(TINY, torch.float32)[0] for _ in range(2)]
    wrap_unet(pipes[1].unet)
    generator = torch.Generator().manual_seed(0)
    sample, token = torch.randn(2, 8, 8, 16, 24, generator=generator), torch.randn(2, 1, 32, generator=generator)
    ids = torch.tensor([[6.0, 127.0, 0.02]] * 2)
    with torch.no_grad():
        stock, ours = (pipe.unet(sample, torch.tensor(0.3), token, ids).sample for pipe in pipes)
    assert torch.equal(stock, ours)


def test_dry_run_forecasts_1024x576_within_8_gib_from_the_configuration_alone(picture, tmp_path, capsys):
    printed = infer(capsys, "--model_dir", "stabilityai/stable-video-diffusion-img2vid-xt", "--input_image", picture,
        "--output_video", tmp_path / "set", "--num_videos_per_image", 3, "--low_vram", "--dry_run")  # fmt: skip
    assert "3 clips of 25 frames, 1024x576" in printed and not (tmp_path / "set").exists()
    assert "time for 3 clips; an estimate from published rates, on no card measured:" in printed
    assert 3 < float(printed.split(" GiB of GPU")[0].split()[-1]) < 7  # CUDA's own half a GiB comes on top


# --------------------------------------------------------------------------------------------------------- judging


def test_real_clips_at_another_rate_are_told_in_one_line_a_rate(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    clips = {name: {"frames": [tmp_path / "x.png"] * 2, "fps": 5 if name != "c" else 7} for name in "abcd"}
    settings = SimpleNamespace(reference="real", num_frames=2, num_segments=1, fps=7)
    infer_svd.check_real_clips(settings, [{"image": name} for name in clips], clips)
    assert capsys.readouterr().out == "warning: 3 real clips at 5 fps (a, b, d) beside generated ones at 7 fps\n"


def test_comparison_and_reference_are_scored_beside_the_copied_frame(dataset, trained, tmp_path, capsys):
    folder = tmp_path / "judged"
    arguments = ["--model_dir", trained, "--input_image", dataset, "--output_video", folder, *STEPS,
        "--compare_with", TINY, "--reference", dataset]  # fmt: skip
    printed = infer(capsys, *arguments)
    metrics = json.loads((folder / "metrics.json").read_text())
    labels = ["first frame copied", f"generated ({trained.name})", f"generated ({TINY.name})"]
    assert list(metrics["mean"]) == labels and all(label in printed for label in labels)
    own = common.read_video(folder / "clip1_seed0_motion127.mp4")
    real = moving_square(10, seed=1)[:8]
    for metric, value in metrics["clips"][labels[1]]["clip1"][0].items():
        assert value == pytest.approx(video_metrics(own, real)[metric]), metric
    error = ((own[1:].astype(float) - real[1:]) ** 2).mean()
    assert metrics["clips"][labels[1]]["clip1"][0]["psnr"] == pytest.approx(10 * np.log10(255**2 / error))
    base = common.read_video(folder / ".compare" / "clip1_seed0_motion127.mp4")
    assert metrics["clips"][labels[2]]["clip1"][0]["psnr"] == pytest.approx(video_metrics(base, real)["psnr"])
    for scores in metrics["mean"].values():
        assert scores["psnr"]["low"] <= scores["psnr"]["mean"] <= scores["psnr"]["high"]
    sheets = sorted((folder / "side_by_side").glob("*.mp4"))
    assert len(sheets) == 3 and common.read_video(sheets[0]).shape[2] == 3 * 288
    assert len(read_metadata(folder)) == 0 and len(lines_of(folder)) == 3
    assert "nothing to make: all " in infer(capsys, *arguments)
    (folder / ".metrics.json.0.part").write_bytes(b""), (folder / "side_by_side/.clip1.mp4.0.part").write_bytes(b"")
    infer(capsys, "--model_dir", TINY, *arguments[2:5], tmp_path / "same", *arguments[6:])
    labels = ["first frame copied", f"generated ({TINY})", f"compared ({TINY})"]
    assert list(json.loads((tmp_path / "same/metrics.json").read_text())["mean"]) == labels
    infer(capsys, *arguments)
    assert not list(folder.rglob(".*.part"))


def test_scores_of_clips_that_were_trained_on_are_called_so_and_left_out_by_held_out(
    trained, dataset, tmp_path, capsys
):
    again = shutil.copytree(dataset, tmp_path / "renamed")  # the same frames by other names
    for name in ("clip0", "clip1", "clip2"):
        (again / name).rename(again / f"other_{name}")
    model = shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((model / "training_settings.json").read_text())
    settings["held_out"] = {"clip2": settings["trained_on"].pop("clip2")}
    (model / "training_settings.json").write_text(json.dumps(settings))
    arguments = ["--model_dir", model, "--input_image", again, "--reference", again, *QUICK, "--output_video"]
    printed = infer(capsys, *arguments, tmp_path / "all")
    assert printed.count(f"look at {tmp_path / 'all' / 'index.html'}") == 1
    assert "2 of these 3 clips were trained on by" in printed and "--held_out scores the other 1 alone" in printed
    assert "2 of the 3 real clips were trained on" in printed
    metrics = json.loads((tmp_path / "all/metrics.json").read_text())
    assert metrics["trained_on"] == ["other_clip0", "other_clip1"]
    arguments[1] = other = shutil.copytree(model, tmp_path / "other model")
    printed = infer(capsys, *arguments, tmp_path / "all", "--motion_bucket_id", 99, ok=False)
    assert f"metrics.json has the scores of --model_dir {model}; give another" in printed
    assert json.loads((tmp_path / "all/metrics.json").read_text()) == metrics and other.is_dir()
    arguments[1] = model
    printed = infer(capsys, *arguments, tmp_path / "new", "--held_out")
    assert "--held_out: 2 of 3 clips left out" in printed and "warning" not in printed
    metrics = json.loads((tmp_path / "new/metrics.json").read_text())
    assert metrics["trained_on"] == [] and list(metrics["clips"]["first frame copied"]) == ["other_clip2"]
    printed = infer(capsys, "--model_dir", trained, *arguments[2:], tmp_path / "none", "--held_out", ok=False)
    assert "--held_out: all 3 clips were trained on" in printed and not (tmp_path / "none").exists()


def test_conditioning_far_from_the_training_data_is_warned_of(capsys):
    settings = {"median_fps": 9.99, "median_motion_bucket_id": 100, "motion_bucket_id_range": [90, 120]}
    arguments = ["--model_dir", "m", "--input_image", "i", "--output_video", "o"]
    resolved = infer_svd.resolve(infer_svd.parse_args(arguments), TINY, settings)
    assert resolved.fps == 9.99 and resolved.motion_bucket_id == [100] and not capsys.readouterr().out
    args = infer_svd.parse_args([*arguments, "--fps", "30", "--motion_bucket_id", "110", "200"])
    infer_svd.resolve(args, TINY, settings)
    printed = capsys.readouterr().out
    assert "--motion_bucket_id 200: the model was fine-tuned on clips of 90 to 120" in printed and "110" not in printed
    assert "--fps 30" in printed


def test_combinations_that_cannot_work_are_refused_before_the_model_is_loaded(
    images, picture, dataset, tmp_path, capsys
):
    def refused(*flags, image=picture, target="out"):
        printed = infer(capsys, "--model_dir", tmp_path / "no_model_here", "--input_image", image, "--output_video",
            tmp_path / target, *flags, ok=False)  # fmt: skip
        assert not (tmp_path / target).exists() and "Traceback" not in printed
        return printed

    assert "give a folder" in refused("--num_videos_per_image", 2, target="v.mp4")
    assert "give a folder" in refused("--motion_bucket_id", 1, 2, target="v.mp4")
    printed = refused("--compare_with", TINY, target="v.mp4")
    assert "give a folder" in printed and "which --compare_with does not fit" in printed
    assert "give a folder" in refused("--output_format", "frames", target="v.mp4")
    assert "need a folder" in refused(image=images / "image?.png", target="v.mp4")
    assert "must end in .mp4" in refused(target="v.avi")
    assert "cannot be compared" in refused("--reference", dataset, "--output_format", "gif")
    assert "no image matches" in refused(image=tmp_path / "*.png")
    assert "no readable image" in refused(image=images / "*.jpg")
    common.write_video(tmp_path / "clip.mp4", moving_square(4), 7)
    (tmp_path / "my videos").mkdir()
    common.write_video(tmp_path / "my videos" / "clip.mp4", moving_square(4), 7)
    printed = refused(image=tmp_path / "my videos" / "clip.mp4")
    prepare, ffmpeg = re.search(r"is a video; python (.*) gives a dataset.*; or: ffmpeg (.*)\n", printed).groups()
    assert shlex.split(ffmpeg)[:2] == ["-i", str(tmp_path / "my videos" / "clip.mp4")]
    run(*shlex.split(prepare)[:-1], tmp_path / "frames")
    assert sorted(path.name for path in (tmp_path / "frames" / "clip").iterdir())[0] == "00000.png"
    assert "holds videos and no image; python prepare_dataset.py" in refused(image=tmp_path / "my videos")
    printed = refused(image=tmp_path / "my videos" / "*.mp4", target="x")
    assert "no image matches, but videos; python prepare_dataset.py" in printed
    assert "SVD takes no text" in refused("--prompt", "a robot arm")
    assert "with spaces between them" in refused("--motion_bucket_id", "60,120,180")
    (tmp_path / "empty").mkdir()
    assert "holds no image, and no folder of frames" in refused(image=tmp_path / "empty")
    assert "--num_segments must be" in refused("--num_segments", 0)
    assert "--reference" in refused("--reference", tmp_path / "nothing")
    long = Path(shutil.copy(picture, tmp_path / ("\u957f" * 80 + ".png")))
    assert "name is too long" in infer(capsys, "--model_dir", TINY, "--input_image", long, *FAST, "--output_video",
        tmp_path / "out", ok=False)  # fmt: skip
    assert "--num_videos_per_image must be" in refused("--num_videos_per_image", 0)
    assert "no such model folder" in refused()
    printed = infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", tmp_path / "out", *FAST,
        "--reference", dataset, ok=False)  # fmt: skip
    assert "no clip named first" in printed and not (tmp_path / "out").exists()
    bad = shutil.copytree(dataset, tmp_path / "bad")
    (bad / "clip1/00005.png").write_bytes(b"garbage")
    printed = infer(capsys, "--model_dir", TINY, "--input_image", bad, "--output_video", tmp_path / "out", *FAST,
        "--reference", bad, ok=False)  # fmt: skip
    assert "00005.png: not a readable image" in printed and not (tmp_path / "out").exists()
    into = ("--input_image", bad, "--output_video", bad / "more", "--output_format", "frames")
    printed = infer(capsys, "--model_dir", TINY, *into, ok=False)
    assert "lies in --input_image" in printed and not (bad / "more").exists()


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(picture, tmp_path, capsys):
    """A limit on the size of a file stands for the full disk: the clip is larger than that."""
    command = ["--model_dir", TINY, "--input_image", picture, *QUICK, "--output_video"]
    for target in (tmp_path / "one.mp4", tmp_path / "set"):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            printed = infer(capsys, *command, target, ok=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "error: " in printed and "Traceback" not in printed
    assert not [path for path in tmp_path.rglob("*.mp4")] and not (tmp_path / "set" / "metadata.jsonl").exists()
    infer(capsys, *command, tmp_path / "set")  # and with room again it goes on
    assert len(lines_of(tmp_path / "set")) == 1


def test_a_damaged_metadata_file_of_someone_else_is_left_as_it_is(picture, tmp_path, capsys):
    (tmp_path / "metadata.jsonl").write_text('{"note": "mine"')
    printed = infer(capsys, "--model_dir", TINY, "--input_image", picture, "--output_video", tmp_path, *QUICK, ok=False)
    assert (
        "metadata.jsonl line 1: damaged" in printed and (tmp_path / "metadata.jsonl").read_text() == '{"note": "mine"'
    )
