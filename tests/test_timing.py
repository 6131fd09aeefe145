"""Estimates of time: the table of cards, and what both dry runs print of it."""

import json
from types import SimpleNamespace

import pytest
from conftest import TINY, moving_square, run, write_clip
from PIL import Image

from svd_parts import timing


def test_a_readable_time():
    assert [timing.readable(s) for s in (1.234, 42, 720, 9000)] == ["1.2 s", "42 s", "12 min", "2.5 h"]


def test_the_dry_runs_end_with_time_for_every_card(tmp_path):
    write_clip(tmp_path / "data" / "clip", moving_square(9))
    flags = ["--pretrained_model_name", TINY, "--dataset_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    size = ["--width", 96, "--height", 64, "--num_frames", 8]
    text = run(
        "train_svd.py", *flags, *size, "--max_train_steps", 1000, "--num_validation_videos", 1, "--dry_run"
    ).stdout
    plan = json.loads(text.strip().split("\n")[-1])
    assert set(plan["hours"]) == set(timing.CARDS) and all(hours >= 0 for hours in plan["hours"].values())
    assert "time for 1000 steps, caching 9 frames and validating 1 clip included; an estimate" in text
    assert all(f"  {name}" in text for name in timing.CARDS) and " s a step, " in text
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    flags = ["--model_dir", TINY, "--input_image", tmp_path / "a.png", "--output_video", tmp_path / "x.mp4"]
    text = run("infer_svd.py", *flags, *size, "--dry_run").stdout
    assert "the run goes on with --decode_chunk_size 4 --low_vram: " in text
    assert "time for 1 clip; an estimate from published rates, on no card measured:" in text


def test_a_validation_takes_as_long_as_its_denoising_steps():
    options = SimpleNamespace(width=512, height=320, num_frames=25, train_batch_size=1, gradient_accumulation_steps=1,
        max_train_steps=1000, validation_steps=500, cache_latents=True)  # fmt: skip
    work = []
    for steps in (0, 10, 25):
        options.validation_inference_steps = steps
        work.append(timing.training_tflop(options, {"flops_per_step": 62.7e12}, 100, 4, "none")[2])
    assert work[2] - work[0] == pytest.approx(2.5 * (work[1] - work[0]))
    assert work[1] - work[0] == pytest.approx(3 * 4 * 10 * 2 * 62.7 / 2.56)  # guidance needs two forward passes a step


def test_a_step_of_svd_on_a_4090_is_what_the_roofline_says_within_a_factor():
    card = timing.CARDS["RTX 4090"]
    assert 62.7 / (card.tflops * card.share) == pytest.approx(0.967, rel=0.3)
