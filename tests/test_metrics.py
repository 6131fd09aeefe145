"""The metrics against their definitions; a new entry of the tables is computed, shown and chosen by itself."""

import cv2
import numpy as np
import pytest
from conftest import moving_square

import train_svd
from svd_parts import judging, metrics, page
from svd_parts.metrics import optical_flow, ssim, video_metrics


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
