"""Measures how much a clip moves, scores generated clips, and reads a run's metrics.jsonl."""

import contextlib
import functools
import math
from pathlib import Path
from typing import Callable, NamedTuple

import cv2
import numpy as np

from svd_parts.files import UserError, parse_object


def optical_flow(first, second, preset=cv2.DISOPTICAL_FLOW_PRESET_MEDIUM):
    """Dense flow (H, W, 2) in pixels between two uint8 images, RGB or grey: OpenCV's DIS."""
    first, second = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) if f.ndim == 3 else f for f in (first, second))
    return cv2.DISOpticalFlow_create(preset).calc(first, second, None)


MOTION_SIZE = 128  # pixels of the longer side for measuring motion, so that motion does not depend on the resolution
MOTION_MIDDLE, MOTION_EXPONENT = 1.5, 0.5  # the motion of the middle bucket, and how the buckets spread around it


def motion_stride(fps):
    """Frames between the two pictures whose motion is measured: about a tenth of a second."""
    return max(1, round(fps / 10))


def motion_thumbnail(frame, to_grey=cv2.COLOR_RGB2GRAY):
    """(H, W, 3) -> grey, with the longer side at most `MOTION_SIZE`, for `flow_magnitude`."""
    step = max(1, max(frame.shape[:2]) // (2 * MOTION_SIZE))  # first takes every step-th pixel: area averaging is slow
    frame = frame[::step, ::step]
    scale = MOTION_SIZE / max(frame.shape[:2])
    if scale < 1:
        size = (max(8, round(frame.shape[1] * scale)), max(8, round(frame.shape[0] * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(frame, to_grey)


def flow_magnitude(first, second):
    """Mean length of the optical flow between two thumbnails, in percent of the longer side: DIS, fast preset."""
    h, w = first.shape
    if min(h, w) < 32:  # DIS fails on smaller images
        pad = (0, max(0, 32 - h), 0, max(0, 32 - w), cv2.BORDER_REPLICATE)
        first, second = cv2.copyMakeBorder(first, *pad), cv2.copyMakeBorder(second, *pad)
    flow = optical_flow(first, second, cv2.DISOPTICAL_FLOW_PRESET_FAST)[:h, :w]
    return 100 * float(np.nan_to_num(np.hypot(flow[..., 0], flow[..., 1])).mean()) / max(h, w)


def clip_motion(frames, fps):
    """How much a clip (T, H, W, 3) RGB moves: mean optical flow in percent of the longer side per second."""
    stride = min(motion_stride(fps), max(1, len(frames) - 1))
    thumbnails = [motion_thumbnail(frame) for frame in frames[::stride]]
    flows = [flow_magnitude(first, second) for first, second in zip(thumbnails, thumbnails[1:])]
    return float(np.mean(flows)) * fps / stride if flows else 0.0


def motion_bucket(motion):
    """The motion_bucket_id of a `clip_motion`: 255 * m^p / (m^p + middle^p). Our scale: Stability's is not public."""
    powered = max(motion, 0.0) ** MOTION_EXPONENT
    return round(255 * powered / (powered + MOTION_MIDDLE**MOTION_EXPONENT))


def ssim(first, second):
    """Structural similarity of two (H, W, 3) uint8 images: Gaussian window, sigma 1.5 (Wang et al. 2004)."""
    x, y = first.astype(np.float64), second.astype(np.float64)

    def mean(image):
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(score[5:-5, 5:-5].mean())  # the border has no full window


def psnr(squared_error):
    """Decibels of a mean squared error on the 0..255 scale; infinite for equal pictures."""
    return float(10 * np.log10(255**2 / squared_error)) if squared_error > 0 else float("inf")


class Pair:
    """A generated clip and the real clip with the same first frame. Computes once what several metrics need."""

    def __init__(self, generated, real):
        self.length = min(len(generated), len(real))
        self.generated, self.real = np.asarray(generated)[: self.length], np.asarray(real)[: self.length]
        self.error = (self.generated[1:].astype(np.float64) - self.real[1:]) ** 2

    @functools.cached_property
    def moving(self):
        """The moving pixels, (T - 1, H, W) bool: |real - frame 0| > 20 of 255 in any channel, dilated 3x3."""
        moving = np.abs(self.real[1:].astype(np.int16) - self.real[0]).max(axis=3) > 20
        return np.stack([cv2.dilate(m.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0 for m in moving])

    @functools.cached_property
    def flows(self):
        """DIS flow of the moving pixels in the generated and in the real clip: two arrays (N, 2), pixels a frame."""
        steps, moving = range(self.length - 1), self.moving
        videos = self.generated, self.real
        return [np.concatenate([optical_flow(v[t], v[t + 1])[moving[t]] for t in steps]) for v in videos]


def ssim_of_frames(pair):
    return float(np.mean([ssim(g, r) for g, r in zip(pair.generated[1:], pair.real[1:])]))


def motion_ratio(pair):
    step, real = (np.abs(np.diff(v.astype(np.float64), axis=0)).mean() for v in (pair.generated, pair.real))
    return float(step / real) if real > 0 else None


def flow_error(pair):
    flow, truth = pair.flows
    return float(np.linalg.norm(flow - truth, axis=1).mean())


def flow_cosine(pair):
    flow, truth = pair.flows
    dot, norms = (flow * truth).sum(1), np.linalg.norm(flow, axis=1) * np.linalg.norm(truth, axis=1)
    return float(dot.sum() / max(norms.sum(), 1e-9))


class Metric(NamedTuple):
    """One entry of the table of metrics. A new metric is one new entry; it is then shown everywhere."""

    title: str
    unit: str
    better: str  # higher, lower, or "near 1"
    note: str  # shown on the page
    compute: Callable = None  # Pair -> number or None; not for the loss, which validation computes
    needs_motion: bool = False  # whether the score is None for a real clip that does not move
    in_tables: bool = True  # whether the tables of infer_svd.py and of a validation show it
    picks_best: bool = True  # whether --validation_metric may name it


METRICS = {
    "loss_v": Metric("held-out loss", "", "lower", "mean over the noise levels, lower is better", in_tables=False),
    "psnr": Metric("PSNR", "dB", "higher", "over whole frames: a still background wins",
        lambda p: psnr(p.error.mean())),
    "ssim": Metric("SSIM", "", "higher", "over whole frames, at most 1", ssim_of_frames),
    "psnr_moving": Metric("PSNR moving", "dB", "higher", "where it moves, higher is better",
        lambda p: psnr(p.error[p.moving].mean()), needs_motion=True),
    "motion_ratio": Metric("motion ratio", "", "near 1", "generated over real: 0 is frozen, 1 moves as much",
        motion_ratio, picks_best=False),
    "flow_error": Metric("flow error", "px", "lower", "pixels a frame where it moves, lower is better",
        flow_error, needs_motion=True),
    "flow_cosine": Metric("direction of motion", "", "higher", "cosine to the real flow where it moves, 1 is right",
        flow_cosine, needs_motion=True, in_tables=False, picks_best=False),
}  # fmt: skip


def table_metrics():
    """{name: heading} of the metrics in the printed tables; a heading is like `PSNR moving dB`."""
    return {name: f"{metric.title} {metric.unit}".strip() for name, metric in METRICS.items() if metric.in_tables}


def video_metrics(generated, real):
    """Scores a generated clip against the real one, (T, H, W, 3) uint8 RGB each, over frames 1..T-1: {metric: number}.

    PSNR and SSIM over whole frames prove little: a static background scores high. None where the real clip is static.
    """
    pair = Pair(generated, real)
    moves = pair.moving.any()
    compute = {name: metric for name, metric in METRICS.items() if metric.compute}
    return {name: m.compute(pair) if moves or not m.needs_motion else None for name, m in compute.items()}


def sharpness(frame):
    """Variance of the Laplacian of (H, W, 3) RGB; lower for a blurred picture."""
    return float(cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def sharpness_ratio(frames):
    """Mean `sharpness` of the last quarter of the frames, over that of frame 0; None if frame 0 has only one colour."""
    start, end = sharpness(frames[0]), np.mean([sharpness(frame) for frame in frames[-max(1, len(frames) // 4) :]])
    return round(float(end / start), 4) if start else None


def flicker(frames):
    """Mean |change| of the mean brightness from frame to frame, in levels of 255. Motion hardly changes it."""
    brightness = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() for frame in frames]
    return round(float(np.abs(np.diff(brightness)).mean()), 4)


class Measure(NamedTuple):
    """One entry of the table of measures, which need no real clip."""

    title: str
    note: str  # shown on the page
    compute: Callable  # (frames (T, H, W, 3), input image (H, W, 3), motion as `clip_motion`) -> number or None


MEASURES = {
    "motion": Measure("motion", "mean optical flow, % of the longer side a second", lambda f, i, m: round(m, 4)),
    "measured_motion_bucket_id": Measure("bucket", "the measured motion as a motion bucket, 0 to 255",
        lambda f, i, m: motion_bucket(m)),
    "sharpness_ratio": Measure("sharpness", "last quarter of the frames over the first frame: below 1 it blurs",
        lambda f, i, m: sharpness_ratio(f)),
    "psnr_first_frame": Measure("first frame dB", "PSNR of frame 0 to the input image; 100 stands for equal",
        lambda f, i, m: round(min(psnr(((f[0] - i.astype(np.float64)) ** 2).mean()), 100.0), 2)),
    "flicker": Measure("flicker", "mean change of the mean brightness from frame to frame, levels of 255",
        lambda f, i, m: flicker(f)),
}  # fmt: skip


def clip_measures(frames, image, fps):
    """Measures a generated clip (T, H, W, 3) RGB without a real one: {measure: number}. image: its input, same size."""
    motion = clip_motion(frames, fps)
    return {name: measure.compute(frames, image, motion) for name, measure in MEASURES.items()}


def mean_scores(scores):
    """{metric: mean} over the clips that have a score for the metric. scores: [{metric: number or None}]."""
    values = {name: [score[name] for score in scores if score[name] is not None] for name in scores[0]}
    return {name: float(np.mean(given)) for name, given in values.items() if given}


def finite(values):
    """Replaces numbers that JSON lacks by None: infinite or NaN, from an overflow in fp16 or from equal pictures."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def read_metrics(output_dir):
    """The lines of a run's metrics.jsonl as dicts, without a line that a crash cut off."""
    path, lines = Path(output_dir) / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):
            lines.append(parse_object(line, damaged=""))
    return [line for line in lines if isinstance(line.get("step"), int)]
