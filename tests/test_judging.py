"""Scores with intervals, and which real clips a model was trained on."""

import numpy as np
import pytest
from conftest import moving_square, write_clip

from svd_parts.dataset import add_digests
from svd_parts.judging import bootstrap, find_trained_on


def test_bootstrap_interval_covers_the_mean_and_leaves_out_what_a_clip_does_not_have():
    rng = np.random.default_rng(1)
    scores = {str(i): [{"psnr": rng.normal(20, 2), "motion_ratio": None if i else 1.5}] for i in range(100)}
    result = bootstrap(scores)
    width = result["psnr"]["high"] - result["psnr"]["low"]
    assert result["psnr"]["low"] < result["psnr"]["mean"] < result["psnr"]["high"]
    assert width == pytest.approx(2 * 1.96 * 2 / 10, rel=0.25)
    assert result["motion_ratio"] == {"mean": 1.5, "low": 1.5, "high": 1.5}


def test_what_was_trained_on_is_told_by_frames_names_and_recordings(tmp_path):
    clips = {}
    for seed, name in enumerate(("a", "b", "c")):
        write_clip(tmp_path / name, moving_square(3, seed=seed))
        clips[name] = {"directory": name, "frames": sorted((tmp_path / name).iterdir())}
    add_digests(list(clips.values()))
    digests = {name: clip["digest"] for name, clip in clips.items()}
    assert find_trained_on(clips, [{}, {}]) == set()
    assert find_trained_on(clips, [{"trained_on": {"x": digests["a"]}}]) == {"a"}
    assert find_trained_on(clips, [{"trained_on": {"a": "0"}}]) == set()  # another dataset's first episode
    clips["a"]["recording"] = "1234"
    assert find_trained_on(clips, [{"trained_on": {"a": "0"}, "marks": {"1234": "a"}}]) == {"a"}  # at another size
    assert find_trained_on(clips, [{"marks": {digests["b"]: "old"}}]) == {"b"}  # by the base
    clips["b"]["group"] = clips["a"]["group"] = "video.mp4"
    settings = {"trained_on": {"a": digests["a"]}, "held_out": {"c": digests["c"]}}
    assert find_trained_on(clips, [settings]) == {"a", "b"}
    clips["c"]["group"] = "video.mp4"
    assert find_trained_on(clips, [settings]) == {"a", "b"}  # c was held out
