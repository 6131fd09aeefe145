"""Estimates of time: the table of cards, and what is printed of it."""

import re
from types import SimpleNamespace

import pytest

from svd_parts import timing


def test_a_readable_time():
    assert [timing.readable(s) for s in (1.234, 42, 720, 9000)] == ["1.2 s", "42 s", "12 min", "2.5 h"]


def test_a_plan_gives_the_time_on_every_card(capsys):
    options = SimpleNamespace(width=96, height=64, num_frames=8, train_batch_size=1, gradient_accumulation_steps=1,
        max_train_steps=1000, validation_steps=500, validation_inference_steps=25, cache_latents=True)  # fmt: skip
    plan, device = {"flops_per_step": 62.7e12, "peak_memory_gib": 17.4}, SimpleNamespace(type="cpu")
    hours = timing.print_training_time(options, plan, 9, 1, {"none": 17.4}, device)
    text = capsys.readouterr().out
    assert set(hours) == set(timing.CARDS) and hours["RTX 3090"] > hours["RTX 4090"] > hours["H100 80 GB"] > 0
    assert "time for 1000 steps, caching 9 frames and validating 1 clip included; an estimate" in text
    assert all(f"  {name}" in text for name in timing.CARDS) and " s a step, " in text
    assert text.count("but 16 GiB are too few") == 1
    timing.print_clip_time(100.0, 3, {"": 32.5, "--decode_chunk_size 8": 18.0, "--low_vram": 15.0}, device)
    text = capsys.readouterr().out
    assert "time for 3 clips; an estimate from published rates, on no card measured:" in text
    assert all(f"  {name}" in text for name in timing.CARDS) and text.count(" a clip, ") == len(timing.CARDS)
    assert text.count(" in all, with --decode_chunk_size 8\n") == 2 and text.count(" in all\n") == 2
    assert text.count(", 16 GiB are too few\n") == 1


def test_each_card_takes_the_fastest_checkpointing_that_fits(capsys):
    """Of the work that a dry run counts for each mode of SVD-XT: 62.7, 56.0 and 45.8 TFLOP a step."""
    options = SimpleNamespace(width=512, height=320, num_frames=25, train_batch_size=1, gradient_accumulation_steps=1,
        max_train_steps=1, validation_steps=500, validation_inference_steps=25, cache_latents=True)  # fmt: skip
    plan, peaks = {"flops_per_step": 62.73e12}, {"none": 37.0, "transformers": 17.4, "full": 13.8}
    timing.print_training_time(options, plan, 1, 0, peaks, SimpleNamespace(type="cpu"))
    text = capsys.readouterr().out
    assert "time for 1 step, caching 1 frame included" in text and "too few" not in text
    for name, tflop, how in (("RTX 4060 Ti 16 GB", 62.73, ""), ("RTX 3090", 56.0, "transformers"),
            ("A100 80 GB", 45.8, "none")):  # fmt: skip
        found = re.search(rf"  {name} +([\d.]+) s a step, .* s( \(gradient checkpointing \w+\))?\n", text)
        card = timing.CARDS[name]
        assert float(found[1]) == pytest.approx(tflop / (card.tflops * card.share), abs=0.01)
        assert found[2] == (f" (gradient checkpointing {how})" if how else None)


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
