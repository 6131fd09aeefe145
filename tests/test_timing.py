"""Estimates of time: the table of cards, and what is printed of it."""

from types import SimpleNamespace

import pytest

from svd_parts import timing


def test_a_readable_time():
    assert [timing.readable(s) for s in (1.234, 42, 720, 9000)] == ["1.2 s", "42 s", "12 min", "2.5 h"]


def test_a_plan_gives_the_time_on_every_card(capsys):
    options = SimpleNamespace(width=96, height=64, num_frames=8, train_batch_size=1, gradient_accumulation_steps=1,
        max_train_steps=1000, validation_steps=500, validation_inference_steps=25, cache_latents=True)  # fmt: skip
    plan, device = {"flops_per_step": 62.7e12, "peak_memory_gib": 17.4}, SimpleNamespace(type="cpu")
    hours = timing.print_training_time(options, plan, 9, 1, "none", device)
    text = capsys.readouterr().out
    assert set(hours) == set(timing.CARDS) and hours["RTX 3090"] > hours["RTX 4090"] > hours["H100 80 GB"] > 0
    assert "time for 1000 steps, caching 9 frames and validating 1 clip included; an estimate" in text
    assert all(f"  {name}" in text for name in timing.CARDS) and " s a step, " in text
    assert text.count("but 16 GiB are too few") == 1
    timing.print_clip_time(100.0, 3, device)
    text = capsys.readouterr().out
    assert "time for 3 clips; an estimate from published rates, on no card measured:" in text
    assert all(f"  {name}" in text for name in timing.CARDS) and text.count(" a clip, ") == len(timing.CARDS)


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
