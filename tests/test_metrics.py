"""The tables of metrics and measures: a new entry is computed, shown and chosen by itself."""

import numpy as np
import pytest
from conftest import moving_square

import train_svd
from svd_parts import judging, metrics, page


def test_a_new_metric_is_one_entry(monkeypatch, capsys, tmp_path):
    entry = metrics.Metric("mean level", "of 255", "higher", "brightness", lambda pair: float(pair.generated.mean()))
    monkeypatch.setitem(metrics.METRICS, "level", entry)
    scores = metrics.video_metrics(np.full((8, 64, 96, 3), 7, np.uint8), moving_square(8))
    assert scores["level"] == 7 and metrics.table_metrics()["level"] == "mean level of 255"
    judging.print_table({"generated": judging.bootstrap({"clip": [scores]})}, 1)
    assert "mean level of 255" in capsys.readouterr().out
    parser = train_svd.build_parser()
    [action] = [action for action in parser._actions if action.dest == "validation_metric"]
    assert "level" in action.choices and "motion_ratio" not in action.choices
    page.write_run_page(tmp_path)
    assert '"level": ["mean level", "brightness"]' in (tmp_path / "index.html").read_text()


def test_metrics_of_equal_and_of_still_videos():
    real = moving_square(8)
    same, still = metrics.video_metrics(real, real), metrics.video_metrics(real, np.repeat(real[:1], 8, axis=0))
    assert same["psnr"] == float("inf") and same["ssim"] == pytest.approx(1) and same["motion_ratio"] == 1
    assert same["flow_error"] == 0 and same["flow_cosine"] == pytest.approx(1)
    assert still["psnr_moving"] is still["flow_error"] is still["motion_ratio"] is None and still["psnr"] > 0


def test_ssim_is_that_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    first, second = moving_square(2, seed=3)
    second = np.clip(second.astype(int) + np.random.default_rng(0).integers(-20, 20, second.shape), 0, 255).astype(
        np.uint8
    )
    theirs = skimage.structural_similarity(first, second, channel_axis=2, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, data_range=255)  # fmt: skip
    assert metrics.ssim(first, second) == pytest.approx(theirs, abs=1e-3)
